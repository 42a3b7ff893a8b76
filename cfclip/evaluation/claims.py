"""The paper's claims, each judged by numbers and one rule."""

from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from cfclip.baselines.methods import METHODS
from cfclip.domain import COUNTERFACTUAL
from cfclip.evaluation.figures import panels
from cfclip.evaluation.metrics import PERCENT
from cfclip.evaluation.stats import half_width, plus_minus
from cfclip.evaluation.tables import columns_of, matched

HOLDS, FAILS, UNDECIDED, UNTESTED = "holds", "does not hold", "undecided", "cannot be tested here"
COLOURS = {HOLDS: "C2", FAILS: "C3", UNDECIDED: "0.5"}
RULE = (
    "Rule: two methods are compared at the same prompt and the same seed. The differences are averaged over "
    "the counterfactual prompts, seed by seed, then over seeds, with a 95 % interval (Student's t). If all "
    "of it is above 0, the claim holds; if all of it is below 0, it does not hold; if it contains 0, or "
    "with one seed, it is undecided. Where there is nothing to compare, it cannot be tested here."
)
COLUMNS = ["claim", "measure", "verdict", "why", "difference", "half"]
BASELINES = [method for method in METHODS if method != "cfclip"]
PARTS = {
    "positive: target only": "the text direction p1 contributes",
    "positive: text direction only": "the target direction p2 contributes",
    "negatives: none": "negatives contribute",
    "views: none": "perspective augmentation contributes",
    "no text mapper": "the text mapper contributes",
    "loss: StyleCLIP": "CLIP-NCE beats StyleCLIP's loss",
    "loss: directional": "CLIP-NCE beats the directional loss",
}
"""Row of the ablation that lacks something -> what the paper claims of it."""


def decide(values: pd.Series) -> tuple[str, float, float]:
    """(verdict, mean, half) by :data:`RULE`, of one number per seed that should be above 0."""
    mean, half = float(values.mean()), half_width(values)
    if np.isnan(half) or abs(mean) <= half:
        return UNDECIDED, mean, half
    return (HOLDS if mean > 0 else FAILS), mean, half


def compare(values: pd.DataFrame, ours: str, other: str, column: str) -> dict[str, Any]:
    """Is ``column`` of the method ``ours`` above that of ``other``?

    values: method, prompt, seed and ``column``, one line per training, and perhaps ``open``
    (:func:`.tables.matched`).
    """
    for method in (ours, other):
        if method not in set(values.method):
            return {"verdict": UNTESTED, "why": f"no runs of {method}"}
    if column not in columns_of(values):
        return {"verdict": UNTESTED, "why": "undefined in every training"}
    a, b = (values[values.method == method].set_index(["prompt", "seed"])[column] for method in (ours, other))
    pairs = pd.DataFrame({"a": a, "b": b}).dropna()
    if pairs.empty:
        return {"verdict": UNTESTED, "why": "no prompt and seed at which both are defined"}
    difference = pairs.a - pairs.b
    verdict, mean, half = decide(difference.groupby("seed").mean())
    scale, unit = (100, " %") if column in PERCENT else (1, "")
    prompts = difference.groupby("prompt").mean()
    why = [
        f"{scale * pairs.a.mean():.3g}{unit} against {scale * pairs.b.mean():.3g}{unit}: "
        + plus_minus(mean, half, scale, "+.3g"),
        f"ahead on {(prompts > 0).sum()} of {len(prompts)} prompts",
        f"{difference.index.unique('seed').size} seeds",
    ]
    if len(pairs) < (total := len(a.index.union(b.index))):
        why.append(f"{total - len(pairs)} of {total} pairs undefined")
    if "open" in values and values[values.method.isin([ours, other])].open.any():
        share = 100 * values.groupby("method", observed=True).open.mean()
        why.append(
            "identity was still above the threshold at the largest strength in "
            f"{share[ours]:.0f} % of ours and {share[other]:.0f} % of the other's trainings"
        )
    return {"verdict": verdict, "why": "; ".join(why), "difference": mean, "half": half}


def agreement(values: pd.DataFrame, x: str, y: str) -> dict[str, Any]:
    """Do the metrics ``x`` and ``y`` rank the methods alike?

    Spearman's rank correlation for each prompt and seed with at least three methods; the mean over prompts is
    judged over seeds.
    """
    if missing := [name for name in (x, y) if name not in columns_of(values)]:
        return {"verdict": UNTESTED, "why": f"no metric {', '.join(missing)}"}
    both, rows = values.dropna(subset=[x, y]), []
    for (prompt, seed), methods in both.groupby(["prompt", "seed"]):
        if methods.method.nunique() > 2 and methods[x].nunique() > 1 and methods[y].nunique() > 1:
            rows.append((seed, prompt, methods[x].rank().corr(methods[y].rank())))
    if not rows:
        return {"verdict": UNTESTED, "why": "no prompt with three methods that differ"}
    ranks = pd.DataFrame(rows, columns=["seed", "prompt", "rho"])
    verdict, mean, half = decide(ranks.groupby("seed").rho.mean())
    why = (
        f"ρ = {plus_minus(mean, half, form='.2f')} over {both.method.nunique()} methods; "
        f"{ranks.prompt.nunique()} prompts; {ranks.seed.nunique()} seeds"
    )
    return {"verdict": verdict, "why": why, "difference": mean, "half": half}


Measure = tuple[str, str, pd.DataFrame]
"""How something is measured, its column, and a table with one line per training."""


def followed(each: pd.DataFrame) -> str:
    """How well a prompt is followed, as a column: success, or a CLIP score without a ground truth."""
    candidates = ("success_after", "heldout_clip_after", "clip_after")
    return next((name for name in candidates if name in columns_of(each)), "success_after")


def editing(each: pd.DataFrame, strength: float, identity_at: float) -> Iterator[Measure]:
    """How well a prompt is followed, at one strength and at the same identity."""
    score = followed(each)
    name = score.removesuffix("_after").replace("_", " ")
    yield f"{name} at strength {strength:g}", score, each[each.strength == strength]
    yield f"{name} at identity ≥ {identity_at:g}", score, matched(each, "identity", identity_at, score)


def keeping(each: pd.DataFrame, strength: float, success_at: float) -> Iterator[Measure]:
    """How well identity is kept, at one strength and at the same success.

    A CLIP score does not replace success here: none of its values means the same for two prompts.
    """
    yield f"identity at strength {strength:g}", "identity", each[each.strength == strength]
    if followed(each) == "success_after":
        kept = matched(each, "success_after", success_at, "identity").drop(columns="open")
        yield f"identity at success ≥ {100 * success_at:g} %", "identity", kept


def panel(
    each: pd.DataFrame,
    ablated: pd.DataFrame,
    domain: str = "toonfaces",
    strength: float = 1.0,
    identity_at: float = 0.85,
    success_at: float = 0.5,
) -> pd.DataFrame:
    """:data:`COLUMNS`, one line per claim and measure, from the counterfactual prompts only.

    each, ablated: :func:`cfclip.evaluation.tables.trainings` of the methods and of the ablation's rows.
    """
    each, ablated = (table[table.group.isin(COUNTERFACTUAL)] for table in (each, ablated))
    lines = []
    for says, measures in (
        ("edits counterfactual prompts better than", editing(each, strength, identity_at)),
        ("keeps identity better than", keeping(each, strength, success_at)),
    ):
        for measure, column, values in measures:
            for other in BASELINES:
                line = {"claim": f"CF-CLIP {says} {other}", "measure": measure}
                lines.append(line | compare(values, "cfclip", other, column))
    measures = list(editing(ablated, strength, identity_at))
    for row, claim in PARTS.items():
        for measure, column, values in measures:
            line = {"claim": claim, "measure": measure}
            lines.append(line | compare(values, "CF-CLIP", row, column))
    at_strength = each[each.strength == strength]
    for judge, column in (("a held-out CLIP", "heldout_clip_after"), ("the ground truth", "success_after")):
        claim = f"the CLIP that was optimised ranks methods as {judge} does"
        line = {"claim": claim, "measure": f"Spearman at strength {strength:g}"}
        lines.append(line | agreement(at_strength, "clip_after", column))
    missing = f"needs those generators' checkpoints; these runs are of {domain}"
    for claim, measure, why in (
        ("people prefer CF-CLIP's edits", "user study", "needs people"),
        ("the paper's numbers on FFHQ and AFHQ", "the paper's tables", missing),
    ):
        lines.append({"claim": claim, "measure": measure, "verdict": UNTESTED, "why": why})
    return pd.DataFrame(lines, columns=COLUMNS)


def figure(judged: pd.DataFrame) -> Figure:
    """The differences of :func:`panel` with their intervals, coloured by verdict, one panel per measure."""
    shown = judged[judged.difference.notna()]
    measures = list(shown.measure.unique()) or ["nothing could be compared"]
    sizes = [max((shown.measure == measure).sum(), 1) for measure in measures]
    size = 8.5, 0.26 * sum(sizes) + 0.7 * len(measures) + 0.4
    drawn, axes = panels(len(measures), 1, size, height_ratios=[lines + 1 for lines in sizes])
    for axis, measure in zip(axes[:, 0], measures, strict=True):
        lines = shown[shown.measure == measure].iloc[::-1]
        axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
        for line in lines.itertuples(index=False):
            bar = {"xerr": 0 if np.isnan(line.half) else line.half, "capsize": 2}
            style = {"marker": "o", "markersize": 4, "color": COLOURS[line.verdict]}
            axis.errorbar(line.difference, line.claim, **bar, **style)
        axis.set_title(measure, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.margins(y=0.6 / max(len(lines), 1))
        sns.despine(ax=axis)
    dots = [plt.Line2D([], [], color=colour, marker="o", label=name) for name, colour in COLOURS.items()]
    drawn.legend(handles=dots, loc="outside lower center", ncols=3, frameon=False)
    return drawn
