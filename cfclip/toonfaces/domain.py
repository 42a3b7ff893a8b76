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


def load_toonfaces(folder: Path = DATA / "toonfaces") -> Domain:
    """All networks of ``folder``, on the CPU. Raises WeightsError.

    The encoder and the mapper are left out, with a warning, if they were trained for other networks than these.
    """

    def load(name: str, make: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
        path = folder / f"{name}.safetensors"
        tensors, config, _ = weights.read(path, name)
        return weights.load_into(make(config), tensors, path)

    def load_fitting(
        name: str, opened: Callable[[], nn.Module], fits: Callable[[nn.Module], bool]
    ) -> nn.Module | None:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            return None
        if fits(network := opened()):
            return network
        warnings.warn(
            f"{path} was trained for other networks than those beside it and is left out: run 'cfclip toonfaces train {name}'",
            stacklevel=3,
        )
        return None

    def load_clip(name: str) -> ClipGuide:
        return ClipGuide(load(name, lambda c: build(c["model"])))

    generator = load("generator", lambda c: Generator(**c))
    clip = load_clip("clip")
    return Domain(
        name="toonfaces",
        generator=generator,
        clip=clip,
        identity=FaceIdentity(load("identity", lambda c: IRSE(**c)), crop=False),
        truth=ToonTruth(load("readout", lambda c: Readout(**c)), generator.resolution),
        source_text="face",
        prompts=(
            "green lipstick",
            "purple eyebrows",
            "blue hair",
            "blue skin",
            "red lipstick",
            "blonde hair",
        ),
        encoder=load_fitting(
            "encoder",
            lambda: load("encoder", lambda c: ToonEncoder(**c)),
            lambda encoder: encoder.fits(generator),
        ),
        heldout_clip=load_clip("heldout_clip") if (folder / "heldout_clip.safetensors").exists() else None,
        mapper=load_fitting(
            "multi",
            lambda: load_mapper(folder / "multi.safetensors"),
            lambda mapper: mapper.config.fits(generator, clip),
        ),
    )
