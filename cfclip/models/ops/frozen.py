"""The operators of a frozen generator in plain torch, on any device, differentiable once: a layer keeps one activation for its backward pass.

Autograd on :mod:`.reference` keeps what went into a convolution, what came out of it, and what went into the leaky ReLU, and writes a
new tensor for every factor and summand. Here the epilogue keeps y alone: its sign tells the slope, and the gradients of d and of the
styles are sums over products with it. It works through its tensors piece by piece, in float32 whatever they are: a piece stays in the
processor's cache from the first factor to the last reader, and a half-precision layer is rounded once. The gradient of d is a difference of
such sums: with a bias a hundred times what the convolution gives, two more of its digits go than in the reference.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.models.ops import reference
from cfclip.models.ops.reference import at_least_float32, bias_act, upfirdn2d

__all__ = ["bias_act", "conv2d", "epilogue", "upfirdn2d"]  # the first and the last are small: as they are

PIECE = 2**18
"""Elements of a piece on a CPU: with what is made of it, about what a second-level cache holds."""


def check_frozen(**tensors: Tensor | None) -> None:
    """NotImplementedError that names the first of ``tensors`` that asks for a gradient."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"the operators of a frozen generator give no gradient of {name}: cfclip.ops.using('reference') does"
            )


def check_images(x: Tensor, *of_images: Tensor | None) -> None:
    """ValueError if one of ``of_images`` is not of as many pictures as ``x``: nothing is broadcast here."""
    if counts := {len(t) for t in of_images if t is not None} - {len(x)}:
        raise ValueError(
            f"d and the styles must be of {len(x)} pictures as x is, not of {', '.join(map(str, sorted(counts)))}"
        )


def once(backward: Callable) -> Callable:
    """A backward pass that cannot be differentiated itself, and says so as soon as that is prepared.

    (torch's once_differentiable says so in ``.backward()`` alone; ``autograd.grad`` goes past it to a wrong number.)
    """

    @wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the operators of a frozen generator are differentiable once, and create_graph=True asks for more: "
                "cfclip.ops.using('reference') gives it"
            )
        return backward(ctx, *grads)

    return checked


def _layout(x: Tensor) -> torch.memory_format:
    """channels_last if that is how ``x`` [N, C, H, W] lies."""
    return (
        torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kernel: Tensor, up: bool) -> Tensor:
        ctx.save_for_backward(kernel)
        ctx.size, ctx.layout, ctx.up = x.shape, _layout(x), up
        return reference.conv2d(x, kernel, up)

    @staticmethod
    @once
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (kernel,) = ctx.saved_tensors
        if ctx.up:  # the gradient of a transposed convolution is the convolution
            return F.conv2d(grad, kernel.transpose(0, 1), stride=2), None, None
        like_x = torch.empty(
            ctx.size, dtype=grad.dtype, device=grad.device, memory_format=ctx.layout
        )  # only its layout is looked at
        padding = [kernel.shape[-1] // 2] * 2
        of_x = torch.ops.aten.convolution_backward(
            grad, like_x, kernel, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, False, False]
        )[0]
        return of_x, None, None


def conv2d(x: Tensor, kernel: Tensor, up: bool = False) -> Tensor:
    """:func:`.reference.conv2d`, but for gradients of ``kernel``; keeps no x."""
    check_frozen(kernel=kernel)
    if torch.is_autocast_enabled(x.device.type):  # it chooses the dtype inside
        return reference.conv2d(x, kernel, up)
    return _Convolution.apply(x, kernel, up)


def _groups(x: Tensor, size: int) -> Iterator[slice]:
    """Images of [N, C, H, W] that are worked on together: as many as ``size`` elements hold, or one."""
    n, whole = len(x), max(1, x[:1].numel())
    step = max(1, size // whole)
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _pieces(x: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Channels and rows of ``x`` [N, C, H, W] that lie together in memory, about ``size`` elements of all images."""
    n, c, h, w = x.shape
    last = _layout(x) == torch.channels_last
    channels = c if last else max(1, min(c, size // max(1, n * h * w)))
    rows = max(1, min(h, size // max(1, n * channels * w)))
    return (
        (slice(i, min(i + channels, c)), slice(j, min(j + rows, h)))
        for i in range(0, c, channels)
        for j in range(0, h, rows)
    )


def _size(x: Tensor) -> int:
    """How many elements make a piece; a GPU has no use for pieces."""
    return PIECE if x.device.type == "cpu" else x.numel() + 1


def _write_product(a: Tensor, factor: Tensor, out: Tensor) -> None:
    """``out[:] = a * factor``. Where it is rounded as well, ``torch.mul(out=)`` takes five times as long as a product and a copy."""
    if out.dtype == a.dtype:
        torch.mul(a, factor, out=out)
    else:
        out.copy_(a * factor)


class _Epilogue(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, d, noise, bias, slope, gain, clamp, shuffle, fir, pad, mixing, *styles):
        """mixing: the RGB layer's weight times its style, [N, K, C], or None."""
        exact, ctx.size = at_least_float32(x.dtype), x.shape
        if shuffle:
            x = F.pixel_shuffle(x, 2)
        n, c, h, w = (
            (*x.shape[:2], *(s + sum(pad) + 1 - fir.shape[-1] for s in x.shape[2:]))
            if fir is not None
            else x.shape
        )
        shape = {"size": (n, c, h, w), "device": x.device, "memory_format": _layout(x)}
        keep = any(ctx.needs_input_grad) or (
            not styles and mixing is None
        )  # for the backward pass, or as the result
        y = torch.empty(dtype=x.dtype, **shape) if keep else None
        read = [torch.empty(dtype=x.dtype, **shape) for _ in styles]
        picture = (
            None if mixing is None else torch.zeros((n, mixing.shape[1], h, w), dtype=exact, device=x.device)
        )
        factor, bias_gain = (
            (d * gain)[:, :, None, None],
            (bias * gain)[:, None, None],
        )  # gain lrelu(a) = lrelu(gain a), and it is free here
        noise_gain = None if noise is None else (noise * gain).expand(n, 1, h, w)
        # as y has it: what is clamped, and nothing else, is that large
        ctx.clamp = None if clamp is None else torch.tensor(clamp, dtype=x.dtype).item()
        below = None if clamp is None else ctx.clamp * (1 - torch.finfo(x.dtype).eps)
        for images in _groups(x, _size(x)):
            part = x[images]
            if fir is not None:
                part = upfirdn2d(part.to(exact), fir, pad=(*pad, *pad), gain=4.0)
            for channels, rows in _pieces(part, _size(x)):
                piece, here = part[:, channels, rows], (images, channels, rows)
                a = torch.mul(
                    piece,
                    factor[images, channels],
                    out=y[here] if y is not None and x.dtype == exact else None,
                )
                if noise is not None:
                    a += noise_gain[images, :, rows]
                a += bias_gain[channels]
                if slope != 1:
                    F.leaky_relu_(a, slope)
                free = None
                if clamp is not None:
                    free = a.abs() < clamp
                    a.clamp_(-clamp, clamp)
                if y is not None and x.dtype != exact:
                    y[here] = a if free is None else torch.where(free, a.clamp(-below, below), a)
                for target, style in zip(read, styles, strict=True):
                    _write_product(a, style[images, channels, None, None], target[here])
                if picture is not None:
                    picture[images, :, rows] += torch.einsum(
                        "nkc,nchw->nkhw", mixing[images, :, channels].to(exact), a
                    )
        ctx.slope, ctx.gain, ctx.shuffle, ctx.fir, ctx.pad = slope, gain, shuffle, fir, pad
        ctx.save_for_backward(y, d, noise, bias, mixing, *styles)
        return (*read, picture) if picture is not None else tuple(read) or (y,)

    @staticmethod
    @once
    def backward(ctx, *grads):
        y, d, noise, bias, mixing, *styles = ctx.saved_tensors
        exact, (n, c, h, w) = at_least_float32(y.dtype), y.shape
        of_picture = None
        if mixing is not None:
            *grads, of_picture = grads
        of_mixing = None if mixing is None else torch.zeros(mixing.shape, dtype=exact, device=y.device)
        with_a, with_one, with_noise, *along = torch.zeros(
            (3 + len(grads), n, c), dtype=exact, device=y.device
        )  # along: dy . y, reader by reader
        factor, of_x = (d * ctx.gain)[:, :, None, None], torch.empty_like(y)
        noise = None if noise is None else noise.to(exact).expand(n, 1, h, w)
        for images in _groups(y, _size(y)):
            for channels, rows in _pieces(y[images], _size(y)):
                here = images, channels, rows
                out, grad = y[here].to(exact), None
                for i, g in enumerate(grads):
                    g = g[here].to(exact)
                    along[i][images, channels] += (g * out).sum((2, 3))
                    g = g * styles[i][images, channels, None, None] if styles else g.clone()
                    grad = g if grad is None else grad.add_(g)
                if mixing is not None:
                    g = of_picture[images, :, rows]
                    of_mixing[images, :, channels] += torch.einsum("nkhw,nchw->nkc", g, out)
                    g = torch.einsum("nkc,nkhw->nchw", mixing[images, :, channels].to(exact), g)
                    grad = g if grad is None else grad.add_(g)
                if ctx.clamp is not None:
                    grad.masked_fill_(out.abs() >= ctx.clamp, 0)
                    with_a[images, channels] += (grad * out).sum((2, 3))
                if ctx.slope != 1:
                    torch.ops.aten.leaky_relu_backward.grad_input(grad, out, ctx.slope, True, grad_input=grad)
                if ctx.needs_input_grad[1]:
                    with_one[images, channels] += grad.sum((2, 3))
                    if noise is not None:
                        with_noise[images, channels] += torch.einsum(
                            "nchw,nhw->nc", grad, noise[images, 0, rows]
                        )
                _write_product(grad, factor[images, channels], of_x[here])
        # y = lrelu(a) with a = gain (x d + noise + bias): da . x = (da . a / gain - da . noise - bias sum da) / d, and da . a = dy . y
        if ctx.clamp is None:
            with_a = (
                sum(part * style for part, style in zip(along, styles, strict=True)) if styles else sum(along)
            )
            with_a = with_a if mixing is None else with_a + (of_mixing * mixing).sum(1)
        of_d = (with_a - ctx.gain * (with_noise + bias * with_one)) / d
        if ctx.fir is not None:
            before, after = (ctx.fir.shape[-1] - 1 - p for p in ctx.pad)
            of_x = upfirdn2d(of_x, ctx.fir.flip(0, 1), pad=(before, after, before, after), gain=4.0)
        if ctx.shuffle:
            of_x = (
                F.pixel_unshuffle(of_x, 2) if of_x.numel() else of_x.reshape(ctx.size)
            )  # of no pictures torch makes another shape
        return (
            of_x,
            of_d,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            of_mixing,
            *(along if styles else ()),
        )


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
    """:func:`.reference.epilogue`, but for gradients of what is frozen. (What is no layer of StyleGAN2 the reference does.)"""
    weight, style = rgb or (None, None)
    check_frozen(noise=noise, bias=bias, fir=fir, weight=weight)
    check_images(x, d, style, *styles)
    if d is None or bias is None or gain < 0:
        return reference.epilogue(x, d, noise, bias, slope, gain, clamp, styles, shuffle, fir, pad, rgb)
    mixing = None if rgb is None else weight.flatten(1)[None] * style[:, None]
    return _Epilogue.apply(x, d, noise, bias, slope, gain, clamp, shuffle, fir, pad, mixing, *styles)
