"""The e4e encoder ("Designing an Encoder for StyleGAN Image Manipulation", Tov et al. 2021): photo -> W+.

An IR-SE50 body whose last three stages meet in a feature pyramid. The first head reads one w off the coarsest level; head i
adds the offset of layer i, so that all layers stay near that w.
"""

import math
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfclip.models.arcface import IRSE50, Unit
from cfclip.models.stylegan2 import EqualLinear

IMAGE_SIZE = 256

MEDIUM, FINE = 3, 7
"""The first layers that are read off the middle (32²) and the fine (64²) level of the pyramid."""


class StyleHead(nn.Module):
    """Strided convolutions down to one pixel, then a linear layer. [N, C, S, S] -> [N, C]."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.convs = nn.Sequential(
            *(
                layer
                for _ in range(int(math.log2(size)))
                for layer in (nn.Conv2d(channels, channels, 3, 2, 1), nn.LeakyReLU(0.01))
            )
        )
        self.linear = EqualLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.convs(x).flatten(1))


class Encoder4Editing(nn.Module):
    """Photos [N, 3, 256, 256] in [-1, 1] -> W+ [N, L, D]; parameter names of ``e4e_ffhq_encode.pt`` (without ``encoder.``).

    Args:
        num_ws: L, 18 for a 1024² generator.
        dim: D, the width of the last stage of IR-SE50.
    """

    image_size = IMAGE_SIZE

    def __init__(self, num_ws: int = 18, dim: int = 512):
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        )
        self.body = nn.Sequential(
            *(Unit(a if i == 0 else b, b, 2 if i == 0 else 1) for a, b, n in IRSE50 for i in range(n))
        )
        self.styles = nn.ModuleList(
            StyleHead(dim, 16 if i < MEDIUM else 32 if i < FINE else 64) for i in range(num_ws)
        )
        self.latlayer1, self.latlayer2 = nn.Conv2d(256, dim, 1), nn.Conv2d(128, dim, 1)
        self.register_buffer("latent_avg", torch.zeros(num_ws, dim))

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"the encoder takes aligned photos of shape [N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], not {list(images.shape)}: "
                "crop to the face and resize first"
            )
        x, stages = self.input_layer(images), []
        ends = [sum_ - 1 for sum_ in accumulate(n for _, _, n in IRSE50)]
        for i, unit in enumerate(self.body):
            x = unit(x)
            if i in ends:
                stages.append(x)
        _, fine, medium, coarse = stages  # 128², then 128 x 64², 256 x 32², 512 x 16²
        p1 = _upsample_to(coarse, self.latlayer1(medium))
        p2 = _upsample_to(p1, self.latlayer2(fine))
        base = self.styles[0](coarse)
        offsets = [
            head(coarse if i < MEDIUM else p1 if i < FINE else p2) for i, head in enumerate(self.styles) if i
        ]
        return torch.stack([base, *(base + offset for offset in offsets)], 1) + self.latent_avg


def _upsample_to(x: Tensor, lateral: Tensor) -> Tensor:
    return F.interpolate(x, lateral.shape[-2:], mode="bilinear", align_corners=True) + lateral
