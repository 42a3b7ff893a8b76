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
from torch import Tensor, nn

from ..identity import Unit
from ..reporting import half_width
from ..stylegan2 import Generator
from ..training import fit, settled
from .factors import sample_face
from .gan import to_tensor
from .render import render_image


class ToonEncoder(nn.Module):
    """Photos [N, 3, S, S] in [-1, 1] -> W+ [N, L, D]: ``w_l = w_avg + s (base + offset_l)``, offset_0 = 0.

    Args:
        image_size: S, a multiple of 2^stages.
        num_ws, w_dim: L and D.
        stages: (in, out, units) per stage of the IR-SE body; each starts with stride 2.
        width: of the code that base and offsets are read off.
    """

    def __init__(self, image_size: int, num_ws: int, w_dim: int, stages: Sequence[Sequence[int]], width: int):
        super().__init__()
        self.image_size, self.num_ws, self.w_dim = image_size, num_ws, w_dim
        self.stages, self.width = tuple(map(tuple, stages)), width
        first, last, side = stages[0][0], stages[-1][1], image_size // 2 ** len(stages)
        self.body = nn.Sequential(
            nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.PReLU(first),
            *(Unit(a if i == 0 else b, b, 2 if i == 0 else 1) for a, b, n in self.stages for i in range(n)), nn.BatchNorm2d(last))
        self.code = nn.Sequential(nn.Flatten(), nn.Linear(last * side * side, width), nn.PReLU(width))
        self.base, self.offsets = nn.Linear(width, w_dim), nn.Linear(width, (num_ws - 1) * w_dim)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)
        self.register_buffer("w_avg", torch.zeros(w_dim))
        self.register_buffer("w_spread", torch.ones(()))

    @property
    def metadata(self) -> dict:
        return {"image_size": self.image_size, "num_ws": self.num_ws, "w_dim": self.w_dim, "stages": [list(s) for s in self.stages], "width": self.width}

    def fits(self, generator: Generator) -> bool:
        """Whether it was trained for this generator: its centre of W is the generator's, to the digits of float16."""
        return (self.num_ws, self.w_dim) == (generator.num_ws, generator.w_dim) and torch.allclose(
            self.w_avg, generator.w_avg, rtol=2e-3, atol=1e-3 * self.w_spread.item())

    def forward(self, images: Tensor) -> Tensor:
        return self.unlocked(images, self.num_ws)[0]

    def unlocked(self, images: Tensor, layers: int) -> tuple[Tensor, Tensor]:
        """-> W+ [N, L, D] with the offsets of the first ``layers`` layers only, and the offsets [N, L - 1, D] in units of s."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"the encoder takes photos of shape [N, 3, {self.image_size}, {self.image_size}], not {list(images.shape)}: resize them first")
        code = self.code(self.body(images))
        offsets = self.offsets(code).reshape(len(images), self.num_ws - 1, self.w_dim)
        offsets = offsets * (torch.arange(1, self.num_ws, device=images.device) < layers)[:, None]
        w = self.base(code)[:, None] + torch.cat([torch.zeros_like(offsets[:, :1]), offsets], 1)
        return self.w_avg + self.w_spread * w, offsets


@dataclass(frozen=True)
class EncoderConfig:
    """How the encoder was trained."""

    stages: tuple[tuple[int, int, int], ...] = ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 2))
    width: int = 128
    batch: int = 16             # generator samples, and as many natural renders
    steps: int = 6000
    lr: float = 2e-3
    w_weight: float = 1.0       # squared error of w on samples, in units of W's variance
    pixel_weight: float = 5.0   # squared error of the pictures, on renders
    feature_weight: float = 2.0  # distance on the readout's encoder, on renders
    delta_weight: float = 0.02  # of the squared offsets
    unlock: tuple[float, float] = (0.2, 0.5)  # shares of the steps between which the layers' offsets are unlocked one by one
    seed: int = 0
    dtype: str = "auto"         # of the convolutions: autocast of the encoder, and the generator's own


def unlocked_layers(config: EncoderConfig, step: int, num_ws: int) -> int:
    """How many layers may differ from the base at ``step``, counting the base itself: 1 … ``num_ws``."""
    first, last = (share * config.steps for share in config.unlock)
    return 1 + int(np.clip((step - first) / max(last - first, 1), 0, 1) * (num_ws - 1))


def train(config: EncoderConfig, out: Path, domain=None) -> ToonEncoder:
    """Train (or go on training) in ``out`` for ``domain`` (default: toonfaces); returns the encoder in eval mode."""
    from ..domains import load_domain
    from ..inversion import w_spread
    from ..metrics import readout_distance
    domain, config = domain or load_domain("toonfaces"), settled(config, out=out)
    g, spread = domain.generator, w_spread(domain.generator)
    torch.manual_seed(config.seed)
    model = ToonEncoder(g.resolution, g.num_ws, g.w_dim, config.stages, config.width).train()
    model.w_avg.copy_(g.w_avg)
    model.w_spread.fill_(spread)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)
    half = None if config.dtype == "float32" else getattr(torch, config.dtype)

    def step(i: int) -> dict[str, float]:
        with torch.no_grad():
            w = g.map_one(torch.randn(config.batch, g.z_dim))[:, None].expand(-1, g.num_ws, -1)
            samples = g.synthesis(w, dtype=half).clamp(-1, 1)
        renders = to_tensor([render_image(sample_face((config.seed, 7, i, k)), g.resolution) for k in range(config.batch)])
        photos = torch.cat([samples, renders]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", half, enabled=half is not None):
            guess, offsets = (x.float() for x in model.unlocked(photos, unlocked_layers(config, i, g.num_ws)))
        images = g.synthesis(guess[config.batch:], dtype=half)
        terms = {"w": config.w_weight * (guess[:config.batch] - w).square().mean() / spread ** 2,
                 "pixel": config.pixel_weight * F.mse_loss(images, renders),
                 "feature": config.feature_weight * readout_distance(domain.readout, images, renders).mean(),
                 "delta": config.delta_weight * offsets.square().sum((1, 2)).mean() / g.w_dim}
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        schedule.step()
        return {name: value.item() for name, value in terms.items()}

    fit(step, config.steps, state={"model": model, "optimizer": optimizer, "schedule": schedule}, out=out, seed=config.seed,
        checkpoint_every=250, desc="encoder")
    return model.eval()


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t); the half-width of one value is NaN."""
    return float(np.mean(values)), half_width(values)


def refinement(domain, n: int = 64, steps: int = 100, seed: int = 1) -> list[dict]:
    """Reconstruction of ``n`` held-out renders: the encoder alone, refined by ``steps`` of optimisation, and as many from W's centre."""
    from ..inversion import InversionConfig, encode, held_out, invert
    photos = held_out(domain, n, seed)
    start = encode(domain, photos)
    found: dict[str, list[Mapping[str, float]]] = {
        "encoder": invert(domain, photos, InversionConfig(steps=0), start, progress=False).metrics,
        f"encoder, then {steps} steps": invert(domain, photos, InversionConfig(steps=steps), start, progress=False).metrics,
        f"W's centre, then {steps} steps": invert(domain, photos, InversionConfig(steps=steps), progress=False).metrics}
    rows = []
    for what, measured in found.items():
        row = {"start": what, "n": n}
        for name in measured[0]:
            mean, half = mean_interval([one[name] for one in measured])
            row[name] = f"{mean:.3f} ± {half:.3f}"
        rows.append(row)
    return rows
