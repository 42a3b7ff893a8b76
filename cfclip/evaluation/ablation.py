"""The ablation of CF-CLIP's directions: rows that change one thing each. :mod:`.tables` summarises them."""

import os
from collections.abc import Sequence
from typing import Any

import pandas as pd

from cfclip.baselines.methods import fit
from cfclip.domain import Domain
from cfclip.evaluation.metrics import over_strengths
from cfclip.models.mapper import LEVELS

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
    "levels: all": {"levels": LEVELS},
    "two guides": {"guides": 2},
    "loss: StyleCLIP": {"objective": "clip", "lambda_nce": 1.0},
    "loss: directional": {"objective": "directional", "lambda_nce": 1.0},
}
"""Row -> the settings of CFCLIPConfig that it changes. The other losses have the weights of their papers.

All levels are the paper's; on toonfaces the preset has only the fine ones, which colour.
"""


def choose(rows: Sequence[str] = ()) -> list[str]:
    """``rows``, or all rows if it is empty. ValueError names an unknown one."""
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
    """Train one row with one seed; every metric of its edits, one line per strength and held-out face.

    ``settings`` of CFCLIPConfig are shared by all rows; what the row changes takes precedence. All rows and
    seeds are evaluated on the same ``n`` faces.
    """
    choose([row])
    settings |= ROWS[row] | {"seed": seed}
    editor = fit("cfclip", domain, prompt, out=out, progress=progress, **settings)
    scores = over_strengths(domain, prompt, editor.edit, domain.latents(n, "test"), strengths)
    return pd.DataFrame([{"row": row, "prompt": prompt, "seed": seed} | line for line in scores])
