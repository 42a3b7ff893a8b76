"""Trains the embedded generator: StyleGAN2's discriminator and losses, on natural toon faces only."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import bias_act, setup_filter
from ..stylegan2 import EqualLinear, Generator
from ..training import Callback, fit
from .factors import sample_face
from .render import render_image


@dataclass(frozen=True)
class GANConfig:
    """How the generator was trained (StyleGAN2-ADA's defaults where not said otherwise)."""

    resolution: int = 64
    channels: tuple[int, ...] = (128, 128, 128, 64, 32)  # generator, 4 … 64
    d_channels: tuple[int, ...] = (128, 128, 128, 64, 32)
    w_dim: int = 128            # = z_dim
    mapping_layers: int = 4
    batch: int = 16
    steps: int = 10_000
    lr: float = 0.0025
    r1_gamma: float = 0.1       # on every r1_every-th step, weighted accordingly
    r1_every: int = 16
    mixing: float = 0.9         # probability of style mixing
    ema_images: int = 10_000    # half-life of the averaged generator
    seed: int = 0
    dtype: str = "bfloat16"     # of the convolutions; R1 and the RGB sums stay float32


class EqualConv(nn.Module):
    """3x3 or 1x1 convolution with run-time weight scaling, optional box-filtered down-sampling by 2, bias and leaky ReLU."""

    def __init__(self, in_ch: int, out_ch: int, kernel: int, down: bool = False, activate: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_ch, in_ch, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_ch)) if activate else None
        self.scale, self.down, self.activate = 1 / math.sqrt(in_ch * kernel ** 2), down, activate
        self.register_buffer("fir", setup_filter((1, 1)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight, k = (self.weight * self.scale), self.weight.shape[-1]
        if self.down:                                              # box filter and strided convolution as one kernel of k + 1
            o, i = weight.shape[:2]
            weight = F.conv2d(weight.reshape(o * i, 1, k, k), self.fir[None, None], padding=1).reshape(o, i, k + 1, k + 1)
            x = F.conv2d(x, weight.to(x.dtype), stride=2, padding=k // 2)
        else:
            x = F.conv2d(x, weight.to(x.dtype), padding=k // 2)
        return bias_act(x, self.bias) if self.activate else x


class Discriminator(nn.Module):
    """StyleGAN2's residual discriminator with minibatch standard deviation. Images [N, 3, R, R] -> logits [N]."""

    def __init__(self, resolution: int, channels: tuple[int, ...]):
        super().__init__()
        top = list(reversed(channels))                             # R … 4
        self.from_rgb = EqualConv(3, top[0], 1)
        self.blocks = nn.ModuleList(
            nn.ModuleList([EqualConv(a, a, 3), EqualConv(a, b, 3, down=True), EqualConv(a, b, 1, down=True, activate=False)])
            for a, b in zip(top, top[1:], strict=False))
        self.final = EqualConv(top[-1] + 1, top[-1], 3)
        self.fc = nn.Sequential(EqualLinear(top[-1] * 16, top[-1], activate=True), EqualLinear(top[-1], 1))

    def forward(self, image: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        x = self.from_rgb(image.to(dtype).contiguous(memory_format=torch.channels_last))
        for conv0, conv1, skip in self.blocks:
            x = (conv1(conv0(x)) + skip(x)) * math.sqrt(0.5)
        x = x.float()
        n, _, h, w = x.shape
        group = min(4, n)
        std = (x.reshape(group, -1, *x.shape[1:]).var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
        x = torch.cat([x, std.repeat(group).reshape(n, 1, 1, 1).expand(-1, -1, h, w)], 1)
        return self.fc(self.final(x).flatten(1)).squeeze(1)


def to_tensor(images: list[np.ndarray]) -> Tensor:
    """uint8 [R, R, 3] pictures -> float32 [N, 3, R, R] in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


class GANTraining:
    """Generator, discriminator, EMA and one training step."""

    def __init__(self, config: GANConfig):
        torch.manual_seed(config.seed)
        self.config, self.dtype = config, getattr(torch, config.dtype)
        self.g = Generator(config.resolution, config.channels, config.w_dim, config.w_dim, config.mapping_layers)
        self.d = Discriminator(config.resolution, config.d_channels)
        self.ema = copy.deepcopy(self.g).eval().requires_grad_(False)
        self.opt_g = torch.optim.Adam(self.g.parameters(), config.lr, betas=(0.0, 0.99), eps=1e-8)
        lazy = config.r1_every / (config.r1_every + 1)
        self.opt_d = torch.optim.Adam(self.d.parameters(), config.lr * lazy, betas=(0.0, 0.99 ** lazy), eps=1e-8)

    @property
    def state(self) -> dict:
        return {"g": self.g, "d": self.d, "ema": self.ema, "opt_g": self.opt_g, "opt_d": self.opt_d}

    def _reals(self, step: int) -> Tensor:
        c = self.config
        return to_tensor([render_image(sample_face((c.seed, step, k)), c.resolution) for k in range(c.batch)])

    def _fakes(self) -> Tensor:
        c, g = self.config, self.g
        w = g.map_one(torch.randn(2 * c.batch, c.w_dim))
        g.w_avg.lerp_(w.detach().mean(0), 0.005)
        w, other = w.chunk(2)
        layer = torch.arange(g.num_ws)[None, :, None]
        cut = torch.randint(1, g.num_ws, (c.batch, 1, 1)).where(torch.rand(c.batch, 1, 1) < c.mixing, torch.tensor(g.num_ws))
        return g.synthesis(torch.where(layer < cut, w[:, None], other[:, None]), "random", self.dtype)

    def step(self, i: int) -> dict[str, float]:
        c = self.config
        self.d.requires_grad_(False)
        fakes = self._fakes()
        loss_g = F.softplus(-self.d(fakes, self.dtype)).mean()
        self.opt_g.zero_grad()
        loss_g.backward()
        self.opt_g.step()

        self.d.requires_grad_(True)
        reals = self._reals(i)
        logits_real, logits_fake = self.d(reals, self.dtype), self.d(fakes.detach(), self.dtype)  # one forward of G serves both
        loss_d = F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()
        if i % c.r1_every == 0:
            reals.requires_grad_(True)
            grad, = torch.autograd.grad(self.d(reals).sum(), reals, create_graph=True)
            loss_d = loss_d + grad.square().sum((1, 2, 3)).mean() * (0.5 * c.r1_gamma * c.r1_every)
        self.opt_d.zero_grad()
        loss_d.backward()
        self.opt_d.step()

        images = (i + 1) * c.batch
        decay = 0.5 ** (c.batch / min(c.ema_images, 0.05 * images + 1e-8))
        with torch.no_grad():
            for averaged, live in zip(self.ema.parameters(), self.g.parameters(), strict=True):
                averaged.lerp_(live, 1 - decay)
            for averaged, live in zip(self.ema.buffers(), self.g.buffers(), strict=True):
                averaged.copy_(live)
        return {"loss_g": loss_g.item(), "loss_d": loss_d.item(), "real": logits_real.detach().sign().mean().item(),
                "fake": logits_fake.detach().sign().mean().item()}


def sample_grid(generator: Generator, rows: int = 8, columns: int = 8, seed: int = 1, truncation: float = 1.0) -> np.ndarray:
    """Uncurated samples as one uint8 picture [rows * R, columns * R, 3]."""
    z = torch.randn(rows * columns, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        images = generator.synthesis(generator.mapping(z, truncation))
    images = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    r = generator.resolution
    return images.reshape(rows, columns, 3, r, r).permute(0, 3, 1, 4, 2).reshape(rows * r, columns * r, 3).numpy()


def train(config: GANConfig, out: Path, preview_every: int = 250) -> Generator:
    """Train (or go on training) in ``out``; returns the averaged generator. Sample grids land in ``out/samples``."""
    from PIL import Image

    training = GANTraining(config)
    (out / "samples").mkdir(parents=True, exist_ok=True)

    def preview(step: int) -> None:
        Image.fromarray(sample_grid(training.ema)).save(out / "samples" / f"{step:06d}.png")

    fit(training.step, config.steps, state=training.state, out=out, seed=config.seed, checkpoint_every=500,
        callbacks=[Callback(preview_every, preview)], desc="generator")
    return training.ema
