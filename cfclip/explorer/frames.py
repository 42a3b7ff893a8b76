"""What the explorer shows of a recipe: rows of pictures, their scores, and the files of an export. Pure functions.

Shapes: N faces, R = resolution.
"""

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from cfclip.domain import Domain
from cfclip.evaluation import metrics
from cfclip.explorer.recipe import Faces, Recipe, draw_faces, render
from cfclip.files import atomic_write, slug, writable, write_text
from cfclip.images import to_uint8

SHOWS = ("edit", "difference", "strengths", "prompts × strengths", "methods")

STEPS = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0)

HEAT = 0.4
"""The difference of two pictures in [-1, 1], mean over the channels, at which the heat map is brightest."""

SWEEP = (*np.linspace(0, 1, 9).tolist(), 1.0, 1.0, 1.0, 1.0, *np.linspace(1, 0, 9).tolist(), 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Frame:
    """Rows label -> uint8 [N, R, R, 3], what stands above their columns, and what they are of.

    source, edited: [N, 3, R, R]; scores: means over the faces, {} until they are measured.
    """

    recipe: Recipe
    show: str
    rows: Mapping[str, np.ndarray]
    headers: tuple[str, ...]
    source: Tensor
    edited: Tensor
    seconds: float = 0.0
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def sheet(self) -> np.ndarray:
        """All rows in one picture, uint8 [rows * R, N * R, 3]."""
        return np.concatenate([strip(row) for row in self.rows.values()])


def strip(row: np.ndarray) -> np.ndarray:
    """Pictures [N, R, R, 3] side by side, [R, N * R, 3]."""
    return np.concatenate(list(row), 1)


def encode(row: np.ndarray, least: int = 128) -> bytes:
    """The :func:`strip` of ``row`` as PNG, enlarged so that no picture is smaller than ``least`` pixels."""
    picture, file = Image.fromarray(strip(row)), io.BytesIO()
    if (times := -(-least // row.shape[1])) > 1:
        picture = picture.resize([times * length for length in picture.size], Image.Resampling.BICUBIC)
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def heat_map(source: Tensor, edited: Tensor) -> np.ndarray:
    """Where two sets of pictures [N, 3, R, R] differ, and how much: uint8 [N, R, R, 3]."""
    heat = (edited.clamp(-1, 1) - source.clamp(-1, 1)).abs().mean(1).cpu().numpy() / HEAT
    return (colormaps["inferno"](heat)[..., :3] * 255).round().astype(np.uint8)


def draw(
    domain: Domain,
    recipe: Recipe,
    show: str,
    faces: Faces,
    others: Sequence[Recipe] = (),
    labels: Sequence[str] = (),
    stale: Callable[[], bool] = lambda: False,
) -> Frame | None:
    """The frame of ``recipe`` in the way ``show``; None if it went ``stale`` on the way.

    ``others``: recipes of the other rows of "methods" and of "prompts × strengths"; ``labels``: what they are called.
    """
    edited = render(domain, recipe, faces)
    headers = tuple(str(face) if isinstance(face, int) else "photo" for face in recipe.faces)
    first = Faces(faces.w[:1], faces.images[:1])
    name = recipe.prompt.strip() or "no prompt"

    def rows() -> Iterator[tuple[str, np.ndarray]]:
        if show in ("edit", "difference", "methods"):
            yield "source", to_uint8(faces.images)
            yield name, to_uint8(edited)
        if show == "difference":
            yield "difference", heat_map(faces.images, edited)
        if show == "methods":
            for label, other in zip(labels, others, strict=True):
                yield label, to_uint8(render(domain, other, faces))
        if show == "strengths":
            for strength in STEPS:
                yield f"× {strength:g}", to_uint8(render(domain, replace(recipe, strength=strength), faces))
        if show == "prompts × strengths":
            for label, other in zip(labels, others, strict=True):
                yield (
                    label,
                    np.concatenate([
                        to_uint8(render(domain, replace(other, strength=strength), first))
                        for strength in STEPS
                    ]),
                )

    drawn = {}
    for label, row in rows():
        if stale():
            return None
        drawn[label] = row
    return Frame(
        recipe,
        show,
        drawn,
        tuple(f"× {s:g}" for s in STEPS) if show == "prompts × strengths" else headers,
        faces.images,
        edited,
    )


def score(domain: Domain, frame: Frame, stale: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Every metric of the edit on show, mean over its faces; {} without a prompt, and if it went ``stale``."""
    recipe, found = frame.recipe, {}
    if not recipe.prompts:
        return {}
    domain = replace(domain, source_text=recipe.source_text.strip() or domain.source_text)
    edit = metrics.Edit(domain, " and ".join(recipe.prompts), frame.source, frame.edited)
    for function in metrics.METRICS.values():
        if stale():
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of parts that nobody has
            found |= function(edit)
    return {name: float(np.nanmean(values)) for name, values in found.items() if not np.isnan(values).all()}


def export(folder: Path, domain: Domain, frame: Frame) -> list[Path]:
    """Write what is on show (.png), the edit from nothing to its strength and back (.gif), the recipe (.json) and its cell (.py)."""
    recipe, text = frame.recipe, frame.recipe.to_json()
    stem = (
        writable(folder)
        / f"{slug(recipe.prompt)}-{hashlib.sha256((text + frame.show).encode()).hexdigest()[:6]}"
    )
    faces = draw_faces(domain, recipe.faces)
    steps = [replace(recipe, strength=recipe.strength * share) for share in SWEEP]
    drawn = {
        step: Image.fromarray(strip(to_uint8(render(domain, step, faces)))) for step in dict.fromkeys(steps)
    }
    frames = [drawn[step] for step in steps]
    animation = {"format": "GIF", "save_all": True, "append_images": frames[1:], "duration": 70, "loop": 0}
    return [
        atomic_write(
            stem.with_suffix(".png"), lambda part: Image.fromarray(frame.sheet).save(part, format="PNG")
        ),
        atomic_write(stem.with_suffix(".gif"), lambda part: frames[0].save(part, **animation)),
        write_text(stem.with_suffix(".json"), text),
        write_text(stem.with_suffix(".py"), recipe.code()),
    ]
