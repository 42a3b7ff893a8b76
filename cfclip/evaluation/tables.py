"""A sweep's rows -> the paper's tables and figures.

A row of :func:`cfclip.sweep.gather` is a picture at a strength. A *training* is one method, prompt and seed; its number is the mean over its
pictures. Intervals are Student's t, 95 %, over seeds: the pictures of one training share its luck, and prompts are not drawn at random.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pandas as pd

from cfclip.baselines.methods import METHODS
from cfclip.domain import GROUPS
from cfclip.evaluation import ablation
from cfclip.evaluation.metrics import METRIC_DIRECTIONS, PERCENT
from cfclip.evaluation.stats import half_width, plus_minus

KEYS = ["method", "group", "prompt", "seed", "strength"]


def columns_of(table: pd.DataFrame) -> list[str]:
    """The metrics that ``table`` has, in :data:`METRIC_DIRECTIONS`'s order."""
    return [
        name
        for pattern in METRIC_DIRECTIONS
        for name in table.columns
        if fnmatch(name, pattern) and table[name].notna().any()
    ]


def label(metric: str) -> str:
    """ "success_after" -> "success % ↑"."""
    arrow = next((arrow for pattern, arrow in METRIC_DIRECTIONS.items() if fnmatch(metric, pattern)), "")
    return f"{metric.removesuffix('_after').replace('_', ' ')}{' %' if metric in PERCENT else ''} {arrow}".strip()


# ---- numbers ----


def trainings(table: pd.DataFrame, group_of: Callable[[str], str], by: str = "method") -> pd.DataFrame:
    """:data:`KEYS` and metrics, a line a training and strength. ``by="row"``: the ablation's rows as methods.

    ValueError if two runs are the same training with other settings, or if a face stands there twice: the mean would be meaningless.
    """
    own = table[table[by].notna()] if by in table else table.iloc[:0]
    names = columns_of(own)
    if own.empty:
        return pd.DataFrame(columns=[*KEYS, *names])
    own = own.assign(
        method=own[by], group=[group_of(prompt) for prompt in own.prompt], seed=own.seed.astype(int)
    )
    runs = own.groupby(["method", "prompt", "seed"]).run.nunique()
    if len(twice := runs[runs > 1]):
        raise ValueError(
            f"{twice.iloc[0]} runs of {', '.join(map(str, twice.index[0]))} differ in other parameters: gather one setting at a time"
        )
    if (twice := own.duplicated(["run", "method", "prompt", "seed", "strength", "index"])).any():
        raise ValueError(
            f"run {own.run[twice].iloc[0]} has two rows of one face at strength {own.strength[twice].iloc[0]:g}"
        )
    order = [name for name in (METHODS if by == "method" else ablation.ROWS) if name in set(own.method)]
    own["method"] = pd.Categorical(own.method, [*order, *sorted(set(own.method) - set(order))])
    own["group"] = pd.Categorical(own.group, [group for group in GROUPS if group in set(own.group)])
    return (
        own
        .groupby(["method", "group", "prompt", "seed", "strength"], observed=True)[names]
        .mean()
        .reset_index()
    )


def over_seeds(each: pd.DataFrame, by: Sequence[str] = ("group", "method")) -> pd.DataFrame:
    """Of :func:`trainings` at one strength: ``by``, metric, mean, half (of the interval), seeds. First the mean over prompts, seed by seed.

    A metric that is defined for none of them, as success for the null edit, is NaN.
    """
    names = [name for name in columns_of(each) if name not in by]
    per_seed = each.groupby([*by, "seed"], observed=True)[names].mean()
    rows = []
    for key, group in per_seed.groupby(list(by), observed=True):
        rows += [
            dict(zip(by, key, strict=True))
            | {"metric": name, "mean": values.mean(), "half": half_width(values), "seeds": len(values)}
            for name in names
            for values in [group[name].dropna()]
        ]
    long = pd.DataFrame(rows, columns=[*by, "metric", "mean", "half", "seeds"])
    return long.astype({name: each[name].dtype for name in by} if rows else {})


def wide(long: pd.DataFrame, rows: Sequence[str], across: str = "metric") -> pd.DataFrame:
    """:func:`over_seeds` as people read it: cells "mean ± half", a column per ``across``; one metric's table has its own label."""
    shown = long.assign(
        cell=[
            plus_minus(line.mean, line.half, 100 if line.metric in PERCENT else 1)
            for line in long.itertuples(index=False)
        ]
    )
    order = list(shown[across].unique())
    table = shown.pivot(index=list(rows), columns=across, values="cell").loc[:, order].fillna("–")
    return (
        table
        .sort_index()
        .rename(columns=label if across == "metric" else str)
        .rename_axis(columns=None)
        .reset_index()
    )


def whole_curve(training: pd.DataFrame, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of one training over growing strength, begun with strength 0, which is the source itself: identity 1, ``_after`` = ``_before``."""
    curve = training.sort_values("strength")
    curve = curve[curve.strength > 0]
    start = [
        1.0 if name == "identity" else training[name.replace("_after", "_before")].iloc[0] for name in (x, y)
    ]
    return tuple(np.concatenate([[zero], curve[name]]) for name, zero in zip((x, y), start, strict=True))


def best_where(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """The largest y on the polyline through the points (x, y) [K] where x >= ``at``; NaN if it never is."""
    values = list(y[x >= at])
    for i in np.flatnonzero((x[1:] >= at) != (x[:-1] >= at)):
        values.append(y[i] + (at - x[i]) / (x[i + 1] - x[i]) * (y[i + 1] - y[i]))
    return float(max(values)) if values else float("nan")


def matched(each: pd.DataFrame, hold: str, at: float, gain: str) -> pd.DataFrame:
    """The most of ``gain`` that a training has at any strength that keeps its mean ``hold`` at ``at`` or above: a line a training.

    Methods differ in what strength 1 is, so each is read off its own curve (:func:`whole_curve`), linearly between measured strengths and
    never beyond them. ``open``: ``hold`` is still there at the largest strength, so a larger one might have had more.
    """
    if each.empty or not {hold, gain, *(name.replace("_after", "_before") for name in (hold, gain))} <= set(
        columns_of(each)
    ):
        return each[KEYS[:-1]].drop_duplicates().assign(**{gain: np.nan, "open": np.nan})
    rows = []
    for key, training in each.groupby(["method", "group", "prompt", "seed"], observed=True):
        x, y = whole_curve(training, hold, gain)
        rows.append(
            dict(zip(KEYS, key, strict=False)) | {gain: best_where(x, y, at), "open": float(x[-1] >= at)}
        )
    return pd.DataFrame(rows).astype({name: each[name].dtype for name in ("method", "group")})


def fair(each: pd.DataFrame, identity_at: float, success_at: float) -> pd.DataFrame:
    """Methods at equal cost and at equal gain, by :func:`matched`, as people read it.

    "open": of how many trainings identity is still above ``identity_at`` at the largest strength. "reached": how many trainings come to
    ``success_at`` at all; the mean identity is that of those.
    """
    gained, kept = (
        matched(each, "identity", identity_at, "success_after"),
        matched(each, "success_after", success_at, "identity"),
    )
    long = pd.concat([over_seeds(gained), over_seeds(kept)], ignore_index=True)
    long = long[
        long.group.isin(gained.group[gained.success_after.notna()].unique())
    ]  # success is undefined in the others
    if long.empty:
        return pd.DataFrame()
    by, share = ["group", "method"], {"open %": gained.open, "reached %": kept.identity.notna()}
    shares = (
        gained[by]
        .assign(**{name: 100 * values.astype(float) for name, values in share.items()})
        .groupby(by, observed=True)
        .mean()
        .round(0)
    )
    table = (
        wide(long.astype({name: each[name].dtype for name in by}), by)
        .set_index(by)
        .join(shares.astype(int))
        .reset_index()
    )
    return table.rename(
        columns={
            label("success_after"): f"success % at identity ≥ {identity_at:g}",
            label("identity"): f"identity at success ≥ {100 * success_at:g} %",
        }
    )


def search(table: pd.DataFrame, identity_at: float) -> pd.DataFrame:
    """What a search found: a line a trial (method, settings), with its success at ``identity_at`` (:func:`matched`) on each prompt, their mean,
    and ``chosen``: the best of its method, the first of equals."""
    given = [{name: str(value) for name, value in own.items()} for own in table.settings]
    varied = {
        method: [name for name in own[0] if len({one.get(name) for one in own}) > 1]
        for method in table.method.unique()
        for own in [[one for one, m in zip(given, table.method, strict=True) if m == method]]
    }
    trial = [
        f"{method}: " + ", ".join(f"{name} {own.get(name)}" for name in varied[method])
        for method, own in zip(table.method, given, strict=True)
    ]
    gained = matched(
        trainings(table.assign(trial=trial), lambda prompt: GROUPS[-1], by="trial"),
        "identity",
        identity_at,
        "success_after",
    )
    found = (
        gained
        .astype({"method": str})
        .pivot_table("success_after", "method", "prompt", aggfunc="mean", sort=False)
        .reindex(dict.fromkeys(trial))
    )
    found.insert(0, "mean", found.mean(axis=1))
    method = [name.split(":")[0] for name in found.index]
    best = found["mean"].groupby(method).idxmax()
    return (
        found
        .assign(chosen=[name == best[m] for name, m in zip(found.index, method, strict=True)])
        .rename_axis("trial", columns=None)
        .reset_index()
    )


def budget(table: pd.DataFrame, records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What each method was given and took: runs, steps, pictures, seeds, seconds a run."""
    seconds = {record["run"]: record["seconds"] for record in records}
    runs = table.drop_duplicates("run").assign(seconds=lambda t: t.run.map(seconds))
    given = runs.get("settings", pd.Series(np.nan, runs.index, dtype=object))
    runs["steps"] = [own.get("steps", np.nan) if isinstance(own, dict) else np.nan for own in given]
    name = runs.get("method", pd.Series(np.nan, runs.index, dtype=object)).fillna("ablation")
    seeds = (
        table
        .assign(method=table.run.map(dict(zip(runs.run, name, strict=True))))
        .groupby("method")
        .seed.unique()
    )
    return pd.DataFrame([
        {
            "method": method,
            "runs": len(own),
            "steps": _span(own.steps),
            "pictures": _span(own.n),
            "seeds": ", ".join(f"{seed:g}" for seed in sorted(seeds[method])),
            "seconds a run": f"{own.seconds.mean():.0f}",
        }
        for method, own in runs.groupby(name)
    ])


def _span(values: pd.Series) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values.dropna().unique()))


# ---- files ----


def ablation_rows(table: pd.DataFrame, strength: float = 1.0, names: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of 03_ablation_directions at ``strength``, as :mod:`cfclip.ablation` takes them; with the metrics ``names``, or all."""
    if "row" not in table:
        return pd.DataFrame(columns=ablation.KEYS)
    own = table[table.row.notna() & (table.strength == strength)]
    own = own.assign(
        row=pd.Categorical(own.row, [row for row in ablation.ROWS if row in set(own.row)])
    ).sort_values(["row", "seed", "index"])
    return own.astype({"row": str, "seed": int})[
        [*ablation.KEYS, *(name for name in columns_of(own) if not names or name in names)]
    ]
