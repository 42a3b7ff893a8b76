"""The operators as Triton kernels, which Triton compiles at their first call, without nvcc.

Memory bandwidth limits everything here, so speed depends on how often an activation is read or written. A
frozen up-sampling layer, the layer after it and its RGB layer take 10 such passes forward and 12 backward,
instead of the reference's 33 and 50. An epilogue is one kernel, and its backward pass recomputes y. The layer
*before* multiplies by the style, because its epilogue has the activation in registers. (In float32
``upfirdn2d`` adds two passes each way, because the filter is not folded into the kernel.) The convolution
itself is cuDNN's.

Kernels compute in float32 whatever the tensors' dtype. Tensors are [N, C, H, W], dense in either memory
format: channels_last is kept, and tensors with other strides are copied. One channel of an image must have
fewer than 2^30 pixels.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cfclip.models.ops.frozen import check_frozen, check_images, conv2d, once
from cfclip.models.ops.reference import SQRT2, Epilogue, LayerOutput, at_least_float32

__all__ = ["bias_act", "conv2d", "epilogue", "upfirdn2d"]

TILES = 8
"""Tiles of 1024 elements that one program of a backward pass sums over before it writes its sums."""


@triton.jit
def offset_of(n, c, p, C, P, LAST: tl.constexpr):
    """Offset of (n, c, p) in [N, C, P], or in [N, P, C] if the channels are LAST. int64, because n is."""
    return (n * P + p) * C + c if LAST else (n * C + c) * P + p


@triton.jit
def _tile(P, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's image, channels [1, CHANNELS] and first pixel; a program has PIXELS of the P pixels."""
    program, blocks = tl.program_id(0), (P + PIXELS - 1) // PIXELS
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return (program // blocks).to(tl.int64), c, program % blocks * PIXELS


@triton.jit
def _places(n, c, p, C, H, W, LAST: tl.constexpr, SHUFFLE: tl.constexpr):
    """Input offset, pixel and output offset ([N, C, H, W]) of the p-th value of each channel.

    SHUFFLE: the input is [N, 4 C, H/2, W/2]. p counts the four phases of one input pixel, then those of the
    next, so that both input and output are accessed in whole cache lines.
    """
    if SHUFFLE:
        q, phase = p // 4, p % 4
        source = offset_of(n, 4 * c + phase, q, 4 * C, H * W // 4, LAST)
        pixel = (q // (W // 2) * 2 + phase // 2) * W + q % (W // 2) * 2 + phase % 2
    else:
        source = offset_of(n, c, p, C, H * W, LAST)
        pixel = p
    return source, pixel, offset_of(n, c, pixel, C, H * W, LAST)


@triton.jit
def _per_channel(values, n, c, C):
    """``values[n, c]`` of [N, C] in float32."""
    return tl.load(values + n * C + c, c < C, other=0).to(tl.float32)


@triton.jit
def _preactivation(value, n, c, pixel, inside, d, noise, bias, C, noise_step):
    """``value * d + noise + bias``."""
    if d is not None:
        value = value * _per_channel(d, n, c, C)
    if noise is not None:
        value = value + tl.load(noise + n * noise_step + pixel, inside, other=0).to(tl.float32)
    if bias is not None:
        value = value + tl.load(bias + c, c < C, other=0).to(tl.float32)
    return value


@triton.jit
def _clamped(value, clamp):
    if clamp is not None:  # minimum and maximum would drop a NaN
        value = tl.where(value > clamp, clamp, tl.where(value < -clamp, -clamp, value))
    return value


@triton.jit
def _epilogue(
    x, d, noise, bias, style0, style1, y0, y1,
    C, H, W, noise_step, slope, gain, clamp,
    LAST: tl.constexpr, SHUFFLE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n, c, first = _tile(H * W, PIXELS, CHANNELS)
    p = first + tl.arange(0, PIXELS)[:, None]
    inside = p < H * W
    source, pixel, target = _places(n, c, p, C, H, W, LAST, SHUFFLE)
    mask = inside & (c < C)
    value = tl.load(x + source, mask, other=0).to(tl.float32)
    pre = _preactivation(value, n, c, pixel, inside, d, noise, bias, C, noise_step)
    y = _clamped(tl.where(pre > 0, pre, pre * slope) * gain, clamp)
    if style0 is None:
        tl.store(y0 + target, y, mask)
    else:
        tl.store(y0 + target, y * _per_channel(style0, n, c, C), mask)
    if style1 is not None:
        tl.store(y1 + target, y * _per_channel(style1, n, c, C), mask)


@triton.jit
def _epilogue_backward(
    x, d, noise, bias, style0, style1, g0, g1, gx, sums,
    C, H, W, noise_step, slope, gain, clamp,
    LAST: tl.constexpr, SHUFFLE: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradient of x, and this program's share of the gradients of d and the styles: sums [3, programs, C].

    The activation is recomputed from x, which takes one read; keeping it would take another write and read.
    """
    n, c, first = _tile(H * W, PIXELS * TILES, CHANNELS)
    of_d = tl.full([PIXELS, CHANNELS], 0, tl.float32)
    of_style0, of_style1 = of_d, of_d
    for start in range(first, min(first + PIXELS * TILES, H * W), PIXELS):
        p = start + tl.arange(0, PIXELS)[:, None]
        inside = p < H * W
        source, pixel, target = _places(n, c, p, C, H, W, LAST, SHUFFLE)
        mask = inside & (c < C)
        value = tl.load(x + source, mask, other=0).to(tl.float32)
        pre = _preactivation(value, n, c, pixel, inside, d, noise, bias, C, noise_step)
        y = tl.where(pre > 0, pre, pre * slope) * gain
        g = tl.load(g0 + target, mask, other=0).to(tl.float32)
        if style0 is not None:
            of_style0 += g * _clamped(y, clamp)
            g = g * _per_channel(style0, n, c, C)
        if style1 is not None:
            other = tl.load(g1 + target, mask, other=0).to(tl.float32)
            of_style1 += other * _clamped(y, clamp)
            g += other * _per_channel(style1, n, c, C)
        if clamp is not None:
            g = tl.where(tl.abs(y) <= clamp, g, 0)
        g = tl.where(pre > 0, g, g * slope) * gain
        if d is not None:
            of_d += g * value
            g = g * _per_channel(d, n, c, C)
        tl.store(gx + source, g, mask)
    programs = tl.num_programs(0).to(tl.int64)
    share = sums + tl.program_id(0).to(tl.int64) * C + c
    if d is not None:
        tl.store(share, tl.sum(of_d, 0)[None, :], c < C)
    if style0 is not None:
        tl.store(share + programs * C, tl.sum(of_style0, 0)[None, :], c < C)
    if style1 is not None:
        tl.store(share + 2 * programs * C, tl.sum(of_style1, 0)[None, :], c < C)


@triton.jit
def _upfirdn2d(
    x, f, y, C, H, W, OUT_H, OUT_W, before_row, before_col, first_row, first_col, gain,
    UP: tl.constexpr, DOWN: tl.constexpr, FH: tl.constexpr, FW: tl.constexpr, FLIPPED: tl.constexpr,
    LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``y[i, j] = gain sum_ab f[FH-1-a, FW-1-b] z[DOWN i - top + a, DOWN j - left + b]``.

    z is x with UP - 1 zeros after every value; only taps that meet a value of x are read. FLIPPED: f[a, b].
    Because // needs non-negative numbers, the pads top and left are given as ``before = max(pad, 0)`` and
    ``first = UP before - pad``: where the filter starts, counted from ``UP before`` rows or columns before z.
    """
    n, c, first = _tile(OUT_H * OUT_W, PIXELS, CHANNELS)
    p = first + tl.arange(0, PIXELS)[:, None]
    mask = (p < OUT_H * OUT_W) & (c < C)
    top, left = p // OUT_W * DOWN + first_row, p % OUT_W * DOWN + first_col
    row, col = (top + UP - 1) // UP, (left + UP - 1) // UP
    tap_row, tap_col = row * UP - top, col * UP - left
    row, col = row - before_row, col - before_col
    total = tl.full([PIXELS, CHANNELS], 0, tl.float32)
    for i in tl.static_range((FH + UP - 1) // UP):
        for j in tl.static_range((FW + UP - 1) // UP):
            a, b = tap_row + i * UP, tap_col + j * UP
            valid = (row + i >= 0) & (row + i < H) & (col + j >= 0) & (col + j < W) & (a < FH) & (b < FW)
            tap = a * FW + b if FLIPPED else (FH - 1 - a) * FW + FW - 1 - b
            source = offset_of(n, c, (row + i) * W + col + j, C, H * W, LAST)
            value = tl.load(x + source, mask & valid, other=0)
            total += tl.load(f + tap, valid, other=0) * value.to(tl.float32)
    tl.store(y + offset_of(n, c, p, C, OUT_H * OUT_W, LAST), total * gain, mask)


def _dense(x: Tensor) -> tuple[Tensor, bool, torch.memory_format]:
    """``x`` made dense, whether its channels are last, and its memory format."""
    last = x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1
    return x if last else x.contiguous(), last, torch.channels_last if last else torch.contiguous_format


def _grid(n: int, c: int, pixels: int, last: bool, tiles: int = 1) -> tuple[tuple[int, int], dict]:
    """The grid over [N, C, pixels] with ``tiles`` tiles of 1024 elements per program; a tile's constants."""
    channels = min(32, triton.next_power_of_2(c)) if last else 4
    tile = {"LAST": last, "PIXELS": 1024 // channels, "CHANNELS": channels}
    return (n * triton.cdiv(pixels, tiles * tile["PIXELS"]), triton.cdiv(c, channels)), tile


def _pair(tensors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Up to two tensors, filled up with None."""
    return *tensors, *[None] * (2 - len(tensors))


class _Upfirdn2d(torch.autograd.Function):
    """Differentiable any number of times: the gradient is the same with up and down swapped and f flipped."""

    @staticmethod
    def forward(
        ctx, x: Tensor, f: Tensor, up: int, down: int, pad: Sequence[int], gain: float, flipped: bool
    ) -> Tensor:
        (n, c, h, w), (fh, fw), (left, right, top, bottom) = x.shape, f.shape, pad
        padded_h, padded_w = h * up + top + bottom, w * up + left + right
        out_h, out_w = (padded_h - fh) // down + 1, (padded_w - fw) // down + 1
        if min(out_h, out_w) < 1:
            raise ValueError(f"a filter of {fh} x {fw} does not fit into the padded {padded_h} x {padded_w}")
        x, last, layout = _dense(x)
        y = torch.empty((n, c, out_h, out_w), dtype=x.dtype, device=x.device, memory_format=layout)
        if y.numel():
            grid, tile = _grid(n, c, out_h * out_w, last)
            before = max(top, 0), max(left, 0)
            first = up * before[0] - top, up * before[1] - left
            constants = {"UP": up, "DOWN": down, "FH": fh, "FW": fw, "FLIPPED": flipped, **tile}
            with torch.cuda.device_of(x):
                _upfirdn2d[grid](x, f, y, c, h, w, out_h, out_w, *before, *first, gain, **constants)
        ctx.save_for_backward(f)
        after = h * up - up - out_h * down + top + 1, w * up - up - out_w * down + left + 1
        ctx.transposed = down, up, (fw - 1 - left, after[1], fh - 1 - top, after[0]), gain, not flipped
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Upfirdn2d.apply(gradient, *ctx.saved_tensors, *ctx.transposed), *[None] * 6


class _Epilogue(torch.autograd.Function):
    """The epilogue, differentiable once with respect to x, d and the styles; it takes at most two styles."""

    @staticmethod
    def forward(ctx, x: Tensor, d: Tensor | None, e: Epilogue, *styles: Tensor) -> tuple[Tensor, ...]:
        x, last, layout = _dense(x)
        n, c, h, w = x.shape
        if e.shuffle:
            c, h, w = c // 4, 2 * h, 2 * w
        d, bias, *styles = (None if t is None else t.contiguous() for t in (d, e.bias, *styles))
        noise = e.noise
        if noise is not None:
            noise = noise.expand(noise.shape[0] if noise.ndim == 4 else 1, 1, h, w).contiguous()
        ys = tuple(
            torch.empty((n, c, h, w), dtype=x.dtype, device=x.device, memory_format=layout)
            for _ in range(max(1, len(styles)))
        )
        noise_step = 0 if noise is None or len(noise) == 1 else h * w
        # floats, because Triton would compile another kernel for an int
        clamp = None if e.clamp is None else float(e.clamp)
        numbers = c, h, w, noise_step, float(e.slope), float(e.gain), clamp
        if x.numel():
            grid, tile = _grid(n, c, h * w, last)
            tensors = x, d, noise, bias, *_pair(styles), *_pair(ys)
            with torch.cuda.device_of(x):
                _epilogue[grid](*tensors, *numbers, SHUFFLE=e.shuffle, **tile)
        ctx.save_for_backward(x, d, noise, bias, *styles)
        ctx.last, ctx.layout, ctx.numbers, ctx.shuffle = last, layout, numbers, e.shuffle
        return ys

    @staticmethod
    @once
    def backward(ctx, *gradients: Tensor):
        x, d, noise, bias, *styles = ctx.saved_tensors
        (c, h, w, *_), n, of_x = ctx.numbers, len(x), torch.empty_like(x)
        grid, tile = _grid(n, c, h * w, ctx.last, TILES)
        sums = torch.empty((3, n, grid[0] // max(n, 1), c), dtype=torch.float32, device=x.device)
        if x.numel():
            gradients = [g.contiguous(memory_format=ctx.layout) for g in gradients]
            tensors = x, d, noise, bias, *_pair(styles), *_pair(gradients), of_x, sums
            with torch.cuda.device_of(x):
                _epilogue_backward[grid](*tensors, *ctx.numbers, SHUFFLE=ctx.shuffle, TILES=TILES, **tile)
        of_d = None if d is None else sums[0].sum(1).to(d.dtype)
        of_styles = [share.sum(1).to(s.dtype) for share, s in zip(sums[1:], styles, strict=False)]
        return of_x, of_d, None, *of_styles


def upfirdn2d(
    x: Tensor, f: Tensor, up: int = 1, down: int = 1, pad: Sequence[int] = (0, 0, 0, 0), gain: float = 1.0
) -> Tensor:
    """:func:`.reference.upfirdn2d` without the gradient of ``f``."""
    check_frozen(f=f)
    return _Upfirdn2d.apply(x, f.float().contiguous(), up, down, tuple(pad), float(gain), False)


def epilogue(x: Tensor, e: Epilogue) -> LayerOutput:
    """:func:`.reference.epilogue` for at most two readers, without gradients of constants."""
    check_frozen(noise=e.noise, bias=e.bias)
    check_images(x, e.d, *e.styles, e.rgb and e.rgb[1])
    if e.fir is not None:
        x = upfirdn2d(x, e.fir, pad=(*e.pad, *e.pad), gain=4.0)
    if e.rgb is None:
        return LayerOutput(_Epilogue.apply(x, e.d, e, *e.styles))
    weight, style = e.rgb
    *scaled, y = _Epilogue.apply(x, e.d, e, *e.styles, style)
    return LayerOutput(tuple(scaled), conv2d(y, weight.to(x.dtype)).to(at_least_float32(x.dtype)))


def bias_act(
    x: Tensor, bias: Tensor | None = None, slope: float = 0.2, gain: float = SQRT2, clamp: float | None = None
) -> Tensor:
    """:func:`.reference.bias_act` with a constant bias."""
    if x.ndim == 4:
        return epilogue(x, Epilogue(bias=bias, slope=slope, gain=gain, clamp=clamp)).scaled[0]
    images = x.reshape(*x.shape[:2], math.prod(x.shape[2:]), 1)
    return bias_act(images, bias, slope, gain, clamp).reshape(x.shape)
