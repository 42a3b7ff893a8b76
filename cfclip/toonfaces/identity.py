"""Trains the embedded identity network: a small IR-SE that tells toon people apart by their shapes, whatever colours they wear."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..identity import IRSE, FaceIdentity
from ..training import fit
from .clip import degrade
from .factors import HAIR_STYLES, IDENTITY_FACTORS, PARTS, UNIT, Face, colours, new_photo, repainted, sample_face
from .gan import to_tensor
from .render import render_image


@dataclass(frozen=True)
class IdentityConfig:
    """How the identity network was trained."""

    input_size: int = 64
    stages: tuple[tuple[int, int, int], ...] = ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 128, 2))
    embed_dim: int = 128
    batch: int = 32               # people, two pictures of each
    steps: int = 3000
    lr: float = 3e-3
    temperature: float = 0.1
    same_photo: float = 0.25      # share of pairs that are one photo, a part of it repainted; the others are two photos
    factors: float = 1.0          # weight of the error of what makes the person, read off the features; in training only
    seed: int = 0


GEOMETRY: tuple[str, ...] = tuple(name for name in IDENTITY_FACTORS if name != "hair_style")


def geometry(face: Face) -> list[float]:
    """The lengths that make the person, each in [-1, 1]."""
    return [2 * (getattr(face, name) - low) / (high - low) - 1 for name, (low, high) in ((name, UNIT[name]) for name in GEOMETRY)]


def same_or_not(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE: row i of unit features a [N, D] and of b are one person, all other pairs are two."""
    logits, same = a @ b.t() / temperature, torch.arange(len(a))
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.t(), same)) / 2


def repainted_part(face: Face, rng: np.random.Generator) -> Face:
    """``face`` with one of its parts in any named colour."""
    part = rng.choice([part for part in PARTS if face.has(part)])
    return face.with_colour(part, list(colours(part))[rng.integers(len(colours(part)))])


def _pairs(config: IdentityConfig, i: int) -> tuple[list[Face], list[Face]]:
    """Two pictures each of people that no other step has seen. Two photos have nothing in common but the person, and the second is in the
    very colours of the *next* person's first: who goes by colours is wrong every time."""
    rng = np.random.default_rng((config.seed, 4, i))
    ones = [sample_face((config.seed, 5, i, k), "both") for k in range(config.batch)]
    others = [repainted(new_photo(face, (config.seed, 6, i, k)), like) for k, (face, like) in enumerate(zip(ones, ones[1:] + ones[:1], strict=True))]
    return ones, [repainted_part(one, rng) if rng.random() < config.same_photo else other for one, other in zip(ones, others, strict=True)]


def train(config: IdentityConfig, out: Path) -> IRSE:
    """Train (or go on training) in ``out``; returns the backbone in eval mode."""
    torch.manual_seed(config.seed)
    model = IRSE(config.input_size, config.stages, config.embed_dim).train().to(memory_format=torch.channels_last)
    model.output_layer[1].p = 0.1                                  # every step shows people anew: less dropout
    head = nn.Linear(config.embed_dim, len(GEOMETRY) + len(HAIR_STYLES))
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)

    def step(i: int) -> dict[str, float]:
        ones, others = _pairs(config, i)
        images = degrade(to_tensor([render_image(face, config.input_size) for face in ones + others]))
        features = model(images.contiguous(memory_format=torch.channels_last))
        loss = same_or_not(*features.chunk(2), config.temperature)
        lengths, styles = head(10 * features).split([len(GEOMETRY), len(HAIR_STYLES)], 1)
        wrong = F.mse_loss(lengths, torch.tensor([geometry(face) for face in ones]).repeat(2, 1))
        style = F.cross_entropy(styles, torch.tensor([HAIR_STYLES.index(face.hair_style) for face in ones]).repeat(2))
        optimizer.zero_grad()
        (loss + config.factors * (wrong + 0.2 * style)).backward()
        optimizer.step()
        schedule.step()
        return {"loss": loss.item(), "geometry": wrong.item(), "style": style.item()}

    fit(step, config.steps, state={"model": model, "head": head, "optimizer": optimizer, "schedule": schedule}, out=out,
        seed=config.seed, checkpoint_every=250, desc="identity")
    return model.eval()


@torch.no_grad()
def _features(facenet: FaceIdentity, faces: Sequence[Face]) -> Tensor:
    return torch.cat([facenet(to_tensor([render_image(face) for face in faces[k:k + 100]])) for k in range(0, len(faces), 100)])


def _auc(same: np.ndarray, other: np.ndarray) -> float:
    return float((same[:, None] > other[None]).mean() + 0.5 * (same[:, None] == other[None]).mean())


def verification(facenet: FaceIdentity, pairs: int = 1000, seed: int = 30_000) -> dict[str, float]:
    """AUC of telling two photos of one person from photos of two; unseen people, colours of both supports.

    auc: against anybody; auc_same_colours: against another person in the very colours of the photo that it is compared with.
    """
    people = [sample_face((seed, k)) for k in range(pairs)]
    photos = [new_photo(face, (seed, 1, k)) for k, face in enumerate(people)]
    doubles = [repainted(other, face) for face, other in zip(people, photos[1:] + photos[:1], strict=True)]
    a, b, c = (_features(facenet, group) for group in (people, photos, doubles))
    same, other, double = ((a * x).sum(1).numpy() for x in (b, b.roll(1, 0), c))
    return {"auc": _auc(same, other), "auc_same_colours": _auc(same, double), "same_mean": float(same.mean()),
            "other_mean": float(other.mean()), "double_mean": float(double.mean()), "pairs": pairs}


def repainting(facenet: FaceIdentity, faces: int = 100, seed: int = 31_000) -> list[dict]:
    """Identity of the exact truth: natural faces against themselves with a part repainted, a row per part and colour."""
    people = [sample_face((seed, k)) for k in range(faces)]
    before = _features(facenet, people)
    rows = []
    for part in PARTS:
        index = [i for i, face in enumerate(people) if face.has(part)]
        for name in colours(part):
            after = _features(facenet, [people[i].with_colour(part, name) for i in index])
            rows.append({"part": part, "colour": name, "identity": float((before[index] * after).sum(1).mean()), "n": len(index)})
    return rows
