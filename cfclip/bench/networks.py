"""A domain of random weights: to time a step, its networks need the right sizes and nothing else. Downloads nothing."""

import math
from functools import cache

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from cfclip.domain import Domain
from cfclip.models.arcface import IRSE, FaceIdentity
from cfclip.models.clip import ClipGuide
from cfclip.models.stylegan2 import Generator

CONFIG_F = (512, 512, 512, 512, 512, 256, 128, 64, 32)
"""Channels of StyleGAN2 config-f at 4², 8², …, 1024²."""


def random_generator(resolution: int, tiny: bool = False) -> Generator:
    """Config-f at ``resolution``; ``tiny``: 8 channels everywhere, w_dim 16. Frozen, with noise."""
    levels = int(math.log2(resolution)) - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        g = (
            Generator(resolution, (8,) * levels, 16, 16, 2)
            if tiny
            else Generator(resolution, CONFIG_F[:levels])
        )
    for conv in g.convs:
        conv.noise_strength.data.fill_(0.1)
    return g.eval().requires_grad_(False)


@cache
def judges(tiny: bool, device: str) -> tuple[ClipGuide, FaceIdentity]:
    """ViT-B/32 and IR-SE50, the same ones for all domains of a process: the text features are then encoded once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if tiny:
            clip = CLIP(
                16,
                CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16),
                CLIPTextCfg(context_length=24, width=16, heads=2, layers=1),
            )
            identity = FaceIdentity(IRSE(16, ((16, 16, 1), (16, 32, 1)), 8), crop=False)
        else:
            clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu"))
            identity = FaceIdentity(IRSE())
    return ClipGuide(clip).to(device), identity.to(device)


def random_domain(resolution: int, tiny: bool = False, device: str = "cpu") -> Domain:
    """Faces of ``resolution`` by networks of the paper's sizes (``tiny``: by the smallest that have every part), seeded."""
    clip, identity = judges(tiny, str(device))
    return Domain(
        name="random",
        generator=random_generator(resolution, tiny).to(device),
        clip=clip,
        identity=identity,
        source_text="face",
        prompts=("green lipstick",),
        device=torch.device(device),
    )
