"""Our own weight files: safetensors with a small JSON header that says what is inside. Opening one runs nothing."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .training import atomic_save


class WeightsError(ValueError):
    """A weight file that cannot be used; the message names the file, the cause and the fix."""


def save(module: nn.Module, path: str | os.PathLike, kind: str, config: Mapping[str, Any], store_as: torch.dtype | None = None,
         **card: Any) -> Path:
    """Write ``module`` as safetensors; ``store_as`` is what floating-point tensors are stored in (default: as they are).

    ``config`` are the constructor arguments; ``card`` is anything worth keeping beside them (seed, budget, prompt …).
    """
    tensors = {name: (t.to(store_as) if store_as and t.is_floating_point() else t).detach().cpu().contiguous().clone()
               for name, t in module.state_dict().items()}
    header = {"cfclip": json.dumps({"kind": kind, "config": dict(config), "card": card}, ensure_ascii=False)}
    return atomic_save(tensors, path, lambda tensors, part: save_file(tensors, part, metadata=header))


def read(path: str | os.PathLike, kind: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """-> (tensors in float32, config, card) of a file written by :func:`save`. Raises WeightsError."""
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path} does not exist: check the path, or fetch or train the file first")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("cfclip", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file (truncated, or something else): {error}; "
                           "fetch or train it again") from None
    if not isinstance(header, dict) or "kind" not in header:
        raise WeightsError(f"{path} is a safetensors file, but not one of cfclip's: it has no 'cfclip' header")
    if header["kind"] != kind:
        raise WeightsError(f"{path} holds a {header['kind']}, where a {kind} is needed")
    return ({n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}, header.get("config", {}), header.get("card", {}))


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike) -> nn.Module:
    """Strictly load ``tensors``; eval mode, frozen. Raises WeightsError naming ``path``."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit its own header: {str(error).splitlines()[-1].strip()}") from None
    return module.eval().requires_grad_(False)
