"""The choice between the versions of an operator.

A generator that is trained uses :mod:`.reference`. A frozen one uses ``triton_ops`` on a GPU and
:mod:`.frozen` elsewhere: these are differentiable once and treat kernels, ``bias``, ``noise`` and ``f`` as
constants. If one of these constants is trained, the network is not frozen. Its training may need gradients
of gradients (R1, path lengths), so the reference runs. To differentiate a frozen network twice, use
``using("reference")``; without it the first backward pass raises an error that says so.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from types import ModuleType

import torch
from torch import Tensor

from cfclip.models.ops import frozen, reference
from cfclip.models.ops.choice import HALF
from cfclip.models.ops.reference import Epilogue, LayerOutput

logger = logging.getLogger(__name__)

OPERATORS = ("reference", "frozen", "triton")

_forced: ContextVar[str | None] = ContextVar("operators", default=None)


@contextmanager
def using(operators: str | None) -> Iterator[None]:
    """Within this context the "reference", "frozen" or "triton" operators run; None: the inputs decide."""
    if operators is not None and operators not in OPERATORS:
        raise ValueError(f"operators must be one of {OPERATORS}, not {operators!r}")
    token = _forced.set(operators)
    try:
        yield
    finally:
        _forced.reset(token)


@cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton works on a GPU. It may be missing, lack a C compiler, or not know the architecture."""
    try:
        from cfclip.models.ops import triton_ops  # optional, and slow to import

        triton_ops.epilogue(torch.zeros(1, 1, 1, 1, device=device), Epilogue())
    except torch.OutOfMemoryError:  # says nothing about Triton
        raise
    except Exception as error:  # the type differs from cause to cause
        logger.debug("Triton does not work on %s", device, exc_info=True)
        warnings.warn(
            f"StyleGAN2's operators run in plain torch on {device}: Triton does not work there ({error})",
            stacklevel=2,
        )
        return False
    return True


def operators_for(x: Tensor, *constants: Tensor | None) -> ModuleType:
    """The module whose operator should run on ``x``."""
    choice = _forced.get()
    if choice is None:
        trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in constants)
        if trained:
            choice = "reference"
        elif x.is_cuda and x.dtype in (torch.float32, *HALF) and triton_works(x.device):
            choice = "triton"
    if choice == "triton":
        from cfclip.models.ops import triton_ops  # optional, and slow to import

        return triton_ops
    return reference if choice == "reference" else frozen


@wraps(reference.upfirdn2d)
def upfirdn2d(x: Tensor, f: Tensor, *args, **kwargs) -> Tensor:
    return operators_for(x, f).upfirdn2d(x, f, *args, **kwargs)


@wraps(reference.conv2d)
def conv2d(x: Tensor, kernel: Tensor, *args, **kwargs) -> Tensor:
    return operators_for(x, kernel).conv2d(x, kernel, *args, **kwargs)


@wraps(reference.bias_act)
def bias_act(x: Tensor, bias: Tensor | None = None, *args, **kwargs) -> Tensor:
    return operators_for(x, bias).bias_act(x, bias, *args, **kwargs)


@wraps(reference.epilogue)
def epilogue(x: Tensor, e: Epilogue) -> LayerOutput:
    return operators_for(x, e.noise, e.bias, e.fir, e.rgb and e.rgb[0]).epilogue(x, e)
