"""A registry of metrics: each takes an :class:`Edit` and returns one number per picture."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .domains import DATA, Domain
from .method import at_once
from .toonfaces.captions import claim_of
from .toonfaces.factors import sample_face
from .toonfaces.gan import to_tensor
from .toonfaces.readout import Measurement, Readout
from .toonfaces.render import MASKS, render_image


@dataclass(frozen=True)
class Edit:
    """Source and edited pictures [N, 3, R, R] in [-1, 1], and the prompt that was asked for."""

    domain: Domain
    prompt: str
    source: Tensor
    edited: Tensor

    @cached_property
    def source_feature(self) -> Tensor:
        """Unit CLIP features of the sources [N, E]."""
        return _clip(self.domain, self.source)

    @cached_property
    def edited_feature(self) -> Tensor:
        """Unit CLIP features of the edits [N, E]."""
        return _clip(self.domain, self.edited)

    @cached_property
    def before(self) -> Measurement | None:
        """What the readout sees in the sources; None in a domain without one."""
        return self.domain.readout and self.domain.readout.measure(self.source)

    @cached_property
    def after(self) -> Measurement | None:
        """What the readout sees in the edits."""
        return self.domain.readout and self.domain.readout.measure(self.edited)


@torch.no_grad()
def _clip(domain: Domain, images: Tensor) -> Tensor:
    return F.normalize(torch.cat([domain.clip.encode_image(batch) for batch in images.split(64)]), dim=-1)


METRICS: dict[str, Callable[[Edit], dict[str, np.ndarray]]] = {}
"""name -> function returning its columns, float arrays [N]; {} where it does not apply."""


def metric(function: Callable[[Edit], dict[str, np.ndarray]]) -> Callable[[Edit], dict[str, np.ndarray]]:
    """Register a metric under its function's name."""
    METRICS[function.__name__] = function
    return function


@metric
def clip_score(edit: Edit) -> dict[str, np.ndarray]:
    """100 cos(image, text), text = mean of the unit template features; before and after."""
    text = F.normalize(edit.domain.clip.template_features(edit.prompt).mean(0), dim=-1)
    return {"clip_before": (100 * edit.source_feature @ text).cpu().numpy(), "clip_after": (100 * edit.edited_feature @ text).cpu().numpy()}


@metric
def clip_direction(edit: Edit) -> dict[str, np.ndarray]:
    """100 cos(edited - source image, target - source text), the directional CLIP score."""
    clip = edit.domain.clip
    text = (clip.template_features(edit.prompt) - clip.template_features(edit.domain.source_text)).mean(0)
    return {"clip_direction": (100 * F.cosine_similarity(edit.edited_feature - edit.source_feature, text[None])).cpu().numpy()}


@metric
def identity(edit: Edit) -> dict[str, np.ndarray]:
    """Cosine similarity of the identity features of source and edit, 1 = the same person. Only where the domain has the network."""
    if edit.domain.identity is None:
        return {}
    return {"identity": torch.cat([edit.domain.identity.similarity(a, b) for a, b in zip(edit.source.split(64), edit.edited.split(64), strict=True)])
            .cpu().numpy()}


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


@metric
def perceptual(edit: Edit) -> dict[str, np.ndarray]:
    """:func:`perceptual_distance` of edit and source; the column's name says which it is."""
    if (found := perceptual_distance(edit.domain)) is None:
        return {}
    name, distance = found
    with torch.no_grad():
        return {name: torch.cat([distance(a, b) for a, b in zip(edit.source.split(64), edit.edited.split(64), strict=True)]).cpu().numpy()}


@metric
def ground_truth(edit: Edit) -> dict[str, np.ndarray]:
    """Success, leakage and target colour against the readout, which knows no CLIP. Only where the prompt names a part's colour.

    success: the target part is visible and its measured colour is nearest, in CIELAB, to the one asked for.
    leakage: how far every *other* part moved, mean over parts of colour (CIELAB distance) and shape (1 - soft Dice),
    each divided by its median between two random natural faces: 0 = untouched, 1 = another person's.
    """
    claim = claim_of(edit.prompt)
    if edit.before is None or claim is None:
        return {}
    part, colour = claim
    success = {f"success_{when}": np.array([c == colour for c in measured.colour(part)], dtype=float)
               for when, measured in (("before", edit.before), ("after", edit.after))}
    colour_moved, shape_moved = movement(edit.before, edit.after)
    spread_colour, spread_shape = natural_spread(edit.domain)
    leak = np.concatenate([colour_moved / spread_colour, shape_moved / spread_shape], 1)
    others = np.array([m != part for m in MASKS] * 2)
    return success | {"leakage": np.nanmean(leak[:, others], 1)}


def movement(before: Measurement, after: Measurement) -> tuple[np.ndarray, np.ndarray]:
    """Per picture and part [N, P]: CIELAB distance of the mean colours (NaN if unseen), and 1 - soft Dice of the masks."""
    colour = np.linalg.norm(after.lab - before.lab, axis=-1)
    overlap = 2 * np.minimum(before.masks, after.masks).sum((2, 3)) / (before.masks + after.masks).sum((2, 3))
    seen = (before.area > 4) | (after.area > 4)
    return colour, np.where(seen, 1 - overlap, np.nan)


def leakage_by_part(edit: Edit) -> dict[str, float]:
    """part -> how far it moved, mean over the pictures and over colour and shape, 1 = as far apart as two random faces; {} without a readout."""
    if edit.before is None:
        return {}
    moved = [values / spread for values, spread in zip(movement(edit.before, edit.after), natural_spread(edit.domain), strict=True)]
    return dict(zip(MASKS, np.nanmean(np.concatenate(moved), 0).tolist(), strict=True))


def natural_spread(domain: Domain, n: int = 256, seed: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    """Median :func:`movement` between two random natural renders, per part: ([P], [P])."""
    return _natural_spread(domain.readout, domain.generator.resolution, domain.device, n, seed)


@lru_cache(maxsize=4)
def _natural_spread(readout: Readout, resolution: int, device: torch.device, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    images = to_tensor([render_image(sample_face((seed, k)), resolution) for k in range(2 * n)]).to(device)
    colour, shape = movement(readout.measure(images[:n]), readout.measure(images[n:]))
    return np.nanmedian(colour, 0), np.nanmedian(shape, 0)


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


def over_strengths(domain: Domain, prompt: str, edit: Callable[[Tensor, float], Tensor], w: Tensor, strengths: Sequence[float]) -> list[dict]:
    """:func:`evaluate` at every strength: a row per strength and picture.

    edit: (w [N, L, D], strength) -> pictures [N, 3, R, R], as an editor's ``edit``.
    """
    parts, rows = w.split(at_once(domain.generator)), []
    with torch.no_grad():
        source = torch.cat([domain.generator.synthesis(part) for part in parts])
    for strength in strengths:
        columns = evaluate(Edit(domain, prompt, source, torch.cat([edit(part, strength) for part in parts])))
        rows += [{"strength": strength, "index": i} | {name: float(values[i]) for name, values in columns.items()} for i in range(len(w))]
    return rows
