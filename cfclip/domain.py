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
    """A part of a prompt, and whether it asks for colours or shapes. Both are False if that is not known."""

    text: str
    colours: bool
    shapes: bool


class Measurement(Protocol):
    """What was measured in N pictures; P parts in the order of :attr:`GroundTruth.parts`."""

    masks: np.ndarray  # probabilities [N, P, R, R]
    area: np.ndarray  # pixels of a 64 x 64 picture [N, P]
    lab: np.ndarray  # CIELAB (D65) of each part [N, P, 3], NaN where the part is too small to measure

    def __getitem__(self, rows: slice) -> "Measurement":
        """The measurements of the pictures ``rows``."""

    def colour(self, part: str) -> list[str | None]:
        """The name of the nearest colour of ``part`` in each picture; None where the part is not visible."""

    def has(self, part: str) -> np.ndarray:
        """bool [N]: whether the picture has ``part``, which must be one whose colour a prompt can name."""

    def distance(self, part: str, colour: str) -> np.ndarray:
        """CIELAB distance [N] of ``part`` from its named ``colour``; NaN where the part is not visible."""


class GroundTruth(Protocol):
    """What is known of a world because it can be rendered. A domain of real photos has None instead."""

    parts: tuple[str, ...]  # the P parts into which a picture is segmented
    regions: tuple[str, ...]  # the parts to which an edit can be restricted
    prompts: tuple[str, ...]  # a prompt for each colour of each part

    def claim(self, prompt: str) -> Claim | None:
        """What ``prompt`` asks for; None if it does not name the colour of exactly one part."""

    def group(self, claim: Claim) -> str:
        """Which of the first three of :data:`GROUPS` a claim belongs to."""

    def measure(self, images: Tensor) -> Measurement:
        """Segment and measure pictures [N, 3, R, R] in [-1, 1]."""

    def claims(self, prompt: str) -> tuple[str, ...]:
        """All measurable claims of ``prompt``, each in its standard wording."""

    def clauses(self, prompt: str) -> tuple[Clause, ...]:
        """``prompt`` split into clauses, e.g. at "and". Together they claim the same as ``prompt``."""

    def done(self, prompt: str, before: Measurement, after: Measurement) -> dict[str, np.ndarray]:
        """Each of :meth:`claims` -> [N], whether each picture fulfils the claim: 1, 0 or NaN.

        A colour is NaN where the part was not there before, unless ``prompt`` also asks for the part and the
        part is there now. A shape is NaN where it was there before.
        """

    def masks(self, images: Tensor) -> Tensor:
        """Part probabilities [N, P, R, R]."""

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps [N, C_l, h, w], fine to coarse, for perceptual distances and KID; differentiable."""

    def renders(self, n: int, claim: Claim | None = None) -> Tensor:
        """``n`` natural faces [n, 3, R, R], the same in every call. With ``claim`` they are recoloured."""

    def counterfactuals(self, claim: Claim, n: int) -> tuple[Tensor, Tensor]:
        """``n`` held-out faces that show the part, and the same faces recoloured: [n, 3, R, R] each."""

    def photos(self, n: int, seed: int) -> Tensor:
        """``n`` held-out faces to invert [n, 3, R, R]."""

    def to(self, device: torch.device) -> "GroundTruth":
        """A copy of this ground truth on ``device``."""


def asked(truth: GroundTruth, prompt: str, seen: Measurement) -> np.ndarray:
    """bool [N]: pictures in which ``prompt`` asks for a change: the part is there, or the shape is missing.

    One such claim of ``prompt`` is enough. All pictures count if nothing in ``prompt`` can be measured.
    """
    done = [*truth.done(prompt, seen, seen).values()]
    return ~np.isnan(done).all(0) if done else np.ones(len(seen.area), bool)


def null_edit(prompt: str, source_text: str) -> str:
    """A sentence that says that ``prompt`` asks for no change, if it is the source text; otherwise ""."""
    if prompt.lower().split() != source_text.lower().split():
        return ""
    return f"nothing can move: the prompt {prompt!r} is the source text; ask for something else"


@lru_cache(maxsize=8)
def _digest(path: Path, changed: int) -> str:
    """12 digits of the file's sha256. Cached: the file may have gigabytes, and every training needs them."""
    return sha256(path)[:12]


def fingerprint(network: nn.Module) -> str:
    """12 digits that identify the names and values of all tensors of ``network``, the same on every device.

    Cached until a tensor changes; torch counts the changes of each tensor.
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
    """Warn if all prompts of ``config`` are the source text. Every method calls this when it starts."""
    source_text = getattr(config, "source_text", None) or domain.source_text
    prompts = getattr(config, "prompts", None) or (config.prompt,)
    if all(words := [null_edit(prompt, source_text) for prompt in prompts]):
        warnings.warn(words[0], stacklevel=3)


@dataclass(frozen=True, eq=False)  # eq=False: hashable, and equal only to itself
class Domain:
    """Frozen networks and the words that go with them."""

    name: str
    generator: Generator
    clip: ClipGuide  # the first guide; its text features condition mappers
    identity: FaceIdentity | None  # None where no such network exists (dogs, cats)
    source_text: str  # what every picture of the domain shows
    prompts: tuple[str, ...]  # examples, counterfactual ones first
    truth: GroundTruth | None = None  # the judge; None if the world cannot be rendered
    truncation: float = 1.0  # psi of the latents that are edited
    level_split: tuple[int, int] = PUBLISHED_SPLIT  # which layers are coarse, medium and fine
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    perceptual: nn.Module | None = None  # pictures -> what lambda_perc compares: VGG19's features, or pixels
    encoder: nn.Module | None = None  # photos -> W+, see cfclip.inversion.encode
    more_guides: tuple[ClipGuide, ...] = ()  # other CLIPs, for trainings with several guides
    heldout_clip: ClipGuide | None = None  # judges edits; no training uses it
    mapper: Mapper | None = None  # edits by any prompt, with no further training
    confidence: Mapping[str, Any] | None = None  # of the mapper, see cfclip.evaluation.confidence
    latent_files: Mapping[str, Path] = field(default_factory=dict)  # split -> photos' codes; others: sampled
    label: int | None = None  # the class to sample, if the generator is class-conditional

    def __post_init__(self) -> None:
        if self.label is None:
            object.__setattr__(self, "label", getattr(self.generator, "label", None))
        else:
            object.__setattr__(self, "generator", self.generator.for_class(self.label))

    @property
    def described(self) -> dict[str, Any]:
        """What distinguishes runs in this domain from runs in other domains."""
        label = {} if self.label is None else {"label": self.label}
        return {"domain": self.name} | label | self.fingerprints

    @property
    def guides(self) -> tuple[ClipGuide, ...]:
        """All CLIPs that can guide an edit."""
        return (self.clip, *self.more_guides)

    def first_guides(self, count: int) -> tuple[ClipGuide, ...]:
        """The first ``count`` guides; ``count`` is the setting ``guides``. ValueError if there are fewer."""
        if count > len(self.guides):
            raise ValueError(f"guides is {count}, but domain {self.name} has {len(self.guides)}: lower it")
        return self.guides[:count]

    def latents(self, n: int, split: str = "train", seed: int = 0) -> Tensor:
        """``n`` codes w_plus [n, L, D] to edit, or all that the file has; the same for the same seed.

        Raises WeightsError if the file is damaged or belongs to another generator, and ValueError if
        ``split`` is unknown or a class-conditional generator has no class: see ``label``.
        """
        if split not in self.latent_files:
            return latents.sample(self.generator, n, split, seed, self.truncation)
        w = load_latents(self.latent_files[split], self.generator)
        order = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))
        return w[order[:n]].to(self.device)

    def edited(
        self, w: Tensor, prompt: str, mapper: nn.Module | None = None, strength: float | Tensor = 1.0
    ) -> Tensor:
        """The codes ``w`` [N, L, D] edited by ``mapper`` (default: the domain's own).

        If the mapper reads words and the domain has a ground truth, the changes for all clauses of ``prompt``
        add up. As in training, a clause for colours changes the fine layers, and one for shapes the coarse
        and medium layers; other clauses change all. strength: one number, or one per layer [L, 1].
        Raises ValueError if there is no mapper.
        """
        mapper = self.mapper if mapper is None else mapper
        if mapper is None:
            raise ValueError(f"domain {self.name} has no mapper of its own: give one, e.g. from load_mapper")
        if not isinstance(mapper, WordMapper) or self.truth is None:
            return mapper.edit(w, mapper.read(self.clip, prompt), strength)
        self.clip.tokenize(prompt)  # an error should quote the whole prompt, not a clause
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
        """Name -> 12 digits, for each network and file that determines the result of a training."""
        networks = {name: getattr(self, name) for name in ("generator", "clip", "identity", "perceptual")}
        networks |= {f"guide{i}": guide for i, guide in enumerate(self.more_guides, 2)}
        found = {name: fingerprint(network) for name, network in networks.items() if network is not None}
        if codes := self.latent_files.get("train"):
            found["latents"] = _digest(codes, codes.stat().st_mtime_ns)
        return found

    def group_of(self, prompt: str) -> str:
        """One of :data:`GROUPS`: what kind of edit ``prompt`` asks for."""
        if null_edit(prompt, self.source_text):
            return NULL_EDIT
        claim = self.truth and self.truth.claim(prompt)
        return OTHER if claim is None else self.truth.group(claim)

    def distance(self) -> PerceptualDistance | None:
        """LPIPS (AlexNet) if this machine has its weights, else its formula on the ground truth's features.

        None if there is neither.
        """
        if (network := find_lpips(self.device)) is not None:
            return PerceptualDistance("lpips_alex", lambda a, b: network(a, b).flatten())
        if self.truth is None:
            return None
        features = self.truth.features
        return PerceptualDistance("lpips_readout", lambda a, b: feature_distance(features(a), features(b)))

    def to(self, device: str | torch.device) -> "Domain":
        """This domain if it is on ``device``; otherwise a copy there, with copies of all networks."""
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
