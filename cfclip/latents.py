"""W and W+ codes: sampling with disjoint train and test seeds."""

import torch
from torch import Tensor

from cfclip.models.stylegan2 import Generator

SPLITS = {"train": 0, "test": 1}


def sample(
    generator: Generator, n: int, split: str = "train", seed: int = 0, truncation: float = 1.0
) -> Tensor:
    """``n`` codes w_plus [n, L, D], one w repeated over the layers. No z occurs in both splits.

    z is drawn on the CPU whatever the generator's device, so that codes are the same on every machine.
    A longer sample starts with the shorter one. Raises ValueError for an unknown ``split``.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {list(SPLITS)}, not {split!r}")
    z = []
    for i in range(n):
        random = torch.Generator().manual_seed(2 * (1_000_003 * seed + i) + SPLITS[split])
        z.append(torch.randn(1, generator.z_dim, generator=random))
    with torch.no_grad():
        return generator.mapping(torch.cat(z).to(generator.w_avg), truncation)
