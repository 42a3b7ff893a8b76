"""A pool of rendered shapes, painted in any colours on any device: what all trainings take their faces from.

A picture is the mean of label colours, weighted by how many sub-pixels have which label. So shapes are rendered
once, on all cores, and each use paints one of them in the colours of another face of the pool.
"""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from cfclip.toonfaces.factors import (
    HELD_OUT,
    Face,
    colour_array,
    independent_colours,
    sample_face,
    shape_vector,
)
from cfclip.toonfaces.render import LABELS, MASKS, SUPERSAMPLE, coverage, palettes

SUPPORTS = ("natural", "independent", "both", "known")
"""What colours the faces of a pool have: natural ones; natural ones that no other part follows; those of both
supports; the same without the pairs that are held out from CLIP."""
ALONE = 500
"""A pool of fewer faces is rendered in this process."""


def draw_face(seed: tuple[int, ...], support: str) -> Face:
    """A face of one of :data:`SUPPORTS`, the same one for the same ``seed``."""
    match support:
        case "independent":
            return independent_colours(sample_face(seed), np.random.default_rng((*seed, 1)))
        case "known":
            faces = (sample_face((*seed, attempt), "both") for attempt in count())
            return next(f for f in faces if not any(getattr(f, part).name == name for part, name in HELD_OUT))
        case _:
            return sample_face(seed, support)


def _photos(seed: tuple[int, ...], photos: int, support: str, people: Sequence[int]) -> list[Face]:
    """``photos`` pictures of each of ``people``, side by side."""
    faces = []
    for k in people:
        first = draw_face((*seed, k), support)
        others = (draw_face((*seed, k, p), support) for p in range(1, photos))
        faces += [first, *(other.of_person(first) for other in others)]
    return faces


def _drawn(seed, photos, support, resolution, people) -> tuple[list[Face], np.ndarray]:
    faces = _photos(seed, photos, support, people)
    return faces, np.stack([coverage(face, resolution) for face in faces])


class Pool:
    """M = people * photos faces; the pictures of person k are those from ``k * photos`` on.

    Args:
        seed: of the faces.
        support: one of :data:`SUPPORTS`.
        resolution: R.

    ``faces``: list of M; on ``device``: ``shapes`` [M, 27] and ``colours`` [M, 9, 3], see ``shape_vector`` and
    ``colour_array``.
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
        size = max(1, 200 // photos)
        chunks = [range(k, min(k + size, people)) for k in range(0, people, size)]
        self.faces: list[Face] = []
        self._coverage = torch.empty(people * photos, len(LABELS), resolution, resolution, dtype=torch.uint8)

        def take(drawn) -> None:
            for faces, covered in tqdm(drawn, "faces", total=len(chunks), leave=False):
                self._coverage[len(self.faces) : len(self.faces) + len(faces)] = torch.from_numpy(covered)
                self.faces += faces

        if people * photos < ALONE:
            take(map(draw, chunks))
        else:  # spawned: a process that has touched a GPU cannot be forked
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(len(os.sched_getaffinity(0)), spawn) as processes:
                take(processes.map(draw, chunks))
        colours = np.stack([colour_array(face) for face in self.faces])
        shapes = np.stack([shape_vector(face) for face in self.faces])
        self._coverage = self._coverage.to(device)
        self._palette = torch.from_numpy(palettes(colours)).to(device)
        self.colours, self.shapes = torch.from_numpy(colours).to(device), torch.from_numpy(shapes).to(device)
        part_of = torch.tensor([MASKS.index(part) for part in LABELS.values()], device=device)
        self._part_of = torch.eye(len(MASKS), device=device)[part_of] / SUPERSAMPLE**2  # [17, 13]

    def __len__(self) -> int:
        return len(self.faces)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Numbers of ``n`` faces of the pool, on its device; ``generator`` is the CPU's."""
        return torch.randint(len(self), (n,), generator=generator).to(self.colours.device)

    def paint(self, shapes: Tensor, colours: Tensor | None = None) -> Tensor:
        """Pictures [N, 3, R, R] in [-1, 1] of the shapes of faces number ``shapes`` [N] in the colours of others.

        Colours: numbers of faces [N], by default their own.
        """
        palette = self._palette[shapes if colours is None else colours]
        covered = self._coverage[shapes].float()
        mean = torch.einsum("nlhw,nlc->nchw", covered, palette) / SUPERSAMPLE**2
        return mean.round_().div_(127.5).sub_(1)

    def masks(self, shapes: Tensor) -> Tensor:
        """The coverage of each part [N, len(MASKS), R, R] in [0, 1]."""
        return torch.einsum("nlhw,lp->nphw", self._coverage[shapes].float(), self._part_of)

    def painted(self, shape: int, colours: int) -> Face:
        """Face number ``shape`` in the colours of face number ``colours``."""
        return self.faces[shape].in_the_colours_of(self.faces[colours])
