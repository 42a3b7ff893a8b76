"""The operators of a frozen generator in plain torch, on any device, differentiable once: a layer keeps one activation for its backward pass.

Autograd on :mod:`.reference` keeps what went into a convolution, what came out of it, and what went into the leaky ReLU, and writes a
new tensor for every factor and summand. Here the epilogue works in place and keeps y alone: its sign tells the slope, and the
gradients of d and of the styles are sums over products with it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .reference import bias_act, modulate, upfirdn2d

__all__ = ["bias_act", "conv2d", "epilogue", "upfirdn2d"]      # the first and the last are small: as they are


def check_frozen(**tensors: Tensor | None) -> None:
    """NotImplementedError that names the first of ``tensors`` that asks for a gradient."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"the operators of a frozen generator give no gradient of {name}: cfclip.ops.using('reference') does")


class _Convolution(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(kernel)
        ctx.size, ctx.layout = x.shape, torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        return reference.conv2d(x, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        kernel, = ctx.saved_tensors
        like_x = torch.empty(ctx.size, dtype=grad.dtype, device=grad.device, memory_format=ctx.layout)     # only its layout is looked at
        padding = [kernel.shape[-1] // 2] * 2
        return torch.ops.aten.convolution_backward(grad, like_x, kernel, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, False, False])[0], None


def conv2d(x: Tensor, kernel: Tensor) -> Tensor:
    """:func:`.reference.conv2d`, but for gradients of ``kernel``; keeps no x."""
    check_frozen(kernel=kernel)
    return _Convolution.apply(x, kernel)


def _sum(x: Tensor) -> Tensor:
    """Sum over the last two dims, in float32. By rows first: torch would make a float32 copy of all of a half-precision tensor."""
    return x.sum(-1).float().sum(-1)


def _sums(x: Tensor, y: Tensor) -> Tensor:
    """Sums over the pixels of x y, [N, C, H, W] each -> [N, C] in float32. Image by image: at 1024² a product is as large as all else."""
    return torch.stack([_sum(a * b) for a, b in zip(x, y, strict=True)]) if len(x) else x.new_zeros(x.shape[:2])


class _Epilogue(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, d, noise, bias, slope, gain, clamp, shuffle, *styles):
        factor = (d * gain).to(x.dtype)[:, :, None, None]          # gain lrelu(a) = lrelu(gain a), and it is free here
        y = F.pixel_shuffle(x, 2).mul_(factor) if shuffle else x * factor
        if noise is not None:
            y += (noise * gain).to(y.dtype)
        y += (bias * gain).to(y.dtype)[:, None, None]
        if slope != 1:
            F.leaky_relu_(y, slope)
        if clamp is not None:
            y.clamp_(-clamp, clamp)
        ctx.slope, ctx.gain, ctx.clamp, ctx.shuffle = slope, gain, clamp, shuffle
        ctx.save_for_backward(y, d, noise, bias, *styles)
        return tuple(modulate(y, style) for style in styles) or (y,)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        y, d, noise, bias, *styles = ctx.saved_tensors
        along = [_sums(grad, y) for grad in grads]                 # dy . y, reader by reader
        grad = modulate(grads[0], styles[0]) if styles else grads[0].clone()       # one tensor, in place from here on
        for other, style in zip(grads[1:], styles[1:], strict=True):
            grad.addcmul_(other, style.to(grad.dtype)[:, :, None, None])
        if ctx.clamp is not None:
            grad.masked_fill_(y.abs() >= ctx.clamp, 0)
        if ctx.slope != 1:
            torch.ops.aten.leaky_relu_backward.grad_input(grad, y, ctx.slope, True, grad_input=grad)
        of_x = of_d = None
        if ctx.needs_input_grad[1]:                                # with a = gain (x d + noise + bias): da . x d = da . (a / gain - noise - bias)
            if ctx.clamp is None:                                  # da . a = dy . y
                with_a = sum(part * style for part, style in zip(along, styles, strict=True)) if styles else along[0]
            else:
                with_a = _sums(grad, torch.where(y < 0, y / ctx.slope, y))
            constant = _sum(grad) * bias
            if noise is not None:
                constant = constant + _sums(grad, noise.to(grad.dtype).expand_as(grad))
            of_d = (with_a - ctx.gain * constant) / d
        if ctx.needs_input_grad[0]:
            of_x = grad.mul_((d * ctx.gain).to(grad.dtype)[:, :, None, None])
            of_x = F.pixel_unshuffle(of_x, 2) if ctx.shuffle else of_x
        return of_x, of_d, None, None, None, None, None, None, *(along if styles else ())


def epilogue(x: Tensor, d: Tensor | None = None, noise: Tensor | None = None, bias: Tensor | None = None, slope: float = 0.2,
             gain: float = math.sqrt(2), clamp: float | None = None, styles: Sequence[Tensor] = (), shuffle: bool = False) -> tuple[Tensor, ...]:
    """:func:`.reference.epilogue`, but for gradients of ``noise`` and ``bias``. (What is no layer of StyleGAN2 the reference does.)"""
    check_frozen(noise=noise, bias=bias)
    if d is None or bias is None:
        return reference.epilogue(x, d, noise, bias, slope, gain, clamp, styles, shuffle)
    return _Epilogue.apply(x, d, noise, bias, slope, gain, clamp, shuffle, *styles)
