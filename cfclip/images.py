"""Pictures as tensors in [-1, 1] and as bytes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_uint8(images: Tensor) -> np.ndarray:
    """[N, 3, R, R] in [-1, 1] -> uint8 [N, R, R, 3]."""
    scaled = (images.detach().float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_tensor(images: Sequence[np.ndarray] | np.ndarray) -> Tensor:
    """uint8 [R, R, 3] pictures -> float32 [N, 3, R, R] in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def at_once(images: Tensor) -> int:
    """How many of ``images`` [N, 3, R, R] a network gets per call: 64, or on a GPU more if small."""
    return max(64, 512 * 64**2 // images.shape[-1] ** 2) if images.is_cuda else 64
