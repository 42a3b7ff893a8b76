"""Latent mappers: CF-CLIP's and StyleCLIP's files, and ours."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfclip.checkpoints import weights
from cfclip.checkpoints.reading import (
    about,
    build,
    find_networks,
    has_part,
    option,
    read_torch,
    sniff,
    the_network,
)
from cfclip.checkpoints.weights import check_numbers
from cfclip.models.mapper import LEVELS, Mapper, MapperConfig

OFFICIAL_LEVELS = {"coarse": "course", "medium": "medium", "fine": "fine"}
"""Our name of a level -> its name in the published files, which spell "coarse" as "course"."""

MOST_LAYERS = 1000
"""The most text mappers that are read, so that reading stays quick; a StyleGAN2 of 16384 px has 26 layers."""


def load_mapper(path: str | os.PathLike) -> Mapper:
    """Load a latent mapper: CF-CLIP's or StyleCLIP's ``.pt``, under any key and prefix, or our safetensors.

    Frozen, float32. Raises WeightsError.
    """
    path, kind = Path(path), sniff(path)
    with about(path):
        if kind == "safetensors":
            tensors, config, _ = weights.read(path, "mapper")
            config = MapperConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
        else:
            config, tensors = _official_mapper(read_torch(path))
        return build(lambda: Mapper.of(config), tensors, "mapper")


def save_mapper(
    mapper: Mapper, path: str | os.PathLike, store_as: torch.dtype | None = torch.float16, **card: Any
) -> Path:
    """Write a mapper, by default in half precision.

    ``card``: method, domain, and training (the flat settings, with ``prompt`` or ``prompts`` among them).
    """
    return weights.save(mapper, path, "mapper", mapper.metadata, store_as, **card)


def _official_mapper(tree: Any) -> tuple[MapperConfig, dict[str, Tensor]]:
    stacks = {name: f"mapper.{theirs}_mapping" for name, theirs in OFFICIAL_LEVELS.items()}
    found = {}
    for stack in stacks.values():
        found |= find_networks(tree, f"{stack}.")
    if not found and has_part(tree, "mapper."):
        raise ValueError("it is a mapper of another type than LevelsMapper: SingleMapper or StyleSpace")
    _, state = the_network(found, tree, "a mapper")
    levels = tuple(name for name in LEVELS if any(key.startswith(f"{stacks[name]}.") for key in state))
    texts = len({key.split(".")[1] for key in state if key.startswith("text_mapper.")})
    if texts > MOST_LAYERS:
        raise ValueError(f"it has {texts} text mappers, more layers than any generator: the file is damaged")
    for key, tensor in state.items():
        if key.startswith(("mapper.", "text_mapper.")):
            check_numbers(key, tensor)
    if ("mapper.fc.weight" in state) != bool(texts):
        raise ValueError("it has only one of text_mapper.* and mapper.fc.*: the file is incomplete")
    renamed = {stacks[name]: f"levels.{name}" for name in levels}
    renamed |= {f"text_mapper.mapper_{i}": f"text.{i}" for i in range(texts)}
    tensors: dict[str, Tensor] = {}
    for part in ("weight", "bias"):
        for theirs, ours in renamed.items():
            if f"{theirs}.mapping.5.weight" in state:
                raise ValueError(f"its {theirs} is deeper than the 4 layers of the published mappers")
            for i in range(4):
                tensors[f"{ours}.layers.{i}.{part}"] = state[f"{theirs}.mapping.{i + 1}.{part}"]
        if texts:
            tensors[f"fuse.{part}"] = state[f"mapper.fc.{part}"]
    width = state[f"{stacks[levels[0]]}.mapping.1.weight"].shape[0]
    text_dim = tensors["text.0.layers.0.weight"].shape[1] if texts else None
    num_ws = texts or _layers_without_text(tree, state)
    return MapperConfig(num_ws, width, text_dim, levels, norm_axis="layer"), tensors


def _layers_without_text(tree: Any, state: Mapping[str, Tensor]) -> int:
    """L of a StyleCLIP mapper: from the generator beside it or from its options, otherwise 18 (1024 px)."""
    if noises := sum(bool(re.fullmatch(r"decoder\.noises\.noise_\d+", key)) for key in state):
        return noises + 1
    size = option(tree, "stylegan_size")
    return 2 * size.bit_length() - 4 if isinstance(size, int) and 8 <= size <= 1 << 14 else 18
