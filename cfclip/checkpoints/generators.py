"""StyleGAN2 generators in any format -> :class:`cfclip.models.stylegan2.Generator`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfclip.checkpoints import safe_pickle, weights
from cfclip.checkpoints.budget import spend
from cfclip.checkpoints.generator_formats import (
    Parts,
    from_nvidia,
    from_nvidia_state,
    from_rosinality,
    from_tensorflow,
)
from cfclip.checkpoints.reading import (
    about,
    build,
    describe,
    find_networks,
    mapped,
    mean_latent,
    read_torch,
    sniff,
    the_network,
)
from cfclip.checkpoints.values import Record
from cfclip.models.stylegan2 import Generator
from cfclip.settings import number

ROSINALITY, NVIDIA = "input.input", "synthesis.b4.const"
"""The tensor by which a generator's state dict of each layout is recognised."""


def load_generator(path: str | os.PathLike, device: str | torch.device = "cpu") -> Generator:
    """Load a StyleGAN2 generator: rosinality's ``.pt``, NVIDIA's ``.pkl`` (PyTorch or TensorFlow), or ours.

    A torch file may have the state dict of either PyTorch network under any key and prefix, e.g. in the
    checkpoint of a mapper or e4e. If it has several, the moving average ("ema") is used. NVIDIA's state dicts
    lack the clamp (unless ``convert`` wrote them) and the learning-rate multiplier of the mapping: 256 and
    0.01 are assumed. The generator is frozen and float32. Raises WeightsError.
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
            tensors = tensors | {"w_avg": torch.zeros(1).expand(config["w_dim"])}
        generator = build(lambda: Generator(**config), tensors, "generator")
        if not has_w_avg:
            generator.w_avg.copy_(_estimate_w_avg(generator))
    return generator.to(device)


def _from_torch(tree: Any) -> Parts:
    found = find_networks(tree, ROSINALITY) | find_networks(tree, NVIDIA)
    place, state = the_network(found, tree, "a StyleGAN2 generator", ROSINALITY, NVIDIA)
    if ROSINALITY in state:
        return from_rosinality(state, mean_latent(tree, place))
    return from_nvidia_state(state, _clamp_beside(tree))


def _clamp_beside(tree: Any) -> float | None:
    """The clamp that ``to_nvidia`` wrote beside the state dict, otherwise 256, that of NVIDIA's training."""
    for key in ("init_kwargs", "synthesis_kwargs"):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    if not isinstance(tree, Mapping) or "conv_clamp" not in tree:
        return 256.0
    clamp = tree["conv_clamp"]
    if clamp is not None and (wanted := number(above=True)(clamp)):
        raise ValueError(f"its conv_clamp must be {wanted}, or None, not {str(clamp)[:40]}")
    return clamp


def _from_pickle(tree: Any) -> Parts:
    networks = tree if isinstance(tree, tuple | list) else ()
    if len(networks) == 3 and all(isinstance(n, Record) and n.name.name == "Network" for n in networks):
        return from_tensorflow(networks[2])  # (G, D, Gs); Gs is the moving average
    wanted = "NVIDIA's 'G_ema' or (G, D, Gs)"
    if isinstance(tree, dict) and not isinstance(tree.get("G_ema"), Record):
        networks = {key: value for key, value in tree.items() if isinstance(key, str) and _synthesises(value)}
        return from_nvidia(the_network(networks, tree, wanted)[1])
    network = tree.get("G_ema") if isinstance(tree, dict) else tree
    if isinstance(network, Record) and (network is not tree or isinstance(tree.get("_modules"), dict)):
        return from_nvidia(network)
    raise ValueError(f"it is a pickle that holds {describe(tree)}, but {wanted} is needed")


def _synthesises(network: Any) -> bool:
    parts = network.get("_modules") if isinstance(network, Record) else None
    return isinstance(parts, dict) and "synthesis" in parts


@torch.no_grad()
def _estimate_w_avg(generator: Generator) -> Tensor:
    """The mean w [D] of 4096 seeded z, as many as rosinality's ``mean_latent(4096)`` takes."""
    spend(4 * 4096 * max(generator.z_dim, generator.w_dim))
    z = torch.randn(4096, generator.z_dim, generator=torch.Generator().manual_seed(0))
    classes = generator.every_class(len(z))
    parts = [slice(i, i + 512) for i in range(0, len(z), 512)]
    w = [generator.map_one(z[part], None if classes is None else classes[part]) for part in parts]
    return torch.stack([one.mean(0) for one in w]).mean(0)
