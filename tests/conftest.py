"""The tiny random networks of the bench: every part of the real ones, milliseconds per step."""

import dataclasses

import numpy as np
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from cfclip.bench.networks import new_generator, new_judges
from cfclip.domain import Domain
from cfclip.models.clip import ClipGuide
from cfclip.models.stylegan2 import Generator
from cfclip.toonfaces.readout import Measurement, Readout
from cfclip.toonfaces.truth import ToonTruth


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(0)
    g = new_generator(16, tiny=True)
    g.w_avg.normal_()
    return g


@pytest.fixture
def domain(generator) -> Domain:
    torch.manual_seed(1)
    clip, identity = new_judges(tiny=True)
    readout = Readout(8).eval()
    torch.nn.init.constant_(readout.presence.bias, 10.0)  # it finds every part in every picture
    return Domain(
        name="tiny",
        generator=generator,
        clip=clip,
        identity=identity,
        source_text="face",
        prompts=("green lipstick",),
        truth=ToonTruth(readout, 16),
    )


@pytest.fixture
def two_guides(domain) -> Domain:
    """The tiny domain with a second guide, whose pictures and features have other sizes."""
    torch.manual_seed(2)
    vision = CLIPVisionCfg(layers=1, width=24, head_width=12, patch_size=8, image_size=24)
    second = CLIP(12, vision, CLIPTextCfg(context_length=24, width=16, heads=2, layers=1))
    return dataclasses.replace(domain, more_guides=(ClipGuide(second),))


@pytest.fixture
def some_have(monkeypatch):
    """Every third face has hair and glasses, every third another one a beard."""
    monkeypatch.setattr(Measurement, "has", lambda seen, part: np.arange(len(seen.area)) % 3 == len(part) % 3)
