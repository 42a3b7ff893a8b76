"""The convolutions of StyleGAN2 (eq. 1-3), built on cuDNN's or oneDNN's.

Modulation multiplies the *activations* by the styles and the *outputs* by the demodulation coefficients. That
is the same sum as with the published per-sample weights, but remains an ordinary convolution.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.models.ops.choice import HALF, MIN_SPEEDUP, best_times, layout_of
from cfclip.models.ops.dispatch import conv2d, epilogue, using
from cfclip.models.ops.reference import Epilogue, LayerOutput, modulate, setup_filter

_forced: ContextVar[bool | None] = ContextVar("fold", default=None)


class Prepared(NamedTuple):
    """A modulated convolution's weights, prepared for use. They can be kept while the weights are frozen."""

    kernel: Tensor  # the kernel [O, I, k, k], or the four phases of an up-sampling one [4 O, I, 3, 3]
    squares: Tensor  # sum w^2, [O, I]
    phases: bool  # the FIR filter is part of the kernel


def _upsampling_phases(weight: Tensor, f: Tensor) -> Tensor:
    """Stride-2 transposed convolution by ``weight`` [O, I, 3, 3], then FIR ``4 f``: a 3x3 kernel per phase.

    The composition is a single 6x6 transposed kernel; its four stride-2 phases are ordinary 3x3 convolutions,
    to be interleaved by ``pixel_shuffle``. Returns [4 * O, I, 3, 3].
    """
    o, i, k, _ = weight.shape
    flipped = (4 * f).flip(0, 1).to(weight.dtype)[None, None]
    full = F.conv2d(weight.reshape(o * i, 1, k, k), flipped, padding=f.shape[-1] - 1)
    phases = full.reshape(o, i, 3, 2, 3, 2).flip(2, 4)  # taps of one phase, as a correlation
    return phases.permute(0, 3, 5, 1, 2, 4).reshape(4 * o, i, 3, 3)


@contextmanager
def folding(fold: bool) -> Iterator[None]:
    """Within this context :func:`folds` returns ``fold`` wherever a filter can be folded."""
    token = _forced.set(fold)
    try:
        yield
    finally:
        _forced.reset(token)


def folds(weight: Tensor, f: Tensor, dtype: torch.dtype) -> bool:
    """Whether to fold the FIR filter into the kernel of an up-sampling convolution in ``dtype``.

    Folding saves one pass over the pixels and costs four times the products. In float32 it is not faster at
    any size on any processor of reports/bench, because the products dominate. In half precision it is
    measured for each number of channels. Only 3x3 kernels and 4x4 filters can be folded.
    """
    if weight.shape[-1] != 3 or f.shape[-1] != 4:
        return False
    if (forced := _forced.get()) is not None:
        return forced
    return dtype in HALF and folding_pays(weight.device, dtype, *weight.shape[:2])


@cache
@torch.inference_mode(False)
def folding_pays(device: torch.device, dtype: torch.dtype, o: int, i: int) -> bool:
    """Measure whether folding is clearly faster for ``i`` -> ``o`` channels, forward and backward."""
    # layers with many channels have few pixels
    side = next(side for side in (8, 16, 32, 64, 128) if side == 128 or 2 * side**2 * 36 * o * i > 2e8)
    f, style = setup_filter((1, 3, 3, 1)).to(device), torch.ones(2, i, device=device)
    x = torch.ones(2, i, side, side, device=device, dtype=dtype)
    x = x.contiguous(memory_format=layout_of(dtype)).requires_grad_()
    weight = torch.full((o, i, 3, 3), 1 / (9 * i), device=device)
    e = Epilogue(bias=torch.zeros(o, device=device))

    def step(fold: bool) -> Callable[[], object]:
        with folding(fold):
            prepared = prepare(weight, f, dtype)

        def forward_and_backward() -> None:
            (y,) = styled_conv2d(x, prepared, style, f, e).scaled
            torch.autograd.grad(y, x, y)

        return forward_and_backward

    with torch.enable_grad(), using(None):
        unfolded, folded = best_times([step(False), step(True)], device)
    return unfolded > MIN_SPEEDUP * folded


def prepare(weight: Tensor, f: Tensor | None, dtype: torch.dtype) -> Prepared:
    """Prepare weights [O, I, k, k] for a convolution in ``dtype``; with a FIR filter ``f`` it up-samples.

    Keep the result: computing the phases of a folded kernel costs more than convolving a few small images.
    """
    phases = f is not None and folds(weight, f, dtype)
    kernel, layout = (_upsampling_phases(weight, f) if phases else weight).to(dtype), layout_of(dtype)
    if f is not None and not phases:  # dense in the order in which a transposed convolution takes it
        kernel = kernel.transpose(0, 1).contiguous(memory_format=layout).transpose(0, 1)
    else:
        kernel = kernel.contiguous(memory_format=layout)
    return Prepared(kernel, weight.square().sum((2, 3)), phases)


def styled_conv2d(
    x: Tensor, prepared: Prepared, style: Tensor | None, f: Tensor | None, e: Epilogue
) -> LayerOutput:
    """A "same" convolution and its epilogue; with a FIR filter ``f`` [n, n] they double the resolution.

    Args:
        x: [N, I, H, W], already multiplied by the style in the previous layer.
        prepared: :func:`prepare` of the weight, ``f`` and the dtype of ``x``.
        style: [N, I]; None: no demodulation.
        e: the epilogue; its d, shuffle, fir and pad are set here.
    """
    kernel, squares, phases = prepared
    filtered = f is not None and not phases
    x = conv2d(x, kernel, up=filtered)
    if filtered:
        n, k = f.shape[-1], kernel.shape[-1]  # padded as by NVIDIA's conv2d_resample and rosinality's Blur
        e = e._replace(fir=f, pad=((n + 1) // 2 + k // 2 - (k - 1), (n - 2) // 2 + k // 2 - (k - 2)))
    d = None if style is None else (style.square() @ squares.t() + 1e-8).rsqrt()
    return epilogue(x, e._replace(d=d, shuffle=phases))


def modulated_conv2d(
    x: Tensor, weight: Tensor, style: Tensor, demodulate: bool = True, f: Tensor | None = None
) -> Tensor:
    """Modulated convolution alone, StyleGAN2 eq. 1-3: ``w' = s_i w``, ``w'' = w' / sqrt(sum w'^2 + 1e-8)``.

    x: [N, I, H, W] in the dtype to compute in; weight: [O, I, k, k] float32, already scaled (equalised
    learning rate); style: [N, I] float32.
    """
    x, prepared = modulate(x, style), prepare(weight, f, x.dtype)
    return styled_conv2d(x, prepared, style if demodulate else None, f, Epilogue(slope=1, gain=1)).scaled[0]
