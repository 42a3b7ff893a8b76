"""Turns the rows of a sweep into tidy tables, and these into tables for people.

A row of :func:`cfclip.experiments.gather` is one picture at one strength. A *training* is one method,
prompt and seed; its number is the mean over its pictures. In tables intervals are 95 % (Student's t) over
seeds, because the pictures of one training share its luck; :mod:`.claims` compares methods over prompts and
seeds.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pandas as pd

from cfclip.baselines.methods import METHODS
from cfclip.domain import GROUPS
from cfclip.evaluation.ablation import ROWS
from cfclip.evaluation.frames import FRAMES
from cfclip.evaluation.metrics import METRIC_DIRECTIONS, PERCENT
from cfclip.evaluation.stats import crossed, half_width, plus_minus

KEYS = ["method", "group", "prompt", "seed", "strength"]
LOWEST_IDENTITY = 0.6
"""Where :func:`area` begins: below it a face is another person's."""
HEADLINE = ("area", "clean", "success_after", "progress", "identity", "leakage", "leakage_beyond")
"""The metrics that :func:`headline_table` shows."""
VARIANTS = ("first guide", "second guide", "both guides", "published budget")
"""The variants of the main comparison, see :func:`variant`."""


def columns_of(table: pd.DataFrame) -> list[str]:
    """The metrics in ``table`` that are defined somewhere, in the order of :data:`METRIC_DIRECTIONS`."""
    defined = [name for name in table.columns if table[name].notna().any()]
    return [name for pattern in METRIC_DIRECTIONS for name in defined if fnmatch(name, pattern)]


def label(metric: str) -> str:
    """ "success_after" -> "success % ↑"."""
    arrow = next((arrow for pattern, arrow in METRIC_DIRECTIONS.items() if fnmatch(metric, pattern)), "")
    words = metric.removesuffix("_after").replace("_", " ")
    return f"{words}{' %' if metric in PERCENT else ''} {arrow}".strip()


def ordered(values: pd.Series, known: Iterable[str]) -> pd.Categorical:
    """A categorical that sorts as in ``known``; other values come after, sorted by name."""
    present = set(values)
    order = [name for name in known if name in present]
    return pd.Categorical(values, [*order, *sorted(present - set(order))])


def means(table: pd.DataFrame, by: str | list[str] = "prompt") -> pd.DataFrame:
    """Mean of every number per group, in the groups' order of appearance; ``n``: rows of the group.

    If only some faces of a group have the part, there is also ``n_with_part``, the number of these; the mean
    success is over them.
    """
    grouped = table.groupby(by, sort=False)
    numbers = grouped.mean(numeric_only=True).drop(columns=["index", "seed"], errors="ignore")
    numbers.insert(0, "n", grouped.size())
    if "success_after" in table:
        judged = grouped.success_after.count()
        if ((judged > 0) & (judged < numbers.n)).any():
            numbers.insert(1, "n_with_part", judged)
    return numbers.reset_index()


def trainings(table: pd.DataFrame, group_of: Callable[[str], str], by: str = "method") -> pd.DataFrame:
    """:data:`KEYS` and metrics, one line per training and strength.

    If the prompt asks for the colour of a part, means are over the faces that have the part, and a training
    without such faces is left out. For others, such as a null edit, they are over all faces. ``by="row"``
    takes the ablation's rows as methods; if "CF-CLIP" is not one of them, the cfclip runs with the same
    prompts and seeds become that row. group_of: :meth:`.Domain.group_of`. Raises ValueError if two runs of a
    training differ in other settings, or if a face occurs twice: the mean would be meaningless.
    """
    if by == "row" and by in table:
        table = _with_first_row(table)
    table = table[table[by].notna()] if by in table else table.iloc[:0]
    group = table.prompt.map(group_of) if len(table) else None
    if "success_after" in table and len(table):
        table = table[~group.isin(GROUPS[:3]) | table.success_after.notna()]
    names = columns_of(table)
    if table.empty:
        return pd.DataFrame(columns=[*KEYS, *names])
    table = table.assign(
        method=ordered(table[by], [*METHODS, *ROWS, *FRAMES]),
        group=ordered(table.prompt.map(group_of), GROUPS),
        seed=table.seed.astype(int),
    )
    if "run" in table:
        runs = table.groupby(["method", "prompt", "seed"], observed=True).run.nunique()
        if len(several := runs[runs > 1]):
            what = f"{several.iloc[0]} runs of {', '.join(map(str, several.index[0]))}"
            raise ValueError(f"{what} differ in other parameters: gather one setting at a time")
    if len(twice := table[table.duplicated([*KEYS, "index"])]):
        method, prompt, seed, strength = twice[["method", "prompt", "seed", "strength"]].iloc[0]
        raise ValueError(f"{method}, {prompt}, {seed} has two rows of one face at strength {strength:g}")
    return table.groupby(KEYS, observed=True)[names].mean().reset_index()


def _with_first_row(table: pd.DataFrame) -> pd.DataFrame:
    if "method" not in table or "CF-CLIP" in {*table.row}:
        return table
    trained = pd.MultiIndex.from_frame(table[["prompt", "seed"]])
    beside = trained.isin(trained[table.row.notna()]) & (table.method == "cfclip")
    return table.assign(row=table.row.mask(beside, "CF-CLIP"))


def over_seeds(each: pd.DataFrame, by: Sequence[str] = ("group", "method")) -> pd.DataFrame:
    """One line per ``by`` and metric: its mean, half of its interval, and the number of seeds.

    Within each seed, prompts (or faces) are averaged first. each: :func:`trainings` at one strength. A metric
    that is undefined in the whole group, such as success for the null edit, is NaN.
    """
    by, names = list(by), columns_of(each)
    per_seed = each.groupby([*by, "seed"], observed=True)[names].mean()
    rows = []
    for key, group in per_seed.groupby(by, observed=True):
        for name in names:
            values = group[name].dropna()
            rows.append((*key, name, values.mean(), half_width(values), len(values)))
    long = pd.DataFrame(rows, columns=[*by, "metric", "mean", "half", "seeds"])
    return long.astype({name: each[name].dtype for name in by}) if rows else long


def wide(long: pd.DataFrame, rows: Sequence[str], across: str = "metric") -> pd.DataFrame:
    """A readable :func:`over_seeds`: cells "mean ± half", columns by ``across`` in order of appearance."""
    scales = [100 if metric in PERCENT else 1 for metric in long.metric]
    cells = [plus_minus(*values) for values in zip(long["mean"], long.half, scales, strict=True)]
    table = long.assign(cell=cells).pivot(index=list(rows), columns=across, values="cell")
    table = table.loc[:, list(long[across].unique())].fillna("–").sort_index()
    table = table.rename(columns=label if across == "metric" else str)
    return table.rename_axis(columns=None).reset_index()


def whole_curve(training: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """(identity, success) of one training over growing strength, from strength 0: the source itself."""
    curve = training[training.strength > 0].sort_values("strength")
    success = np.concatenate([training.success_before.iloc[:1], curve.success_after])
    return np.concatenate([[1.0], curve.identity]), success


def best_where(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """The largest y on the polyline through the points (x, y) [K] where x >= ``at``; NaN if it never is."""
    values = list(y[x >= at])
    for i in np.flatnonzero((x[1:] >= at) != (x[:-1] >= at)):
        values.append(y[i] + (at - x[i]) / (x[i + 1] - x[i]) * (y[i + 1] - y[i]))
    return float(max(values)) if values else float("nan")


def area(identity: np.ndarray, success: np.ndarray) -> float:
    """The headline: the area under *success over identity*, of one training.

    ``1 / (1 - lowest)  integral from lowest to 1 of S(i) di``, where S(i) is the highest success at any
    strength that keeps an identity of at least i (:func:`best_where`): the success that the method gives if
    an identity of i is required, averaged over all i from :data:`LOWEST_IDENTITY` to 1. In [0, 1]; 0 for
    doing nothing, 1 for success on every face at an identity of 1.

    identity, success: means over the faces that have the part, [K], from the source (identity 1) to the
    largest strength, see :func:`whole_curve`. Between two strengths the curve is a straight line; below the
    identities that were reached, S is constant.
    """
    lowest = LOWEST_IDENTITY
    kinks = identity[(identity > lowest) & (identity < 1)]
    at = np.unique([*np.linspace(lowest, 1, 41), *kinks, *(kinks + 1e-9).clip(max=1)])
    return float(np.trapezoid([best_where(identity, success, i) for i in at], at) / (1 - lowest))


def headline(each: pd.DataFrame) -> pd.DataFrame:
    """One line per training: :func:`area`, and every metric at the training's own best strength.

    each: :func:`trainings`, also of the :mod:`.frames`. The best strength has the most clean success
    (:func:`.metrics.clean`); ties go to the most progress, then to the smallest strength. If clean success is
    undefined, the strength nearest to 1 counts as best. Strength 1 means a different edit in each method, so
    every method gets its best strength, chosen on the same faces that are scored.

    More columns: ``leakage_beyond``, the leakage above that of the frame "ceiling" at the same prompt;
    ``open``, 1 if a larger strength might add to the area: identity at the largest strength is still above
    :data:`LOWEST_IDENTITY`, and no strength has a success of 1.
    """
    if each.empty:
        return each
    rows = []
    for _, training in each.groupby(KEYS[:-1], observed=True):
        scores, curve = {"area": np.nan, "open": np.nan}, ("identity", "success_after")
        if set(curve) <= set(each) and training[[*curve]].notna().all(axis=None):
            identity, success = whole_curve(training)
            larger = identity[-1] > LOWEST_IDENTITY and success.max() < 1
            scores = {"area": area(identity, success), "open": float(larger)}
        rows.append(_at_best(training) | scores)
    best = pd.DataFrame(rows).astype({name: each[name].dtype for name in ("method", "group")})
    if "leakage" in best:
        limit = best[best.method == "ceiling"].groupby("prompt").leakage.mean()
        best["leakage_beyond"] = best.leakage - best.prompt.map(limit)
    return best


def _at_best(training: pd.DataFrame) -> dict[str, Any]:
    """The line of ``training`` at its best strength, see :func:`headline`."""
    if "clean" in training and training.clean.notna().any():
        order = training.sort_values(["clean", "progress", "strength"], ascending=[False, False, True])
    else:
        order = training.iloc[(training.strength - 1).abs().argsort(kind="stable")]
    return order.iloc[0].to_dict()


def differences(best: pd.DataFrame, ours: str, other: str, column: str = "area") -> pd.DataFrame:
    """``column`` of ``ours`` minus that of ``other``: a table of prompts x seeds, NaN where one is missing.

    best: :func:`headline`, of methods or rows.
    """
    if column not in columns_of(best):
        return pd.DataFrame()
    by_seed = {"index": "prompt", "columns": "seed", "values": column}
    a, b = (best[best.method == name].pivot(**by_seed) for name in (ours, other))
    return (a - b).dropna(how="all").dropna(how="all", axis=1)


def against_first(best: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """A line per row of an ablation: what it changes, its means, and their difference from the first row's.

    Differences are at equal prompt and seed, with intervals over prompts and seeds (:func:`.stats.crossed`).
    """
    first, *others = best.method.cat.remove_unused_categories().cat.categories
    names, lines = [name for name in names if name in columns_of(best)], []
    for method in (first, *others):
        changed = (
            f"{name} {' '.join(value) if isinstance(value, tuple) else value}"
            for name, value in ROWS.get(method, {}).items()
        )
        line = {"row": method, "it changes": ", ".join(changed)}
        for name in names:
            scale = 100 if name in PERCENT else 1
            line[label(name)] = plus_minus(best.loc[best.method == method, name].mean(), np.nan, scale)
            if len(apart := differences(best, method, first, name)) and method != first:
                over = crossed(apart)
                line[label(name)] += f" ({plus_minus(over.mean, over.half, scale, '+.2g')})"
        lines.append(line)
    return pd.DataFrame(lines)


def headline_table(best: pd.DataFrame) -> pd.DataFrame:
    """:func:`headline` for people: a line per group and method, those with the largest area first.

    "open %": the share of trainings whose area might grow with a larger strength.
    """
    by = ["group", "method"]
    shown = [*KEYS[:4], *(name for name in HEADLINE if name in best)]
    table = wide(over_seeds(best[shown]), by).set_index(by)
    rank = best.groupby(by, observed=True)
    is_open = rank.open.mean().reindex(table.index)
    table["open %"] = [plus_minus(100 * share, np.nan, form=".0f") for share in is_open]
    order = rank.area.mean().reindex(table.index).fillna(-1).reset_index()
    order = order.sort_values(["group", "area"], ascending=[True, False], kind="stable")
    return table.loc[pd.MultiIndex.from_frame(order[by])].reset_index()


def variant(settings: Mapping[str, Any]) -> str:
    """Which of :data:`VARIANTS` a run with these settings belongs to; a table has runs of one variant only.

    A guide with at most a hundredth of the largest weight does not count.
    """
    if settings.get("steps", 0) >= 50_000:
        return VARIANTS[3]
    weights = settings.get("guide_weights") or [1.0] * settings.get("guides", 1)
    counting = [k for k, weight in enumerate(weights) if weight > max(weights) / 100]
    return VARIANTS[counting[0] if len(counting) == 1 else 2]


def budget(table: pd.DataFrame, records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What each method was given, settings and pictures, and how long a run took in seconds."""
    seconds = {record["run"]: record["seconds"] for record in records}
    method = table.method.fillna("ablation") if "method" in table else "ablation"
    rows = []
    for name, pictures in table.assign(method=method).groupby("method"):
        runs = pictures.drop_duplicates("run")
        given = [settings for settings in runs.get("settings", ()) if isinstance(settings, dict)]
        rows.append({
            "method": name,
            "runs": len(runs),
            **{
                key: _listed(settings.get(key) for settings in given)
                for key in ("steps", "lr", "lambda_perc")
            },
            "pictures": _listed(runs.n),
            "seeds": _listed(pictures.seed),
            "seconds a run": f"{runs.run.map(seconds).mean():.0f}",
        })
    return pd.DataFrame(rows)


def _listed(numbers: Iterable[float | None]) -> str:
    return ", ".join(f"{number:g}" for number in sorted({n for n in numbers if pd.notna(n)})) or "–"
