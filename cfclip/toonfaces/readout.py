"""The judge that uses no CLIP: it segments a toon face and measures the colour of every part inside its mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from skimage.color import rgb2lab
from torch import Tensor, nn

from ..training import fit, settled
from .clip import tint
from .factors import HAIR_STYLES, PARTS, Face, colours, sample_face
from .gan import to_tensor
from .render import ERASABLE, MASKS, render

VISIBLE = 12.0
"""A part smaller than this many pixels of a 64 x 64 picture has no measurable colour."""
FLAGS: tuple[str, ...] = (*PARTS, "glasses")
"""What a face may have or not; each is an output of its own."""


def _block(in_ch: int, out_ch: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_ch, out_ch, 3, stride, 1, bias=False), nn.BatchNorm2d(out_ch), nn.ReLU(),
                         nn.Conv2d(out_ch, out_ch, 3, 1, 1, bias=False), nn.BatchNorm2d(out_ch), nn.ReLU())


@dataclass(frozen=True)
class Measurement:
    """What the readout sees in N pictures; P = len(MASKS) parts.

    masks: probabilities [N, P, R, R]; area: pixels of a 64 x 64 picture [N, P]; lab: CIELAB (D65) of each part [N, P, 3],
    NaN where the part is smaller than ``VISIBLE``; hair_style: index into HAIR_STYLES [N]; present: bool [N, len(FLAGS)].
    """

    masks: np.ndarray
    area: np.ndarray
    lab: np.ndarray
    hair_style: np.ndarray
    present: np.ndarray

    def has(self, part: str) -> np.ndarray:
        """bool [N]: whether there is such a part, one of ``FLAGS``, at all."""
        return self.present[:, FLAGS.index(part)]

    def distance(self, part: str, colour: str) -> np.ndarray:
        """CIELAB distance [N] of ``part`` to its named ``colour``, NaN where the part is not visible."""
        return np.linalg.norm(self.lab[:, MASKS.index(part)] - rgb2lab(np.array(colours(part)[colour]) / 255), axis=-1)

    def colour(self, part: str) -> list[str | None]:
        """The nearest named colour of ``part`` in CIELAB, None where the part is not visible."""
        names = list(colours(part))
        palette = rgb2lab(np.array([colours(part)[n] for n in names]) / 255)
        lab = self.lab[:, MASKS.index(part)]
        nearest = np.linalg.norm(np.nan_to_num(lab)[:, None] - palette, axis=-1).argmin(1)
        return [None if np.isnan(row).any() else names[i] for row, i in zip(lab, nearest, strict=True)]

    @property
    def is_face(self) -> np.ndarray:
        """bool [N]: skin, eyes, brows and lips are all there, in plausible sizes."""
        area = dict(zip(MASKS, self.area.T, strict=True))
        return (area["skin"] > 200) & (area["eyes"] + area["eye_white"] > 30) & (area["eyebrows"] > 12) & (area["lipstick"] > 12)


class Readout(nn.Module):
    """A small U-Net: part probabilities and presence factors from pictures [N, 3, R, R] in [-1, 1], R a multiple of 8."""

    def __init__(self, width: int = 16):
        super().__init__()
        w = width
        self.width = width
        self.down = nn.ModuleList([_block(3, w), _block(w, 2 * w, 2), _block(2 * w, 4 * w, 2), _block(4 * w, 4 * w, 2)])
        self.up = nn.ModuleList([_block(8 * w, 4 * w), _block(6 * w, 2 * w), _block(3 * w, w)])
        self.parts = nn.Conv2d(w, len(MASKS), 1)
        self.presence = nn.Linear(4 * w, len(HAIR_STYLES) + len(FLAGS))

    @property
    def metadata(self) -> dict:
        return {"width": self.width}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """-> part logits [N, P, R, R], presence logits [N, 12] (hair styles, then flags)."""
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
        """Segment and measure; a part's colour is what explains the picture with the masks, see :func:`unmix`."""
        images = images.clamp(-1, 1)
        batches = [self(batch) for batch in images.split(64)]
        logits, presence = (torch.cat(x) for x in zip(*batches, strict=True))
        masks = logits.softmax(1)
        rgb = torch.cat([unmix(*pair) for pair in zip((images * 0.5 + 0.5).split(64), masks.split(64), strict=True)])
        lab = torch.from_numpy(rgb2lab(rgb.clamp(0, 1).cpu().numpy())).to(masks)
        area = masks.mean((2, 3)) * 64 * 64
        lab = lab.masked_fill((area < VISIBLE)[..., None], float("nan"))
        styles = len(HAIR_STYLES)
        return Measurement(masks.cpu().numpy(), area.cpu().numpy(), lab.cpu().numpy(), presence[:, :styles].argmax(1).cpu().numpy(),
                           (presence[:, styles:] > 0).cpu().numpy())


def unmix(images: Tensor, masks: Tensor, ridge: float = 0.003) -> Tensor:
    """Colours [N, P, 3] of the parts whose mixture by ``masks`` [N, P, H, W] is the picture [N, C, H, W], by least squares.

    In a soft picture few pixels belong wholly to an iris, but all of them are mixed as the masks are. For each part only pixels that it has a
    share in count, so that shades of a large part elsewhere do not; ``ridge`` draws towards the mean colour of what the part covers.
    """
    m, x = masks.flatten(2), images.flatten(2)                     # [N, P, S], [N, C, S]
    near = m.square() / m.square().sum(2, keepdim=True).clamp_min(1e-6)
    gram = torch.einsum("nps,nqs,nrs->npqr", near, m, m)
    mixed = torch.einsum("nps,nqs,ncs->npqc", near, m, x)
    mean = torch.einsum("nps,ncs->npc", near, x)
    eye = torch.eye(m.shape[1], device=m.device)
    solved = torch.linalg.solve(gram + ridge * eye, mixed + ridge * mean[:, :, None])
    return solved.diagonal(dim1=1, dim2=2).transpose(1, 2)


def soften(images: Tensor, masks: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures [N, 3, H, W] and what covers them [N, P, H, W], both out of focus by ``sigma`` [N] pixels, as generators draw them."""
    taps = torch.arange(-3, 4)
    kernel = torch.exp(-0.5 * (taps / sigma.clamp_min(0.05)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)                  # [N, 7]
    both = torch.cat([images, masks], 1)
    n, c, h, w = both.shape
    x = F.pad(both, (3, 3, 3, 3), mode="replicate").reshape(1, n * c, h + 6, w + 6)
    k = kernel.repeat_interleave(c, 0)[:, None]
    x = F.conv2d(F.conv2d(x, k[..., None, :], groups=n * c), k[..., None], groups=n * c)
    return x.reshape(n, c, h, w).split([images.shape[1], masks.shape[1]], 1)


@dataclass(frozen=True)
class ReadoutConfig:
    """How the readout was trained."""

    width: int = 16
    batch: int = 32
    steps: int = 3000
    lr: float = 3e-3
    blur: float = 1.0             # most of it, in pixels; half of the pictures are sharp
    erased: float = 0.06          # share of pictures without one of ERASABLE, for each
    small_parts: float = 3.0      # weight of a pixel of eyes, brows and lips
    seed: int = 0
    dtype: str = "auto"           # autocast of the network


def _presence_loss(logits: Tensor, styles: Tensor, flags: Tensor) -> Tensor:
    n = len(HAIR_STYLES)
    return F.cross_entropy(logits[:, :n], styles) + F.binary_cross_entropy_with_logits(logits[:, n:], flags)


def _flags(face: Face, without: Sequence[str] = ()) -> list[bool]:
    return [*(face.has(part) and part not in without for part in PARTS), face.has_glasses]


def train(config: ReadoutConfig, out: Path) -> Readout:
    """Train (or go on training) in ``out``; returns the readout in eval mode."""
    config = settled(config, out=out)
    torch.manual_seed(config.seed)
    model = Readout(config.width).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)
    small = [MASKS.index(part) for part in ("eyebrows", "eye_white", "eyes", "pupil", "lipstick")]

    def step(i: int) -> dict[str, float]:
        rng = np.random.default_rng((config.seed, 4, i))
        faces = [sample_face((config.seed, 3, i, k), "both") for k in range(config.batch)]
        erased = [[part for part in ERASABLE if rng.random() < config.erased] for _ in faces]
        drawn = [render(face, without=parts) for face, parts in zip(faces, erased, strict=True)]
        sigma = config.blur * torch.rand(config.batch) * (torch.rand(config.batch) < 0.5)
        images, masks = soften(to_tensor([r.image for r in drawn]), torch.from_numpy(np.stack([r.masks for r in drawn])), sigma)
        with torch.autocast("cpu", getattr(torch, config.dtype), enabled=config.dtype != "float32"):
            parts, presence = (x.float() for x in model(tint(images).contiguous(memory_format=torch.channels_last)))
        weight = 1 + (config.small_parts - 1) * masks[:, small].sum(1)
        loss_parts = (weight * F.cross_entropy(parts, masks, reduction="none")).sum() / weight.sum()
        styles = torch.tensor([HAIR_STYLES.index(face.hair_style) for face in faces])
        flags = torch.tensor([_flags(*pair) for pair in zip(faces, erased, strict=True)], dtype=torch.float32)
        loss_presence = _presence_loss(presence, styles, flags)
        optimizer.zero_grad()
        (loss_parts + 0.1 * loss_presence).backward()
        optimizer.step()
        schedule.step()
        return {"parts": loss_parts.item(), "presence": loss_presence.item()}

    fit(step, config.steps, state={"model": model, "optimizer": optimizer, "schedule": schedule}, out=out, seed=config.seed,
        checkpoint_every=250, desc="readout")
    return model.eval()


SOFT = 0.7
"""Pixels out of focus of the softened renders that a readout is measured on."""


def colour_accuracy(readout: Readout, faces: int = 1000, seed: int = 20_000, sigma: float = 0.0) -> list[dict]:
    """Naming of colours on held-out renders of both supports, ``sigma`` pixels out of focus: a row per part, over parts larger than ``VISIBLE``.

    Then rows of what else is seen: styles, presence of each part (a face in ten is without brows, without eyes, without lips), faces as such.
    """
    people = [sample_face((seed, k), "both") for k in range(faces)]
    gone = [[part for j, part in enumerate(ERASABLE) if k % 10 == j] for k in range(faces)]
    drawn = [render(*pair) for pair in zip(people, [64] * faces, gone, strict=True)]
    images, _ = soften(to_tensor([r.image for r in drawn]), torch.from_numpy(np.stack([r.masks for r in drawn])), torch.full((faces,), sigma))
    measured = readout.measure(images)
    rows = []
    for part in PARTS:
        guesses = measured.colour(part)
        hits = [g == getattr(f, part).name for f, r, g in zip(people, drawn, guesses, strict=True) if r.area(part) > VISIBLE]
        rows.append({"part": part, "accuracy": float(np.mean(hits)), "n": len(hits)})
    flags = np.array([_flags(*pair) for pair in zip(people, gone, strict=True)])
    whole = np.array([not parts for parts in gone])
    seen = {"hair style": measured.hair_style == [HAIR_STYLES.index(f.hair_style) for f in people],
            "is a face": measured.is_face[whole]} | {f"{flag} or not": measured.has(flag) == flags[:, j] for j, flag in enumerate(FLAGS)}
    return rows + [{"part": name, "accuracy": float(np.mean(hits)), "n": len(hits)} for name, hits in seen.items()]
