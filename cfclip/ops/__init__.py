"""StyleGAN2's operators. ``reference`` runs on any device; importing compiles nothing."""

from .reference import bias_act, modulated_conv2d, prepare, setup_filter, upfirdn2d

__all__ = ["bias_act", "modulated_conv2d", "prepare", "setup_filter", "upfirdn2d"]
