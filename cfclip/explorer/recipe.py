"""An edit as data: a :class:`Recipe`, the pictures it defines, and the notebook cell that draws them again.

Shapes: N faces, L layers of W+, D = w_dim, R = resolution.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.baselines.library import load_editor, mapper_for, open_mapper
from cfclip.checkpoints.latents import load_latents
from cfclip.domain import Domain
from cfclip.models.mapper import Mapper, level_slices
from cfclip.settings import Settings, check_known, finite, int_at_least, number, setting, text

MIN_STRENGTH, MAX_STRENGTH = -1.5, 2.0
MAX_FACES = 16
MAX_SEED = 2**31 - 1
MAX_LAYERS = 100
MAX_TEXT = 1000
Region = str | tuple[float, float, float, float]


def any_text(value: Any) -> str | None:
    """A text, possibly empty, that can be the content or the name of a file."""
    fine = isinstance(value, str) and len(value) <= MAX_TEXT and not re.search("[\\0\ud800-\udfff]", value)
    return None if fine else f"a text of at most {MAX_TEXT} characters, none of them null or half of a pair"


def a_mapper(value: Any) -> str | None:
    """A file, or a tuple with one file for each single prompt."""
    files = value if isinstance(value, tuple) and len(value) <= MAX_TEXT else (value,)
    wrong = next(filter(None, map(any_text, files)), None)
    return wrong and f"a file, or one for each prompt: {wrong}"


def some_factors(value: Any) -> str | None:
    """A tuple of finite numbers."""
    fine = isinstance(value, tuple) and len(value) <= MAX_LAYERS and not any(map(finite, value))
    return None if fine else f"finite numbers, one per layer (at most {MAX_LAYERS})"


def some_faces(value: Any) -> str | None:
    """A tuple of seeds and files."""
    fine = isinstance(value, tuple) and 1 <= len(value) <= MAX_FACES and all(map(_is_face, value))
    return None if fine else f"one to {MAX_FACES} seeds (whole numbers from 0 to {MAX_SEED}) or files"


def _is_face(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value) and any_text(value) is None
    return int_at_least(0, maximum=MAX_SEED)(value) is None


def a_region(value: Any) -> str | None:
    """The name of a part, or a box."""
    if isinstance(value, tuple) and len(value) == 4 and not any(map(number(0, 1), value)):
        left, top, right, bottom = value
        fine = left < right and top < bottom
    else:
        fine = any_text(value) is None
    box = "a box is left, top, right, bottom in shares of the side, with left < right and top < bottom"
    return None if fine else f"the name of a part, or a box ({box})"


@lru_cache(maxsize=16)
def _of_class(domain: Domain, label: int) -> Domain:
    """``domain`` with class ``label``: the same object each time, so that editors opened for it stay open."""
    return dataclasses.replace(domain, label=label)


@dataclass(frozen=True)
class Recipe(Settings):
    """Everything that defines an edit. ValueError says which value cannot work."""

    domain: str = setting("toonfaces", text)
    # several are applied one after the other: "green lipstick + blue hair"
    prompt: str = setting("green lipstick", any_text)
    # what the faces show before, for scores and trainings; "": the domain's
    source_text: str = setting("", any_text)
    strength: float = setting(1.0, number(MIN_STRENGTH, MAX_STRENGTH))
    # factors of the strength, one per layer of W+; (): 1 everywhere
    layers: tuple[float, ...] = setting((), some_factors)
    faces: tuple[int | str, ...] = setting(tuple(range(8)), some_faces)  # seeds; files of codes (own photos)
    # a mapper's file, or the folder of an editor; "": the domain's own mapper; a tuple: one per single prompt
    mapper: str | tuple[str, ...] = setting("", a_mapper)
    # a part of the face, or a box (left, top, right, bottom in shares of the side); "": everywhere
    region: Region = setting("", a_region)
    # class of the faces, if the domain's generator is class-conditional; None: the domain's
    label: int | None = setting(None, int_at_least(0, optional=True))

    @property
    def prompts(self) -> list[str]:
        """The single prompts, which "+" separates in ``prompt``."""
        return [part for text in self.prompt.split("+") if (part := " ".join(text.split()))]

    @property
    def mappers(self) -> list[str]:
        """The ``mapper`` of each of :attr:`prompts`. ValueError if there are more mappers, or fewer."""
        if isinstance(self.mapper, str):
            return [self.mapper] * len(self.prompts)
        if len(self.mapper) != len(self.prompts):
            raise ValueError(f"there are {len(self.mapper)} mappers, but {len(self.prompts)} prompts")
        return list(self.mapper)

    @property
    def uses_editor(self) -> bool:
        """Whether ``mapper`` is the folder of an editor, which edits all layers with its own prompt."""
        return isinstance(self.mapper, str) and bool(self.mapper) and Path(self.mapper).is_dir()

    def open_mappers(self, domain: Domain) -> list[Mapper]:
        """The mapper of each of :attr:`prompts`. Raises ValueError (or WeightsError, which is one)."""
        pairs = zip(self.prompts, self.mappers, strict=True)
        return [open_mapper(file, domain) if file else mapper_for(domain, prompt) for prompt, file in pairs]

    def chosen(self, domain: Domain) -> Domain:
        """``domain`` with the recipe's class. ValueError if it has no such class."""
        if self.label in (None, domain.label):
            return domain
        return _of_class(domain, self.label)

    def to_json(self) -> str:
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return json.dumps(given, ensure_ascii=False)  # without a class as before label was a field

    @classmethod
    def from_json(cls, text: str | bytes) -> "Recipe":
        """Read what :meth:`to_json` wrote. ValueError for anything else."""
        try:
            given = json.loads(text)
            if not isinstance(given, dict):
                raise TypeError(f"it is a {type(given).__name__}, not a table of names and values")
            check_known(given, [one.name for one in dataclasses.fields(cls)], "a recipe")
            return cls(**given)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"this is not a recipe of the explorer: {error}") from None

    def code(self) -> str:
        """A notebook cell that makes ``images`` [N, 3, R, R] and shows them.

        The images are identical to the bit on the same machine with the same number of threads.
        """
        strength, label = repr(self.strength), "" if self.label is None else f", label={self.label}"
        if self.uses_editor:
            edit = [
                f"    editor = cfclip.baselines.load_editor({self.mapper!r}, domain)",
                f"    images = editor.edit(w, {strength})",
            ]
        else:
            edit = []
            if self.layers:
                factors = f"torch.tensor({list(self.layers)!r})[:, None]      # one per layer"
                edit, strength = [f"    strength = {strength} * {factors}"], "strength"
            edit.append("    edited = w")
            for prompt, file in zip(self.prompts, self.mappers, strict=True):
                mapper = f"cfclip.load_mapper({file!r})" if file else f"mapper_for(domain, {prompt!r})"
                edit += [
                    f"    mapper = {mapper}",
                    f"    edited = domain.edited(edited, {prompt!r}, mapper, {strength})",
                ]
            edit.append("    images = domain.generator.synthesis(edited)")
        if self.region:
            source = "domain.generator.synthesis(w)"
            edit += [f"    images = recipe.blend(domain, {source}, images, {self.region!r})"]
        lines = "\n".join(edit)
        return f"""import torch

import cfclip
from cfclip.baselines.library import mapper_for
from cfclip.evaluation.figures import image_grid
from cfclip.explorer import recipe

domain = cfclip.load_domain({self.domain!r}{label})
w = recipe.codes(domain, {list(self.faces)!r})
with torch.no_grad():
{lines}
figure = image_grid({{{self.prompt!r}: images}}, columns=len(w))
"""


def codes(domain: Domain, faces: Sequence[int | str]) -> Tensor:
    """The codes [N, L, D] of faces: of a seed a code that no training saw, of a file its first code.

    Raises WeightsError for a file that cannot be used.
    """
    each = [
        domain.latents(1, "test", face) if isinstance(face, int) else load_latents(face, domain.generator)[:1]
        for face in faces
    ]
    return torch.cat([w.to(domain.device) for w in each])


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
def render(
    domain: Domain, recipe: Recipe, source: Faces | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The edited pictures [N, 3, R, R]. ``source``: :func:`draw_faces` of the recipe's faces, if known.

    ``dtype``: of the convolutions, see :meth:`.Generator.synthesis`; an editor ignores it. Raises ValueError
    (or WeightsError, which is one) that says what in the recipe cannot be done.
    """
    domain = recipe.chosen(domain)
    source = source or draw_faces(domain, recipe.faces)
    edited, layers = source.w, len(recipe.layers)
    if layers not in (0, domain.generator.num_ws):
        raise ValueError(
            f"there are strengths for {layers} layers, but this generator has {domain.generator.num_ws}"
        )
    if recipe.uses_editor:
        editor = load_editor(recipe.mapper, domain)
        if recipe.layers or recipe.prompts != [editor.config.prompt]:
            raise ValueError(
                f"{editor.method} edits all layers, and only by {editor.config.prompt!r}: choose a mapper, "
                "or use this prompt with all levels on"
            )
        images = editor.edit(edited, recipe.strength)
    else:
        strength = recipe.strength
        if recipe.layers:
            strength = strength * torch.tensor(recipe.layers)[:, None].to(edited)
        for prompt in recipe.prompts:
            domain.clip.tokenize(prompt)  # a prompt that CLIP cannot read fails before a mapper is opened
        for prompt, mapper in zip(recipe.prompts, recipe.open_mappers(domain), strict=True):
            edited = domain.edited(edited, prompt, mapper, strength)
        images = domain.generator.synthesis(edited, dtype=dtype)
    return blend(domain, source.images, images, recipe.region) if recipe.region else images


@torch.no_grad()
def region_mask(domain: Domain, source: Tensor, edited: Tensor, region: Region) -> Tensor:
    """Soft mask [N, 1, R, R] in [0, 1] of a box, or of a part wherever it is seen before or after the edit.

    Raises ValueError for an unknown part.
    """
    n, _, size, _ = source.shape
    if isinstance(region, str):
        parts = domain.truth.parts if domain.truth else ()
        if region not in parts:
            known = ", ".join(parts) or "unknown, because it has no ground truth"
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


def level_layers(num_ws: int, on: Sequence[str], split: Sequence[int]) -> tuple[float, ...]:
    """A factor for each of the L layers: 1 in the levels ``on``, 0 in the others; () if all are 1."""
    factors, slices = [0.0] * num_ws, level_slices(split)
    for name in on:
        for i in range(num_ws)[slices[name]]:
            factors[i] = 1.0
    return () if all(factors) else tuple(factors)


def levels_on(layers: Sequence[float], num_ws: int, split: Sequence[int]) -> dict[str, bool]:
    """level -> whether any of its layers is edited."""
    factors = tuple(layers) or (1.0,) * num_ws
    return {name: any(factors[where]) for name, where in level_slices(split).items()}


def brief(text: str, most: int) -> str:
    """``text`` in one line; the middle is left out if it has more than ``most`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: 2 * most // 3]} … {text[-(most // 3) :]}"


def describe(recipe: Recipe) -> str:
    """One line for the history."""
    region = recipe.region if isinstance(recipe.region, str) else "box"
    layers = "own layers" if recipe.layers else ""
    label = "" if recipe.label is None else f"class {recipe.label}"
    prompt = brief(recipe.prompt, 60) or "no prompt"
    parts = [prompt, f"× {recipe.strength:g}", label, layers, region]
    return " · ".join(part for part in parts if part)
