"""Photo -> W+ by optimisation, as in StyleGAN2's projector (Karras et al. 2020, appendix D).

    w*, n* = argmin  a d(y, x) + b |y - x|^2 / (3 R^2) + c |w - w_avg|^2 / (L D s^2) + e sum_k r(n_k)

x: photo; y = G(w, n): picture; n: noise maps; d: perceptual distance; s: standard deviation of W
(:func:`w_spread`); r: autocorrelation of a noise map (:func:`noise_autocorrelation`). The optimisation starts
from w_avg, the centre of W, or from an encoder's code.
Shapes: N photos, L layers, D = w_dim, R = resolution.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.checkpoints.networks import ALEXNET_URL
from cfclip.domain import Domain
from cfclip.method.loop import learning_rate, run_loop
from cfclip.models.stylegan2 import Generator
from cfclip.settings import Settings, flag, int_at_least, number, one_of, seed_number, setting

SPACES = ("w", "w_plus")
W_NOISE_UNTIL = 0.75
"""The share of the steps after which the noise added to w is 0."""
MSE = 5.0
"""b: with this weight the pixel error is about as important as the perceptual distance."""
PERCEPTUAL_SIZE = 256
"""Larger pictures are pooled to this size before the perceptual distance, as in the projector."""


@dataclass(frozen=True)
class InversionConfig(Settings):
    """How a photo is inverted. Schedules and noise weights are the projector's, which optimises in W."""

    space: str = setting("w_plus", one_of(SPACES))  # "w": one w for all layers; "w_plus": one per layer
    steps: int = setting(300, int_at_least(0))
    lr: float = setting(0.1, number())  # of Adam, for w in units of W's standard deviation
    # standard deviation of the noise added to each component of w at the first step, relative to
    # |w - w_avg| of a sample; no noise if there is a start
    w_noise: float = setting(0.05, number())
    noise_maps: bool = setting(True, flag)  # also optimise the noise maps, if the generator uses them
    noise_weight: float = setting(1e5, number())  # e
    perceptual: float = setting(1.0, number())  # a
    w_centre: float = setting(0.0, number())  # c: a higher value edits better and reconstructs worse
    seed: int = setting(0, seed_number)


@dataclass(frozen=True)
class Inversion:
    """The inversions of N photos."""

    w_plus: Tensor  # [N, L, D]
    noise: tuple[Tensor, ...] | None  # one map [N, 1, r, r] per convolution; None: the generator's own
    images: Tensor  # G(w_plus) [N, 3, R, R]
    metrics: list[dict[str, float]]  # one row per photo, see :func:`reconstruction`
    log: list[dict[str, float]]  # the loss and its terms, means over photos

    @property
    def synthesis_noise(self) -> str | tuple[Tensor, ...]:
        """``noise`` for :meth:`Generator.synthesis` of ``w_plus`` and of its edits."""
        return "const" if self.noise is None else self.noise


def w_spread(generator: Generator) -> float:
    """s: root mean square of the components of ``w - w_avg`` over 4096 samples."""
    n = 4096
    with torch.no_grad():
        z = torch.randn(n, generator.z_dim, generator=torch.Generator().manual_seed(0)).to(generator.w_avg)
        w = generator.map_one(z, generator.every_class(n))
        return (w - generator.w_avg).square().mean().sqrt().item()


def centre_distance(generator: Generator, w: Tensor, spread: float | None = None) -> Tensor:
    """``sqrt(mean_l |w_l - w_avg|^2 / D) / s``, about 1 for samples. w: [N, L, D] -> [N]."""
    spread = w_spread(generator) if spread is None else spread
    return ((w - generator.w_avg).square().mean((1, 2)) + 1e-20).sqrt() / spread


def noise_autocorrelation(maps: Sequence[Tensor]) -> Tensor:
    """The noise regulariser (Karras et al. 2020, eq. 11), which keeps the picture out of the noise maps.

    ``mean(n shift_x(n))^2 + mean(n shift_y(n))^2``, summed over the maps and their pyramids (halved down to
    8 x 8): 0 for white noise. maps: [N, 1, r, r] -> [N].
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
    """``10 log10(4 / mse)`` in dB of pictures [N, 3, R, R], clamped to [-1, 1] first -> [N]."""
    return 10 * torch.log10(4 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean((1, 2, 3)).clamp_min(1e-10))


@torch.no_grad()
def reconstruction(domain: Domain, photos: Tensor, images: Tensor, w_plus: Tensor) -> list[dict[str, float]]:
    """One row per photo: psnr, the perceptual distance under its name (if it exists), centre_distance."""
    images = images.clamp(-1, 1)
    columns = {"psnr": psnr(images, photos)}
    if distance := domain.distance():
        batches = zip(images.split(64), photos.split(64), strict=True)
        columns[distance.name] = torch.cat([distance.between(a, b) for a, b in batches])
    columns["centre_distance"] = centre_distance(domain.generator, w_plus)
    return [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]


def encode(domain: Domain, photos: Tensor) -> Tensor:
    """The encoder's codes [N, L, D] of photos [N, 3, R, R] in [-1, 1], resized to the encoder's input size.

    Raises ValueError if the domain has no encoder, or an encoder for another generator.
    """
    if domain.encoder is None:
        raise ValueError(
            f"domain {domain.name} has no encoder: invert without a start, or get the encoder's file "
            "(for ffhq: cfclip fetch ffhq --all)"
        )
    size = domain.encoder.image_size
    if photos.shape[-2:] != (size, size):
        photos = F.interpolate(photos, (size, size), mode="bilinear", align_corners=False, antialias=True)
    with torch.no_grad():
        w = torch.cat([domain.encoder(batch) for batch in photos.split(16)])
    _check_codes(domain.generator, w, len(photos), f"the encoder of domain {domain.name}")
    return w


def _check_codes(generator: Generator, w: Tensor, n: int, what: str) -> None:
    needed = [n, generator.num_ws, generator.w_dim]
    if list(w.shape) != needed:
        raise ValueError(f"{what} has codes of shape {list(w.shape)}, but this generator needs {needed}")


def held_out(domain: Domain, n: int, seed: int = 0) -> Tensor:
    """``n`` pictures [n, 3, R, R] for inversion, unused in training: photos of the ground truth.

    Without a ground truth they are samples of the generator, with a warning.
    """
    if domain.truth is not None:
        return domain.truth.photos(n, seed)
    warnings.warn(
        f"domain {domain.name} has no ground truth: inverting samples of its generator", stacklevel=2
    )
    return domain.pictures(domain.latents(n, "test", seed)).clamp(-1, 1)


def invert(
    domain: Domain,
    photos: Tensor,
    config: InversionConfig | None = None,
    start: Tensor | None = None,
    progress: bool = True,
) -> Inversion:
    """Invert aligned ``photos`` [N, 3, R, R] in [-1, 1], each independently of the others.

    ``start``: codes [N, L, D], e.g. from :func:`encode`; default: the centre of W. Raises ValueError for
    wrong shapes or values, and if ``config`` needs a perceptual distance that the domain does not have.
    """
    config, g, r = config or InversionConfig(), domain.generator, domain.generator.resolution
    if photos.shape[1:] != (3, r, r) or not len(photos):
        needed = f"[N, 3, {r}, {r}] for this generator, not {list(photos.shape)}"
        raise ValueError(f"photos must be {needed}: see cfclip.align.load_photo")
    if not photos.isfinite().all() or photos.abs().max() > 1.01:
        raise ValueError("photos must be finite and in [-1, 1]: see cfclip.align.load_photo")
    photos = photos.to(domain.device, torch.float32)
    if start is not None:
        _check_codes(g, start, len(photos), "start")
    size = max(1, min(64, 16 * 256**2 // r**2))  # a picture of 1024 x 1024 with its gradients takes 3 GB
    parts = []
    for first in range(0, len(photos), size):
        rows = slice(first, first + size)
        begin = None if start is None else start[rows].to(photos)
        parts.append(_invert(domain, photos[rows], config, begin, first, progress))
    codes, noises, images, logs = zip(*parts, strict=True)
    w_plus, images = torch.cat(codes), torch.cat(images)
    noise = tuple(map(torch.cat, zip(*noises, strict=True))) or None
    log = []
    for rows in zip(*logs, strict=True):
        weighted = [(row, len(w)) for row, w in zip(rows, codes, strict=True)]
        log.append({name: sum(row[name] * n for row, n in weighted) / len(w_plus) for name in rows[0]})
    return Inversion(w_plus, noise, images, reconstruction(domain, photos, images, w_plus), log)


def _invert(
    domain: Domain, photos: Tensor, c: InversionConfig, start: Tensor | None, first: int, progress: bool
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, list[dict[str, float]]]:
    """Codes, noise maps (none if fixed), pictures and log of a batch; first: the index of its first photo."""
    g, n, spread = domain.generator, len(photos), w_spread(domain.generator)
    distance = domain.distance() if c.perceptual else None
    if c.perceptual and distance is None:
        raise ValueError(
            f"perceptual is {c.perceptual:g}, but domain {domain.name} has no ground truth and AlexNet is "
            f"missing: download {ALEXNET_URL} to data/downloads, or set perceptual=0"
        )
    w = g.w_avg.expand(n, g.num_ws, -1) if start is None else start
    w = ((w.mean(1, keepdim=True) if c.space == "w" else w) - g.w_avg) / spread
    w = w.clone().requires_grad_()  # relative to W's centre, in units of its standard deviation
    maps = []
    if c.noise_maps and any(conv.noise_strength != 0 for conv in g.convs):
        maps = [conv.noise_const.expand(n, 1, -1, -1).clone().requires_grad_() for conv in g.convs]
    optimizer = torch.optim.Adam([w, *maps], c.lr, betas=(0.9, 0.999))
    # one random generator per photo, so that photos are independent of each other
    randoms = [torch.Generator().manual_seed(c.seed * 1_000_003 + first + k) for k in range(n)]
    w_noise = 0.0 if start is not None else c.w_noise * math.sqrt(g.w_dim)

    def codes(noise: Tensor | float = 0.0) -> Tensor:
        return (g.w_avg + spread * (w + noise)).expand(-1, g.num_ws, -1)

    def step(i: int, _: torch.Generator) -> dict[str, float]:
        t, noise = i / c.steps, 0.0
        optimizer.param_groups[0]["lr"] = c.lr * learning_rate(t)
        scale = w_noise * max(0.0, 1 - t / W_NOISE_UNTIL) ** 2
        if scale:
            noise = scale * torch.stack([torch.randn(w.shape[1:], generator=one) for one in randoms]).to(w)
        w_plus = codes(noise)
        images = g.synthesis(w_plus, maps or "const")
        terms = {"mse": MSE * (images - photos).square().mean((1, 2, 3))}
        if distance:
            terms[distance.name] = c.perceptual * distance.between(_pool(images), _pool(photos))
        if c.w_centre:
            terms["w_centre"] = c.w_centre * centre_distance(g, w_plus, spread).square()
        if maps:
            terms["noise"] = c.noise_weight * noise_autocorrelation(maps)
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.sum().backward()  # a sum, so that a photo's gradient does not depend on the batch
        optimizer.step()
        with torch.no_grad():
            for x in maps:
                x -= x.mean((1, 2, 3), keepdim=True)
                x *= x.square().mean((1, 2, 3), keepdim=True).rsqrt()
        return {"loss": loss.mean().item()} | {name: value.mean().item() for name, value in terms.items()}

    options = {"log_every": max(1, c.steps // 20), "desc": "inversion", "progress": progress}
    log = run_loop(step, c.steps, state={}, seed=c.seed, **options)
    noise = tuple(x.detach() for x in maps)
    with torch.no_grad():
        w_plus = codes().clone()
        return w_plus, noise, g.synthesis(w_plus, noise or "const"), log


def _pool(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images, PERCEPTUAL_SIZE) if images.shape[-1] > PERCEPTUAL_SIZE else images
