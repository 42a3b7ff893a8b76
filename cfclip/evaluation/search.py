"""Chooses the settings of every method from the trials of a sweep, by one rule."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cfclip.evaluation.figures import panels, prompt_styles
from cfclip.evaluation.stats import crossed
from cfclip.evaluation.tables import headline, label, trainings

TIE = 0.01
"""Trials whose areas differ by less than a point are equally good."""
RULE = (
    "Rule: trials whose mean is within a point of their method's best one are equally good, and the one in "
    "their middle is chosen: its neighbours are as good, while one at the rim may fail on other prompts."
)
MEANS = {True: "C3", False: "0.5"}
"""Is a trial chosen? -> the colour of its mean."""


def trials(table: pd.DataFrame, group_of: Callable[[str], str]) -> pd.DataFrame:
    """The trials of a search, one line per method and settings.

    table: :func:`cfclip.experiments.gather`. Columns: ``trial``, named by the settings that vary; ``mean``,
    the mean :func:`.tables.area` over prompts and seeds, and the ``half`` width of its 95 % interval
    (:func:`.stats.crossed`), both NaN if another trial of the method has more prompts or seeds; each prompt's
    area; ``chosen``, by :data:`RULE`; ``edge``: which settings of the chosen trial are the smallest or the
    largest tried, so that better ones may lie beyond, or "". A smallest value of 0 is not an edge.
    """
    tried = {
        name: [*{str(sorted(one.items())): one for one in rows.settings}.values()]
        for name, rows in table.groupby("method")
    }
    varied = {method: _varied(settings) for method, settings in tried.items()}

    def name_of(method: str, settings: Mapping[str, Any]) -> str:
        given = [f"{name} {settings[name]}" for name in varied[method] if name in settings]
        return f"{method}: {', '.join(given)}"

    named = table.assign(trial=[*map(name_of, table.method, table.settings)])
    best = headline(trainings(named, group_of, by="trial")).astype({"method": str})
    found = []
    for method, every in tried.items():
        ranks = _ranks(every, varied[method])
        rows = []
        for settings in every:
            name = name_of(method, settings)
            areas = best[best.method == name].pivot(index="prompt", columns="seed", values="area")
            over, edge = crossed(areas), _edges(settings, every, varied[method])
            row = {"trial": name, "mean": over.mean, "half": over.half, **areas.mean(axis=1)}
            rows.append(row | {"edge": edge, "numbers": areas.count().sum()})
        scores = pd.DataFrame(rows)
        scores.loc[scores.numbers < scores.numbers.max(), ["mean", "half"]] = np.nan
        chosen = scores.index == _middle(scores["mean"].fillna(-1.0), ranks)
        scores = scores.assign(chosen=chosen, edge=scores.edge.where(chosen, ""))
        found.append(scores.iloc[np.lexsort(ranks[::-1])] if varied[method] else scores)
    return pd.concat(found, ignore_index=True).drop(columns="numbers")


def _varied(tried: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for one in tried for name in one)
    return [name for name in names if len({str(one.get(name)) for one in tried}) > 1]


def _ranks(tried: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> np.ndarray:
    """[settings, trials]: rank of each trial's value of each ``varied`` setting; 3 comes before 10."""
    ranks = []
    for name in varied:
        keys = [(1, value) if _is_number(value := one.get(name)) else (0, str(value)) for one in tried]
        order = sorted(set(keys))
        ranks.append([order.index(key) for key in keys])
    return np.array(ranks).reshape(len(varied), len(tried))


def _middle(mean: pd.Series, ranks: np.ndarray) -> int:
    """The good trial nearest to the middle of the good ones; of several the best, then the first."""
    good = np.flatnonzero(mean >= mean.max() - TIE)
    centre = ranks[:, good].mean(axis=1, keepdims=True)
    away = np.abs(ranks[:, good] - centre).sum(axis=0).round(6)
    return int(good[np.lexsort((-mean[good], away))[0]])


def _edges(settings: Mapping[str, Any], tried: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> str:
    """Which of the ``varied`` settings are the smallest or the largest of those ``tried``, in words."""
    found = []
    for name in varied:
        value = settings.get(name)
        numbers = [one.get(name) for one in tried if _is_number(one.get(name))]
        if _is_number(value) and value == max(numbers):
            found.append(f"{name} {value:g} is the largest tried")
        elif _is_number(value) and value == min(numbers) and value != 0:
            found.append(f"{name} {value:g} is the smallest tried")
    return "; ".join(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def figure(tried: pd.DataFrame) -> Figure:
    """The area of each prompt in each of :func:`trials`, and their mean if it is ranked, red if chosen."""
    method = tried.trial.str.split(":").str[0]
    prompts = [name for name in tried if name not in ("trial", "mean", "half", "edge", "chosen")]
    sizes = method.value_counts(sort=False)
    ratios = [count + 1.5 for count in sizes]
    drawn, axes = panels(len(sizes), 1, (7.5, 0.19 * sum(ratios) + 0.8), sharex=True, height_ratios=ratios)
    for axis, name in zip(axes[:, 0], sizes.index, strict=True):
        rows = tried[method == name].iloc[::-1]
        settings = rows.trial.str.removeprefix(f"{name}: ")
        for prompt, style in prompt_styles(prompts).items():
            axis.plot(rows[prompt], settings, linestyle="", markersize=4, label=prompt, **style)
        axis.scatter(
            rows["mean"], settings, 110, rows.chosen.map(MEANS), marker="|", linewidths=2.5, zorder=3
        )
        axis.set_title(name, fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
        axis.margins(y=0.12)
    axes[-1, 0].set_xlabel(label("area").replace(" %", ""))
    means = {"mean": MEANS[False], "mean of the chosen trial": MEANS[True]}
    bars = [
        Line2D([], [], color=c, marker="|", ms=10, mew=2.5, ls="", label=what) for what, c in means.items()
    ]
    handles = [*axes[0, 0].get_legend_handles_labels()[0], *bars]
    drawn.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return drawn
