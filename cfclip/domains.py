"""Domains by name. Only this module and the command line import both the core and a world, toonfaces."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cfclip import latents
from cfclip.checkpoints import sources
from cfclip.checkpoints.generators import load_generator
from cfclip.checkpoints.networks import load_e4e, load_identity, load_openai_clip, load_vgg
from cfclip.domain import Domain
from cfclip.files import DOWNLOADS
from cfclip.toonfaces.domain import load_toonfaces


def load_ffhq(folder: Path = DOWNLOADS) -> Domain:
    """The paper's faces, with the CLIPs of :func:`_clips`.

    WeightsError lists every missing file, where it comes from and where to put it.
    """
    files = sources.require("ffhq", folder)
    return Domain(
        name="ffhq",
        generator=load_generator(files["generator"]),
        **_clips(files),
        identity=load_identity(files["identity"]),
        source_text="face",
        prompts=("green lipstick", "purple eyebrows"),
        encoder=load_e4e(files["encoder"]) if "encoder" in files else None,
        latent_files={s: files[f"{s} latents"] for s in latents.SPLITS if f"{s} latents" in files},
    )


def load_afhq(animal: str, prompts: tuple[str, ...], folder: Path = DOWNLOADS) -> Domain:
    """The paper's dogs or cats: W codes at psi = 0.7, VGG19 for identity, the CLIPs of :func:`_clips`.

    Raises WeightsError.
    """
    files = sources.require(f"afhq-{animal}", folder)
    return Domain(
        name=f"afhq-{animal}",
        generator=load_generator(files["generator"]),
        **_clips(files),
        identity=None,
        source_text=animal,
        prompts=prompts,
        truncation=0.7,
        perceptual=load_vgg(files["perceptual"]),
    )


def _clips(files: Mapping[str, Path]) -> dict[str, Any]:
    """The guides and the judge. ViT-B/32 is the guide, as published; ViT-B/16 judges if its file exists.

    If the file of ViT-L/14 exists, ViT-L/14 judges, and ViT-B/16 is a second guide, used if ``guides`` is 2.
    """
    models = {"held-out clip": "ViT-B-16-quickgelu", "third clip": "ViT-L-14-quickgelu"}
    clips = [load_openai_clip(files[role], model) for role, model in models.items() if role in files]
    *more, judge = clips or [None]
    return {"clip": load_openai_clip(files["clip"]), "more_guides": tuple(more), "heldout_clip": judge}


DOMAINS = {
    "toonfaces": load_toonfaces,
    "ffhq": load_ffhq,
    "afhq-dog": partial(load_afhq, "dog", ("blue dog", "bald dog", "tiger stripes")),
    "afhq-cat": partial(load_afhq, "cat", ("spotty cat", "mouse ears")),
}


def load_domain(
    name: str = "toonfaces", device: str | torch.device = "cpu", label: int | None = None
) -> Domain:
    """The domain ``name`` on ``device``; ``label``: the class, if its generator is class-conditional.

    Raises ValueError for an unknown domain, a device that this machine does not have or a class that the
    generator does not have, WeightsError for missing files.
    """
    if name not in DOMAINS:
        raise ValueError(f"unknown domain {name!r}; choose one of {', '.join(DOMAINS)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # checked first: loading takes minutes
        why = str(error).splitlines()[0]
        raise ValueError(f"device '{device}' cannot be used on this machine ({why}); cpu can") from None
    domain = DOMAINS[name]()
    try:
        domain = domain if label is None else replace(domain, label=label)
    except ValueError as error:
        raise ValueError(f"label {label!r} does not fit domain {name}: {error}") from None
    return domain.to(device)
