"""How the explorer shows a recipe: rows of pictures, scores, exported files. Functions without state.

Shapes: N faces, R = resolution.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from cfclip.domain import Domain, GroundTruth
from cfclip.evaluation import metrics
from cfclip.explorer.photos import find_photo
from cfclip.explorer.recipe import Faces, Recipe, draw_faces, render
from cfclip.files import atomic_write, first_bytes, slug, writable, write_text
from cfclip.images import to_uint8
from cfclip.models.mapper import level_slices

SHOWS = ("edit", "difference", "strengths", "prompts × strengths", "methods")
STRENGTHS_SHOWN = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0)
HEAT_MAX = 0.4
"""The difference of two pictures in [-1, 1], mean over the channels, at which the heat map is brightest."""
UNMOVED = 0.004
"""The largest mean difference of two pictures in [-1, 1] that is invisible: about half a grey level."""
MISSING = "missing: "
"""The beginning of the note on a face that does not show everything that the prompt asks for."""
_RISING = np.linspace(0, 1, 9).tolist()
ANIMATION = (*_RISING, *[1.0] * 4, *_RISING[::-1], *[0.0] * 2)
"""Shares of the strength in the frames of an exported animation."""
FRAME_MS = 70
FILM_ROUNDS = 3
"""How many times an MP4 shows the animation, because players do not repeat it by themselves."""
FILM_SIDE, FILM_WIDTH = 256, 4096
"""Least side of a face in an MP4, whose colours have half the resolution; largest width that players show."""
FILM_NEEDS = "pip install av"
"""The command that installs what :func:`write_film` needs."""


@dataclass(frozen=True, eq=False)
class Frame:
    """A recipe's pictures: rows, label -> uint8 [columns, R, R, 3], with a header and a tip for each column.

    A column is a face, or a strength in "prompts × strengths". source, edited: [N, 3, R, R].
    moved: for each of the L layers of W+, whether the edit can move it. notes: a few words on each face.
    scores, photo_scores: means over generated faces, over photos. All three are empty until measured.
    """

    recipe: Recipe
    show: str  # one of SHOWS
    rows: Mapping[str, np.ndarray]
    headers: tuple[str, ...]
    tips: tuple[str, ...]  # for a column with a photo: how good its reconstruction is; otherwise ""
    source: Tensor
    edited: Tensor
    moved: tuple[bool, ...]
    sketch: bool = False  # drawn in half precision; an exact frame follows
    seconds: float = 0.0  # how long drawing took
    scores: Mapping[str, float] = field(default_factory=dict)
    photo_scores: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def sheet(self) -> np.ndarray:
        """All rows in one picture, uint8 [rows * R, columns * R, 3]."""
        return np.concatenate([strip(row) for row in self.rows.values()])


def strip(row: np.ndarray) -> np.ndarray:
    """Pictures [N, R, R, 3] side by side, [R, N * R, 3]."""
    return np.concatenate(list(row), 1)


def encode(row: np.ndarray, sketch: bool = False) -> bytes:
    """The :func:`strip` of ``row`` as a PNG; for a ``sketch`` as a JPEG, which takes a tenth of the time."""
    file, how = io.BytesIO(), {"quality": 95, "subsampling": 0} if sketch else {"compress_level": 1}
    Image.fromarray(strip(row)).save(file, "JPEG" if sketch else "PNG", **how)
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
    dtype: torch.dtype | None = None,
) -> Frame | None:
    """The frame of ``recipe`` for ``show``, one of :data:`SHOWS`; None if it is ``stale`` after a row.

    "edit" is always drawn to the end. ``others``: label -> recipe of the additional rows of "methods", or of
    all rows of "prompts × strengths". ``dtype``: for the edited pictures of ``recipe``, see :func:`.render`.
    """
    edited, size = render(domain, recipe, faces, dtype), domain.generator.resolution
    photos = [find_photo(face, size) if isinstance(face, str) else None for face in recipe.faces]
    first = Faces(faces.w[:1], faces.images[:1])

    def at_strength(one: Recipe, strength: float, faces: Faces) -> np.ndarray:
        return to_uint8(render(domain, replace(one, strength=strength), faces))

    def rows() -> Iterator[tuple[str, np.ndarray]]:
        if show != "prompts × strengths" and any(photos):
            blank = np.full((size, size, 3), 255, np.uint8)
            yield "photo", np.stack([photo.original if photo else blank for photo in photos])
        if show in ("edit", "difference", "methods"):
            yield "source", to_uint8(faces.images)
            yield edit_label(recipe), to_uint8(edited)
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
        drawn[label] = row
        if show != "edit" and stale():
            return None
    if show == "prompts × strengths":
        headers = tuple(f"× {strength:g}" for strength in STRENGTHS_SHOWN)
        tips = ("",) * len(headers)
    else:
        each = zip(recipe.faces, photos, strict=True)
        headers = tuple(photo.name if photo else str(face) for face, photo in each)
        tips = tuple(photo.advice if photo else "" for photo in photos)
    moved, sketch = _moved(domain, recipe), dtype is not None
    return Frame(recipe, show, drawn, headers, tips, faces.images, edited, moved, sketch)


def edit_label(recipe: Recipe) -> str:
    """The label of the row of edited pictures; no other row has it."""
    prompt = recipe.prompt.strip() or "no prompt"
    return f"“{prompt}”" if prompt in ("photo", "source", "difference") else prompt


def _moved(domain: Domain, recipe: Recipe) -> tuple[bool, ...]:
    layers = range(domain.generator.num_ws)
    if recipe.uses_editor or not recipe.prompts:
        return (True,) * len(layers)
    moved = set()
    for mapper in recipe.open_mappers(domain):
        slices = level_slices(mapper.config.split)
        moved.update(layer for level in mapper.config.levels for layer in layers[slices[level]])
    return tuple(layer in moved for layer in layers)


def score(domain: Domain, frame: Frame, stale: Callable[[], bool] = lambda: False) -> Frame:
    """``frame`` with its scores and notes; unchanged if it has no prompt, or becomes ``stale``."""
    recipe, measured = frame.recipe, {}
    if not recipe.prompts:
        return frame
    domain = replace(domain, source_text=recipe.source_text.strip() or domain.source_text)
    edit = metrics.Edit(domain, " and ".join(recipe.prompts), frame.source, frame.edited)
    for metric in metrics.METRICS:
        if stale():
            return frame
        measured |= metric(edit)
    is_photo = np.array([isinstance(face, str) for face in recipe.faces])

    def means(which: np.ndarray) -> dict[str, float]:
        some = {name: each[which] for name, each in measured.items()}
        return {name: float(np.nanmean(each)) for name, each in some.items() if not np.isnan(each).all()}

    scores, photo_scores = means(~is_photo), means(is_photo)
    return replace(frame, scores=scores, photo_scores=photo_scores, notes=_notes(edit, measured))


def _notes(edit: metrics.Edit, measured: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """What the edit did to each face, in a few words, such as "✓", "red → blue" or "missing: …"."""
    moved = (edit.after.images - edit.before.images).abs().mean((1, 2, 3)).tolist()
    notes = ["" if share > UNMOVED else "not changed" for share in moved]
    truth = edit.domain.truth
    claim = truth and truth.claim(edit.prompt)
    if claim and len(truth.claims(edit.prompt)) == 1:
        part, colour = claim
        was, is_now = (pictures.seen.colour(part) for pictures in (edit.before, edit.after))
        successes = zip(measured["success_before"], measured["success_after"], strict=True)
        for i, (before, success) in enumerate(successes):
            if np.isnan(success):
                notes[i] = f"no {part}"
            elif success:
                notes[i] = f"{colour} before" if before else "✓"
            else:
                notes[i] = f"{was[i]} → {is_now[i]}" if was[i] != is_now[i] else f"stays {was[i]}"
    elif truth and (done := truth.done(edit.prompt, edit.before.seen, edit.after.seen)):
        each = [{name: hits[i] for name, hits in done.items()} for i in range(len(notes))]
        notes = [_of_several(truth, hits) for hits in each]
    return tuple(notes)


def _of_several(truth: GroundTruth, done: Mapping[str, float]) -> str:
    """The note on a face: "✓", what is missing, or "so before". A colour is NaN if its part is not there."""
    if missing := [name for name, hit in done.items() if hit == 0 or (np.isnan(hit) and truth.claim(name))]:
        return f"{MISSING}{', '.join(missing)}"
    return "✓" if any(hit == 1 for hit in done.values()) else "so before"


def write_film(path: Path, pictures: Sequence[Image.Image]) -> None:
    """Write pictures, all of the same even size, as an MP4 (H.264): :data:`FRAME_MS` each. Needs PyAV."""
    import av
    from av.video.reformatter import Colorspace

    with av.open(str(path), "w", format="mp4") as film:
        stream = film.add_stream("libx264", rate=Fraction(1000, FRAME_MS), options={"preset": "veryfast"})
        (stream.width, stream.height), stream.pix_fmt = pictures[0].size, "yuv420p"
        stream.colorspace = Colorspace.ITU601  # if a film does not name it, players guess it from the size
        for picture in pictures:
            film.mux(stream.encode(av.VideoFrame.from_image(picture)))
        film.mux(stream.encode())


def export(folder: Path, domain: Domain, frame: Frame) -> tuple[Path, ...]:
    """Write the picture (.png), an animation of the strength (.gif, and .mp4 if PyAV is installed), the
    recipe (.json) and its notebook cell (.py). Returns the files.
    """
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
    gif = {"format": "GIF", "save_all": True, "append_images": more, "duration": FRAME_MS, "loop": 0}
    films = []
    if find_spec("av"):
        count = len(recipe.faces)
        side = min(max(FILM_SIDE, first.height), FILM_WIDTH // count) // 2 * 2
        large = {share: picture.resize((count * side, side)) for share, picture in drawn.items()}
        pictures = FILM_ROUNDS * [large[share] for share in ANIMATION]
        films.append(atomic_write(stem.with_suffix(".mp4"), lambda part: write_film(part, pictures)))
    return (
        atomic_write(stem.with_suffix(".png"), lambda part: sheet.save(part, format="PNG")),
        atomic_write(stem.with_suffix(".gif"), lambda part: first.save(part, **gif)),
        *films,
        write_text(stem.with_suffix(".json"), text),
        write_text(stem.with_suffix(".py"), recipe.code()),
    )
