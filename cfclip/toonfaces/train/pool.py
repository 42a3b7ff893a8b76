"""A pool of rendered shapes, painted in any colours on any device: all trainings take their faces from it.

A picture is the mean of label colours, weighted by how many sub-pixels have each label. So shapes are
rendered once, on all cores, and each use paints one of them in the colours of another face of the pool.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from cfclip.toonfaces.factors import (
    COLOURED,
    HELD_OUT,
    Face,
    colour_array,
    independent_colours,
    sample_face,
    shape_vector,
)
from cfclip.toonfaces.render import ERASABLE, LABELS, MASKS, PAINT, SUPERSAMPLE, coverage, palettes

Result = TypeVar("Result")
ALONE = 500
"""Fewer faces than this are made in this process."""


def on_all_cores(
    make: Callable[[Sequence[int]], Result], n: int, desc: str, chunk: int = 200
) -> Iterator[Result]:
    """``make(range)`` for successive ranges of ``chunk`` numbers below ``n``, in order."""
    chunks = [range(k, min(k + chunk, n)) for k in range(0, n, chunk)]
    bar = partial(tqdm, desc=desc, total=len(chunks), leave=False)
    if n < ALONE:
        yield from bar(map(make, chunks))
        return
    # spawned: a process that has touched a GPU cannot be forked
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), spawn) as processes:
        yield from bar(processes.map(make, chunks))


def draw_face(seed: tuple[int, ...], support: str) -> Face:
    """A face in the colours of ``support``, the same one for the same ``seed``.

    "natural" and "both": see :func:`sample_face`; "independent": natural colours, drawn separately for each
    part; "known": both supports, without the pairs that are held out from CLIP.
    """
    match support:
        case "independent":
            return independent_colours(sample_face(seed), np.random.default_rng((*seed, 1)))
        case "known":
            faces = (sample_face((*seed, attempt), "both") for attempt in count())
            return next(f for f in faces if not any(getattr(f, part).name == name for part, name in HELD_OUT))
        case _:
            return sample_face(seed, support)


def _drawn(
    seed: tuple[int, ...], photos: int, support: str, resolution: int, people: Sequence[int]
) -> tuple[list[Face], np.ndarray]:
    """``photos`` faces of each of ``people``, one after the other, and the :func:`coverage` of each face."""
    faces = []
    for k in people:
        first = draw_face((*seed, k), support)
        others = (draw_face((*seed, k, p), support) for p in range(1, photos))
        faces += [first, *(other.of_person(first) for other in others)]
    return faces, np.stack([coverage(face, resolution) for face in faces])


class Pool:
    """M = people * photos faces; the faces of person k start at number ``k * photos``.

    Args:
        seed: of the faces.
        support: see :func:`draw_face`.
        resolution: R.

    ``faces``: list of M; on ``device``: ``shapes`` [M, 27] and ``colours`` [M, 9, 3], see ``shape_vector``
    and ``colour_array``.
    """

    def __init__(
        self,
        seed: tuple[int, ...],
        people: int,
        photos: int = 1,
        support: str = "natural",
        resolution: int = 64,
        device: torch.device | str = "cpu",
    ):
        draw = partial(_drawn, seed, photos, support, resolution)
        self.faces: list[Face] = []
        self._coverage = torch.empty(people * photos, len(LABELS), resolution, resolution, dtype=torch.uint8)
        for faces, covered in on_all_cores(draw, people, "faces", max(1, 200 // photos)):
            self._coverage[len(self.faces) : len(self.faces) + len(faces)] = torch.from_numpy(covered)
            self.faces += faces
        colours = np.stack([colour_array(face) for face in self.faces])
        shapes = np.stack([shape_vector(face) for face in self.faces])
        self._coverage = self._coverage.to(device)
        self.palettes = torch.from_numpy(palettes(colours)).to(device)  # [M, 17, 3], see render.palettes
        self.colours, self.shapes = torch.from_numpy(colours).to(device), torch.from_numpy(shapes).to(device)

    def __len__(self) -> int:
        return len(self.faces)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Numbers [n] of random faces of the pool, on its device; ``generator`` is on the CPU."""
        return torch.randint(len(self), (n,), generator=generator).to(self.colours.device)

    def covered(self, shapes: Tensor, erased: Tensor | None = None) -> Tensor:
        """The share of each label in each pixel [N, 17, R, R] of the faces with the numbers ``shapes`` [N].

        erased: bool [N, len(ERASABLE)]; skin in place of these parts.
        """
        covered = self._coverage[shapes].float() / SUPERSAMPLE**2
        if erased is not None:
            gone = torch.zeros(len(ERASABLE), len(LABELS), device=covered.device)
            for row, labels in zip(gone, ERASABLE.values(), strict=True):
                row[[list(LABELS).index(label) for label in labels]] = 1
            gone = (erased.float() @ gone)[:, :, None, None]
            lost = (covered * gone).sum(1)
            covered = covered * (1 - gone)
            covered[:, list(LABELS).index("skin")] += lost
        return covered

    def paint(self, shapes: Tensor, colours: Tensor | None = None) -> Tensor:
        """Pictures [N, 3, R, R] in [-1, 1]: the shapes of the faces with these numbers [N].

        colours: numbers [N] of the faces whose colours are used; default: ``shapes``.
        """
        return picture(self.covered(shapes), self.palettes[shapes if colours is None else colours])


def picture(covered: Tensor, palette: Tensor) -> Tensor:
    """8-bit pictures [N, 3, R, R] in [-1, 1] from ``Pool.covered`` and the colours of labels [N, 17, 3]."""
    return torch.einsum("nlhw,nlc->nchw", covered, palette).round().div(127.5).sub(1)


def part_masks(covered: Tensor) -> Tensor:
    """The share of each part in each pixel [N, len(MASKS), R, R], from ``Pool.covered``."""
    part_of = F.one_hot(torch.tensor([MASKS.index(part) for part in LABELS.values()]), len(MASKS))
    return torch.einsum("nlhw,lp->nphw", covered, part_of.to(covered))


def repainted(palette: Tensor, other: Tensor, part: Tensor) -> Tensor:
    """``palette`` [N, 17, 3] with number ``part`` [N] of COLOURED painted in the colours of ``other``."""
    paints = [PAINT[label][0] for label in LABELS]
    source = torch.tensor([COLOURED.index(name) if name in COLOURED else -1 for name in paints])
    return torch.where((source.to(part.device) == part[:, None])[..., None], other, palette)
