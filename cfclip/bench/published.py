"""A training step that does all the work of the published recipe, written from its description.

It has the same losses as :class:`cfclip.method.MapperTrainer`, so that their costs can be compared. Each
piece of work that our step leaves out is a switch.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.method.losses import clip_nce, identity_loss, latent_l2
from cfclip.method.trainer import MapperTrainer
from cfclip.method.views import perspective_views
from cfclip.models.clip import TEMPLATES
from cfclip.models.ops import modulated_conv2d, upfirdn2d
from cfclip.models.stylegan2 import Generator, StyledConv, ToRGB


@dataclass(frozen=True)
class Wastes:
    """Work of the published step that its losses do not need. All on: the published step; all off: ours."""

    # both sets of 79 templated texts go through CLIP's text tower again, twice
    texts: bool = True
    # the source pictures go through CLIP once per view of the edit (8 times); off: once
    source_views: bool = True
    # generator, CLIP and identity keep requires_grad
    weight_gradients: bool = True
    # FIR filters insert zeros, pad, and convolve plane by plane; off: depthwise
    plane_filters: bool = True
    # a grouped convolution with modulated weights for each sample; off: modulated activations
    sample_weights: bool = True
    # a second copy of CLIP encodes the mapper's text; costs memory, no time
    second_clip: bool = True
    # the source pictures are synthesised and encoded in each step; off: their features are cached per latent
    sources: bool = True

    @classmethod
    def none(cls, **on: bool) -> "Wastes":
        """All off except ``on``."""
        return cls(**dict.fromkeys(NAMES, False) | on)


NAMES = tuple(f.name for f in fields(Wastes))
"""The switches, in the ladder's order; sources last, because they can be cached only for few latents."""

WORDS = {
    "texts": "constant texts encoded again",
    "source_views": "source encoded once per view",
    "weight_gradients": "gradients of frozen weights",
    "plane_filters": "FIR plane by plane",
    "sample_weights": "weights per sample",
    "second_clip": "second copy of CLIP",
    "sources": "sources synthesised and encoded again",
}
"""What the tables call each switch."""


class PlainGenerator:
    """The synthesis of ``generator`` in plain, un-fused operators: constant noise, no clamp, 4-tap FIR."""

    def __init__(self, generator: Generator, plane_filters: bool = True, sample_weights: bool = True):
        self.generator, self.plane_filters, self.sample_weights = generator, plane_filters, sample_weights

    def __call__(self, w: Tensor) -> Tensor:
        """w [N, L, D] -> images [N, 3, R, R]."""
        g = self.generator
        x, image = g.const[None].repeat(len(w), 1, 1, 1), None
        for level, rgb in enumerate(g.rgbs):
            for i in (2 * level - 1, 2 * level) if level else (0,):
                conv = g.convs[i]
                x = self.modulated(x, conv, conv.affine(w[:, i]), up=conv.up)
                x = x + conv.noise_strength * conv.noise_const
                x = F.leaky_relu(x + conv.bias[None, :, None, None], 0.2) * math.sqrt(2)
            picture = self.modulated(x, rgb, rgb.affine(w[:, 2 * level + 1]), demodulate=False)
            picture = picture + rgb.bias[None, :, None, None]
            image = picture if image is None else picture + self.filter(image, 2, (2, 1))
        return image

    def filter(self, x: Tensor, up: int, pad: tuple[int, int]) -> Tensor:
        """FIR filter with gain 4 on x [N, C, H, W] -> [N, C, H', W'], after inserting zeros if ``up`` is 2.

        pad: zeros (before, after) on each axis. The published filter convolves plane by plane.
        """
        fir, (n, c, h, w) = self.generator.fir, x.shape
        if not self.plane_filters:
            return upfirdn2d(x, fir, up=up, pad=pad * 2, gain=4.0)
        x = F.pad(x.reshape(n * c, 1, h, 1, w, 1), (0, up - 1, 0, 0, 0, up - 1))
        x = F.pad(x.reshape(n * c, 1, h * up, w * up), pad * 2)
        x = F.conv2d(x, (fir * 4.0).flip(0, 1)[None, None])
        return x.reshape(n, c, *x.shape[-2:])

    def modulated(
        self, x: Tensor, layer: StyledConv | ToRGB, style: Tensor, demodulate: bool = True, up: bool = False
    ) -> Tensor:
        """The modulated convolution of ``layer``: x [N, I, H, W], style [N, I] -> [N, O, H', W']."""
        weight = layer.weight * layer.scale
        n, (o, i, k, _) = len(x), weight.shape
        if self.sample_weights:
            weight = weight[None] * style[:, None, :, None, None]
            if demodulate:
                weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
            x = x.reshape(1, n * i, *x.shape[-2:])
            if up:
                x = F.conv_transpose2d(x, weight.transpose(1, 2).reshape(n * i, o, k, k), stride=2, groups=n)
            else:
                x = F.conv2d(x, weight.reshape(n * o, i, k, k), padding=k // 2, groups=n)
            x = x.reshape(n, o, *x.shape[-2:])
        elif up:
            x = F.conv_transpose2d(x * style[:, :, None, None], weight.transpose(0, 1), stride=2)
            x = x * (style.square() @ weight.square().sum((2, 3)).t() + 1e-8).rsqrt()[:, :, None, None]
        else:
            x = modulated_conv2d(x, weight, style, demodulate)
        return self.filter(x, 1, (1, 1)) if up else x


class Published:
    """Steps of ``run`` with ``wastes``. ``run`` has one prompt, one guide and the paper's losses for faces.

    Raises ValueError for a dtype other than float32, unless the wastes that need float32 are off.
    """

    def __init__(self, run: MapperTrainer, wastes: Wastes | None = None):
        self.run, self.wastes = run, wastes or Wastes()
        self.sources = run.sources  # encoded now, not in the first step
        d, on = run.domain, self.wastes
        plain = on.plane_filters or on.sample_weights
        if run.config.dtype != "float32" and (plain or on.weight_gradients or on.texts):
            raise ValueError(f"the published step needs dtype float32, not {run.config.dtype}")
        self.synthesise = run.networks.synthesise
        if plain:
            self.synthesise = PlainGenerator(d.generator, on.plane_filters, on.sample_weights)
        self.networks = (d.generator, d.clip, d.identity)
        for network in self.networks:
            network.zero_grad(set_to_none=True)  # gradients that the steps of another Published have left
        self.text_clip = copy.deepcopy(d.clip) if on.second_clip else d.clip
        with torch.no_grad():
            tokens = self.text_clip.tokenize(run.config.prompt).to(d.device)
            self.text = self.text_clip.model.encode_text(tokens)

    @contextmanager
    def weight_gradients(self) -> Iterator[None]:
        """With this waste, as published, frozen networks still gather gradients; no optimiser uses them."""
        for network in self.networks:
            network.requires_grad_(self.wastes.weight_gradients)
        try:
            yield
        finally:
            for network in self.networks:
                network.requires_grad_(False)

    def texts(self) -> tuple[Tensor, Tensor]:
        """Unit features of the target and of the source text under each template, [T, E] each."""
        run, clip = self.run, self.run.domain.clip
        if not self.wastes.texts:
            return run.target_text[0], run.source_text
        prompts = run.config.prompt, run.config.source_text or run.domain.source_text
        for _ in range(2):  # positive 2 needs the targets again, the negatives the sources
            tokens = [torch.cat([clip.tokenize(form(prompt)) for form in TEMPLATES]) for prompt in prompts]
            # a graph is built, and dropped, while CLIP's weights require gradients
            target, source = (clip.model.encode_text(one.to(clip.mean.device)) for one in tokens)
        return F.normalize(target, dim=-1).detach(), F.normalize(source, dim=-1).detach()

    def step(self, i: int, generator: torch.Generator) -> dict[str, float]:
        """One step, as :meth:`MapperTrainer.step`."""
        run, c, d, on = self.run, self.run.config, self.run.domain, self.wastes
        with self.weight_gradients():
            index = torch.randint(len(run.w), (c.batch,), generator=generator)
            w = run.w[index]
            with torch.no_grad():
                picture = self.synthesise(w) if on.sources else None
            w_edited = run.mapper.edit(w, self.text)
            edited = self.synthesise(w_edited)
            target_text, source_text = self.texts()
            views = run.networks.clip(perspective_views(edited, c.num_views, generator=generator))
            if on.sources:
                times = max(1, c.num_views) if on.source_views else 1
                source = run.networks.clip(picture.repeat(times, 1, 1, 1))
            else:
                source = self.sources.clip[index]
            nce = clip_nce(views, source, target_text, source_text, c.objective.temperature)
            l2 = latent_l2(w_edited, w)
            source_id = d.identity(picture).detach() if on.sources else self.sources.identity[index]
            same = identity_loss(d.identity(edited), source_id)
            loss = c.lambda_nce * nce + c.lambda_l2 * l2 + c.lambda_id * same
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
        return {"loss": loss.item(), "nce": nce.item(), "l2": l2.item(), "id": same.item()}
