"""Reference operators in plain torch: any device, any float dtype, differentiable twice."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SQRT2 = math.sqrt(2)


class Epilogue(NamedTuple):
    """What follows a layer's convolution: ``y = clamp(gain * leaky_relu(d * fir(x) + noise + bias, slope))``.

    x is the convolution's result [N, C, H, W]. y is then multiplied by the styles of the layers that read it.
    """

    d: Tensor | None = None  # demodulation coefficients [N, C]
    noise: Tensor | None = None  # broadcastable to [N, 1, H, W]
    bias: Tensor | None = None  # [C]
    slope: float = 0.2  # of the leaky ReLU; 1: linear
    gain: float = SQRT2
    clamp: float | None = None  # largest |y|
    styles: Sequence[Tensor] = ()  # [N, C] each, of the convolutions that read y
    shuffle: bool = False  # x holds the four phases of each channel instead, [N, 4 C, H / 2, W / 2]
    fir: Tensor | None = None  # filter [n, n] that is applied to x first, with a gain of 4
    pad: tuple[int, int] = (1, 1)  # padding of x for the filter: (before, after) in both directions
    # weight [K, C, 1, 1] and style [N, C] of the RGB layer that reads y
    rgb: tuple[Tensor, Tensor] | None = None


class LayerOutput(NamedTuple):
    """The output of a layer, prepared for the layers that read it."""

    scaled: tuple[Tensor, ...]  # y times each of the styles, [N, C, H, W] each; (y,) if nothing reads it
    rgb: Tensor | None = None  # the RGB layer's sum [N, K, H, W], at least float32


def setup_filter(taps: Sequence[float]) -> Tensor:
    """Separable ``taps`` (n) -> normalised 2-D FIR filter [n, n] that sums to 1."""
    f = torch.as_tensor(taps, dtype=torch.float32)
    f = torch.outer(f, f)
    return f / f.sum()


def upfirdn2d(
    x: Tensor, f: Tensor, up: int = 1, down: int = 1, pad: Sequence[int] = (0, 0, 0, 0), gain: float = 1.0
) -> Tensor:
    """Insert ``up - 1`` zeros after each pixel, pad, convolve with ``gain f``, keep every ``down``-th pixel.

    x: [N, C, H, W]; f: [h, w], flipped before it slides (a true convolution, as in StyleGAN2); pad: (left,
    right, top, bottom), negative numbers crop.
    """
    n, c, h, w = x.shape
    left, right, top, bottom = pad
    if up > 1:
        x = x.reshape(n, c, h, 1, w, 1)
        x = F.pad(x, (0, up - 1, 0, 0, 0, up - 1)).reshape(n, c, h * up, w * up)
    even = top == bottom >= 0 and left == right >= 0  # then the convolution itself pads, without a copy
    if not even:
        x = F.pad(x, (max(left, 0), max(right, 0), max(top, 0), max(bottom, 0)))
        x = x[:, :, max(-top, 0) : x.shape[2] - max(-bottom, 0), max(-left, 0) : x.shape[3] - max(-right, 0)]
    kernel = (f * gain).flip(0, 1).to(x.dtype)[None, None].expand(c, 1, -1, -1)
    return F.conv2d(x, kernel, groups=c, stride=down, padding=(top, left) if even else 0)


def bias_act(
    x: Tensor, bias: Tensor | None = None, slope: float = 0.2, gain: float = SQRT2, clamp: float | None = None
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
    """``F.conv2d`` with "same" padding; with ``up`` a transposed convolution of stride 2, border included.

    x: [N, I, H, W]; kernel: [O, I, k, k], k odd -> [N, O, H, W] or [N, O, 2 H + k - 2, 2 W + k - 2].
    """
    if up:
        return F.conv_transpose2d(x, kernel.transpose(0, 1), stride=2)
    return F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)


def modulate(x: Tensor, style: Tensor) -> Tensor:
    """x [N, C, H, W] times style [N, C] in the dtype of ``x``."""
    return x * style.to(x.dtype)[:, :, None, None]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def epilogue(x: Tensor, e: Epilogue) -> LayerOutput:
    """The rest of a layer after its convolution; see :class:`Epilogue` for the equation and the shapes."""
    if e.shuffle:
        x = F.pixel_shuffle(x, 2)
    if e.fir is not None:
        x = upfirdn2d(x, e.fir, pad=(*e.pad, *e.pad), gain=4.0)
    if e.d is not None:
        x = modulate(x, e.d)
    if e.noise is not None:
        x = x + e.noise.to(x.dtype)
    y = bias_act(x, e.bias, e.slope, e.gain, e.clamp)
    scaled = tuple(modulate(y, style) for style in e.styles)
    if e.rgb is None:
        return LayerOutput(scaled or (y,))
    weight, style = e.rgb
    return LayerOutput(scaled, conv2d(modulate(y, style), weight.to(y.dtype)).to(at_least_float32(y.dtype)))
