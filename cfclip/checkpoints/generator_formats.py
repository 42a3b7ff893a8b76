"""StyleGAN2 generators in other people's layouts -> the constructor arguments and tensors of our ``Generator``.

Pure functions over opened files (``checkpoints.py`` opens them). What cannot become our generator raises ValueError with
a message that says what the file is.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cfclip.checkpoints.safe_pickle import PickleError, Record, to_tensor

Parts = tuple[dict[str, Any], dict[str, Tensor | None]]
"""(constructor arguments, state dict); ``w_avg`` is None where the file has none."""

LR_MUL = 0.01
"""The learning-rate multiplier that our mapping layers have; others are folded into the weights."""


def from_rosinality(state: Mapping[str, Tensor], latent_avg: Tensor | None = None) -> Parts:
    """A state dict of rosinality's ``Generator`` (keys without a prefix) and the mean latent beside it."""
    convs, rgbs = (
        sorted({int(m[1]) for key in state if (m := re.match(rf"{name}\.(\d+)\.", key))})
        for name in ("convs", "to_rgbs")
    )
    layers = []
    for i, name in enumerate(["conv1", *(f"convs.{k}" for k in convs)]):
        noise = state.get(f"noises.noise_{i}")
        layers.append({
            "weight": _need(state, f"{name}.conv.weight")[0],
            "bias": _need(state, f"{name}.activate.bias"),
            "affine.weight": _need(state, f"{name}.conv.modulation.weight"),
            "affine.bias": _need(state, f"{name}.conv.modulation.bias"),
            "noise_strength": _need(state, f"{name}.noise.weight").reshape(()),
            "noise_const": _seeded_noise(i) if noise is None else noise[0, 0],
        })
    to_rgbs = [
        {
            "weight": _need(state, f"{name}.conv.weight")[0],
            "bias": _need(state, f"{name}.bias").reshape(-1),
            "affine.weight": _need(state, f"{name}.conv.modulation.weight"),
            "affine.bias": _need(state, f"{name}.conv.modulation.bias"),
        }
        for name in ["to_rgb1", *(f"to_rgbs.{k}" for k in rgbs)]
    ]
    depth = len({m[1] for key in state if (m := re.match(r"style\.(\d+)\.weight", key))})
    style = [
        (_need(state, f"style.{i + 1}.weight"), _need(state, f"style.{i + 1}.bias")) for i in range(depth)
    ]
    if latent_avg is not None:
        latent_avg = latent_avg.reshape(-1, latent_avg.shape[-1])[
            0
        ]  # [D], or e4e's [L, D] of one repeated row
    return _assemble(
        style,
        _need(state, "input.input")[0],
        layers,
        to_rgbs,
        latent_avg,
        state.get("convs.0.conv.blur.kernel"),
        None,
    )


def _seeded_noise(i: int) -> Tensor:
    """Noise map ``i`` for files from before the maps were stored; upstream draws them anew on every run."""
    side = 4 * 2 ** ((i + 1) // 2)
    return torch.randn(side, side, generator=torch.Generator().manual_seed(i))


def from_nvidia(network: Any) -> Parts:
    """``G_ema`` of an NVIDIA PyTorch pickle (stylegan2-ada-pytorch, or a StyleGAN2 of the stylegan3 repository)."""
    flat: dict[str, Any] = {}
    modules: dict[str, Record] = {}
    _flatten(network, "", flat, modules)
    if "synthesis.input" in modules:
        raise ValueError(
            "it is a StyleGAN3 (alias-free) generator, which has another synthesis network: use a StyleGAN2 checkpoint"
        )
    if "synthesis.b4" not in modules or "mapping" not in modules:
        raise ValueError(
            "its generator is no StyleGAN2: it has no synthesis block b4 behind a mapping network"
        )
    if any(key.endswith("skip.weight") for key in flat) or any(
        m.get("architecture", "skip") != "skip" for m in modules.values()
    ):
        raise ValueError(
            "it is a StyleGAN2 of another architecture (resnet or orig), where only 'skip' works"
        )
    mapping = modules["mapping"]
    _unconditional(network.get("c_dim", mapping.get("c_dim")), "mapping.embed.weight" in flat)
    layers = {
        name: m for name, m in modules.items() if re.fullmatch(r"synthesis\.b\d+\.(conv0|conv1|torgb)", name)
    }
    clamps = {_number(m.get("conv_clamp")) for m in layers.values()}
    activations = {
        m.get("activation", "lrelu") for name, m in modules.items() if re.search(r"\.(conv\d|fc\d+)$", name)
    }
    if len(clamps) > 1 or activations != {"lrelu"}:
        raise ValueError(
            f"it is a changed StyleGAN2: activations {sorted(map(str, activations))}, clamps {sorted(map(str, clamps))}"
        )
    depth = sum(bool(re.fullmatch(r"mapping\.fc\d+\.weight", key)) for key in flat)
    style = []
    for i in range(depth):
        lr_mul = _number(modules[f"mapping.fc{i}"].get("bias_gain", LR_MUL))
        style.append(
            _mapping_layer(_take(flat, f"mapping.fc{i}.weight"), _take(flat, f"mapping.fc{i}.bias"), lr_mul)
        )
    fir = next((to_tensor(flat[key]) for key in flat if key.endswith("resample_filter")), None)
    w_avg = to_tensor(flat["mapping.w_avg"]) if "mapping.w_avg" in flat else None
    return _from_blocks(lambda key: _take(flat, key), set(flat), style, w_avg, fir, clamps.pop())


def _flatten(
    module: Any, prefix: str, flat: dict[str, Any], modules: dict[str, Record], depth: int = 0
) -> None:
    """Collect parameters and buffers, and the modules themselves, under their dotted names."""
    if not isinstance(module, Record) or not isinstance(module.state, dict) or depth > 8:
        raise ValueError("it holds no network where one should be")
    modules[prefix.rstrip(".")] = module
    for kind in ("_parameters", "_buffers"):
        for name, value in (module.get(kind) or {}).items():
            if value is not None:
                flat[f"{prefix}{name}"] = value
    for name, child in (module.get("_modules") or {}).items():
        if child is not None:
            _flatten(child, f"{prefix}{name}.", flat, modules, depth + 1)


def from_tensorflow(network: Record) -> Parts:
    """``Gs`` of an NVIDIA TensorFlow pickle (stylegan2, stylegan2-ada)."""
    flat: dict[str, Any] = {}
    _flatten_tensorflow(network, "", flat)
    kwargs = network.get("static_kwargs")
    kwargs = kwargs.items if isinstance(kwargs, Record) else kwargs or {}
    if "synthesis/4x4/Conv/mod_weight" not in flat:
        version = _number(network.get("version"))
        raise ValueError(
            f"it is a TensorFlow network (version {version:g}) from before StyleGAN2, or no generator: use a StyleGAN2 one"
        )
    if kwargs.get("architecture", "skip") != "skip" or any(
        "/Skip/" in key or "/ToRGB_lod" in key for key in flat
    ):
        raise ValueError(
            "it is a StyleGAN2 of another architecture (config a-d, resnet or orig), where only 'skip' works"
        )
    if {kwargs.get("nonlinearity", "lrelu"), kwargs.get("mapping_nonlinearity", "lrelu")} != {"lrelu"}:
        raise ValueError("it is a changed StyleGAN2: its activation is no leaky ReLU")
    _unconditional(kwargs.get("label_size"), "mapping/LabelEmbed/weight" in flat)
    lr_mul = _number(kwargs.get("mapping_lrmul", LR_MUL))
    depth = sum(bool(re.fullmatch(r"mapping/Dense\d+/weight", key)) for key in flat)
    style = [
        _mapping_layer(
            _take(flat, f"mapping/Dense{i}/weight").t(), _take(flat, f"mapping/Dense{i}/bias"), lr_mul
        )
        for i in range(depth)
    ]
    kernel = kwargs.get("resample_kernel", [1, 3, 3, 1])
    fir = torch.tensor([1.0] if kernel is None else [float(_number(tap)) for tap in kernel])
    w_avg = to_tensor(flat["dlatent_avg"]) if "dlatent_avg" in flat else None
    return _from_blocks(
        lambda key: _take_tensorflow(flat, key),
        {_nvidia_key(key) for key in flat},
        style,
        w_avg,
        fir,
        _number(kwargs.get("conv_clamp")),
    )


def _flatten_tensorflow(network: Any, prefix: str, flat: dict[str, Any], depth: int = 0) -> None:
    if not isinstance(network, Record) or depth > 4:
        raise ValueError("it holds no network where one should be")
    for name, value in network.get("variables") or ():
        flat[f"{prefix}{name}"] = value
    components = network.get("components") or {}
    for name, child in (components.items if isinstance(components, Record) else components).items():
        _flatten_tensorflow(child, f"{prefix}{name}/", flat, depth + 1)


TF_LAYERS = {"conv0": "Conv0_up", "conv1": "Conv1", "torgb": "ToRGB"}

TF_TENSORS = {"affine.weight": "mod_weight", "affine.bias": "mod_bias"}


def _nvidia_key(key: str) -> str:
    """The PyTorch name of a TensorFlow convolution's weight (enough to see which blocks and layers there are)."""
    match = re.fullmatch(r"synthesis/(\d+)x\d+/(\w+)/weight", key)
    layers = {tf: name for name, tf in TF_LAYERS.items()} | {"Conv": "conv1"}
    return f"synthesis.b{match[1]}.{layers.get(match[2], match[2])}.weight" if match else key


def _take_tensorflow(flat: Mapping[str, Any], key: str) -> Tensor:
    """The tensor that NVIDIA's PyTorch code calls ``key``, as PyTorch lays it out."""
    if key == "synthesis.b4.const":
        return _take(flat, "synthesis/4x4/Const/const")[0]
    res, layer, name = re.fullmatch(r"synthesis\.b(\d+)\.(\w+)\.(.+)", key).groups()
    if name == "noise_const":
        index = int(math.log2(int(res))) * 2 - (5 if layer == "conv0" else 4)
        return _take(flat, f"synthesis/noise{max(index, 0)}")[0, 0]
    tf_layer = "Conv" if (res, layer) == ("4", "conv1") else TF_LAYERS[layer]
    value = _take(flat, f"synthesis/{res}x{res}/{tf_layer}/{TF_TENSORS.get(name, name)}")
    if name == "weight":
        value = value.permute(3, 2, 0, 1)  # [k, k, in, out]
        return (
            value.flip(2, 3) if layer == "conv0" else value
        )  # TensorFlow's up-sampling convolution is a correlation
    return value.t() if name == "affine.weight" else value + 1 if name == "affine.bias" else value


def _from_blocks(
    take: Callable[[str], Tensor],
    keys: set[str],
    style: Sequence[tuple[Tensor, Tensor]],
    w_avg: Tensor | None,
    fir: Tensor | None,
    conv_clamp: float | None,
) -> Parts:
    """The parts from NVIDIA's blocks ``synthesis.b4``, ``b8``, …; ``take`` gives a tensor by its PyTorch name."""
    resolutions = sorted(
        int(m[1]) for key in keys if (m := re.fullmatch(r"synthesis\.b(\d+)\.conv1\.weight", key))
    )
    if resolutions != [4 * 2**i for i in range(len(resolutions))]:
        raise ValueError(
            f"its synthesis blocks are {resolutions[:12]}, where 4, 8, … without a gap are needed: the file is incomplete"
        )
    layers, rgbs = [], []
    for res in resolutions:
        for name in ("conv0", "conv1") if res > 4 else ("conv1",):
            prefix = f"synthesis.b{res}.{name}."
            layer = {part: take(prefix + part) for part in ("weight", "bias", "affine.weight", "affine.bias")}
            try:
                layer |= {
                    "noise_strength": take(prefix + "noise_strength").reshape(()),
                    "noise_const": take(prefix + "noise_const"),
                }
            except LookupError:  # trained with use_noise=False
                layer |= {"noise_strength": torch.zeros(()), "noise_const": torch.zeros(res, res)}
            layers.append(layer)
        rgbs.append({
            part: take(f"synthesis.b{res}.torgb.{part}")
            for part in ("weight", "bias", "affine.weight", "affine.bias")
        })
    return _assemble(style, take("synthesis.b4.const"), layers, rgbs, w_avg, fir, conv_clamp)


def _assemble(
    style: Sequence[tuple[Tensor, Tensor]],
    const: Tensor,
    convs: Sequence[Mapping[str, Tensor]],
    rgbs: Sequence[Mapping[str, Tensor]],
    w_avg: Tensor | None,
    fir: Tensor | None,
    conv_clamp: float | None,
) -> Parts:
    if not style:
        raise ValueError("it has no mapping network")
    if rgbs[0]["weight"].shape[0] != 3:
        raise ValueError(
            f"its images have {rgbs[0]['weight'].shape[0]} channels (grey or with alpha), where only RGB works"
        )
    if fir is None:
        fir = torch.tensor([1.0, 3.0, 3.0, 1.0])
    fir = torch.outer(fir, fir) if fir.ndim == 1 else fir
    if fir.ndim != 2 or fir.shape[0] != fir.shape[1] or not 0 < fir.shape[0] <= 64:
        raise ValueError(f"its resampling filter has shape {list(fir.shape)}, where a square one is needed")
    tensors: dict[str, Tensor | None] = {"const": const, "w_avg": w_avg, "fir": fir / fir.sum()}
    for i, (weight, bias) in enumerate(style):
        tensors |= {f"style.{i}.weight": weight, f"style.{i}.bias": bias}
    for name, layers in (("convs", convs), ("rgbs", rgbs)):
        for i, layer in enumerate(layers):
            tensors |= {f"{name}.{i}.{part}": value for part, value in layer.items()}
    config = {
        "resolution": 4 * 2 ** (len(rgbs) - 1),
        "channels": [rgb["weight"].shape[1] for rgb in rgbs],
        "z_dim": style[0][0].shape[1],
        "w_dim": rgbs[0]["affine.weight"].shape[1],
        "mapping_layers": len(style),
        "conv_clamp": conv_clamp,
        "fir": tensors["fir"],
    }
    return config, tensors


def _mapping_layer(weight: Tensor, bias: Tensor, lr_mul: float) -> tuple[Tensor, Tensor]:
    return (weight, bias) if lr_mul == LR_MUL else (weight * (lr_mul / LR_MUL), bias * (lr_mul / LR_MUL))


def _unconditional(classes: Any, embedded: bool) -> None:
    if embedded or (classes is not None and _number(classes) > 0):
        count = f"{_number(classes):g} classes" if classes is not None else "labels"
        raise ValueError(f"it is a conditional generator ({count}), where only unconditional ones work")


def _number(value: Any) -> float | None:
    return None if value is None else float(to_tensor(value))


def _need(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise ValueError(f"it has no {key}: the file is incomplete, or its generator is of another kind")
    return state[key]


def _take(flat: Mapping[str, Any], key: str) -> Tensor:
    if key not in flat:
        raise KeyError(f"it has no {key}: the file is incomplete, or its generator is of another kind")
    try:
        return to_tensor(flat[key])
    except PickleError as error:
        raise PickleError(f"{key}: {error}") from None
