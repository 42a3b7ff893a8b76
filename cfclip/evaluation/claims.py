"""The paper's claims: a dozen sentences, each judged by one number and one rule."""

from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from cfclip.baselines.methods import METHODS
from cfclip.domain import COUNTERFACTUAL, HELD_OUT_FROM_CLIP
from cfclip.evaluation.figures import panels
from cfclip.evaluation.stats import Crossed, complete, crossed, holm, plan, plus_minus, power
from cfclip.evaluation.tables import differences

HOLDS, FAILS, EQUAL = "holds", "does not hold", "no difference"
UNDECIDED, UNTESTED = "undecided", "cannot be tested here"
COLOURS = {HOLDS: "C2", FAILS: "C3", EQUAL: "C0", UNDECIDED: "0.5"}
MATTERS = 0.1
"""The smallest difference of the area that matters: ten points."""
RULE = (
    "Rule: the number of a claim is the difference of the area under success over identity, in points, "
    "between two methods at the same seed and the same counterfactual prompt of words that CLIP has seen "
    "together. Prompts and seeds are both samples (two-way random effects model); the interval of the mean "
    "difference is 95 %. A claim holds, or does not hold, if its p-value, adjusted by Holm for all claims, "
    "is below 0.05. Otherwise there is no difference if all of the interval is within "
    f"± {100 * MATTERS:g} points, and if it is not, the claim is undecided. Without runs to compare, it "
    "cannot be tested here. Two more differences have no verdict. clean: of clean success at each training's "
    "best strength; it also reflects leakage, which the area ignores. unseen: of the area on words that CLIP "
    "never saw together, which depends on what CLIP makes of them."
)


class Claim(NamedTuple):
    """A claim: if the sentence ``says`` is true, ``ours`` has a larger area than ``other``."""

    says: str
    ours: str  # a method, or a row of the ablation
    other: str


CLAIMS = (
    *(Claim(f"CF-CLIP edits better than {name}", "cfclip", name) for name in METHODS if name != "cfclip"),
    Claim("the text direction p1 contributes", "CF-CLIP", "positive: target only"),
    Claim("the target direction p2 contributes", "CF-CLIP", "positive: text direction only"),
    Claim("negatives contribute", "CF-CLIP", "negatives: none"),
    Claim("perspective views contribute", "CF-CLIP", "views: none"),
    Claim("the text mapper contributes", "CF-CLIP", "no text mapper"),
    Claim("CLIP-NCE beats the directional loss", "CF-CLIP", "loss: directional"),
)
"""At most twelve, because Holm's adjustment is stricter for more claims."""


COLUMNS = ["claim", "verdict", "why", "difference", "half", "clean", "unseen", "p", "power"]


def judge(best: pd.DataFrame) -> pd.DataFrame:
    """Judge each of :data:`CLAIMS` by :data:`RULE`: a table with one line per claim.

    best: :func:`.tables.headline` of the methods and of the ablation's rows. Columns: ``claim``, ``verdict``,
    ``why``, ``difference`` and the ``half`` width of its interval (as shares: 0.1 is ten points), ``clean``
    and ``unseen`` (the two other differences, as text), ``p`` (adjusted), ``power``: the chance that this
    many prompts and seeds detect a difference of ten points, given the spread of the differences.
    """
    unseen, best = best[best.group == HELD_OUT_FROM_CLIP], best[best.group == COUNTERFACTUAL]
    tables = [differences(best, one.ours, one.other) for one in CLAIMS]
    found = [crossed(table) if table.size else None for table in tables]
    adjusted = holm([one.p if one else np.nan for one in found])
    rows = []
    for claim, one, p, table in zip(CLAIMS, found, adjusted, tables, strict=True):
        if one is None:
            why = "no prompt and seed at which both are defined"
            if absent := [name for name in (claim.ours, claim.other) if name not in set(best.method)]:
                why = f"no runs of {' and '.join(absent)}"
            rows.append({"claim": claim.says, "verdict": UNTESTED, "why": why})
            continue
        row = {"claim": claim.says, "verdict": verdict(one, p), "why": _why(best, claim, one, table)}
        row["clean"] = _beside(differences(best, claim.ours, claim.other, "clean"))
        row["unseen"] = _beside(differences(unseen, claim.ours, claim.other))
        level = 0.05 / sum(each is not None for each in found)
        chance = np.nan if np.isnan(one.error) else power(one.spread, one.prompts, one.seeds, MATTERS, level)
        rows.append(row | {"difference": one.mean, "half": one.half, "p": p, "power": chance})
    return pd.DataFrame(rows, columns=COLUMNS)


def verdict(found: Crossed, p: float) -> str:
    """The verdict of :data:`RULE`. p: the adjusted p-value."""
    if p < 0.05:
        return HOLDS if found.mean > 0 else FAILS
    return EQUAL if abs(found.mean) + found.half <= MATTERS else UNDECIDED


def _why(best: pd.DataFrame, claim: Claim, found: Crossed, table: pd.DataFrame) -> str:
    counted = complete(table)
    areas = best.set_index(["method", "prompt", "seed"]).area
    ours, other = (
        100 * areas[name].reindex(counted.stack().index).mean() for name in (claim.ours, claim.other)
    )
    ahead = f"ahead on {(counted.mean(axis=1) > 0).sum()} of {_number(found.prompts, 'prompt')}"
    return f"{ours:.1f} against {other:.1f}: {_points(found)} points; {ahead}, {_number(found.seeds, 'seed')}"


def _beside(table: pd.DataFrame) -> str:
    return _points(crossed(table)) if table.size else ""


def _points(found: Crossed) -> str:
    return plus_minus(found.mean, found.half, 100, "+.3g")


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def planned(best: pd.DataFrame) -> pd.DataFrame:
    """How many prompts and seeds detect ten points with 90 % power. best: a pilot's :func:`.tables.headline`.

    This is :func:`.stats.plan` with the spread of each claim's differences; the widest spread decides. Raises
    ValueError if no claim has two prompts and two seeds in the pilot.
    """
    tables = (differences(best[best.group == COUNTERFACTUAL], one.ours, one.other) for one in CLAIMS)
    found = [crossed(table) for table in tables if table.size]
    spreads = [one.spread for one in found if not np.isnan(one.error)]
    if not spreads:
        raise ValueError("the pilot compares nothing on two prompts with two seeds: run it with more of both")
    return plan(spreads, len(CLAIMS), MATTERS)


def figure(judged: pd.DataFrame) -> Figure:
    """The differences of :func:`judge` with their intervals, coloured by verdict; ± ten points are shaded."""
    shown = judged[judged.difference.notna()].iloc[::-1]
    drawn, axes = panels(1, 1, (8.5, 0.3 * max(len(shown), 1) + 1.2))
    axis = axes[0, 0]
    axis.axvspan(-100 * MATTERS, 100 * MATTERS, color="0.93", zorder=0)
    axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    for line in shown.itertuples(index=False):
        bar = {"xerr": 0 if np.isnan(line.half) else 100 * line.half, "capsize": 2}
        style = {"marker": "o", "markersize": 4, "color": COLOURS[line.verdict]}
        axis.errorbar(100 * line.difference, line.claim, **bar, **style)
    axis.set_ylim(-0.7, len(shown) - 0.3)
    axis.set_xlabel("difference of the area under success over identity, points; grey: too small to matter")
    axis.tick_params(labelsize=8)
    sns.despine(ax=axis)
    used = {name: one for name, one in COLOURS.items() if name in set(shown.verdict)}
    dots: list[Any] = [plt.Line2D([], [], color=one, marker="o", label=name) for name, one in used.items()]
    drawn.legend(handles=dots, loc="outside lower center", ncols=4, frameon=False)
    return drawn
