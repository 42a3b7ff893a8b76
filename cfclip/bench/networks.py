"""Domains of random weights: the time of a step depends only on the sizes. Downloads nothing."""

import math
from functools import cache

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn

from cfclip.domain import Domain
from cfclip.models.arcface import IRSE, FaceIdentity
from cfclip.models.clip import ClipGuide
from cfclip.models.stylegan2 import Generator

CONFIG_F = (512, 512, 512, 512, 512, 256, 128, 64, 32)
"""Channels of StyleGAN2 config-f at 4², 8², …, 1024²."""


def new_generator(resolution: int, tiny: bool = False) -> Generator:
    """Config-f at ``resolution``, frozen, with noise. ``tiny``: 8 channels, z_dim 12, w_dim 16.

    Its weights are drawn from torch's global random numbers.
    """
    levels = int(math.log2(resolution)) - 1
    if tiny:
        g = Generator(resolution, (8,) * levels, z_dim=12, w_dim=16, mapping_layers=2)
    else:
        g = Generator(resolution, CONFIG_F[:levels])
    g.eval().requires_grad_(False)
    for conv in g.convs:
        conv.noise_strength.fill_(0.1)
    return g


def new_judges(tiny: bool = False) -> tuple[ClipGuide, FaceIdentity]:
    """ViT-B/32 and IR-SE50; ``tiny``: the smallest ones, 16 x 16 pixels.

    Their weights are drawn from torch's global random numbers.
    """
    if tiny:
        vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
        clip = CLIP(16, vision, CLIPTextCfg(context_length=24, width=16, heads=2, layers=1))
        identity = FaceIdentity(IRSE(16, ((16, 16, 1), (16, 32, 1)), 8), crop=False)
    else:
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu"))
        identity = FaceIdentity(IRSE())
    return ClipGuide(clip), identity


def random_generator(resolution: int, tiny: bool = False) -> Generator:
    """:func:`new_generator` with the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return new_generator(resolution, tiny)


@cache
def _judges(tiny: bool, device: str) -> tuple[ClipGuide, FaceIdentity]:
    """Shared by all domains of a process, so that text features are encoded once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        clip, identity = new_judges(tiny)
    return clip.to(device), identity.to(device)


def random_domain(resolution: int, tiny: bool = False, device: str = "cpu") -> Domain:
    """Faces of ``resolution`` from networks of the paper's sizes, or ``tiny`` ones; always the same."""
    clip, identity = _judges(tiny, str(device))
    return Domain(
        name="random",
        generator=random_generator(resolution, tiny).to(device),
        clip=clip,
        identity=identity,
        source_text="face",
        prompts=("green lipstick",),
        perceptual=nn.Identity(),  # as in toonfaces, whose settings the pack uses
        device=torch.device(device),
    )
