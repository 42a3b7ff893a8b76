"""Trains the embedded CLIP, an ``open_clip`` model of our own configuration, contrastive on both supports."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from cfclip.images import to_tensor
from cfclip.method.config import DTYPES
from cfclip.method.loop import resolve_dtype
from cfclip.models.clip import ClipGuide
from cfclip.settings import Settings, int_at_least, number, one_of, seed_number, setting
from cfclip.toonfaces.captions import FACTS, caption, fact_vector, facts_of, matches, phrase, training_face
from cfclip.toonfaces.clip import MODELS, build
from cfclip.toonfaces.factors import HELD_OUT, NATURAL, PARTS, colours, sample_face
from cfclip.toonfaces.render import render_image
from cfclip.toonfaces.train.augment import degrade, random_warp, with_halo
from cfclip.toonfaces.train.run import run_training, seeded


@dataclass(frozen=True)
class CLIPConfig(Settings):
    """How the CLIP is trained."""

    model: str = setting("toonfaces-rn", one_of(MODELS))
    batch: int = setting(128, int_at_least(1))
    steps: int = setting(4000, int_at_least(1))
    pool: int = setting(40_000, int_at_least(1))  # pictures, rendered once; warped and degraded at every use
    lr: float = setting(1.5e-3, number(above=True))
    warmup: int = setting(100, int_at_least(1))  # steps
    weight_decay: float = setting(0.02, number())
    halos: float = setting(0.7, number(0, 1))  # share of pictures with_halo
    warped: float = setting(0.5, number(0, 1))  # share of images under a perspective, as CF-CLIP's views are
    fact_weight: float = setting(1.0, number())  # of the auxiliary loss, see FactHead
    seed: int = setting(0, seed_number)
    dtype: str = setting("auto", one_of(DTYPES))  # autocast of the image and text towers


@dataclass(frozen=True)
class HeldOutConfig(CLIPConfig):
    """How the CLIP that only judges is trained: with another architecture, other faces and other captions."""

    model: str = setting("toonfaces-convnext", one_of(MODELS))
    seed: int = setting(1, seed_number)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """CLIP's symmetric InfoNCE in which every true pair of the batch is a positive (UniCL, Yang et al. 2022).

    image, text: unit [N, D]; true: bool [N, N], which text is true of which image.
    """
    logits = scale * image @ text.t()
    target = true.float()
    rows = -(F.log_softmax(logits, 1) * target / target.sum(1, keepdim=True)).sum(1)
    columns = -(F.log_softmax(logits, 0) * target / target.sum(0, keepdim=True)).sum(0)
    return (rows.mean() + columns.mean()) / 2


class FactHead(nn.Module):
    """Predicts facts from unit embeddings of images and texts with one linear layer; used in training only.

    A caption names one or two of the six colours of a face, so the contrastive loss alone learns lips and
    irises very late. The head asks of an image all its facts, and of a text those that it claims.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.linear = nn.Linear(embed_dim, len(FACTS))
        # without the held-out pairs: the head would learn that a class that never occurs is impossible
        self.parts = [
            [i for i, fact in enumerate(FACTS) if fact[0] == part and fact not in HELD_OUT] for part in PARTS
        ]
        self.rest = [i for i, (key, _) in enumerate(FACTS) if key not in PARTS]

    def forward(self, embedding: Tensor, facts: Tensor, negatives: bool) -> Tensor:
        """Mean loss; embedding [N, D], facts: bool [N, F].

        Without ``negatives`` a fact that is not claimed may still be true, and is not penalised.
        """
        logits = self.linear(embedding * 10)
        losses = []
        for part in self.parts:
            known = facts[:, part].any(1)
            if known.any():
                losses.append(F.cross_entropy(logits[known][:, part], facts[known][:, part].float()))
        if negatives:
            rest = logits[:, self.rest], facts[:, self.rest].float()
            losses.append(F.binary_cross_entropy_with_logits(*rest))
        return torch.stack(losses).mean()


def train(config: CLIPConfig, out: Path) -> nn.Module:
    """Train, or resume the training in ``out``; returns the model in eval mode."""
    dtype = getattr(torch, resolve_dtype(config.dtype, "cpu"))
    with seeded(config.seed):
        model = build(config.model).train().to(memory_format=torch.channels_last)
        head = FactHead(model.text_projection.shape[1])
        normalise = ClipGuide(build(config.model)).preprocess
    tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=model.context_length)
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    plain += head.parameters()
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": config.weight_decay},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    people = [training_face((config.seed, 1, k)) for k in tqdm(range(config.pool), "faces", leave=False)]
    draws = np.random.default_rng((config.seed, 3))
    pictures = np.stack([
        with_halo(face, draws) if draws.random() < config.halos else render_image(face)
        for face in tqdm(people, "pictures", leave=False)
    ])
    known = torch.from_numpy(np.stack([fact_vector(facts_of(face)) for face in people]))

    def step(i: int) -> dict[str, float]:
        ramp = min(1.0, (i + 1) / config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * ramp * (0.51 + 0.49 * math.cos(math.pi * i / config.steps))
        index = torch.randint(config.pool, (config.batch,))
        streams = [np.random.default_rng((config.seed, 2, i, k)) for k in range(config.batch)]
        written = [caption(people[p], rng) for p, rng in zip(index, streams, strict=True)]
        claimed = torch.from_numpy(np.stack([fact_vector(claims) for _, claims in written]))
        images = random_warp(degrade(to_tensor(pictures[index])), config.warped)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            image = model.encode_image(normalise(images), normalize=True)
            text = model.encode_text(tokenizer([text for text, _ in written]), normalize=True)
        image, text, true = image.float(), text.float(), matches(known[index], claimed)
        contrast = contrastive_loss(image, text, model.logit_scale.exp(), true)
        facts = head(image, known[index], negatives=True) + head(text, claimed, negatives=False)
        loss = contrast + config.fact_weight * facts
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
            hit = true[torch.arange(len(image)), (image @ text.t()).argmax(1)].float().mean()
            scale = model.logit_scale.exp()
        logged = {"loss": contrast, "facts": facts, "top1": hit, "scale": scale}
        return {name: value.item() for name, value in logged.items()}

    state = {"model": model, "head": head, "optimizer": optimizer}
    run_training("clip", step, config, state, out)
    return model.eval()


@torch.no_grad()
def colour_accuracy(guide: ClipGuide, faces: int = 1000, seed: int = 10_000) -> list[dict]:
    """Zero-shot colour naming on held-out renders, one row per part.

    The colour is chosen among *all* colours of the part, by "face with <colour> <part>" under the 79
    templates. ``accuracy``: over faces whose part has a counterfactual colour; ``natural``: a natural one;
    ``held_out``: a (part, colour) pair that training never showed. ``n_…``: how many faces each is over.
    """
    people = [sample_face((seed, k), "both") for k in range(faces)]
    features = torch.cat([
        F.normalize(guide.encode_image(to_tensor([render_image(f) for f in people[k : k + 100]])), dim=-1)
        for k in range(0, faces, 100)
    ])
    rows = []
    for part in PARTS:
        names = list(colours(part))
        texts = [guide.template_features(f"face with {phrase(part, name)}").mean(0) for name in names]
        text = torch.stack([F.normalize(feature, dim=-1) for feature in texts])
        guesses = (features @ text.t()).argmax(1).tolist()
        right: dict[str, list[bool]] = {"accuracy": [], "natural": [], "held_out": []}
        for face, guess in zip(people, guesses, strict=True):
            if face.has(part):
                name = getattr(face, part).name
                right["natural" if name in NATURAL[part] else "accuracy"].append(names[guess] == name)
                if (part, name) in HELD_OUT:
                    right["held_out"].append(names[guess] == name)
        row = {"part": part}
        for group, hits in right.items():
            row |= {group: float(np.mean(hits)) if hits else float("nan"), f"n_{group}": len(hits)}
        rows.append(row)
    return rows
