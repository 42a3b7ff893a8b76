"""StyleGAN2's operators. Importing them compiles nothing.

``reference`` is for any use; ``frozen`` and, on GPUs, ``triton_ops`` are faster, for a generator that is not
trained.
"""

# ruff: noqa: F401 (what other modules import from here)
from .choice import HALF, fast_dtype, layout_of, name_of
from .convolution import Prepared, folding, folds, modulated_conv2d, prepare, styled_conv2d
from .dispatch import bias_act, upfirdn2d, using
from .reference import Epilogue, LayerOutput, modulate, setup_filter
