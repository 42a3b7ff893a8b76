"""StyleGAN2 generators in other people's layouts -> constructor arguments and tensors of our ``Generator``.

Pure functions over opened files (``generators.py`` opens them). ValueError says why a file cannot become our
generator; KeyError names a tensor that it lacks.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cfclip.checkpoints.budget import spend
from cfclip.checkpoints.values import PickleError, Record, to_tensor
from cfclip.checkpoints.weights import check_numbers

Parts = tuple[dict[str, Any], dict[str, Tensor | None]]
"""(constructor arguments, state dict); ``w_avg`` is None if the file has none."""

RESOLUTIONS = [4 << level for level in range(13)]
"""Resolutions of the synthesis blocks, up to the largest that is supported."""

Take = Callable[[int, str, str], Tensor]
"""(level, layer, part) -> tensor. Level 0 is 4 x 4; layer: "conv0" (up-sampling), "conv1" or "torgb"."""
PARTS = ("weight", "bias", "affine.weight", "affine.bias")
"""Parts of every layer. Convolutions trained with noise also have "noise_strength" and "noise_const"."""

Style = list[tuple[Tensor, Tensor, float]]
"""Weight, bias and learning-rate multiplier of each mapping layer."""
Embedding = tuple[Tensor, Tensor] | None
"""Weight and bias of the layer that reads the labels of a class-conditional generator."""
LR_MUL = 0.01
"""Learning-rate multiplier of our mapping layers; any other is folded into their weights and biases."""

MAX_STYLE = 64
"""The largest number of mapping layers that is supported; NVIDIA's networks have 8 or 2."""


def from_rosinality(state: Mapping[str, Tensor], latent_avg: Tensor | None = None) -> Parts:
    """Convert a state dict of rosinality's ``Generator`` (keys without a prefix) and its mean latent."""
    flat: dict[str, Any] = dict(state)
    names = {"weight": "conv.weight", "noise_strength": "noise.weight"}
    names |= {"affine.weight": "conv.modulation.weight", "affine.bias": "conv.modulation.bias"}

    def take(level: int, layer: str, part: str) -> Tensor:
        index = 2 * level - (layer == "conv0")  # of the convolution
        if part == "noise_const":
            key = f"noises.noise_{index}"
            return _take(flat, key)[0, 0] if key in flat else _seeded_noise(index)
        if layer == "torgb":
            name, bias = f"to_rgbs.{level - 1}" if level else "to_rgb1", "bias"
        else:
            name, bias = f"convs.{index - 1}" if index else "conv1", "activate.bias"
        value = _take(flat, f"{name}.{names.get(part, bias)}")
        return value[0] if part == "weight" else value.reshape(-1) if part == "bias" else value

    depth = len(_indices(r"style\.(\d+)\.weight", flat))
    layers = [f"style.{i + 1}" for i in range(depth)]
    style = [(_take(flat, f"{layer}.weight"), _take(flat, f"{layer}.bias"), LR_MUL) for layer in layers]
    if latent_avg is not None:  # [D], or in e4e's files [L, D] with equal rows
        check_numbers("mean latent", latent_avg)
        latent_avg = latent_avg.reshape(-1, latent_avg.shape[-1])
        if not (latent_avg == latent_avg[0]).all():
            raise ValueError("its mean latent differs between layers, but one for all of them is needed")
        latent_avg = latent_avg[0]
    levels = [0, *(min(k + 1, 20) for k in _indices(r"to_rgbs\.(\d+)\..+", flat))]  # 4 << level stays small
    used = r"convs\.\d+\.conv\.blur\.kernel|to_rgbs\.\d+\.upsample\.kernel"
    fir = _one_filter(flat, used, gain=4)
    const, resolutions = _take(flat, "input.input")[0], [4 << level for level in levels]
    parts = _assemble(take, resolutions, const, style, latent_avg, fir, conv_clamp=None)
    _check_rest(flat, ("latent_avg", "mean_latent", "n_averaged"))
    return parts


def _seeded_noise(index: int) -> Tensor:
    """Noise map ``index`` for old files, which store none; rosinality's code draws new maps in every run."""
    side = 4 * 2 ** ((index + 1) // 2)
    spend(4 * side * side)
    return torch.randn(side, side, generator=torch.Generator().manual_seed(index))


def from_nvidia(network: Any) -> Parts:
    """Convert ``G_ema`` of an NVIDIA PyTorch pickle (stylegan2-ada-pytorch, or a StyleGAN2 of stylegan3)."""
    flat: dict[str, Any] = {}
    modules: dict[str, Record] = {}
    _flatten(network, "", flat, modules)
    if "synthesis.input" in modules:
        raise ValueError("it is a StyleGAN3 (alias-free) generator: use a StyleGAN2 checkpoint")
    if "synthesis.b4" not in modules or "mapping" not in modules:
        raise ValueError("its generator is no StyleGAN2: it has no mapping network or no block b4")
    architectures = {_word(module.get("architecture", "skip")) for module in modules.values()}
    _check_architecture(architectures, skips=False)
    classes = max(_number(module.get("c_dim")) or 0 for module in (network, modules["mapping"]))

    def values(name: str, layers: str, default: Any = None) -> list:
        return [m.get(name, default) for key, m in modules.items() if re.fullmatch(layers, key)]

    clamps = set(map(_number, values("conv_clamp", r"synthesis\.b\d+\.(conv0|conv1|torgb)")))
    activations = set(map(_word, values("activation", r".+\.(conv\d|fc\d+)", "lrelu")))
    if len(clamps) > 1 or activations != {"lrelu"}:
        given = f"activations {sorted(activations)[:6]}, clamps {sorted(map(str, clamps))[:6]}"
        raise ValueError(f"it is a modified StyleGAN2: {given}")
    lr_muls = {key: _number(module.get("bias_gain", LR_MUL)) for key, module in modules.items()}
    return from_nvidia_state(flat, next(iter(clamps), None), lr_muls, classes)


def from_nvidia_state(
    state: Mapping[str, Any],
    conv_clamp: float | None = 256.0,
    lr_muls: Mapping[str, float] | None = None,
    classes: float = 0,
) -> Parts:
    """Convert ``G_ema.state_dict()`` of an NVIDIA PyTorch network.

    A state dict does not contain the clamp or the learning-rate multipliers of the mapping layers. Their
    defaults are the values of NVIDIA's training.
    """
    flat: dict[str, Any] = dict(state)
    _check_architecture({"skip"}, any(key.endswith("skip.weight") for key in flat))
    embed = _embedding(flat, "mapping.embed.", classes)
    style = []
    for i in range(len(_indices(r"mapping\.fc(\d+)\.weight", flat))):
        name = f"mapping.fc{i}"
        lr_mul = (lr_muls or {}).get(name, LR_MUL)
        style.append((_take(flat, f"{name}.weight"), _take(flat, f"{name}.bias"), lr_mul))

    def take(level: int, layer: str, part: str) -> Tensor:
        return _take(flat, f"synthesis.b{4 << level}.{layer}.{part}")

    w_avg = _take(flat, "mapping.w_avg") if "mapping.w_avg" in flat else None
    fir = _one_filter(flat, r"synthesis\.b(?!4\.)\d+\.(conv0\.)?resample_filter", gain=1)
    resolutions = _indices(r"synthesis\.b(\d+)\.conv1\.weight", flat)
    const = _take(flat, "synthesis.b4.const")
    use_noise = any(key.endswith("noise_strength") for key in flat)
    parts = _assemble(take, resolutions, const, style, w_avg, fir, conv_clamp, use_noise, embed)
    unused = [key for key in flat if key.endswith(".resample_filter")]  # of layers that do not resample
    _check_rest(flat, unused)
    return parts


def _flatten(
    module: Any, prefix: str, flat: dict[str, Any], modules: dict[str, Record], depth: int = 0
) -> None:
    """Collect parameters and buffers, and the modules themselves, under their dotted names."""
    if not isinstance(module, Record) or not isinstance(module.state, dict) or depth > 8:
        raise ValueError("it has something else in the place of a network")
    modules[prefix.rstrip(".")] = module
    for kind in ("_parameters", "_buffers"):
        for name, value in _items(module.get(kind)):
            if value is not None:
                flat[f"{prefix}{name}"] = value
    for name, child in _items(module.get("_modules")):
        if child is not None:
            _flatten(child, f"{prefix}{name}.", flat, modules, depth + 1)


def from_tensorflow(network: Record) -> Parts:
    """Convert ``Gs`` of an NVIDIA TensorFlow pickle (stylegan2, stylegan2-ada)."""
    flat: dict[str, Any] = {}
    _flatten_tensorflow(network, "", flat)
    kwargs = dict(_items(network.get("static_kwargs")))
    if "synthesis/4x4/Conv/mod_weight" not in flat:
        version = _number(network.get("version"))
        raise ValueError(
            f"it is a TensorFlow network (version {version}) from before StyleGAN2, or not a generator: "
            "use a StyleGAN2 checkpoint"
        )
    skips = any("/Skip/" in key or "/ToRGB_lod" in key for key in flat)
    _check_architecture({_word(kwargs.get("architecture", "skip"))}, skips)
    if {_word(kwargs.get(f"{part}nonlinearity", "lrelu")) for part in ("", "mapping_")} != {"lrelu"}:
        raise ValueError("it is a modified StyleGAN2: its activation is not a leaky ReLU")
    concat = "mapping/LabelConcat/weight"  # of the first StyleGAN2, which embeds labels in another way
    classes = _number(kwargs.get("label_size")) or (len(to_tensor(flat[concat])) if concat in flat else 0)
    embed = _embedding(flat, "mapping/LabelEmbed/", classes)
    embed = embed and (embed[0].t(), embed[1])

    def take(level: int, layer: str, part: str) -> Tensor:
        res = 4 << level
        if part == "noise_const":
            return _take(flat, f"synthesis/noise{2 * level - (layer == 'conv0')}")[0, 0]
        name = {"conv0": "Conv0_up", "conv1": "Conv1" if level else "Conv", "torgb": "ToRGB"}[layer]
        value = _take(flat, f"synthesis/{res}x{res}/{name}/{part.replace('affine.', 'mod_')}")
        if part == "weight":  # [k, k, in, out]; TensorFlow's up-sampling convolution is a correlation
            value = value.permute(3, 2, 0, 1)
            return value.flip(2, 3) if layer == "conv0" else value
        return value.t() if part == "affine.weight" else value + 1 if part == "affine.bias" else value

    lr_mul = _number(kwargs.get("mapping_lrmul", LR_MUL))
    style = []
    for i in range(len(_indices(r"mapping/Dense(\d+)/weight", flat))):
        weight, bias = (_take(flat, f"mapping/Dense{i}/{part}") for part in ("weight", "bias"))
        style.append((weight.t(), bias, lr_mul))
    w_avg = _take(flat, "dlatent_avg") if "dlatent_avg" in flat else None
    taps = kwargs.get("resample_kernel", [1, 3, 3, 1])
    if not isinstance(taps, list | tuple | None) or len(taps or ()) > 64:
        raise ValueError("its resampling filter is no list of numbers: the file is damaged")
    fir = torch.tensor([1.0] if taps is None else [float(_number(tap)) for tap in taps])
    resolutions = _indices(r"synthesis/(\d+)x\d+/Conv1?/weight", flat)
    const, clamp = _take(flat, "synthesis/4x4/Const/const")[0], _number(kwargs.get("conv_clamp"))
    use_noise = any(key.endswith("noise_strength") for key in flat)
    parts = _assemble(take, resolutions, const, style, w_avg, fir, clamp, use_noise, embed)
    _check_rest(flat, [key for key in flat if not re.match(r"synthesis/\d|mapping/Dense", key)])
    return parts


def _flatten_tensorflow(network: Any, prefix: str, flat: dict[str, Any], depth: int = 0) -> None:
    if not isinstance(network, Record) or depth > 4:
        raise ValueError("it has something else in the place of a network")
    variables = network.get("variables")
    for pair in variables if isinstance(variables, list | tuple) else ():
        spend(steps=1)
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError("it has a variable without a name: the file is damaged")
        flat[f"{prefix}{pair[0][:200]}"] = pair[1]
    for name, child in _items(network.get("components")):
        _flatten_tensorflow(child, f"{prefix}{name}/", flat, depth + 1)


def _assemble(
    take: Take,
    resolutions: list[int],
    const: Tensor,
    style: Style,
    w_avg: Tensor | None,
    fir: Tensor | None,
    conv_clamp: float | None,
    use_noise: bool = True,
    embed: Embedding = None,
) -> Parts:
    """The parts of our generator. ``const``: [C, 4, 4]; ``fir``: 1-D or 2-D, None for 1, 3, 3, 1."""
    if not resolutions or resolutions != RESOLUTIONS[: len(resolutions)]:
        raise ValueError(
            f"its synthesis blocks are {resolutions[:12]}, but 4, 8, … without a gap are needed: "
            "the file is incomplete"
        )
    if not 0 < len(style) <= MAX_STYLE:
        depth = f"a mapping network of {len(style)} layers" if style else "no mapping network"
        raise ValueError(f"it has {depth}")
    _check_constant(const)
    levels = range(len(resolutions))
    layers: dict[str, dict[str, Tensor]] = {}
    for level in levels:
        for name in ("conv0", "conv1") if level else ("conv1",):
            conv = {part: take(level, name, part) for part in PARTS}
            noise = torch.zeros(()), torch.zeros(()).expand(4 << level, 4 << level)
            if use_noise:
                noise = take(level, name, "noise_strength").reshape(()), take(level, name, "noise_const")
            conv["noise_strength"], conv["noise_const"] = noise
            layers[f"convs.{2 * level - (name == 'conv0')}"] = conv
        layers[f"rgbs.{level}"] = {part: take(level, "torgb", part) for part in PARTS}
    if (channels := len(layers["rgbs.0"]["weight"])) != 3:
        raise ValueError(f"its images have {channels} channels (grey or with alpha), but only RGB works")
    fir = torch.tensor([1.0, 3.0, 3.0, 1.0]) if fir is None else fir
    fir = torch.outer(fir, fir) if fir.ndim == 1 else fir
    if fir.ndim != 2 or fir.shape[0] != fir.shape[1] or not 0 < fir.shape[0] <= 64:
        raise ValueError(f"its resampling filter has shape {list(fir.shape)}, but a square one is needed")
    tensors: dict[str, Tensor | None] = {"const": const, "w_avg": w_avg, "fir": fir / fir.sum()}
    for i, (weight, bias, lr_mul) in enumerate(style):
        if lr_mul != LR_MUL:
            weight, bias = weight * (lr_mul / LR_MUL), bias * (lr_mul / LR_MUL)
        tensors |= {f"style.{i}.weight": weight, f"style.{i}.bias": bias}
    for name, parts in layers.items():
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    z_dim = style[0][0].shape[1]
    if embed is not None:
        tensors |= {"embed.weight": embed[0], "embed.bias": embed[1]}
        z_dim -= len(embed[0])
        if z_dim < 1:
            raise ValueError("its mapping network has no room for z beside the labels")
    config = {
        "resolution": resolutions[-1],
        "channels": [layers[f"rgbs.{level}"]["weight"].shape[1] for level in levels],
        "z_dim": z_dim,
        "w_dim": layers["rgbs.0"]["affine.weight"].shape[1],
        "mapping_layers": len(style),
        "conv_clamp": conv_clamp,
        "fir": tensors["fir"],
        "c_dim": 0 if embed is None else embed[0].shape[1],
    }
    return config, tensors


def _check_architecture(architectures: set, skips: bool) -> None:
    if architectures != {"skip"} or skips:
        raise ValueError("it is a StyleGAN2 of another architecture than 'skip' (resnet, orig, config a-d)")


def _check_constant(const: Tensor) -> None:
    if const.ndim == 3 and const.shape[1:] == (4, 4):
        return
    if const.ndim != 3:
        problem = f"has shape {list(const.shape)}, but [C, 4, 4] is needed: it is a modified StyleGAN2"
    elif const.shape[1] != const.shape[2]:
        problem = (
            f"is {const.shape[1]} high and {const.shape[2]} wide, so its pictures are not square, but only "
            "square ones work, from a constant of 4 x 4: use a generator of square pictures"
        )
    else:
        problem = f"is {const.shape[1]} x {const.shape[2]}, not StyleGAN2's 4 x 4: it is a modified StyleGAN2"
    raise ValueError(f"its constant {problem}")


def _embedding(flat: dict[str, Any], layer: str, classes: float) -> Embedding:
    """Weight and bias of the label embedding; ``layer``: prefix with dot or slash. None without classes."""
    names = [f"{layer}{part}" for part in ("weight", "bias")]
    if not classes and not any(name in flat for name in names):
        return None
    if missing := [name for name in names if name not in flat]:
        raise ValueError(
            f"it is a class-conditional generator ({classes:g} classes) without {missing[0]}: the file is "
            "incomplete, or not of StyleGAN2-ADA, the only one whose classes can be read"
        )
    return _take(flat, names[0]), _take(flat, names[1])


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    """The text-keyed entries of a dict or dict-like Record. Each costs a step: a file may repeat a dict."""
    value = value.items if isinstance(value, Record) else value
    for name, entry in value.items() if isinstance(value, dict) else ():
        spend(steps=1)
        if isinstance(name, str):
            yield name[:200], entry


def _word(value: Any) -> str:
    """``value`` as short text to compare and print: the first letters of a string, otherwise its type."""
    return value[:40] if isinstance(value, str) else f"a {type(value).__name__}"


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if (number := to_tensor(value)).numel() != 1:
        raise ValueError("it has many numbers where one is needed: the file is damaged")
    return float(number)


def _indices(pattern: str, keys: Iterable[str]) -> list[int]:
    """The different numbers that the group of ``pattern`` matches in ``keys``, in order."""
    found = (match[1] for key in keys if (match := re.fullmatch(pattern, key)))
    return sorted({int(digits) for digits in found if len(digits) < 12})


def _take(flat: dict[str, Any], key: str) -> Tensor:
    """Remove the tensor ``key`` from ``flat`` and return it; unused tensors remain. Errors name ``key``."""
    try:
        tensor = to_tensor(flat.pop(key)).detach()
    except PickleError as error:
        raise PickleError(f"{key}: {error}") from None
    check_numbers(key, tensor)
    return tensor


def _one_filter(flat: dict[str, Any], names: str, gain: float) -> Tensor | None:
    """Remove the tensors whose names match ``names`` and return their common filter; None without any.

    The sum of the filter must be ``gain`` (in our generator it is 1). ValueError for another sum, and for
    tensors that differ.
    """
    filters = {key: _take(flat, key) for key in list(flat) if re.fullmatch(names, key)}
    if not filters:
        return None
    first, fir = next(iter(filters.items()))
    for key, other in filters.items():
        if other.shape != fir.shape or not torch.equal(other, fir):
            raise ValueError(f"its resampling filters {first} and {key} differ, but one for all is needed")
    if abs(float(fir.double().sum()) - gain) > 0.005 * gain:  # half precision may round the sum
        raise ValueError(f"its filter {first} has the sum {float(fir.sum()):g}, but needs {gain:g}")
    return fir


def _check_rest(flat: Mapping[str, Any], unused: Collection[str]) -> None:
    """ValueError if ``flat`` has a tensor that is not in ``unused``: it is part of another architecture."""
    known = frozenset(unused)
    if rest := [key for key in flat if key not in known]:
        names = ", ".join(key[:80] for key in rest[:4]) + (", …" if len(rest) > 4 else "")
        raise ValueError(
            f"it has tensors that its StyleGAN2 does not use ({names}): "
            "others are missing, or it is a modified StyleGAN2"
        )
