"""Trains the embedded CLIPs, ``open_clip`` models of our own configurations, contrastive on both supports.

On renders, on smeared and spoilt renders, and on samples of the generator with moved codes: what an optimiser
makes. N pictures and as many captions in a batch; F facts, see ``captions``.
"""

import copy
import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from cfclip.files import DATA, sha256
from cfclip.images import to_tensor
from cfclip.method.config import DTYPES
from cfclip.method.loop import resolve_dtype
from cfclip.models.clip import ClipGuide, autocast
from cfclip.models.stylegan2 import Generator
from cfclip.settings import LARGEST_BATCH, Settings, int_at_least, number, one_of, seed_number, setting
from cfclip.toonfaces.captions import (
    COLOUR_NAMES,
    FACTS,
    GROUPS,
    Fact,
    caption,
    colour_facts,
    fact_vector,
    facts_of,
    matches,
    phrase,
    shape_facts,
)
from cfclip.toonfaces.clip import MODELS, build
from cfclip.toonfaces.domain import load_network
from cfclip.toonfaces.factors import HAIR_STYLES, HELD_OUT, NATURAL, PARTS, Face, colours, sample_face, to_lab
from cfclip.toonfaces.readout import Readout
from cfclip.toonfaces.render import render_image
from cfclip.toonfaces.train.augment import PAINTS, Smear, Smears, degrade, random_warp
from cfclip.toonfaces.train.moved import moved_samples
from cfclip.toonfaces.train.pool import Pool, part_masks, picture
from cfclip.toonfaces.train.run import run_training, seeded


@dataclass(frozen=True)
class CLIPConfig(Settings):
    """How the CLIP is trained."""

    model: str = setting("toonfaces-rn", one_of(MODELS))
    batch: int = setting(512, int_at_least(2, maximum=LARGEST_BATCH))
    steps: int = setting(2600, int_at_least(1))
    pool: int = setting(10_000, int_at_least(1))  # shapes, rendered once and painted in any colours
    captions: int = setting(120_000, int_at_least(1))  # of painted shapes, written once; used in random order
    moved: float = setting(0.3, number(0, 1))  # share of moved samples of the generator in a batch
    moved_pool: int = setting(24_000, int_at_least(1))  # moved samples, drawn once
    moved_captions: int = setting(2, int_at_least(1))  # of each moved sample
    lr: float = setting(2e-3, number(above=True))
    warmup: int = setting(200, int_at_least(1))  # steps
    weight_decay: float = setting(0.02, number())
    smeared: float = setting(0.6, number(0, 1))  # share of renders that are smeared, see ``Smear``
    warped: float = setting(0.5, number(0, 1))  # share of images under a perspective, as CF-CLIP's views are
    unknown_words: float = setting(0.02, number(0, 1))  # share of words that are hidden
    fact_weight: float = setting(1.0, number())  # of the auxiliary loss, see FactHead
    mention_weight: float = setting(1.0, number())  # of the auxiliary loss, see MentionHead
    ema: float = setting(0.999, number(0, 1))  # decay of the averaged weights per step, which are the result
    seed: int = setting(0, seed_number)
    dtype: str = setting("auto", one_of(DTYPES))  # autocast of the image and text towers


@dataclass(frozen=True)
class GuideConfig(CLIPConfig):
    """How the second guide is trained: another architecture, other faces and other captions."""

    model: str = setting("toonfaces-convnext", one_of(MODELS))
    steps: int = setting(2600, int_at_least(1))
    seed: int = setting(1, seed_number)


@dataclass(frozen=True)
class JudgeConfig(CLIPConfig):
    """How the CLIP that only judges is trained: with a third architecture, other faces and captions."""

    model: str = setting("toonfaces-regnet", one_of(MODELS))
    steps: int = setting(2500, int_at_least(1))
    seed: int = setting(2, seed_number)


# ---- losses ----


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, true: Tensor, false: Tensor) -> Tensor:
    """CLIP's symmetric InfoNCE in which every true pair of the batch is a positive (UniCL, Yang et al. 2022).

    A pair that is neither ``true`` nor ``false`` is left out; so is a picture or a text with no true pair.

    image, text: unit [N, D]; true, false: bool [N, N], is text m true of image n, is it surely not?
    """
    logits = (scale * image @ text.t()).masked_fill(~(true | false), -1e4)
    target = true.float()

    def one_way(dim: int) -> Tensor:
        count = target.sum(dim)
        each = -(F.log_softmax(logits, dim) * target).sum(dim) / count.clamp_min(1)
        return each.sum() / (count > 0).sum().clamp_min(1)

    return (one_way(1) + one_way(0)) / 2


def colour_codes(width: float = 25.0) -> Tensor:
    """What the colour facts of FACTS have in common [C, K]: how near each is to the K colours with a name.

    width: of a Gaussian, in CIELAB. Similar colours have similar codes, whatever part they are of.
    """
    rgb = [colours(key)[value] for key, value in FACTS if key in PARTS]
    lab = torch.from_numpy(to_lab(np.array(rgb, np.float64))).float()
    names = [value for key, value in FACTS if key in PARTS]
    centres = torch.stack([lab[names.index(name)] for name in COLOUR_NAMES])
    codes = torch.exp(-0.5 * (torch.cdist(lab, centres) / width).square())
    return codes / codes.norm(dim=1, keepdim=True)


class FactHead(nn.Module):
    """Predicts facts from unit embeddings of images and texts with one linear layer; used in training only.

    A caption names one or two of the eight colours of a face, so the contrastive loss alone learns lips and
    irises very late. Of a group of facts, such as the colours of the lips, at most one is true: the loss is
    the cross-entropy of those groups of which one is known to be true, or is claimed. Colours are read by
    what they have in common, see :func:`colour_codes`: one set of weights a part, for all of its colours.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.linear = nn.Linear(embed_dim, len(FACTS))
        codes = colour_codes()  # [C, K] of all colours of all parts
        self.of_colours = nn.Linear(embed_dim, len(PARTS) * codes.shape[1], bias=False)
        self.register_buffer("codes", codes, persistent=False)
        owners = torch.tensor([PARTS.index(key) if key in PARTS else -1 for key, _ in FACTS])
        self.register_buffer("coloured", (owners >= 0).nonzero()[:, 0], persistent=False)
        self.register_buffer("owners", owners[owners >= 0], persistent=False)
        # without the held-out pairs: the head would learn that a class that never occurs is impossible
        groups = [
            [FACTS.index((key, value)) for value in values if (key, value) not in HELD_OUT]
            for key, values in GROUPS.items()
        ]
        most = max(map(len, groups))
        padded = [group + [len(FACTS)] * (most - len(group)) for group in groups]
        self.register_buffer("groups", torch.tensor(padded), persistent=False)  # [13, K]

    def logits(self, embedding: Tensor) -> Tensor:
        """Of each fact [N, F]."""
        found = self.of_colours(embedding * 10).unflatten(1, (len(PARTS), -1))  # [N, 8, K]
        named = torch.einsum("nck,ck->nc", found[:, self.owners], self.codes)
        return self.linear(embedding * 10).index_copy(1, self.coloured, named)

    def forward(self, embedding: Tensor, facts: Tensor) -> Tensor:
        """Mean loss over groups. embedding [N, D]; facts: bool [N, F], true and known, or claimed."""
        logits = F.pad(self.logits(embedding), (0, 1), value=-1e4)[:, self.groups]  # [N, 13, K]
        target = F.pad(facts, (0, 1))[:, self.groups].float()
        each = -(logits.log_softmax(2) * target).sum(2)
        count = target.sum((0, 2))
        return (each.sum(0) / count.clamp_min(1)).sum() / (count > 0).sum().clamp_min(1)


class MentionHead(nn.Module):
    """Which parts and which colours a text mentions, each read on its own by one linear layer.

    What is read so for the pairs of training is read for other pairs as well: it makes text features compose.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.linear = nn.Linear(embed_dim, len(PARTS) + len(COLOUR_NAMES))
        of = {"style": "hair", "beard?": "beard", "glasses?": "glasses"}
        parts = [[of.get(key, key) == part for part in PARTS] for key, _ in FACTS]
        named = [[key in PARTS and value == name for name in COLOUR_NAMES] for key, value in FACTS]
        mentioned = torch.cat([torch.tensor(parts), torch.tensor(named)], 1).float()
        self.register_buffer("mentioned", mentioned, persistent=False)  # [F, 8 + colours]

    def forward(self, text: Tensor, claims: Tensor) -> Tensor:
        """Mean over texts of the sum over words, by 8. text: unit [N, D]; claims: bool [N, F]."""
        target = (claims.float() @ self.mentioned).clamp(max=1)
        logits = self.linear(text * 10)
        each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return each.sum(1).mean() / len(PARTS)


# ---- captions, written before the training ----


@dataclass(frozen=True)
class Captions:
    """S captions on a device, each of one picture: number ``of`` or (shape, colours)."""

    tokens: Tensor  # int32 [S, T]
    claims: Tensor  # bool [S, F]
    of: Tensor  # int64 [S, …]

    def __len__(self) -> int:
        return len(self.tokens)


def write_captions(
    facts: Callable[[tuple[int, ...]], Collection[Fact]],
    of: np.ndarray,
    seed: tuple[int, ...],
    tokenizer: open_clip.tokenizer.SimpleTokenizer,
    device: torch.device,
) -> Captions:
    """One caption of each picture in ``of`` [S, …], of which ``facts`` are true."""
    rng = np.random.default_rng(seed)
    encoded: dict[str, list[int]] = {}  # no token spans two words
    size, start, end = tokenizer.context_length, tokenizer.sot_token_id, tokenizer.eot_token_id
    tokens = np.zeros((len(of), size), np.int32)
    claims = np.zeros((len(of), len(FACTS)), bool)
    column = {fact: k for k, fact in enumerate(FACTS)}
    for row, one in enumerate(tqdm(of.tolist(), "captions", leave=False)):
        true = facts(tuple(one))
        while True:
            text, claimed = caption(true, rng)
            ids = [start]
            for word in text.split():
                if word not in encoded:
                    encoded[word] = tokenizer.encode(word)
                ids += encoded[word]
            if len(ids) < size:
                break
        ids.append(end)
        tokens[row, : len(ids)] = ids
        claims[row, [column[fact] for fact in claimed]] = True
    return Captions(*(torch.from_numpy(x).to(device) for x in (tokens, claims, of)))


class Renders:
    """Painted shapes of a pool and their facts, on a device; and captions of some of them."""

    def __init__(self, config: CLIPConfig, resolution: int, tokenizer, device: torch.device):
        self.device, self.smeared, self.smear = device, config.smeared, Smear(device)
        self.pool = Pool((config.seed, 1), config.pool, 1, "known", resolution, device)
        faces = self.pool.faces
        shapes = [shape_facts(face) for face in faces]
        said = [colour_facts(face) for face in faces]
        self.of_part = torch.tensor([[key == part for key, _ in FACTS] for part in PARTS], device=device)
        flag_of = {"hair": "style", "beard": "beard?", "glasses": "glasses?"}
        self.with_flag = self.of_part | torch.tensor(
            [[key == flag_of.get(part) for key, _ in FACTS] for part in PARTS], device=device
        )
        self.paints = torch.tensor([FACTS.index(paint) for paint in PAINTS], device=device)
        self.every = torch.arange(len(FACTS), device=device)

        def table(facts: Sequence[Collection[Fact]]) -> Tensor:
            return torch.from_numpy(np.stack([fact_vector(one) for one in facts])).to(device)  # [M, F]

        self.shape_true, self.shape_known = (
            table([one[0] for one in shapes]),
            table([one[1] for one in shapes]),
        )
        self.colour_true = table(said)
        has = torch.tensor([[face.has(part) for part in PARTS] for face in faces], device=device)
        self.there = (has[:, :, None] & self.of_part).any(1)  # [M, F]: colour facts of parts that are there

        def facts(pair: tuple[int, ...]) -> set[Fact]:
            shape, colour = pair
            return shapes[shape][0] | {fact for fact in said[colour] if faces[shape].has(fact[0])}

        rng = np.random.default_rng((config.seed, 3))
        of = rng.integers(len(faces), size=(config.captions, 2))
        self.captions = write_captions(facts, of, (config.seed, 4), tokenizer, device)

    def facts(self, shapes: Tensor, paints: Tensor) -> tuple[Tensor, Tensor]:
        """(true, known) of shapes [N] in the colours of faces [N]. bool [N, F] each."""
        true = self.shape_true[shapes] | (self.colour_true[paints] & self.there[shapes])
        return true, self.shape_known[shapes] | self.of_part.any(0)

    def draw(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures of captions number ``rows`` [N], some of them smeared, and their (true, known)."""
        shapes, paints = self.captions.of[rows].unbind(1)
        true, known = self.facts(shapes, paints)
        covered = self.pool.covered(shapes)
        images = picture(covered, self.pool.palettes[paints])
        done = self.smear(images, part_masks(covered), self.smeared, generator)
        return done.images, *self.smeared_facts(true, known, done)

    def smeared_facts(self, true: Tensor, known: Tensor, done: Smears) -> tuple[Tensor, Tensor]:
        """The facts that are left where parts have no known colour, or a new coat.

        Of a thin coat only that it is not the new colour: if a tint of purple went unjudged, edits would stop
        at a tint.
        """
        unsure = ((done.hidden & ~done.painted).float() @ self.with_flag.float()) > 0
        coated = (done.painted.float() @ self.of_part.float()) > 0
        new = self.paints[done.paint][:, None] == self.every
        denied = new & ((done.tinted.float() @ self.of_part.float()) > 0)
        return (true & ~unsure & ~coated) | (new & coated), (known & ~unsure) | coated | denied


class Moved:
    """Moved samples of the generator, what the readout is sure of in them, and captions of that."""

    def __init__(self, config: CLIPConfig, generator: Generator, readout: Readout, tokenizer, device):
        n = config.moved_pool
        self.images, true, known = moved_samples(generator, readout, n, 1_000_003 * config.seed + 5)
        self.true, self.known = (torch.from_numpy(x).to(device) for x in (true, known))
        of = np.repeat(np.arange(n), config.moved_captions)[:, None]
        facts = [{FACTS[k] for k in np.flatnonzero(row)} for row in true]
        self.captions = write_captions(lambda one: facts[one[0]], of, (config.seed, 6), tokenizer, device)

    def draw(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures of captions number ``rows`` [N], and their (true, known)."""
        of = self.captions.of[rows, 0]
        return self.images[of].float() / 127.5 - 1, self.true[of], self.known[of]


# ---- training ----


def run_of(model: str, folder: Path = DATA / "toonfaces") -> dict[str, str]:
    """What tells the training of ``model`` from others: also the generator and the readout of ``folder``."""
    files = {name: folder / f"{name}.safetensors" for name in ("generator", "readout")}
    digests = {name: sha256(path) for name, path in files.items() if path.exists()}
    return {"network": model} | digests


class CLIPTraining:
    """The networks in training, their data and optimizer on ``device``, and one step.

    generator, readout: on ``device``; None trains on renders alone.
    """

    def __init__(
        self,
        config: CLIPConfig,
        device: torch.device,
        generator: Generator | None = None,
        readout: Readout | None = None,
    ):
        self.config, self.device = config, device
        self.dtype = getattr(torch, resolve_dtype(config.dtype, device))
        with seeded(config.seed):
            model = build(config.model)
            self.normalise = ClipGuide(build(config.model)).to(device).preprocess
            width = model.text_projection.shape[1]
            heads = [head(width) for head in (FactHead, MentionHead)]
        self.model = model.train().to(device, memory_format=torch.channels_last)
        self.facts, self.mentions = (head.to(device) for head in heads)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=model.context_length)
        resolution = 64 if generator is None else generator.resolution
        self.renders = Renders(config, resolution, tokenizer, device)
        self.moved = None
        if generator is not None and readout is not None and config.moved:
            self.moved = Moved(config, generator, readout, tokenizer, device)
        known = self.model.token_embedding.tokens
        self.words = int(known[1]), int(known[-3])  # the first and the last id of a word
        self.unknown = next(i for i in range(1, 49_408) if i not in set(known.tolist()))
        self.random = torch.Generator(device)

        plain, decayed = [], []
        for name, parameter in self.model.named_parameters():
            (plain if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
        self.trained = [*plain, *decayed]
        plain = [*plain, *self.facts.parameters(), *self.mentions.parameters()]
        groups = [
            {"params": plain, "weight_decay": 0.0},
            {"params": decayed, "weight_decay": config.weight_decay},
        ]
        fused = {"fused": True} if device.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), **fused)

    @property
    def state(self) -> dict:
        """The content of a checkpoint."""
        networks = {"model": self.model, "facts": self.facts, "mentions": self.mentions}
        return networks | {"average": self.average, "optimizer": self.optimizer}

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Images [N, 3, R, R], (true, known) [N, F], tokens [N, T] and claims [N, F]."""
        self.random.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        n_moved = round(self.config.batch * self.config.moved) if self.moved else 0

        def rows(n: int, captions: Captions) -> Tensor:
            return torch.randint(len(captions), (n,), generator=self.random, device=self.device)

        chosen = rows(self.config.batch - n_moved, self.renders.captions)
        drawn = [(*self.renders.draw(chosen, self.random), *self._text(self.renders.captions, chosen))]
        if self.moved:
            chosen = rows(n_moved, self.moved.captions)
            drawn.append((*self.moved.draw(chosen), *self._text(self.moved.captions, chosen)))
        images, true, known, tokens, claims = (torch.cat(one) for one in zip(*drawn, strict=True))
        hide = torch.rand(tokens.shape, generator=self.random, device=self.device) < self.config.unknown_words
        hide &= (tokens >= self.words[0]) & (tokens <= self.words[1])
        tokens = tokens.masked_fill(hide, self.unknown)
        images = random_warp(degrade(images, self.random), self.config.warped, self.random)
        return images, true, known, tokens, claims

    @staticmethod
    def _text(captions: Captions, rows: Tensor) -> tuple[Tensor, Tensor]:
        return captions.tokens[rows].long(), captions.claims[rows]

    def step(self, i: int, generator: torch.Generator) -> dict[str, Tensor]:
        """One optimisation step; ``generator`` is the CPU's."""
        c = self.config
        ramp = min(1.0, (i + 1) / c.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * ramp * (0.51 + 0.49 * math.cos(math.pi * i / c.steps))
        images, true, known, tokens, claims = self.batch(generator)
        images = self.normalise(images).contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self.dtype):
            image = self.model.encode_image(images).float()
            text = self.model.encode_text(tokens).float()
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        holds, fails = matches(true, known, claims)
        contrast = contrastive_loss(image, text, self.model.logit_scale.exp(), holds, fails)
        facts, mentions = self.facts(image, true) + self.facts(text, claims), self.mentions(text, claims)
        loss = contrast + c.fact_weight * facts + c.mention_weight * mentions
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
            self._average(min(c.ema, (1 + i) / (10 + i)))
            empty = ~claims.any(1)  # true of all
            best = (image @ text.t()).masked_fill(empty, -2.0).argmax(1, keepdim=True)
            hit = holds.gather(1, best).float().mean()
            scale = self.model.logit_scale.exp()
        logged = {"loss": contrast, "facts": facts, "mentions": mentions, "top1": hit, "scale": scale}
        return {name: value.detach() for name, value in logged.items()}

    def _average(self, decay: float) -> None:
        ours, theirs = self.average.state_dict(), self.model.state_dict()
        floats = [name for name, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_([ours[n] for n in floats], [theirs[n] for n in floats], 1 - decay)


def train(
    config: CLIPConfig, out: Path, device: str | torch.device = "cpu", folder: Path = DATA / "toonfaces"
) -> nn.Module:
    """Train on ``device``, or resume the training in ``out``; returns the averaged model in eval mode, there.

    folder: of the generator and the readout. Without a generator it trains on renders alone, and warns.
    """
    device, networks, path = torch.device(device), {}, folder / "generator.safetensors"
    if config.moved and path.exists():
        files = {name: folder / f"{name}.safetensors" for name in ("generator", "readout")}
        networks = {name: load_network(file).to(device) for name, file in files.items()}
    elif config.moved:
        warnings.warn(f"{path} does not exist: this CLIP sees renders only, no moved samples", stacklevel=2)
    training = CLIPTraining(config, device, **networks)
    run = run_of(config.model, folder)
    run_training(run.pop("network"), training.step, config, training.state, out, **run)
    return training.average


# ---- measurements ----


def _named(guide: ClipGuide, features: Tensor, texts: Sequence[str]) -> np.ndarray:
    """Which of ``texts``, under the 79 templates, is nearest to each of the unit image features? [N]"""
    means = [F.normalize(guide.template_features(text).mean(0), dim=-1) for text in texts]
    return (features @ torch.stack(means).t()).argmax(1).cpu().numpy()


@torch.no_grad()
def _features(guide: ClipGuide, images: Tensor) -> Tensor:
    """Unit image features of pictures [N, 3, R, R], in [-1, 1] or uint8."""
    batches = []
    for batch in images.split(100):
        batch = batch.to(guide.mean.device)
        batch = batch.float() / 127.5 - 1 if batch.dtype == torch.uint8 else batch
        batches.append(F.normalize(guide.encode_image(batch), dim=-1))
    return torch.cat(batches)


def _faces(guide: ClipGuide, faces: Sequence[Face]) -> Tensor:
    return _features(guide, torch.cat([to_tensor([render_image(face)]) for face in faces]))


def _shares(hits: dict[str, np.ndarray]) -> dict:
    """name -> share that is right, and n_name -> of how many; NaN of none."""
    row = {}
    for name, right in hits.items():
        row |= {name: float(np.mean(right)) if len(right) else float("nan"), f"n_{name}": len(right)}
    return row


def _colour_rows(
    guide: ClipGuide, of_part: Callable[[str], list[tuple[Tensor, np.ndarray, tuple[str, ...]]]]
) -> list[dict]:
    """One row per part. of_part: -> (unit features, the true names, the columns that they count in)."""
    rows = []
    for part in PARTS:
        names = np.array(list(colours(part)))
        hits: dict[str, list] = {"accuracy": [], "natural": [], "held_out": []}
        for features, true, columns in of_part(part):
            if not len(true):
                continue
            guess = names[_named(guide, features, [f"face with {phrase(part, name)}" for name in names])]
            secret = np.array([(part, name) in HELD_OUT for name in true])
            natural = np.isin(true, list(NATURAL[part]))
            groups = {"accuracy": ~natural & ~secret, "natural": natural, "held_out": secret}
            for column in columns:
                hits[column] += (guess == true)[groups[column]].tolist()
        rows.append({"part": part} | _shares(hits))
    return rows


@torch.no_grad()
def colour_accuracy(guide: ClipGuide, faces: int = 1000, seed: int = 10_000) -> list[dict]:
    """Zero-shot colour naming on held-out renders, one row per part.

    The colour is chosen among *all* colours of the part, by "face with <colour> <part>" under the 79
    templates. ``accuracy``: over faces whose part has a counterfactual colour that training showed;
    ``natural``: a natural one; ``held_out``: a (part, colour) pair that training never showed, over a tenth
    as many faces that were given it. ``n_…``: how many faces each is over.
    """
    people = [sample_face((seed, k), "both") for k in range(faces)]
    features = _faces(guide, people)

    def of_part(part: str):
        have = [k for k, face in enumerate(people) if face.has(part)]
        names = np.array([getattr(people[k], part).name for k in have], str)
        found = [(features[have], names, ("accuracy", "natural"))]
        for secret in (name for one, name in HELD_OUT if one == part):
            shown = [people[k].with_colour(part, secret) for k in have[: max(1, faces // 10)]]
            if shown:
                found.append((_faces(guide, shown), np.array([secret] * len(shown)), ("held_out",)))
        return found

    return _colour_rows(guide, of_part)


@torch.no_grad()
def moved_accuracy(
    guide: ClipGuide, generator: Generator, readout: Readout, n: int = 2000, seed: int = 11_000
) -> list[dict]:
    """As :func:`colour_accuracy`, on moved samples of the generator whose colour the readout is sure of."""
    images, true, _ = moved_samples(generator, readout, n, seed, held_out=True)
    features = _features(guide, images)

    def of_part(part: str):
        names = np.array(list(colours(part)))
        sure = true[:, [FACTS.index((part, name)) for name in names]]
        rows = np.flatnonzero(sure.any(1))
        chosen = features[torch.from_numpy(rows).to(features.device)]
        return [(chosen, names[sure[rows].argmax(1)], ("accuracy", "natural", "held_out"))]

    return _colour_rows(guide, of_part)


CONTRASTS: dict[str, dict[Fact, str]] = {
    "hair style": {
        ("style", "short"): "face with short hair",
        ("style", "long"): "face with long hair",
        ("style", "bob"): "face with a bob",
        ("style", "curly"): "face with curly hair",
        ("style", "bald"): "bald face",
    },
    "smile": {("smile", "yes"): "smiling face", ("smile", "no"): "face not smiling"},
    "glasses": {("glasses?", "yes"): "face with glasses", ("glasses?", "no"): "face without glasses"},
    "beard": {("beard?", "yes"): "face with a beard", ("beard?", "no"): "face without a beard"},
}
"""What is asked -> fact -> the prompt for it."""


@torch.no_grad()
def shape_accuracy(guide: ClipGuide, faces: int = 1000, seed: int = 12_000) -> list[dict]:
    """Are styles, smiles, glasses and beards named rightly by contrasting prompts? On held-out renders.

    Each is the mean of the shares among the faces with one answer. ``bald``: is "bald face" chosen of the
    prompts of all styles exactly where it should be?
    """
    people = [sample_face((seed, k), "both") for k in range(faces)]
    features, facts = _faces(guide, people), [facts_of(face) for face in people]
    rows = []

    def add(what: str, right: np.ndarray, answer: np.ndarray) -> None:
        """Every answer counts as much, however many faces have it."""
        shares = [right[answer == one].mean() for one in np.unique(answer)]
        rows.append({"shape": what, "accuracy": float(np.mean(shares)), "n": len(right)})

    for what, prompts in CONTRASTS.items():
        guess, asked = _named(guide, features, list(prompts.values())), list(prompts)
        known = [k for k, true in enumerate(facts) if true & set(asked)]
        answer = np.array([next(i for i, fact in enumerate(asked) if fact in facts[k]) for k in known])
        add(what, guess[known] == answer, answer)
        if what == "hair style":
            bald = HAIR_STYLES.index("bald")
            add("bald", (guess[known] == bald) == (answer == bald), answer == bald)
    return rows
