"""Our ``Generator`` in other people's layouts: the tree to save, and notes for use with their code.

Pure functions, the inverse of ``generator_formats.py``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cfclip.models import ops
from cfclip.models.stylegan2 import Generator, StyledConv, ToRGB, pixel_norm

STANDARD_FIR = ops.setup_filter([1.0, 3.0, 3.0, 1.0])
Written = tuple[dict[str, Any], list[str]]
"""The tree to save, and one sentence for each property that the layout or its authors' code lacks."""


def to_rosinality(g: Generator) -> Written:
    """``{"g_ema": state dict, "latent_avg": w_avg}``, as rosinality's ``Generator`` reads it.

    Raises ValueError for a class-conditional generator.
    """
    if g.c_dim:
        raise ValueError(f"rosinality's layout has no place for {g.c_dim} classes: choose one with --label")
    state: dict[str, Tensor] = {}
    for i, layer in enumerate(g.style):
        state |= _named(layer, f"style.{i + 1}.")
    state["input.input"] = g.const[None]
    for level, name, layer in _layers(g):
        index = 2 * level - (name == "conv0")  # of the convolution
        if name == "torgb":
            place = f"to_rgbs.{level - 1}" if level else "to_rgb1"
            state[f"{place}.bias"] = layer.bias.reshape(1, 3, 1, 1)
            if level:
                state[f"{place}.upsample.kernel"] = g.fir * 4
        else:
            place = f"convs.{index - 1}" if index else "conv1"
            state[f"{place}.noise.weight"] = layer.noise_strength.reshape(1)
            state[f"{place}.activate.bias"] = layer.bias
            state[f"noises.noise_{index}"] = layer.noise_const[None, None]
            if layer.up:
                state[f"{place}.conv.blur.kernel"] = g.fir * 4
        state[f"{place}.conv.weight"] = layer.weight[None]
        state |= _named(layer.affine, f"{place}.conv.modulation.")
    notes = []
    if g.conv_clamp is not None:
        notes.append(f"it has no place for the limit of {g.conv_clamp:g} on a layer's output")
    widths = [[512] * 4 + [512 * m // 2**i for i in range(1, 6)] for m in (1, 2, 4)]
    if g.z_dim != g.w_dim or list(g.channels) not in [one[: len(g.channels)] for one in widths]:
        sizes = f"z of {g.z_dim}, w of {g.w_dim} and channels {list(g.channels)}"
        notes.append(f"rosinality's Generator has other widths: change its table to {sizes}")
    if g.fir.shape != STANDARD_FIR.shape:
        notes.append(f"rosinality's Generator needs a blur_kernel of {len(g.fir)} numbers")
    return {"g_ema": _plain(state), "latent_avg": g.w_avg.detach().clone()}, notes


def to_nvidia(g: Generator) -> Written:
    """``{"G_ema": state dict, "init_kwargs": …}``: the tensors and arguments of NVIDIA's ``Generator``.

    With stylegan2-ada-pytorch, load it by ``Generator(**init_kwargs)`` and ``load_state_dict``. With
    stylegan3, pass the entries of ``synthesis_kwargs`` as arguments of ``Generator`` itself.
    ``legacy.load_network_pkl`` cannot load it: it reads only pickles that carry NVIDIA's source code.
    """
    state: dict[str, Tensor] = {"mapping.w_avg": g.w_avg}
    for i, layer in enumerate(g.style):
        state |= _named(layer, f"mapping.fc{i}.")
    if g.c_dim:
        state |= _named(g.embed, "mapping.embed.")
    state["synthesis.b4.const"] = g.const
    for level, name, layer in _layers(g):
        block = f"synthesis.b{4 << level}"
        state[f"{block}.resample_filter"] = g.fir
        state |= {f"{block}.{name}.weight": layer.weight, f"{block}.{name}.bias": layer.bias}
        state |= _named(layer.affine, f"{block}.{name}.affine.")
        if name != "torgb":
            state[f"{block}.{name}.noise_const"] = layer.noise_const
            state[f"{block}.{name}.noise_strength"] = layer.noise_strength
            # NVIDIA's code has the standard filter in layers that do not resample
            state[f"{block}.{name}.resample_filter"] = g.fir if layer.up else STANDARD_FIR
    notes = []
    synthesis: dict[str, Any] = {"conv_clamp": g.conv_clamp, "num_fp16_res": 0}
    if (widths := _nvidia_widths(g)) is not None:
        synthesis |= widths
    else:
        notes.append(f"no channel_base of NVIDIA's Generator gives the widths {list(g.channels)}")
    if not torch.equal(g.fir.cpu(), STANDARD_FIR):
        synthesis["resample_filter"] = g.fir.tolist()
    init = {"z_dim": g.z_dim, "c_dim": g.c_dim, "w_dim": g.w_dim, "img_resolution": g.resolution}
    init |= {"img_channels": 3, "mapping_kwargs": {"num_layers": g.mapping_layers}}
    return {"G_ema": _plain(state), "init_kwargs": init | {"synthesis_kwargs": synthesis}}, notes


def one_class(g: Generator, label: int) -> Generator:
    """A generator without classes that draws only class ``label``, whose embedding becomes part of a bias.

    Raises ValueError for a class that does not exist.
    """
    chosen = g.for_class(label)
    config = g.config | {"c_dim": 0, "fir": g.fir}
    with torch.device("meta"):
        alone = Generator(**config)
    first, state = g.style[0], {k: v for k, v in g.state_dict().items() if not k.startswith("embed.")}
    in_dim, scale = first.weight.shape[1], first.weight.shape[1] ** -0.5
    labels = chosen.embed(torch.eye(g.c_dim)[label][None].to(g.w_avg))
    weight, embedded = first.weight.detach().double(), pixel_norm(labels.detach().double())[0]
    state["style.0.weight"] = (weight[:, : g.z_dim] * (g.z_dim / in_dim) ** 0.5).float()
    state["style.0.bias"] = (first.bias.double() + weight[:, g.z_dim :] @ embedded * scale).detach().float()
    alone.load_state_dict(state, assign=True)
    return alone.eval().requires_grad_(False)


def _layers(g: Generator) -> Iterator[tuple[int, str, StyledConv | ToRGB]]:
    """(level, NVIDIA's name of the layer in its block, layer) of all layers, from 4 x 4 upwards."""
    for level, rgb in enumerate(g.rgbs):
        if level:
            yield level, "conv0", g.convs[2 * level - 1]
        yield level, "conv1", g.convs[2 * level]
        yield level, "torgb", rgb


def _named(layer: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in layer.named_parameters()}


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, because ``torch.save`` writes the whole memory behind a tensor."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _nvidia_widths(g: Generator) -> dict[str, int] | None:
    """``channel_base`` and ``channel_max`` with ``min(base // resolution, max)`` = all channels, or None."""
    widest = max(g.channels)
    base = max(width * (4 << level) for level, width in enumerate(g.channels))
    fits = [min(base // (4 << level), widest) == width for level, width in enumerate(g.channels)]
    return {"channel_base": base, "channel_max": widest} if all(fits) else None
