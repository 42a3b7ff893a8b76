"""Objectives: what pulls an edit towards its prompt. Each is an object that compares unit CLIP features.

N rows (views of edited pictures), B pictures, E the embedding width, T templates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from cfclip.method.losses import (
    NEGATIVES,
    POSITIVES,
    QUERIES,
    Directions,
    clip_distance,
    directional,
    info_nce,
    nce_directions,
)
from cfclip.models.clip import TEMPLATES
from cfclip.settings import Settings, int_at_least, number, one_of, setting, some_of


class Features(NamedTuple):
    """What an objective compares; unit vectors."""

    edited: Tensor  # views of the edited pictures [N, E], draw-major
    source: Tensor  # the source pictures [B, E]
    prompt: Tensor  # the plain target prompt [1, E]
    target_text: Tensor  # the target prompt under each template [T, E]
    source_text: Tensor  # the source text under each template [T, E]
    first: Tensor  # the first source picture of the whole batch [1, E]

    def of_guides(self, widths: Sequence[int]) -> list["Features"]:
        """Split concatenated vectors of several guides into the features of each; ``widths``: E of each."""
        parts = (one.split(list(widths), -1) for one in self)
        return [Features(*of_one) for of_one in zip(*parts, strict=True)]


@dataclass(frozen=True)
class CLIPNCE(Settings):
    """CF-CLIP's contrastive loss, see :func:`cfclip.losses.clip_nce`. The defaults are the paper's."""

    name: ClassVar[str] = "nce"

    temperature: float = setting(0.1, number(above=True))  # tau
    positives: tuple[str, ...] = setting(POSITIVES, some_of(POSITIVES))  # p1: "text", p2: "target"
    negatives: str = setting("first", one_of(NEGATIVES))  # which source image the negatives start from
    # how many templates give negatives; None: all
    negative_templates: int | None = setting(None, int_at_least(1, optional=True, maximum=len(TEMPLATES)))
    query: str = setting("difference", one_of(QUERIES))

    def directions(self, features: Features) -> Directions:
        """The directions q, p1, p2 and n_k that the loss compares."""
        return nce_directions(
            features.edited,
            features.source,
            features.target_text,
            features.source_text,
            negatives=self.negatives,
            query=self.query,
            negative_templates=self.negative_templates,
            first=features.first,
        )

    def __call__(self, features: Features) -> Tensor:
        return info_nce(self.directions(features), self.positives, self.temperature)


@dataclass(frozen=True)
class ClipDistance(Settings):
    """StyleCLIP's loss, see :func:`cfclip.losses.clip_distance`."""

    name: ClassVar[str] = "clip"

    def __call__(self, features: Features) -> Tensor:
        return clip_distance(features.edited, features.prompt)


@dataclass(frozen=True)
class Directional(Settings):
    """StyleGAN-NADA's loss, see :func:`cfclip.losses.directional`."""

    name: ClassVar[str] = "directional"

    def __call__(self, features: Features) -> Tensor:
        return directional(features.edited, features.source, features.target_text, features.source_text)


Objective = CLIPNCE | ClipDistance | Directional
"""A loss over :class:`Features`, a mean over rows."""
OBJECTIVES = {one.name: one for one in (CLIPNCE, ClipDistance, Directional)}
"""Name in configurations and files -> class."""
