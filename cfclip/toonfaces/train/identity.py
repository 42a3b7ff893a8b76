"""Trains the embedded identity network: it tells people apart by their shapes, whatever colours they wear."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import mannwhitneyu
from torch import Tensor, nn

from cfclip.models.arcface import IRSE, FaceIdentity
from cfclip.settings import LARGEST_BATCH, Settings, int_at_least, number, seed_number, setting
from cfclip.toonfaces.factors import GEOMETRY, HAIR_STYLES, PARTS, Face, colours, geometry, sample_face
from cfclip.toonfaces.render import pictures
from cfclip.toonfaces.train.augment import degrade
from cfclip.toonfaces.train.pool import Pool, picture, repainted
from cfclip.toonfaces.train.run import run_by_adamw, seeded, stages


@dataclass(frozen=True)
class IdentityConfig(Settings):
    """How the identity network is trained."""

    input_size: int = setting(64, int_at_least(8))
    stages: tuple[tuple[int, int, int], ...] = setting(
        ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 128, 2)), stages
    )
    embed_dim: int = setting(128, int_at_least(1))
    people: int = setting(3000, int_at_least(2))
    photos: int = setting(4, int_at_least(2))  # of each person
    batch: int = setting(256, int_at_least(2, maximum=LARGEST_BATCH))  # people, two pictures of each
    steps: int = setting(1700, int_at_least(1))
    lr: float = setting(3e-3, number(above=True))
    temperature: float = setting(0.1, number(above=True))
    same_photo: float = setting(0.5, number(0, 1))  # share of pairs that are one photo, a part repainted
    same_weight: float = setting(4.0, number())  # of one minus the similarity of such pairs
    factors: float = setting(1.0, number())  # weight of the errors of geometry and style, in training only
    seed: int = setting(0, seed_number)


def same_or_not(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE: rows i of the unit features a and b [N, D] are one person, other pairs are two."""
    logits, same = a @ b.t() / temperature, torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.t(), same)) / 2


def train(config: IdentityConfig, out: Path, device: torch.device | str = "cpu") -> IRSE:
    """Train, or resume the training in ``out``; returns the backbone in eval mode.

    The two photos of a pair share nothing except the person, and the second one has the colours of the *next*
    person's first photo: a network that goes by colours is wrong every time. A share ``same_photo`` of the
    pairs are one photo instead, with one part repainted.
    """
    device = torch.device(device)
    with seeded(config.seed):
        model = IRSE(config.input_size, config.stages, config.embed_dim)
        head = nn.Linear(config.embed_dim, len(GEOMETRY) + len(HAIR_STYLES)).to(device)
    model = model.train().to(device, memory_format=torch.channels_last)
    model.output_layer[1].p = 0.0  # no dropout: hardly any picture is seen twice
    pool = Pool((config.seed, 5), config.people, config.photos, "both", config.input_size, device)
    firsts = pool.faces[:: config.photos]
    lengths = torch.tensor([geometry(face) for face in firsts], device=device)
    styles = torch.tensor([HAIR_STYLES.index(face.hair_style) for face in firsts], device=device)

    def loss(i: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        n = config.batch
        random = torch.Generator(device).manual_seed(generator.initial_seed())
        who = torch.randperm(config.people, generator=generator)[:n].to(device)
        one, another = (torch.rand(n, config.photos, generator=generator).topk(2).indices.to(device)).T
        worn, strange = pool.draw(n, generator), pool.draw(n, generator)
        part = torch.randint(len(PARTS), (n,), generator=generator).to(device)
        same = (torch.rand(n, generator=generator) < config.same_photo).to(device)
        first = pool.palettes[worn]
        second = torch.where(
            same[:, None, None], repainted(first, pool.palettes[strange], part), pool.palettes[worn.roll(-1)]
        )
        shapes = config.photos * who.repeat(2) + torch.cat([one, torch.where(same, one, another)])
        images = degrade(picture(pool.covered(shapes), torch.cat([first, second])), random)
        features = model(images.contiguous(memory_format=torch.channels_last))
        a, b = features.chunk(2)
        alike = same_or_not(a, b, config.temperature)
        apart = ((1 - (a * b).sum(1)) * same).sum() / same.sum().clamp_min(1)
        guess, style = head(10 * features).split([len(GEOMETRY), len(HAIR_STYLES)], 1)
        wrong = F.mse_loss(guess, lengths[who].repeat(2, 1))
        style = F.cross_entropy(style, styles[who].repeat(2))
        whole = alike + config.same_weight * apart + config.factors * (wrong + 0.2 * style)
        return whole, {"loss": alike, "apart": apart, "geometry": wrong, "style": style}

    run_by_adamw("identity", loss, config, {"model": model, "head": head}, out)
    return model.eval()


@torch.no_grad()
def _features(facenet: FaceIdentity, faces: Sequence[Face]) -> Tensor:
    batches = (faces[k : k + 100] for k in range(0, len(faces), 100))
    return torch.cat([facenet(pictures(batch)) for batch in batches])


def _auc(same: np.ndarray, other: np.ndarray) -> float:
    return mannwhitneyu(same, other).statistic / (len(same) * len(other))


def verification(facenet: FaceIdentity, pairs: int = 1000, seed: int = 30_000) -> dict[str, float]:
    """How well two photos of one person are told from photos of two: AUC of the cosine, and mean cosines.

    The people are unseen in training. A natural photo is compared with a new photo of both supports. For
    ``auc`` the photo of a wrong pair shows another person; for ``auc_same_colours`` it also has exactly the
    colours of the natural photo.
    """
    people = [sample_face((seed, k)) for k in range(pairs)]
    photos = [sample_face((seed, 1, k), "both").of_person(face) for k, face in enumerate(people)]
    others = photos[1:] + photos[:1]
    doubles = [other.in_the_colours_of(face) for face, other in zip(people, others, strict=True)]
    a, b, c = (_features(facenet, group) for group in (people, photos, doubles))
    same, other, double = ((a * x).sum(1).numpy() for x in (b, b.roll(1, 0), c))
    aucs = {"auc": _auc(same, other), "auc_same_colours": _auc(same, double)}
    means = {"same_mean": same.mean(), "other_mean": other.mean(), "double_mean": double.mean()}
    return aucs | {name: float(value) for name, value in means.items()} | {"pairs": pairs}


def repainting(facenet: FaceIdentity, faces: int = 100, seed: int = 31_000) -> list[dict]:
    """Identity that the true counterfactual keeps: natural faces against themselves, one part repainted.

    One row per part and colour; ``n``: faces that have the part.
    """
    people = [sample_face((seed, k)) for k in range(faces)]
    before, rows = _features(facenet, people), []
    for part in PARTS:
        index = [i for i, face in enumerate(people) if face.has(part)]
        for name in colours(part):
            after = _features(facenet, [people[i].with_colour(part, name) for i in index])
            identity = float((before[index] * after).sum(1).mean())
            rows.append({"part": part, "colour": name, "identity": identity, "n": len(index)})
    return rows
