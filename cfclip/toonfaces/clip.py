"""Trains the embedded CLIP: an ``open_clip`` model from our own config, contrastively, on both supports."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..clip import ClipGuide
from ..training import fit, settled
from .captions import FACTS, caption, fact_vector, facts_of, matches, phrase, training_face, vocabulary
from .factors import HELD_OUT, NATURAL, PARTS, Face, colours, sample_face
from .gan import to_tensor
from .render import MASKS, render, render_image

CONFIGS = Path(__file__).parent / "clip_configs"


@dataclass(frozen=True)
class CLIPConfig:
    """How the CLIP was trained."""

    model: str = "toonfaces-rn"   # a file of clip_configs/
    batch: int = 128
    steps: int = 4000
    pool: int = 40_000            # rendered once, warped and degraded afresh at every use
    lr: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.02
    halos: float = 0.7            # share of pictures with_halo
    warped: float = 0.5           # share of images under a random perspective, as CF-CLIP will show them
    fact_weight: float = 1.0      # of the auxiliary loss, see FactHead
    seed: int = 0
    dtype: str = "auto"           # autocast of the image and text towers


@dataclass(frozen=True)
class HeldOutConfig(CLIPConfig):
    """How the CLIP that only judges was trained: another architecture, another width of text tower, other faces and captions."""

    model: str = "toonfaces-convnext"
    seed: int = 1


class KnownWords(nn.Module):
    """The embedding of the few tokens that captions hold, and one row for all others.

    In place of open_clip's table, whose 49 408 rows would be most of the file, and noise but for these.
    """

    def __init__(self, tokens: Tensor, width: int):
        super().__init__()
        self.register_buffer("tokens", tokens)                     # [V], sorted
        self.weight = nn.Parameter(0.02 * torch.randn(len(tokens) + 1, width))

    def rows(self, tokens: Tensor) -> Tensor:
        """Token ids [...] -> row of ``weight``; V for a token that training never saw."""
        row = torch.searchsorted(self.tokens, tokens).clamp(max=len(self.tokens) - 1)
        return torch.where(self.tokens[row] == tokens, row, len(self.tokens))

    def forward(self, tokens: Tensor) -> Tensor:
        row = self.rows(tokens)
        if self.training:                                          # a word in fifty goes unread, or the last row would stay noise
            row = torch.where((torch.rand(row.shape) < 0.02) & (tokens < self.tokens[-2]), len(self.tokens), row)
        return F.embedding(row, self.weight)


def build(name: str = "toonfaces-rn") -> nn.Module:
    """The untrained ``open_clip`` model of ``clip_configs/<name>.json``, reading the words of our captions (:class:`KnownWords`)."""
    if name not in open_clip.list_models():
        open_clip.add_model_config(CONFIGS)
    model = open_clip.CLIP(**open_clip.get_model_config(name))     # create_model warns that there are no weights yet
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    known = {token for text in vocabulary() for token in tokenizer.encode(text)}
    ends = {0, tokenizer.sot_token_id, tokenizer.eot_token_id}     # padding, start, end: the two largest ids are the last two
    model.token_embedding = KnownWords(torch.tensor(sorted(known | ends)), model.token_embedding.embedding_dim)
    return model


def random_warp(images: Tensor, share: float, strength: float = 0.5) -> Tensor:
    """Another random perspective for each image (a ``share`` of them), mid-grey outside. [N, 3, R, R] in [-1, 1]."""
    n = len(images)
    corners = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
    moved = corners * (1 - strength * torch.rand(n, 4, 2))
    x, y = corners[:, 0].expand(n, 4), corners[:, 1].expand(n, 4)
    u, v = moved.unbind(-1)
    o, z = torch.ones_like(u), torch.zeros_like(u)
    rows = torch.cat([torch.stack([u, v, o, z, z, z, -x * u, -x * v], -1), torch.stack([z, z, z, u, v, o, -y * u, -y * v], -1)], 1)
    h = torch.linalg.solve(rows, torch.cat([x, y], 1))             # output point -> input point
    h = torch.cat([h, torch.ones(n, 1)], 1).reshape(n, 3, 3)
    r = images.shape[-1]
    axis = (torch.arange(r) + 0.5) * 2 / r - 1
    grid = torch.stack([*torch.meshgrid(axis, axis, indexing="xy"), torch.ones(r, r)], -1)
    p = torch.einsum("nij,hwj->nhwi", h, grid)
    warped = F.grid_sample(images, p[..., :2] / p[..., 2:], padding_mode="zeros", align_corners=False)
    return torch.where(torch.rand(n, 1, 1, 1) < share, warped, images)


def degrade(images: Tensor) -> Tensor:
    """Blur and noise on some images, so that the network does not depend on the renderer's exact edges; tints in soft patches on
    some, or it would take a green glow about the mouth for green lips, and edits would make one."""
    n, r = len(images), images.shape[-1]
    soft = F.interpolate(F.interpolate(images, scale_factor=0.6, mode="bilinear", antialias=True), (r, r), mode="bilinear")
    return tint(torch.lerp(images, soft, torch.rand(n, 1, 1, 1) * (torch.rand(n, 1, 1, 1) < 0.5)))


def tint(images: Tensor) -> Tensor:
    """Soft patches of colour on some images, and noise."""
    n, r = len(images), images.shape[-1]
    for cells in (4, 8):
        patches = F.interpolate(torch.randn(n, 3, cells, cells), (r, r), mode="bicubic")
        images = images + 0.2 * torch.rand(n, 1, 1, 1) * (torch.rand(n, 1, 1, 1) < 0.5) * patches
    return images + 0.06 * torch.rand(n, 1, 1, 1) * torch.randn_like(images)


HALOED = {"skin": 0.05, "hair": 0.1, "eyebrows": 0.35, "eyes": 0.2, "lipstick": 0.25, "beard": 0.05}
"""How often :func:`with_halo` takes which part: the smaller, the more often it is mistaken."""


def with_halo(face: Face, rng: np.random.Generator, resolution: int = 64) -> np.ndarray:
    """``face`` with a colour smeared *around* one of its parts, and not on it or another small one; uint8 [R, R, 3].

    Its captions stay true. A CLIP that takes purple lids for purple eyebrows is one that edits will satisfy with purple lids.
    """
    drawn, part = render(face, resolution), rng.choice(PARTS, p=[HALOED[part] for part in PARTS])
    mask = drawn.masks[MASKS.index(part)]
    around = gaussian_filter(mask, rng.uniform(0.015, 0.06) * resolution)
    kept = np.maximum(mask, sum(drawn.masks[MASKS.index(small)] for small in ("eyebrows", "eyes", "lipstick", "beard")))
    alpha = (around / max(around.max(), 1e-6) * rng.uniform(0.5, 2.5)).clip(0, 1) * (1 - kept)
    tint = np.array(list(colours(part).values())[rng.integers(len(colours(part)))])
    return np.rint(drawn.image + alpha[..., None] * (tint - drawn.image)).astype(np.uint8)


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
        self.parts = [[i for i, fact in enumerate(FACTS) if fact[0] == part and fact not in HELD_OUT] for part in PARTS]
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
            losses.append(F.binary_cross_entropy_with_logits(logits[:, self.rest], facts[:, self.rest].float()))
        return torch.stack(losses).mean()


def train(config: CLIPConfig, out: Path) -> nn.Module:
    """Train (or go on training) in ``out``; returns the model in eval mode."""
    config = settled(config, out=out)
    torch.manual_seed(config.seed)
    model = build(config.model).train().to(memory_format=torch.channels_last)
    guide_tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=model.context_length)
    head = FactHead(model.text_projection.shape[1])
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or "embedding" in name] + list(head.parameters())
    decayed = [p for name, p in model.named_parameters() if not (p.ndim < 2 or "embedding" in name)]
    optimizer = torch.optim.AdamW([{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": config.weight_decay}],
                                  lr=config.lr, betas=(0.9, 0.98))
    normalise = ClipGuide(build(config.model)).preprocess
    people = [training_face((config.seed, 1, k)) for k in tqdm(range(config.pool), "faces", leave=False)]
    draws = np.random.default_rng((config.seed, 3))
    pictures = np.stack([with_halo(face, draws) if draws.random() < config.halos else render_image(face)
                         for face in tqdm(people, "pictures", leave=False)])
    known = torch.from_numpy(np.stack([fact_vector(facts_of(face)) for face in people]))

    def step(i: int) -> dict[str, float]:
        ramp = min(1.0, (i + 1) / config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * ramp * (0.51 + 0.49 * math.cos(math.pi * i / config.steps))
        index = torch.randint(config.pool, (config.batch,))
        written = [caption(people[p], np.random.default_rng((config.seed, 2, i, k))) for k, p in enumerate(index)]
        claimed = torch.from_numpy(np.stack([fact_vector(claims) for _, claims in written]))
        images = random_warp(degrade(to_tensor(pictures[index])), config.warped).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", getattr(torch, config.dtype), enabled=config.dtype != "float32"):
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
        return {"loss": contrast.item(), "facts": facts.item(), "top1": hit.item(), "scale": model.logit_scale.exp().item()}

    fit(step, config.steps, state={"model": model, "head": head, "optimizer": optimizer}, out=out, seed=config.seed, checkpoint_every=250, desc="clip")
    return model.eval()


@torch.no_grad()
def colour_accuracy(guide: ClipGuide, faces: int = 1000, seed: int = 10_000) -> list[dict]:
    """Zero-shot colour naming on held-out renders, a row per part.

    For every part the right name is looked for among *all* its colours, with "face with <colour> <part>" under the
    79 templates. ``accuracy`` is over faces whose part has a counterfactual colour, ``natural`` over the natural ones,
    ``held_out`` over (part, colour) pairs that training never showed; n is beside each.
    """
    people = [sample_face((seed, k), "both") for k in range(faces)]
    features = torch.cat([F.normalize(guide.encode_image(to_tensor([render_image(f) for f in people[k:k + 100]])), dim=-1)
                          for k in range(0, faces, 100)])
    rows = []
    for part in PARTS:
        names = list(colours(part))
        text = torch.stack([F.normalize(guide.template_features(f"face with {phrase(part, name)}").mean(0), dim=-1) for name in names])
        guess = (features @ text.t()).argmax(1).tolist()
        right: dict[str, list[bool]] = {"accuracy": [], "natural": [], "held_out": []}
        for face, g in zip(people, guess, strict=True):
            if face.has(part):
                name = getattr(face, part).name
                right["natural" if name in NATURAL[part] else "accuracy"].append(names[g] == name)
                if (part, name) in HELD_OUT:
                    right["held_out"].append(names[g] == name)
        rows.append({"part": part} | {k: v for key, hits in right.items()
                                      for k, v in ((key, float(np.mean(hits)) if hits else float("nan")), (f"n_{key}", len(hits)))})
    return rows
