"""Trains the embedded identity network: a small ArcFace IR-SE that tells toon people apart."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfclip.images import to_tensor
from cfclip.models.arcface import IRSE, FaceIdentity
from cfclip.settings import Settings, int_at_least, number, seed_number, setting
from cfclip.toonfaces.factors import Face, new_photo, sample_face
from cfclip.toonfaces.render import render_image
from cfclip.toonfaces.train.augment import degrade
from cfclip.toonfaces.train.run import run_training, seeded, stages


@dataclass(frozen=True)
class IdentityConfig(Settings):
    """How the identity network is trained."""

    input_size: int = setting(64, int_at_least(16))
    # (in, out, units) of each stage of the backbone
    stages: tuple[tuple[int, int, int], ...] = setting(
        ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 128, 2)), stages
    )
    embed_dim: int = setting(128, int_at_least(1))
    people: int = setting(2000, int_at_least(2))
    batch: int = setting(64, int_at_least(2))
    steps: int = setting(1500, int_at_least(1))
    lr: float = setting(3e-3, number(above=True))
    scale: float = setting(24.0, number(above=True))  # ArcFace's s
    margin: float = setting(0.3, number())  # ArcFace's m, radians
    seed: int = setting(0, seed_number)


def arcface_loss(features: Tensor, centres: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """ArcFace (Deng et al. 2019, eq. 3): cross entropy of ``s cos(theta + m [own class])``.

    features: unit [N, D]; centres [C, D]; labels [N].
    """
    cosine = features @ F.normalize(centres, dim=1).t()
    theta = cosine.gather(1, labels[:, None]).clamp(-1 + 1e-6, 1 - 1e-6).acos()
    logits = scale * cosine.scatter(1, labels[:, None], (theta + margin).cos())
    return F.cross_entropy(logits, labels)


def train(config: IdentityConfig, out: Path) -> IRSE:
    """Train, or resume the training in ``out``; returns the backbone in eval mode."""
    with seeded(config.seed):
        model = IRSE(config.input_size, config.stages, config.embed_dim)
        head = nn.Linear(config.embed_dim, config.people, bias=False)
    model = model.train().to(memory_format=torch.channels_last)
    model.output_layer[1].p = 0.1  # less dropout than ArcFace's: 2000 people, not millions
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)

    def step(i: int) -> dict[str, float]:
        rng = np.random.default_rng((config.seed, 4, i))
        who = rng.integers(config.people, size=config.batch)
        people = [sample_face((config.seed, 5, int(p))) for p in who]
        photos = [new_photo(face, (config.seed, 6, i, k)) for k, face in enumerate(people)]
        images = degrade(to_tensor([render_image(face, config.input_size) for face in photos]))
        features = model(images.contiguous(memory_format=torch.channels_last))
        margin = config.margin * min(1.0, i / (0.3 * config.steps))
        loss = arcface_loss(features, head.weight, torch.from_numpy(who), config.scale, margin)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return {"loss": loss.item()}

    state = {"model": model, "head": head, "optimizer": optimizer, "schedule": schedule}
    run_training("identity", step, config, state, out)
    return model.eval()


@torch.no_grad()
def verification(facenet: FaceIdentity, pairs: int = 1000, seed: int = 30_000) -> dict[str, float]:
    """How well pairs of one person are told from pairs of two people: AUC of the cosine, and mean cosines.

    A pair is a natural photo and one with counterfactual make-up, of people that training never showed.
    """
    people = [sample_face((seed, k)) for k in range(pairs)]
    made_up = [new_photo(face, (seed, 1, k), "both") for k, face in enumerate(people)]

    def features(faces: list[Face]) -> Tensor:
        batches = (faces[k : k + 100] for k in range(0, pairs, 100))
        return torch.cat([facenet(to_tensor([render_image(face) for face in batch])) for batch in batches])

    a, b = features(people), features(made_up)
    same, other = (a * b).sum(1).numpy(), (a * b.roll(1, 0)).sum(1).numpy()
    auc = (same[:, None] > other[None]).mean() + 0.5 * (same[:, None] == other[None]).mean()
    means = {"same_mean": float(same.mean()), "other_mean": float(other.mean())}
    return {"auc": float(auc)} | means | {"pairs": pairs}
