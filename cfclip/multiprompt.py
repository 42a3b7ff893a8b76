"""Amortised CF-CLIP: one mapper for many prompts of a domain, so that any prompt edits at once.

The step is :class:`cfclip.method.CFCLIP`'s, on prompts drawn anew each time. PixelNorm is over channels: over layers, as published,
only the signs of a text feature reach the mapper.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from . import metrics, weights
from .checkpoints import load_mapper
from .domains import Domain
from .mapper import Mapper
from .method import TrainingConfig, at_once, check_whole
from .reporting import PERCENT, half_width, plus_minus

MEASURED = ("success_before", "success_after", "leakage", "identity")


@dataclass(frozen=True, kw_only=True)
class MultiPromptConfig(TrainingConfig):
    """One run over many prompts: train it with :func:`cfclip.method.train_mapper`."""

    prompts: tuple[str, ...]
    prompts_at_once: int = 1                 # different prompts of one step, which share its batch in equal parts
    ramp_down: float = 0.0                   # share of the steps, at the end, in which a cosine takes lr to 0
    norm_axis: str = "channel"

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.prompts, str) or not self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise ValueError(f"prompts must be different texts, at least one, not {self.prompts!r}")
        object.__setattr__(self, "prompts", tuple(self.prompts))
        check_whole(self, prompts_at_once=1)
        if self.prompts_at_once > len(self.prompts) or self.batch % self.prompts_at_once:
            raise ValueError(f"prompts_at_once must divide the batch of {self.batch}, and be no more than the {len(self.prompts)} prompts, "
                             f"not {self.prompts_at_once}")
        if not 0 <= self.ramp_down <= 1:
            raise ValueError(f"ramp_down must be a share from 0 to 1, not {self.ramp_down!r}")
        if not self.text_mapper:
            raise ValueError("text_mapper must be True: a mapper that sees no text edits every prompt alike")


def find(*places: str | os.PathLike) -> tuple[dict[int, Mapper], dict[tuple[str, int], Mapper]]:
    """Mapper files, or those in folders and the folders of these: seed -> mapper of many prompts, (prompt, seed) -> CF-CLIP's of this prompt.

    Raises ValueError for two of the same.
    """
    many, alone = {}, {}
    files = [path for place in map(Path, places) for path in ([place] if place.is_file() else
             sorted([*place.glob("*.safetensors"), *place.glob("*/mapper.safetensors")]))]
    for path in files:
        card = weights.read(path, "mapper")[2]
        made = card.get("training", card)
        if "prompts" in made:
            found, key = many, made["seed"]
        elif made.get("method", "cfclip") == "cfclip":
            found, key = alone, (made["prompt"], made["seed"])
        else:
            continue
        if key in found:
            raise ValueError(f"{path} is the second mapper of {key} in {' and '.join(map(str, places))}: leave one of them out")
        found[key] = load_mapper(path)
    return many, alone


@torch.no_grad()
def compare(domain: Domain, many: Mapping[tuple[str, int], Mapper], alone: Mapping[tuple[str, int], Mapper], prompts: Iterable[str],
            n: int = 32, strength: float = 1.0) -> list[dict]:
    """Mappers of many prompts beside those of one, on the same ``n`` test faces: a row per prompt, mapper and face.

    Args:
        many: (what it was trained on, seed) -> mapper of many prompts.
        alone: (prompt, seed) -> mapper that was trained for this prompt; those of other prompts are left out.

    A row has ``prompt``, ``trained_on`` ("this prompt", or what ``many`` says), ``seed``, ``strength``, ``index`` of the face, and
    what :func:`metrics.ground_truth` and :func:`metrics.identity` find.
    """
    w, found = domain.latents(n, "test"), []
    draw = domain.generator.synthesis
    source = metrics.Pictures(domain, torch.cat([draw(part) for part in w.split(at_once(domain.generator))]))
    for prompt in prompts:
        text = domain.clip.encode_text(prompt)
        runs = [*many.items(), *((("this prompt", seed), mapper) for (other, seed), mapper in alone.items() if other == prompt)]
        for (trained_on, seed), mapper in runs:
            edited = torch.cat([draw(mapper.edit(part, text, strength)) for part in w.split(at_once(domain.generator))])
            edit = metrics.Edit(domain, prompt, source, edited)
            found += metrics.rows(metrics.ground_truth(edit) | metrics.identity(edit), prompt=prompt, trained_on=trained_on, seed=seed, strength=strength)
    return found


def summarise(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """Of :func:`compare`'s rows, a line per value of the column ``by`` and ``trained_on``: means and 95 % intervals over seeds.

    First the mean over a training's faces and prompts, then over trainings: the faces of one are no independent tries of it.
    """
    lines = []
    for (value, trained_on), rows in table.groupby([by, "trained_on"], sort=False, observed=True):
        seeds = rows.groupby("seed")[list(MEASURED)].mean()
        cells = {f"{name.replace('_after', '').replace('_', ' ')}{' %' if name in PERCENT else ''}":
                 plus_minus(seeds[name].mean(), half_width(seeds[name]), 100 if name in PERCENT else 1) for name in MEASURED}
        lines.append({by: value, "trained on": trained_on} | cells | {"prompts": rows["prompt"].nunique(), "seeds": len(seeds)})
    return pd.DataFrame(lines)
