"""Reference operators in plain torch: any device, any float dtype, differentiable twice."""

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


def upfirdn2d(
    x: Tensor, f: Tensor, up: int = 1, down: int = 1, pad: Sequence[int] = (0, 0, 0, 0), gain: float = 1.0
) -> Tensor:
    """Insert ``up - 1`` zeros, pad (left, right, top, bottom; negative crops), convolve with ``f``, keep every ``down``-th.

    x: [N, C, H, W]; f: [h, w]. A true convolution, as in StyleGAN2: ``f`` is flipped before it slides.
    """
    n, c, h, w = x.shape
    left, right, top, bottom = pad
    if up > 1:
        x = x.reshape(n, c, h, 1, w, 1)
        x = F.pad(x, (0, up - 1, 0, 0, 0, up - 1)).reshape(n, c, h * up, w * up)
    even = top == bottom >= 0 and left == right >= 0  # then the convolution pads by itself, without a copy
    if not even:
        x = F.pad(x, (max(left, 0), max(right, 0), max(top, 0), max(bottom, 0)))
        x = x[:, :, max(-top, 0) : x.shape[2] - max(-bottom, 0), max(-left, 0) : x.shape[3] - max(-right, 0)]
    kernel = (f * gain).flip(0, 1).to(x.dtype)[None, None].expand(c, 1, -1, -1)
    return F.conv2d(x, kernel, groups=c, stride=down, padding=(top, left) if even else 0)


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    slope: float = 0.2,
    gain: float = math.sqrt(2),
    clamp: float | None = None,
) -> Tensor:
    """``clamp(gain * leaky_relu(x + bias, slope))``; ``slope=1`` is linear. x: [N, C, ...], bias: [C]."""
    if bias is not None:
        x = x + bias.to(x.dtype).reshape(1, -1, *[1] * (x.ndim - 2))
    if slope != 1:
        x = F.leaky_relu(x, slope)
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def conv2d(x: Tensor, kernel: Tensor, up: bool = False) -> Tensor:
    """``F.conv2d`` with "same" padding, or ``up``: its transpose with stride 2, which keeps all of the border.

    x: [N, I, H, W]; kernel: [O, I, k, k], k odd -> [N, O, H, W] or [N, O, 2 H + k - 2, 2 W + k - 2].
    """
    if up:
        return F.conv_transpose2d(x, kernel.transpose(0, 1), stride=2)
    return F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)


def modulate(x: Tensor, style: Tensor) -> Tensor:
    """x [N, C, H, W] times style [N, C] in the dtype of ``x``."""
    return x * style.to(x.dtype)[:, :, None, None]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def epilogue(
    x: Tensor,
    d: Tensor | None = None,
    noise: Tensor | None = None,
    bias: Tensor | None = None,
    slope: float = 0.2,
    gain: float = math.sqrt(2),
    clamp: float | None = None,
    styles: Sequence[Tensor] = (),
    shuffle: bool = False,
    fir: Tensor | None = None,
    pad: tuple[int, int] = (1, 1),
    rgb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """What is left of a layer after its convolution: ``y = bias_act(4 fir * x d + noise, bias, slope, gain, clamp)``.

    x: [N, C, H, W], or with ``shuffle`` the four phases of each channel, [N, 4 C, H / 2, W / 2], or with a filter ``fir`` [n, n] what it
    makes [N, C, H, W] of when padded by ``pad`` (before, after); d: [N, C], the demodulation coefficients; noise: broadcastable to
    [N, 1, H, W]; styles: [N, C] each, of the convolutions that read y; rgb: weight [K, C, 1, 1] and style [N, C] of the RGB layer that does.
    Returns y multiplied by each of ``styles``, and last the RGB layer's sum [N, K, H, W], at least float32; (y,) where nothing reads it.
    """
    if shuffle:
        x = F.pixel_shuffle(x, 2)
    if fir is not None:
        x = upfirdn2d(x, fir, pad=(*pad, *pad), gain=4.0)
    if d is not None:
        x = modulate(x, d)
    if noise is not None:
        x = x + noise.to(x.dtype)
    x = bias_act(x, bias, slope, gain, clamp)
    read = tuple(modulate(x, style) for style in styles)
    if rgb is not None:
        weight, style = rgb
        read += (conv2d(modulate(x, style), weight.to(x.dtype)).to(at_least_float32(x.dtype)),)
    return read or (x,)
