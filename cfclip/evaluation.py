"""An editor, measured: on sampled faces, as a set, on inverted renders, and there and back again; over strengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor

from . import metrics
from .baselines import Editor
from .domains import Domain
from .inversion import encode
from .method import at_once
from .metrics import Edit, Pictures
from .toonfaces.captions import claim_of
from .toonfaces.factors import HELD_OUT, NATURAL, sample_face
from .toonfaces.gan import to_tensor
from .toonfaces.readout import VISIBLE
from .toonfaces.render import render, render_image

COUNTERFACTUAL = ("counterfactual", "counterfactual, held out from CLIP")
GROUPS = (*COUNTERFACTUAL, "in the domain", "null edit", "other")


def group_of(prompt: str, source_text: str = "face") -> str:
    """One of :data:`GROUPS`: what kind of edit a prompt asks for, as toonfaces' supports have it. "other" names no part's colour."""
    if prompt == source_text:
        return "null edit"
    if (claim := claim_of(prompt)) is None:
        return "other"
    part, colour = claim
    return "in the domain" if colour in NATURAL[part] else COUNTERFACTUAL[claim in HELD_OUT]


@dataclass(frozen=True, eq=False)
class Truth:
    """N held-out renders that show the part a prompt names, the same with the part recoloured, and the encoder's codes of them.

    renders, wanted: [N, 3, R, R] in [-1, 1]; w: [N, L, D].
    """

    domain: Domain
    claim: tuple[str, str]
    renders: Tensor
    wanted: Tensor
    w: Tensor

    @cached_property
    def floor(self) -> np.ndarray:
        """Perceptual distance of the inverted pictures G(w) to the renders [N]: what inversion alone costs."""
        with torch.no_grad():
            images = torch.cat([self.domain.generator.synthesis(part) for part in self.w.split(at_once(self.domain.generator))])
        return metrics.distances(self.domain, images, self.renders)[1]

    def columns(self, editor: Editor, strength: float) -> dict[str, np.ndarray]:
        """truth_distance: perceptual distance of the edited to the true counterfactual; truth_floor: :attr:`floor`; success_inverted: of the edits."""
        part, colour = self.claim
        edited = Pictures(self.domain, torch.cat([editor.edit(w, strength) for w in self.w.split(at_once(self.domain.generator))]))
        return {"truth_distance": metrics.distances(self.domain, edited.images, self.wanted)[1], "truth_floor": self.floor,
                "success_inverted": np.array([c == colour for c in edited.seen.colour(part)], dtype=float)}


def truth(domain: Domain, prompt: str, n: int, seed: int = 80_000) -> Truth | None:
    """``n`` renders for ``prompt``; None where it names no part's colour, or the domain has no readout or no encoder."""
    claim = claim_of(prompt)
    if claim is None or domain.readout is None or domain.encoder is None:
        return None
    size = domain.generator.resolution
    faces = list(islice((face for k in count() if render(face := sample_face((seed, k)), size).area(claim[0]) > VISIBLE), n))
    renders, wanted = (to_tensor([render_image(face, size) for face in group]).to(domain.device)
                       for group in (faces, [face.with_colour(*claim) for face in faces]))
    return Truth(domain, claim, renders, wanted, encode(domain, renders))


def round_trip(editor: Editor, w: Tensor, strength: float, source: Pictures) -> dict[str, np.ndarray]:
    """Identity and perceptual distance, to the source, of the edit and its reverse (:meth:`Editor.round_trip`); {} where there is no reverse."""
    parts = [editor.round_trip(part, strength) for part in w.split(at_once(editor.domain.generator))]
    if parts[0] is None:
        return {}
    back = Edit(editor.domain, editor.config.prompt, source, torch.cat(parts))
    return {f"round_trip_{name}": values for name, values in (metrics.identity(back) | metrics.perceptual(back)).items()}


def measure(editor: Editor, w: Tensor, strengths: Sequence[float]) -> list[dict]:
    """All there is to know of ``editor``: a row per strength and picture, with as many of these columns as the domain has networks for.

    - those of :func:`metrics.evaluate`, ``leakage_<part>``, and :func:`round_trip`: of the edits of w [N, L, D];
    - ``kid_natural``, ``kid_counterfactual`` (:func:`metrics.kid_to_renders`): one number for the set, the same in all its rows;
    - :meth:`Truth.columns`: of as many inverted renders; row i has the i-th of them, who is not the i-th sampled face.
    """
    domain, prompt, found = editor.domain, editor.config.prompt, []
    known = truth(domain, prompt, len(w))
    for strength, edit in metrics.edits(domain, prompt, editor.edit, w, strengths):
        columns = metrics.evaluate(edit) | {f"leakage_{part}": values for part, values in metrics.leakage_by_part(edit).items()}
        columns |= {name: np.full(len(w), value) for name, value in metrics.kid_to_renders(edit).items()}
        columns |= round_trip(editor, w, strength, edit.before) | (known.columns(editor, strength) if known else {})
        found += metrics.rows(columns, strength=strength)
    return found
