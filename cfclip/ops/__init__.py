"""StyleGAN2's operators: ``reference`` for any use; for a frozen generator ``frozen`` and, on GPUs, ``triton_ops``. Importing compiles nothing."""

from .convolution import modulated_conv2d, prepare, styled_conv2d
from .dispatch import bias_act, conv2d, epilogue, upfirdn2d, using
from .reference import modulate, setup_filter

__all__ = ["bias_act", "conv2d", "epilogue", "modulate", "modulated_conv2d", "prepare", "setup_filter", "styled_conv2d", "upfirdn2d", "using"]
