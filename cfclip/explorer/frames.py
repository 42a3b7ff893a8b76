"""What the explorer shows of a recipe: rows of pictures, scores, exported files. Pure functions.

Shapes: N faces, R = resolution.
"""

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from cfclip.domain import Domain
from cfclip.evaluation import metrics
from cfclip.explorer.recipe import Faces, Recipe, draw_faces, render
from cfclip.files import atomic_write, first_bytes, slug, writable, write_text
from cfclip.images import to_uint8

SHOWS = ("edit", "difference", "strengths", "prompts × strengths", "methods")
STRENGTHS_SHOWN = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0)
HEAT_MAX = 0.4
"""The difference of two pictures in [-1, 1], mean over the channels, at which the heat map is brightest."""
_RISING = np.linspace(0, 1, 9).tolist()
ANIMATION = (*_RISING, *[1.0] * 4, *_RISING[::-1], *[0.0] * 2)
"""Shares of the strength in the frames of an exported animation."""


@dataclass(frozen=True, eq=False)
class Frame:
    """A recipe's pictures: rows, label -> uint8 [N, R, R, 3], and the headers of their columns.

    source, edited: [N, 3, R, R]; scores: means over the faces, {} until they are measured.
    """

    recipe: Recipe
    show: str  # one of SHOWS
    rows: Mapping[str, np.ndarray]
    headers: tuple[str, ...]
    source: Tensor
    edited: Tensor
    seconds: float = 0.0  # that drawing took
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def sheet(self) -> np.ndarray:
        """All rows in one picture, uint8 [rows * R, N * R, 3]."""
        return np.concatenate([strip(row) for row in self.rows.values()])


def strip(row: np.ndarray) -> np.ndarray:
    """Pictures [N, R, R, 3] side by side, [R, N * R, 3]."""
    return np.concatenate(list(row), 1)


def encode(row: np.ndarray, min_size: int = 128) -> bytes:
    """The :func:`strip` of ``row`` as PNG, enlarged until pictures are at least ``min_size`` wide."""
    picture, file = Image.fromarray(strip(row)), io.BytesIO()
    if (times := -(-min_size // row.shape[1])) > 1:
        picture = picture.resize([times * length for length in picture.size], Image.Resampling.BICUBIC)
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def heat_map(source: Tensor, edited: Tensor) -> np.ndarray:
    """Where two sets of pictures [N, 3, R, R] differ, and how much: uint8 [N, R, R, 3]."""
    heat = (edited.clamp(-1, 1) - source.clamp(-1, 1)).abs().mean(1).cpu().numpy() / HEAT_MAX
    return (colormaps["inferno"](heat)[..., :3] * 255).round().astype(np.uint8)


def draw(
    domain: Domain,
    recipe: Recipe,
    show: str,
    faces: Faces,
    others: Mapping[str, Recipe],
    stale: Callable[[], bool] = lambda: False,
) -> Frame | None:
    """The frame of ``recipe``, shown as ``show`` says; None if it becomes ``stale`` before it is done.

    ``others``: label -> recipe of the other rows of "methods", and of the rows of "prompts × strengths".
    """
    edited = render(domain, recipe, faces)
    first = Faces(faces.w[:1], faces.images[:1])

    def at_strength(one: Recipe, strength: float, faces: Faces) -> np.ndarray:
        return to_uint8(render(domain, replace(one, strength=strength), faces))

    def rows() -> Iterator[tuple[str, np.ndarray]]:
        if show in ("edit", "difference", "methods"):
            yield "source", to_uint8(faces.images)
            yield recipe.prompt.strip() or "no prompt", to_uint8(edited)
        if show == "difference":
            yield "difference", heat_map(faces.images, edited)
        if show == "methods":
            for label, other in others.items():
                yield label, to_uint8(render(domain, other, faces))
        if show == "strengths":
            for strength in STRENGTHS_SHOWN:
                yield f"× {strength:g}", at_strength(recipe, strength, faces)
        if show == "prompts × strengths":
            for label, other in others.items():
                yield label, np.concatenate([at_strength(other, s, first) for s in STRENGTHS_SHOWN])

    drawn = {}
    for label, row in rows():
        if stale():
            return None
        drawn[label] = row
    if show == "prompts × strengths":
        headers = tuple(f"× {strength:g}" for strength in STRENGTHS_SHOWN)
    else:
        headers = tuple(str(face) if isinstance(face, int) else "photo" for face in recipe.faces)
    return Frame(recipe, show, drawn, headers, faces.images, edited)


def score(domain: Domain, frame: Frame, stale: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Every metric of the edit, mean over its faces; {} without a prompt, or if it becomes ``stale``."""
    recipe, measured = frame.recipe, {}
    if not recipe.prompts:
        return {}
    domain = replace(domain, source_text=recipe.source_text.strip() or domain.source_text)
    edit = metrics.Edit(domain, " and ".join(recipe.prompts), frame.source, frame.edited)
    for metric in metrics.METRICS.values():
        if stale():
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # means of parts that no face shows
            measured |= metric(edit)
    return {name: float(np.nanmean(each)) for name, each in measured.items() if not np.isnan(each).all()}


def export(folder: Path, domain: Domain, frame: Frame) -> list[Path]:
    """Write the picture (.png), an animation of the strength (.gif), the recipe (.json), its cell (.py)."""
    recipe, text = frame.recipe, frame.recipe.to_json()
    key = hashlib.sha256((text + frame.show).encode()).hexdigest()[:6]
    stem = writable(folder) / f"{first_bytes(slug(recipe.prompt), 100)}-{key}"
    faces = draw_faces(domain, recipe.faces)

    def at_share(share: float) -> Image.Image:
        step = replace(recipe, strength=recipe.strength * share)
        return Image.fromarray(strip(to_uint8(render(domain, step, faces))))

    drawn = {share: at_share(share) for share in dict.fromkeys(ANIMATION)}
    first, *more = (drawn[share] for share in ANIMATION)
    sheet = Image.fromarray(frame.sheet)
    gif = {"format": "GIF", "save_all": True, "append_images": more, "duration": 70, "loop": 0}
    return [
        atomic_write(stem.with_suffix(".png"), lambda part: sheet.save(part, format="PNG")),
        atomic_write(stem.with_suffix(".gif"), lambda part: first.save(part, **gif)),
        write_text(stem.with_suffix(".json"), text),
        write_text(stem.with_suffix(".py"), recipe.code()),
    ]
