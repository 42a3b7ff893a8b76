"""The ground truth of toonfaces: the renderer draws the right answer, the readout measures edits."""

import copy
import re
from functools import lru_cache
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor

from cfclip.domain import COUNTERFACTUAL, HELD_OUT_FROM_CLIP, IN_THE_DOMAIN, Claim, Clause
from cfclip.domain import Measurement as Seen
from cfclip.toonfaces.captions import Fact, claim_of, claims_of, phrase
from cfclip.toonfaces.factors import HAIR_STYLES, HELD_OUT, NATURAL, PARTS, Face, colours, sample_face
from cfclip.toonfaces.readout import VISIBLE, Measurement, Readout
from cfclip.toonfaces.render import MASKS, pictures, render

# the seeds of faces that no network was trained on start with these numbers
NATURAL_FACES, PHOTOS, COUNTERFACTUALS = 40_000, 70_000, 80_000

BETWEEN_CLAUSES = re.compile(r"\s*(?:[,;+]|\band\b|\bwith\b)\s*", re.IGNORECASE)


def measurable(prompt: str) -> list[Fact]:
    """The claims of ``prompt`` that the readout can judge: all except smiles and "man" or "woman"."""
    return sorted(fact for fact in claims_of(prompt) if fact[0] not in ("smile", "person"))


def in_words(fact: Fact) -> str:
    """``fact`` in words, e.g. "green lipstick", "curly hair", "bald", "glasses" or "no glasses"."""
    key, value = fact
    if key in PARTS:
        return phrase(key, value)
    if key == "style":
        return value if value in ("bald", "bob") else f"{value} hair"
    part = key.removesuffix("?")
    return part if value == "yes" else f"no {part}"


class ToonTruth:
    """Implements :class:`cfclip.domain.GroundTruth`, where the methods are described.

    resolution: R of the rendered faces, the same as the generator's.
    """

    parts = MASKS
    regions = tuple(part for part in MASKS if part not in ("background", "shirt"))
    prompts = tuple(phrase(part, colour) for part in PARTS for colour in colours(part))

    def __init__(self, readout: Readout, resolution: int):
        self.readout, self.resolution = readout, resolution

    def claim(self, prompt: str) -> Claim | None:
        return claim_of(prompt)

    def group(self, claim: Claim) -> str:
        part, colour = claim
        if colour in NATURAL[part]:
            return IN_THE_DOMAIN
        return HELD_OUT_FROM_CLIP if claim in HELD_OUT else COUNTERFACTUAL

    def measure(self, images: Tensor) -> Measurement:
        return self.readout.measure(images)

    def claims(self, prompt: str) -> tuple[str, ...]:
        return tuple(in_words(fact) for fact in measurable(prompt))

    def clauses(self, prompt: str) -> tuple[Clause, ...]:
        parts = [part for part in BETWEEN_CLAUSES.split(prompt) if part]
        if set().union(*map(claims_of, parts)) != claims_of(prompt):
            parts = [prompt]  # such as "without glasses and a beard"
        clauses = []
        for part in parts:
            facts = sorted(fact for fact in claims_of(part) if fact[0] != "person")
            keys = {key for key, _ in facts}
            colours, shapes = bool(keys & set(PARTS)), bool(keys - set(PARTS))
            if colours and shapes:  # "long purple hair" is done better as long hair and purple hair
                clauses += [Clause(in_words(fact), fact[0] in PARTS, fact[0] not in PARTS) for fact in facts]
            else:
                clauses.append(Clause(part, colours, shapes))
        return tuple(clauses)

    def done(self, prompt: str, before: Seen, after: Seen) -> dict[str, np.ndarray]:
        found, claims = {}, measurable(prompt)
        for key, value in claims:
            if key in PARTS:
                hits = np.array([name == value for name in after.colour(key)])
                there = before.has(key) | (after.has(key) & ((f"{key}?", "yes") in claims))
                found[in_words((key, value))] = np.where(there, hits, np.nan)
                continue
            if key == "style":
                was, now = (seen.hair_style == HAIR_STYLES.index(value) for seen in (before, after))
            else:
                part = key.removesuffix("?")
                was, now = (seen.has(part) == (value == "yes") for seen in (before, after))
            found[in_words((key, value))] = np.where(was, np.nan, now)
        return found

    def masks(self, images: Tensor) -> Tensor:
        return self.readout(images.clamp(-1, 1))[0].softmax(1)

    def features(self, images: Tensor) -> list[Tensor]:
        """The four stages of the readout's encoder, 176 channels in all."""
        stages = []
        for block in self.readout.down:
            images = block(images)
            stages.append(images)
        return stages

    def renders(self, n: int, claim: Claim | None = None) -> Tensor:
        return natural_renders(self.resolution, n, claim).to(self._device, copy=True)

    def counterfactuals(self, claim: Claim, n: int) -> tuple[Tensor, Tensor]:
        everyone = (sample_face((COUNTERFACTUALS, k)) for k in count())
        showing = (f for f in everyone if render(f, self.resolution).area(claim[0]) > VISIBLE)
        faces = list(islice(showing, n))
        return self._draw(faces), self._draw([face.with_colour(*claim) for face in faces])

    def photos(self, n: int, seed: int) -> Tensor:
        return self._draw([sample_face((PHOTOS, seed, k)) for k in range(n)])

    def to(self, device: torch.device) -> "ToonTruth":
        return ToonTruth(copy.deepcopy(self.readout).to(device), self.resolution)

    @property
    def _device(self) -> torch.device:
        return next(self.readout.parameters()).device

    def _draw(self, faces: list[Face]) -> Tensor:
        return pictures(faces, self.resolution).to(self._device)


@lru_cache(maxsize=4)
def natural_renders(resolution: int, n: int, claim: Claim | None = None) -> Tensor:
    """Renders of ``n`` natural faces [n, 3, R, R], recoloured to the ``claim``. Cached: do not modify."""
    faces = [sample_face((NATURAL_FACES, k)) for k in range(n)]
    if claim is not None:
        faces = [face.with_colour(*claim) for face in faces]
    return pictures(faces, resolution)
