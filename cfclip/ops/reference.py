"""Reference operators in plain torch: any device, any float dtype, differentiable twice.

Modulation multiplies the *activations* by the styles and the *outputs* by the demodulation coefficients, which is the
same sum as the published per-sample weights (StyleGAN2, eq. 1-3) but stays an ordinary convolution.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def setup_filter(taps: Sequence[float]) -> Tensor:
    """Separable ``taps`` (n) -> normalised 2-D FIR filter [n, n] that sums to 1."""
    f = torch.as_tensor(taps, dtype=torch.float32)
    f = torch.outer(f, f)
    return f / f.sum()


def upfirdn2d(x: Tensor, f: Tensor, up: int = 1, down: int = 1, pad: Sequence[int] = (0, 0, 0, 0), gain: float = 1.0) -> Tensor:
    """Insert ``up - 1`` zeros, pad (left, right, top, bottom; negative crops), convolve with ``f``, keep every ``down``-th.

    x: [N, C, H, W]; f: [h, w]. A true convolution, as in StyleGAN2: ``f`` is flipped before it slides.
    """
    n, c, h, w = x.shape
    left, right, top, bottom = pad
    if up > 1:
        x = x.reshape(n, c, h, 1, w, 1)
        x = F.pad(x, (0, up - 1, 0, 0, 0, up - 1)).reshape(n, c, h * up, w * up)
    x = F.pad(x, (max(left, 0), max(right, 0), max(top, 0), max(bottom, 0)))
    x = x[:, :, max(-top, 0):x.shape[2] - max(-bottom, 0), max(-left, 0):x.shape[3] - max(-right, 0)]
    kernel = (f * gain).flip(0, 1).to(x.dtype)[None, None].expand(c, 1, -1, -1)
    return F.conv2d(x, kernel, groups=c, stride=down)


def bias_act(x: Tensor, bias: Tensor | None = None, slope: float = 0.2, gain: float = math.sqrt(2), clamp: float | None = None) -> Tensor:
    """``clamp(gain * leaky_relu(x + bias, slope))``; ``slope=1`` is linear. x: [N, C, ...], bias: [C]."""
    if bias is not None:
        x = x + bias.to(x.dtype).reshape(1, -1, *[1] * (x.ndim - 2))
    if slope != 1:
        x = F.leaky_relu(x, slope)
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


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


def modulated_conv2d(x: Tensor, weight: Tensor, style: Tensor, demodulate: bool = True, f: Tensor | None = None,
                     prepared: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Modulated convolution, "same" padding; with a FIR filter ``f`` [n, n] it doubles the resolution.

    x: [N, I, H, W] in the dtype to compute in; weight: [O, I, k, k] fp32, equalised already; style: [N, I] fp32;
    prepared: :func:`prepare` of the same weight, f and dtype.
    StyleGAN2 eq. 1-3: ``w' = s_i w``, ``w'' = w' / sqrt(sum w'^2 + 1e-8)``.
    """
    dtype = x.dtype
    kernel, squares = prepared or prepare(weight, f, dtype)
    x = x * style.to(dtype)[:, :, None, None]
    if f is None:
        x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
    elif kernel.shape[0] == 4 * weight.shape[0]:
        x = F.pixel_shuffle(F.conv2d(x, kernel, padding=1), 2)
    else:                                                          # a filter of another length: convolve, then filter
        x = F.conv_transpose2d(x, kernel.transpose(0, 1), stride=2)
        n, k = f.shape[-1], kernel.shape[-1]                       # pads as NVIDIA's conv2d_resample and rosinality's Blur do
        before, after = (n + 1) // 2 + k // 2 - (k - 1), (n - 2) // 2 + k // 2 - (k - 2)
        x = upfirdn2d(x, f, pad=(before, after, before, after), gain=4.0)
    if demodulate:
        d = (style.square() @ squares.t() + 1e-8).rsqrt()
        x = x * d.to(dtype)[:, :, None, None]
    return x
