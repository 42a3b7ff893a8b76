"""Latent mappers: CF-CLIP's and StyleCLIP's files, and ours."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfclip.checkpoints import weights
from cfclip.checkpoints.reading import about, build, describe, option, read_torch, sniff, state_dict
from cfclip.models.mapper import LEVELS, Mapper, MapperConfig

OFFICIAL_LEVELS = {"coarse": "course", "medium": "medium", "fine": "fine"}
"""Our name of a level -> the published files' ("course" is how they spell it)."""


def load_mapper(path: str | os.PathLike) -> Mapper:
    """A latent mapper: CF-CLIP's or StyleCLIP's ``.pt``, or our safetensors. Frozen, float32. Raises WeightsError."""
    path, kind = Path(path), sniff(path)
    with about(path):
        if kind == "safetensors":
            tensors, config, _ = weights.read(path, "mapper")
            config = MapperConfig(**config | {"levels": tuple(config.get("levels", LEVELS))})
        else:
            tree = read_torch(path)
            config, tensors = _official_mapper(tree, state_dict(tree, "state_dict"))
        return build(lambda: Mapper(config), tensors, "mapper")


def save_mapper(mapper: Mapper, path: str | os.PathLike, **card: Any) -> Path:
    """Write a mapper in half floats. ``card``: method, domain, and training, the flat settings with the prompt(s)."""
    return weights.save(mapper, path, "mapper", mapper.metadata, torch.float16, **card)


def _official_mapper(tree: Any, state: Mapping[str, Tensor]) -> tuple[MapperConfig, dict[str, Tensor]]:
    levels = tuple(
        name for name in LEVELS if f"mapper.{OFFICIAL_LEVELS[name]}_mapping.mapping.1.weight" in state
    )
    if not levels:
        other = any(key.startswith("mapper.") for key in state)
        raise ValueError(
            "it is a mapper of another type (SingleMapper or StyleSpace), where a LevelsMapper is needed"
            if other
            else f"it holds {describe(tree)}, where a mapper is needed"
        )
    tensors: dict[str, Tensor] = {}
    texts = len({key.split(".")[1] for key in state if key.startswith("text_mapper.")})
    stacks = {f"mapper.{OFFICIAL_LEVELS[name]}_mapping": f"levels.{name}" for name in levels}
    stacks |= {f"text_mapper.mapper_{i}": f"text.{i}" for i in range(texts)}
    for theirs, ours in stacks.items():
        if f"{theirs}.mapping.5.weight" in state:
            raise ValueError(f"its {theirs} is deeper than the 4 layers of the published mappers")
        for i in range(4):
            for part in ("weight", "bias"):
                name = f"{theirs}.mapping.{i + 1}.{part}"
                if name not in state:
                    raise ValueError(f"it has no {name}: the file is incomplete")
                tensors[f"{ours}.layers.{i}.{part}"] = state[name]
    if ("mapper.fc.weight" in state) != bool(texts):
        raise ValueError("it has only one of text_mapper.* and mapper.fc.*: the file is incomplete")
    tensors |= {f"fuse.{part}": state[f"mapper.fc.{part}"] for part in ("weight", "bias") if texts}
    noises = sum(bool(re.fullmatch(r"decoder\.noises\.noise_\d+", key)) for key in state)
    size = option(tree, "stylegan_size")
    num_ws = texts or (noises + 1 if noises else 2 * int(size).bit_length() - 4 if size else 18)
    width, text_dim = state[f"mapper.{OFFICIAL_LEVELS[levels[0]]}_mapping.mapping.1.weight"].shape[0], None
    if texts:
        text_dim = tensors["text.0.layers.0.weight"].shape[1]
    return MapperConfig(
        num_ws=num_ws, w_dim=width, text_dim=text_dim, levels=levels, norm_axis="layer"
    ), tensors
