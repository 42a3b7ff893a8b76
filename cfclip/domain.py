"""A domain: frozen networks that belong together, and the words that go with them."""

import copy
import hashlib
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from cfclip import latents
from cfclip.checkpoints.latents import load_latents
from cfclip.checkpoints.networks import find_lpips
from cfclip.files import sha256
from cfclip.models.arcface import FaceIdentity
from cfclip.models.clip import ClipGuide
from cfclip.models.mapper import PUBLISHED_SPLIT, Mapper, WordMapper
from cfclip.models.perceptual import PerceptualDistance, feature_distance
from cfclip.models.stylegan2 import Generator, max_batch

Claim = tuple[str, str]
"""What a prompt asks for: (part, colour), e.g. ("lipstick", "green")."""
COUNTERFACTUAL, HELD_OUT_FROM_CLIP = "counterfactual", "counterfactual, held out from CLIP"
IN_THE_DOMAIN, NULL_EDIT, OTHER = "in the domain", "null edit", "other"
GROUPS = (COUNTERFACTUAL, HELD_OUT_FROM_CLIP, IN_THE_DOMAIN, NULL_EDIT, OTHER)
"""Kinds of edit. A null edit asks for the source text; "other" does not name the colour of a part."""


class Clause(NamedTuple):
    """A part of a prompt, and which of the two it asks for; neither where that is not known."""

    text: str
    colours: bool
    shapes: bool


class Measurement(Protocol):
    """What was measured in N pictures; P parts in the order of :attr:`GroundTruth.parts`."""

    masks: np.ndarray  # probabilities [N, P, R, R]
    area: np.ndarray  # pixels of a 64 x 64 picture [N, P]
    lab: np.ndarray  # CIELAB (D65) of each part [N, P, 3], NaN where the part is too small to measure

    def __getitem__(self, rows: slice) -> "Measurement":
        """What was measured in some of the pictures."""

    def colour(self, part: str) -> list[str | None]:
        """The name of the nearest colour of ``part`` in each picture; None where the part is not visible."""

    def has(self, part: str) -> np.ndarray:
        """bool [N]: whether there is such a ``part`` at all, one whose colour a prompt can name."""

    def distance(self, part: str, colour: str) -> np.ndarray:
        """CIELAB distance [N] of ``part`` from its named ``colour``; NaN where the part is not visible."""


class GroundTruth(Protocol):
    """What a world that can be rendered can answer. A domain of real photos has None in its place."""

    parts: tuple[str, ...]  # what a picture is segmented into; P of them
    regions: tuple[str, ...]  # those that an edit can be restricted to
    prompts: tuple[str, ...]  # a prompt for each colour of each part

    def claim(self, prompt: str) -> Claim | None:
        """What ``prompt`` asks for; None if it does not name the colour of exactly one part."""

    def group(self, claim: Claim) -> str:
        """Which of the first three of :data:`GROUPS` a claim belongs to."""

    def measure(self, images: Tensor) -> Measurement:
        """Segment and measure pictures [N, 3, R, R] in [-1, 1]."""

    def claims(self, prompt: str) -> tuple[str, ...]:
        """All that ``prompt`` says and that can be measured, each in its standard wording."""

    def clauses(self, prompt: str) -> tuple[Clause, ...]:
        """``prompt`` taken apart, at "and" for example, into clauses that together claim what it claims."""

    def done(self, prompt: str, before: Measurement, after: Measurement) -> dict[str, np.ndarray]:
        """Each of :meth:`claims` -> 1 or 0 for each of N pictures.

        A colour is NaN where the part was not there before, unless ``prompt`` asked for it and it is there
        now; a shape is NaN where it was there already.
        """

    def masks(self, images: Tensor) -> Tensor:
        """Part probabilities [N, P, R, R]."""

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps [N, C_l, h, w], fine to coarse, for perceptual distances and KID; differentiable."""

    def renders(self, n: int, claim: Claim | None = None) -> Tensor:
        """``n`` natural faces [n, 3, R, R], always the same; with ``claim`` the same, recoloured."""

    def counterfactuals(self, claim: Claim, n: int) -> tuple[Tensor, Tensor]:
        """``n`` held-out faces that show the part, and the same recoloured: [n, 3, R, R] each."""

    def photos(self, n: int, seed: int) -> Tensor:
        """``n`` held-out faces to invert [n, 3, R, R]."""

    def to(self, device: torch.device) -> "GroundTruth":
        """The same on ``device``; the original stays where it is."""


def asked(truth: GroundTruth, prompt: str, seen: Measurement) -> np.ndarray:
    """bool [N]: where ``prompt`` asks for something: there is the part, or not yet the shape.

    All of them if nothing that it says can be measured.
    """
    done = [*truth.done(prompt, seen, seen).values()]
    return ~np.isnan(done).all(0) if done else np.ones(len(seen.area), bool)


def null_edit(prompt: str, source_text: str) -> str:
    """A sentence that says so if ``prompt`` asks for what the pictures show already, else ""."""
    if prompt.lower().split() != source_text.lower().split():
        return ""
    return f"nothing can move: the prompt {prompt!r} is the source text; ask for something else"


@lru_cache(maxsize=8)
def _digest(path: Path, changed: int) -> str:
    """12 digits for a file that may have gigabytes and is asked for at every training."""
    return sha256(path)[:12]


def fingerprint(network: nn.Module) -> str:
    """12 digits for the values of all tensors of ``network``, on whatever device.

    Kept until a tensor changes: torch counts its changes.
    """
    tensors = network.state_dict()
    now = [(tensor.data_ptr(), tensor._version) for tensor in tensors.values()]
    before, known = _FINGERPRINTS.get(network, (None, ""))
    if before == now:
        return known
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    _FINGERPRINTS[network] = now, digest.hexdigest()[:12]
    return _FINGERPRINTS[network][1]


_FINGERPRINTS: MutableMapping[nn.Module, tuple[list[tuple[int, int]], str]] = WeakKeyDictionary()


def warn_null_edit(domain: "Domain", config: Any) -> None:
    """A warning if all prompts of ``config`` are the source text. Every method calls this as it starts."""
    source_text = getattr(config, "source_text", None) or domain.source_text
    prompts = getattr(config, "prompts", None) or (config.prompt,)
    if all(words := [null_edit(prompt, source_text) for prompt in prompts]):
        warnings.warn(words[0], stacklevel=3)


@dataclass(frozen=True, eq=False)  # so that it can be a key, equal only to itself
class Domain:
    """Frozen networks and the words that go with them."""

    name: str
    generator: Generator
    clip: ClipGuide  # the first guide; its text features condition mappers
    identity: FaceIdentity | None  # None where nobody has trained one (dogs, cats)
    source_text: str  # what every picture of the domain shows
    prompts: tuple[str, ...]  # examples, counterfactual ones first
    truth: GroundTruth | None = None  # the judge, where the world can be rendered
    truncation: float = 1.0  # psi of the latents that are edited
    level_split: tuple[int, int] = PUBLISHED_SPLIT  # which layers are coarse, medium and fine
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    perceptual: nn.Module | None = None  # pictures -> what lambda_perc holds: VGG19's features, or the pixels
    encoder: nn.Module | None = None  # photos -> W+, see cfclip.inversion.encode
    more_guides: tuple[ClipGuide, ...] = ()  # of other makes, for trainings by several guides
    heldout_clip: ClipGuide | None = None  # judges edits; no training uses it
    mapper: Mapper | None = None  # edits by any prompt at once
    confidence: Mapping[str, Any] | None = None  # of the mapper, see cfclip.evaluation.confidence
    latent_files: Mapping[str, Path] = field(default_factory=dict)  # split -> codes of photos; else sampled
    label: int | None = None  # the class that is sampled, of a class-conditional generator

    def __post_init__(self) -> None:
        if self.label is None:
            object.__setattr__(self, "label", getattr(self.generator, "label", None))
        else:
            object.__setattr__(self, "generator", self.generator.for_class(self.label))

    @property
    def described(self) -> dict[str, Any]:
        """What tells runs in this domain apart from those in others."""
        label = {} if self.label is None else {"label": self.label}
        return {"domain": self.name} | label | self.fingerprints

    @property
    def guides(self) -> tuple[ClipGuide, ...]:
        """All CLIPs that an edit can be trained by."""
        return (self.clip, *self.more_guides)

    def first_guides(self, count: int) -> tuple[ClipGuide, ...]:
        """The guides of a training whose setting ``guides`` is ``count``. ValueError if there are fewer."""
        if count > len(self.guides):
            raise ValueError(f"guides is {count}, but domain {self.name} has {len(self.guides)}: lower it")
        return self.guides[:count]

    def latents(self, n: int, split: str = "train", seed: int = 0) -> Tensor:
        """``n`` codes w_plus [n, L, D] to edit, or as many as there are; the same for the same seed.

        Raises WeightsError if the file is damaged or belongs to another generator, and ValueError if a
        class-conditional generator has no class: see ``label``.
        """
        if split not in self.latent_files:
            return latents.sample(self.generator, n, split, seed, self.truncation)
        w = load_latents(self.latent_files[split], self.generator)
        order = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))
        return w[order[:n]].to(self.device)

    def edited(
        self, w: Tensor, prompt: str, mapper: nn.Module | None = None, strength: float | Tensor = 1.0
    ) -> Tensor:
        """The codes ``w`` [N, L, D] edited by ``mapper``, else by the domain's own.

        Of a mapper that reads words the moves of all clauses of ``prompt`` add up. A clause moves the layers
        that its like moved in the training: colours the fine ones, shapes the coarse and medium ones.

        strength: one number, or one a layer [L, 1].
        """
        mapper = self.mapper if mapper is None else mapper
        if not isinstance(mapper, WordMapper) or self.truth is None:
            return mapper.edit(w, mapper.read(self.clip, prompt), strength)
        self.clip.tokenize(prompt)  # one that cannot be read is refused as a whole
        fine, moves = mapper.config.split[1], torch.zeros_like(w)
        for clause in self.truth.clauses(prompt):
            moved = mapper.edit(w, mapper.read(self.clip, clause.text), strength) - w
            if clause.colours:
                moved[:, :fine] = 0
            elif clause.shapes:
                moved[:, fine:] = 0
            moves += moved
        return w + moves

    @torch.no_grad()
    def pictures(self, w: Tensor) -> Tensor:
        """Pictures [N, 3, R, R] of any number of codes [N, L, D], as many at a time as fit in memory."""
        return torch.cat([self.generator.synthesis(part) for part in w.split(max_batch(self.generator))])

    @torch.no_grad()
    def edit(
        self, w: Tensor, prompt: str, mapper: nn.Module | None = None, strength: float | Tensor = 1.0
    ) -> Tensor:
        """Pictures [N, 3, R, R] of the codes that :meth:`edited` gives."""
        return self.pictures(self.edited(w, prompt, mapper, strength))

    @property
    def fingerprints(self) -> dict[str, str]:
        """name -> 12 digits of each thing whose change makes a training another one."""
        networks = {name: getattr(self, name) for name in ("generator", "clip", "identity", "perceptual")}
        networks |= {f"guide{i}": guide for i, guide in enumerate(self.more_guides, 2)}
        found = {name: fingerprint(network) for name, network in networks.items() if network is not None}
        if codes := self.latent_files.get("train"):
            found["latents"] = _digest(codes, codes.stat().st_mtime_ns)
        return found

    def group_of(self, prompt: str) -> str:
        """One of :data:`GROUPS`: what kind of edit ``prompt`` asks for."""
        if prompt == self.source_text:
            return NULL_EDIT
        claim = self.truth and self.truth.claim(prompt)
        return OTHER if claim is None else self.truth.group(claim)

    def distance(self) -> PerceptualDistance | None:
        """LPIPS (AlexNet) if its weights are here, else the same formula on the ground truth's features.

        None if there is neither.
        """
        if (network := find_lpips(self.device)) is not None:
            return PerceptualDistance("lpips_alex", lambda a, b: network(a, b).flatten())
        if self.truth is None:
            return None
        features = self.truth.features
        return PerceptualDistance("lpips_readout", lambda a, b: feature_distance(features(a), features(b)))

    def to(self, device: str | torch.device) -> "Domain":
        """The same domain on ``device``. Networks that have to move are copied; this domain stays."""
        device = torch.device(device)
        if device == self.device:
            return self
        moved = {"device": device}
        for name in (f.name for f in fields(self)):
            if isinstance(network := getattr(self, name), nn.Module):
                moved[name] = copy.deepcopy(network).to(device)
        moved["more_guides"] = tuple(copy.deepcopy(guide).to(device) for guide in self.more_guides)
        if self.truth is not None:
            moved["truth"] = self.truth.to(device)
        return replace(self, **moved)
