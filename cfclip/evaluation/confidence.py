"""How likely is it that a prompt's edit does what it says? Asked before anybody has measured the edit."""

from collections.abc import MutableMapping, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit

from cfclip.domain import Domain
from cfclip.evaluation.metrics import Edit, judged_direction
from cfclip.models.mapper import Mapper

FACES = 8
"""Training faces that a prompt is tried on."""


@torch.no_grad()
def agreement(domain: Domain, mapper: Mapper, prompt: str) -> float:
    """Mean :func:`.metrics.judged_direction`, in [-1, 1], of the edits of :data:`FACES` training faces."""
    w = domain.latents(FACES)
    edited = mapper.edit(w, mapper.read(domain.clip, prompt))
    return float(judged_direction(Edit(domain, prompt, *map(domain.generator.synthesis, (w, edited)))).mean())


def calibrate(agreements: Sequence[float], successes: Sequence[float]) -> tuple[float, float]:
    """(a, b) of ``success = 1 / (1 + exp(-(a + b agreement)))``, by maximum likelihood over prompts.

    successes: the share of faces, in [0, 1], on which each prompt's edit succeeded.
    """
    x, y = np.asarray(agreements), np.asarray(successes)

    def loss(ab: np.ndarray) -> float:
        z = ab[0] + ab[1] * x
        return float(np.mean(np.logaddexp(0, z) - y * z) + 1e-4 * ab @ ab)  # finite where y is all 0 or all 1

    a, b = minimize(loss, np.zeros(2)).x
    return float(a), float(b)


def predicted_success(domain: Domain, prompt: str) -> float | None:
    """The share of faces, in [0, 1], on which ``domain.mapper`` is expected to do what ``prompt`` says.

    What was measured of the prompt, else what its :func:`agreement` foretells; computed once. None where the
    domain has no such mapper, or nothing is known of it. ``domain.confidence``: "measured", prompt -> share;
    "intercept" and "slope", see :func:`calibrate`.
    """
    mapper, known = domain.mapper, domain.confidence
    if mapper is None or known is None:
        return None
    if prompt in known["measured"]:
        return known["measured"][prompt]
    foretold = _FORETOLD.setdefault(mapper, {})
    if prompt not in foretold:
        z = known["intercept"] + known["slope"] * agreement(domain, mapper, prompt)
        foretold[prompt] = float(expit(z))
    return foretold[prompt]


_FORETOLD: MutableMapping[Mapper, dict[str, float]] = WeakKeyDictionary()
