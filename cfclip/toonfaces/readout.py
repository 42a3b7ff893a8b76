"""The judge that uses no CLIP: it segments a toon face and measures the colour of every part inside its mask."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from skimage.color import rgb2lab
from torch import Tensor, nn

from ..training import fit
from .clip import degrade
from .factors import HAIR_STYLES, PARTS, Face, colours, sample_face
from .gan import to_tensor
from .render import MASKS, render

VISIBLE = 12.0
"""A part smaller than this many pixels of a 64 x 64 picture has no measurable colour."""
_PRESENCE = len(HAIR_STYLES) + 2


def _block(in_ch: int, out_ch: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_ch, out_ch, 3, stride, 1, bias=False), nn.BatchNorm2d(out_ch), nn.ReLU(),
                         nn.Conv2d(out_ch, out_ch, 3, 1, 1, bias=False), nn.BatchNorm2d(out_ch), nn.ReLU())


@dataclass(frozen=True)
class Measurement:
    """What the readout sees in N pictures; P = len(MASKS) parts.

    masks: probabilities [N, P, R, R]; area: pixels of a 64 x 64 picture [N, P]; lab: CIELAB (D65) of each part [N, P, 3],
    NaN where the part is smaller than ``VISIBLE``; hair_style: index into HAIR_STYLES [N]; has_beard, has_glasses: bool [N].
    """

    masks: np.ndarray
    area: np.ndarray
    lab: np.ndarray
    hair_style: np.ndarray
    has_beard: np.ndarray
    has_glasses: np.ndarray

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
        self.presence = nn.Linear(4 * w, _PRESENCE)

    @property
    def metadata(self) -> dict:
        return {"width": self.width}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """-> part logits [N, P, R, R], presence logits [N, 7] (hair styles, beard, glasses)."""
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
        """Segment and measure; colours are means over the pixels that belong wholly to their part."""
        images = images.clamp(-1, 1)
        batches = [self(batch) for batch in images.split(64)]
        logits, presence = (torch.cat(x) for x in zip(*batches, strict=True))
        masks = logits.softmax(1)
        lab = torch.from_numpy(rgb2lab((images * 0.5 + 0.5).cpu().numpy(), channel_axis=1)).to(masks)
        core = masks ** 6                                          # antialiased edges mix two parts: weigh them down
        mean = torch.einsum("nphw,nchw->npc", core, lab) / core.sum((2, 3)).clamp_min(1e-6)[..., None]
        area = masks.mean((2, 3)) * 64 * 64
        lab = mean.masked_fill((area < VISIBLE)[..., None], float("nan"))
        styles = len(HAIR_STYLES)
        return Measurement(masks.cpu().numpy(), area.cpu().numpy(), lab.cpu().numpy(), presence[:, :styles].argmax(1).cpu().numpy(),
                           (presence[:, styles] > 0).cpu().numpy(), (presence[:, styles + 1] > 0).cpu().numpy())


@dataclass(frozen=True)
class ReadoutConfig:
    """How the readout was trained."""

    width: int = 16
    batch: int = 32
    steps: int = 1000
    lr: float = 3e-3
    seed: int = 0


def _presence_loss(logits: Tensor, faces: list[Face]) -> Tensor:
    styles = torch.tensor([HAIR_STYLES.index(f.hair_style) for f in faces])
    flags = torch.tensor([[f.has_beard, f.has_glasses] for f in faces], dtype=torch.float32)
    n = len(HAIR_STYLES)
    return F.cross_entropy(logits[:, :n], styles) + F.binary_cross_entropy_with_logits(logits[:, n:], flags)


def train(config: ReadoutConfig, out: Path) -> Readout:
    """Train (or go on training) in ``out``; returns the readout in eval mode."""
    torch.manual_seed(config.seed)
    model = Readout(config.width).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)

    def step(i: int) -> dict[str, float]:
        faces = [sample_face((config.seed, 3, i, k), "both") for k in range(config.batch)]
        drawn = [render(face) for face in faces]
        masks = torch.from_numpy(np.stack([r.masks for r in drawn]))
        images = degrade(to_tensor([r.image for r in drawn])).contiguous(memory_format=torch.channels_last)
        parts, presence = model(images)
        loss_parts = F.cross_entropy(parts, masks)
        loss_presence = _presence_loss(presence, faces)
        optimizer.zero_grad()
        (loss_parts + 0.1 * loss_presence).backward()
        optimizer.step()
        schedule.step()
        return {"parts": loss_parts.item(), "presence": loss_presence.item()}

    fit(step, config.steps, state={"model": model, "optimizer": optimizer, "schedule": schedule}, out=out, seed=config.seed,
        checkpoint_every=250, desc="readout")
    return model.eval()


def colour_accuracy(readout: Readout, faces: int = 1000, seed: int = 20_000) -> list[dict]:
    """Colour naming on held-out renders of both supports, a row per part, over parts larger than ``VISIBLE``."""
    people = [sample_face((seed, k), "both") for k in range(faces)]
    drawn = [render(face) for face in people]
    measured = readout.measure(to_tensor([r.image for r in drawn]))
    rows = []
    for part in PARTS:
        guesses = measured.colour(part)
        hits = [g == getattr(f, part).name for f, r, g in zip(people, drawn, guesses, strict=True) if f.has(part) and r.area(part) > VISIBLE]
        rows.append({"part": part, "accuracy": float(np.mean(hits)), "n": len(hits)})
    presence = {"hair style": measured.hair_style == [HAIR_STYLES.index(f.hair_style) for f in people],
                "beard or not": measured.has_beard == [f.has_beard for f in people],
                "glasses or not": measured.has_glasses == [f.has_glasses for f in people], "is a face": measured.is_face}
    return rows + [{"part": name, "accuracy": float(np.mean(hits)), "n": faces} for name, hits in presence.items()]
