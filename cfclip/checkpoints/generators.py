"""StyleGAN2 generators in any format -> :class:`cfclip.models.stylegan2.Generator`."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfclip.checkpoints import safe_pickle, weights
from cfclip.checkpoints.generator_formats import from_nvidia, from_rosinality, from_tensorflow
from cfclip.checkpoints.reading import about, build, describe, mapped, read_torch, sniff, state_dict
from cfclip.checkpoints.safe_pickle import Record
from cfclip.models.stylegan2 import Generator

W_AVG_SAMPLES = 4096
"""Latents that ``w_avg`` is estimated from where a file has none (rosinality's ``mean_latent(4096)``)."""


def load_generator(path: str | os.PathLike, device: str | torch.device = "cpu") -> Generator:
    """A StyleGAN2 generator: rosinality's ``.pt``, NVIDIA's PyTorch or TensorFlow ``.pkl``, or our safetensors.

    Also the generator inside a mapper's or e4e's checkpoint. Frozen, float32. Raises WeightsError.
    """
    path, kind = Path(path), sniff(path)
    with about(path):
        if kind == "safetensors":
            tensors, config, _ = weights.read(path, "generator")
            config = config | {"fir": tensors.get("fir", torch.ones(1, 1))}
        elif kind == "pickle":
            with mapped(path) as file:
                config, tensors = _from_pickle(safe_pickle.load(file))
        elif kind.startswith("torch"):
            tree = read_torch(path)
            state = state_dict(tree, "g_ema", "g", "state_dict")
            prefix = next(
                (key.removesuffix("input.input") for key in state if key.endswith("input.input")), None
            )
            if prefix is None:
                raise ValueError(f"it holds {describe(tree)}, where a StyleGAN2 generator is needed")
            avg = next(
                (tree[name] for name in ("latent_avg", "mean_latent") if isinstance(tree.get(name), Tensor)),
                None,
            )
            config, tensors = from_rosinality(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, avg
            )
        else:
            raise ValueError(f"it is a {kind} file, where a StyleGAN2 generator is needed")
        known = tensors["w_avg"] is not None
        generator = build(
            lambda: Generator(**config),
            tensors if known else tensors | {"w_avg": torch.zeros(config["w_dim"])},
            "generator",
        )
        if not known:
            generator.w_avg.copy_(estimate_w_avg(generator))
    return generator.to(device)


def _from_pickle(tree: Any):
    if (
        isinstance(tree, (tuple, list))
        and len(tree) == 3
        and all(isinstance(n, Record) and n.name.name == "Network" for n in tree)
    ):
        return from_tensorflow(tree[2])  # (G, D, Gs); Gs is the moving average
    if isinstance(tree, dict) and isinstance(tree.get("G_ema"), Record):
        return from_nvidia(tree["G_ema"])
    if isinstance(tree, Record) and isinstance(tree.get("_modules"), dict):
        return from_nvidia(tree)
    raise ValueError(
        f"it is a pickle that holds {describe(tree)}, where NVIDIA's 'G_ema' or (G, D, Gs) is needed"
    )


@torch.no_grad()
def estimate_w_avg(generator: Generator, samples: int = W_AVG_SAMPLES, seed: int = 0) -> Tensor:
    """The mean w [D] of ``samples`` seeded z."""
    z = torch.randn(samples, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    return torch.stack([generator.map_one(part).mean(0) for part in z.split(samples // 8)]).mean(0)
