"""One mapper for many prompts, measured beside mappers that were trained for one prompt each."""

from collections.abc import Iterable, Mapping

import pandas as pd
import torch

from cfclip.domain import Domain
from cfclip.evaluation import metrics
from cfclip.evaluation.tables import ordered, over_seeds, wide
from cfclip.models.mapper import Mapper
from cfclip.models.stylegan2 import max_batch


@torch.no_grad()
def compare(
    domain: Domain,
    many: Mapping[tuple[str, int], Mapper],
    alone: Mapping[tuple[str, int], Mapper],
    prompts: Iterable[str],
    n: int = 32,
    strength: float = 1.0,
) -> list[dict]:
    """Edit the same ``n`` test faces with both kinds of mapper: one row per prompt, mapper and face.

    Args:
        many: (what it was trained on, seed) -> mapper of many prompts.
        alone: (prompt, seed) -> mapper of this prompt, which edits by no other.

    A row has ``prompt``, ``trained_on`` ("this prompt", or the name in ``many``), ``seed``, ``strength``,
    ``index`` of the face, and the columns of :func:`metrics.ground_truth` and :func:`metrics.identity`.
    """
    draw, rows = domain.generator.synthesis, []
    parts = domain.latents(n, "test").split(max_batch(domain.generator))
    source = metrics.Pictures(domain, torch.cat([draw(w) for w in parts]))
    for prompt in prompts:
        mappers = dict(many)
        mappers |= {
            ("this prompt", seed): mapper for (other, seed), mapper in alone.items() if other == prompt
        }
        for (trained_on, seed), mapper in mappers.items():
            text = mapper.read(domain.clip, prompt)
            edited = torch.cat([draw(mapper.edit(w, text, strength)) for w in parts])
            edit = metrics.Edit(domain, prompt, source, edited)
            labels = {"prompt": prompt, "trained_on": trained_on, "seed": seed, "strength": strength}
            rows += metrics.rows(metrics.ground_truth(edit) | metrics.identity(edit), **labels)
    return rows


def summarise(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """:func:`compare`'s rows, one line per value of the column ``by`` and ``trained_on``, for people.

    The mean of each seed comes first, over its faces and prompts: the faces of one training share its luck.
    """
    keys = [by, "trained_on"]
    table = table.assign(**{name: ordered(table[name], table[name].unique()) for name in keys})
    counts = table.groupby(keys, observed=True).agg(prompts=("prompt", "nunique"), seeds=("seed", "nunique"))
    cells = wide(over_seeds(table, keys), keys).set_index(keys)
    return cells.join(counts).reset_index().rename(columns={"trained_on": "trained on"})
