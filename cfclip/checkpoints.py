"""Official checkpoints -> our modules, safely: opening a file never runs anything that is in it.

The format is read off the content, every size off the tensors. Whatever is wrong with a file is a :class:`WeightsError`
that names the file, the cause and what to do. Shapes: N codes, L = layers of W+, D = width of W.
"""

import argparse
import json
import mmap
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from . import safe_pickle, weights
from .generator_formats import from_nvidia, from_rosinality, from_tensorflow
from .identity import IRSE, FaceIdentity
from .mapper import LEVELS, Mapper, MapperConfig
from .safe_pickle import Record
from .stylegan2 import Generator
from .weights import WeightsError

W_AVG_SAMPLES = 4096
"""Latents that ``w_avg`` is estimated from where a file has none (rosinality's ``mean_latent(4096)``)."""
MAX_SIZE = 16384
"""The largest number that the header of one of our files may declare: layers are built before they are compared."""
MAGIC = {b"PK\x03\x04": "torch-zip", b"\x93NUMPY": "npy", b"\x80": "pickle", b"": "unknown"}
NOT_WEIGHTS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself: run 'git lfs pull', or download the file",
    b"<": "is a web page, not weights (a download that asked for a confirmation, or an expired link): download it in a browser",
    b"{": "is JSON text, not weights: download the file itself",
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"\xfd7zXZ": "is compressed (xz): unpack it first",
}
KINDS = (("mapper.fc.", "a CF-CLIP mapper"), ("mapper.", "a StyleCLIP mapper"), ("encoder.", "an image encoder (e4e or pSp)"),
         ("input.input", "a StyleGAN2 generator"), ("conv1_1.", "VGG19"), ("input_layer.", "an ArcFace IR-SE network"),
         ("visual.", "a CLIP"), ("final_linear.", "a discriminator"), ("decoder.", "a generator inside a larger network"))
"""How the keys of a state dict begin -> what it holds, for messages."""


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong with the file at ``path`` into a WeightsError that names it."""
    try:
        yield
    except WeightsError:
        raise
    except ValueError as error:                                    # our own messages
        raise WeightsError(f"{path} cannot be used: {error}") from None
    except KeyError as error:
        raise WeightsError(f"{path} cannot be used: {error.args[0] if error.args else error}") from None
    except Exception as error:                                     # a damaged file may break anything
        raise WeightsError(f"{path} is damaged, or of an unknown kind ({type(error).__name__}: {str(error)[:200]}); "
                           "download or export it again") from error


def sniff(path: str | os.PathLike) -> str:
    """"torch-zip", "torch-legacy", "pickle", "npy" or "safetensors", by content. Raises WeightsError for anything else."""
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path} does not exist: check the path, or fetch the file first")
    if not path.is_file():
        raise WeightsError(f"{path} is a folder, where a file is needed")
    with about(path), path.open("rb") as file:
        head = file.read(256)
    if not head:
        raise WeightsError(f"{path} is empty (an interrupted download?): download it again")
    for start, problem in NOT_WEIGHTS.items():
        if head.lstrip().startswith(start):
            raise WeightsError(f"{path} {problem}")
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
        return "safetensors"
    kind = next(kind for magic, kind in MAGIC.items() if head.startswith(magic))
    if kind == "unknown":
        raise WeightsError(f"{path} is no weight file that is known here: neither torch's, NVIDIA's pickle, safetensors nor numpy's; "
                           "check that the download is the right file, and complete")
    legacy = safe_pickle.LEGACY_MAGIC.to_bytes(10, "little") in head
    return "torch-legacy" if kind == "pickle" and legacy else kind


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file as memory: a read never allocates more than the file holds."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        yield mapped


def read_torch(path: str | os.PathLike) -> Any:
    """What ``torch.save`` wrote, tensors on the CPU. Raises WeightsError."""
    path, kind = Path(path), sniff(path)
    if not kind.startswith("torch"):
        raise WeightsError(f"{path} is a {kind} file, where one written by torch.save is needed")
    with about(path):
        if kind == "torch-zip":
            safe_pickle.check_zip(path)
        else:
            with _mapped(path) as file:
                safe_pickle.load_legacy(file)
        with torch.serialization.safe_globals([argparse.Namespace]):           # many checkpoints keep their options so
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "torch-zip")
            except pickle.UnpicklingError as error:
                why = str(error).rpartition("WeightsUnpickler error:")[2].split("\n")[0].strip()[:120]
                raise ValueError(f"it holds more than tensors and options, or was saved in an unusual way ({why}), which is not opened "
                                 "for safety: export it again with torch.save(model.state_dict(), …)") from None


def _read_own(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and constructor arguments of our own safetensors; the header's numbers are checked before anything is built."""
    tensors, config, _ = weights.read(path, kind)
    _believable(config)
    return tensors, config


def _believable(config: Any) -> None:
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        if isinstance(value, (int, float)) and abs(value) > MAX_SIZE:
            raise ValueError(f"its header declares a size of {value:.3g}, where {MAX_SIZE} is the most that is believed")
        _believable(value)


def state_dict(tree: Any, *names: str) -> dict[str, Tensor]:
    """The tensors of ``tree[name]`` for the first of ``names`` that is there, else of ``tree`` itself; empty if it has none."""
    if not isinstance(tree, Mapping):
        return {}
    state = next((tree[name] for name in names if isinstance(tree.get(name), Mapping)), tree)
    return {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}


def describe(tree: Any) -> str:
    """What an opened file holds, in words."""
    if isinstance(tree, Tensor):
        return f"a tensor of shape {list(tree.shape)}"
    if not isinstance(tree, Mapping):
        return f"a {tree.name if isinstance(tree, Record) else type(tree).__name__}"
    keys = [str(key) for part in (tree, *tree.values()) if isinstance(part, Mapping) for key in part]
    return next((what for start, what in KINDS if any(key.startswith(start) for key in keys)),
                f"a dict of {', '.join(list(map(str, tree))[:6]) or 'nothing'}")


def build(make: Callable[[], nn.Module], tensors: Mapping[str, Tensor], what: str) -> Any:
    """``make()`` filled with float32 copies of ``tensors``; eval mode, frozen. Raises ValueError naming the first misfit."""
    with torch.device("meta"):                                     # neither memory nor random numbers are spent
        module = make()
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise ValueError(f"its {what} has no {name}: the file is incomplete, or of another kind")
        if tensors[name].shape != tensor.shape:
            raise ValueError(f"its {what} has {name} of shape {list(tensors[name].shape)}, where {list(tensor.shape)} would fit the rest")
    module.load_state_dict({name: tensors[name].detach().to(tensor.dtype).clone(memory_format=torch.contiguous_format)
                            for name, tensor in expected.items()}, assign=True)
    return module.eval().requires_grad_(False)


def load_generator(path: str | os.PathLike, device: str | torch.device = "cpu") -> Generator:
    """A StyleGAN2 generator: rosinality's ``.pt``, NVIDIA's PyTorch or TensorFlow ``.pkl``, or our safetensors.

    Also the generator inside a mapper's or e4e's checkpoint. Frozen, float32. Raises WeightsError.
    """
    path, kind = Path(path), sniff(path)
    with about(path):
        if kind == "safetensors":
            tensors, config = _read_own(path, "generator")
            config = config | {"fir": tensors.get("fir", torch.ones(1, 1))}
        elif kind == "pickle":
            with _mapped(path) as file:
                config, tensors = _from_pickle(safe_pickle.load(file))
        elif kind.startswith("torch"):
            tree = read_torch(path)
            state = state_dict(tree, "g_ema", "g", "state_dict")
            prefix = next((key.removesuffix("input.input") for key in state if key.endswith("input.input")), None)
            if prefix is None:
                raise ValueError(f"it holds {describe(tree)}, where a StyleGAN2 generator is needed")
            avg = next((tree[name] for name in ("latent_avg", "mean_latent") if isinstance(tree.get(name), Tensor)), None)
            config, tensors = from_rosinality({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, avg)
        else:
            raise ValueError(f"it is a {kind} file, where a StyleGAN2 generator is needed")
        known = tensors["w_avg"] is not None
        generator = build(lambda: Generator(**config), tensors if known else tensors | {"w_avg": torch.zeros(config["w_dim"])}, "generator")
        if not known:
            generator.w_avg.copy_(estimate_w_avg(generator))
    return generator.to(device)


def _from_pickle(tree: Any):
    if isinstance(tree, (tuple, list)) and len(tree) == 3 and all(isinstance(n, Record) and n.name.name == "Network" for n in tree):
        return from_tensorflow(tree[2])                            # (G, D, Gs); Gs is the moving average
    if isinstance(tree, dict) and isinstance(tree.get("G_ema"), Record):
        return from_nvidia(tree["G_ema"])
    if isinstance(tree, Record) and isinstance(tree.get("_modules"), dict):
        return from_nvidia(tree)
    raise ValueError(f"it is a pickle that holds {describe(tree)}, where NVIDIA's 'G_ema' or (G, D, Gs) is needed")


@torch.no_grad()
def estimate_w_avg(generator: Generator, samples: int = W_AVG_SAMPLES, seed: int = 0) -> Tensor:
    """The mean w [D] of ``samples`` seeded z."""
    z = torch.randn(samples, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    return torch.stack([generator.map_one(part).mean(0) for part in z.split(samples // 8)]).mean(0)


OFFICIAL_LEVELS = {"coarse": "course", "medium": "medium", "fine": "fine"}     # 'course' is how the published files spell it


def load_mapper(path: str | os.PathLike) -> Mapper:
    """A latent mapper: CF-CLIP's or StyleCLIP's ``.pt``, or our safetensors. Frozen, float32. Raises WeightsError."""
    path, kind = Path(path), sniff(path)
    with about(path):
        if kind == "safetensors":
            tensors, config = _read_own(path, "mapper")
            config = MapperConfig(**config | {"levels": tuple(config.get("levels", LEVELS))})
        else:
            tree = read_torch(path)
            config, tensors = _official_mapper(tree, state_dict(tree, "state_dict"))
        return build(lambda: Mapper(config), tensors, "mapper")


def _official_mapper(tree: Any, state: Mapping[str, Tensor]) -> tuple[MapperConfig, dict[str, Tensor]]:
    levels = tuple(name for name in LEVELS if f"mapper.{OFFICIAL_LEVELS[name]}_mapping.mapping.1.weight" in state)
    if not levels:
        other = any(key.startswith("mapper.") for key in state)
        raise ValueError("it is a mapper of another type (SingleMapper or StyleSpace), where a LevelsMapper is needed" if other else
                         f"it holds {describe(tree)}, where a mapper is needed")
    tensors: dict[str, Tensor] = {}
    texts = len({key.split(".")[1] for key in state if key.startswith("text_mapper.")})
    stacks = {f"mapper.{OFFICIAL_LEVELS[name]}_mapping": f"levels.{name}" for name in levels}
    stacks |= {f"text_mapper.mapper_{i}": f"text.{i}" for i in range(texts)}
    for theirs, ours in stacks.items():
        if f"{theirs}.mapping.5.weight" in state:
            raise ValueError(f"its {theirs} is deeper than the 4 layers of the published mappers")
        for i in range(4):
            for part in ("weight", "bias"):
                name = f"{theirs}.mapping.{i + 1}.{part}"
                if name not in state:
                    raise ValueError(f"it has no {name}: the file is incomplete")
                tensors[f"{ours}.layers.{i}.{part}"] = state[name]
    if ("mapper.fc.weight" in state) != bool(texts):
        raise ValueError("it has only one of text_mapper.* and mapper.fc.*: the file is incomplete")
    tensors |= {f"fuse.{part}": state[f"mapper.fc.{part}"] for part in ("weight", "bias") if texts}
    noises = sum(bool(re.fullmatch(r"decoder\.noises\.noise_\d+", key)) for key in state)
    size = option(tree, "stylegan_size")
    num_ws = texts or (noises + 1 if noises else 2 * int(size).bit_length() - 4 if size else 18)
    width, text_dim = state[f"mapper.{OFFICIAL_LEVELS[levels[0]]}_mapping.mapping.1.weight"].shape[0], None
    if texts:
        text_dim = tensors["text.0.layers.0.weight"].shape[1]
    return MapperConfig(num_ws=num_ws, w_dim=width, text_dim=text_dim, levels=levels, norm_axis="layer"), tensors


def option(tree: Any, name: str, default: Any = None) -> Any:
    """An entry of the training options that official checkpoints keep, as a dict or a Namespace."""
    opts = tree.get("opts") if isinstance(tree, Mapping) else None
    opts = vars(opts) if isinstance(opts, argparse.Namespace) else opts
    return opts.get(name, default) if isinstance(opts, Mapping) else default


def load_latents(path: str | os.PathLike, generator: Generator | None = None) -> Tensor:
    """Latent codes from ``.pt``, ``.npy`` or ``.safetensors``, float32: W+ [N, L, D], or W [N, D].

    With ``generator`` the sizes are checked, and W is repeated over its layers: always [N, L, D]. Raises WeightsError.
    """
    path, kind = Path(path), sniff(path)
    with about(path):
        if kind == "npy":
            found: Any = torch.from_numpy(np.load(path, allow_pickle=False, mmap_mode="r").astype(np.float32))
        elif kind == "safetensors":
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        else:
            found = read_torch(path)
        if isinstance(found, Mapping) and len(found) == 1:
            found = next(iter(found.values()))
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim not in (2, 3) or not found.numel():
            raise ValueError(f"it holds {describe(found)}, where latents are needed: one float tensor [N, L, D] (W+) or [N, D] (W)")
        w = found.detach().float().clone(memory_format=torch.contiguous_format)
        if not w.isfinite().all():
            raise ValueError("its latents are not all finite: the file is damaged, or the inversion failed")
    return w if generator is None else fit_latents(w, generator, str(path))


def fit_latents(w: Tensor, generator: Generator, what: str = "the latents") -> Tensor:
    """W [N, D] (or [N, 1, D]) or W+ [N, L, D] -> [N, L, D] for ``generator``; WeightsError with both numbers if the sizes differ."""
    layers, width, res = generator.num_ws, generator.w_dim, generator.resolution
    if w.shape[-1] != width:
        raise WeightsError(f"{what}: codes are {w.shape[-1]} wide, but this generator's are {width}: they belong to another generator")
    if w.ndim == 2 or w.shape[1] == 1:
        return w.reshape(-1, 1, width).repeat(1, layers, 1)
    if w.shape[1] != layers:
        other = f" (they are of a {2 ** (w.shape[1] // 2 + 1)} px generator)" if w.shape[1] >= 4 and w.shape[1] % 2 == 0 else ""
        raise WeightsError(f"{what}: codes have {w.shape[1]} layers{other}, but this {res} px generator takes {layers}: load the "
                           f"generator they were made with, or invert the photos again; w[:, :{layers}] cuts what is too long")
    return w


def load_identity(path: str | os.PathLike) -> FaceIdentity:
    """ArcFace: ``model_ir_se50.pth``, or our safetensors of kind "identity". Raises WeightsError.

    The published alignment crop belongs to networks that take 112 px (IR-SE50), as trained on FFHQ-like crops.
    """
    path, kind = Path(path), sniff(path)
    with about(path):
        if kind == "safetensors":
            tensors, config = _read_own(path, "identity")
            backbone = build(lambda: IRSE(**config), tensors, "identity network")
        else:
            tree = read_torch(path)
            tensors = state_dict(tree, "state_dict")
            if "input_layer.0.weight" not in tensors or "output_layer.3.weight" not in tensors:
                raise ValueError(f"it holds {describe(tree)}, where model_ir_se50.pth is needed")
            backbone = build(IRSE, tensors, "identity network")
        return FaceIdentity(backbone, crop=backbone.input_size == 112).eval()


def convert(path: str | os.PathLike, out: str | os.PathLike, kind: str = "auto") -> str:
    """Write any generator or mapper that is read here as our safetensors: safe, smaller, and quick to open.

    ``kind`` "generator" takes the generator out of a file that holds more (a mapper's, e4e's). Returns what was written,
    "generator" or "mapper". Raises ValueError (WeightsError for what is wrong with the file).
    """
    path, out = Path(path), Path(out)
    if kind not in ("auto", "generator", "mapper"):
        raise ValueError(f"kind must be 'auto', 'generator' or 'mapper', not {kind!r}")
    form = sniff(path)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} must end in .safetensors, which is what is written")
    if out.exists() and out.samefile(path):
        raise ValueError(f"{out} is the input itself: choose another name")
    card: dict[str, Any] = {"source": path.name}
    if form == "safetensors":
        with about(path), safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("cfclip", "{}"))
            card = header.get("card", {})
            kind = header.get("kind", "generator") if kind == "auto" else kind
    elif form.startswith("torch"):
        tree = read_torch(path)
        if any(key.startswith("mapper.") for key in state_dict(tree, "state_dict")):
            kind = "mapper" if kind == "auto" else kind
            if isinstance(prompt := option(tree, "description"), str) and kind == "mapper":
                card["prompt"] = prompt                            # what find_mappers calls it by
        del tree
    if kind == "mapper":
        mapper = load_mapper(path)
        weights.save(mapper, out, "mapper", mapper.metadata, **card)
    else:
        generator = load_generator(path)
        weights.save(generator, out, "generator", generator.config, **card)
    return "mapper" if kind == "mapper" else "generator"
