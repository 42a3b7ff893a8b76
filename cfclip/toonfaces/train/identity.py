"""Trains the embedded identity network: a small ArcFace IR-SE that tells toon people apart."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfclip.images import to_tensor
from cfclip.method.loop import run_loop, with_global_seed
from cfclip.models.arcface import IRSE, FaceIdentity
from cfclip.settings import Settings
from cfclip.toonfaces.factors import new_photo, sample_face
from cfclip.toonfaces.render import render_image
from cfclip.toonfaces.train.augment import degrade


@dataclass(frozen=True)
class IdentityConfig(Settings):
    """How the identity network was trained."""

    input_size: int = 64
    stages: tuple[tuple[int, int, int], ...] = ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 128, 2))
    embed_dim: int = 128
    people: int = 2000
    batch: int = 64
    steps: int = 1500
    lr: float = 3e-3
    scale: float = 24.0  # ArcFace's s
    margin: float = 0.3  # ArcFace's m, radians
    seed: int = 0


def arcface_loss(features: Tensor, centres: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """ArcFace (Deng et al. 2019, eq. 3): cross entropy of ``s cos(theta + m [own class])``. features: unit [N, D]."""
    cosine = features @ F.normalize(centres, dim=1).t()
    theta = cosine.gather(1, labels[:, None]).clamp(-1 + 1e-6, 1 - 1e-6).acos()
    logits = scale * cosine.scatter(1, labels[:, None], (theta + margin).cos())
    return F.cross_entropy(logits, labels)


def train(config: IdentityConfig, out: Path) -> IRSE:
    """Train (or go on training) in ``out``; returns the backbone in eval mode."""
    torch.manual_seed(config.seed)
    model = (
        IRSE(config.input_size, config.stages, config.embed_dim).train().to(memory_format=torch.channels_last)
    )
    model.output_layer[1].p = 0.1  # 2000 people, not millions: less dropout
    head = nn.Linear(config.embed_dim, config.people, bias=False)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)

    def step(i: int) -> dict[str, float]:
        rng = np.random.default_rng((config.seed, 4, i))
        who = rng.integers(config.people, size=config.batch)
        photos = [
            new_photo(sample_face((config.seed, 5, int(p))), (config.seed, 6, i, k))
            for k, p in enumerate(who)
        ]
        images = degrade(to_tensor([render_image(face, config.input_size) for face in photos]))
        features = model(images.contiguous(memory_format=torch.channels_last))
        margin = config.margin * min(1.0, i / (0.3 * config.steps))
        loss = arcface_loss(features, head.weight, torch.from_numpy(who), config.scale, margin)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return {"loss": loss.item()}

    run_loop(
        with_global_seed(step),
        config.steps,
        state={"model": model, "head": head, "optimizer": optimizer, "schedule": schedule},
        out=out,
        seed=config.seed,
        checkpoint_every=250,
        desc="identity",
    )
    return model.eval()


def verification(facenet: FaceIdentity, pairs: int = 1000, seed: int = 30_000) -> dict[str, float]:
    """AUC of telling the same person (natural photo, photo with counterfactual make-up) from two people; unseen people."""
    people = [sample_face((seed, k)) for k in range(pairs)]
    made_up = [new_photo(face, (seed, 1, k), "both") for k, face in enumerate(people)]
    with torch.no_grad():
        a, b = (
            torch.cat([
                facenet(to_tensor([render_image(f) for f in group[k : k + 100]]))
                for k in range(0, pairs, 100)
            ])
            for group in (people, made_up)
        )
    same, other = (a * b).sum(1).numpy(), (a * b.roll(1, 0)).sum(1).numpy()
    auc = (same[:, None] > other[None]).mean() + 0.5 * (same[:, None] == other[None]).mean()
    return {
        "auc": float(auc),
        "same_mean": float(same.mean()),
        "other_mean": float(other.mean()),
        "pairs": pairs,
    }
