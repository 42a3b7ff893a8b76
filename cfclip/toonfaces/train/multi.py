"""The mappers of many prompts: that of every prompt, which edits in the explorer, and those that never see some, to measure what is lost by it."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from cfclip.domain import GROUPS, Domain
from cfclip.evaluation.many_prompts import compare
from cfclip.method.config import MultiPromptConfig
from cfclip.method.trainer import train_mapper
from cfclip.models.mapper import Mapper
from cfclip.toonfaces.captions import claim_of, phrase
from cfclip.toonfaces.domain import load_toonfaces
from cfclip.toonfaces.factors import PARTS, colours

UNSEEN: dict[str, tuple[str, ...]] = {
    "skin": ("cyan", "purple"),
    "hair": ("blue", "pink", "blonde"),
    "eyebrows": ("purple", "orange", "cyan"),
    "eyes": ("purple", "yellow"),
    "lipstick": ("blue", "black", "red"),
    "beard": ("cyan", "blue", "white"),
}
"""part -> colours that no training prompt gives it: nearly all counterfactual, the pairs held out from CLIP among them."""


def split() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(seen, unseen) prompts: every colour of every part, as "green lipstick". Every colour and every part is among the seen ones."""
    texts = {(part, colour): phrase(part, colour) for part in PARTS for colour in colours(part)}
    seen, unseen = (
        tuple(text for (part, colour), text in texts.items() if (colour in UNSEEN[part]) == held)
        for held in (False, True)
    )
    return seen, unseen


def config(**overrides: Any) -> MultiPromptConfig:
    """How the domain's own mapper was trained: by every prompt."""
    return heldout_config(
        **{"prompts": tuple(prompt for part in split() for prompt in part), "steps": 6000, "lambda_l2": 0.05}
        | overrides
    )


def heldout_config(**overrides: Any) -> MultiPromptConfig:
    """How those were trained that know the seen prompts only."""
    settings = {
        "prompts": split()[0],
        "prompts_at_once": 8,
        "steps": 4000,
        "batch": 8,
        "lr": 60.0,
        "ramp_down": 0.75,
        "lambda_l2": 0.1,
        "levels": ("fine",),
        "train_latents": 256,
        "dtype": "auto",
    }
    return MultiPromptConfig(**settings | overrides)


def train(config: MultiPromptConfig, out: Path, domain: Domain | None = None) -> Mapper:
    """Train (or go on training) in ``out`` for ``domain`` (default: toonfaces)."""
    return train_mapper(domain or load_toonfaces(), config, out)[0]


def measure(domain: Domain, trained_on: Collection[str], n: int = 32) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Edits by ``domain.mapper`` of :func:`split`'s prompts: (means by whether it was trained on them and their group, by prompt where it was not)."""
    prompts = [prompt for part in split() for prompt in part]
    table = pd.DataFrame(compare(domain, {("many prompts", 0): domain.mapper}, {}, prompts, n)).drop(
        columns=["trained_on", "seed", "strength"]
    )
    table["seen"] = table["prompt"].isin(list(trained_on)).map({True: "yes", False: "no"})
    table["group"] = pd.Categorical(table["prompt"].map(domain.group_of), GROUPS, ordered=True)

    def means(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
        found = rows.groupby(by, observed=True, sort=False)
        return found.mean(numeric_only=True).drop(columns="index").assign(n=found.size()).reset_index()

    return means(table, ["seen", "group"]), means(table[table["seen"] == "no"], ["prompt", "group"])


def probe(domain: Domain, ridge: float = 1.0) -> pd.DataFrame:
    """How much of a prompt the text feature tells of which it is: a linear reading of part and colour, taught on the seen prompts.

    ``min_A |X A - Y|^2 + ridge |A|^2``, X: raw text features [P, E], centred; Y: part and colour, one-hot. A row for the unseen prompts, one for the
    seen ones, each of these read by what was taught on the others. Columns: shares of ``part``, ``colour`` and ``both`` read right.
    """
    seen, unseen = split()
    claims = [claim_of(prompt) for prompt in seen + unseen]
    known = [sorted({claim[k] for claim in claims}) for k in (0, 1)]
    x = domain.clip.encode_text(seen + unseen)
    answers = torch.tensor([[known[k].index(claim[k]) for k in (0, 1)] for claim in claims])
    y = torch.cat([torch.nn.functional.one_hot(answers[:, k], len(known[k])).float() for k in (0, 1)], 1)

    def read(taught: Tensor, asked: Tensor) -> Tensor:
        mean, level = x[taught].mean(0), y[taught].mean(0)
        a = x[taught] - mean
        scores = (x[asked] - mean) @ a.T @ torch.linalg.solve(
            a @ a.T + ridge * torch.eye(len(a)), y[taught] - level
        ) + level
        return (
            torch.stack([part.argmax(1) for part in scores.split([len(names) for names in known], 1)], 1)
            == answers[asked]
        )

    rows, everyone = torch.arange(len(claims)), torch.arange(len(seen))
    found = {
        "unseen": read(everyone, rows[len(seen) :]),
        "seen, each left out": torch.cat([read(everyone[everyone != i], rows[i : i + 1]) for i in everyone]),
    }
    return pd.DataFrame([
        {
            "prompts": name,
            "part": right[:, 0].float().mean().item(),
            "colour": right[:, 1].float().mean().item(),
            "both": right.all(1).float().mean().item(),
            "n": len(right),
        }
        for name, right in found.items()
    ])
