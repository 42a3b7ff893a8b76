"""From the rows of a sweep to tidy tables, and from those to tables for people.

A row of :func:`cfclip.experiments.gather` is one picture at one strength. A *training* is one method, prompt
and seed; its number is the mean over its pictures. Intervals are 95 % (Student's t) over seeds, because the
pictures of one training share its luck and prompts are not drawn at random.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pandas as pd

from cfclip.baselines.methods import METHODS
from cfclip.domain import GROUPS
from cfclip.evaluation.ablation import ROWS
from cfclip.evaluation.metrics import METRIC_DIRECTIONS, PERCENT
from cfclip.evaluation.stats import half_width, plus_minus

KEYS = ["method", "group", "prompt", "seed", "strength"]


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

    Where faces of one group differ in whether they have the part, there is also ``n_with_part``: the rows
    that do, whose mean success is.
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

    ``by="row"`` takes the rows of the ablation as methods. ``group_of`` is the domain's. Raises ValueError if
    two runs of one training differ in other settings, or if a face is there twice: the mean would be
    meaningless.
    """
    table = table[table[by].notna()] if by in table else table.iloc[:0]
    names = columns_of(table)
    if table.empty:
        return pd.DataFrame(columns=[*KEYS, *names])
    table = table.assign(
        method=ordered(table[by], [*METHODS, *ROWS]),
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


def over_seeds(each: pd.DataFrame, by: Sequence[str] = ("group", "method")) -> pd.DataFrame:
    """One line per ``by`` and metric: its mean, half of its interval, and the number of seeds.

    The mean of each seed comes first, over its prompts (or faces). each: :func:`trainings` at one strength. A
    metric that none of a group defines, as success for the null edit, is NaN.
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
    """:func:`over_seeds` for people: cells "mean ± half", one column per ``across``, as they appear."""
    scales = [100 if metric in PERCENT else 1 for metric in long.metric]
    cells = [plus_minus(*values) for values in zip(long["mean"], long.half, scales, strict=True)]
    table = long.assign(cell=cells).pivot(index=list(rows), columns=across, values="cell")
    table = table.loc[:, list(long[across].unique())].fillna("–").sort_index()
    table = table.rename(columns=label if across == "metric" else str)
    return table.rename_axis(columns=None).reset_index()


def whole_curve(training: pd.DataFrame, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of one training over growing strength, from strength 0: the source itself.

    There identity is 1, and ``<metric>_after`` is ``<metric>_before``.
    """
    curve = training[training.strength > 0].sort_values("strength")
    start = [1.0 if name == "identity" else training[_before(name)].iloc[0] for name in (x, y)]
    return tuple(np.concatenate([[zero], curve[name]]) for name, zero in zip((x, y), start, strict=True))


def _before(metric: str) -> str:
    return metric.replace("_after", "_before")


def best_where(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """The largest y on the polyline through the points (x, y) [K] where x >= ``at``; NaN if it never is."""
    values = list(y[x >= at])
    for i in np.flatnonzero((x[1:] >= at) != (x[:-1] >= at)):
        values.append(y[i] + (at - x[i]) / (x[i + 1] - x[i]) * (y[i + 1] - y[i]))
    return float(max(values)) if values else float("nan")


def matched(each: pd.DataFrame, hold: str, at: float, gain: str) -> pd.DataFrame:
    """The most of ``gain`` that each training has at any strength where its mean ``hold`` is at least ``at``.

    Methods differ in what strength 1 is, so each is read off its own curve (:func:`whole_curve`), linearly
    between measured strengths and never beyond them. Column ``open``: 1 where ``hold`` is still at least
    ``at`` at the largest strength, so that a larger one might have had more.
    """
    needed = {hold, gain, _before(hold), _before(gain)}
    if each.empty or not needed <= set(columns_of(each)):
        return each[KEYS[:-1]].drop_duplicates().assign(**{gain: np.nan, "open": np.nan})
    rows = []
    for key, training in each.groupby(KEYS[:-1], observed=True):
        x, y = whole_curve(training, hold, gain)
        rows.append((*key, best_where(x, y, at), float(x[-1] >= at)))
    table = pd.DataFrame(rows, columns=[*KEYS[:-1], gain, "open"])
    return table.astype({name: each[name].dtype for name in ("method", "group")})


def fair(each: pd.DataFrame, identity_at: float, success_at: float) -> pd.DataFrame:
    """Methods at equal cost and at equal gain (:func:`matched`), for people.

    "open %": trainings whose identity is still at least ``identity_at`` at the largest strength. "reached %":
    trainings that come to ``success_at`` at any strength; the mean identity is theirs.
    """
    by = ["group", "method"]
    gained = matched(each, "identity", identity_at, "success_after")
    kept = matched(each, "success_after", success_at, "identity")
    long = pd.concat([over_seeds(gained), over_seeds(kept)], ignore_index=True)
    long = long[long.group.isin(gained.group[gained.success_after.notna()])]  # elsewhere success is undefined
    if long.empty:
        return pd.DataFrame()
    table = wide(long.astype({name: each[name].dtype for name in by}), by).set_index(by)
    shares = gained[by].assign(**{"open %": 100 * gained.open, "reached %": 100.0 * kept.identity.notna()})
    shares = shares[gained.success_after.notna()]  # of trainings some of whose faces have the part
    table = table.join(shares.groupby(by, observed=True).mean().round(0).astype(int)).reset_index()
    at_identity = f"success % at identity ≥ {identity_at:g}"
    at_success = f"identity at success ≥ {100 * success_at:g} %"
    return table.rename(columns={label("success_after"): at_identity, label("identity"): at_success})


def search(table: pd.DataFrame, identity_at: float) -> pd.DataFrame:
    """The trials of a search, one line per method and settings, named by the settings that vary.

    Columns: the mean over the prompts of the success at ``identity_at`` (:func:`matched`), each prompt's, and
    ``chosen``: the best of its method, the first of equals.
    """
    given = table.settings.map(lambda settings: {name: str(value) for name, value in settings.items()})
    varied = {
        method: [name for name in trials.iloc[0] if len({one.get(name) for one in trials}) > 1]
        for method, trials in given.groupby(table.method)
    }
    trial = [
        f"{method}: " + ", ".join(f"{name} {one.get(name)}" for name in varied[method])
        for method, one in zip(table.method, given, strict=True)
    ]
    each = trainings(table.assign(trial=trial), lambda prompt: GROUPS[-1], by="trial")
    gained = matched(each, "identity", identity_at, "success_after").astype({"method": str})
    scores = gained.pivot_table("success_after", "method", "prompt", aggfunc="mean", sort=False)
    scores = scores.reindex(dict.fromkeys(trial))
    scores.insert(0, "mean", scores.mean(axis=1))
    method = [name.split(":")[0] for name in scores.index]
    best = scores["mean"].groupby(method).idxmax()
    chosen = [name == best[one] for name, one in zip(scores.index, method, strict=True)]
    return scores.assign(chosen=chosen).rename_axis("trial", columns=None).reset_index()


def budget(table: pd.DataFrame, records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What each method was given and how long it took: runs, steps, pictures, seeds, seconds per run."""
    seconds = {record["run"]: record["seconds"] for record in records}
    method = table.method.fillna("ablation") if "method" in table else "ablation"
    rows = []
    for name, pictures in table.assign(method=method).groupby("method"):
        runs = pictures.drop_duplicates("run")
        given = [settings for settings in runs.get("settings", ()) if isinstance(settings, dict)]
        rows.append({
            "method": name,
            "runs": len(runs),
            "steps": _listed(settings.get("steps") for settings in given),
            "pictures": _listed(runs.n),
            "seeds": _listed(pictures.seed),
            "seconds a run": f"{runs.run.map(seconds).mean():.0f}",
        })
    return pd.DataFrame(rows)


def _listed(numbers: Iterable[float | None]) -> str:
    return ", ".join(f"{number:g}" for number in sorted({n for n in numbers if pd.notna(n)}))
