"""The convolutions of StyleGAN2 (eq. 1-3) around cuDNN's or oneDNN's.

Modulation multiplies the *activations* by the styles and the *outputs* by the demodulation coefficients, which is the
same sum as the published per-sample weights but stays an ordinary convolution.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.models.ops.choice import CLEARLY, HALF, layout_of, quickest
from cfclip.models.ops.dispatch import conv2d, epilogue, using
from cfclip.models.ops.reference import modulate, setup_filter

_forced: ContextVar[bool | None] = ContextVar("fold", default=None)


class Prepared(NamedTuple):
    """What a modulated convolution needs of its weights alone, to be kept while they are frozen."""

    kernel: Tensor  # what slides: [O, I, k, k], or the four phases of an up-sampling one [4 O, I, 3, 3]
    squares: Tensor  # sum w^2, [O, I]
    phases: bool  # the FIR filter is in the kernel


def _upsampling_phases(weight: Tensor, f: Tensor) -> Tensor:
    """Stride-2 transposed convolution by ``weight`` [O, I, 3, 3], then FIR ``4 f``, as one 3x3 kernel per output phase.

    The composition is a single 6x6 transposed kernel; its four stride-2 phases are ordinary 3x3 convolutions, to be
    interleaved by ``pixel_shuffle``. Returns [4 * O, I, 3, 3].
    """
    o, i, k, _ = weight.shape
    n = f.shape[-1]
    full = F.conv2d(
        weight.reshape(o * i, 1, k, k), (4 * f).flip(0, 1).to(weight.dtype)[None, None], padding=n - 1
    )
    full = full.reshape(o, i, 6, 6)
    phases = full.reshape(o, i, 3, 2, 3, 2).flip(2, 4)  # taps of one phase, as a correlation
    return phases.permute(0, 3, 5, 1, 2, 4).reshape(4 * o, i, 3, 3)


@contextmanager
def folding(fold: bool) -> Iterator[None]:
    """Within this context :func:`folds` says ``fold``, where a filter can be folded."""
    token = _forced.set(fold)
    try:
        yield
    finally:
        _forced.reset(token)


def folds(weight: Tensor, f: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel of an up-sampling convolution in ``dtype`` is to hold its FIR filter: one pass over the pixels less, and four times the products.

    In float32 it never pays, at no size and on no processor of reports/bench: there the products take the time. In half precision it is
    measured, for each number of channels.
    """
    if weight.shape[-1] != 3 or f.shape[-1] != 4:
        return False
    if (forced := _forced.get()) is not None:
        return forced
    return dtype in HALF and _folding_pays(weight.device, dtype, *weight.shape[:2])


@cache
@torch.inference_mode(False)
def _folding_pays(device: torch.device, dtype: torch.dtype, o: int, i: int) -> bool:
    # where there are many channels there are few pixels
    side = next(side for side in (8, 16, 32, 64, 128) if side == 128 or 2 * side**2 * 36 * o * i > 2e8)
    f, style, bias = (
        setup_filter((1, 3, 3, 1)).to(device),
        torch.ones(2, i, device=device),
        torch.zeros(o, device=device),
    )
    x = (
        torch
        .ones(2, i, side, side, device=device, dtype=dtype)
        .contiguous(memory_format=layout_of(dtype))
        .requires_grad_()
    )
    weight = torch.full((o, i, 3, 3), 1 / (9 * i), device=device)

    def way(fold: bool) -> Callable[[], object]:
        with folding(fold):
            prepared = prepare(weight, f, dtype)

        def both() -> None:
            (y,) = styled_conv2d(x, prepared, style, f, bias=bias)
            torch.autograd.grad(y, x, y)

        return both

    with torch.enable_grad(), using(None):
        unfolded, folded = quickest([way(False), way(True)], device)
    return unfolded > CLEARLY * folded


def prepare(weight: Tensor, f: Tensor | None, dtype: torch.dtype) -> Prepared:
    """The weights [O, I, k, k] of a convolution in ``dtype``, up-sampling where there is a FIR filter ``f``.

    To be kept: making the phases of a folded kernel costs more than the convolution of a few small pictures.
    """
    phases = f is not None and folds(weight, f, dtype)
    kernel, layout = (_upsampling_phases(weight, f) if phases else weight).to(dtype), layout_of(dtype)
    if f is not None and not phases:
        kernel = (
            kernel.transpose(0, 1).contiguous(memory_format=layout).transpose(0, 1)
        )  # as a transposed convolution takes it
    else:
        kernel = kernel.contiguous(memory_format=layout)
    return Prepared(kernel, weight.square().sum((2, 3)), phases)


def styled_conv2d(
    x: Tensor, prepared: Prepared, style: Tensor | None, f: Tensor | None = None, **finish
) -> tuple[Tensor, ...]:
    """Convolution and all that follows it, "same" padding; with a FIR filter ``f`` [n, n] it doubles the resolution.

    x: [N, I, H, W], times its ``style`` [N, I] already: whoever made it had it in hand; prepared: :func:`prepare` of the weight,
    ``f`` and the dtype of ``x``; style: None for no demodulation; finish: what :func:`epilogue` takes.
    Returns what :func:`epilogue` does, [N, O, H, W] or [N, O, 2 H, 2 W] once for each of its readers, or once as it is.
    """
    kernel, squares, phases = prepared
    filtered = f is not None and not phases
    x = conv2d(x, kernel, up=filtered)
    if filtered:
        n, k = f.shape[-1], kernel.shape[-1]  # pads as NVIDIA's conv2d_resample and rosinality's Blur do
        finish |= {"fir": f, "pad": ((n + 1) // 2 + k // 2 - (k - 1), (n - 2) // 2 + k // 2 - (k - 2))}
    d = None if style is None else (style.square() @ squares.t() + 1e-8).rsqrt()
    return epilogue(x, d, shuffle=phases, **finish)


def modulated_conv2d(
    x: Tensor, weight: Tensor, style: Tensor, demodulate: bool = True, f: Tensor | None = None
) -> Tensor:
    """Modulated convolution alone.

    x: [N, I, H, W] in the dtype to compute in; weight: [O, I, k, k] fp32, equalised already; style: [N, I] fp32.
    StyleGAN2 eq. 1-3: ``w' = s_i w``, ``w'' = w' / sqrt(sum w'^2 + 1e-8)``.
    """
    return styled_conv2d(
        modulate(x, style), prepare(weight, f, x.dtype), style if demodulate else None, f, slope=1, gain=1
    )[0]
