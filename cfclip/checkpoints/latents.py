"""Latent codes from files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from cfclip.checkpoints.reading import about, describe, read_torch, sniff
from cfclip.checkpoints.weights import WeightsError
from cfclip.models.stylegan2 import Generator


def load_latents(path: str | os.PathLike, generator: Generator | None = None) -> Tensor:
    """Latent codes from ``.pt``, ``.npy`` or ``.safetensors``, float32: W+ [N, L, D], or W [N, D].

    With ``generator`` the sizes are checked, and W is repeated over its layers: always [N, L, D]. Raises WeightsError.
    """
    path, kind = Path(path), sniff(path)
    with about(path):
        if kind == "npy":
            found: Any = torch.from_numpy(np.load(path, allow_pickle=False, mmap_mode="r").astype(np.float32))
        elif kind == "safetensors":
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        else:
            found = read_torch(path)
        if isinstance(found, Mapping) and len(found) == 1:
            found = next(iter(found.values()))
        if (
            not isinstance(found, Tensor)
            or not found.is_floating_point()
            or found.ndim not in (2, 3)
            or not found.numel()
        ):
            raise ValueError(
                f"it holds {describe(found)}, where latents are needed: one float tensor [N, L, D] (W+) or [N, D] (W)"
            )
        w = found.detach().float().clone(memory_format=torch.contiguous_format)
        if not w.isfinite().all():
            raise ValueError("its latents are not all finite: the file is damaged, or the inversion failed")
    return w if generator is None else fit_latents(w, generator, str(path))


def fit_latents(w: Tensor, generator: Generator, what: str = "the latents") -> Tensor:
    """W [N, D] (or [N, 1, D]) or W+ [N, L, D] -> [N, L, D] for ``generator``; WeightsError with both numbers if the sizes differ."""
    layers, width, res = generator.num_ws, generator.w_dim, generator.resolution
    if w.shape[-1] != width:
        raise WeightsError(
            f"{what}: codes are {w.shape[-1]} wide, but this generator's are {width}: they belong to another generator"
        )
    if w.ndim == 2 or w.shape[1] == 1:
        return w.reshape(-1, 1, width).repeat(1, layers, 1)
    if w.shape[1] != layers:
        other = (
            f" (they are of a {2 ** (w.shape[1] // 2 + 1)} px generator)"
            if w.shape[1] >= 4 and w.shape[1] % 2 == 0
            else ""
        )
        raise WeightsError(
            f"{what}: codes have {w.shape[1]} layers{other}, but this {res} px generator takes {layers}: load the "
            f"generator they were made with, or invert the photos again; w[:, :{layers}] cuts what is too long"
        )
    return w
