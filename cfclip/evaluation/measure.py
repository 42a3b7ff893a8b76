"""All that is measured of an editor: single edits, the set of edits, inverted renders, round trips."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cfclip.baselines.editor import Editor
from cfclip.domain import Claim, Domain
from cfclip.evaluation import metrics
from cfclip.evaluation.kid import kid_to_renders
from cfclip.inversion.projector import encode
from cfclip.models.stylegan2 import max_batch


@dataclass(frozen=True, eq=False)
class TrueEdits:
    """Held-out renders whose true counterfactual is known."""

    domain: Domain
    claim: Claim
    renders: Tensor  # [N, 3, R, R] in [-1, 1]
    wanted: Tensor  # the same renders with the part recoloured
    w: Tensor  # the encoder's codes of ``renders`` [N, L, D]

    @classmethod
    def of(cls, domain: Domain, prompt: str, n: int) -> "TrueEdits | None":
        """``n`` renders; None if ``prompt`` names no colour of a part, or without ground truth or encoder."""
        claim = domain.truth and domain.truth.claim(prompt)
        if claim is None or domain.encoder is None:
            return None
        renders, wanted = domain.truth.counterfactuals(claim, n)
        return cls(domain, claim, renders, wanted, encode(domain, renders))

    @cached_property
    def floor(self) -> np.ndarray:
        """Perceptual distance of the inverted renders G(w) to the renders [N]: the cost of inversion."""
        return metrics.distances(self.domain, self.domain.pictures(self.w), self.renders)[1]

    def columns(self, editor: Editor, strength: float) -> metrics.Columns:
        """Columns of the edited inversions; ``truth_distance``: their distance to the true counterfactual."""
        (part, colour), parts = self.claim, self.w.split(max_batch(self.domain.generator))
        edited = metrics.Pictures(self.domain, torch.cat([editor.edit(w, strength) for w in parts]))
        return {
            "truth_distance": metrics.distances(self.domain, edited.images, self.wanted)[1],
            "truth_floor": self.floor,
            "success_inverted": np.array([name == colour for name in edited.seen.colour(part)], dtype=float),
        }


def round_trip(editor: Editor, w: Tensor, strength: float, source: metrics.Pictures) -> metrics.Columns:
    """Identity and distance to the source after the edit and its reverse; {} if there is no reverse."""
    parts = [editor.round_trip(part, strength) for part in w.split(max_batch(editor.domain.generator))]
    if parts[0] is None:
        return {}
    back = metrics.Edit(editor.domain, editor.config.prompt, source, torch.cat(parts))
    scores = metrics.identity(back) | metrics.perceptual(back)
    return {f"round_trip_{name}": values for name, values in scores.items()}


def measure(
    editor: Editor, w: Tensor, strengths: Sequence[float], whole: Sequence[float] | None = (1.0,)
) -> list[dict]:
    """One row per strength and picture, with the columns for which the domain has the networks:

    - at every strength, for the edits of w [N, L, D]: :func:`.metrics.evaluate` and ``leakage_<part>``;
    - only at the strengths in ``whole`` (None: at all), because they take most of the time:
      :func:`round_trip`; :func:`.kid.kid_to_renders` of the whole set, the same number in each row; and
      :meth:`TrueEdits.columns` of N edited inversions, where row i has the i-th render, not the i-th face.
    """
    domain, prompt, lines = editor.domain, editor.config.prompt, []
    true_edits = TrueEdits.of(domain, prompt, len(w))
    for strength, edit in metrics.edits(domain, prompt, editor.edit, w, strengths):
        columns = metrics.evaluate(edit)
        columns |= {f"leakage_{part}": values for part, values in metrics.leakage_by_part(edit).items()}
        if whole is None or strength in whole:
            columns |= {name: np.full(len(w), value) for name, value in kid_to_renders(edit).items()}
            columns |= round_trip(editor, w, strength, edit.before)
            columns |= true_edits.columns(editor, strength) if true_edits else {}
        lines += metrics.rows(columns, strength=strength)
    return lines
