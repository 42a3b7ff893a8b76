"""Domains by name: a generator, a CLIP, an identity network and prompts that belong together."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import weights
from .clip import ClipGuide
from .identity import IRSE, FaceIdentity
from .stylegan2 import Generator
from .toonfaces.readout import Readout

DATA = Path(os.environ.get("CFCLIP_DATA", Path(__file__).resolve().parent.parent / "data"))
"""Where weights live; the environment variable CFCLIP_DATA moves it."""


@dataclass(frozen=True)
class Domain:
    """Frozen networks and the words that go with them."""

    name: str
    generator: Generator
    clip: ClipGuide
    identity: FaceIdentity
    readout: Readout | None         # the judge, where there is a ground truth
    source_text: str                # what every picture of the domain shows
    prompts: tuple[str, ...]        # examples, counterfactual ones first
    truncation: float = 1.0         # psi of the latents that are edited
    device: torch.device = torch.device("cpu")

    def to(self, device: str | torch.device) -> "Domain":
        """The same domain with its networks on ``device``."""
        for network in (self.generator, self.clip, self.identity, self.readout):
            if network is not None:
                network.to(device)
        return replace(self, device=torch.device(device))


def load_toonfaces(folder: Path = DATA / "toonfaces") -> Domain:
    """The embedded domain, from the weights committed in ``data/toonfaces``."""
    from .toonfaces.clip import build

    def module(name: str, make):
        path = folder / f"{name}.safetensors"
        tensors, config, _ = weights.read(path, name)
        return weights.load_into(make(config), tensors, path)

    return Domain(
        name="toonfaces",
        generator=module("generator", lambda c: Generator(**c)),
        clip=ClipGuide(module("clip", lambda c: build(c["model"]))),
        identity=FaceIdentity(module("identity", lambda c: IRSE(**c)), crop=False),
        readout=module("readout", lambda c: Readout(**c)),
        source_text="face",
        prompts=("green lipstick", "purple eyebrows", "blue hair", "blue skin", "red lipstick", "blonde hair"),
    )


DOMAINS = {"toonfaces": load_toonfaces}


def load_domain(name: str = "toonfaces", device: str | torch.device = "cpu") -> Domain:
    """The domain called ``name`` on ``device``; ValueError for an unknown one, WeightsError for missing files."""
    if name not in DOMAINS:
        raise ValueError(f"unknown domain {name!r}; there are: {', '.join(DOMAINS)}")
    return DOMAINS[name]().to(device)
