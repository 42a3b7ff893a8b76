"""The e4e encoder ("Designing an Encoder for StyleGAN Image Manipulation", Tov et al. 2021): photo -> W+.

A feature pyramid on an IR-SE50 body. Head 0 predicts one w from the coarsest level; head i adds the offset of
layer i, ``w_i = w_0 + delta_i`` (section 3.2 of the paper), so that all layers stay near w_0.
"""

import math
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfclip.models.arcface import IRSE50, body, input_layer
from cfclip.models.stylegan2 import EqualLinear

MEDIUM, FINE = 3, 7
"""The first layers of W+ that are predicted from the 32² and from the 64² level of the pyramid."""


class StyleHead(nn.Module):
    """Strided convolutions down to one pixel, then a linear layer. [N, C, S, S] -> [N, C]."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.convs = nn.Sequential()
        for _ in range(int(math.log2(size))):
            self.convs.extend([nn.Conv2d(channels, channels, 3, 2, 1), nn.LeakyReLU(0.01)])
        self.linear = EqualLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.convs(x).flatten(1))


class Encoder4Editing(nn.Module):
    """Photos [N, 3, 256, 256] in [-1, 1] -> W+ [N, L, D].

    Parameters are named as in ``e4e_ffhq_encode.pt``, without the prefix ``encoder.``.

    Args:
        num_ws: L, 18 for a 1024² generator.
        dim: D, the width of the last stage of IR-SE50.
    """

    image_size = 256

    def __init__(self, num_ws: int = 18, dim: int = 512):
        super().__init__()
        self.input_layer, self.body = input_layer(64), body(IRSE50)
        sizes = [16 if i < MEDIUM else 32 if i < FINE else 64 for i in range(num_ws)]
        self.styles = nn.ModuleList(StyleHead(dim, size) for size in sizes)
        self.latlayer1, self.latlayer2 = nn.Conv2d(256, dim, 1), nn.Conv2d(128, dim, 1)
        self.register_buffer("latent_avg", torch.zeros(num_ws, dim))

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"the encoder takes aligned photos of shape [N, 3, {self.image_size}, {self.image_size}], "
                f"not {list(images.shape)}: crop to the face and resize first"
            )
        x, stages = self.input_layer(images), []
        ends = [total - 1 for total in accumulate(n for _, _, n in IRSE50)]
        for i, unit in enumerate(self.body):
            x = unit(x)
            if i in ends:
                stages.append(x)
        _, fine, medium, coarse = stages  # [N, 128, 64, 64], [N, 256, 32, 32], [N, 512, 16, 16]
        p1 = _upsample_to(coarse, self.latlayer1(medium))  # [N, D, 32, 32]
        p2 = _upsample_to(p1, self.latlayer2(fine))  # [N, D, 64, 64]
        levels = [coarse if i < MEDIUM else p1 if i < FINE else p2 for i in range(len(self.styles))]
        base, *offsets = (head(level) for head, level in zip(self.styles, levels, strict=True))
        return torch.stack([base, *(base + offset for offset in offsets)], 1) + self.latent_avg


def _upsample_to(x: Tensor, lateral: Tensor) -> Tensor:
    return F.interpolate(x, lateral.shape[-2:], mode="bilinear", align_corners=True) + lateral
