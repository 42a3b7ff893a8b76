"""Trains the embedded readout."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.images import to_tensor
from cfclip.settings import Settings, batch_size, int_at_least, number, seed_number, setting
from cfclip.toonfaces.factors import HAIR_STYLES, PARTS, sample_face
from cfclip.toonfaces.readout import VISIBLE, Readout, soften
from cfclip.toonfaces.render import ERASABLE, MASKS, render
from cfclip.toonfaces.train.augment import degrade
from cfclip.toonfaces.train.pool import Pool, part_masks, picture
from cfclip.toonfaces.train.run import run_by_adamw, seeded
from cfclip.toonfaces.truth import ToonTruth


@dataclass(frozen=True)
class ReadoutConfig(Settings):
    """How the readout is trained."""

    width: int = setting(16, int_at_least(1))
    pool: int = setting(10_000, int_at_least(1))  # shapes
    batch: int = setting(128, batch_size)
    steps: int = setting(3000, int_at_least(1))
    lr: float = setting(3e-3, number(above=True))
    blur: float = setting(1.2, number())  # largest sigma in pixels; half of the pictures stay sharp
    erased: float = setting(0.06, number(0, 1))  # share of pictures that lack a part, for each of ERASABLE
    small_parts: float = setting(3.0, number())  # weight of a pixel of SMALL_PARTS; others: 1
    seed: int = setting(0, seed_number)


SMALL_PARTS = ("eyebrows", "eye_white", "eyes", "pupil", "lipstick", "glasses")


def train(config: ReadoutConfig, out: Path, device: torch.device | str = "cpu") -> Readout:
    """Train, or resume the training in ``out``; returns the readout in eval mode."""
    device = torch.device(device)
    with seeded(config.seed):
        model = Readout(config.width).train().to(device, memory_format=torch.channels_last)
    pool = Pool((config.seed, 3), config.pool, support="both", device=device)
    styles = torch.tensor([HAIR_STYLES.index(face.hair_style) for face in pool.faces], device=device)
    has = torch.tensor([[float(face.has(part)) for part in PARTS] for face in pool.faces], device=device)
    small = [MASKS.index(part) for part in SMALL_PARTS]
    erasable = [PARTS.index(part) for part in ERASABLE]

    def loss(i: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        n = config.batch
        random = torch.Generator(device).manual_seed(generator.initial_seed())
        shapes, colours = pool.draw(n, generator), pool.draw(n, generator)
        erased = (torch.rand(n, len(ERASABLE), generator=generator) < config.erased).to(device)
        blurred = torch.rand(n, generator=generator) < 0.5
        sigma = (config.blur * torch.rand(n, generator=generator) * blurred).to(device)
        covered = pool.covered(shapes, erased)
        images = picture(covered, pool.palettes[colours])
        images, masks = soften(images, part_masks(covered), sigma)
        images = degrade(images, random).contiguous(memory_format=torch.channels_last)
        parts, presence = model(images)
        weight = 1 + (config.small_parts - 1) * masks[:, small].sum(1)
        loss_parts = (weight * F.cross_entropy(parts, masks, reduction="none")).sum() / weight.sum()
        flags = has[shapes].clone()
        flags[:, erasable] *= 1 - erased.float()
        style, flag = presence.split([len(HAIR_STYLES), len(PARTS)], 1)
        loss_presence = F.cross_entropy(style, styles[shapes])
        loss_presence = loss_presence + F.binary_cross_entropy_with_logits(flag, flags)
        return loss_parts + 0.1 * loss_presence, {"parts": loss_parts, "presence": loss_presence}

    run_by_adamw("readout", loss, config, {"model": model}, out)
    return model.eval()


SOFT = 0.7
"""Sigma, in pixels, of the blur of the softened renders on which a readout is measured."""


def colour_accuracy(
    readout: ToonTruth | Readout, faces: int = 1000, seed: int = 20_000, sigma: float = 0.0
) -> list[dict]:
    """Accuracy on held-out renders of both supports, ``sigma`` pixels out of focus.

    One row per part: its colour, where the part is larger than ``VISIBLE``. Then hair style, whether it is a
    face, and the presence of each part. Of ten faces, one is drawn without brows, one without eyes and one
    without lips; the row "is a face" leaves these out. n: faces counted.
    """
    people = [sample_face((seed, k), "both") for k in range(faces)]
    gone = [[part for j, part in enumerate(ERASABLE) if k % 10 == j] for k in range(faces)]
    drawn = [render(face, without=parts) for face, parts in zip(people, gone, strict=True)]
    masks = torch.from_numpy(np.stack([one.masks for one in drawn]))
    images = to_tensor([one.image for one in drawn])
    if sigma:
        images, masks = soften(images, masks, torch.full((faces,), sigma))
    measured = readout.measure(images)
    rows = []
    for part in PARTS:
        guesses = measured.colour(part)
        hits = [
            guess == getattr(face, part).name
            for face, one, guess in zip(people, drawn, guesses, strict=True)
            if one.area(part) > VISIBLE
        ]
        rows.append({"part": part, "accuracy": float(np.mean(hits)), "n": len(hits)})
    seen = {
        "hair style": measured.hair_style == [HAIR_STYLES.index(face.hair_style) for face in people],
        "is a face": measured.is_face[[not parts for parts in gone]],
    }
    for part in PARTS:
        truth = [face.has(part) and part not in parts for face, parts in zip(people, gone, strict=True)]
        seen[f"{part} or not"] = measured.has(part) == truth
    return rows + [
        {"part": name, "accuracy": float(np.mean(hit)), "n": len(hit)} for name, hit in seen.items()
    ]
