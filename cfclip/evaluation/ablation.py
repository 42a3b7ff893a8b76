"""The ablation of CF-CLIP's directions: rows that change one thing each, and their means with an interval over training seeds."""

import os
from collections.abc import Sequence
from typing import Any

import pandas as pd

from cfclip.baselines.methods import fit
from cfclip.domain import Domain
from cfclip.evaluation.metrics import PERCENT, over_strengths
from cfclip.evaluation.stats import half_width, plus_minus

ROWS: dict[str, dict[str, Any]] = {
    "CF-CLIP": {},
    "positive: text direction only": {"positives": ("text",)},
    "positive: target only": {"positives": ("target",)},
    "negatives: none": {"negatives": "none"},
    "negatives: per image": {"negatives": "per_image"},
    "negatives: 1 template": {"negative_templates": 1},
    "negatives: 8 templates": {"negative_templates": 8},
    "query: image": {"query": "image"},
    "temperature 0.03": {"temperature": 0.03},
    "temperature 0.3": {"temperature": 0.3},
    "views: none": {"num_views": 0},
    "views: 1": {"num_views": 1},
    "no text mapper": {"text_mapper": False},
    "PixelNorm over channels": {"norm_axis": "channel"},
    "loss: StyleCLIP": {"objective": "clip", "lambda_nce": 1.0},
    "loss: directional": {"objective": "directional", "lambda_nce": 1.0},
}
"""name -> what it changes in CFCLIPConfig. The two other losses come with the weight that their papers give them."""

KEYS = ["row", "prompt", "seed", "strength", "index"]


def choose(rows: Sequence[str] = ()) -> list[str]:
    """``rows`` themselves, or all for none. ValueError that names an unknown one."""
    if unknown := set(rows) - set(ROWS):
        raise ValueError(f"unknown rows {sorted(unknown)}; there are: {list(ROWS)}")
    return list(rows) or list(ROWS)


def run_row(
    domain: Domain,
    row: str,
    prompt: str,
    *,
    seed: int = 0,
    n: int = 64,
    strengths: Sequence[float] = (1.0,),
    out: str | os.PathLike | None = None,
    progress: bool = False,
    **settings: Any,
) -> pd.DataFrame:
    """Train one row with one seed and score it: a line a strength and held-out face, with every metric.

    ``settings`` are those of CFCLIPConfig that all rows share; the row's own win. The faces are the same for every row and seed.
    """
    choose([row])
    editor = fit(
        "cfclip", domain, prompt, out=out, progress=progress, **(settings | ROWS[row] | {"seed": seed})
    )
    scored = pd.DataFrame(over_strengths(domain, prompt, editor.edit, domain.latents(n, "test"), strengths))
    return pd.concat(
        [pd.DataFrame({"row": row, "prompt": prompt, "seed": seed}, index=scored.index), scored], axis=1
    )


def runs(table: pd.DataFrame) -> pd.DataFrame:
    """The mean over faces, at one strength, of every metric: a line a training. The faces of one training are no independent tries of it."""
    if "strength" in table and table.strength.nunique() > 1:
        raise ValueError(
            f"choose one strength of {sorted(table.strength.unique())}: table[table.strength == …]"
        )
    return (
        table
        .drop(columns=["index", "strength"], errors="ignore")
        .groupby(["row", "prompt", "seed"], sort=False)
        .mean(numeric_only=True)
        .reset_index()
    )


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """-> row, metric, mean, half (of the 95 % interval over trainings), trainings; in the order of appearance."""
    each = runs(table)
    names = [name for name in each.columns if name not in KEYS]
    return pd.DataFrame([
        {
            "row": row,
            "metric": name,
            "mean": group[name].mean(),
            "half": half_width(group[name]),
            "trainings": len(group),
        }
        for row, group in each.groupby("row", sort=False)
        for name in names
    ])


def pretty(summary: pd.DataFrame) -> pd.DataFrame:
    """A row a row, a column a metric, cells "mean ± half"."""
    shown = summary.assign(
        cell=[
            plus_minus(s.mean, s.half, 100 if s.metric in PERCENT else 1)
            for s in summary.itertuples(index=False)
        ],
        metric=[m.replace("_", " ") + (" %" if m in PERCENT else "") for m in summary.metric],
    )
    wide = shown.pivot(index="row", columns="metric", values="cell")
    return wide.loc[shown.row.unique(), shown.metric.unique()].rename_axis(columns=None).reset_index()
