"""An edit as data: a :class:`Recipe`, the picture that is a pure function of it, and the notebook cell that draws it again.

Shapes: N faces, L layers of W+, D = w_dim, R = resolution.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.baselines.library import load_editor, mapper_for, open_mapper
from cfclip.checkpoints.latents import load_latents
from cfclip.domain import Domain
from cfclip.models.mapper import LEVELS

STRENGTHS = (-1.5, 2.0)

MOST_FACES = 16

Region = str | tuple[float, float, float, float]


@dataclass(frozen=True)
class Recipe:
    """All there is to know of an edit. ValueError that says what is wrong with a value."""

    domain: str = "toonfaces"
    prompt: str = "green lipstick"  # several, one after the other: "green lipstick + blue hair"
    source_text: str = ""  # what the faces show before, for scores and trainings; "": the domain's
    strength: float = 1.0
    layers: tuple[float, ...] = ()  # times the strength, per layer of W+; (): 1 everywhere
    faces: tuple[int | str, ...] = tuple(range(8))  # seeds of faces; files of codes (own photos)
    mapper: str = ""  # a mapper's file, or the folder of an editor; "": the domain's own
    region: Region = (
        ""  # a part of the face, or a box: left, top, right, bottom in shares of the side; "": everywhere
    )

    def __post_init__(self):
        low, high = STRENGTHS
        if not (math.isfinite(self.strength) and low <= self.strength <= high):
            raise ValueError(f"strength must be from {low:g} to {high:g}, not {self.strength!r}")
        if not all(math.isfinite(value) for value in self.layers):
            raise ValueError(f"the strengths of the layers must be numbers, not {self.layers!r}")
        if not 1 <= len(self.faces) <= MOST_FACES or not all(
            isinstance(f, str) or (isinstance(f, int) and f >= 0) for f in self.faces
        ):
            raise ValueError(f"faces must be one to {MOST_FACES} seeds or files, not {self.faces!r}")
        if isinstance(self.region, tuple):
            left, top, right, bottom = self.region
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise ValueError(
                    f"a box is left, top, right, bottom, each from 0 to 1 and with an inside, not {self.region!r}"
                )

    @property
    def prompts(self) -> list[str]:
        """The single prompts."""
        return [part for text in self.prompt.split("+") if (part := " ".join(text.split()))]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """What :meth:`to_json` wrote. ValueError if it did not."""
        try:
            values = json.loads(text)
            return cls(**{
                name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
            })
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no recipe of the explorer: {error}") from None

    def code(self) -> str:
        """A notebook cell that makes ``images`` [N, 3, R, R] to the bit (on this machine, with as many threads), and shows them."""
        edit = []
        if self.mapper and Path(self.mapper).is_dir():
            edit = [
                f"    editor = cfclip.baselines.load_editor({self.mapper!r}, domain)",
                f"    images = editor.edit(w, {self.strength!r})",
            ]
        else:
            strength = repr(self.strength)
            if self.layers:
                strength = "strength"
                edit = [
                    f"    strength = {self.strength!r} * torch.tensor({list(self.layers)!r})[:, None]      # one per layer"
                ]
            mapper = f"cfclip.load_mapper({self.mapper!r})" if self.mapper else "mapper_for(domain, prompt)"
            edit += [
                "    edited = w",
                f"    for prompt in {self.prompts!r}:",
                f"        mapper = {mapper}",
                f"        edited = mapper.edit(edited, domain.clip.encode_text(prompt), {strength})",
                "    images = domain.generator.synthesis(edited)",
            ]
        if self.region:
            edit.append(
                f"    images = recipe.blend(domain, domain.generator.synthesis(w), images, {self.region!r})"
            )
        return "\n".join([
            "import torch",
            "",
            "import cfclip",
            "from cfclip.baselines.library import mapper_for",
            "from cfclip.evaluation.figures import image_grid",
            "from cfclip.explorer import recipe",
            "",
            f"domain = cfclip.load_domain({self.domain!r})",
            f"w = recipe.codes(domain, {list(self.faces)!r})",
            "with torch.no_grad():",
            *edit,
            f"figure = image_grid({{{self.prompt!r}: images}}, columns=len(w))",
            "",
        ])


def codes(domain: Domain, faces: Sequence[int | str]) -> Tensor:
    """Of seeds, codes that no training saw; of files, what is in them. [N, L, D]; WeightsError for a file that cannot be used."""
    found = [
        domain.latents(1, "test", face) if isinstance(face, int) else load_latents(face, domain.generator)[:1]
        for face in faces
    ]
    return torch.cat([w.to(domain.device) for w in found])


@dataclass(frozen=True, eq=False)
class Faces:
    """Codes w [N, L, D] and their pictures [N, 3, R, R]."""

    w: Tensor
    images: Tensor


@torch.no_grad()
def draw_faces(domain: Domain, faces: Sequence[int | str]) -> Faces:
    """The faces of a recipe, unedited."""
    w = codes(domain, faces)
    return Faces(w, domain.generator.synthesis(w))


@torch.no_grad()
def render(domain: Domain, recipe: Recipe, source: Faces | None = None) -> Tensor:
    """The edited pictures [N, 3, R, R]. ``source``: :func:`draw_faces` of the recipe's, where it has been made.

    ValueError (also WeightsError) that says in words what of the recipe cannot be done.
    """
    source = source or draw_faces(domain, recipe.faces)
    w, layers = source.w, len(recipe.layers)
    if layers not in (0, domain.generator.num_ws):
        raise ValueError(
            f"there are strengths for {layers} layers, but this generator has {domain.generator.num_ws}"
        )
    if recipe.mapper and Path(recipe.mapper).is_dir():
        editor = load_editor(recipe.mapper, domain)
        if recipe.layers or recipe.prompts != [editor.config.prompt]:
            raise ValueError(
                f"{editor.method} edits all layers, and by {editor.config.prompt!r} alone: choose a mapper, or switch the levels on"
            )
        images = editor.edit(w, recipe.strength)
    else:
        strength = (
            recipe.strength * torch.tensor(recipe.layers)[:, None].to(w) if recipe.layers else recipe.strength
        )
        edited = w
        for prompt in recipe.prompts:
            text = domain.clip.encode_text(prompt)  # what is no prompt needs no mapper
            mapper = open_mapper(recipe.mapper, domain) if recipe.mapper else mapper_for(domain, prompt)
            edited = mapper.edit(edited, text, strength)
        images = domain.generator.synthesis(edited)
    return blend(domain, source.images, images, recipe.region) if recipe.region else images


@torch.no_grad()
def region_mask(domain: Domain, source: Tensor, edited: Tensor, region: Region) -> Tensor:
    """Soft mask [N, 1, R, R] in [0, 1] of a box, or of a part wherever the readout sees it before or after. ValueError for an unknown part."""
    n, _, size, _ = source.shape
    if isinstance(region, str):
        parts = domain.truth.parts if domain.truth else ()
        if region not in parts:
            known = ", ".join(parts) or "unknown, as it has no ground truth"
            raise ValueError(f"the parts of domain {domain.name} are {known}; not {region!r}")
        seen = [domain.truth.masks(images)[:, parts.index(region)] for images in (source, edited)]
        mask = torch.stack(seen).amax(0)[:, None]
    else:
        left, top, right, bottom = (round(share * size) for share in region)
        mask = source.new_zeros(n, 1, size, size)
        mask[:, :, top:bottom, left:right] = 1
    rim = max(1, size // 64)  # a rim that fades, so that no seam shows
    grown = F.max_pool2d(mask, 2 * rim + 1, 1, rim)
    return F.avg_pool2d(F.pad(grown, [rim] * 4, mode="replicate"), 2 * rim + 1, 1)


def blend(domain: Domain, source: Tensor, edited: Tensor, region: Region) -> Tensor:
    """``edited`` inside the region, ``source`` elsewhere. Pictures [N, 3, R, R]."""
    mask = region_mask(domain, source, edited, region)
    return mask * edited + (1 - mask) * source


def level_layers(num_ws: int, on: Sequence[str]) -> tuple[float, ...]:
    """Factors of the L layers that leave only the levels ``on``; () where that is all of them."""
    factors = [0.0] * num_ws
    for name in on:
        for i in range(num_ws)[LEVELS[name]]:
            factors[i] = 1.0
    return () if all(factors) else tuple(factors)


def levels_on(layers: Sequence[float], num_ws: int) -> dict[str, bool]:
    """level -> whether any of its layers is edited."""
    return {name: any((tuple(layers) or (1.0,) * num_ws)[where]) for name, where in LEVELS.items()}


def describe(recipe: Recipe) -> str:
    """One line for the history."""
    parts: list[Any] = [recipe.prompt.strip() or "no prompt", f"× {recipe.strength:g}"]
    if recipe.layers:
        parts.append("own layers")
    if recipe.region:
        parts.append(recipe.region if isinstance(recipe.region, str) else "box")
    return " · ".join(parts)
