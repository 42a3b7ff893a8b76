"""Photo -> W+: optimisation as StyleGAN2's projector does it (Karras et al. 2020, appendix D), from W's centre or an encoder's guess.

    w* = argmin_w  a d(G(w), x) + b |G(w) - x|^2 / (3 R^2) + c |w - w_avg|^2 / (D s^2) + e sum_k r(n_k)

d: perceptual distance, s: standard deviation of W (:func:`w_spread`), r: autocorrelation of the noise maps (:func:`noise_autocorrelation`).
Shapes: N photos, L layers, D = w_dim, R = resolution.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.domain import Domain
from cfclip.method.loop import learning_rate, run_loop
from cfclip.models.stylegan2 import Generator
from cfclip.settings import Settings, flag, int_at_least, number, one_of, setting

SPACES = ("w", "w_plus")

PERCEPTUAL_SIZE = 256
"""Larger pictures are pooled to this before the perceptual distance, as the projector does."""


@dataclass(frozen=True)
class InversionConfig(Settings):
    """How a photo is inverted. The schedules and noise weights are the projector's; its w is one for all layers (``space="w"``)."""

    space: str = setting("w_plus", one_of(SPACES))  # "w": one w for all layers; "w_plus": one each
    steps: int = setting(300, int_at_least(0))
    lr: float = setting(0.1, number())  # of Adam, for w in units of W's standard deviation
    ramp_up: float = setting(0.05, number(0, 1))  # share of the steps over which lr rises from 0 …
    ramp_down: float = setting(0.25, number(0, 1))  # … and falls to 0, as a cosine
    # noise added to w at first, relative to |w - w_avg| of a sample; none if a start is given
    w_noise: float = setting(0.05, number())
    w_noise_until: float = setting(0.75, number(0, 1))  # share of the steps after which it is gone
    noise_maps: bool = setting(True, flag)  # optimise the noise maps too, where the generator uses them
    noise_weight: float = setting(1e5, number())  # e: of their autocorrelation
    perceptual: float = setting(1.0, number())  # a
    mse: float = setting(5.0, number())  # b; makes it about as large as the perceptual term
    w_centre: float = setting(0.0, number())  # c: higher values edit better and reconstruct worse
    seed: int = setting(0, int_at_least(0))


@dataclass(frozen=True)
class Inversion:
    """What was found for N photos.

    w_plus: [N, L, D]; noise: one map [N, 1, r, r] per convolution, None for the generator's own; images: G(w_plus), [N, 3, R, R];
    metrics: a row per photo (:func:`reconstruction`); log: the loss and its terms, means over the photos.
    """

    w_plus: Tensor
    noise: tuple[Tensor, ...] | None
    images: Tensor
    metrics: list[dict[str, float]]
    log: list[dict[str, float]]

    @property
    def synthesis_noise(self) -> str | tuple[Tensor, ...]:
        """``noise`` for :meth:`Generator.synthesis`, also of an edit of ``w_plus``."""
        return "const" if self.noise is None else self.noise


def w_spread(generator: Generator, n: int = 4096) -> float:
    """s: root mean square of the components of ``w - w_avg`` over ``n`` samples; a typical w is ``s sqrt(D)`` away from w_avg."""
    with torch.no_grad():
        z = torch.randn(n, generator.z_dim, generator=torch.Generator().manual_seed(0)).to(generator.w_avg)
        return (generator.map_one(z) - generator.w_avg).square().mean().sqrt().item()


def centre_distance(generator: Generator, w: Tensor, spread: float | None = None) -> Tensor:
    """``sqrt(mean_l |w_l - w_avg|^2 / D) / s``: 1 = as far from W's centre as a sample. w: [N, L, D] -> [N]."""
    spread = w_spread(generator) if spread is None else spread
    return ((w - generator.w_avg).square().mean((1, 2)) + 1e-20).sqrt() / spread


def noise_autocorrelation(maps: Sequence[Tensor]) -> Tensor:
    """Sum over the maps and their pyramid (halved down to 8²) of ``mean(n shift_x(n))^2 + mean(n shift_y(n))^2``: 0 for white noise.

    Keeps the picture out of the noise (Karras et al. 2020, eq. 11). maps: [N, 1, r, r] -> [N].
    """
    total = torch.zeros(len(maps[0]), device=maps[0].device)
    for x in maps:
        while True:
            total = total + sum((x * x.roll(1, dim)).mean((1, 2, 3)).square() for dim in (2, 3))
            if x.shape[-1] <= 8:
                break
            x = F.avg_pool2d(x, 2)
    return total


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures [N, 3, R, R], clamped to [-1, 1]: ``10 log10(4 / mse)``. [N]."""
    return 10 * torch.log10(4 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean((1, 2, 3)).clamp_min(1e-10))


@torch.no_grad()
def reconstruction(domain: Domain, photos: Tensor, images: Tensor, w_plus: Tensor) -> list[dict[str, float]]:
    """A row per photo: ``psnr``, the perceptual distance under its name (where there is one), ``centre_distance``."""
    images = images.clamp(-1, 1)
    columns = {"psnr": psnr(images, photos)}
    if distance := domain.distance():
        batches = zip(images.split(64), photos.split(64), strict=True)
        columns[distance.name] = torch.cat([distance.between(a, b) for a, b in batches])
    columns["centre_distance"] = centre_distance(domain.generator, w_plus)
    return [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]


def encode(domain: Domain, photos: Tensor) -> Tensor:
    """The encoder's guess: photos [N, 3, R, R] in [-1, 1], resized to what it takes -> [N, L, D]. ValueError if the domain has none."""
    if domain.encoder is None:
        raise ValueError(
            f"domain {domain.name} has no encoder: start without one, or get it (cfclip toonfaces train encoder, or cfclip fetch ffhq --all)"
        )
    size = domain.encoder.image_size
    if photos.shape[-2:] != (size, size):
        photos = F.interpolate(photos, (size, size), mode="bilinear", align_corners=False, antialias=True)
    with torch.no_grad():
        w = torch.cat([domain.encoder(batch) for batch in photos.split(16)])
    _fits(domain.generator, w, len(photos), f"the encoder of domain {domain.name}")
    return w


def invert(
    domain: Domain,
    photos: Tensor,
    config: InversionConfig | None = None,
    start: Tensor | None = None,
    progress: bool = True,
) -> Inversion:
    """Invert aligned ``photos`` [N, 3, R, R] in [-1, 1].

    ``start``: [N, L, D], e.g. from :func:`encode`; default W's centre. Photos do not influence each other.
    Raises ValueError for another size or range, and where ``config`` asks for a distance that the domain has not.
    """
    config, r = config or InversionConfig(), domain.generator.resolution
    if photos.ndim != 4 or photos.shape[1:] != (3, r, r) or not len(photos):
        raise ValueError(
            f"photos must be [N, 3, {r}, {r}] for this generator, not {list(photos.shape)}: see cfclip.align.load_photo"
        )
    if not photos.isfinite().all() or photos.abs().max() > 1.01:
        raise ValueError("photos must be finite and in [-1, 1]: see cfclip.align.load_photo")
    photos = photos.to(domain.device, torch.float32)
    if start is not None:
        _fits(domain.generator, start, len(photos), "start")
        start = start.to(photos)
    size = max(1, min(64, 16 * 256**2 // r**2))  # a picture of 1024² with its gradients takes 3 GB
    starts = [None] * len(photos) if start is None else start.split(size)
    batches = zip(photos.split(size), starts, strict=start is not None)
    parts = [_invert(domain, x, config, begin, i * size, progress) for i, (x, begin) in enumerate(batches)]
    w = torch.cat([part[0] for part in parts])
    noise = (
        None if parts[0][1] is None else tuple(map(torch.cat, zip(*(part[1] for part in parts), strict=True)))
    )
    with torch.no_grad():
        images = torch.cat([domain.generator.synthesis(part[0], part[1] or "const") for part in parts])
    log = [
        {
            key: sum(row[key] * len(part[0]) for row, part in zip(rows, parts, strict=True)) / len(w)
            for key in rows[0]
        }
        for rows in zip(*(part[2] for part in parts), strict=True)
    ]
    return Inversion(w, noise, images, reconstruction(domain, photos, images, w), log)


def _fits(generator: Generator, w: Tensor, n: int, what: str) -> None:
    if w.shape != (n, generator.num_ws, generator.w_dim):
        raise ValueError(
            f"{what} gives codes of shape {list(w.shape)}, where this generator needs [{n}, {generator.num_ws}, {generator.w_dim}]"
        )


def _invert(
    domain: Domain, photos: Tensor, c: InversionConfig, start: Tensor | None, first: int, progress: bool
) -> tuple[Tensor, tuple[Tensor, ...] | None, list[dict[str, float]]]:
    g, n, spread = domain.generator, len(photos), w_spread(domain.generator)
    distance = domain.distance() if c.perceptual else None
    if c.perceptual and distance is None:
        raise ValueError(
            f"perceptual is {c.perceptual:g}, but domain {domain.name} has no ground truth and AlexNet is not on this machine: "
            f"'cfclip fetch {domain.name} --all' gets it, or set perceptual=0"
        )
    w = g.w_avg.expand(n, g.num_ws, -1) if start is None else start
    w = ((w.mean(1, keepdim=True) if c.space == "w" else w) - g.w_avg) / spread
    w = w.clone().requires_grad_()  # in units of W's standard deviation, about its centre
    maps = []
    if c.noise_maps and any(conv.noise_strength != 0 for conv in g.convs):
        maps = [conv.noise_const.expand(n, 1, -1, -1).clone().requires_grad_() for conv in g.convs]
    optimizer = torch.optim.Adam([w, *maps], c.lr, betas=(0.9, 0.999))
    shakes = [
        torch.Generator().manual_seed(c.seed * 1_000_003 + first + k) for k in range(n)
    ]  # one each: photos are independent
    shake = 0.0 if start is not None else c.w_noise * math.sqrt(g.w_dim)

    def codes(noise: Tensor | float = 0.0) -> Tensor:
        return (g.w_avg + spread * (w + noise)).expand(-1, g.num_ws, -1)

    def step(i: int, generator: torch.Generator) -> dict[str, float]:
        t = i / c.steps
        optimizer.param_groups[0]["lr"] = c.lr * learning_rate(t, c.ramp_up, c.ramp_down)
        scale = shake * max(0.0, 1 - t / c.w_noise_until) ** 2 if c.w_noise_until else 0.0
        noise = (
            scale * torch.stack([torch.randn(w.shape[1:], generator=one) for one in shakes]).to(w)
            if scale
            else 0.0
        )
        w_plus = codes(noise)
        images = g.synthesis(w_plus, maps or "const")
        terms = {"mse": c.mse * (images - photos).square().mean((1, 2, 3))}
        if distance:
            terms[distance.name] = c.perceptual * distance.between(_pool(images), _pool(photos))
        if c.w_centre:
            terms["w_centre"] = c.w_centre * centre_distance(g, w_plus, spread).square()
        if maps:
            terms["noise"] = c.noise_weight * noise_autocorrelation(maps)
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.sum().backward()  # the sum: a photo's gradient is the same in every batch
        optimizer.step()
        with torch.no_grad():
            for x in maps:
                x -= x.mean((1, 2, 3), keepdim=True)
                x *= x.square().mean((1, 2, 3), keepdim=True).rsqrt()
        return {"loss": loss.mean().item()} | {name: value.mean().item() for name, value in terms.items()}

    log = run_loop(
        step,
        c.steps,
        state={},
        seed=c.seed,
        log_every=max(1, c.steps // 20),
        desc="inversion",
        progress=progress,
    )
    return codes().detach().clone(), tuple(x.detach() for x in maps) or None, log


def _pool(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images, PERCEPTUAL_SIZE) if images.shape[-1] > PERCEPTUAL_SIZE else images


def held_out(domain: Domain, n: int, seed: int = 0) -> Tensor:
    """``n`` pictures [n, 3, R, R] to invert that nothing was trained on: renders where there is a ground truth.

    Elsewhere samples of the generator, with a warning.
    """
    if domain.truth is not None:
        return domain.truth.photos(n, seed)
    warnings.warn(
        f"domain {domain.name} has no pictures of its own: inverting samples of its generator", stacklevel=2
    )
    with torch.no_grad():
        return domain.generator.synthesis(domain.latents(n, "test", seed)).clamp(-1, 1)
