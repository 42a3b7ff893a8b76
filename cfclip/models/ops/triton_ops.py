"""The operators as Triton kernels, which Triton compiles at their first call without nvcc.

Everything here is bound by memory, so what counts is how often a pass reads (r) or writes (w) an activation. For an up-sampling layer,
the layer after it and the RGB layer that reads the latter too, frozen, without a clamp::

                          reference                                                         here
    up-sampling, forward  modulate, convolve, shuffle, demodulate, noise, bias, ReLU, gain  convolve, epilogue         rw each
    plain, forward        the same without the shuffle                                      convolve rw, epilogue rww
    RGB, forward          modulate rw, convolve r                                           convolve r
    up-sampling, backward gain rw, ReLU rrw, demodulation rw and rrw, r, shuffle rw,        epilogue rrw, convolve rw
                          convolve rw, modulation rw and rrw, r
    plain, backward       the same without the shuffle                                      epilogue rrrw, convolve rw
    RGB, backward         convolve w, modulation rw and rrw, r; rrw adds the two readers'   convolve w
    forward + backward    33 + 50                                                           10 + 12

The up-sampling layer's filter is folded into its kernel there; in float32, where it never is, ``upfirdn2d`` adds rw to each of its passes.
That is why the layer *before* multiplies by the style: its epilogue has the activation in registers. The convolution itself is cuDNN's.
Numbers are float32 inside, whatever the tensors are. Tensors are [N, C, H, W], dense in either memory format (channels_last
stays so; other strides are copied). Offsets are int64; one channel of one image must have fewer than 2^30 pixels.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cfclip.models.ops.frozen import check_frozen, check_images, conv2d, once
from cfclip.models.ops.reference import at_least_float32

__all__ = ["bias_act", "conv2d", "epilogue", "upfirdn2d"]

TILES = 8
"""Tiles of 1024 elements that one program of a backward pass sums up before it writes its sums."""


@triton.jit
def _offset(n, c, p, C, P, LAST: tl.constexpr):
    """Of element (n, c, p) in [N, C, P] pixels, or in [N, P, C] if the channels are LAST. n is int64, and so is all that follows from it."""
    return (n * P + p) * C + c if LAST else (n * C + c) * P + p


@triton.jit
def _tile(P, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's image, its channels [1, CHANNELS] and its first pixel, where a program has ``PIXELS`` of P."""
    program, blocks = tl.program_id(0), (P + PIXELS - 1) // PIXELS
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return (program // blocks).to(tl.int64), c, program % blocks * PIXELS


@triton.jit
def _places(n, c, p, C, H, W, LAST: tl.constexpr, SHUFFLE: tl.constexpr):
    """Offset in the input, pixel and offset in the output [N, C, H, W] of the p-th value of each channel.

    SHUFFLE: the input is [N, 4 C, H/2, W/2]; p counts the four phases of an input pixel, then the next pixel, so that both sides
    are touched in whole cache lines.
    """
    if SHUFFLE:
        q, phase = p // 4, p % 4
        source = _offset(n, 4 * c + phase, q, 4 * C, H * W // 4, LAST)
        pixel = (q // (W // 2) * 2 + phase // 2) * W + q % (W // 2) * 2 + phase % 2
    else:
        source = _offset(n, c, p, C, H * W, LAST)
        pixel = p
    return source, pixel, _offset(n, c, pixel, C, H * W, LAST)


@triton.jit
def _preactivation(value, n, c, pixel, inside, d, noise, bias, C, noise_step):
    """``value * d + noise + bias``."""
    if d is not None:
        value = value * tl.load(d + n * C + c, c < C, other=0).to(tl.float32)
    if noise is not None:
        value = value + tl.load(noise + n * noise_step + pixel, inside, other=0).to(tl.float32)
    if bias is not None:
        value = value + tl.load(bias + c, c < C, other=0).to(tl.float32)
    return value


@triton.jit
def _clamped(value, clamp):
    if clamp is not None:  # not minimum and maximum, which lose a NaN
        value = tl.where(value > clamp, clamp, tl.where(value < -clamp, -clamp, value))
    return value


@triton.jit
def _epilogue(
    x,
    d,
    noise,
    bias,
    style0,
    style1,
    y0,
    y1,
    C,
    H,
    W,
    noise_step,
    slope,
    gain,
    clamp,
    LAST: tl.constexpr,
    SHUFFLE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    n, c, first = _tile(H * W, PIXELS, CHANNELS)
    p = first + tl.arange(0, PIXELS)[:, None]
    inside = p < H * W
    source, pixel, target = _places(n, c, p, C, H, W, LAST, SHUFFLE)
    mask = inside & (c < C)
    pre = _preactivation(
        tl.load(x + source, mask, other=0).to(tl.float32), n, c, pixel, inside, d, noise, bias, C, noise_step
    )
    y = _clamped(tl.where(pre > 0, pre, pre * slope) * gain, clamp)
    if style0 is None:
        tl.store(y0 + target, y, mask)
    else:
        tl.store(y0 + target, y * tl.load(style0 + n * C + c, c < C, other=0).to(tl.float32), mask)
    if style1 is not None:
        tl.store(y1 + target, y * tl.load(style1 + n * C + c, c < C, other=0).to(tl.float32), mask)


@triton.jit
def _epilogue_backward(
    x,
    d,
    noise,
    bias,
    style0,
    style1,
    g0,
    g1,
    gx,
    sums,
    C,
    H,
    W,
    noise_step,
    slope,
    gain,
    clamp,
    LAST: tl.constexpr,
    SHUFFLE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Gradient of x, and this program's share of the gradients of d and the styles: sums [3, programs, C].

    The activation is computed again from x, which is one read; to keep it as well would be one more write and read.
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
            g = g * tl.load(style0 + n * C + c, c < C, other=0).to(tl.float32)
        if style1 is not None:
            other = tl.load(g1 + target, mask, other=0).to(tl.float32)
            of_style1 += other * _clamped(y, clamp)
            g += other * tl.load(style1 + n * C + c, c < C, other=0).to(tl.float32)
        if clamp is not None:
            g = tl.where(tl.abs(y) <= clamp, g, 0)
        g = tl.where(pre > 0, g, g * slope) * gain
        if d is not None:
            of_d += g * value
            g = g * tl.load(d + n * C + c, c < C, other=0).to(tl.float32)
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
    x,
    f,
    y,
    C,
    H,
    W,
    OUT_H,
    OUT_W,
    before_row,
    before_col,
    first_row,
    first_col,
    gain,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    FH: tl.constexpr,
    FW: tl.constexpr,
    FLIPPED: tl.constexpr,
    LAST: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """``y[i, j] = gain sum_ab f[FH-1-a, FW-1-b] z[DOWN i - top + a, DOWN j - left + b]``, z = x with UP - 1 zeros after every value.

    Only every UP-th tap meets a value of x, and only those are read. FLIPPED: ``f[a, b]`` instead. As // is for naturals, the
    pads top and left come as ``before = max(pad, 0)`` and ``first = UP before - pad``: z's first row, counted from ``before`` values above it.
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
            value = tl.load(x + _offset(n, c, (row + i) * W + col + j, C, H * W, LAST), mask & valid, other=0)
            total += tl.load(f + tap, valid, other=0) * value.to(tl.float32)
    tl.store(y + _offset(n, c, p, C, OUT_H * OUT_W, LAST), total * gain, mask)


def _dense(x: Tensor) -> tuple[Tensor, bool, torch.memory_format]:
    """``x`` dense, whether its channels lie last, and the memory format."""
    last = x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1
    return x if last else x.contiguous(), last, torch.channels_last if last else torch.contiguous_format


def _grid(n: int, c: int, pixels: int, last: bool, tiles: int = 1) -> tuple[tuple[int, int], dict]:
    """The programs that cover [N, C, pixels], ``tiles`` tiles of 1024 elements each, and the tile as a kernel's constants."""
    channels = min(32, triton.next_power_of_2(c)) if last else 4
    tile = {"LAST": last, "PIXELS": 1024 // channels, "CHANNELS": channels}
    return (n * triton.cdiv(pixels, tiles * tile["PIXELS"]), triton.cdiv(c, channels)), tile


def _two(tensors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    return *tensors, *[None] * (2 - len(tensors))


class _Upfirdn2d(torch.autograd.Function):
    """Linear, and its own gradient with ``up`` and ``down`` exchanged and the filter flipped: differentiable any number of times."""

    @staticmethod
    def forward(
        ctx, x: Tensor, f: Tensor, up: int, down: int, pad: Sequence[int], gain: float, flipped: bool
    ) -> Tensor:
        (n, c, h, w), (fh, fw), (left, right, top, bottom) = x.shape, f.shape, pad
        out_h, out_w = (h * up + top + bottom - fh) // down + 1, (w * up + left + right - fw) // down + 1
        if min(out_h, out_w) < 1:
            raise ValueError(
                f"a filter of {fh} x {fw} does not fit into the padded input of {h * up + top + bottom} x {w * up + left + right}"
            )
        x, last, layout = _dense(x)
        y = torch.empty((n, c, out_h, out_w), dtype=x.dtype, device=x.device, memory_format=layout)
        if y.numel():
            grid, tile = _grid(n, c, out_h * out_w, last)
            with torch.cuda.device_of(x):
                _upfirdn2d[grid](
                    x,
                    f,
                    y,
                    c,
                    h,
                    w,
                    out_h,
                    out_w,
                    max(top, 0),
                    max(left, 0),
                    up * max(top, 0) - top,
                    up * max(left, 0) - left,
                    gain,
                    UP=up,
                    DOWN=down,
                    FH=fh,
                    FW=fw,
                    FLIPPED=flipped,
                    **tile,
                )
        ctx.save_for_backward(f)
        after = h * up - up - out_h * down + top + 1, w * up - up - out_w * down + left + 1
        ctx.transposed = down, up, (fw - 1 - left, after[1], fh - 1 - top, after[0]), gain, not flipped
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Upfirdn2d.apply(gradient, *ctx.saved_tensors, *ctx.transposed), *[None] * 6


class _Epilogue(torch.autograd.Function):
    """Differentiable once with respect to x, d and the styles."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        d: Tensor | None,
        noise: Tensor | None,
        bias: Tensor | None,
        slope: float,
        gain: float,
        clamp: float | None,
        shuffle: bool,
        *styles: Tensor,
    ) -> tuple[Tensor, ...]:
        x, last, layout = _dense(x)
        n, c, h, w = x.shape
        if shuffle:
            c, h, w = c // 4, 2 * h, 2 * w
        d, bias, *styles = (None if t is None else t.contiguous() for t in (d, bias, *styles))
        if noise is not None:
            noise = noise.expand(noise.shape[0] if noise.ndim == 4 else 1, 1, h, w).contiguous()
        ys = tuple(
            torch.empty((n, c, h, w), dtype=x.dtype, device=x.device, memory_format=layout)
            for _ in range(max(1, len(styles)))
        )
        numbers = c, h, w, 0 if noise is None or len(noise) == 1 else h * w, slope, gain, clamp
        if x.numel():
            grid, tile = _grid(n, c, h * w, last)
            with torch.cuda.device_of(x):
                _epilogue[grid](
                    x, d, noise, bias, *_two(styles), *_two(ys), *numbers, SHUFFLE=shuffle, **tile
                )
        ctx.save_for_backward(x, d, noise, bias, *styles)
        ctx.last, ctx.layout, ctx.numbers, ctx.shuffle = last, layout, numbers, shuffle
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
            with torch.cuda.device_of(x):
                _epilogue_backward[grid](
                    x,
                    d,
                    noise,
                    bias,
                    *_two(styles),
                    *_two(gradients),
                    of_x,
                    sums,
                    *ctx.numbers,
                    SHUFFLE=ctx.shuffle,
                    TILES=TILES,
                    **tile,
                )
        of_d = None if d is None else sums[0].sum(1).to(d.dtype)
        return (
            of_x,
            of_d,
            *[None] * 6,
            *[share.sum(1).to(s.dtype) for share, s in zip(sums[1:], styles, strict=False)],
        )


def upfirdn2d(
    x: Tensor, f: Tensor, up: int = 1, down: int = 1, pad: Sequence[int] = (0, 0, 0, 0), gain: float = 1.0
) -> Tensor:
    """:func:`cfclip.ops.reference.upfirdn2d`, but for gradients of ``f``."""
    check_frozen(f=f)
    return _Upfirdn2d.apply(x, f.float().contiguous(), up, down, tuple(pad), float(gain), False)


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
    """:func:`cfclip.ops.reference.epilogue` for two readers at most, but for gradients of what is frozen."""
    check_frozen(noise=noise, bias=bias)
    check_images(x, d, *styles, rgb and rgb[1])
    if fir is not None:
        x = upfirdn2d(x, fir, pad=(*pad, *pad), gain=4.0)
    readers = styles if rgb is None else (*styles, rgb[1])
    read = _Epilogue.apply(
        x,
        d,
        noise,
        bias,
        float(slope),
        float(gain),
        None if clamp is None else float(clamp),
        shuffle,
        *readers,
    )
    if rgb is None:
        return read
    return *read[:-1], conv2d(read[-1], rgb[0].to(x.dtype)).to(at_least_float32(x.dtype))


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    slope: float = 0.2,
    gain: float = math.sqrt(2),
    clamp: float | None = None,
) -> Tensor:
    """:func:`cfclip.ops.reference.bias_act` of a constant bias: an :func:`epilogue` of nothing else."""
    if x.ndim == 4:
        return epilogue(x, bias=bias, slope=slope, gain=gain, clamp=clamp)[0]
    return bias_act(x.reshape(*x.shape[:2], math.prod(x.shape[2:]), 1), bias, slope, gain, clamp).reshape(
        x.shape
    )
