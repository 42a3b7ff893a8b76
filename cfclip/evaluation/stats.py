"""Means with intervals, and how they are written."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def half_width(values: Sequence[float], confidence: float = 0.95) -> float:
    """Half of Student's t interval of the mean of k values: ``t_{(1 + confidence) / 2, k - 1} s / sqrt(k)``.

    NaN for fewer than two values: one training says nothing about the spread of trainings.
    """
    k = len(values)
    if k < 2:
        return float("nan")
    return float(stats.t.ppf((1 + confidence) / 2, k - 1) * np.std(values, ddof=1) / np.sqrt(k))


def interval(values: np.ndarray) -> tuple[float, float]:
    """The two ends of the 95 % interval, as seaborn's ``errorbar`` takes it."""
    return values.mean() - half_width(values), values.mean() + half_width(values)


def plus_minus(mean: float, half: float, scale: float = 1, form: str = ".3g") -> str:
    """ "12 ± 3", or "12" without an interval, or "–" without a number. ``form``: format of the mean."""
    if np.isnan(mean):
        return "–"
    half = 0.0 if half < 1e-9 * abs(mean) else half  # equal numbers whose mean was rounded
    return f"{scale * mean:{form}}" + ("" if np.isnan(half) else f" ± {scale * half:.2g}")
