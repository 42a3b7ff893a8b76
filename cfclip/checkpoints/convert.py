"""Convert generators and mappers to safetensors, and generators to the layouts of other people's code."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from cfclip.checkpoints import weights
from cfclip.checkpoints.generator_writers import one_class, to_nvidia, to_rosinality
from cfclip.checkpoints.generators import load_generator
from cfclip.checkpoints.mappers import load_mapper, save_mapper
from cfclip.checkpoints.reading import has_part, option, read_torch, sniff
from cfclip.files import atomic_write
from cfclip.models.stylegan2 import Generator

LAYOUTS = {"cfclip": None, "rosinality": to_rosinality, "nvidia": to_nvidia}
"""Layout -> function that converts a generator to it; None for ours, which is written as safetensors."""


def convert(
    path: str | os.PathLike,
    out: str | os.PathLike,
    kind: str = "auto",
    layout: str = "cfclip",
    label: int | None = None,
) -> str:
    """Write a generator or mapper of any known format as our safetensors: safe, smaller, and quick to open.

    Args:
        kind: "generator" takes the generator out of a file that holds more (a mapper's, e4e's).
        layout: "cfclip" for our safetensors. The others write a generator for other people's code, as a
            ``.pt`` of plain tensors. "rosinality": its ``Generator`` reads ``["g_ema"]``. "nvidia": see
            :func:`cfclip.checkpoints.generator_writers.to_nvidia`.
        label: of a class-conditional generator: the class to write alone, as a generator without classes.

    Returns the kind that was written, "generator" or "mapper". Warns of properties that ``layout`` lacks.
    Raises ValueError (WeightsError if the input is bad). ``out`` is never half written.
    """
    path, out = Path(path), Path(out)
    if kind not in ("auto", "generator", "mapper"):
        raise ValueError(f"kind must be 'auto', 'generator' or 'mapper', not {kind!r}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    form = sniff(path)
    suffix = ".safetensors" if layout == "cfclip" else ".pt"
    if out.suffix != suffix:
        others = "; the layouts rosinality and nvidia (--layout) are .pt" if layout == "cfclip" else ""
        raise ValueError(f"{out} must end in {suffix}, the format that is written{others}")
    if out.exists() and out.samefile(path):
        raise ValueError(f"{out} is the input itself: choose another name")
    card: dict[str, Any] = {"source": path.name}
    contents = "generator"
    if form == "safetensors":
        contents, _, card = weights.read_header(path)
    elif form.startswith("torch"):
        tree = read_torch(path)
        if has_part(tree, "mapper."):
            contents = "mapper"
            if isinstance(prompt := option(tree, "description"), str) and kind != "generator":
                card["training"] = {"prompt": prompt}
        del tree  # it is read again below, and may be large
    if (contents if kind == "auto" else kind) == "mapper":
        if layout != "cfclip" or label is not None:
            what = f"the layout {layout}" if layout != "cfclip" else "a label"
            raise ValueError(
                f"{path} holds a mapper, but {what} is for generators: to take a generator out of it, add "
                "kind='generator' (--kind generator)"
            )
        save_mapper(load_mapper(path), out, store_as=None, **card)
        return "mapper"
    generator = load_generator(path)
    try:
        if label is not None:
            generator = one_class(generator, label)
            card = card | {"label": label}
        _write(generator, out, layout, card)
    except ValueError as error:
        raise ValueError(f"{path} cannot be converted: {error}") from None
    return "generator"


def _write(generator: Generator, out: Path, layout: str, card: dict[str, Any]) -> None:
    if layout == "cfclip":
        weights.save(generator, out, "generator", generator.config, **card)
        return
    tree, notes = LAYOUTS[layout](generator)
    atomic_write(out, lambda part: torch.save(tree, part))
    for note in notes:
        warnings.warn(f"{out}: {note}", stacklevel=3)
