"""StyleGAN2's operators: ``reference`` runs on any device, ``triton_ops`` on GPUs; importing imports no Triton and compiles nothing."""

from .convolution import modulated_conv2d, prepare, styled_conv2d
from .dispatch import bias_act, epilogue, upfirdn2d, using
from .reference import modulate, setup_filter

__all__ = ["bias_act", "epilogue", "modulate", "modulated_conv2d", "prepare", "setup_filter", "styled_conv2d", "upfirdn2d", "using"]
