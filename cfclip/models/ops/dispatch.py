"""Which version of an operator runs: the reference for a generator that is trained; for a frozen one Triton's on a GPU, elsewhere :mod:`.frozen`.

The two of a frozen generator are differentiable once, and take kernels, ``bias``, ``noise`` and ``f`` for constants. Where one of these is trained, so is
the network, and that is where gradients of gradients are asked for (R1, path lengths): the reference. A frozen network that is to be
differentiated twice needs ``using("reference")``; else the first backward pass raises an error that says so.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from types import ModuleType

import torch
from torch import Tensor

from cfclip.models.ops import frozen, reference

OPERATORS = ("reference", "frozen", "triton")

_forced: ContextVar[str | None] = ContextVar("operators", default=None)


@contextmanager
def using(operators: str | None) -> Iterator[None]:
    """Within this context the operators are the "reference", the "frozen" or the "triton" ones, whatever they are asked for; None: as outside of any."""
    if operators is not None and operators not in OPERATORS:
        raise ValueError(f"operators must be one of {OPERATORS}, not {operators!r}")
    token = _forced.set(operators)
    try:
        yield
    finally:
        _forced.reset(token)


@cache
def _compiles(device: torch.device) -> bool:
    """Whether Triton works on that GPU: it may be missing, find no C compiler for its launcher, or not know the architecture."""
    try:
        from cfclip.models.ops import triton_ops

        triton_ops.epilogue(torch.zeros(1, 1, 1, 1, device=device))
    except torch.OutOfMemoryError:  # says nothing of Triton
        raise
    except Exception as error:  # each of these raises something else
        warnings.warn(
            f"the operators of StyleGAN2 run in plain torch on {device}, as Triton does not work there: {error}",
            stacklevel=2,
        )
        return False
    return True


def _operators(x: Tensor, *constants: Tensor | None) -> ModuleType:
    """The module whose operator is to work on ``x``."""
    choice = _forced.get()
    if choice is None:
        trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in constants)
        gpu = (
            x.is_cuda
            and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
            and not trained
            and _compiles(x.device)
        )
        choice = "reference" if trained else "triton" if gpu else "frozen"
    if choice == "triton":
        from cfclip.models.ops import triton_ops

        return triton_ops
    return frozen if choice == "frozen" else reference


@wraps(reference.upfirdn2d)
def upfirdn2d(x: Tensor, f: Tensor, *args, **kwargs) -> Tensor:
    return _operators(x, f).upfirdn2d(x, f, *args, **kwargs)


@wraps(reference.conv2d)
def conv2d(x: Tensor, kernel: Tensor, *args, **kwargs) -> Tensor:
    return _operators(x, kernel).conv2d(x, kernel, *args, **kwargs)


@wraps(reference.bias_act)
def bias_act(x: Tensor, bias: Tensor | None = None, *args, **kwargs) -> Tensor:
    return _operators(x, bias).bias_act(x, bias, *args, **kwargs)


@wraps(reference.epilogue)
def epilogue(
    x: Tensor,
    d: Tensor | None = None,
    noise: Tensor | None = None,
    bias: Tensor | None = None,
    *args,
    fir: Tensor | None = None,
    rgb: tuple[Tensor, Tensor] | None = None,
    **kwargs,
) -> tuple[Tensor, ...]:
    kwargs |= {"fir": fir, "rgb": rgb}
    return _operators(x, noise, bias, fir, rgb and rgb[0]).epilogue(x, d, noise, bias, *args, **kwargs)
