"""Trains the embedded encoder, photo -> W+: a small e4e (Tov et al. 2021, arXiv:2102.02766).

It predicts one w for all layers, and an offset per layer. Offsets are unlocked layer by layer (progressive
training) and kept short (delta regularisation). e4e's feature pyramid and latent discriminator are left out:
the true codes of generator samples are known, and the loss on them keeps the codes in W instead.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.domain import Domain, fingerprint
from cfclip.evaluation.stats import half_width
from cfclip.inversion.projector import InversionConfig, encode, held_out, invert, w_spread
from cfclip.method.config import DTYPES
from cfclip.method.loop import resolve_dtype
from cfclip.models.perceptual import feature_distance
from cfclip.settings import Settings, batch_size, int_at_least, number, one_of, seed_number, setting
from cfclip.toonfaces.domain import load_toonfaces
from cfclip.toonfaces.encoder import ToonEncoder
from cfclip.toonfaces.train.pool import Pool
from cfclip.toonfaces.train.run import run_by_adamw, seeded, stages


def shares(value: Any) -> str | None:
    """The check of ``unlock``."""
    fine = isinstance(value, tuple) and len(value) == 2 and 0 <= value[0] <= value[1] <= 1
    return None if fine else "two rising numbers from 0 to 1"


@dataclass(frozen=True)
class EncoderConfig(Settings):
    """How the encoder is trained."""

    stages: tuple[tuple[int, int, int], ...] = setting(
        ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 2)), stages
    )
    width: int = setting(128, int_at_least(1))
    pool: int = setting(10_000, int_at_least(1))  # natural shapes
    batch: int = setting(16, batch_size)  # generator samples, and as many natural renders
    steps: int = setting(2000, int_at_least(1))
    lr: float = setting(2e-3, number(above=True))
    w_weight: float = setting(1.0, number())  # squared error of w on samples, in units of W's variance
    pixel_weight: float = setting(5.0, number())  # squared error of the pictures, on renders
    feature_weight: float = setting(2.0, number())  # distance on the readout's encoder, on renders
    delta_weight: float = setting(0.02, number())  # of the squared offsets
    # the offsets of the layers are unlocked one by one between these shares of the steps
    unlock: tuple[float, float] = setting((0.2, 0.5), shares)
    seed: int = setting(0, seed_number)
    dtype: str = setting("auto", one_of(DTYPES))  # of the encoder's and the generator's convolutions


def unlocked_layers(config: EncoderConfig, step: int, num_ws: int) -> int:
    """How many layers are unlocked at ``step``, 1 … ``num_ws``; the first one never has an offset."""
    first, last = (share * config.steps for share in config.unlock)
    return 1 + int(np.clip((step - first) / max(last - first, 1), 0, 1) * (num_ws - 1))


def trained_for(domain: Domain) -> dict[str, str]:
    """Fingerprints of the generator and the readout; an encoder belongs to these two networks."""
    return {"generator": domain.fingerprints["generator"], "readout": fingerprint(domain.truth.readout)}


def train(
    config: EncoderConfig, out: Path, device: torch.device | str = "cpu", domain: Domain | None = None
) -> ToonEncoder:
    """Train for ``domain`` (default: toonfaces), or resume in ``out``; returns the encoder in eval mode."""
    device = torch.device(device)
    domain = (domain or load_toonfaces()).to(device)
    dtype = getattr(torch, resolve_dtype(config.dtype, device))
    g, spread = domain.generator, w_spread(domain.generator)
    with seeded(config.seed):
        model = ToonEncoder(g.resolution, g.num_ws, g.w_dim, config.stages, config.width).train()
    model.w_avg.copy_(g.w_avg)
    model.w_spread.fill_(spread)
    model = model.to(device, memory_format=torch.channels_last)
    half = None if dtype == torch.float32 else dtype
    features = domain.truth.features
    pool = Pool((config.seed, 7), config.pool, resolution=g.resolution, device=device)

    def loss(i: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        z = torch.randn(config.batch, g.z_dim, generator=generator).to(device)
        with torch.no_grad():
            w = g.map_one(z)[:, None].expand(-1, g.num_ws, -1)
            samples = g.synthesis(w, dtype=half).clamp(-1, 1)
        shapes, colours = (pool.draw(config.batch, generator) for _ in range(2))
        renders = pool.paint(shapes, colours)
        photos = torch.cat([samples, renders]).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, half, enabled=half is not None):
            layers = unlocked_layers(config, i, g.num_ws)
            guess, offsets = (x.float() for x in model.unlocked(photos, layers))
        images = g.synthesis(guess[config.batch :], dtype=half)
        terms = {
            "w": config.w_weight * (guess[: config.batch] - w).square().mean() / spread**2,
            "pixel": config.pixel_weight * F.mse_loss(images, renders),
            "feature": config.feature_weight * feature_distance(features(images), features(renders)).mean(),
            "delta": config.delta_weight * offsets.square().sum((1, 2)).mean() / g.w_dim,
        }
        return sum(terms.values()), terms

    run_by_adamw("encoder", loss, config, {"model": model}, out, **trained_for(domain))
    return model.eval()


def refinement(domain: Domain, n: int = 64, steps: int = 100, seed: int = 1) -> list[dict]:
    """Reconstruction of ``n`` held-out renders from three starts: means and half-widths of 95 % intervals.

    The encoder alone, the encoder refined by ``steps`` of optimisation, and as many steps from the centre of
    W.
    """
    photos = held_out(domain, n, seed)
    start = encode(domain, photos)
    rows = []
    for name, taken, begin in (
        ("encoder", 0, start),
        (f"encoder, then {steps} steps", steps, start),
        (f"W's centre, then {steps} steps", steps, None),
    ):
        measured = invert(domain, photos, InversionConfig(steps=taken), begin, progress=False).metrics
        row = {"start": name, "n": n}
        for metric in measured[0]:
            values = [one[metric] for one in measured]
            row[metric] = f"{np.mean(values):.3f} ± {half_width(values):.3f}"
        rows.append(row)
    return rows
