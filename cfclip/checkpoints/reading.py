"""Shared by all readers: detect the format of a file, open it safely, fill a network, raise clear errors."""

import logging
import math
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cfclip.checkpoints import safe_pickle
from cfclip.checkpoints.budget import budget_of, spend
from cfclip.checkpoints.values import Name, Record, View, to_tensor
from cfclip.checkpoints.weights import WeightsError, check_numbers

logger = logging.getLogger(__name__)
T = TypeVar("T")

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
    "synthesis.input.": "a StyleGAN3 (alias-free) generator",
    "synthesis.b4.const": "a StyleGAN2 generator",
    "input.input": "a StyleGAN2 generator",
    "conv1_1.weight": "VGG19",
    "input_layer.": "an ArcFace IR-SE network",
    "visual.": "a CLIP",
    "final_linear.": "a discriminator",
}
"""How names of tensors begin -> what they belong to, for messages. The first match counts."""

WRAPPERS = ("module", "_orig_mod")
"""Parts of names that DataParallel and torch.compile add."""

AVERAGED = re.compile(r"(?<![a-z0-9])ema(?![a-z0-9])", re.IGNORECASE)
"""Found in the place of a network whose weights are a moving average; this network is preferred."""

MEAN_LATENTS = ("latent_avg", "mean_latent")
"""Names of the mean latent in rosinality's files, the first one preferred."""

MAX_PLACE = 4
"""How deep networks are searched for in nested dicts."""

MAX_NETWORKS = 100
"""How many networks, each with its own prefix, one dict of tensors may hold."""


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Read ``path`` within one budget. Any error is logged and becomes a WeightsError that names ``path``."""
    try:
        with budget_of(path.stat().st_size if path.exists() else 0):
            yield
    except WeightsError:
        raise
    except Exception as error:  # a damaged file may break anything
        logger.debug("%s cannot be read", path, exc_info=True)
        if isinstance(error, KeyError):
            named = error.args and type(error.args[0]) is str
            missing = error.args[0][:200] if named else "such entry"
            why = f"it has no {missing}: the file is incomplete, or of another kind"
        elif isinstance(error, ValueError):  # our own messages
            why = str(error)[:500]
        else:
            raise WeightsError(
                f"{path} is damaged or truncated, or of an unknown kind "
                f"({type(error).__name__}: {str(error)[:200]}); download or export it again"
            ) from error
        raise WeightsError(f"{path} cannot be used: {why}") from None


def sniff(path: str | os.PathLike) -> str:
    """Detect the format of a file from its content. WeightsError if it has none of the formats.

    Formats: "torch-zip", "torch-legacy", "pickle", "npy", "npz", "safetensors".
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path} does not exist: check the path, or fetch the file first")
    if not path.is_file():
        raise WeightsError(f"{path} is a folder, but a file is needed")
    with about(path), path.open("rb") as file:
        head = file.read(256)
    if not head:
        raise WeightsError(f"{path} is empty (an interrupted download?): download it again")
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
        return "safetensors"  # tested first: the length may begin with the same bytes as another format
    for start, problem in NOT_WEIGHTS.items():
        if head.lstrip().startswith(start):
            raise WeightsError(f"{path} is {problem}")
    for start, name in FORMATS.items():
        if head.startswith(start):
            if name == "torch-zip" and head[30:][: int.from_bytes(head[26:28], "little")].endswith(b".npy"):
                return "npz"  # the first name in the archive
            legacy = name == "pickle" and safe_pickle.LEGACY_MAGIC.to_bytes(10, "little") in head[:32]
            return "torch-legacy" if legacy else name
    raise WeightsError(
        f"{path} is not a weight file of torch, NVIDIA (pickle), safetensors or numpy: "
        "check that the download is complete and the right file"
    )


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file mapped into memory, so that a read never allocates more than the file holds."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def read_torch(path: str | os.PathLike) -> Any:
    """The content of a torch file, as :mod:`safe_pickle` returns it; tensors are views of the mapped file.

    Raises WeightsError.
    """
    path, kind = Path(path), sniff(path)
    if not kind.startswith("torch"):
        raise WeightsError(f"{path} is a {kind} file, but one written by torch.save is needed")
    with about(path):
        content = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)  # mapped, not read
        if kind == "torch-zip":
            with path.open("rb") as file:
                return safe_pickle.load_zip(file, content)
        with mapped(path) as file:
            return safe_pickle.load_legacy(file, content)


def read_plain(path: str | os.PathLike) -> Any:
    """The content of a torch file that holds only dicts, lists, tuples, plain values and tensors.

    Tensors are copied. Raises WeightsError, also for any other object.
    """
    path = Path(path)
    made: dict[int, Any] = {}  # id -> copy: an object that the file refers to twice is copied once

    def plain(value: Any) -> Any:
        if id(value) in made:
            return made[id(value)]
        new = value
        if isinstance(value, dict):
            new = {key: plain(entry) for key, entry in value.items()}
        elif isinstance(value, list | tuple):
            new = type(value)(map(plain, value))
        elif isinstance(value, View):
            spend(math.prod(value.size) * value.storage.dtype.itemsize)
            new = value.tensor().clone()
        elif isinstance(value, Record | Name):
            raise ValueError("it holds objects, but only tensors and plain values are needed")
        made[id(value)] = new
        return new

    with about(path):
        tree = read_torch(path)
        return plain(tree)


def tensor_dicts(tree: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(place, tensors) of each dict in ``tree``, outer dicts first; tensor names are without ``WRAPPERS``.

    The place is "" or like "state_dict: ". Each dict is visited once, however often the file refers to it.
    """
    queue, seen = [("", 0, tree)], set()
    for place, depth, node in queue:
        if not isinstance(node, Mapping) or id(node) in seen:
            continue
        seen.add(id(node))
        tensors: dict[str, Tensor] = {}
        for key, value in node.items():
            if isinstance(key, str) and isinstance(value, Tensor | View):
                name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
                if name in tensors:
                    raise ValueError(f"it has {name[:120]} twice, with and without 'module.'")
                tensors[name] = to_tensor(value)
            elif isinstance(key, str) and depth < MAX_PLACE:
                queue.append((f"{place}{key[:60]}: ", depth + 1, value))
        yield place, tensors


def find_networks(tree: Any, *names: str) -> dict[str, dict[str, Tensor]]:
    """Place -> tensors of each network in ``tree`` that has all of ``names``, under any key and prefix.

    If the first name ends with ".", it stands for all names that begin with it. The prefix is removed from
    the tensors' names and becomes the end of the place.
    """
    found = {}
    for place, tensors in tensor_dicts(tree):
        starts = [(key, f".{key}".find(f".{names[0]}")) for key in tensors]
        prefixes = dict.fromkeys(key[:start] for key, start in starts if start >= 0)
        if len(prefixes) > MAX_NETWORKS:
            raise ValueError(f"it holds more than {MAX_NETWORKS} networks: save the one to use")
        for prefix in prefixes:
            part = part_of(tensors, prefix)
            if all(name.endswith(".") or name in part for name in names):
                found[place + prefix] = part
    return found


def the_network(found: Mapping[str, T], tree: Any, wanted: str, *names: str) -> tuple[str, T]:
    """The only (place, network) of ``found``, or of its moving averages if any; otherwise ValueError."""
    options = {place: one for place, one in found.items() if AVERAGED.search(place)} or found
    if len(options) == 1:
        return next(iter(options.items()))
    if not options:
        lacks = f" (no tensor is named {' or '.join(names)})" if names else ""
        raise ValueError(f"it holds {describe(tree)}, but {wanted} is needed{lacks}")
    places = ", ".join(repr(place.rstrip(": .")[:80] or "the file itself") for place in list(options)[:6])
    raise ValueError(f"it holds {len(options)} networks where one is needed, at {places}: save one alone")


def official_state(tree: Any, wanted: str, *names: str) -> dict[str, Tensor]:
    """The tensors of the one network with all ``names`` (``wanted`` in errors). ValueError without it."""
    return the_network(find_networks(tree, *names), tree, wanted, *names)[1]


def mean_latent(tree: Any, place: str) -> Tensor | None:
    """The mean latent in the network at ``place``, otherwise the nearest one around it; None without any."""
    near: dict[tuple[int, bool], Tensor] = {}
    for outer, tensors in tensor_dicts(tree):
        for key, tensor in tensors.items():
            prefix, dot, name = key.rpartition(".")
            if name in MEAN_LATENTS and place.startswith(around := f"{outer}{prefix}{dot}"):
                near[len(around), name == MEAN_LATENTS[0]] = tensor
    return near[max(near)] if near else None


def has_part(tree: Any, start: str) -> bool:
    """Whether the name of any tensor in ``tree`` begins with ``start``, directly or after a prefix."""
    return any(f".{start}" in f".{name}" for _, tensors in tensor_dicts(tree) for name in tensors)


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def option(tree: Any, name: str, default: Any = None) -> Any:
    """An entry of the training options that official checkpoints keep, as a dict or a Namespace."""
    opts = tree.get("opts") if isinstance(tree, Mapping) else None
    opts = opts.state if isinstance(opts, Record) else opts
    return opts.get(name, default) if isinstance(opts, Mapping) else default


def describe(tree: Any) -> str:
    """What an opened file holds, in words."""
    if isinstance(tree, Tensor | View):
        return f"a tensor of shape {list(to_tensor(tree).shape)[:8]}"
    if isinstance(tree, Record):
        return f"a saved {tree.name}: save plain tensors instead, e.g. torch.save(model.state_dict(), …)"
    if not isinstance(tree, Mapping):
        return f"a {type(tree).__name__}"
    names = [f".{name}" for _, tensors in tensor_dicts(tree) for name in tensors]
    for start, what in CONTENTS.items():
        if any(f".{start}" in name for name in names):
            return what
    keys = [key[:60] if isinstance(key, str) else f"a {type(key).__name__}" for key in tree]
    return f"a dict of {', '.join(keys[:6]) or 'nothing'}"


class _Limit(TorchFunctionMode):
    """Stop a constructor whose network is too large for ``count`` tensors; bad headers may declare one.

    Calls of torch are counted. Our networks need at most 7 per tensor, and the largest (e4e) needs 3000.
    """

    def __init__(self, count: int):
        super().__init__()
        self.calls = min(200 + 20 * count, 6_000)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls -= 1
        if self.calls < 0:
            raise ValueError("it is damaged: it declares more layers than it has tensors, or any network has")
        return function(*args, **kwargs or {})


def build(make: Callable[[], nn.Module], tensors: Mapping[str, Tensor], what: str) -> Any:
    """``make()`` with ``tensors`` copied to its dtypes; eval, frozen. ValueError names the first misfit."""
    with torch.device("meta"), _Limit(len(tensors)):  # uses no memory and no random numbers
        module = make()
    filled = {}
    for name, empty in module.state_dict().items():
        if name not in tensors:
            raise ValueError(f"its {what} has no {name}: the file is incomplete, or of another kind")
        if (shape := tensors[name].shape) != empty.shape:
            raise ValueError(f"its {what} has {name} of shape {list(shape)}, but needs {list(empty.shape)}")
        check_numbers(name, tensors[name], empty)
        filled[name] = tensors[name].detach().to(empty.dtype).clone(memory_format=torch.contiguous_format)
    module.load_state_dict(filled, assign=True)
    return module.eval().requires_grad_(False)
