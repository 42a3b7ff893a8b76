"""The mapper of many prompts: its prompts, those that it never sees, how it is trained and measured."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd

from ..domains import Domain, load_domain
from ..evaluation import GROUPS, group_of
from ..mapper import Mapper
from ..method import train_mapper
from ..multiprompt import MultiPromptConfig, compare
from .captions import phrase
from .factors import PARTS, colours

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
    seen, unseen = (tuple(text for (part, colour), text in texts.items() if (colour in UNSEEN[part]) == held) for held in (False, True))
    return seen, unseen


def config(**overrides: Any) -> MultiPromptConfig:
    """How the committed mapper was trained."""
    settings = {"prompts": split()[0], "prompts_at_once": 8, "steps": 4000, "batch": 8, "lr": 60.0, "ramp_down": 0.75, "lambda_l2": 0.1,
                "levels": ("fine",), "train_latents": 256, "dtype": "bfloat16"}
    return MultiPromptConfig(**settings | overrides)


def train(config: MultiPromptConfig, out: Path, domain: Domain | None = None) -> Mapper:
    """Train (or go on training) in ``out`` for ``domain`` (default: toonfaces)."""
    return train_mapper(domain or load_domain("toonfaces"), config, out)[0]


def measure(domain: Domain, trained_on: Collection[str], n: int = 32) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(by seen and group of the prompts, by unseen prompt): means of :func:`cfclip.multiprompt.compare` for ``domain.mapper`` and :func:`split`."""
    prompts = [prompt for part in split() for prompt in part]
    table = pd.DataFrame(compare(domain, {0: domain.mapper}, prompts, trained_on, n)).drop(columns=["trained_on", "seed", "strength"])
    table["seen"] = table["seen"].map({True: "yes", False: "no"})
    table["group"] = pd.Categorical(table["prompt"].map(group_of), GROUPS, ordered=True)

    def means(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
        found = rows.groupby(by, observed=True, sort=False)
        return found.mean(numeric_only=True).drop(columns="index").assign(n=found.size()).reset_index()

    return means(table, ["seen", "group"]), means(table[table["seen"] == "no"], ["prompt", "group"])
