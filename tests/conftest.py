"""Tiny random networks: every shape of the real ones, milliseconds a step."""

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from cfclip.domain import Domain
from cfclip.models.arcface import IRSE, FaceIdentity
from cfclip.models.clip import ClipGuide
from cfclip.models.stylegan2 import Generator
from cfclip.toonfaces.readout import Readout
from cfclip.toonfaces.truth import ToonTruth


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(0)
    g = Generator(16, (8, 8, 8), z_dim=12, w_dim=16, mapping_layers=2).eval().requires_grad_(False)
    for conv in g.convs:
        conv.noise_strength.fill_(0.1)
    g.w_avg.normal_()
    return g


@pytest.fixture
def domain(generator) -> Domain:
    torch.manual_seed(1)
    clip = CLIP(
        16,
        CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16),
        CLIPTextCfg(context_length=24, width=16, heads=2, layers=1),
    )
    return Domain(
        name="tiny",
        generator=generator,
        clip=ClipGuide(clip),
        identity=FaceIdentity(IRSE(16, ((16, 16, 1), (16, 32, 1)), 8), crop=False),
        source_text="face",
        prompts=("green lipstick",),
        truth=ToonTruth(Readout(8).eval(), 16),
    )
