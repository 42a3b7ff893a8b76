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
    """prompt -> codes [n, L, D] of the first faces in ``split`` on which it asks for something.

    Only the first 8 n faces are searched, so a rare part may give fewer codes. If no face is found, the first
    n are taken.
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
    """Measure edits of ``faces``, prompt -> codes [N, L, D] (:func:`faces_for`): a row per prompt and face.

    Columns: ``prompt``, ``strength``, ``index`` (of the face within its prompt), and the columns of
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
"""Examples of what people type."""


@torch.no_grad()
def typed(
    domain: Domain, mapper: Mapper, sentences: Iterable[str] = SENTENCES, n: int = 32, strength: float = 1.0
) -> pd.DataFrame:
    """Edits of ``n`` test faces by ``sentences``, as :meth:`.GroundTruth.done` judges them.

    One row per sentence and claim that can be measured. ``n_judged``: faces with something to do; ``done``:
    the share of these on which it was done; ``identity``: the mean over all ``n`` faces. A sentence without
    such a claim, such as "smiling", has one row, with an empty ``claim`` and without ``done``.
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
