"""Trains the embedded CLIPs, ``open_clip`` models of our own configurations, contrastive on both supports.

The pictures are renders, some of them smeared, and samples of the generator with moved codes, as an optimiser
makes them. All are degraded. A batch has N pictures and N captions; F facts, see ``captions``.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from cfclip.files import DATA, sha256
from cfclip.method.config import DTYPES
from cfclip.method.loop import resolve_dtype
from cfclip.models.clip import ClipGuide, autocast
from cfclip.models.stylegan2 import Generator
from cfclip.settings import LARGEST_BATCH, Settings, int_at_least, number, one_of, seed_number, setting
from cfclip.toonfaces.captions import FACTS, Fact, caption, colour_facts, fact_vector, matches, shape_facts
from cfclip.toonfaces.clip import MODELS, build
from cfclip.toonfaces.domain import load_network
from cfclip.toonfaces.factors import PARTS
from cfclip.toonfaces.readout import Readout
from cfclip.toonfaces.train.augment import PAINTS, Smear, Smears, degrade, random_warp
from cfclip.toonfaces.train.clip_losses import FactHead, MentionHead, contrastive_loss
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
    ema: float = setting(0.999, number(0, 1))  # decay per step of the averaged weights, which are the result
    seed: int = setting(0, seed_number)
    dtype: str = setting("auto", one_of(DTYPES))  # autocast of the image and text towers


GuideConfig = partial(CLIPConfig, model="toonfaces-convnext", seed=1)
"""How the second guide is trained: another architecture, other faces and other captions."""
JudgeConfig = partial(CLIPConfig, model="toonfaces-regnet", steps=2500, seed=2)
"""How the CLIP that only judges is trained: a third architecture, other faces and captions."""


# ---- captions, written before the training ----


@dataclass(frozen=True)
class Captions:
    """S captions on a device, each of one picture: ``of`` is its number, or its pair (shape, colours)."""

    tokens: Tensor  # int32 [S, T]
    claims: Tensor  # bool [S, F]
    of: Tensor  # int64 [S, …]


def write_captions(
    facts: Callable[[tuple[int, ...]], Collection[Fact]],
    of: np.ndarray,
    seed: tuple[int, ...],
    tokenizer: open_clip.tokenizer.SimpleTokenizer,
    device: torch.device,
) -> Captions:
    """Write one caption for each picture in ``of`` [S, …]. facts: picture -> what is true of it."""
    rng = np.random.default_rng(seed)
    encoded: dict[str, list[int]] = {}  # word -> tokens: no token spans two words
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

        def facts_about(keys: Iterable[str | None]) -> Tensor:
            return torch.tensor([[key == of for of, _ in FACTS] for key in keys], device=device)  # [P, F]

        flag_of = {"hair": "style", "beard": "beard?", "glasses": "glasses?"}
        self.of_part = facts_about(PARTS)
        self.with_flag = self.of_part | facts_about(map(flag_of.get, PARTS))
        self.paints = torch.tensor([FACTS.index(paint) for paint in PAINTS], device=device)
        self.every = torch.arange(len(FACTS), device=device)

        def table(facts: Sequence[Collection[Fact]]) -> Tensor:
            return torch.from_numpy(np.stack([fact_vector(one) for one in facts])).to(device)  # [M, F]

        self.shape_true, self.shape_known = map(table, zip(*shapes, strict=True))
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
        """(true, known), bool [N, F] each, of faces ``shapes`` [N] in the colours of faces ``paints`` [N]."""
        true = self.shape_true[shapes] | (self.colour_true[paints] & self.there[shapes])
        return true, self.shape_known[shapes] | self.of_part.any(0)

    def draw(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The pictures of captions ``rows`` [N], some of them smeared, and their (true, known)."""
        shapes, paints = self.captions.of[rows].unbind(1)
        true, known = self.facts(shapes, paints)
        covered = self.pool.covered(shapes)
        images = picture(covered, self.pool.palettes[paints])
        done = self.smear(images, part_masks(covered), self.smeared, generator)
        return done.images, *self.smeared_facts(true, known, done)

    def smeared_facts(self, true: Tensor, known: Tensor, done: Smears) -> tuple[Tensor, Tensor]:
        """(true, known) after a smear: colours of hidden parts are unknown, coated parts have a new colour.

        A part with a thin coat is known not to have the new colour: if a purple tint were left unknown, edits
        would stop at a tint.
        """
        unsure = ((done.hidden & ~done.painted).float() @ self.with_flag.float()) > 0
        coated = (done.painted.float() @ self.of_part.float()) > 0
        new = self.paints[done.paint][:, None] == self.every
        denied = new & ((done.tinted.float() @ self.of_part.float()) > 0)
        return (true & ~unsure & ~coated) | (new & coated), (known & ~unsure) | coated | denied


class Moved:
    """Moved samples of the generator, the facts that the readout is sure of, and captions of these facts."""

    def __init__(self, config: CLIPConfig, generator: Generator, readout: Readout, tokenizer, device):
        n = config.moved_pool
        self.images, true, known = moved_samples(generator, readout, n, 1_000_003 * config.seed + 5)
        self.true, self.known = (torch.from_numpy(x).to(device) for x in (true, known))
        of = np.repeat(np.arange(n), config.moved_captions)[:, None]
        facts = [{FACTS[k] for k in np.flatnonzero(row)} for row in true]
        self.captions = write_captions(lambda one: facts[one[0]], of, (config.seed, 6), tokenizer, device)

    def draw(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The pictures of captions ``rows`` [N], and their (true, known), as in :class:`Renders`."""
        of = self.captions.of[rows, 0]
        return self.images[of].float() / 127.5 - 1, self.true[of], self.known[of]


# ---- training ----


def run_of(model: str, folder: Path = DATA / "toonfaces") -> dict[str, str]:
    """What identifies a training of ``model``: its name, and the generator and the readout in ``folder``."""
    files = {name: folder / f"{name}.safetensors" for name in ("generator", "readout")}
    digests = {name: sha256(path) for name, path in files.items() if path.exists()}
    return {"network": model} | digests


class CLIPTraining:
    """The networks in training, their data and optimizer, and one step; all networks are on ``device``."""

    def __init__(self, config: CLIPConfig, device: torch.device, generator: Generator, readout: Readout):
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
        self.renders = Renders(config, generator.resolution, tokenizer, device)
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
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=fused)

    @property
    def state(self) -> dict:
        """The content of a checkpoint."""
        networks = {"model": self.model, "facts": self.facts, "mentions": self.mentions}
        return networks | {"average": self.average, "optimizer": self.optimizer}

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Images [N, 3, R, R], (true, known) [N, F], tokens [N, T] and claims [N, F]."""
        self.random.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        n_moved = round(self.config.batch * self.config.moved)

        def drawn(source: Renders | Moved, n: int) -> tuple[Tensor, ...]:
            tokens, claims = source.captions.tokens, source.captions.claims
            rows = torch.randint(len(tokens), (n,), generator=self.random, device=self.device)
            return *source.draw(rows, self.random), tokens[rows].long(), claims[rows]

        parts = drawn(self.renders, self.config.batch - n_moved), drawn(self.moved, n_moved)
        images, true, known, tokens, claims = (torch.cat(one) for one in zip(*parts, strict=True))
        hide = torch.rand(tokens.shape, generator=self.random, device=self.device) < self.config.unknown_words
        hide &= (tokens >= self.words[0]) & (tokens <= self.words[1])
        tokens = tokens.masked_fill(hide, self.unknown)
        images = random_warp(degrade(images, self.random), self.config.warped, self.random)
        return images, true, known, tokens, claims

    def step(self, i: int, generator: torch.Generator) -> dict[str, Tensor]:
        """One optimisation step; ``generator`` is on the CPU."""
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
            empty = ~claims.any(1)  # such captions are true of all pictures
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
    """Train, or resume the training in ``out``; returns the averaged model on ``device``, in eval mode.

    folder: where the generator and the readout are. Raises WeightsError without them.
    """
    device, names = torch.device(device), ("generator", "readout")
    networks = [load_network(folder / f"{name}.safetensors").to(device) for name in names]
    training = CLIPTraining(config, device, *networks)
    run = run_of(config.model, folder)
    run_training(run.pop("network"), training.step, config, training.state, out, **run)
    return training.average
