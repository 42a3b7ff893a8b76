"""The ablation of CF-CLIP: each row changes one thing. :mod:`.tables` summarises the rows."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from cfclip.baselines.editor import Editor
from cfclip.baselines.many import Job, fit_many
from cfclip.domain import Domain
from cfclip.evaluation.metrics import over_strengths
from cfclip.files import slug
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
    "pixels held": {"lambda_perc": 3.0, "train_strength": 0.67},
    "pixels held, to a limit": {"lambda_perc": 3.0, "perc_limit": 0.2, "train_strength": 0.67},
    "loss: StyleCLIP": {"objective": "clip", "lambda_nce": 1.0},
    "loss: directional": {"objective": "directional", "lambda_nce": 1.0},
}
"""Row -> the settings of CFCLIPConfig that it changes. The "loss" rows use the weight of their papers.

"levels: all" is the paper's setting; the preset of toonfaces has only the fine level, which changes colours.
The "pixels held" rows are for toonfaces, where ``lambda_perc`` compares pixels instead of VGG19's features.
"""


def jobs(
    rows: Sequence[str],
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    out: str | os.PathLike = "",
) -> dict[tuple[str, str, int], Job]:
    """(row, prompt, seed) -> the job that trains it. The row's changes override ``settings``.

    rows: names of :data:`ROWS`; [] for all. out: a folder in which each training gets its own; "" keeps
    nothing. Raises ValueError for an unknown row.
    """
    if unknown := set(rows) - set(ROWS):
        raise ValueError(f"unknown rows {sorted(unknown)}; there are: {list(ROWS)}")
    return {
        (row, prompt, seed): Job(
            "cfclip",
            prompt,
            f"{out}/{slug(row)}-{slug(prompt)}-{seed}" if out else None,
            {**settings, **ROWS[row], "seed": seed},
        )
        for row in rows or ROWS
        for prompt in prompts
        for seed in seeds
    }


def run(
    domain: Domain, wanted: Mapping[tuple[str, str, int], Job], n: int, strengths: Sequence[float]
) -> tuple[pd.DataFrame, dict[tuple[str, str, int], Editor]]:
    """Train the :func:`jobs` ``wanted``. Returns (a table of metrics, (row, prompt, seed) -> editor).

    The table has a line per editor, strength and held-out face. All editors are measured on the same ``n``
    faces. If trainings fail, the error of the first one is raised.
    """
    editors = dict(zip(wanted, fit_many(domain, [*wanted.values()], progress=False), strict=True))
    w, lines = domain.latents(n, "test"), []
    for (row, prompt, seed), editor in editors.items():
        if isinstance(editor, Exception):
            raise editor
        scores = over_strengths(domain, prompt, editor.edit, w, strengths)
        lines += [{"row": row, "prompt": prompt, "seed": seed} | line for line in scores]
    return pd.DataFrame(lines), editors
