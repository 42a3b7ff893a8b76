"""The judge without CLIP: it segments a toon face and measures the colour of every part inside its mask."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from skimage.color import rgb2lab
from torch import Tensor, nn

from cfclip.toonfaces.factors import HAIR_STYLES, colours
from cfclip.toonfaces.render import MASKS

VISIBLE = 12.0
"""A part smaller than this many pixels of a 64 x 64 picture has no measurable colour."""

_PRESENCE = len(HAIR_STYLES) + 2


def _block(in_ch: int, out_ch: int, stride: int = 1) -> nn.Sequential:
    layers = []
    for channels, step in ((in_ch, stride), (out_ch, 1)):
        layers += [nn.Conv2d(channels, out_ch, 3, step, 1, bias=False), nn.BatchNorm2d(out_ch), nn.ReLU()]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Measurement:
    """What the readout measured in N pictures; P parts in the order of ``MASKS``."""

    masks: np.ndarray  # probabilities [N, P, R, R]
    area: np.ndarray  # pixels of a 64 x 64 picture [N, P]
    lab: np.ndarray  # CIELAB (D65) of each part [N, P, 3], NaN where the part is smaller than VISIBLE
    hair_style: np.ndarray  # index into HAIR_STYLES [N]
    has_beard: np.ndarray  # bool [N]
    has_glasses: np.ndarray  # bool [N]

    def colour(self, part: str) -> list[str | None]:
        """The nearest named colour of ``part`` (in CIELAB) in each picture; None where it is not visible."""
        names = list(colours(part))
        palette = rgb2lab(np.array([colours(part)[n] for n in names]) / 255)
        lab = self.lab[:, MASKS.index(part)]
        nearest = np.linalg.norm(np.nan_to_num(lab)[:, None] - palette, axis=-1).argmin(1)
        return [None if np.isnan(row).any() else names[i] for row, i in zip(lab, nearest, strict=True)]

    @property
    def is_face(self) -> np.ndarray:
        """bool [N]: whether skin, eyes, brows and lips are all visible, in plausible sizes."""
        area = dict(zip(MASKS, self.area.T, strict=True))
        small = (area["eyes"] + area["eye_white"] > 30) & (area["eyebrows"] > 12) & (area["lipstick"] > 12)
        return (area["skin"] > 200) & small


class Readout(nn.Module):
    """A small U-Net. Pictures [N, 3, R, R] in [-1, 1], R a multiple of 8 -> part and presence logits."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.width, w = width, width
        down = [(3, w), (w, 2 * w, 2), (2 * w, 4 * w, 2), (4 * w, 4 * w, 2)]
        self.down = nn.ModuleList([_block(*one) for one in down])
        self.up = nn.ModuleList([_block(8 * w, 4 * w), _block(6 * w, 2 * w), _block(3 * w, w)])
        self.parts = nn.Conv2d(w, len(MASKS), 1)
        self.presence = nn.Linear(4 * w, _PRESENCE)

    @property
    def metadata(self) -> dict:
        """The constructor's arguments, ready for JSON."""
        return {"width": self.width}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """-> part logits [N, P, R, R], presence logits [N, 7]: hair styles, beard, glasses."""
        skips, x = [], images
        for block in self.down:
            x = block(x)
            skips.append(x)
        presence = self.presence(x.amax((2, 3)))
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skip], 1))
        return self.parts(x), presence

    @torch.no_grad()
    def measure(self, images: Tensor) -> Measurement:
        """Segment and measure; a part's colour is the mean over the pixels that belong to it alone."""
        images = images.clamp(-1, 1)
        batches = [self(batch) for batch in images.split(64)]
        logits, presence = (torch.cat(x) for x in zip(*batches, strict=True))
        masks = logits.softmax(1)
        lab = torch.from_numpy(rgb2lab((images * 0.5 + 0.5).cpu().numpy(), channel_axis=1)).to(masks)
        core = masks**6  # antialiased edges mix two parts and count less
        mean = torch.einsum("nphw,nchw->npc", core, lab) / core.sum((2, 3)).clamp_min(1e-6)[..., None]
        area = masks.mean((2, 3)) * 64 * 64
        lab = mean.masked_fill((area < VISIBLE)[..., None], float("nan"))
        style, flags = presence.split([len(HAIR_STYLES), 2], 1)
        beard, glasses = (flags > 0).unbind(1)
        arrays = [x.cpu().numpy() for x in (masks, area, lab, style.argmax(1), beard, glasses)]
        return Measurement(*arrays)
