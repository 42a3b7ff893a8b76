"""Perceptual distances: LPIPS' formula on any stack of features.

"The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", Zhang et al. 2018, eq. 1.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PerceptualDistance(NamedTuple):
    """A distance and the name of the column that holds it.

    ``between`` takes pictures a, b [N, 3, R, R] in [-1, 1] and returns [N], 0 for equal pictures; differentiable.
    """

    name: str
    between: Callable[[Tensor, Tensor], Tensor]


def feature_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """LPIPS with unit weights: mean over the stages of the squared distance of unit features. [N, C_l, h, w] each -> [N]."""
    total = torch.zeros(len(a[0]), device=a[0].device)
    for x, y in zip(a, b, strict=True):
        difference = F.normalize(x, dim=1, eps=1e-6) - F.normalize(y, dim=1, eps=1e-6)
        total += difference.square().sum(1).mean((1, 2))
    return total / len(a)
