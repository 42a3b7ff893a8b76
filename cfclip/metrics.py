"""A registry of metrics: each takes an :class:`Edit` and returns one number per picture."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .clip import ClipGuide
from .domains import DATA, Domain
from .method import at_once
from .toonfaces.captions import claim_of
from .toonfaces.factors import sample_face
from .toonfaces.gan import to_tensor
from .toonfaces.readout import Measurement, Readout
from .toonfaces.render import MASKS, render_image


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures [N, 3, R, R] in [-1, 1], and what the domain's networks see in them: each is asked at first need, and once."""

    domain: Domain
    images: Tensor

    @torch.no_grad()
    def _ask(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([network(batch) for batch in self.images.split(64)])

    @cached_property
    def clip(self) -> Tensor:
        """Unit CLIP features [N, E]."""
        return F.normalize(self._ask(self.domain.clip.encode_image), dim=-1)

    @cached_property
    def heldout_clip(self) -> Tensor:
        """Unit features [N, E'] of the CLIP that no edit was optimised for."""
        return F.normalize(self._ask(self.domain.heldout_clip.encode_image), dim=-1)

    @cached_property
    def identity(self) -> Tensor:
        """Unit identity features [N, D]."""
        return self._ask(self.domain.identity)

    @cached_property
    def seen(self) -> Measurement:
        """What the readout sees."""
        return self.domain.readout.measure(self.images)


class Edit:
    """Pictures ``before`` and ``after``, and the ``prompt`` that was asked for.

    source, edited: [N, 3, R, R] in [-1, 1]. Where ``source`` is the :class:`Pictures` of another edit, its measurements are not made again.
    """

    def __init__(self, domain: Domain, prompt: str, source: Tensor | Pictures, edited: Tensor):
        self.domain, self.prompt = domain, prompt
        self.before = source if isinstance(source, Pictures) else Pictures(domain, source)
        self.after = Pictures(domain, edited)

    @cached_property
    def moved(self) -> np.ndarray:
        """:func:`movement`, colours then shapes [N, 2 P], in units of :func:`natural_spread`."""
        moved = movement(self.before.seen, self.after.seen)
        return np.concatenate([values / spread for values, spread in zip(moved, natural_spread(self.domain), strict=True)], 1)


METRICS: dict[str, Callable[[Edit], dict[str, np.ndarray]]] = {}
"""name -> function returning its columns, float arrays [N]; {} where it does not apply."""


def metric(function: Callable[[Edit], dict[str, np.ndarray]]) -> Callable[[Edit], dict[str, np.ndarray]]:
    """Register a metric under its function's name."""
    METRICS[function.__name__] = function
    return function


def _clip_score(guide: ClipGuide, prompt: str, feature: Tensor) -> np.ndarray:
    return (100 * feature @ F.normalize(guide.template_features(prompt).mean(0), dim=-1)).cpu().numpy()


def _clip_direction(guide: ClipGuide, edit: Edit, before: Tensor, after: Tensor) -> np.ndarray:
    text = (guide.template_features(edit.prompt) - guide.template_features(edit.domain.source_text)).mean(0)
    return (100 * F.cosine_similarity(after - before, text[None])).cpu().numpy()


@metric
def clip_score(edit: Edit) -> dict[str, np.ndarray]:
    """100 cos(image, text), text = mean of the unit template features; before and after."""
    return {f"clip_{when}": _clip_score(edit.domain.clip, edit.prompt, pictures.clip)
            for when, pictures in (("before", edit.before), ("after", edit.after))}


@metric
def clip_direction(edit: Edit) -> dict[str, np.ndarray]:
    """100 cos(edited - source image, target - source text), the directional CLIP score; 0 for a null edit."""
    return {"clip_direction": _clip_direction(edit.domain.clip, edit, edit.before.clip, edit.after.clip)}


@metric
def heldout_clip(edit: Edit) -> dict[str, np.ndarray]:
    """The same three of the held-out CLIP: a score under the CLIP that was optimised is suspect. Only where the domain has one."""
    if (guide := edit.domain.heldout_clip) is None:
        return {}
    before, after = edit.before.heldout_clip, edit.after.heldout_clip
    return {"heldout_clip_before": _clip_score(guide, edit.prompt, before), "heldout_clip_after": _clip_score(guide, edit.prompt, after),
            "heldout_direction": _clip_direction(guide, edit, before, after)}


@metric
def identity(edit: Edit) -> dict[str, np.ndarray]:
    """Cosine similarity of the identity features of source and edit, 1 = the same person. Only where the domain has the network."""
    if edit.domain.identity is None:
        return {}
    return {"identity": (edit.before.identity * edit.after.identity).sum(1).cpu().numpy()}


def perceptual_distance(domain: Domain) -> tuple[str, Callable[[Tensor, Tensor], Tensor]] | None:
    """(name, distance): LPIPS (AlexNet) where its weights are on this machine, else the same distance on the readout's encoder.

    The name, ``lpips_alex`` or ``lpips_readout``, says which. The distance takes pictures [N, 3, R, R] in [-1, 1], gives [N]
    (0 = the same picture) and is differentiable. None in a domain without a readout where there is no AlexNet either.
    """
    network = _alex()
    if network is not None:
        network = network.to(domain.device)
        return "lpips_alex", lambda a, b: network(a, b).flatten()
    if domain.readout is None:
        return None
    return "lpips_readout", lambda a, b: readout_distance(domain.readout, a, b)


@torch.no_grad()
def distances(domain: Domain, a: Tensor, b: Tensor) -> tuple[str, np.ndarray] | None:
    """:func:`perceptual_distance` of pictures a and b [N, 3, R, R]: (name, [N])."""
    if (found := perceptual_distance(domain)) is None:
        return None
    return found[0], torch.cat([found[1](x, y) for x, y in zip(a.split(64), b.split(64), strict=True)]).cpu().numpy()


@metric
def perceptual(edit: Edit) -> dict[str, np.ndarray]:
    """:func:`perceptual_distance` of edit and source; the column's name says which it is."""
    found = distances(edit.domain, edit.before.images, edit.after.images)
    return {} if found is None else dict([found])


@metric
def ground_truth(edit: Edit) -> dict[str, np.ndarray]:
    """Success, leakage and target colour against the readout, which knows no CLIP. Only where the prompt names a part's colour, or nothing at all.

    success: the target part is visible and its measured colour is nearest, in CIELAB, to the one asked for.
    progress: how far that colour has come from its own to the one asked for, by CIELAB distance: 1 = there, 0 = no nearer, at least -1.
    A face without the part neither succeeds nor fails: NaN. One that loses it by the edit fails.
    leakage: how far every *other* part moved, mean over parts of colour (CIELAB distance) and shape (1 - soft Dice),
    each divided by its median between two random natural faces: 0 = untouched, 1 = another person's.
    A null edit (the prompt is the domain's source text) cannot succeed, and leaks wherever it moves: mean over all parts.
    """
    claim = claim_of(edit.prompt)
    if edit.domain.readout is None or (claim is None and edit.prompt != edit.domain.source_text):
        return {}
    part, colour = claim or (None, None)
    others = np.array([m != part for m in MASKS] * 2)
    leakage = {"leakage": np.nanmean(edit.moved[:, others], 1)}
    if not claim:
        return leakage
    has = edit.before.seen.has(part)
    success = {f"success_{when}": np.where(has, [c == colour for c in pictures.seen.colour(part)], np.nan)
               for when, pictures in (("before", edit.before), ("after", edit.after))}
    before, after = (pictures.seen.distance(part, colour) for pictures in (edit.before, edit.after))
    progress = np.where(has & ~np.isnan(before), np.nan_to_num((1 - after / before).clip(-1, 1)), np.nan)
    return success | {"progress": progress} | leakage


def leakage_by_part(edit: Edit) -> dict[str, np.ndarray]:
    """part -> how far it moved [N], mean of colour and shape as in :func:`ground_truth`, NaN where it is not seen; {} without a readout."""
    if edit.domain.readout is None:
        return {}
    colour, shape = np.split(edit.moved, 2, 1)
    return dict(zip(MASKS, np.where(np.isnan(colour), shape, np.where(np.isnan(shape), colour, (colour + shape) / 2)).T, strict=True))


def movement(before: Measurement, after: Measurement) -> tuple[np.ndarray, np.ndarray]:
    """Per picture and part [N, P]: CIELAB distance of the mean colours (NaN if unseen), and 1 - soft Dice of the masks."""
    colour = np.linalg.norm(after.lab - before.lab, axis=-1)
    overlap = 2 * np.minimum(before.masks, after.masks).sum((2, 3)) / (before.masks + after.masks).sum((2, 3))
    seen = (before.area > 4) | (after.area > 4)
    return colour, np.where(seen, 1 - overlap, np.nan)


LEAST_SPREAD = 10.0
"""CIELAB distance that counts as another person's where nature has only one colour, as for the white of an eye."""


def natural_spread(domain: Domain, n: int = 256, seed: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    """Median :func:`movement` between two random natural renders, per part: ([P], at least :data:`LEAST_SPREAD`, and [P])."""
    return _natural_spread(domain.readout, domain.generator.resolution, domain.device, n, seed)


@lru_cache(maxsize=4)
def _natural_spread(readout: Readout, resolution: int, device: torch.device, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    images = natural_renders(resolution, 2 * n, seed).to(device)
    colour, shape = movement(readout.measure(images[:n]), readout.measure(images[n:]))
    return np.fmax(np.nanmedian(colour, 0), LEAST_SPREAD), np.nanmedian(shape, 0)


@lru_cache(maxsize=4)
def natural_renders(resolution: int, n: int, seed: int = 40_000, claim: tuple[str, str] | None = None) -> Tensor:
    """Renders of ``n`` natural faces [n, 3, R, R]; with ``claim`` the same faces, that part in that colour."""
    faces = [sample_face((seed, k)) for k in range(n)]
    return to_tensor([render_image(face.with_colour(*claim) if claim else face, resolution) for face in faces])


@torch.no_grad()
def kid_features(judge: Readout, images: Tensor) -> np.ndarray:
    """Means of the readout's four encoder stages over the picture, [N, 176]."""
    features = []
    for batch in images.split(100):
        stages = []
        for block in judge.down:
            batch = block(batch)
            stages.append(batch.mean((2, 3)))
        features.append(torch.cat(stages, 1))
    return torch.cat(features).cpu().double().numpy()


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """Kernel inception distance (Binkowski et al. 2018): unbiased MMD^2 under ``(x y / d + 1)^3``, features standardised by b."""
    mean, std = b.mean(0), b.std(0) + 1e-9
    a, b = (a - mean) / std, (b - mean) / std
    kaa, kbb, kab = ((x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    n, m = len(a), len(b)
    return float((kaa.sum() - np.trace(kaa)) / (n * (n - 1)) + (kbb.sum() - np.trace(kbb)) / (m * (m - 1)) - 2 * kab.mean())


def kid_to_renders(edit: Edit, n: int = 256) -> dict[str, float]:
    """KID of the edits, one number for the set, to ``n`` natural renders and (where the prompt names a part's colour) to the same recoloured.

    kid_natural: how far from faces that exist; kid_counterfactual: from the faces that were asked for. {} without a readout, or for one picture.
    """
    domain, claim = edit.domain, claim_of(edit.prompt)
    if domain.readout is None or len(edit.after.images) < 2:
        return {}
    features = kid_features(domain.readout, edit.after.images.clamp(-1, 1))
    wanted = {"kid_natural": None} | ({"kid_counterfactual": claim} if claim else {})
    return {name: kid(features, _references(domain.readout, domain.generator.resolution, domain.device, n, one)) for name, one in wanted.items()}


@lru_cache(maxsize=64)
def _references(readout: Readout, resolution: int, device: torch.device, n: int, claim: tuple[str, str] | None) -> np.ndarray:
    images = natural_renders(resolution, n, claim=claim) if claim else natural_renders(resolution, 2 * n)[:n]   # the renders of natural_spread
    return kid_features(readout, images.to(device))


def readout_distance(readout: Readout, a: Tensor, b: Tensor) -> Tensor:
    """LPIPS' formula with unit weights on the readout's four encoder stages; differentiable. a, b: [N, 3, R, R] -> [N]."""
    total = torch.zeros(len(a), device=a.device)
    for block in readout.down:
        a, b = block(a), block(b)
        total += (F.normalize(a, dim=1, eps=1e-6) - F.normalize(b, dim=1, eps=1e-6)).square().sum(1).mean((1, 2))
    return total / len(readout.down)


ALEXNET = "alexnet-owt-7be5be79.pth"
ALEXNET_URL = f"https://download.pytorch.org/models/{ALEXNET}"


@lru_cache(maxsize=1)
def _alex() -> torch.nn.Module | None:
    """The ``lpips`` package's AlexNet, if torchvision's weights are in torch's hub cache or data/downloads; never downloads."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if not (cache / ALEXNET).exists() and not (DATA / "downloads" / ALEXNET).exists():
        return None
    import lpips
    if not (cache / ALEXNET).exists():
        cache.mkdir(parents=True, exist_ok=True)
        os.symlink(DATA / "downloads" / ALEXNET, cache / ALEXNET)
    with warnings.catch_warnings():                                # it calls torchvision's deprecated arguments
        warnings.simplefilter("ignore")
        return lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False)


def lpips_note() -> str:
    """One line: which perceptual distance is used here, and how to get the published one."""
    if _alex() is not None:
        return "LPIPS: the lpips package with AlexNet."
    return (f"LPIPS: AlexNet's weights are not on this machine, so the same distance on the readout's encoder is used (column lpips_readout). "
            f"For the published one download {ALEXNET_URL} to data/downloads.")


def evaluate(edit: Edit) -> dict[str, np.ndarray]:
    """Every registered metric of ``edit``: column -> [N]."""
    return {column: values for function in METRICS.values() for column, values in function(edit).items()}


def edits(domain: Domain, prompt: str, edit: Callable[[Tensor, float], Tensor], w: Tensor, strengths: Sequence[float]) -> Iterator[tuple[float, Edit]]:
    """(strength, the edit at it); all share what is measured of the sources.

    edit: (w [N, L, D], strength) -> pictures [N, 3, R, R], as an editor's ``edit``.
    """
    parts = w.split(at_once(domain.generator))
    with torch.no_grad():
        source = Pictures(domain, torch.cat([domain.generator.synthesis(part) for part in parts]))
    for strength in strengths:
        yield strength, Edit(domain, prompt, source, torch.cat([edit(part, strength) for part in parts]))


def rows(columns: Mapping[str, np.ndarray], **labels: Any) -> list[dict]:
    """column -> [N] as N rows, which begin with ``labels`` and their ``index``; NaN is left out."""
    return [labels | {"index": i} | {name: float(value) for name, value in zip(columns, values, strict=True) if not np.isnan(value)}
            for i, values in enumerate(zip(*columns.values(), strict=True))]


def over_strengths(domain: Domain, prompt: str, edit: Callable[[Tensor, float], Tensor], w: Tensor, strengths: Sequence[float]) -> list[dict]:
    """:func:`evaluate` of :func:`edits`: a row per strength and picture. For all there is to know of an editor see :func:`cfclip.evaluation.measure`."""
    return [row for strength, one in edits(domain, prompt, edit, w, strengths) for row in rows(evaluate(one), strength=strength)]
