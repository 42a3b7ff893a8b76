"""Rewriting generators and mappers as safetensors."""

import os
from pathlib import Path
from typing import Any

from cfclip.checkpoints import weights
from cfclip.checkpoints.generators import load_generator
from cfclip.checkpoints.mappers import load_mapper
from cfclip.checkpoints.reading import option, read_torch, sniff, state_dict


def convert(path: str | os.PathLike, out: str | os.PathLike, kind: str = "auto") -> str:
    """Write any generator or mapper that is read here as our safetensors: safe, smaller, and quick to open.

    ``kind`` "generator" takes the generator out of a file that holds more (a mapper's, e4e's). Returns what was written,
    "generator" or "mapper". Raises ValueError (WeightsError for what is wrong with the file).
    """
    path, out = Path(path), Path(out)
    if kind not in ("auto", "generator", "mapper"):
        raise ValueError(f"kind must be 'auto', 'generator' or 'mapper', not {kind!r}")
    form = sniff(path)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} must end in .safetensors, which is what is written")
    if out.exists() and out.samefile(path):
        raise ValueError(f"{out} is the input itself: choose another name")
    card: dict[str, Any] = {"source": path.name}
    if form == "safetensors":
        header = weights.read_header(path)
        card = header.card
        kind = header.kind if kind == "auto" else kind
    elif form.startswith("torch"):
        tree = read_torch(path)
        if any(key.startswith("mapper.") for key in state_dict(tree, "state_dict")):
            kind = "mapper" if kind == "auto" else kind
            if isinstance(prompt := option(tree, "description"), str) and kind == "mapper":
                card["training"] = {"prompt": prompt}
        del tree
    if kind == "mapper":
        mapper = load_mapper(path)
        weights.save(mapper, out, "mapper", mapper.metadata, **card)
    else:
        generator = load_generator(path)
        weights.save(generator, out, "generator", generator.config, **card)
    return "mapper" if kind == "mapper" else "generator"
