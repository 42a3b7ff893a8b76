"""The work of the published recipe's step, written from its description: what our step does not do, each a switch.

Nothing here is faster or better than :class:`cfclip.method.CFCLIP`; it has the same losses, and its cost is what ours is measured against.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.method.losses import clip_nce, latent_l2
from cfclip.method.trainer import MapperTrainer
from cfclip.method.views import perspective_views
from cfclip.models.clip import TEMPLATES, ClipGuide
from cfclip.models.ops import modulated_conv2d, upfirdn2d
from cfclip.models.stylegan2 import Generator, StyledConv, ToRGB


@dataclass(frozen=True)
class Wastes:
    """What the published step does though its losses do not need it. All on: the published step; all off: ours."""

    texts: bool = (
        True  # both sets of 79 templated texts go through CLIP's text tower again, ``text_passes`` times
    )
    source_views: bool = (
        True  # the source pictures go through CLIP once per view of the edit (8 times); off: once
    )
    weight_gradients: bool = True  # generator, CLIP and identity keep requires_grad
    plane_filters: bool = True  # FIR filters insert zeros, pad, and convolve plane by plane; off: depthwise
    sample_weights: bool = True  # every sample has modulated weights of its own, in a grouped convolution; off: modulated activations
    second_clip: bool = True  # a second copy of CLIP, for the text that the mapper sees; costs memory alone
    gram: bool = True  # Gram matrices of the perceptual features, dropped; only where the domain has a perceptual network
    sources: bool = (
        True  # the source pictures are drawn and encoded anew; off: their features are kept per latent
    )
    text_passes: int = 2  # the text direction needs both sets, the second positive the targets again, the negatives the sources again

    @classmethod
    def none(cls, **on: bool) -> "Wastes":
        """All off, but for ``on``."""
        return cls(**dict.fromkeys(NAMES, False) | on)


NAMES = tuple(f.name for f in fields(Wastes) if f.type is bool)
"""The switches, in the order in which the ladder of the report turns them off: the sources last, as keeping them needs a small set of latents."""

WORDS = {
    "texts": "constant texts encoded again",
    "source_views": "source encoded once per view",
    "weight_gradients": "gradients of frozen weights",
    "plane_filters": "FIR plane by plane",
    "sample_weights": "weights per sample",
    "second_clip": "second copy of CLIP",
    "gram": "Gram matrices, dropped",
    "sources": "sources drawn and encoded again",
}


def plane_filter(x: Tensor, f: Tensor, up: int, pad: tuple[int, int], gain: float) -> Tensor:
    """FIR as published: each plane a picture of its own, zeros inserted, padded (before, after), convolved. [N, C, H, W] -> [N, C, H', W']."""
    n, c, h, w = x.shape
    x = F.pad(x.reshape(n * c, 1, h, 1, w, 1), (0, up - 1, 0, 0, 0, up - 1)).reshape(n * c, 1, h * up, w * up)
    x = F.conv2d(F.pad(x, pad * 2), (f * gain).flip(0, 1)[None, None])
    return x.reshape(n, c, *x.shape[-2:])


class PlainGenerator:
    """A generator's synthesis in plain operators, un-fused. Its weights, constant noise, no clamp; a 4-tap filter."""

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
            picture = (
                self.modulated(x, rgb, rgb.affine(w[:, 2 * level + 1]), demodulate=False)
                + rgb.bias[None, :, None, None]
            )
            image = picture if image is None else picture + self.filter(image, 2, (2, 1))
        return image

    def filter(self, x: Tensor, up: int, pad: tuple[int, int]) -> Tensor:
        if self.plane_filters:
            return plane_filter(x, self.generator.fir, up, pad, 4.0)
        return upfirdn2d(x, self.generator.fir, up=up, pad=pad * 2, gain=4.0)

    def modulated(
        self, x: Tensor, layer: StyledConv | ToRGB, style: Tensor, demodulate: bool = True, up: bool = False
    ) -> Tensor:
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


def gram(features: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, C]."""
    x = features.flatten(2)
    return x @ x.transpose(1, 2) / x.shape[-1]


class Published:
    """The steps of ``run`` (one prompt, the paper's objective), with ``wastes``; the same losses on the same draws."""

    def __init__(self, run: MapperTrainer, wastes: Wastes | None = None):
        self.run, self.wastes = run, wastes or Wastes()
        d, on = run.domain, self.wastes
        self.plain = (
            PlainGenerator(d.generator, on.plane_filters, on.sample_weights)
            if on.plane_filters or on.sample_weights
            else None
        )
        if run.config.dtype != "float32" and (self.plain or on.weight_gradients or on.texts):
            raise ValueError(f"the published step is float32, not {run.config.dtype}")
        self.networks = [
            network for network in (d.generator, d.clip, d.identity, d.perceptual) if network is not None
        ]
        for network in self.networks:
            network.zero_grad(set_to_none=True)  # what another step's waste has left
        clip = copy.deepcopy(d.clip) if on.second_clip else d.clip
        with torch.no_grad():
            self.text = clip.model.encode_text(clip.tokenize(run.config.prompt).to(d.device))
        self.second_clip = clip

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Frozen is what the optimiser does not change: as published, the weights' gradients add up in ``.grad`` all the same."""
        for network in self.networks:
            network.requires_grad_(self.wastes.weight_gradients)
        try:
            yield
        finally:
            for network in self.networks:
                network.requires_grad_(False)

    def draw(self, w: Tensor) -> Tensor:
        return self.run.networks.synthesise(w) if self.plain is None else self.plain(w)

    def texts(self) -> tuple[Tensor, Tensor]:
        """Unit features of the target and of the source text under each template, [T, E] each."""
        run = self.run
        if not self.wastes.texts:
            return run.target_text[0], run.source_text
        both = run.config.prompt, run.config.source_text or run.domain.source_text
        for _ in range(self.wastes.text_passes):
            target, source = (encode_templates(run.domain.clip, prompt) for prompt in both)
        return target, source

    def step(self, i: int, generator: torch.Generator) -> dict[str, float]:
        """One step, as :meth:`MapperTrainer.step`."""
        run, c, d, on = self.run, self.run.config, self.run.domain, self.wastes
        with self.frozen():
            index = torch.randint(len(run.w), (c.batch,), generator=generator)
            w = run.w[index]
            picture = None
            if on.sources or c.lambda_perc:
                with torch.no_grad():
                    picture = self.draw(w)
            w_edited = run.mapper.edit(w, self.text)
            edited = self.draw(w_edited)
            target_text, source_text = self.texts()
            views = run.networks.clip(perspective_views(edited, c.num_views, generator=generator))
            if on.sources:
                times = max(1, c.num_views) if on.source_views else 1
                source = run.networks.clip(picture.repeat(times, 1, 1, 1))
            else:
                source = run.source_clip[index]
            nce = clip_nce(views, source, target_text, source_text, c.objective.temperature)
            l2 = latent_l2(w_edited, w)
            loss = c.lambda_nce * nce + c.lambda_l2 * l2
            logs = {"nce": nce, "l2": l2}
            if c.lambda_id:
                known = d.identity(picture).detach() if on.sources else run.source_id[index]
                logs["id"] = 1 - (d.identity(edited) * known).sum(1).mean()
                loss = loss + c.lambda_id * logs["id"]
            if c.lambda_perc:
                before, after = d.perceptual(picture).detach(), d.perceptual(edited)
                if on.gram:
                    gram(before), gram(after)
                logs["perc"] = F.l1_loss(after, before)
                loss = loss + c.lambda_perc * logs["perc"]
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
        return {"loss": loss.item()} | {name: value.item() for name, value in logs.items()}


def encode_templates(clip: ClipGuide, prompt: str) -> Tensor:
    """What :meth:`ClipGuide.template_features` keeps, computed: unit features [T, E]. With a graph, which is dropped, while weights want gradients."""
    tokens = torch.cat([clip.tokenize(template(prompt)) for template in TEMPLATES]).to(clip.mean.device)
    return F.normalize(clip.model.encode_text(tokens), dim=-1).detach()
