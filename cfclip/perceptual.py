"""The perceptual loss of the AFHQ runs: L1 between VGG19 features at ``conv5_2``, after ReLU."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoints import about, build, describe, read_torch, state_dict

STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 2))
"""(channels, convolutions) up to conv5_2, the last one that is used; a 2 x 2 max-pooling between stages."""
MEAN_BGR = (0.40760392, 0.45795686, 0.48501961)


class VGG19(nn.Module):
    """VGG19 to ``conv5_2``, with the parameter names of ``vgg19_conv.pth``. [N, 3, H, W] in [-1, 1] -> [N, 512, H/16, W/16]."""

    def __init__(self):
        super().__init__()
        width = 3
        for stage, (channels, count) in enumerate(STAGES, 1):
            for i in range(1, count + 1):
                self.add_module(f"conv{stage}_{i}", nn.Conv2d(width, channels, 3, padding=1))
                width = channels

    def forward(self, images: Tensor) -> Tensor:
        mean = torch.tensor(MEAN_BGR, dtype=images.dtype, device=images.device).reshape(1, 3, 1, 1)
        x = ((images.flip(1) + 1) / 2 - mean) * 255                # the weights are from Caffe: BGR, 0 … 255
        for name, conv in self.named_children():
            if name.endswith("_1") and name != "conv1_1":
                x = F.max_pool2d(x, 2)
            x = conv(x).relu()
        return x


def perceptual_loss(vgg: VGG19, edited_images: Tensor, source_images: Tensor) -> Tensor:
    """``mean |VGG(x') - VGG(x)|``. Images: [N, 3, H, W] in [-1, 1]."""
    with torch.no_grad():
        source = vgg(source_images)
    return F.l1_loss(vgg(edited_images), source)


def load_vgg(path: str | os.PathLike) -> VGG19:
    """The frozen network from ``vgg19_conv.pth``. Raises WeightsError."""
    path = Path(path)
    with about(path):
        tree = read_torch(path)
        tensors = state_dict(tree, "state_dict")
        if "conv1_1.weight" not in tensors:
            raise ValueError(f"it holds {describe(tree)}, where vgg19_conv.pth is needed")
        return build(VGG19, tensors, "VGG19")
