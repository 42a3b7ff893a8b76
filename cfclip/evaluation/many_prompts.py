"""A mapper of many prompts, measured prompt by prompt."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from cfclip.domain import Domain, asked
from cfclip.evaluation import metrics
from cfclip.models.mapper import Mapper


@torch.no_grad()
def faces_for(
    domain: Domain, prompts: Iterable[str], n: int = 32, split: str = "test", seed: int = 0
) -> dict[str, Tensor]:
    """prompt -> codes [n, L, D] of the first faces of a ``split`` where it asks for something.

    They are sought among 8 n, so of a rare part there may be fewer. If there are none, it is any faces.
    """
    every, found = domain.latents(8 * n, split, seed), {}
    seen = domain.truth.measure(domain.pictures(every))
    rows = {prompt: tuple(np.flatnonzero(asked(domain.truth, prompt, seen))[:n]) for prompt in prompts}
    rows = {prompt: some or tuple(range(n)) for prompt, some in rows.items()}
    return {prompt: found.setdefault(some, every[list(some)]) for prompt, some in rows.items()}


@torch.no_grad()
def compare(
    domain: Domain, mapper: nn.Module, faces: Mapping[str, Tensor], strength: float = 1.0
) -> pd.DataFrame:
    """Edits of ``faces``, prompt -> codes [N, L, D], see :func:`faces_for`: a row per prompt and face.

    Columns: ``prompt``, ``strength``, ``index`` of the face among its prompt's, and those of
    :func:`metrics.ground_truth` and :func:`metrics.identity`.
    """
    rows, sources = [], {}
    for prompt, codes in faces.items():
        if id(codes) not in sources:
            sources[id(codes)] = metrics.Pictures(domain, domain.pictures(codes))
        edited = domain.edit(codes, prompt, mapper, strength)
        edit = metrics.Edit(domain, prompt, sources[id(codes)], edited)
        measured = metrics.ground_truth(edit) | metrics.identity(edit)
        rows += metrics.rows(measured, prompt=prompt, strength=strength)
    return pd.DataFrame(rows)


SENTENCES = (
    "green lipstick", "blue hair", "blue lipstick", "purple eyebrows", "orange beard", "white eyebrows",
    "red hair", "pink hair", "yellow eyes", "smiling", "glasses", "bald", "blue skin",
    "green lips and blue hair", "a woman with long purple hair", "no beard", "black lipstick", "green eyes",
    "cyan skin", "a man with a red moustache", "pale skin", "grey hair", "blond eyebrows", "orange lips",
    "purple glasses",
)  # fmt: skip
"""What people type."""


@torch.no_grad()
def typed(
    domain: Domain, mapper: Mapper, sentences: Iterable[str] = SENTENCES, n: int = 32, strength: float = 1.0
) -> pd.DataFrame:
    """Edits of ``n`` test faces by ``sentences``, as :meth:`.GroundTruth.done` judges them.

    One row per sentence and claim: ``done``, the share of the ``n_judged`` faces where there was something to
    do, and the mean ``identity`` of all. A claim that cannot be measured, such as a smile, has neither.
    """
    rows, w = [], domain.latents(n, "test")
    source = metrics.Pictures(domain, domain.generator.synthesis(w))
    for sentence in sentences:
        edit = metrics.Edit(domain, sentence, source, domain.edit(w, sentence, mapper, strength))
        same = float(metrics.identity(edit)["identity"].mean())
        line = {"sentence": sentence, "claim": "", "identity": same}
        done = domain.truth.done(sentence, edit.before.seen, edit.after.seen)
        for claim, hits in done.items():
            judged = hits[~np.isnan(hits)]
            share = float(judged.mean()) if len(judged) else np.nan
            rows.append(line | {"claim": claim, "done": share, "n_judged": len(judged)})
        if not done:
            rows.append(line)
    return pd.DataFrame(rows)
