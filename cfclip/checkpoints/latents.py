"""Latent codes from files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from cfclip.checkpoints.reading import about, describe, read_torch, sniff
from cfclip.checkpoints.weights import WeightsError
from cfclip.models.stylegan2 import Generator


def load_latents(path: str | os.PathLike, generator: Generator | None = None) -> Tensor:
    """Latent codes from ``.pt``, ``.npy`` or ``.safetensors``, float32: W+ [N, L, D], or W [N, D].

    With ``generator`` they are checked to fit, and W is repeated over its layers: always [N, L, D].
    Raises WeightsError.
    """
    path, kind = Path(path), sniff(path)
    with about(path):
        if kind == "npy":
            codes: Any = torch.from_numpy(np.load(path, allow_pickle=False, mmap_mode="r").astype(np.float32))
        else:
            codes = load_file(path) if kind == "safetensors" else read_torch(path)
        if isinstance(codes, Mapping) and len(codes) == 1:
            (codes,) = codes.values()
        usable = isinstance(codes, Tensor) and codes.is_floating_point() and codes.ndim in (2, 3)
        if not usable or not codes.numel():
            raise ValueError(
                f"it holds {describe(codes)}, but latents are needed: "
                "one float tensor [N, L, D] (W+) or [N, D] (W)"
            )
        w = codes.detach().float().clone(memory_format=torch.contiguous_format)
        if not w.isfinite().all():
            raise ValueError("its latents are not all finite: the file is damaged, or the inversion failed")
    return w if generator is None else fit_latents(w, generator, str(path))


def fit_latents(w: Tensor, generator: Generator, what: str = "the latents") -> Tensor:
    """W [N, D] (or [N, 1, D]) or W+ [N, L, D] -> [N, L, D]; WeightsError if they do not fit ``generator``."""
    layers, width, res = generator.num_ws, generator.w_dim, generator.resolution
    if w.shape[-1] != width:
        raise WeightsError(
            f"{what}: codes are {w.shape[-1]} wide, but this generator's are {width}: "
            "they belong to another generator"
        )
    if w.ndim == 2 or w.shape[1] == 1:
        return w.reshape(-1, 1, width).repeat(1, layers, 1)
    if (given := w.shape[1]) != layers:
        origin = (
            f" (those of a {2 ** (given // 2 + 1)} px generator)" if given >= 4 and given % 2 == 0 else ""
        )
        raise WeightsError(
            f"{what}: codes have {given} layers{origin}, but this {res} px generator takes {layers}: "
            "load the generator they were made with, or invert the photos again; "
            f"w[:, :{layers}] removes layers that are too many"
        )
    return w
