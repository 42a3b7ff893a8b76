"""The e4e encoder ("Designing an Encoder for StyleGAN Image Manipulation", Tov et al. 2021): photo -> W+.

An IR-SE50 body whose last three stages meet in a feature pyramid. The first head reads one w off the coarsest level; head i
adds the offset of layer i, so that all layers stay near that w.
"""

import math
import os
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoints import about, build, describe, option, read_torch, state_dict
from .identity import IRSE50, Unit
from .stylegan2 import EqualLinear

IMAGE_SIZE = 256
MEDIUM, FINE = 3, 7
"""The first layers that are read off the middle (32²) and the fine (64²) level of the pyramid."""


class StyleHead(nn.Module):
    """Strided convolutions down to one pixel, then a linear layer. [N, C, S, S] -> [N, C]."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.convs = nn.Sequential(*(layer for _ in range(int(math.log2(size))) for layer in (
            nn.Conv2d(channels, channels, 3, 2, 1), nn.LeakyReLU(0.01))))
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
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        self.body = nn.Sequential(*(Unit(a if i == 0 else b, b, 2 if i == 0 else 1) for a, b, n in IRSE50 for i in range(n)))
        self.styles = nn.ModuleList(StyleHead(dim, 16 if i < MEDIUM else 32 if i < FINE else 64) for i in range(num_ws))
        self.latlayer1, self.latlayer2 = nn.Conv2d(256, dim, 1), nn.Conv2d(128, dim, 1)
        self.register_buffer("latent_avg", torch.zeros(num_ws, dim))

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"the encoder takes aligned photos of shape [N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], not {list(images.shape)}: "
                             "crop to the face and resize first")
        x, stages = self.input_layer(images), []
        ends = [sum_ - 1 for sum_ in accumulate(n for _, _, n in IRSE50)]
        for i, unit in enumerate(self.body):
            x = unit(x)
            if i in ends:
                stages.append(x)
        _, fine, medium, coarse = stages                           # 128², then 128 x 64², 256 x 32², 512 x 16²
        p1 = _upsample_to(coarse, self.latlayer1(medium))
        p2 = _upsample_to(p1, self.latlayer2(fine))
        base = self.styles[0](coarse)
        offsets = [head(coarse if i < MEDIUM else p1 if i < FINE else p2) for i, head in enumerate(self.styles) if i]
        return torch.stack([base, *(base + offset for offset in offsets)], 1) + self.latent_avg


def _upsample_to(x: Tensor, lateral: Tensor) -> Tensor:
    return F.interpolate(x, lateral.shape[-2:], mode="bilinear", align_corners=True) + lateral


def load_e4e(path: str | os.PathLike) -> Encoder4Editing:
    """The frozen encoder of ``e4e_ffhq_encode.pt`` (its generator: ``load_generator`` of the same file). Raises WeightsError."""
    path = Path(path)
    with about(path):
        tree = read_torch(path)
        state = state_dict(tree, "state_dict")
        tensors = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
        kind = option(tree, "encoder_type", "Encoder4Editing")
        if kind != "Encoder4Editing" or "latlayer1.weight" not in tensors:
            raise ValueError(f"it holds {describe(tree)} ({kind}), where an e4e encoder is needed")
        num_ws = len({key.split(".")[1] for key in tensors if key.startswith("styles.")})
        dim = tensors["latlayer1.weight"].shape[0]
        average = tree.get("latent_avg")
        if not isinstance(average, Tensor) or not option(tree, "start_from_latent_avg", True):
            average = torch.zeros(dim)
        if average.shape not in ((dim,), (1, dim), (num_ws, dim)):
            raise ValueError(f"its latent_avg has shape {list(average.shape)}, where [{num_ws}, {dim}] is needed")
        return build(lambda: Encoder4Editing(num_ws, dim), tensors | {"latent_avg": average.expand(num_ws, dim)}, "encoder")
