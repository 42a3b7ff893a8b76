"""Means, intervals, and how they are written."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats


def summary(table: pd.DataFrame, by: str | list[str] = "prompt") -> pd.DataFrame:
    """Mean of every number per group, in the groups' order of appearance, with n = pictures."""
    grouped = table.groupby(by, sort=False)
    means = grouped.mean(numeric_only=True).drop(columns=["index", "seed"], errors="ignore")
    means.insert(0, "n", grouped.size())
    return means.reset_index()


def half_width(values: Sequence[float], confidence: float = 0.95) -> float:
    """``t_{(1 + confidence) / 2, k - 1} s / sqrt(k)`` of k values; NaN for less than two: one training says nothing about others."""
    k = len(values)
    if k < 2:
        return float("nan")
    return float(stats.t.ppf((1 + confidence) / 2, k - 1) * np.std(values, ddof=1) / np.sqrt(k))


def plus_minus(mean: float, half: float, scale: float = 1) -> str:
    """ "12 ± 3", or "12" where no interval is known, or "–" where there is no number."""
    half = 0.0 if half < 1e-9 * abs(mean) else half  # equal numbers whose mean was rounded
    return (
        "–"
        if np.isnan(mean)
        else f"{scale * mean:.3g}" + ("" if np.isnan(half) else f" ± {scale * half:.2g}")
    )
