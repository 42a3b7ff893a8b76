"""StyleCLIP's global directions in StyleSpace (Patashnik et al. 2021, section 6).

Shapes: C channels of StyleSpace without ToRGB; E the width of CLIP's embedding; L layers, D = w_dim.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cfclip.baselines.editor import Editor
from cfclip.checkpoints import weights
from cfclip.checkpoints.weights import WeightsError
from cfclip.domain import Domain, null_edit, warn_null_edit
from cfclip.files import locked
from cfclip.method.config import DTYPES, GuidedConfig
from cfclip.method.loop import begin_run, run_loop
from cfclip.method.losses import direction
from cfclip.method.networks import FrozenNetworks
from cfclip.models.stylegan2 import Generator, max_batch
from cfclip.settings import (
    batch_size,
    finite,
    int_at_least,
    number,
    one_of,
    optional_text,
    seed_number,
    setting,
    text,
)


@dataclass(frozen=True)
class GlobalConfig(GuidedConfig):
    """StyleCLIP's global direction in StyleSpace; alpha and beta are the published demo's.

    The demo offers alpha from -10 to 10 and beta from 0.08 to 0.3. The same beta keeps few channels for one
    prompt and many for another; None chooses it for each prompt (:func:`automatic_beta`).
    """

    prompt: str = setting(MISSING, text)
    source_text: str | None = setting(None, optional_text)  # None: the domain's
    alpha: float = setting(4.1, finite)  # how far to go at strength 1
    beta: float | None = setting(0.15, number(optional=True))  # channels of less relevance stay as they are
    samples: int = setting(100, batch_size)  # pictures on which each channel is tried
    sigmas: float = setting(5.0, number(above=True))  # how far a channel is moved, in standard deviations
    style_samples: int = setting(100_000, int_at_least(2))  # latents for the mean and standard deviation
    seed: int = setting(0, seed_number)
    # of the convolutions behind the statistics; "auto": bfloat16 where it is clearly faster
    dtype: str = setting("float32", one_of(DTYPES))


class Channels(nn.Module):
    """Each channel's ``effect`` on pictures in CLIP's space [C, E], unit or 0; ``mean`` and ``std`` [C]."""

    def __init__(self, channels: int, embed_dim: int):
        super().__init__()
        self.register_buffer("effect", torch.zeros(channels, embed_dim))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.zeros(channels))

    def relevance(self, text: Tensor) -> Tensor:
        """``R_c = cos(effect_c, text)`` [C] for a text direction [E]."""
        return self.effect @ direction(text)


class Direction(nn.Module):
    """``step`` [C]: ``alpha std_c R_c / max |R|`` where ``|R_c| >= beta``, else 0; ``relevance`` [C]: R."""

    def __init__(self, step: Tensor, relevance: Tensor):
        super().__init__()
        self.register_buffer("step", step)
        self.register_buffer("relevance", relevance)


def convolutions(styles: Sequence[Tensor]) -> list[int]:
    """Indices of the convolutions in ``styles``: conv, rgb, then conv, conv, rgb per resolution."""
    return [i for i in range(len(styles)) if i % 3 != 1]


def _places(g: Generator) -> list[tuple[int, int]]:
    """(index in ``style_space``, channel) of each of the C channels."""
    styles = g.style_space(g.w_avg.expand(1, g.num_ws, -1))
    return [(layer, c) for layer in convolutions(styles) for c in range(styles[layer].shape[1])]


@torch.no_grad()
def channel_statistics(
    domain: Domain, config: GlobalConfig, folder: str | os.PathLike | None = None, **loop: Any
) -> tuple[Channels, list[dict[str, float]]]:
    """Move each channel to its mean -/+ ``sigmas`` standard deviations, on the same pictures (section 6.1).

    ``effect_c`` is the mean over pictures of ``direction(E_I(above) - E_I(below))``, scaled to unit length.
    With ``folder`` the result and its checkpoints are kept in ``folder/channels-<key>``. The key depends on
    the networks and the settings but not on the prompt: one run makes the result, and others wait for it.
    Returns the channels and the logged rows, which are [] if the result was there. ``loop``: options of
    :func:`cfclip.method.run_loop`.
    """
    if folder is None:
        return _measure_channels(domain, config, **loop)
    names = "samples", "sigmas", "style_samples", "seed", "dtype"
    settings = {name: getattr(config, name) for name in names}
    key = _key(domain, settings)
    folder = Path(folder) / f"channels-{key}"
    file = folder / "channels.safetensors"
    card = {"domain": domain.name, **settings}
    with locked(folder, "channels", wait=True):
        if file.exists():
            try:
                channels = Channels(len(_places(domain.generator)), domain.clip.embed_dim).to(domain.device)
                return weights.load_into(channels, weights.read(file, "channels")[0], file), []
            except WeightsError as error:
                warnings.warn(f"the channel statistics are measured again: {error}", stacklevel=2)
        channels, rows = _measure_channels(domain, config, out=folder, run={"key": key, **card}, **loop)
        weights.save(channels, file, "channels", {}, **card)
    return channels, rows


def _measure_channels(
    domain: Domain, config: GlobalConfig, **loop: Any
) -> tuple[Channels, list[dict[str, float]]]:
    g, where, networks = domain.generator, _places(domain.generator), FrozenNetworks(domain, config.dtype)
    w = domain.latents(config.samples, "train", config.seed)
    styles = g.style_space(w)
    channels = Channels(len(where), domain.clip.embed_dim).to(domain.device)
    moments = torch.zeros(2, len(where), dtype=torch.float64)
    draw = torch.Generator().manual_seed(config.seed)
    for size in [1000] * (config.style_samples // 1000) + [config.style_samples % 1000]:
        sample = g.style_space(g.mapping(torch.randn(size, g.z_dim, generator=draw).to(w), domain.truncation))
        sample = torch.cat([sample[layer] for layer in convolutions(sample)], 1).cpu().double()
        moments += torch.stack([sample.sum(0), sample.square().sum(0)])
    mean, square = moments / config.style_samples
    channels.mean.copy_(mean)
    channels.std.copy_((square - mean.square()).clamp(min=0).sqrt())

    def features(layer: int, channel: int, value: Tensor) -> Tensor:
        moved = list(styles)
        moved[layer] = styles[layer].clone()
        moved[layer][:, channel] = value
        parts = zip(*(style.split(max_batch(g)) for style in moved), strict=True)
        pictures = (g.synthesis_from_styles(part, dtype=networks.half) for part in parts)
        return torch.cat([networks.clip(some) for some in pictures])

    def step(i: int, generator: torch.Generator) -> dict[str, float]:
        reach = config.sigmas * channels.std[i]
        change = features(*where[i], channels.mean[i] + reach) - features(*where[i], channels.mean[i] - reach)
        mean = direction(change).mean(0)
        channels.effect[i] = direction(mean)
        return {"agreement": mean.norm().item()}  # 1: the channel does the same to every picture

    loop = {"checkpoint_every": 50, "desc": "channels"} | loop
    rows = run_loop(step, len(where), state={"channels": channels}, seed=config.seed, **loop)
    return channels, rows


def _key(domain: Domain, settings: Mapping[str, Any]) -> str:
    """12 digits for everything that channel statistics depend on; a file with the same key can be reused."""
    networks = [domain.fingerprints[name] for name in ("generator", "clip")]
    what = json.dumps([domain.name, domain.label, domain.truncation, *settings.values(), *networks])
    return hashlib.sha256(what.encode()).hexdigest()[:12]


def global_direction(domain: Domain, config: GlobalConfig, *channels: Channels) -> Direction:
    """The direction of ``config.prompt``; a zero step for the source text.

    ``channels``: one for each guide; a channel's relevance is the weighted mean over the guides.
    Raises ValueError if no channel is relevant enough.
    """
    described = config.source_text or domain.source_text
    relevance = 0.0
    guides = domain.first_guides(config.guides)
    for share, guide, seen in zip(config.guide_shares, guides, channels, strict=True):
        texts = (guide.template_features(text).mean(0) for text in (config.prompt, described))
        target, source = map(direction, texts)
        relevance = relevance + share * seen.relevance(target - source)
    most = relevance.abs().max()
    if null_edit(config.prompt, described):
        return Direction(torch.zeros_like(relevance), relevance)
    beta = automatic_beta(relevance) if config.beta is None else config.beta
    if most == 0 or most < beta:
        raise ValueError(
            f"no channel of {domain.name} has a relevance of beta = {beta:g} for {config.prompt!r}, "
            f"the most is {most:.3f}: set beta lower"
        )
    step = config.alpha * channels[0].std * torch.where(relevance.abs() < beta, 0.0, relevance) / most
    return Direction(step, relevance)


def automatic_beta(relevance: Tensor) -> float:
    """The authors' choice of beta: the largest of 0.10, 0.11, … 0.29 that keeps more than 20 channels.

    0.1 if none keeps so many. relevance: [C].
    """
    steps = [k / 100 for k in range(10, 30)]
    return max((beta for beta in steps if (relevance.abs() >= beta).sum() > 20), default=steps[0])


class GlobalEditor(Editor):
    """``x' = G(s + strength * step)`` in StyleSpace, the same step for every picture."""

    KIND = "direction"
    module: Direction

    @torch.no_grad()
    def edit(self, w: Tensor, strength: float = 1.0) -> Tensor:
        styles = self.domain.generator.style_space(w)
        where = convolutions(styles)
        steps = self.module.step.split([styles[layer].shape[1] for layer in where])
        for layer, step in zip(where, steps, strict=True):
            styles[layer] = styles[layer] + strength * step
        return self.domain.generator.synthesis_from_styles(styles)

    @classmethod
    def fit(cls, method: str, domain: Domain, config: Any, out: Path | None, **loop: Any) -> Editor:
        warn_null_edit(domain, config)
        config = begin_run(config, domain.device, out, method=method, **domain.described)
        shared = None if out is None else out.resolve().parent  # all prompts can use the statistics
        each = [
            channel_statistics(replace(domain, clip=guide), config, shared, **loop)
            for guide in domain.first_guides(config.guides)
        ]
        found = global_direction(domain, config, *(channels for channels, _ in each))
        return cls(method, domain, config, found, each[0][1])

    @classmethod
    def open(cls, path: Path, generator: Generator) -> nn.Module:
        tensors = weights.read(path, cls.KIND)[0]
        blank = torch.zeros(len(_places(generator)))
        return weights.load_into(Direction(blank, blank.clone()), tensors, path).to(generator.w_avg.device)
