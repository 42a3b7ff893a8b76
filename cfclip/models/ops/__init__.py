"""StyleGAN2's operators: ``reference`` for any use; for a frozen generator ``frozen`` and, on GPUs, ``triton_ops``. Importing compiles nothing."""

from .choice import HALF, fast_dtype, layout_of, name_of
from .convolution import Prepared, folding, folds, modulated_conv2d, prepare, styled_conv2d
from .dispatch import bias_act, conv2d, epilogue, upfirdn2d, using
from .reference import at_least_float32, modulate, setup_filter

__all__ = [
    "HALF",
    "Prepared",
    "at_least_float32",
    "bias_act",
    "conv2d",
    "epilogue",
    "fast_dtype",
    "folding",
    "folds",
    "layout_of",
    "modulate",
    "modulated_conv2d",
    "name_of",
    "prepare",
    "setup_filter",
    "styled_conv2d",
    "upfirdn2d",
    "using",
]
