"""Means with intervals, comparisons over prompts and seeds, and how many of both a comparison needs.

P prompts, S seeds. Prompts and seeds are crossed and both are samples: a verdict is about prompts and
trainings like these, not about these alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats


def half_width(values: Sequence[float]) -> float:
    """Half of Student's 95 % interval of the mean of k values: ``t_{0.975, k - 1} s / sqrt(k)``.

    NaN for fewer than two values: one training says nothing about the spread of trainings.
    """
    k = len(values)
    if k < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, k - 1) * np.std(values, ddof=1) / np.sqrt(k))


def interval(values: np.ndarray) -> tuple[float, float]:
    """The two ends of the 95 % interval, as seaborn's ``errorbar`` takes it."""
    return values.mean() - half_width(values), values.mean() + half_width(values)


def plus_minus(mean: float, half: float, scale: float = 1, form: str = ".3g") -> str:
    """ "12.0 ± 3.4": the half width with two digits, and the mean to the same place, both times ``scale``.

    "12" in the format ``form`` if ``half`` is NaN; "–" if ``mean`` is NaN. A "+" in ``form`` always applies.
    """
    if np.isnan(mean):
        return "–"
    mean, half = scale * mean, scale * half
    if np.isnan(half):
        return f"{mean:{form}}"
    if half < 1e-6 * max(abs(mean), 1e-3):  # equal numbers whose mean was rounded
        return f"{mean:{form}} ± 0"
    places = min(max(0, 1 - int(np.floor(np.log10(half)))), 4)
    return f"{mean:{'+' * form.startswith('+')}.{places}f} ± {half:.{places}f}"


# ---- the mixed model ----


@dataclass(frozen=True)
class Spread:
    """Standard deviations of ``value = mean + prompt + seed + rest``, each part random and of mean 0."""

    prompt: float
    seed: float
    rest: float  # what is left in one training: the luck of this seed with this prompt

    def mean_squares(self, prompts: int, seeds: int) -> np.ndarray:
        """Expected mean squares of prompts, seeds and the rest, in a table of ``prompts`` x ``seeds``."""
        rest = self.rest**2
        return np.array([rest + seeds * self.prompt**2, rest + prompts * self.seed**2, rest])


@dataclass(frozen=True)
class Crossed:
    """The mean of a table of P prompts x S seeds, by the two-way random effects model."""

    mean: float
    error: float  # standard error of the mean; NaN with fewer than two prompts or seeds
    df: float  # degrees of freedom of ``error``
    spread: Spread
    prompts: int
    seeds: int

    @property
    def half(self) -> float:
        """Half of the 95 % interval."""
        return float(stats.t.ppf(0.975, self.df) * self.error)

    @property
    def p(self) -> float:
        """Two-sided p-value of "the mean is 0"; NaN without a standard error."""
        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.df))


def _error(squares: np.ndarray, prompts: int, seeds: int) -> tuple[float, float]:
    """(standard error, degrees of freedom) of the mean, from the mean squares of prompts, seeds and the rest.

    ``Var = (MS_P + MS_S - MS_R) / (P S)`` with Satterthwaite's degrees of freedom. By chance this can be far
    too small, so Var is at least the largest of the mean squares / (P S), with its degrees of freedom.
    """
    df = np.array([prompts - 1, seeds - 1, (prompts - 1) * (seeds - 1)])
    total, freedom = squares[0] + squares[1] - squares[2], max((squares**2 / df).sum(), 1e-300)
    largest, freedom = max((total, total**2 / freedom), *zip(squares, df, strict=True))
    return float(np.sqrt(largest / (prompts * seeds))), float(max(freedom, 1.0))


def complete(table: pd.DataFrame) -> pd.DataFrame:
    """``table`` without its rows that have a gap, or without such columns: whichever keeps more numbers."""
    return max(table.dropna(), table.dropna(axis=1), key=lambda rest: rest.size)


def crossed(table: pd.DataFrame) -> Crossed:
    """Mean, standard error and spread of a table of numbers, one row per prompt and one column per seed.

    A table with gaps is first reduced to its :func:`complete` part. The method of moments for two crossed
    random effects without replication (Searle et al. 1992, section 4.5).
    """
    table = complete(table)
    values, (prompts, seeds) = table.to_numpy(float), table.shape
    nothing = float("nan")
    if min(prompts, seeds) < 2:
        mean = float(values.mean()) if values.size else nothing
        return Crossed(mean, nothing, nothing, Spread(nothing, nothing, nothing), prompts, seeds)
    mean, by_prompt, by_seed = values.mean(), values.mean(1), values.mean(0)
    rest = values - by_prompt[:, None] - by_seed + mean
    squares = np.array([
        seeds * ((by_prompt - mean) ** 2).sum() / (prompts - 1),
        prompts * ((by_seed - mean) ** 2).sum() / (seeds - 1),
        (rest**2).sum() / ((prompts - 1) * (seeds - 1)),
    ])
    beyond = squares - squares[2] * np.array([1, 1, 0])
    parts = np.maximum(beyond / [seeds, prompts, 1], 0)
    return Crossed(float(mean), *_error(squares, prompts, seeds), Spread(*np.sqrt(parts)), prompts, seeds)


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p-values: all below 0.05 can be believed together. NaN stays, and is not counted."""
    p = np.asarray(p, float)
    adjusted, known = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known])]
    adjusted[order] = np.maximum.accumulate((len(order) - np.arange(len(order))) * p[order]).clip(max=1)
    return adjusted


# ---- how many prompts and seeds ----


def power(spread: Spread, prompts: int, seeds: int, difference: float = 0.1, level: float = 0.05) -> float:
    """Chance that :func:`crossed` finds a true ``difference`` of the mean from 0 at p < ``level``.

    The noncentral t distribution with the standard error that ``spread`` gives; ``level`` is two-sided.
    """
    error, df = _error(spread.mean_squares(prompts, seeds), prompts, seeds)
    if error == 0:
        return 1.0
    return float(stats.nct.sf(stats.t.ppf(1 - level / 2, df), df, difference / error))


def plan(
    pilots: Sequence[Spread],
    claims: int,
    difference: float = 0.1,
    wanted: float = 0.9,
    most: tuple[int, int] = (64, 16),
) -> pd.DataFrame:
    """For each number of prompts the fewest seeds with the power ``wanted`` in each of the ``pilots``.

    Args:
        pilots: :attr:`Crossed.spread` of a pilot's differences, one per comparison; the widest decides.
        claims: how many claims share the level of 5 %. The level is 0.05 / claims (Bonferroni), Holm's worst
            case.
        difference: the difference to detect, in the unit of the values: 0.1 is ten points.
        most: the largest numbers of prompts and of seeds to try.

    Columns: ``prompts``, ``seeds``, ``trainings`` (of each method), ``power`` (for the widest spread). A
    number of prompts for which no number of seeds is enough is left out, so the table may be empty.
    """
    rows, level = [], 0.05 / claims
    for prompts in range(2, most[0] + 1):
        for seeds in range(2, most[1] + 1):
            least = min(power(one, prompts, seeds, difference, level) for one in pilots)
            if least >= wanted:
                rows.append((prompts, seeds, prompts * seeds, least))
                break
    return pd.DataFrame(rows, columns=["prompts", "seeds", "trainings", "power"])
