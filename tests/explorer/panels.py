"""Explorers of the tiny domain, for the tests of the model and of the view."""

from pathlib import Path

import torch

from cfclip.checkpoints.mappers import save_mapper
from cfclip.domain import Domain
from cfclip.explorer.model import Explorer
from cfclip.models.mapper import Mapper, MapperConfig

PROMPTS = ("green lipstick", "blue hair")
TRAINING = {"steps": 30, "batch": 1, "train_latents": 2, "num_views": 0, "negative_templates": 1}


def write_mapper(domain: Domain, path: Path, prompt: str, seed: int = 0) -> Path:
    """A random mapper, with the header of one that was trained for ``prompt``."""
    sizes = MapperConfig(domain.generator.num_ws, domain.generator.w_dim, domain.clip.embed_dim)
    mapper = Mapper.initialised(sizes, torch.Generator().manual_seed(seed))
    return save_mapper(mapper, path, method="cfclip", domain=domain.name, training={"prompt": prompt})


def domain_folder(domain: Domain, folder: Path) -> Path:
    """``folder`` with a mapper for each of PROMPTS."""
    for i, prompt in enumerate(PROMPTS):
        write_mapper(domain, folder / "runs" / str(i) / "mapper.safetensors", prompt, i)
    return folder


def started(domain: Domain, folder: Path) -> Explorer:
    settings, runs = {"cfclip": TRAINING}, [folder / "runs"]
    explorer = Explorer(domain, n=3, out=folder / "out", runs=runs, photo_steps=2, settings=settings)
    explorer.set_prompt("green lipstick")
    return explorer
