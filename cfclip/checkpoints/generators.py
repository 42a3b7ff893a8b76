"""StyleGAN2 generators in any format -> :class:`cfclip.models.stylegan2.Generator`."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfclip.checkpoints import safe_pickle, weights
from cfclip.checkpoints.generator_formats import Parts, from_nvidia, from_rosinality, from_tensorflow
from cfclip.checkpoints.reading import about, build, describe, mapped, part_of, read_torch, sniff, state_dict
from cfclip.checkpoints.safe_pickle import Record
from cfclip.models.stylegan2 import Generator


def load_generator(path: str | os.PathLike, device: str | torch.device = "cpu") -> Generator:
    """A StyleGAN2 generator: rosinality's ``.pt``, NVIDIA's ``.pkl`` (PyTorch or TensorFlow), or ours.

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
            config, tensors = _from_torch(read_torch(path))
        else:
            raise ValueError(f"it is a {kind} file, but a StyleGAN2 generator is needed")
        has_w_avg = tensors["w_avg"] is not None
        if not has_w_avg:
            tensors = tensors | {"w_avg": torch.zeros(config["w_dim"])}
        generator = build(lambda: Generator(**config), tensors, "generator")
        if not has_w_avg:
            generator.w_avg.copy_(_estimate_w_avg(generator))
    return generator.to(device)


def _from_torch(tree: Any) -> Parts:
    state = state_dict(tree, "g_ema", "g", "state_dict")
    prefixes = [key.removesuffix("input.input") for key in state if key.endswith("input.input")]
    if not prefixes:
        raise ValueError(f"it holds {describe(tree)}, but a StyleGAN2 generator is needed")
    averages = [tree[name] for name in ("latent_avg", "mean_latent") if isinstance(tree.get(name), Tensor)]
    return from_rosinality(part_of(state, prefixes[0]), averages[0] if averages else None)


def _from_pickle(tree: Any) -> Parts:
    if isinstance(tree, tuple | list) and len(tree) == 3:
        if all(isinstance(network, Record) and network.name.name == "Network" for network in tree):
            return from_tensorflow(tree[2])  # (G, D, Gs); Gs is the moving average
    elif isinstance(tree, dict) and isinstance(tree.get("G_ema"), Record):
        return from_nvidia(tree["G_ema"])
    elif isinstance(tree, Record) and isinstance(tree.get("_modules"), dict):
        return from_nvidia(tree)
    raise ValueError(
        f"it is a pickle that holds {describe(tree)}, but NVIDIA's 'G_ema' or (G, D, Gs) is needed"
    )


@torch.no_grad()
def _estimate_w_avg(generator: Generator) -> Tensor:
    """The mean w [D] of 4096 seeded z, as many as rosinality's ``mean_latent(4096)`` takes."""
    z = torch.randn(4096, generator.z_dim, generator=torch.Generator().manual_seed(0))
    return torch.stack([generator.map_one(part).mean(0) for part in z.split(512)]).mean(0)
