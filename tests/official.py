"""Writers of other people's checkpoint formats, from our modules: what the readers are tried on at any size."""

import pickle
import sys
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest
import torch

from cfclip.models.mapper import MapperConfig
from cfclip.models.stylegan2 import Generator

SOURCE = "import pathlib\npathlib.Path({marker!r}).touch()\n"


def random_generator(resolution=8, channels=(6, 4), seed=0, **kwargs) -> Generator:
    """A small generator without symmetries: no two numbers in it are the same by construction."""
    torch.manual_seed(seed)
    g = (
        Generator(resolution, channels, **{"z_dim": 8, "w_dim": 8, "mapping_layers": 3} | kwargs)
        .eval()
        .requires_grad_(False)
    )
    for name, parameter in g.named_parameters():
        if name.endswith(("bias", "noise_strength")):
            parameter.add_(torch.randn_like(parameter) * (10 if name.startswith("style") else 0.3))
    g.w_avg.normal_()
    return g


def rosinality(g: Generator, kernels: bool = True) -> dict:
    """The state dict of rosinality's Generator."""
    out = {}
    for i, layer in enumerate(g.style):
        out |= {f"style.{i + 1}.weight": layer.weight, f"style.{i + 1}.bias": layer.bias}
    out["input.input"] = g.const[None]
    for i, conv in enumerate(g.convs):
        name = "conv1" if i == 0 else f"convs.{i - 1}"
        out |= {
            f"{name}.conv.weight": conv.weight[None],
            f"{name}.conv.modulation.weight": conv.affine.weight,
            f"{name}.conv.modulation.bias": conv.affine.bias,
            f"{name}.noise.weight": conv.noise_strength.reshape(1),
            f"{name}.activate.bias": conv.bias,
            f"noises.noise_{i}": conv.noise_const[None, None],
        }
        if kernels and conv.up:
            out[f"{name}.conv.blur.kernel"] = g.fir * 4
    for i, rgb in enumerate(g.rgbs):
        name = "to_rgb1" if i == 0 else f"to_rgbs.{i - 1}"
        out |= {
            f"{name}.conv.weight": rgb.weight[None],
            f"{name}.conv.modulation.weight": rgb.affine.weight,
            f"{name}.conv.modulation.bias": rgb.affine.bias,
            f"{name}.bias": rgb.bias.reshape(1, 3, 1, 1),
        }
        if kernels and i:
            out[f"{name}.upsample.kernel"] = g.fir * 4
    return {key: value.detach().clone() for key, value in out.items()}


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
    """NVIDIA's modules, there only while a pickle is written: it then refers to classes that nobody has."""
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

    def __init__(self, class_name, source, params=None, buffers=None, modules=None, **attributes):
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": class_name,
            "state": {
                "training": False,
                "_parameters": params or {},
                "_buffers": buffers or {},
                "_non_persistent_buffers_set": set(),
                "_modules": modules or {},
                "_init_args": (),
                "_init_kwargs": EasyDict(),
                **attributes,
            },
        }

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


def nvidia(
    g: Generator,
    path,
    protocol=3,
    marker="module_source_ran",
    lr_mul=0.01,
    filter_1d=None,
    top=None,
    **attributes,
):
    """An NVIDIA PyTorch pickle; ``attributes`` change those of the generator, ``top`` the dict around it."""
    source = SOURCE.format(marker=str(marker))
    param = lambda t: torch.nn.Parameter(t.detach().clone(), requires_grad=False)  # noqa: E731
    fir = g.fir.clone() if filter_1d is None else filter_1d

    def linear(layer, lr=1.0, **kw):
        return Persistent(
            "FullyConnectedLayer",
            source,
            {"weight": param(layer.weight), "bias": param(layer.bias)},
            bias_gain=lr,
            weight_gain=np.float64(lr / np.sqrt(layer.weight.shape[1])),
            **kw,
        )

    def conv(layer, resolution):
        return Persistent(
            "SynthesisLayer",
            source,
            {
                "weight": param(layer.weight),
                "noise_strength": param(layer.noise_strength),
                "bias": param(layer.bias),
            },
            {"resample_filter": fir, "noise_const": layer.noise_const.clone()},
            {"affine": linear(layer.affine)},
            resolution=resolution,
            activation="lrelu",
            conv_clamp=g.conv_clamp,
            act_gain=np.sqrt(2),
        )

    blocks = {}
    for level in range(len(g.rgbs)):
        res = 4 * 2**level
        modules = {"conv0": conv(g.convs[2 * level - 1], res)} if level else {}
        modules |= {
            "conv1": conv(g.convs[2 * level], res),
            "torgb": Persistent(
                "ToRGBLayer",
                source,
                {"weight": param(g.rgbs[level].weight), "bias": param(g.rgbs[level].bias)},
                {},
                {"affine": linear(g.rgbs[level].affine)},
                conv_clamp=g.conv_clamp,
            ),
        }
        blocks[f"b{res}"] = Persistent(
            "SynthesisBlock",
            source,
            {} if level else {"const": param(g.const)},
            {"resample_filter": fir},
            modules,
            architecture=attributes.get("architecture", "skip"),
            use_fp16=level > 1,
        )
    mapping = {}
    for i, layer in enumerate(g.style):  # the same function with another learning-rate multiplier
        scaled = torch.nn.Linear(layer.weight.shape[1], layer.weight.shape[0])
        scaled.weight.data, scaled.bias.data = layer.weight * (0.01 / lr_mul), layer.bias * (0.01 / lr_mul)
        mapping[f"fc{i}"] = linear(scaled, lr_mul, activation="lrelu")
    network = Persistent(
        "Generator",
        source,
        modules={
            "synthesis": Persistent(
                "SynthesisNetwork", source, modules=blocks | attributes.pop("extra_modules", {})
            ),
            "mapping": Persistent("MappingNetwork", source, {}, {"w_avg": g.w_avg.clone()}, mapping),
        },
        **{"z_dim": g.z_dim, "c_dim": 0, "w_dim": g.w_dim, "img_resolution": g.resolution, "img_channels": 3}
        | attributes,
    )
    return _dump(
        top or {"G": None, "D": None, "G_ema": network, "training_set_kwargs": EasyDict(path="x.zip")},
        path,
        protocol,
    )


def tensorflow(g: Generator, path, protocol=3, version=4, lr_mul=0.01, drop=(), extra=(), **kwargs):
    """An NVIDIA TensorFlow pickle (G, D, Gs); ``kwargs`` are static ones, ``drop`` and ``extra`` change the variables."""
    array = lambda t: t.detach().numpy().copy()  # noqa: E731
    synthesis = [(f"noise{i}", array(conv.noise_const)[None, None]) for i, conv in enumerate(g.convs)]
    synthesis.append(("4x4/Const/const", array(g.const)[None]))

    def modulated(name, layer, flip=False):
        weight = array(layer.weight).transpose(2, 3, 1, 0)
        weight = np.ascontiguousarray(weight[::-1, ::-1] if flip else weight)
        return [
            (f"{name}/weight", weight),
            (f"{name}/mod_weight", array(layer.affine.weight).T),
            (f"{name}/mod_bias", array(layer.affine.bias) - 1),
            (f"{name}/bias", array(layer.bias)),
        ]

    for level in range(len(g.rgbs)):
        res = 4 * 2**level
        for name, layer in ([(f"{res}x{res}/Conv0_up", g.convs[2 * level - 1])] if level else []) + [
            (f"{res}x{res}/Conv1" if level else "4x4/Conv", g.convs[2 * level])
        ]:
            synthesis += [
                *modulated(name, layer, flip=name.endswith("up")),
                (f"{name}/noise_strength", np.float32(layer.noise_strength)),
            ]
        synthesis += modulated(f"{res}x{res}/ToRGB", g.rgbs[level])
    mapping = [
        v
        for i, layer in enumerate(g.style)
        for v in (
            (f"Dense{i}/weight", array(layer.weight * (0.01 / lr_mul)).T),
            (f"Dense{i}/bias", array(layer.bias * (0.01 / lr_mul))),
        )
    ]
    synthesis = [v for v in synthesis if v[0] not in drop] + list(extra)
    network = lambda name, variables, components=None: Network({  # noqa: E731
        "version": version,
        "name": name,
        "static_kwargs": EasyDict(kwargs),
        "components": EasyDict(components or {}),
        "build_module_src": SOURCE.format(marker="module_source_ran"),
        "build_func_name": name,
        "variables": variables,
    })
    gs = network(
        "Gs",
        [("lod", np.float32(0)), ("dlatent_avg", array(g.w_avg))],
        {"synthesis": network("G_synthesis", synthesis), "mapping": network("G_mapping", mapping)},
    )
    return _dump((network("G", []), network("D", []), gs), path, protocol)


def mapper_state(mapper) -> dict:
    """The state dict of CF-CLIP's mapper (of StyleCLIP's, if it knows no text)."""
    out = {}
    stacks = {
        f"mapper.{'course' if name == 'coarse' else name}_mapping": stack
        for name, stack in mapper.levels.items()
    }
    if mapper.config.text_dim is not None:
        stacks |= {f"text_mapper.mapper_{i}": stack for i, stack in enumerate(mapper.text)}
        out |= {"mapper.fc.weight": mapper.fuse.weight, "mapper.fc.bias": mapper.fuse.bias}
    for name, stack in stacks.items():
        for i, layer in enumerate(stack.layers):
            out |= {
                f"{name}.mapping.{i + 1}.weight": layer.weight,
                f"{name}.mapping.{i + 1}.bias": layer.bias,
            }
    return {key: value.detach().clone() for key, value in out.items()}


SMALL_MAPPER = MapperConfig(num_ws=10, w_dim=8, text_dim=6)


def shared_views(shapes: dict) -> dict:
    """Random tensors of any size that share one storage, so that their file is small."""
    largest = max(int(np.prod(s)) for s in shapes.values())
    pool = torch.randn(largest + 64, generator=torch.Generator().manual_seed(5)) * 0.05
    tensors = {
        name: pool[i % 64 : i % 64 + int(np.prod(shape))].reshape(shape)
        if shape
        else torch.zeros((), dtype=torch.int64)
        for i, (name, shape) in enumerate(shapes.items())
    }
    return tensors | {
        name: torch.ones(shape) for name, shape in shapes.items() if name.endswith("running_var")
    }
