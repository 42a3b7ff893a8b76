"""Writers of other people's checkpoint formats from our modules, so that readers are tested at any size."""

import pickle
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from cfclip.models.mapper import MapperConfig
from cfclip.models.stylegan2 import Generator

SOURCE = "import pathlib\npathlib.Path({marker!r}).touch()\n"


def random_generator(resolution=8, channels=(6, 4), seed=0, **kwargs) -> Generator:
    """A small generator without symmetries: no two numbers in it are the same by construction."""
    torch.manual_seed(seed)
    sizes = {"z_dim": 8, "w_dim": 8, "mapping_layers": 3} | kwargs
    g = Generator(resolution, channels, **sizes).eval().requires_grad_(False)
    for name, parameter in g.named_parameters():
        if name.endswith(("bias", "noise_strength")):
            parameter.add_(torch.randn_like(parameter) * (10 if name.startswith("style") else 0.3))
    g.w_avg.normal_()
    return g


def rosinality(g: Generator, kernels: bool = True) -> dict:
    """The state dict of rosinality's Generator."""
    out = {"input.input": g.const[None]}
    for i, layer in enumerate(g.style):
        out |= {f"style.{i + 1}.weight": layer.weight, f"style.{i + 1}.bias": layer.bias}
    names = ["conv1", *(f"convs.{i}" for i in range(len(g.convs) - 1))]
    for i, (name, conv) in enumerate(zip(names, g.convs, strict=True)):
        out |= _modulated(name, conv) | {f"{name}.activate.bias": conv.bias}
        out |= {f"{name}.noise.weight": conv.noise_strength.reshape(1)}
        out |= {f"noises.noise_{i}": conv.noise_const[None, None]}
        if kernels and conv.up:
            out[f"{name}.conv.blur.kernel"] = g.fir * 4
    names = ["to_rgb1", *(f"to_rgbs.{i}" for i in range(len(g.rgbs) - 1))]
    for i, (name, rgb) in enumerate(zip(names, g.rgbs, strict=True)):
        out |= _modulated(name, rgb) | {f"{name}.bias": rgb.bias.reshape(1, 3, 1, 1)}
        if kernels and i:
            out[f"{name}.upsample.kernel"] = g.fir * 4
    return {key: value.detach().clone() for key, value in out.items()}


def _modulated(name: str, layer) -> dict:
    out = {f"{name}.conv.modulation.{part}": getattr(layer.affine, part) for part in ("weight", "bias")}
    return out | {f"{name}.conv.weight": layer.weight[None]}


def _reconstruct_persistent_obj(meta):
    raise AssertionError("a persistent object was rebuilt")


class EasyDict(dict):
    pass


class Network:
    def __init__(self, state):
        self.state = state

    def __getstate__(self):
        return self.state


HOMES = {
    "torch_utils.persistence": _reconstruct_persistent_obj,
    "dnnlib.util": EasyDict,
    "dnnlib.tflib.network": Network,
}


@contextmanager
def fake_modules():
    """NVIDIA's modules, only while a pickle is written: afterwards it refers to classes that do not exist."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("torch_utils", "dnnlib", "dnnlib.tflib", *HOMES):
            patch.setitem(sys.modules, module, ModuleType(module))
        for module, member in HOMES.items():
            member.__module__ = module
            setattr(sys.modules[module], member.__name__, member)
        yield


def _dump(value, path, protocol):
    with fake_modules(), open(path, "wb") as file:
        pickle.dump(value, file, protocol)
    return path


class Persistent:
    """An object that pickles as NVIDIA's ``torch_utils.persistence`` does: with its source."""

    def __init__(self, class_name, source, params=(), buffers=(), modules=(), **attributes):
        state = {"training": False, "_non_persistent_buffers_set": set()}
        state |= {"_init_args": (), "_init_kwargs": EasyDict()}
        state |= {"_parameters": dict(params), "_buffers": dict(buffers), "_modules": dict(modules)}
        self.meta = {"type": "class", "version": 6, "module_src": source}
        self.meta |= {"class_name": class_name, "state": state | attributes}

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


def nvidia(
    g: Generator,
    path,
    protocol=3,
    marker="module_ran",
    lr_mul=0.01,
    filter_1d=None,
    top=None,
    key="G_ema",
    **attributes,
):
    """An NVIDIA PyTorch pickle; ``attributes`` change those of the generator, ``top`` the dict around it."""
    source = SOURCE.format(marker=str(marker))
    fir = {"resample_filter": g.fir.clone() if filter_1d is None else filter_1d}

    def make(name, *contents, **attributes):
        return Persistent(name, source, *contents, **attributes)

    def params(layer, *names):
        tensors = {name: getattr(layer, name).detach().clone() for name in names}
        return {name: torch.nn.Parameter(t, requires_grad=False) for name, t in tensors.items()}

    def linear(layer, lr=1.0, **attributes):
        return make("FullyConnectedLayer", params(layer, "weight", "bias"), bias_gain=lr, **attributes)

    def conv(layer, resolution):
        contents = (
            params(layer, "weight", "noise_strength", "bias"),
            fir | {"noise_const": layer.noise_const.clone()},
            {"affine": linear(layer.affine)},
        )
        known = {"activation": "lrelu", "conv_clamp": g.conv_clamp, "act_gain": np.sqrt(2)}
        return make("SynthesisLayer", *contents, resolution=resolution, **known)

    blocks = {}
    for level, rgb in enumerate(g.rgbs):
        res = 4 * 2**level
        modules = {"conv0": conv(g.convs[2 * level - 1], res)} if level else {}
        modules["conv1"] = conv(g.convs[2 * level], res)
        contents = params(rgb, "weight", "bias"), {}, {"affine": linear(rgb.affine)}
        modules["torgb"] = make("ToRGBLayer", *contents, conv_clamp=g.conv_clamp)
        const = {} if level else params(g, "const")
        known = {"architecture": attributes.get("architecture", "skip"), "use_fp16": level > 1}
        blocks[f"b{res}"] = make("SynthesisBlock", const, fir, modules, **known)
    mapping = {"embed": linear(g.embed)} if g.c_dim else {}
    for i, layer in enumerate(g.style):  # the same function with another learning-rate multiplier
        scaled = torch.nn.Linear(layer.weight.shape[1], layer.weight.shape[0])
        scaled.weight.data, scaled.bias.data = layer.weight * (0.01 / lr_mul), layer.bias * (0.01 / lr_mul)
        mapping[f"fc{i}"] = linear(scaled, lr_mul, activation="lrelu")
    modules = {
        "synthesis": make("SynthesisNetwork", {}, {}, blocks | attributes.pop("extra_modules", {})),
        "mapping": make("MappingNetwork", {}, {"w_avg": g.w_avg.clone()}, mapping, c_dim=g.c_dim),
    }
    known = {
        "z_dim": g.z_dim,
        "c_dim": g.c_dim,
        "w_dim": g.w_dim,
        "img_resolution": g.resolution,
        "img_channels": 3,
    }
    network = make("Generator", {}, {}, modules, **known | attributes)
    tree = {"G": None, "D": None, key: network, "training_set_kwargs": EasyDict(path="x.zip")}
    return _dump(top or tree, path, protocol)


def tensorflow(
    g: Generator, path, protocol=3, version=4, lr_mul=0.01, drop=(), extra=(), mapping_extra=(), **kwargs
):
    """An NVIDIA TensorFlow pickle (G, D, Gs) with static ``kwargs``; ``drop``, ``…extra``: variables."""

    def array(tensor):
        return tensor.detach().numpy().copy()

    def modulated(name, layer):
        weight = array(layer.weight).transpose(2, 3, 1, 0)
        return [
            (f"{name}/weight", np.ascontiguousarray(weight[::-1, ::-1] if name.endswith("up") else weight)),
            (f"{name}/mod_weight", array(layer.affine.weight).T),
            (f"{name}/mod_bias", array(layer.affine.bias) - 1),
            (f"{name}/bias", array(layer.bias)),
        ]

    def network(name, variables, **components):
        state = {"version": version, "name": name, "variables": variables, "build_func_name": name}
        state |= {"static_kwargs": EasyDict(kwargs), "components": EasyDict(components)}
        return Network(state | {"build_module_src": SOURCE.format(marker="module_ran")})

    synthesis = [(f"noise{i}", array(conv.noise_const)[None, None]) for i, conv in enumerate(g.convs)]
    synthesis.append(("4x4/Const/const", array(g.const)[None]))
    for level, rgb in enumerate(g.rgbs):
        size = f"{4 * 2**level}x{4 * 2**level}"
        convs = {f"{size}/Conv0_up": g.convs[2 * level - 1]} if level else {}
        convs[f"{size}/Conv1" if level else f"{size}/Conv"] = g.convs[2 * level]
        for name, layer in convs.items():
            synthesis += modulated(name, layer)
            synthesis.append((f"{name}/noise_strength", np.float32(layer.noise_strength)))
        synthesis += modulated(f"{size}/ToRGB", rgb)
    mapping = []
    if g.c_dim:
        mapping = [("LabelEmbed/weight", array(g.embed.weight).T), ("LabelEmbed/bias", array(g.embed.bias))]
        kwargs = {"label_size": g.c_dim} | kwargs
    for i, layer in enumerate(g.style):
        mapping.append((f"Dense{i}/weight", array(layer.weight * (0.01 / lr_mul)).T))
        mapping.append((f"Dense{i}/bias", array(layer.bias * (0.01 / lr_mul))))
    synthesis = [(name, value) for name, value in synthesis if name not in drop] + list(extra)
    parts = {
        "synthesis": network("G_synthesis", synthesis),
        "mapping": network("G_mapping", mapping + list(mapping_extra)),
    }
    variables = [("lod", np.float32(0)), ("dlatent_avg", array(g.w_avg))]
    return _dump((network("G", []), network("D", []), network("Gs", variables, **parts)), path, protocol)


def mapper_state(mapper) -> dict:
    """The state dict of CF-CLIP's mapper, or of StyleCLIP's if it is not conditioned on text."""
    out, stacks = {}, {}
    for name, stack in mapper.levels.items():
        stacks[f"mapper.{'course' if name == 'coarse' else name}_mapping"] = stack
    if mapper.config.text_dim is not None:
        stacks |= {f"text_mapper.mapper_{i}": stack for i, stack in enumerate(mapper.text)}
        out |= {"mapper.fc.weight": mapper.fuse.weight, "mapper.fc.bias": mapper.fuse.bias}
    for name, stack in stacks.items():
        for i, layer in enumerate(stack.layers):
            out |= {f"{name}.mapping.{i + 1}.weight": layer.weight}
            out |= {f"{name}.mapping.{i + 1}.bias": layer.bias}
    return {key: value.detach().clone() for key, value in out.items()}


SMALL_MAPPER = MapperConfig(num_ws=10, w_dim=8, text_dim=6)


def shared_views(shapes: dict) -> dict:
    """Random tensors of any size that share one storage, so that their file is small."""
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    pool = torch.randn(max(sizes.values()) + 64, generator=torch.Generator().manual_seed(5)) * 0.05
    tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        if name.endswith("running_var"):
            tensors[name] = torch.ones(shape)
        elif shape:
            tensors[name] = pool[i % 64 : i % 64 + sizes[name]].reshape(shape)
        else:
            tensors[name] = torch.zeros((), dtype=torch.int64)
    return tensors


def save(tree: Any, path: Path, zipped: bool = True) -> Path:
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        message = lambda m, name=name: f"{name}: {m}"  # noqa: E731
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6, msg=message)
