"""Triton's kernels: on the GPU if there is one, else in Triton's interpreter."""

from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """The module of the kernels. The interpreter takes what is decorated while its variable is set."""
    triton = pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
            # decorated again, because Triton may have been imported before
            patch.setattr(triton.language, "sum", triton.jit(triton.language.sum.fn))
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        from cfclip.models.ops import triton_ops

        yield triton_ops
