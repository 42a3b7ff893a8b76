"""The embedded domain, from the weights committed in ``data/toonfaces``."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from cfclip.checkpoints import weights
from cfclip.checkpoints.mappers import load_mapper
from cfclip.domain import Domain
from cfclip.files import DATA
from cfclip.models.arcface import IRSE, FaceIdentity
from cfclip.models.clip import ClipGuide
from cfclip.models.stylegan2 import Generator
from cfclip.toonfaces.clip import build
from cfclip.toonfaces.encoder import ToonEncoder
from cfclip.toonfaces.readout import Readout
from cfclip.toonfaces.truth import ToonTruth

PROMPTS = ("green lipstick", "purple eyebrows", "blue hair", "blue skin", "red lipstick", "blonde hair")


def load_toonfaces(folder: Path = DATA / "toonfaces") -> Domain:
    """All networks of ``folder``, on the CPU. Raises WeightsError.

    An encoder or a mapper trained for other networks than those of ``folder`` is left out, with a warning.
    """

    def path_of(name: str) -> Path:
        return folder / f"{name}.safetensors"

    def load(name: str, make: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
        tensors, config, _ = weights.read(path_of(name), name)
        return weights.load_into(make(config), tensors, path_of(name))

    def load_clip(name: str) -> ClipGuide:
        return ClipGuide(load(name, lambda c: build(c["model"])))

    def checked(name: str, network: nn.Module, fits: bool) -> nn.Module | None:
        if fits:
            return network
        warnings.warn(
            f"{path_of(name)} was trained for other networks than those beside it and is left out: "
            f"run 'cfclip toonfaces train {name}'",
            stacklevel=3,
        )
        return None

    generator, clip = load("generator", lambda c: Generator(**c)), load_clip("clip")
    encoder = mapper = None
    if path_of("encoder").exists():
        encoder = load("encoder", lambda c: ToonEncoder(**c))
        encoder = checked("encoder", encoder, encoder.fits(generator))
    if path_of("multi").exists():
        mapper = load_mapper(path_of("multi"))
        mapper = checked("multi", mapper, mapper.config.fits(generator, clip))
    return Domain(
        name="toonfaces",
        generator=generator,
        clip=clip,
        identity=FaceIdentity(load("identity", lambda c: IRSE(**c)), crop=False),
        truth=ToonTruth(load("readout", lambda c: Readout(**c)), generator.resolution),
        source_text="face",
        prompts=PROMPTS,
        encoder=encoder,
        heldout_clip=load_clip("heldout_clip") if path_of("heldout_clip").exists() else None,
        mapper=mapper,
    )
