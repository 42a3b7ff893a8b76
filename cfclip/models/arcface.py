"""ArcFace identity networks with an IR-SE body: the paper's IR-SE50, and the small one of toonfaces.

"ArcFace: Additive Angular Margin Loss for Deep Face Recognition", Deng et al. 2019; the blocks are those of
"Squeeze-and-Excitation Networks", Hu et al. 2018.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

IRSE50 = ((64, 64, 3), (64, 128, 4), (128, 256, 14), (256, 512, 3))
"""(in, out, units) of the four stages of IR-SE50."""


class SqueezeExcite(nn.Module):
    """Channel attention: ``x * sigmoid(W2 relu(W1 mean_hw(x)))``. [N, C, H, W] -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Unit(nn.Module):
    """Residual unit: BN, 3x3, PReLU, strided 3x3, BN, squeeze-excite. [N, in, H, W] -> [N, out, H/s, W/s]."""

    def __init__(self, in_ch: int, out_ch: int, stride: int):
        super().__init__()
        if in_ch == out_ch:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            convolution = nn.Conv2d(in_ch, out_ch, 1, stride, bias=False)
            self.shortcut_layer = nn.Sequential(convolution, nn.BatchNorm2d(out_ch))
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


def input_layer(channels: int) -> nn.Sequential:
    """[N, 3, S, S] -> [N, channels, S, S]."""
    convolution = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.PReLU(channels))


def body(stages: Sequence[tuple[int, int, int]]) -> nn.Sequential:
    """The units of ``stages``, (in, out, units) each; the first unit of a stage has stride 2."""
    units = nn.Sequential()
    for before, after, count in stages:
        units.extend([Unit(before, after, 2), *(Unit(after, after, 1) for _ in range(count - 1))])
    return units


class IRSE(nn.Module):
    """IR-SE network with the parameter names of ``model_ir_se50.pth``. [N, 3, S, S] -> unit features [N, D].

    Args:
        input_size: S, 112 for IR-SE50; a multiple of 2^stages.
        stages: (in, out, units) per stage.
        embed_dim: D.
    """

    def __init__(
        self, input_size: int = 112, stages: Sequence[tuple[int, int, int]] = IRSE50, embed_dim: int = 512
    ):
        super().__init__()
        self.input_size, self.stages, self.embed_dim = input_size, tuple(map(tuple, stages)), embed_dim
        self.input_layer, self.body = input_layer(stages[0][0]), body(stages)
        last, side = stages[-1][1], input_size // 2 ** len(stages)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(last),
            nn.Dropout(0.6),
            nn.Flatten(),
            nn.Linear(last * side * side, embed_dim),
            nn.BatchNorm1d(embed_dim),
        )

    @property
    def metadata(self) -> dict:
        """The constructor's arguments, for a file's header."""
        stages = [list(stage) for stage in self.stages]
        return {"input_size": self.input_size, "stages": stages, "embed_dim": self.embed_dim}

    def forward(self, x: Tensor) -> Tensor:
        x = self.output_layer(self.body(self.input_layer(x)))
        return x / x.norm(dim=1, keepdim=True)


class FaceIdentity(nn.Module):
    """A frozen identity network for generated images: [N, 3, H, W] in [-1, 1] -> unit features [N, D].

    With ``crop`` (the published alignment of FFHQ faces) images are first pooled to 256 x 256 and cropped to
    rows 35:223 and columns 32:220. In both cases they are then resized to the network's input.
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
