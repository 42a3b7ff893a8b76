"""VGG19 up to ``conv5_2``, the features of the perceptual loss in the AFHQ runs.

"Very Deep Convolutional Networks for Large-Scale Image Recognition", Simonyan & Zisserman 2015, configuration
E.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 2))
"""(channels, convolutions) of each stage up to conv5_2, with 2 x 2 max-pooling between stages."""

MEAN_BGR = (0.40760392, 0.45795686, 0.48501961)


class VGG19(nn.Module):
    """[N, 3, H, W] in [-1, 1] -> [N, 512, H/16, W/16], after ReLU. Parameters as in ``vgg19_conv.pth``."""

    def __init__(self):
        super().__init__()
        width = 3
        for stage, (channels, count) in enumerate(STAGES, 1):
            for i in range(1, count + 1):
                self.add_module(f"conv{stage}_{i}", nn.Conv2d(width, channels, 3, padding=1))
                width = channels

    def forward(self, images: Tensor) -> Tensor:
        mean = torch.tensor(MEAN_BGR, dtype=images.dtype, device=images.device).reshape(1, 3, 1, 1)
        x = ((images.flip(1) + 1) / 2 - mean) * 255  # the weights are from Caffe: BGR, 0 … 255
        for name, conv in self.named_children():
            if name.endswith("_1") and name != "conv1_1":
                x = F.max_pool2d(x, 2)
            x = conv(x).relu()
        return x
