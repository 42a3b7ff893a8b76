"""The operators of a frozen generator in plain torch, on any device, differentiable once.

A layer keeps one activation for its backward pass. Autograd on :mod:`.reference` keeps the convolution's
input, its output and the input of the leaky ReLU, and writes a new tensor for every factor and summand. Here
the epilogue keeps only y: its sign gives the slope, and the gradients of d and of the styles are sums over
products with it.

The epilogue works piece by piece, in float32 or, for float64 tensors, in float64. A piece stays in the
processor's cache from the first factor to the last reader, and a half-precision layer is rounded once. The
gradient of d is a difference of the sums above: if the bias is a hundred times the convolution's output, it
loses two more digits than the reference's gradient.
"""

from collections.abc import Callable, Iterator
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.models.ops import reference
from cfclip.models.ops.reference import Epilogue, LayerOutput, at_least_float32, bias_act, upfirdn2d

__all__ = ["bias_act", "conv2d", "epilogue", "upfirdn2d"]  # bias_act and upfirdn2d are the reference's

PIECE = 2**18
"""Elements of a piece on a CPU: a piece and its intermediate results about fill a second-level cache."""


def check_frozen(**tensors: Tensor | None) -> None:
    """Raise NotImplementedError that names the first of ``tensors`` that needs a gradient."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"the operators of a frozen generator do not compute the gradient of {name}: "
                "use cfclip.models.ops.using('reference')"
            )


def check_images(x: Tensor, *per_image: Tensor | None) -> None:
    """Raise ValueError if one of ``per_image`` is not for as many images as ``x``; nothing is broadcast."""
    if counts := {len(t) for t in per_image if t is not None} - {len(x)}:
        counts = ", ".join(map(str, sorted(counts)))
        raise ValueError(f"d and the styles must be for {len(x)} images like x, not for {counts}")


def once(backward: Callable) -> Callable:
    """A ``backward`` that cannot be differentiated: with ``create_graph=True`` it raises an error.

    (torch's once_differentiable raises only in ``.backward()``; ``autograd.grad`` bypasses it and returns a
    wrong number.)
    """

    @wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the operators of a frozen generator are differentiable once, so create_graph=True fails: "
                "use cfclip.models.ops.using('reference')"
            )
        return backward(ctx, *grads)

    return checked


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format of ``x`` [N, C, H, W]."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


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
        # only the shape and the layout of like_x are used
        like_x = torch.empty(ctx.size, dtype=grad.dtype, device=grad.device, memory_format=ctx.layout)
        padding = [kernel.shape[-1] // 2] * 2
        of_x = torch.ops.aten.convolution_backward(
            grad, like_x, kernel, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, False, False]
        )[0]
        return of_x, None, None


def conv2d(x: Tensor, kernel: Tensor, up: bool = False) -> Tensor:
    """:func:`.reference.conv2d` without the gradient of ``kernel``; does not keep x."""
    check_frozen(kernel=kernel)
    if torch.is_autocast_enabled(x.device.type):  # autocast chooses the dtype inside
        return reference.conv2d(x, kernel, up)
    return _Convolution.apply(x, kernel, up)


def _groups(x: Tensor, size: int) -> Iterator[slice]:
    """Slices of the images [N, C, H, W]: each has as many as fit into ``size`` elements, at least one."""
    n, step = len(x), max(1, size // max(1, x[:1].numel()))
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _pieces(x: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Slices of channels and rows of ``x`` [N, C, H, W]: about ``size`` elements, adjacent in memory."""
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
    """Elements of a piece; on a GPU all of ``x``, because pieces do not help there."""
    return PIECE if x.device.type == "cpu" else x.numel() + 1


def _write_product(a: Tensor, factor: Tensor, out: Tensor) -> None:
    """``out[:] = a * factor``. If dtypes differ, ``torch.mul(out=)`` would take five times as long."""
    if out.dtype == a.dtype:
        torch.mul(a, factor, out=out)
    else:
        out.copy_(a * factor)


def _spread(of_rgb: Tensor, mixing: Tensor, layout: torch.memory_format) -> Tensor:
    """The gradient of the channels, in ``layout``: ``sum_k mixing[n, k, c] of_rgb[n, k, h, w]``.

    An operation on tensors of different layouts takes twenty times as long.
    """
    if layout == torch.channels_last:
        return torch.einsum("nkhw,nkc->nhwc", of_rgb, mixing).movedim(-1, 1)
    return torch.einsum("nkc,nkhw->nchw", mixing, of_rgb)


def _along(grad: Tensor, noise: Tensor, layout: torch.memory_format) -> Tensor:
    """``sum_hw grad[n, c, h, w] noise[n, h, w]``, as the product that is fast in ``layout``."""
    if layout == torch.channels_last:
        return (noise.flatten(1)[:, None] @ grad.movedim(1, -1).flatten(1, 2))[:, 0]
    return torch.einsum("nchw,nhw->nc", grad, noise)


class _Epilogue(torch.autograd.Function):
    """The epilogue, differentiable once with respect to x, d, mixing and the styles."""

    @staticmethod
    def forward(ctx, x, d, mixing, e, *styles):
        """mixing: the RGB layer's weight times its style, [N, K, C], or None."""
        exact, ctx.size = at_least_float32(x.dtype), x.shape
        if e.shuffle:
            x = F.pixel_shuffle(x, 2)
        n, c, h, w = x.shape
        if e.fir is not None:
            h, w = (s + sum(e.pad) + 1 - e.fir.shape[-1] for s in (h, w))
        shape = {"size": (n, c, h, w), "device": x.device, "memory_format": _layout(x)}
        # y is kept for the backward pass, or is the result
        keep = any(ctx.needs_input_grad) or (not styles and mixing is None)
        y = torch.empty(dtype=x.dtype, **shape) if keep else None
        scaled, rgb = [torch.empty(dtype=x.dtype, **shape) for _ in styles], None
        if mixing is not None:
            rgb = torch.zeros((n, mixing.shape[1], h, w), dtype=exact, device=x.device)
        # gain lrelu(a) = lrelu(gain a), and multiplying the factors costs nothing
        factor, bias_gain = (d * e.gain)[:, :, None, None], (e.bias * e.gain)[:, None, None]
        noise_gain = None if e.noise is None else (e.noise * e.gain).expand(n, 1, h, w)
        # rounded as in y, so that |y| >= clamp tells which values were clamped
        ctx.clamp = None if e.clamp is None else torch.tensor(e.clamp, dtype=x.dtype).item()
        below = None if e.clamp is None else ctx.clamp * (1 - torch.finfo(x.dtype).eps)
        for images in _groups(x, _size(x)):
            part = x[images]
            if e.fir is not None:
                part = upfirdn2d(part.to(exact), e.fir, pad=(*e.pad, *e.pad), gain=4.0)
            for channels, rows in _pieces(part, _size(x)):
                piece, here = part[:, channels, rows], (images, channels, rows)
                in_place = y is not None and x.dtype == exact
                a = torch.mul(piece, factor[images, channels], out=y[here] if in_place else None)
                if e.noise is not None:
                    a += noise_gain[images, :, rows]
                a += bias_gain[channels]
                if e.slope != 1:
                    F.leaky_relu_(a, e.slope)
                free = None
                if e.clamp is not None:
                    free = a.abs() < e.clamp
                    a.clamp_(-e.clamp, e.clamp)
                if y is not None and not in_place:
                    y[here] = a if free is None else torch.where(free, a.clamp(-below, below), a)
                for target, style in zip(scaled, styles, strict=True):
                    _write_product(a, style[images, channels, None, None], target[here])
                if rgb is not None:
                    mix = mixing[images, :, channels].to(exact)
                    rgb[images, :, rows] += torch.einsum("nkc,nchw->nkhw", mix, a)
        ctx.e = e._replace(d=None, noise=None, bias=None, styles=(), rgb=None)  # the tensors are saved below
        ctx.save_for_backward(y, d, e.noise, e.bias, mixing, *styles)
        return (*scaled, rgb) if rgb is not None else tuple(scaled) or (y,)

    @staticmethod
    @once
    def backward(ctx, *grads):
        (y, d, noise, bias, mixing, *styles), e = ctx.saved_tensors, ctx.e
        exact, (n, c, h, w), layout = at_least_float32(y.dtype), y.shape, _layout(y)
        of_mixing = None
        if mixing is not None:
            *grads, of_rgb = grads
            of_mixing = torch.zeros(mixing.shape, dtype=exact, device=y.device)
        sums = torch.zeros((3 + len(grads), n, c), dtype=exact, device=y.device)
        with_a, with_one, with_noise, *along = sums  # along: dy . y, reader by reader
        factor, of_x = (d * e.gain)[:, :, None, None], torch.empty_like(y)
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
                    g = of_rgb[images, :, rows]
                    of_mixing[images, :, channels] += torch.einsum("nkhw,nchw->nkc", g, out)
                    g = _spread(g, mixing[images, :, channels].to(exact), layout)
                    grad = g if grad is None else grad.add_(g)
                if ctx.clamp is not None:
                    grad.masked_fill_(out.abs() >= ctx.clamp, 0)
                    with_a[images, channels] += (grad * out).sum((2, 3))
                if e.slope != 1:
                    torch.ops.aten.leaky_relu_backward.grad_input(grad, out, e.slope, True, grad_input=grad)
                if ctx.needs_input_grad[1]:
                    with_one[images, channels] += grad.sum((2, 3))
                    if noise is not None:
                        with_noise[images, channels] += _along(grad, noise[images, 0, rows], layout)
                _write_product(grad, factor[images, channels], of_x[here])
        # y = lrelu(a) with a = gain (x d + noise + bias), so
        # da . x = (da . a / gain - da . noise - bias sum da) / d, and da . a = dy . y
        if ctx.clamp is None:
            shares = [share * style for share, style in zip(along, styles, strict=True)] if styles else along
            with_a = sum(shares)
            with_a = with_a if mixing is None else with_a + (of_mixing * mixing).sum(1)
        of_d = (with_a - e.gain * (with_noise + bias * with_one)) / d
        if e.fir is not None:
            before, after = (e.fir.shape[-1] - 1 - p for p in e.pad)
            of_x = upfirdn2d(of_x, e.fir.flip(0, 1), pad=(before, after, before, after), gain=4.0)
        if e.shuffle:  # for zero images torch's pixel_unshuffle returns another shape
            of_x = F.pixel_unshuffle(of_x, 2) if of_x.numel() else of_x.reshape(ctx.size)
        return of_x, of_d, of_mixing, None, *(along if styles else ())


def epilogue(x: Tensor, e: Epilogue) -> LayerOutput:
    """:func:`.reference.epilogue` without gradients of constants."""
    weight, style = e.rgb or (None, None)
    check_frozen(noise=e.noise, bias=e.bias, fir=e.fir, weight=weight)
    check_images(x, e.d, style, *e.styles)
    if e.d is None or e.bias is None or e.gain < 0:  # not a layer of StyleGAN2
        return reference.epilogue(x, e)
    mixing = None if e.rgb is None else weight.flatten(1)[None] * style[:, None]
    results = _Epilogue.apply(x, e.d, mixing, e, *e.styles)
    return LayerOutput(results) if mixing is None else LayerOutput(results[:-1], results[-1])
