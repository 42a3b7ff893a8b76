"""Amortised CF-CLIP: one mapper for many prompts of a domain, so that any prompt edits at once.

The step is :class:`cfclip.method.CFCLIP`'s, on prompts drawn anew each time. PixelNorm is over channels: over layers, as published,
only the signs of a text feature reach the mapper.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from . import metrics
from .domains import Domain
from .mapper import Mapper
from .method import TrainingConfig, at_once, check_whole


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


@torch.no_grad()
def compare(domain: Domain, mappers: Mapping[int, Mapper], prompts: Iterable[str], seen: Collection[str], n: int = 32, strength: float = 1.0,
            alone: Mapping[tuple[str, int], Mapper] | None = None) -> list[dict]:
    """Mappers of many prompts beside those of one, on the same ``n`` test faces: a row per prompt, seed, mapper and face.

    Args:
        mappers: seed -> mapper of many prompts.
        seen: the prompts that these were trained on.
        alone: (prompt, seed) -> mapper that was trained for this prompt; those of other prompts are left out.

    A row has ``prompt``, ``seen``, ``trained_on`` ("many prompts" or "this prompt"), ``seed``, ``strength``, ``index`` of the face, and
    what :func:`metrics.ground_truth` and :func:`metrics.identity` find.
    """
    w, found, alone = domain.latents(n, "test"), [], alone or {}
    draw = domain.generator.synthesis
    source = metrics.Pictures(domain, torch.cat([draw(part) for part in w.split(at_once(domain.generator))]))
    for prompt in prompts:
        text = domain.clip.encode_text(prompt)
        runs = [("many prompts", seed, mapper) for seed, mapper in mappers.items()]
        runs += [("this prompt", seed, mapper) for (other, seed), mapper in alone.items() if other == prompt]
        for trained_on, seed, mapper in runs:
            edited = torch.cat([draw(mapper.edit(part, text, strength)) for part in w.split(at_once(domain.generator))])
            edit = metrics.Edit(domain, prompt, source, edited)
            found += metrics.rows(metrics.ground_truth(edit) | metrics.identity(edit), prompt=prompt, seen=prompt in seen,
                                  trained_on=trained_on, seed=seed, strength=strength)
    return found
