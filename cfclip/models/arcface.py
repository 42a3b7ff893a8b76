"""ArcFace IR-SE identity networks: the paper's IR-SE50 and the small one of toonfaces are the same class."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IRSE50 = ((64, 64, 3), (64, 128, 4), (128, 256, 14), (256, 512, 3))
"""(in, out, units) of the four stages of IR-SE50."""


class SqueezeExcite(nn.Module):
    """Channel attention. [N, C, H, W] -> the same."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Unit(nn.Module):
    """Residual unit: BN, 3x3, PReLU, strided 3x3, BN, squeeze-excite."""

    def __init__(self, in_ch: int, out_ch: int, stride: int):
        super().__init__()
        self.shortcut_layer = (
            nn.MaxPool2d(1, stride)
            if in_ch == out_ch
            else nn.Sequential(nn.Conv2d(in_ch, out_ch, 1, stride, bias=False), nn.BatchNorm2d(out_ch))
        )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_ch),
            nn.Conv2d(in_ch, out_ch, 3, 1, 1, bias=False),
            nn.PReLU(out_ch),
            nn.Conv2d(out_ch, out_ch, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_ch),
            SqueezeExcite(out_ch),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class IRSE(nn.Module):
    """IR-SE backbone with the parameter names of ``model_ir_se50.pth``. [N, 3, S, S] -> unit features [N, D].

    Args:
        input_size: S, 112 for IR-SE50; must be a multiple of 16.
        stages: (in, out, units) per stage; each starts with stride 2.
        embed_dim: D.
    """

    def __init__(
        self, input_size: int = 112, stages: Sequence[tuple[int, int, int]] = IRSE50, embed_dim: int = 512
    ):
        super().__init__()
        first, last = stages[0][0], stages[-1][1]
        self.input_size, self.stages, self.embed_dim = input_size, tuple(map(tuple, stages)), embed_dim
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.PReLU(first)
        )
        self.body = nn.Sequential(
            *(Unit(a if i == 0 else b, b, 2 if i == 0 else 1) for a, b, n in stages for i in range(n))
        )
        side = input_size // 2 ** len(stages)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(last),
            nn.Dropout(0.6),
            nn.Flatten(),
            nn.Linear(last * side * side, embed_dim),
            nn.BatchNorm1d(embed_dim),
        )

    @property
    def metadata(self) -> dict:
        return {
            "input_size": self.input_size,
            "stages": [list(s) for s in self.stages],
            "embed_dim": self.embed_dim,
        }

    def forward(self, x: Tensor) -> Tensor:
        x = self.output_layer(self.body(self.input_layer(x)))
        return x / x.norm(dim=1, keepdim=True)


class FaceIdentity(nn.Module):
    """A frozen identity network on the generator's images: [N, 3, H, W] in [-1, 1] -> unit features [N, D].

    With ``crop`` the picture is pooled to 256 x 256 and cropped to rows 35:223, columns 32:220 (the published
    alignment of FFHQ faces) first; then it is pooled to the backbone's input size.
    """

    def __init__(self, backbone: IRSE, crop: bool = True):
        super().__init__()
        self.backbone, self.crop = backbone.eval().requires_grad_(False), crop

    def forward(self, images: Tensor) -> Tensor:
        size = self.backbone.input_size
        if self.crop:
            if images.shape[-2:] != (256, 256):
                images = F.adaptive_avg_pool2d(images, 256)
            images = images[:, :, 35:223, 32:220]
        if images.shape[-1] < size:
            images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        elif images.shape[-1] > size:
            images = F.adaptive_avg_pool2d(images, size)
        return self.backbone(images)

    @torch.no_grad()
    def similarity(self, a: Tensor, b: Tensor) -> Tensor:
        """Cosine similarity of two batches of images, [N]."""
        return (self(a) * self(b)).sum(1)
