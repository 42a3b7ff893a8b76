"""Our own weight files: safetensors with a JSON header that says what is inside. Opening one runs no code."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cfclip.checkpoints.budget import spend
from cfclip.checkpoints.values import sizes
from cfclip.files import atomic_write

MAX_SIZE = 16384
"""The largest number in a header; limited because the network is built before its tensors are checked."""

MAX_KIND = 60
"""The most characters in the kind that a header names."""


class WeightsError(ValueError):
    """A weight file that cannot be used; the message names the file, the cause and the fix."""


class Header(NamedTuple):
    """The description that a file carries beside its tensors."""

    kind: str  # of network, e.g. "generator"
    config: dict[str, Any]  # the constructor's arguments
    card: dict[str, Any]  # free notes; for a mapper: method, domain, training


def save(
    module: nn.Module,
    path: str | os.PathLike,
    kind: str,
    config: Mapping[str, Any],
    store_as: torch.dtype | None = None,
    **card: Any,
) -> Path:
    """Write ``module`` with its header. ``store_as``: dtype of float tensors (default: unchanged).

    Raises ValueError for a tensor that is not finite, before or after conversion to ``store_as``.
    """
    tensors = {}
    for name, tensor in module.state_dict().items():
        tensor = tensor.to(store_as) if store_as and tensor.is_floating_point() else tensor
        if not tensor.isfinite().all():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} of the {kind} is not finite in {dtype}, so {path} is not written: the training went "
                "too far, try a smaller lr"
            )
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    header = json.dumps({"kind": kind, "config": dict(config), "card": card}, ensure_ascii=False)
    return atomic_write(path, lambda part: save_file(tensors, part, metadata={"cfclip": header}))


def read_header(path: str | os.PathLike) -> Header:
    """The header of one of our files, without reading any tensor. Raises WeightsError."""
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path} does not exist: check the path, or fetch or train the file first")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("cfclip", "null"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path} is not a readable safetensors file (truncated, or of another type): {str(error)[:200]}; "
            "fetch or train it again"
        ) from None
    if not isinstance(header, dict) or "kind" not in header:
        raise WeightsError(f"{path} is a safetensors file without cfclip's header: another program wrote it")
    kind, config, card = header["kind"], header.get("config", {}), header.get("card", {})
    proper = isinstance(kind, str) and len(kind) <= MAX_KIND and isinstance(config, dict)
    if not proper or not isinstance(card, dict):
        raise WeightsError(f"{path} has a damaged header: fetch or train it again")
    return Header(kind, config, card)


def read(path: str | os.PathLike, kind: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(float32 tensors, config, card) of a file that :func:`save` wrote. Raises WeightsError."""
    header = read_header(path)
    if header.kind != kind:
        raise WeightsError(f"{path} holds a {header.kind}, but a {kind} is needed")
    _check_sizes(path, list(header.config.values()))
    try:
        held = read_tensors(path)
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"{path} is damaged ({str(error)[:200]}): fetch or train it again") from None
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in held.items()}
    return tensors, header.config, header.card


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises SafetensorError, or ValueError for too many dimensions."""
    tensors = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            sizes(file.get_slice(name).get_shape())  # torch takes minutes for a million dimensions of 1
            spend(steps=10)
            tensors[name] = file.get_tensor(name)
    return tensors


def _check_sizes(path: str | os.PathLike, values: list, depth: int = 0) -> None:
    for value in values:
        if isinstance(value, int | float) and not abs(value) <= MAX_SIZE:
            raise WeightsError(
                f"{path} cannot be used: its header declares a size above the limit of {MAX_SIZE}, or none: "
                "fetch or train it again"
            )
        if isinstance(value, list | dict):
            if isinstance(value, dict) or depth > 2:
                raise WeightsError(f"{path} has a damaged header: fetch or train it again")
            _check_sizes(path, value, depth + 1)


def check_numbers(name: str, tensor: Tensor, place: Tensor | None = None) -> None:
    """Pay for a float32 copy of ``tensor``. ValueError names the tensor unless it holds finite floats.

    ``place``: the network's tensor that it fills. If that is a counter (int64), ``tensor`` may be one too.
    """
    spend(4 * tensor.numel())
    if place is not None and place.dtype == tensor.dtype == torch.int64 and not tensor.is_meta:
        return
    if not tensor.numel():
        problem = "is empty"
    elif tensor.is_meta:
        problem = "holds no numbers (it was saved from torch's meta device)"
    elif tensor.layout is not torch.strided or tensor.is_quantized:
        problem = f"is stored in an unusual way ({tensor.dtype}, {tensor.layout})"
    elif not tensor.is_floating_point():
        problem = f"holds numbers of type {tensor.dtype}"
    elif not tensor.float().isfinite().all():
        problem = "is not all finite (NaN or infinity)"
    else:
        return
    raise ValueError(
        f"its {name[:120]} {problem}, but finite floats are needed: "
        "the file is damaged, or what made it failed"
    )


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike) -> nn.Module:
    """Load exactly ``tensors``; eval, frozen. WeightsError names ``path`` if they do not fit."""
    try:
        for name, empty in module.state_dict().items():
            if name in tensors:
                check_numbers(name, tensors[name], empty)
        module.load_state_dict(tensors)
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()
        raise WeightsError(f"{path} does not fit its own header: {why}") from None
    except ValueError as error:
        raise WeightsError(f"{path} cannot be used: {error}") from None
    return module.eval().requires_grad_(False)
