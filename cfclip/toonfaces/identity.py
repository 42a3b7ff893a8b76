"""Trains the embedded identity network: a small ArcFace IR-SE that tells toon people apart."""

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
from .factors import PARTS, Face, colours, new_photo, repainted, sample_face
from .gan import to_tensor
from .render import render_image


@dataclass(frozen=True)
class IdentityConfig:
    """How the identity network was trained."""

    input_size: int = 64
    stages: tuple[tuple[int, int, int], ...] = ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 128, 2))
    embed_dim: int = 128
    people: int = 3000
    batch: int = 32
    steps: int = 2500
    lr: float = 3e-3
    scale: float = 24.0           # ArcFace's s
    margin: float = 0.3           # ArcFace's m, radians
    repaint: float = 4.0          # weight of 1 - cosine between a photo and itself with one part repainted
    seed: int = 0


def arcface_loss(features: Tensor, centres: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """ArcFace (Deng et al. 2019, eq. 3): cross entropy of ``s cos(theta + m [own class])``. features: unit [N, D]."""
    cosine = features @ F.normalize(centres, dim=1).t()
    theta = cosine.gather(1, labels[:, None]).clamp(-1 + 1e-6, 1 - 1e-6).acos()
    logits = scale * cosine.scatter(1, labels[:, None], (theta + margin).cos())
    return F.cross_entropy(logits, labels)


def repainted_part(face: Face, rng: np.random.Generator) -> Face:
    """``face`` with one of its parts in any named colour."""
    part = rng.choice([part for part in PARTS if face.has(part)])
    return face.with_colour(part, list(colours(part))[rng.integers(len(colours(part)))])


def train(config: IdentityConfig, out: Path) -> IRSE:
    """Train (or go on training) in ``out``; returns the backbone in eval mode."""
    torch.manual_seed(config.seed)
    model = IRSE(config.input_size, config.stages, config.embed_dim).train().to(memory_format=torch.channels_last)
    model.output_layer[1].p = 0.1                                  # 2000 people, not millions: less dropout
    head = nn.Linear(config.embed_dim, config.people, bias=False)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)

    def step(i: int) -> dict[str, float]:
        rng = np.random.default_rng((config.seed, 4, i))
        who = rng.integers(config.people, size=config.batch)
        photos = [new_photo(sample_face((config.seed, 5, int(p))), (config.seed, 6, i, k)) for k, p in enumerate(who)]
        photos += [repainted_part(face, rng) for face in photos]
        images = degrade(to_tensor([render_image(face, config.input_size) for face in photos]))
        features = model(images.contiguous(memory_format=torch.channels_last))
        margin = config.margin * min(1.0, i / (0.3 * config.steps))
        loss = arcface_loss(features, head.weight, torch.from_numpy(who).repeat(2), config.scale, margin)
        one, other = features.chunk(2)
        apart = 1 - (one * other).sum(1).mean()
        optimizer.zero_grad()
        (loss + config.repaint * apart).backward()
        optimizer.step()
        schedule.step()
        return {"loss": loss.item(), "repainted": apart.item()}

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
