"""A sweep's rows -> the paper's tables and figures.

A row of :func:`cfclip.sweep.gather` is a picture at a strength. A *training* is one method, prompt and seed; its number is the mean over its
pictures. Intervals are Student's t, 95 %, over seeds: the pictures of one training share its luck, and prompts are not drawn at random.
"""

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from . import ablation, baselines, metrics, reporting, sweep
from .domains import Domain
from .evaluation import GROUPS, group_of
from .reporting import PERCENT, half_width, plt
from .training import atomic_save

KNOWN: dict[str, str] = {
    "success_before": "", "success_after": "↑", "success_inverted": "↑", "truth_distance": "↓", "truth_floor": "",
    "leakage": "↓", "identity": "↑", "lpips_*": "↓",
    "clip_before": "", "clip_after": "↑", "clip_direction": "↑", "heldout_clip_before": "", "heldout_clip_after": "↑", "heldout_direction": "↑",
    "kid_natural": "↓", "kid_counterfactual": "↓", "round_trip_*": "",
}
"""Metric (or pattern) -> which way is better; in the order in which tables show them."""
HEADLINE = ("success_after", "truth_distance", "identity", "leakage", "heldout_clip_after", "clip_after")
"""What figures show."""
MARKERS = "oXsPD^v*"
KEYS = ["method", "group", "prompt", "seed", "strength"]


def columns_of(table: pd.DataFrame) -> list[str]:
    """The metrics that ``table`` has, in :data:`KNOWN`'s order."""
    return [name for pattern in KNOWN for name in table.columns if fnmatch(name, pattern) and table[name].notna().any()]


def label(metric: str) -> str:
    """"success_after" -> "success % ↑"."""
    arrow = next((arrow for pattern, arrow in KNOWN.items() if fnmatch(metric, pattern)), "")
    return f"{metric.removesuffix('_after').replace('_', ' ')}{' %' if metric in PERCENT else ''} {arrow}".strip()


# ---- numbers ----

def trainings(table: pd.DataFrame, source_text: str = "face", by: str = "method") -> pd.DataFrame:
    """:data:`KEYS` and metrics, a line a training and strength. ``by="row"``: the ablation's rows as methods.

    ValueError if two runs are the same training with other settings, or if a face stands there twice: their mean would be no one's.
    """
    own = table[table[by].notna()] if by in table else table.iloc[:0]
    names = columns_of(own)
    if own.empty:
        return pd.DataFrame(columns=[*KEYS, *names])
    own = own.assign(method=own[by], group=[group_of(prompt, source_text) for prompt in own.prompt], seed=own.seed.astype(int))
    runs = own.groupby(["method", "prompt", "seed"]).run.nunique()
    if len(twice := runs[runs > 1]):
        raise ValueError(f"{twice.iloc[0]} runs of {', '.join(map(str, twice.index[0]))} differ in other parameters: gather one setting at a time")
    if (twice := own.duplicated(["run", "method", "prompt", "seed", "strength", "index"])).any():
        raise ValueError(f"run {own.run[twice].iloc[0]} has two rows of one face at strength {own.strength[twice].iloc[0]:g}")
    order = [name for name in (baselines.METHODS if by == "method" else ablation.ROWS) if name in set(own.method)]
    own["method"] = pd.Categorical(own.method, [*order, *sorted(set(own.method) - set(order))])
    own["group"] = pd.Categorical(own.group, [group for group in GROUPS if group in set(own.group)])
    return own.groupby(["method", "group", "prompt", "seed", "strength"], observed=True)[names].mean().reset_index()


def over_seeds(each: pd.DataFrame, by: Sequence[str] = ("group", "method")) -> pd.DataFrame:
    """Of :func:`trainings` at one strength: ``by``, metric, mean, half (of the interval), seeds. First the mean over prompts, seed by seed.

    A metric that is defined for none of them, as success for the null edit, is NaN.
    """
    names = [name for name in columns_of(each) if name not in by]
    per_seed = each.groupby([*by, "seed"], observed=True)[names].mean()
    rows = []
    for key, group in per_seed.groupby(list(by), observed=True):
        rows += [dict(zip(by, key, strict=True)) | {"metric": name, "mean": values.mean(), "half": half_width(values), "seeds": len(values)}
                 for name in names for values in [group[name].dropna()]]
    long = pd.DataFrame(rows, columns=[*by, "metric", "mean", "half", "seeds"])
    return long.astype({name: each[name].dtype for name in by} if rows else {})


def wide(long: pd.DataFrame, rows: Sequence[str], across: str = "metric") -> pd.DataFrame:
    """:func:`over_seeds` as people read it: cells "mean ± half", a column per ``across``; one metric's table has its own label."""
    shown = long.assign(cell=[reporting.plus_minus(line.mean, line.half, 100 if line.metric in PERCENT else 1)
                              for line in long.itertuples(index=False)])
    order = list(shown[across].unique())
    table = shown.pivot(index=list(rows), columns=across, values="cell").loc[:, order].fillna("–")
    return table.sort_index().rename(columns=label if across == "metric" else str).rename_axis(columns=None).reset_index()


def whole_curve(training: pd.DataFrame, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of one training over growing strength, begun with strength 0, which is the source itself: identity 1, ``_after`` = ``_before``."""
    curve = training.sort_values("strength")
    curve = curve[curve.strength > 0]
    start = [1.0 if name == "identity" else training[name.replace("_after", "_before")].iloc[0] for name in (x, y)]
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
    if each.empty or not {hold, gain, *(name.replace("_after", "_before") for name in (hold, gain))} <= set(columns_of(each)):
        return each[KEYS[:-1]].drop_duplicates().assign(**{gain: np.nan, "open": np.nan})
    rows = []
    for key, training in each.groupby(["method", "group", "prompt", "seed"], observed=True):
        x, y = whole_curve(training, hold, gain)
        rows.append(dict(zip(KEYS, key, strict=False)) | {gain: best_where(x, y, at), "open": float(x[-1] >= at)})
    return pd.DataFrame(rows).astype({name: each[name].dtype for name in ("method", "group")})


def fair(each: pd.DataFrame, identity_at: float, success_at: float) -> pd.DataFrame:
    """Methods at equal cost and at equal gain, by :func:`matched`, as people read it.

    "open": of how many trainings identity is still above ``identity_at`` at the largest strength. "reached": how many trainings come to
    ``success_at`` at all; the mean identity is that of those.
    """
    gained, kept = matched(each, "identity", identity_at, "success_after"), matched(each, "success_after", success_at, "identity")
    long = pd.concat([over_seeds(gained), over_seeds(kept)], ignore_index=True)
    long = long[long.group.isin(gained.group[gained.success_after.notna()].unique())]      # success is undefined in the others
    if long.empty:
        return pd.DataFrame()
    by, share = ["group", "method"], {"open %": gained.open, "reached %": kept.identity.notna()}
    shares = gained[by].assign(**{name: 100 * values.astype(float) for name, values in share.items()}).groupby(by, observed=True).mean().round(0)
    table = wide(long.astype({name: each[name].dtype for name in by}), by).set_index(by).join(shares.astype(int)).reset_index()
    return table.rename(columns={label("success_after"): f"success % at identity ≥ {identity_at:g}",
                                 label("identity"): f"identity at success ≥ {100 * success_at:g} %"})


def search(table: pd.DataFrame, identity_at: float) -> pd.DataFrame:
    """What a search found: a line a trial (method, settings), with its success at ``identity_at`` (:func:`matched`) on each prompt, their mean,
    and ``chosen``: the best of its method, the first of equals."""
    trial = [f"{method}: " + ", ".join(f"{name} {value}" for name, value in given.items() if name != "levels")
             for method, given in zip(table.method, table.settings, strict=True)]
    gained = matched(trainings(table.assign(trial=trial), by="trial"), "identity", identity_at, "success_after")
    found = gained.astype({"method": str}).pivot_table("success_after", "method", "prompt", aggfunc="mean", sort=False).reindex(dict.fromkeys(trial))
    found.insert(0, "mean", found.mean(axis=1))
    method = [name.split(":")[0] for name in found.index]
    best = found["mean"].groupby(method).idxmax()
    return found.assign(chosen=[name == best[m] for name, m in zip(found.index, method, strict=True)]).rename_axis("trial", columns=None).reset_index()


def budget(table: pd.DataFrame, records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What each method was given and took: runs, steps, pictures, seeds, seconds a run."""
    seconds = {record["run"]: record["seconds"] for record in records}
    runs = table.drop_duplicates("run").assign(seconds=lambda t: t.run.map(seconds))
    if "settings" in runs:                                   # what is set for one method wins over the notebook's parameter
        own = [given if isinstance(given, dict) else {} for given in runs.settings]
        runs["steps"] = [given.get("steps", steps) for given, steps in zip(own, runs.steps, strict=True)]
    if "method" in runs:
        runs.loc[runs.method == "styleclip-global", "steps"] = np.nan      # it takes none
    name = runs.get("method", pd.Series(np.nan, runs.index, dtype=object)).fillna("ablation")
    seeds = table.assign(method=table.run.map(dict(zip(runs.run, name, strict=True)))).groupby("method").seed.unique()
    return pd.DataFrame([{"method": method, "runs": len(own), "steps": _span(own.steps), "pictures": _span(own.n),
                          "seeds": ", ".join(f"{seed:g}" for seed in sorted(seeds[method])), "seconds a run": f"{own.seconds.mean():.0f}"}
                         for method, own in runs.groupby(name)])


def _span(values: pd.Series) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values.dropna().unique()))


# ---- figures ----

def curves(each: pd.DataFrame, names: Sequence[str] = HEADLINE) -> Figure:
    """Metrics [rows] by groups [columns] against the strength: a line a method, the mean over prompts with its interval over seeds."""
    names = [name for name in names if name in columns_of(each)]
    groups = list(each.group.cat.categories)
    per_seed = each.groupby(["group", "method", "seed", "strength"], observed=True)[names].mean().reset_index()
    markers = dict(zip(each.method.cat.categories, MARKERS, strict=False))
    drawn, axes = plt.subplots(len(names), len(groups), figsize=(3.1 * len(groups) + 0.4, 2.1 * len(names) + 0.6), sharex=True, sharey="row",
                               squeeze=False, layout="constrained")
    for i, name in enumerate(names):
        for axis, group in zip(axes[i], groups, strict=True):
            shown = per_seed[(per_seed.group == group) & per_seed[name].notna()]
            if shown.empty:
                axis.text(0.5, 0.5, "undefined", transform=axis.transAxes, ha="center", va="center", color="0.5")
            else:
                sns.lineplot(shown, x="strength", y=name, hue="method", style="method", markers=markers, dashes=False, ax=axis, legend=False,
                             errorbar=lambda v: (v.mean() - half_width(v), v.mean() + half_width(v)))
            axis.set(title=group if i == 0 else "", xlabel="strength" if i == len(names) - 1 else "",
                     ylabel=label(name).replace(" %", "") if axis is axes[i, 0] else "")
    return _with_legend(drawn, each)


def tradeoff(each: pd.DataFrame, x: str = "identity", y: str = "success_after", marks: tuple[float, float] | None = None) -> Figure:
    """``y`` against ``x``, a panel a group: a line a method from strength 0 on, the source itself; a point a measured strength.

    ``marks``: dotted lines at this x and this y, where :func:`matched` compares.
    """
    groups = [group for group in each.group.cat.categories if each.loc[each.group == group, y].notna().any()]
    drawn, axes = plt.subplots(1, len(groups), figsize=(3.4 * len(groups) + 0.4, 3.3), sharex=True, sharey=True, squeeze=False, layout="constrained")
    for axis, group in zip(axes[0], groups, strict=True):
        shown = each[each.group == group]
        for i, method in enumerate(each.method.cat.categories):
            means = shown[shown.method == method].groupby("strength")[columns_of(each)].mean().reset_index()
            if len(means):
                axis.plot(*whole_curve(means, x, y), color=f"C{i}", marker=MARKERS[i % len(MARKERS)], markersize=5, linewidth=1.2)
        if marks:
            axis.axvline(marks[0], color="0.6", linewidth=0.8, linestyle=":", zorder=0)
            axis.axhline(marks[1], color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        axis.set(title=group, xlabel=x.replace("_", " "), ylabel=y.removesuffix("_after").replace("_", " "))
    axes[0, 0].invert_xaxis()                                # so that strength grows to the right
    return _with_legend(drawn, each)


def _with_legend(drawn: Figure, each: pd.DataFrame) -> Figure:
    handles = [plt.Line2D([], [], color=f"C{i}", marker=MARKERS[i % len(MARKERS)], label=method) for i, method in enumerate(each.method.cat.categories)]
    drawn.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return drawn


def edits(table: pd.DataFrame, runs: str | os.PathLike, domain: Domain, w: Tensor, prompts: Sequence[str] = (),
          strength: float = 1.0) -> dict[str, Tensor]:
    """prompt -> pictures [N (1 + M), 3, R, R]: each of the codes w [N, L, D], then what every method makes of it; each method's first seed.

    Ordered as :func:`trainings` has methods and groups; all prompts for none. A method that has no run for a prompt shows white.
    """
    own = table[table.method.notna()].drop_duplicates("run").sort_values("seed").drop_duplicates(["method", "prompt"])
    methods = [method for method in baselines.METHODS if method in set(own.method)]
    known = sorted(set(own.prompt), key=lambda prompt: (GROUPS.index(group_of(prompt, domain.source_text)), prompt))
    with torch.no_grad():
        source = domain.generator.synthesis(w)
    rows = {}
    for prompt in prompts or known:
        run = own[own.prompt == prompt].set_index("method").run
        made = [baselines.load_editor(Path(runs) / run[method], domain).edit(w, strength) if method in run else torch.ones_like(source)
                for method in methods]
        rows[prompt] = torch.stack([source, *made], 1).flatten(0, 1)
    return rows


def picture_grid(rows: Mapping[str, Tensor], methods: Sequence[str]) -> Figure:
    """:func:`edits` with the methods' names above."""
    n = len(next(iter(rows.values())))
    return reporting.image_grid(rows, columns=n, headers=[name.replace("-", "-\n") for name in ("source", *methods)] * (n // (1 + len(methods))))


# ---- files ----

def ablation_rows(table: pd.DataFrame, strength: float = 1.0, names: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of 03_ablation_directions at ``strength``, as :mod:`cfclip.ablation` takes them; with the metrics ``names``, or all."""
    if "row" not in table:
        return pd.DataFrame(columns=ablation.KEYS)
    own = table[table.row.notna() & (table.strength == strength)]
    own = own.assign(row=pd.Categorical(own.row, [row for row in ablation.ROWS if row in set(own.row)])).sort_values(["row", "seed", "index"])
    return own.astype({"row": str, "seed": int})[[*ablation.KEYS, *(name for name in columns_of(own) if not names or name in names)]]


def sections(each: pd.DataFrame) -> str:
    """Markdown: a section a group, in it a table a metric, methods by prompts; of :func:`trainings` at one strength."""
    long, parts = over_seeds(each, ("group", "method", "prompt")), []
    for group, own in long.groupby("group", observed=True):
        parts.append(f"## {group[0].upper()}{group[1:]}\n")
        parts += [f"{label(metric)}\n\n{reporting.markdown(wide(one, ['method'], 'prompt'))}" for metric, one in own.groupby("metric", sort=False)
                  if one["mean"].notna().any() and not metric.endswith("_before")]
    return "\n".join(parts)


def readme(begin: str, parts: Mapping[str, pd.DataFrame], notes: Mapping[str, str], figures: Sequence[str], title: str = "The paper's tables") -> str:
    """Markdown: a section a table with its note below, those without a row left out; then the figures."""
    sections = [f"## {name}\n\n{reporting.markdown(table, notes.get(name, ''))}" for name, table in parts.items() if len(table)]
    pictures = [f"![{name}]({name}.png)\n\n[{name}.pdf]({name}.pdf)\n" for name in figures]
    return "\n".join([f"# {title}\n\n{begin}\n", *sections, *(["## Figures\n"] if figures else []), *pictures])


def write(folder: str | os.PathLike, frames: Mapping[str, pd.DataFrame], texts: Mapping[str, str], figures: Mapping[str, Figure]) -> Path:
    """Each frame as CSV, each text as Markdown, each figure as PNG and PDF -> ``folder``."""
    folder = reporting.writable(folder)
    for name, frame in frames.items():
        atomic_save(frame, folder / f"{name}.csv", lambda frame, part: frame.to_csv(part, index=False, float_format="%.6g"))
    for name, text in texts.items():
        atomic_save(text, folder / f"{name}.md", lambda text, part: part.write_text(text, encoding="utf-8"))
    for name, figure in figures.items():
        for kind in ("png", "pdf"):
            reporting.save_figure(figure, folder / f"{name}.{kind}")
    return folder


def provenance(records: Sequence[Mapping[str, Any]]) -> str:
    """One paragraph: how many runs, how long, under which versions, and on which machine the tables were made."""
    found = {name: sorted({str(record.get("versions", {}).get(name, "unknown")) for record in records}) for name in reporting.versions()}
    seconds = sum(record["seconds"] for record in records)
    return (f"{len(records)} runs, {seconds:.0f} seconds ({seconds / 3600:.1f} hours) summed over them. Tables made on: {reporting.machine()}. Runs: "
            + ", ".join(f"{name} {' and '.join(values)}" for name, values in found.items()) + ".")


def example(domain: Domain, folder: str | os.PathLike) -> Path:
    """Runs of one step as a sweep leaves them, for a look at the tables; their numbers mean nothing."""
    folder, strengths, n = Path(folder), [0.5, 1.0], 2
    cells = [("02_training", method, prompt, seed) for method in ("cfclip", "styleclip-mapper") for prompt in ("green lipstick", domain.source_text)
             for seed in (0, 1)]
    cells += [("03_ablation_directions", row, "green lipstick", seed) for row in ("CF-CLIP", "negatives: none") for seed in (0, 1)]
    for notebook, name, prompt, seed in cells:
        run = f"{notebook}-{sweep.slug(name)}-{sweep.slug(prompt)}-{seed}"
        shared = {"out": folder / run, "progress": False, "seed": seed, "steps": 1, "batch": 1, "train_latents": 1}
        if notebook == "02_training":
            editor = baselines.fit(name, domain, prompt, **shared)
            rows = pd.DataFrame(metrics.over_strengths(domain, prompt, editor.edit, domain.latents(n, "test", seed), strengths))
        else:
            rows = ablation.run_row(domain, name, prompt, n=n, strengths=strengths, **shared)
        reporting.write_rows(rows.to_dict("records"), folder / run / "metrics.jsonl")
        given = {"domain": domain.name, "prompt": prompt, "steps": 1, "n": n}
        given |= {"method": name, "seed": seed, "settings": {}} if notebook == "02_training" else {"rows": [name], "seeds": [seed], "strength": 1.0}
        sweep.write_record(sweep.Run(run, sweep.find_notebook(notebook), given, {}), folder / run, "finished")
    return folder
