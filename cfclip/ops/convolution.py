"""The convolutions of StyleGAN2 (eq. 1-3) around cuDNN's or oneDNN's.

Modulation multiplies the *activations* by the styles and the *outputs* by the demodulation coefficients, which is the
same sum as the published per-sample weights but stays an ordinary convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import conv2d, epilogue, upfirdn2d
from .reference import modulate


def _upsampling_phases(weight: Tensor, f: Tensor) -> Tensor:
    """Stride-2 transposed convolution by ``weight`` [O, I, 3, 3], then FIR ``4 f``, as one 3x3 kernel per output phase.

    The composition is a single 6x6 transposed kernel; its four stride-2 phases are ordinary 3x3 convolutions, to be
    interleaved by ``pixel_shuffle``. Returns [4 * O, I, 3, 3].
    """
    o, i, k, _ = weight.shape
    n = f.shape[-1]
    full = F.conv2d(weight.reshape(o * i, 1, k, k), (4 * f).flip(0, 1).to(weight.dtype)[None, None], padding=n - 1)
    full = full.reshape(o, i, 6, 6)
    phases = full.reshape(o, i, 3, 2, 3, 2).flip(2, 4)             # taps of one phase, as a correlation
    return phases.permute(0, 3, 5, 1, 2, 4).reshape(4 * o, i, 3, 3)


def prepare(weight: Tensor, f: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What :func:`modulated_conv2d` needs of its weights alone, to be kept while they are frozen: the kernel that slides and sum w^2 [O, I].

    Making the phases of an up-sampling kernel costs more than the convolution of a few small pictures.
    """
    phased = f is not None and weight.shape[-1] == 3 and f.shape[-1] == 4
    kernel = (_upsampling_phases(weight, f) if phased else weight).to(dtype)
    if dtype in (torch.float16, torch.bfloat16):                   # as the activations are laid out there
        kernel = kernel.contiguous(memory_format=torch.channels_last)
    return kernel, weight.square().sum((2, 3))


def styled_conv2d(x: Tensor, prepared: tuple[Tensor, Tensor], style: Tensor | None, f: Tensor | None = None, **finish) -> tuple[Tensor, ...]:
    """Convolution and all that follows it, "same" padding; with a FIR filter ``f`` [n, n] it doubles the resolution.

    x: [N, I, H, W], times its ``style`` [N, I] already: whoever made it had it in hand; prepared: :func:`prepare` of the weight,
    ``f`` and the dtype of ``x``; style: None for no demodulation; finish: what :func:`epilogue` takes.
    Returns [N, O, H, W] or [N, O, 2 H, 2 W] once for each of the ``styles`` to come, multiplied by it, or once as it is.
    """
    kernel, squares = prepared
    phased = f is not None and kernel.shape[0] == 4 * squares.shape[0]
    if f is None or phased:
        x = conv2d(x, kernel)
    else:                                                          # a filter of another length: convolve, then filter
        x = F.conv_transpose2d(x, kernel.transpose(0, 1), stride=2)
        n, k = f.shape[-1], kernel.shape[-1]                       # pads as NVIDIA's conv2d_resample and rosinality's Blur do
        before, after = (n + 1) // 2 + k // 2 - (k - 1), (n - 2) // 2 + k // 2 - (k - 2)
        x = upfirdn2d(x, f, pad=(before, after, before, after), gain=4.0)
    d = None if style is None else (style.square() @ squares.t() + 1e-8).rsqrt()
    return epilogue(x, d, shuffle=phased, **finish)


def modulated_conv2d(x: Tensor, weight: Tensor, style: Tensor, demodulate: bool = True, f: Tensor | None = None,
                     prepared: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Modulated convolution alone.

    x: [N, I, H, W] in the dtype to compute in; weight: [O, I, k, k] fp32, equalised already; style: [N, I] fp32;
    prepared: :func:`prepare` of the same weight, f and dtype.
    StyleGAN2 eq. 1-3: ``w' = s_i w``, ``w'' = w' / sqrt(sum w'^2 + 1e-8)``.
    """
    prepared = prepared or prepare(weight, f, x.dtype)
    return styled_conv2d(modulate(x, style), prepared, style if demodulate else None, f, slope=1, gain=1)[0]
