"""Amortised CF-CLIP: one mapper for many prompts of a domain, so that any prompt edits at once.

The step is :class:`cfclip.method.CFCLIP`'s, on prompts drawn anew each time. PixelNorm is over channels: over layers, as published,
only the signs of a text feature reach the mapper.
"""

from collections.abc import Iterable, Mapping

import pandas as pd
import torch

from cfclip.domain import Domain
from cfclip.evaluation import metrics
from cfclip.evaluation.metrics import PERCENT
from cfclip.evaluation.stats import half_width, plus_minus
from cfclip.models.mapper import Mapper
from cfclip.models.stylegan2 import max_batch

MEASURED = ("success_before", "success_after", "leakage", "identity")


@torch.no_grad()
def compare(
    domain: Domain,
    many: Mapping[tuple[str, int], Mapper],
    alone: Mapping[tuple[str, int], Mapper],
    prompts: Iterable[str],
    n: int = 32,
    strength: float = 1.0,
) -> list[dict]:
    """Mappers of many prompts beside those of one, on the same ``n`` test faces: a row per prompt, mapper and face.

    Args:
        many: (what it was trained on, seed) -> mapper of many prompts.
        alone: (prompt, seed) -> mapper that was trained for this prompt; those of other prompts are left out.

    A row has ``prompt``, ``trained_on`` ("this prompt", or what ``many`` says), ``seed``, ``strength``, ``index`` of the face, and
    what :func:`metrics.ground_truth` and :func:`metrics.identity` find.
    """
    w, found = domain.latents(n, "test"), []
    draw = domain.generator.synthesis
    source = metrics.Pictures(
        domain, torch.cat([draw(part) for part in w.split(max_batch(domain.generator))])
    )
    for prompt in prompts:
        text = domain.clip.encode_text(prompt)
        runs = [
            *many.items(),
            *((("this prompt", seed), mapper) for (other, seed), mapper in alone.items() if other == prompt),
        ]
        for (trained_on, seed), mapper in runs:
            edited = torch.cat([
                draw(mapper.edit(part, text, strength)) for part in w.split(max_batch(domain.generator))
            ])
            edit = metrics.Edit(domain, prompt, source, edited)
            found += metrics.rows(
                metrics.ground_truth(edit) | metrics.identity(edit),
                prompt=prompt,
                trained_on=trained_on,
                seed=seed,
                strength=strength,
            )
    return found


def summarise(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """Of :func:`compare`'s rows, a line per value of the column ``by`` and ``trained_on``: means and 95 % intervals over seeds.

    First the mean over a training's faces and prompts, then over trainings: the faces of one are no independent tries of it.
    """
    lines = []
    for (value, trained_on), rows in table.groupby([by, "trained_on"], sort=False, observed=True):
        seeds = rows.groupby("seed")[list(MEASURED)].mean()
        cells = {
            f"{name.replace('_after', '').replace('_', ' ')}{' %' if name in PERCENT else ''}": plus_minus(
                seeds[name].mean(), half_width(seeds[name]), 100 if name in PERCENT else 1
            )
            for name in MEASURED
        }
        lines.append(
            {by: value, "trained on": trained_on}
            | cells
            | {"prompts": rows["prompt"].nunique(), "seeds": len(seeds)}
        )
    return pd.DataFrame(lines)
