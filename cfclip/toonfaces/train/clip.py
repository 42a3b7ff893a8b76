"""Trains the embedded CLIP: an ``open_clip`` model from our own config, contrastively, on both supports."""

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
from cfclip.method.loop import resolve_dtype, run_loop, with_global_seed
from cfclip.models.clip import ClipGuide
from cfclip.settings import Settings
from cfclip.toonfaces.captions import FACTS, caption, fact_vector, facts_of, matches, phrase, training_face
from cfclip.toonfaces.clip import build
from cfclip.toonfaces.factors import HELD_OUT, NATURAL, PARTS, colours, sample_face
from cfclip.toonfaces.render import render_image
from cfclip.toonfaces.train.augment import degrade, random_warp, with_halo


@dataclass(frozen=True)
class CLIPConfig(Settings):
    """How the CLIP was trained."""

    model: str = "toonfaces-rn"  # a file of clip_configs/
    batch: int = 128
    steps: int = 4000
    pool: int = 40_000  # rendered once, warped and degraded afresh at every use
    lr: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.02
    halos: float = 0.7  # share of pictures with_halo
    warped: float = 0.5  # share of images under a random perspective, as CF-CLIP will show them
    fact_weight: float = 1.0  # of the auxiliary loss, see FactHead
    seed: int = 0
    dtype: str = "auto"  # autocast of the image and text towers


@dataclass(frozen=True)
class HeldOutConfig(CLIPConfig):
    """How the CLIP that only judges was trained: another architecture, another width of text tower, other faces and captions."""

    model: str = "toonfaces-convnext"
    seed: int = 1


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """CLIP's symmetric InfoNCE with every true pair of the batch as a positive (UniCL). image, text: unit [N, D]."""
    logits = scale * image @ text.t()
    target = true.float()
    rows = -(F.log_softmax(logits, 1) * target / target.sum(1, keepdim=True)).sum(1)
    columns = -(F.log_softmax(logits, 0) * target / target.sum(0, keepdim=True)).sum(0)
    return (rows.mean() + columns.mean()) / 2


class FactHead(nn.Module):
    """Reads facts off unit embeddings of either modality, through one linear layer; used in training only.

    A caption names one or two of the six colours of a face, so the contrastive loss alone finds lips and irises very
    late. The shared head asks the image for all of its facts and the text for those it claims.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.linear = nn.Linear(embed_dim, len(FACTS))
        # held-out pairs take no part: a class that never comes would be learned as impossible
        self.parts = [
            [i for i, fact in enumerate(FACTS) if fact[0] == part and fact not in HELD_OUT] for part in PARTS
        ]
        self.rest = [i for i, (key, _) in enumerate(FACTS) if key not in PARTS]

    def forward(self, embedding: Tensor, facts: Tensor, negatives: bool) -> Tensor:
        """Mean loss; facts: bool [N, F]. Without ``negatives`` what is not claimed may still be true, and is not judged."""
        logits = self.linear(embedding * 10)
        losses = []
        for part in self.parts:
            known = facts[:, part].any(1)
            if known.any():
                losses.append(F.cross_entropy(logits[known][:, part], facts[known][:, part].float()))
        if negatives:
            losses.append(
                F.binary_cross_entropy_with_logits(logits[:, self.rest], facts[:, self.rest].float())
            )
        return torch.stack(losses).mean()


def train(config: CLIPConfig, out: Path) -> nn.Module:
    """Train (or go on training) in ``out``; returns the model in eval mode."""
    dtype = getattr(torch, resolve_dtype(config.dtype, "cpu"))
    torch.manual_seed(config.seed)
    model = build(config.model).train().to(memory_format=torch.channels_last)
    guide_tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=model.context_length)
    head = FactHead(model.text_projection.shape[1])
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or "embedding" in name] + list(
        head.parameters()
    )
    decayed = [p for name, p in model.named_parameters() if not (p.ndim < 2 or "embedding" in name)]
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": config.weight_decay}],
        lr=config.lr,
        betas=(0.9, 0.98),
    )
    normalise = ClipGuide(build(config.model)).preprocess
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
        written = [
            caption(people[p], np.random.default_rng((config.seed, 2, i, k))) for k, p in enumerate(index)
        ]
        claimed = torch.from_numpy(np.stack([fact_vector(claims) for _, claims in written]))
        images = random_warp(degrade(to_tensor(pictures[index])), config.warped).contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            image = model.encode_image(normalise(images), normalize=True)
            text = model.encode_text(guide_tokenizer([text for text, _ in written]), normalize=True)
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
        return {
            "loss": contrast.item(),
            "facts": facts.item(),
            "top1": hit.item(),
            "scale": model.logit_scale.exp().item(),
        }

    run_loop(
        with_global_seed(step),
        config.steps,
        state={"model": model, "head": head, "optimizer": optimizer},
        out=out,
        seed=config.seed,
        checkpoint_every=250,
        desc="clip",
    )
    return model.eval()


@torch.no_grad()
def colour_accuracy(guide: ClipGuide, faces: int = 1000, seed: int = 10_000) -> list[dict]:
    """Zero-shot colour naming on held-out renders, a row per part.

    For every part the right name is looked for among *all* its colours, with "face with <colour> <part>" under the
    79 templates. ``accuracy`` is over faces whose part has a counterfactual colour, ``natural`` over the natural ones,
    ``held_out`` over (part, colour) pairs that training never showed; n is beside each.
    """
    people = [sample_face((seed, k), "both") for k in range(faces)]
    features = torch.cat([
        F.normalize(guide.encode_image(to_tensor([render_image(f) for f in people[k : k + 100]])), dim=-1)
        for k in range(0, faces, 100)
    ])
    rows = []
    for part in PARTS:
        names = list(colours(part))
        text = torch.stack([
            F.normalize(guide.template_features(f"face with {phrase(part, name)}").mean(0), dim=-1)
            for name in names
        ])
        guess = (features @ text.t()).argmax(1).tolist()
        right: dict[str, list[bool]] = {"accuracy": [], "natural": [], "held_out": []}
        for face, g in zip(people, guess, strict=True):
            if face.has(part):
                name = getattr(face, part).name
                right["natural" if name in NATURAL[part] else "accuracy"].append(names[g] == name)
                if (part, name) in HELD_OUT:
                    right["held_out"].append(names[g] == name)
        rows.append(
            {"part": part}
            | {
                k: v
                for key, hits in right.items()
                for k, v in ((key, float(np.mean(hits)) if hits else float("nan")), (f"n_{key}", len(hits)))
            }
        )
    return rows
