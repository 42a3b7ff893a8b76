"""Perceptual distances: LPIPS' formula on any stack of features.

"The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", Zhang et al. 2018, eq. 1.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PerceptualDistance(NamedTuple):
    """A perceptual distance and the name of the table column that holds it."""

    name: str
    # images a, b [N, 3, R, R] in [-1, 1] -> [N], 0 for equal images; differentiable
    between: Callable[[Tensor, Tensor], Tensor]


def feature_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """LPIPS with unit weights: ``mean_l mean_hw |a_l - b_l|^2`` of unit features [N, C_l, h_l, w_l]."""
    total = torch.zeros(len(a[0]), device=a[0].device)
    for x, y in zip(a, b, strict=True):
        difference = F.normalize(x, dim=1, eps=1e-6) - F.normalize(y, dim=1, eps=1e-6)
        total += difference.square().sum(1).mean((1, 2))
    return total / len(a)
