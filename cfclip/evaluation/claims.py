"""The paper's claims, one by one, judged by numbers and one rule."""

from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from cfclip.baselines.methods import METHODS
from cfclip.domain import COUNTERFACTUAL
from cfclip.evaluation.metrics import PERCENT
from cfclip.evaluation.stats import half_width
from cfclip.evaluation.tables import columns_of, matched

HOLDS, FAILS, UNDECIDED, UNTESTED = "holds", "does not hold", "undecided", "cannot be tested here"

RULE = (
    "Rule: differences are paired, the same prompt and the same seed; first their mean over the counterfactual prompts, seed by seed, then its "
    "95 % interval over seeds (Student's t). All of it above 0: holds; all below 0: does not hold; else, or with one seed, undecided. "
    "Nothing to compare: cannot be tested here."
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
"""Row of the ablation that lacks something -> what the paper says of that."""


def decide(values: pd.Series) -> tuple[str, float, float]:
    """(verdict, mean, half) of one number per seed that ought to be above 0; by :data:`RULE`."""
    mean, half = float(values.mean()), half_width(values)
    if np.isnan(half) or abs(mean) <= half:
        return UNDECIDED, mean, half
    return (HOLDS if mean > 0 else FAILS), mean, half


def compare(values: pd.DataFrame, ours: str, other: str, column: str) -> dict[str, Any]:
    """Is ``column`` of the method ``ours`` above the other's? ``values``: method, prompt, seed, ``column``, a line a training, perhaps ``open``."""
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
    sure = "" if np.isnan(half) else f" ± {scale * half:.2g}"
    why = (
        f"{scale * pairs.a.mean():.3g}{unit} against {scale * pairs.b.mean():.3g}{unit}: {scale * mean:+.3g}{sure}; ahead on {(prompts > 0).sum()} of "
        f"{len(prompts)} prompts; {difference.index.unique('seed').size} seeds"
    )
    if len(pairs) < (total := len(a.index.union(b.index))):
        why += f"; {total - len(pairs)} of {total} pairs undefined"
    if "open" in values and values[values.method.isin([ours, other])].open.any():
        left = values.groupby("method", observed=True).open.mean()
        why += f"; strengths too small to use the room up in {100 * left[ours]:.0f} % of ours and {100 * left[other]:.0f} % of the other's trainings"
    return {"verdict": verdict, "why": why, "difference": mean, "half": half}


def agreement(values: pd.DataFrame, x: str, y: str) -> dict[str, Any]:
    """Spearman's rank correlation of two metrics over methods, prompt by prompt; their mean is judged over seeds. Takes three methods."""
    if missing := [name for name in (x, y) if name not in columns_of(values)]:
        return {"verdict": UNTESTED, "why": f"no metric {', '.join(missing)}"}
    both = values.dropna(subset=[x, y])
    found = pd.DataFrame(
        [
            {"seed": seed, "prompt": prompt, "rho": own[x].rank().corr(own[y].rank())}
            for (prompt, seed), own in both.groupby(["prompt", "seed"])
            if own.method.nunique() > 2 and own[x].nunique() > 1 and own[y].nunique() > 1
        ],
        columns=["seed", "prompt", "rho"],
    )
    if found.empty:
        return {"verdict": UNTESTED, "why": "no prompt with three methods that differ"}
    verdict, mean, half = decide(found.groupby("seed").rho.mean())
    why = (
        f"ρ = {mean:.2f}"
        + ("" if np.isnan(half) else f" ± {half:.2g}")
        + f" over {both.method.nunique()} methods; {found.prompt.nunique()} prompts; "
        f"{found.seed.nunique()} seeds"
    )
    return {"verdict": verdict, "why": why, "difference": mean, "half": half}


def _measures(
    each: pd.DataFrame, strength: float, identity_at: float, success_at: float
) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(how it is measured, column, a line a training) of editing, then of keeping identity."""
    success = next(
        (name for name in ("success_after", "heldout_clip_after", "clip_after") if name in columns_of(each)),
        "success_after",
    )
    name = success.removesuffix("_after").replace("_", " ")
    there = each[each.strength == strength]
    yield f"{name} at strength {strength:g}", success, there
    yield f"{name} at identity ≥ {identity_at:g}", success, matched(each, "identity", identity_at, success)
    yield f"identity at strength {strength:g}", "identity", there
    if success in PERCENT:  # a CLIP score has no level that means the same for two prompts
        yield (
            f"identity at success ≥ {100 * success_at:g} %",
            "identity",
            matched(each, success, success_at, "identity").drop(columns="open"),
        )


def panel(
    each: pd.DataFrame,
    ablated: pd.DataFrame,
    domain: str = "toonfaces",
    strength: float = 1.0,
    identity_at: float = 0.85,
    success_at: float = 0.5,
) -> pd.DataFrame:
    """:data:`COLUMNS`, a line a claim and measure. each, ablated: :func:`cfclip.tables.trainings` of the methods and of the ablation's rows."""
    each, ablated = (table[table.group.isin(COUNTERFACTUAL)] for table in (each, ablated))
    lines = []
    for i, (measure, column, values) in enumerate(_measures(each, strength, identity_at, success_at)):
        says = "edits counterfactual prompts better than" if i < 2 else "keeps identity better than"
        lines += [
            {"claim": f"CF-CLIP {says} {other}", "measure": measure}
            | compare(values, "cfclip", other, column)
            for other in BASELINES
        ]
    for row, claim in PARTS.items():
        for measure, column, values in list(_measures(ablated, strength, identity_at, success_at))[:2]:
            lines.append({"claim": claim, "measure": measure} | compare(values, "CF-CLIP", row, column))
    there = each[each.strength == strength]
    lines += [
        {
            "claim": "the CLIP that was optimised ranks methods as a held-out CLIP does",
            "measure": f"Spearman at strength {strength:g}",
        }
        | agreement(there, "clip_after", "heldout_clip_after"),
        {
            "claim": "the CLIP that was optimised ranks methods as the ground truth does",
            "measure": f"Spearman at strength {strength:g}",
        }
        | agreement(there, "clip_after", "success_after"),
        {
            "claim": "people prefer CF-CLIP's edits",
            "measure": "user study",
            "verdict": UNTESTED,
            "why": "needs people",
        },
        {
            "claim": "the paper's numbers on FFHQ and AFHQ",
            "measure": "the paper's tables",
            "verdict": UNTESTED,
            "why": f"needs those generators' checkpoints; these runs are of {domain}",
        },
    ]
    return pd.DataFrame(lines, columns=COLUMNS)


COLOURS = {HOLDS: "C2", FAILS: "C3", UNDECIDED: "0.5"}


def figure(judged: pd.DataFrame) -> Figure:
    """The differences of :func:`panel` with their intervals, coloured by verdict, a panel a measure."""
    shown = judged[judged.difference.notna()]
    measures = list(shown.measure.unique()) or ["nothing could be compared"]
    sizes = [max((shown.measure == measure).sum(), 1) for measure in measures]
    drawn, axes = plt.subplots(
        len(measures),
        1,
        figsize=(8.5, 0.26 * sum(sizes) + 0.7 * len(measures) + 0.4),
        squeeze=False,
        layout="constrained",
        height_ratios=[size + 1 for size in sizes],
    )
    for axis, measure in zip(axes[:, 0], measures, strict=True):
        own = shown[shown.measure == measure].iloc[::-1]
        axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
        for line in own.itertuples(index=False):
            axis.errorbar(
                line.difference,
                line.claim,
                xerr=0 if np.isnan(line.half) else line.half,
                marker="o",
                markersize=4,
                capsize=2,
                color=COLOURS[line.verdict],
            )
        axis.set_title(measure, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.margins(y=0.6 / max(len(own), 1))
        sns.despine(ax=axis)
    drawn.legend(
        handles=[
            plt.Line2D([], [], color=colour, marker="o", label=verdict) for verdict, colour in COLOURS.items()
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return drawn
