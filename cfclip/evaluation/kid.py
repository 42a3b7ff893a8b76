"""Kernel inception distance (KID) on the features of a ground truth."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cfclip.domain import Claim, GroundTruth
from cfclip.evaluation.metrics import Edit


@torch.no_grad()
def kid_features(truth: GroundTruth, images: Tensor) -> np.ndarray:
    """The ground truth's feature maps of ``images``, averaged over the picture: [N, sum of C_l]."""
    batches = images.split(100)
    features = [torch.cat([stage.mean((2, 3)) for stage in truth.features(batch)], 1) for batch in batches]
    return torch.cat(features).cpu().double().numpy()


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """KID of two sets of features [N, d] and [M, d] (Binkowski et al. 2018, section 4.1).

    The unbiased MMD^2 with the kernel ``(x y / d + 1)^3``; features are standardised by the mean and standard
    deviation of b. Near 0, and possibly negative, for equal distributions.
    """
    mean, std = b.mean(0), b.std(0) + 1e-9
    a, b = (a - mean) / std, (b - mean) / std
    kaa, kbb, kab = ((x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    n, m = len(a), len(b)
    within_a = (kaa.sum() - np.trace(kaa)) / (n * (n - 1))
    within_b = (kbb.sum() - np.trace(kbb)) / (m * (m - 1))
    return float(within_a + within_b - 2 * kab.mean())


def kid_to_renders(edit: Edit, n: int = 256) -> dict[str, float]:
    """``kid_natural``: KID of the edited pictures to ``n`` natural renders.

    If the prompt names the colour of a part, also ``kid_counterfactual``: to the same renders, recoloured.
    {} without a ground truth, or for a single picture.
    """
    truth, images = edit.domain.truth, edit.after.images
    if truth is None or len(images) < 2:
        return {}
    features = kid_features(truth, images.clamp(-1, 1))
    distances = {"kid_natural": kid(features, _references(truth, n))}
    if claim := truth.claim(edit.prompt):
        distances["kid_counterfactual"] = kid(features, _references(truth, n, claim))
    return distances


@lru_cache(maxsize=64)
def _references(truth: GroundTruth, n: int, claim: Claim | None = None) -> np.ndarray:
    # natural_spread draws 2 n natural renders, which are cached: use their first half
    return kid_features(truth, truth.renders(n, claim) if claim else truth.renders(2 * n)[:n])
