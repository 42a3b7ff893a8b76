"""Trains the embedded readout."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.images import to_tensor
from cfclip.settings import Settings, int_at_least, number, seed_number, setting
from cfclip.toonfaces.factors import HAIR_STYLES, PARTS, Face, sample_face
from cfclip.toonfaces.readout import VISIBLE, Readout
from cfclip.toonfaces.render import render
from cfclip.toonfaces.train.augment import degrade
from cfclip.toonfaces.train.run import run_training, seeded
from cfclip.toonfaces.truth import ToonTruth


@dataclass(frozen=True)
class ReadoutConfig(Settings):
    """How the readout is trained."""

    width: int = setting(16, int_at_least(1))
    batch: int = setting(32, int_at_least(1))
    steps: int = setting(1000, int_at_least(1))
    lr: float = setting(3e-3, number(above=True))
    seed: int = setting(0, seed_number)


def _presence_loss(logits: Tensor, faces: list[Face]) -> Tensor:
    styles = torch.tensor([HAIR_STYLES.index(f.hair_style) for f in faces])
    flags = torch.tensor([[f.has_beard, f.has_glasses] for f in faces], dtype=torch.float32)
    n = len(HAIR_STYLES)
    return F.cross_entropy(logits[:, :n], styles) + F.binary_cross_entropy_with_logits(logits[:, n:], flags)


def train(config: ReadoutConfig, out: Path) -> Readout:
    """Train, or resume the training in ``out``; returns the readout in eval mode."""
    with seeded(config.seed):
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

    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    run_training("readout", step, config, state, out)
    return model.eval()


def colour_accuracy(readout: ToonTruth | Readout, faces: int = 1000, seed: int = 20_000) -> list[dict]:
    """Accuracy on held-out renders of both supports.

    One row per part, over the parts larger than ``VISIBLE``, then one per presence factor; n: faces counted.
    """
    people = [sample_face((seed, k), "both") for k in range(faces)]
    drawn = [render(face) for face in people]
    measured = readout.measure(to_tensor([r.image for r in drawn]))
    rows = []
    for part in PARTS:
        guesses = measured.colour(part)
        hits = [
            g == getattr(f, part).name
            for f, r, g in zip(people, drawn, guesses, strict=True)
            if f.has(part) and r.area(part) > VISIBLE
        ]
        rows.append({"part": part, "accuracy": float(np.mean(hits)), "n": len(hits)})
    presence = {
        "hair style": measured.hair_style == [HAIR_STYLES.index(f.hair_style) for f in people],
        "beard or not": measured.has_beard == [f.has_beard for f in people],
        "glasses or not": measured.has_glasses == [f.has_glasses for f in people],
        "is a face": measured.is_face,
    }
    for name, hits in presence.items():
        rows.append({"part": name, "accuracy": float(np.mean(hits)), "n": faces})
    return rows
