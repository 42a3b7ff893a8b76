"""The judge without CLIP: it says which parts a toon face has, segments them and measures their colours."""

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfclip.images import at_once
from cfclip.toonfaces.factors import HAIR_STYLES, PARTS, colours, lab_palette, to_lab
from cfclip.toonfaces.render import MASKS

VISIBLE = 12.0
"""A part smaller than this many pixels of a 64 x 64 picture has no measurable colour."""


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
    present: np.ndarray  # bool [N, len(PARTS)]

    def __getitem__(self, rows: slice) -> "Measurement":
        """What was measured in some of the pictures."""
        return Measurement(*(getattr(self, field.name)[rows] for field in fields(self)))

    def has(self, part: str) -> np.ndarray:
        """bool [N]: whether the face has ``part``, one of ``PARTS``, at all."""
        return self.present[:, PARTS.index(part)]

    def distance(self, part: str, colour: str) -> np.ndarray:
        """CIELAB distance [N] of ``part`` from its named ``colour``; NaN where the part is not visible."""
        return np.linalg.norm(self.lab[:, MASKS.index(part)] - to_lab(colours(part)[colour]), axis=-1)

    def colour(self, part: str) -> list[str | None]:
        """The nearest named colour of ``part`` (in CIELAB) in each picture; None where it is not visible."""
        names, palette = lab_palette(part)
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
        self.presence = nn.Linear(4 * w, len(HAIR_STYLES) + len(PARTS))

    @property
    def metadata(self) -> dict:
        """The constructor's arguments, ready for JSON."""
        return {"width": self.width}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """-> part logits [N, P, R, R]; presence logits [N, len(HAIR_STYLES) + len(PARTS)], styles first."""
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
        """Segment and measure the pictures; :func:`unmix` finds the colours of the parts."""
        images = images.clamp(-1, 1)
        n = at_once(images)
        batches = images.split(n)
        logits, presence = (torch.cat(x) for x in zip(*map(self, batches), strict=True))
        masks = logits.softmax(1)
        pairs = zip(batches, masks.split(n), strict=True)
        rgb = torch.cat([unmix(batch * 127.5 + 127.5, parts) for batch, parts in pairs]).clamp(0, 255)
        area = masks.mean((2, 3)) * 64 * 64
        lab = torch.from_numpy(to_lab(rgb.cpu().numpy())).to(masks)
        lab = lab.masked_fill((area < VISIBLE)[..., None], float("nan"))
        style, flags = presence.split([len(HAIR_STYLES), len(PARTS)], 1)
        return Measurement(*(x.cpu().numpy() for x in (masks, area, lab, style.argmax(1), flags > 0)))


def unmix(images: Tensor, masks: Tensor, ridge: float = 0.003) -> Tensor:
    """Colours [N, P, C] of the parts: least squares of picture = sum over parts of mask x colour.

    In a soft picture few pixels belong wholly to an iris, but the masks say how each pixel is mixed. The fit
    for a part counts only the pixels in which it has a share, so that shades of a large part elsewhere do not
    count.

    Args:
        images: [N, C, H, W], linear in any unit.
        masks: shares of the parts in [0, 1], [N, P, H, W].
        ridge: pulls a colour that the masks leave open towards the mean of the pixels that the part covers;
            relative to the weight of a part that covers all of its pixels alone.
    """
    m, x = masks.flatten(2), images.flatten(2)  # [N, P, S], [N, C, S]
    near = m.square() / m.square().sum(2, keepdim=True).clamp_min(1e-6)
    gram = torch.einsum("nps,nqs,nrs->npqr", near, m, m)  # one system per part p, of all colours q
    mixed = torch.einsum("nps,nqs,ncs->npqc", near, m, x)
    mean = torch.einsum("nps,ncs->npc", near, x)
    eye = torch.eye(m.shape[1], dtype=m.dtype, device=m.device)
    solved = torch.linalg.solve(gram + ridge * eye, mixed + ridge * mean[:, :, None])
    return solved.diagonal(dim1=1, dim2=2).transpose(1, 2)


def soften(images: Tensor, masks: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Blur pictures and their masks alike; a generator also draws slightly out of focus.

    images: [N, C, H, W]; masks: [N, P, H, W]; sigma: that of the Gaussian [N] in pixels, 0 for a sharp
    picture; its window is 7 pixels wide. Returns the same shapes; masks that sum to one still do.
    """
    taps = torch.arange(-3, 4, device=sigma.device)
    kernel = torch.exp(-0.5 * (taps / sigma.clamp_min(0.05)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)  # [N, 7]
    both = torch.cat([images, masks], 1)
    n, c, h, w = both.shape
    x = F.pad(both, (3, 3, 3, 3), mode="replicate").reshape(1, n * c, h + 6, w + 6)
    k = kernel.repeat_interleave(c, 0)[:, None]
    x = F.conv2d(F.conv2d(x, k[..., None, :], groups=n * c), k[..., None], groups=n * c)
    return x.reshape(n, c, h, w).split([images.shape[1], masks.shape[1]], 1)
