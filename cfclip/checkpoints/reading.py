"""What all readers share: which format a file has, opening it safely, filling a network, clear errors."""

import argparse
import hashlib
import logging
import mmap
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cfclip.checkpoints import safe_pickle
from cfclip.checkpoints.safe_pickle import Record
from cfclip.checkpoints.weights import WeightsError

logger = logging.getLogger(__name__)

FORMATS = {b"PK\x03\x04": "torch-zip", b"\x93NUMPY": "npy", b"\x80": "pickle"}
"""How a file begins -> its format."""

NOT_WEIGHTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run 'git lfs pull', or download it",
    b"<": "a web page, not weights (an expired link, or a question to confirm): download it in a browser",
    b"{": "JSON text, not weights: download the file itself",
    b"\x1f\x8b": "compressed (gzip): unpack it first",
    b"\xfd7zXZ": "compressed (xz): unpack it first",
}
"""How a file begins -> what it is instead of weights, and what to do."""

CONTENTS = {
    "mapper.fc.": "a CF-CLIP mapper",
    "mapper.": "a StyleCLIP mapper",
    "encoder.": "an image encoder (e4e or pSp)",
    "input.input": "a StyleGAN2 generator",
    "conv1_1.": "VGG19",
    "input_layer.": "an ArcFace IR-SE network",
    "visual.": "a CLIP",
    "final_linear.": "a discriminator",
    "decoder.": "a generator inside a larger network",
}
"""How keys of a state dict begin -> what it holds, for messages. The first match counts."""


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Turn every error while reading ``path`` into a WeightsError that names it; the traceback is logged."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # a damaged file may break anything
        logger.debug("%s cannot be read", path, exc_info=True)
        if isinstance(error, KeyError):
            missing = str(error.args[0])[:200] if error.args else "such entry"
            why = f"it has no {missing}: the file is incomplete, or of another kind"
        elif isinstance(error, ValueError):  # our own messages
            why = str(error)
        else:
            raise WeightsError(
                f"{path} is damaged or truncated, or of an unknown kind "
                f"({type(error).__name__}: {str(error)[:200]}); download or export it again"
            ) from error
        raise WeightsError(f"{path} cannot be used: {why}") from None


def sniff(path: str | os.PathLike) -> str:
    """Format by content: "torch-zip", "torch-legacy", "pickle", "npy", "safetensors". Raises WeightsError."""
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path} does not exist: check the path, or fetch the file first")
    if not path.is_file():
        raise WeightsError(f"{path} is a folder, but a file is needed")
    with about(path), path.open("rb") as file:
        head = file.read(256)
    if not head:
        raise WeightsError(f"{path} is empty (an interrupted download?): download it again")
    for start, problem in NOT_WEIGHTS.items():
        if head.lstrip().startswith(start):
            raise WeightsError(f"{path} is {problem}")
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
        return "safetensors"
    for start, name in FORMATS.items():
        if head.startswith(start):
            legacy = name == "pickle" and safe_pickle.LEGACY_MAGIC.to_bytes(10, "little") in head
            return "torch-legacy" if legacy else name
    raise WeightsError(
        f"{path} is not a weight file of torch, NVIDIA (pickle), safetensors or numpy: "
        "check that the download is complete and the right file"
    )


def sha256(path: Path) -> str:
    """The checksum of the file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file as memory: a read never allocates more than the file holds."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def read_torch(path: str | os.PathLike) -> Any:
    """What ``torch.save`` wrote, tensors on the CPU. Raises WeightsError."""
    path, kind = Path(path), sniff(path)
    if not kind.startswith("torch"):
        raise WeightsError(f"{path} is a {kind} file, but one written by torch.save is needed")
    with about(path):
        if kind == "torch-zip":
            safe_pickle.check_zip(path)
        else:
            with mapped(path) as file:
                safe_pickle.load_legacy(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # many checkpoints keep their options so
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "torch-zip")
            except pickle.UnpicklingError as error:
                why = str(error).rpartition("WeightsUnpickler error:")[2].split("\n")[0].strip()[:120]
                raise ValueError(
                    "it holds more than tensors and options, or was saved in an unusual way; for safety it "
                    f"is not opened ({why}): export it again with torch.save(model.state_dict(), …)"
                ) from None


def state_dict(tree: Any, *names: str) -> dict[str, Tensor]:
    """The tensors in the first of the dicts ``tree[name]`` that is there, else in ``tree``; may be empty."""
    if not isinstance(tree, Mapping):
        return {}
    state = next((tree[name] for name in names if isinstance(tree.get(name), Mapping)), tree)
    return {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}


def official_state(tree: Any, wanted: str, *names: str) -> dict[str, Tensor]:
    """The state dict of a file that should be ``wanted``; ValueError if it lacks one of ``names``."""
    tensors = state_dict(tree, "state_dict")
    if not tensors.keys() >= set(names):
        raise ValueError(f"it holds {describe(tree)}, but {wanted} is needed")
    return tensors


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def option(tree: Any, name: str, default: Any = None) -> Any:
    """An entry of the training options that official checkpoints keep, as a dict or a Namespace."""
    opts = tree.get("opts") if isinstance(tree, Mapping) else None
    opts = vars(opts) if isinstance(opts, argparse.Namespace) else opts
    return opts.get(name, default) if isinstance(opts, Mapping) else default


def describe(tree: Any) -> str:
    """What an opened file holds, in words."""
    if isinstance(tree, Tensor):
        return f"a tensor of shape {list(tree.shape)}"
    if not isinstance(tree, Mapping):
        return f"a {tree.name if isinstance(tree, Record) else type(tree).__name__}"
    keys = [str(key) for part in (tree, *tree.values()) if isinstance(part, Mapping) for key in part]
    for start, what in CONTENTS.items():
        if any(key.startswith(start) for key in keys):
            return what
    return f"a dict of {', '.join(list(map(str, tree))[:6]) or 'nothing'}"


def build(make: Callable[[], nn.Module], tensors: Mapping[str, Tensor], what: str) -> Any:
    """``make()`` with float32 copies of ``tensors``; eval, frozen. ValueError names the first misfit."""
    with torch.device("meta"):  # neither memory nor random numbers are spent
        module = make()
    filled = {}
    for name, empty in module.state_dict().items():
        if name not in tensors:
            raise ValueError(f"its {what} has no {name}: the file is incomplete, or of another kind")
        if (shape := tensors[name].shape) != empty.shape:
            raise ValueError(f"its {what} has {name} of shape {list(shape)}, but needs {list(empty.shape)}")
        filled[name] = tensors[name].detach().to(empty.dtype).clone(memory_format=torch.contiguous_format)
    module.load_state_dict(filled, assign=True)
    return module.eval().requires_grad_(False)
