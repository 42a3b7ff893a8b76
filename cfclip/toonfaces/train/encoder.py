"""Trains the embedded encoder, photo -> W+: e4e's idea ("Designing an Encoder for StyleGAN Image Manipulation", Tov et al. 2021), small.

One w for all layers, and an offset per layer that is unlocked layer by layer (progressive training) and kept short (delta
regularisation). e4e's feature pyramid and its latent discriminator are left away: the truth is known for generator samples,
and holds the codes in W instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cfclip.domain import Domain
from cfclip.evaluation.stats import half_width
from cfclip.images import to_tensor
from cfclip.inversion.projector import InversionConfig, encode, held_out, invert, w_spread
from cfclip.method.loop import resolve_dtype, run_loop, with_global_seed
from cfclip.models.perceptual import feature_distance
from cfclip.settings import Settings
from cfclip.toonfaces.domain import load_toonfaces
from cfclip.toonfaces.encoder import ToonEncoder
from cfclip.toonfaces.factors import sample_face
from cfclip.toonfaces.render import render_image


@dataclass(frozen=True)
class EncoderConfig(Settings):
    """How the encoder was trained."""

    stages: tuple[tuple[int, int, int], ...] = ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 2))
    width: int = 128
    batch: int = 16  # generator samples, and as many natural renders
    steps: int = 6000
    lr: float = 2e-3
    w_weight: float = 1.0  # squared error of w on samples, in units of W's variance
    pixel_weight: float = 5.0  # squared error of the pictures, on renders
    feature_weight: float = 2.0  # distance on the readout's encoder, on renders
    delta_weight: float = 0.02  # of the squared offsets
    unlock: tuple[float, float] = (
        0.2,
        0.5,
    )  # shares of the steps between which the layers' offsets are unlocked one by one
    seed: int = 0
    dtype: str = "auto"  # of the convolutions: autocast of the encoder, and the generator's own


def unlocked_layers(config: EncoderConfig, step: int, num_ws: int) -> int:
    """How many layers may differ from the base at ``step``, counting the base itself: 1 … ``num_ws``."""
    first, last = (share * config.steps for share in config.unlock)
    return 1 + int(np.clip((step - first) / max(last - first, 1), 0, 1) * (num_ws - 1))


def train(config: EncoderConfig, out: Path, domain: Domain | None = None) -> ToonEncoder:
    """Train (or go on training) in ``out`` for ``domain`` (default: toonfaces); returns the encoder in eval mode."""
    domain = domain or load_toonfaces()
    dtype = getattr(torch, resolve_dtype(config.dtype, "cpu"))
    g, spread = domain.generator, w_spread(domain.generator)
    torch.manual_seed(config.seed)
    model = ToonEncoder(g.resolution, g.num_ws, g.w_dim, config.stages, config.width).train()
    model.w_avg.copy_(g.w_avg)
    model.w_spread.fill_(spread)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)
    half = None if dtype == torch.float32 else dtype
    features = domain.truth.features

    def step(i: int) -> dict[str, float]:
        with torch.no_grad():
            w = g.map_one(torch.randn(config.batch, g.z_dim))[:, None].expand(-1, g.num_ws, -1)
            samples = g.synthesis(w, dtype=half).clamp(-1, 1)
        renders = to_tensor([
            render_image(sample_face((config.seed, 7, i, k)), g.resolution) for k in range(config.batch)
        ])
        photos = torch.cat([samples, renders]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", half, enabled=half is not None):
            guess, offsets = (x.float() for x in model.unlocked(photos, unlocked_layers(config, i, g.num_ws)))
        images = g.synthesis(guess[config.batch :], dtype=half)
        terms = {
            "w": config.w_weight * (guess[: config.batch] - w).square().mean() / spread**2,
            "pixel": config.pixel_weight * F.mse_loss(images, renders),
            "feature": config.feature_weight * feature_distance(features(images), features(renders)).mean(),
            "delta": config.delta_weight * offsets.square().sum((1, 2)).mean() / g.w_dim,
        }
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        schedule.step()
        return {name: value.item() for name, value in terms.items()}

    run_loop(
        with_global_seed(step),
        config.steps,
        state={"model": model, "optimizer": optimizer, "schedule": schedule},
        out=out,
        seed=config.seed,
        checkpoint_every=250,
        desc="encoder",
    )
    return model.eval()


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t); the half-width of one value is NaN."""
    return float(np.mean(values)), half_width(values)


def refinement(domain: Domain, n: int = 64, steps: int = 100, seed: int = 1) -> list[dict]:
    """Reconstruction of ``n`` held-out renders: the encoder alone, refined by ``steps`` of optimisation, and as many from W's centre."""
    photos = held_out(domain, n, seed)
    start = encode(domain, photos)
    found: dict[str, list[Mapping[str, float]]] = {
        "encoder": invert(domain, photos, InversionConfig(steps=0), start, progress=False).metrics,
        f"encoder, then {steps} steps": invert(
            domain, photos, InversionConfig(steps=steps), start, progress=False
        ).metrics,
        f"W's centre, then {steps} steps": invert(
            domain, photos, InversionConfig(steps=steps), progress=False
        ).metrics,
    }
    rows = []
    for what, measured in found.items():
        row = {"start": what, "n": n}
        for name in measured[0]:
            mean, half = mean_interval([one[name] for one in measured])
            row[name] = f"{mean:.3f} ± {half:.3f}"
        rows.append(row)
    return rows
