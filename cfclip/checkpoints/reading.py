"""DOC"""

import argparse
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

MAGIC = {b"PK\x03\x04": "torch-zip", b"\x93NUMPY": "npy", b"\x80": "pickle", b"": "unknown"}

NOT_WEIGHTS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself: run 'git lfs pull', or download the file",
    b"<": "is a web page, not weights (a download that asked for a confirmation, or an expired link): download it in a browser",
    b"{": "is JSON text, not weights: download the file itself",
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"\xfd7zXZ": "is compressed (xz): unpack it first",
}

KINDS = (
    ("mapper.fc.", "a CF-CLIP mapper"),
    ("mapper.", "a StyleCLIP mapper"),
    ("encoder.", "an image encoder (e4e or pSp)"),
    ("input.input", "a StyleGAN2 generator"),
    ("conv1_1.", "VGG19"),
    ("input_layer.", "an ArcFace IR-SE network"),
    ("visual.", "a CLIP"),
    ("final_linear.", "a discriminator"),
    ("decoder.", "a generator inside a larger network"),
)
"""How the keys of a state dict begin -> what it holds, for messages."""


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong with the file at ``path`` into a WeightsError that names it."""
    try:
        yield
    except WeightsError:
        raise
    except ValueError as error:  # our own messages
        raise WeightsError(f"{path} cannot be used: {error}") from None
    except KeyError as error:
        raise WeightsError(f"{path} cannot be used: {error.args[0] if error.args else error}") from None
    except Exception as error:  # a damaged file may break anything
        raise WeightsError(
            f"{path} is damaged, or of an unknown kind ({type(error).__name__}: {str(error)[:200]}); "
            "download or export it again"
        ) from error


def sniff(path: str | os.PathLike) -> str:
    """ "torch-zip", "torch-legacy", "pickle", "npy" or "safetensors", by content. Raises WeightsError for anything else."""
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
        raise WeightsError(
            f"{path} is no weight file that is known here: neither torch's, NVIDIA's pickle, safetensors nor numpy's; "
            "check that the download is the right file, and complete"
        )
    legacy = safe_pickle.LEGACY_MAGIC.to_bytes(10, "little") in head
    return "torch-legacy" if kind == "pickle" and legacy else kind


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
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
            with mapped(path) as file:
                safe_pickle.load_legacy(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # many checkpoints keep their options so
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "torch-zip")
            except pickle.UnpicklingError as error:
                why = str(error).rpartition("WeightsUnpickler error:")[2].split("\n")[0].strip()[:120]
                raise ValueError(
                    f"it holds more than tensors and options, or was saved in an unusual way ({why}), which is not opened "
                    "for safety: export it again with torch.save(model.state_dict(), …)"
                ) from None


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
    return next(
        (what for start, what in KINDS if any(key.startswith(start) for key in keys)),
        f"a dict of {', '.join(list(map(str, tree))[:6]) or 'nothing'}",
    )


def build(make: Callable[[], nn.Module], tensors: Mapping[str, Tensor], what: str) -> Any:
    """``make()`` filled with float32 copies of ``tensors``; eval mode, frozen. Raises ValueError naming the first misfit."""
    with torch.device("meta"):  # neither memory nor random numbers are spent
        module = make()
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise ValueError(f"its {what} has no {name}: the file is incomplete, or of another kind")
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"its {what} has {name} of shape {list(tensors[name].shape)}, where {list(tensor.shape)} would fit the rest"
            )
    module.load_state_dict(
        {
            name: tensors[name].detach().to(tensor.dtype).clone(memory_format=torch.contiguous_format)
            for name, tensor in expected.items()
        },
        assign=True,
    )
    return module.eval().requires_grad_(False)


def option(tree: Any, name: str, default: Any = None) -> Any:
    """An entry of the training options that official checkpoints keep, as a dict or a Namespace."""
    opts = tree.get("opts") if isinstance(tree, Mapping) else None
    opts = vars(opts) if isinstance(opts, argparse.Namespace) else opts
    return opts.get(name, default) if isinstance(opts, Mapping) else default
