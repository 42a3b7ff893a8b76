"""Trains the embedded generator: StyleGAN2's discriminator and losses, on natural toon faces only."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..ops import bias_act, setup_filter
from ..stylegan2 import EqualLinear, Generator, pixel_norm
from ..training import Callback, atomic_save, fit, settled
from .factors import LATENT_DRAWS, LatentDraws, factor_vector, independent_colours, repainted, sample_face
from .render import MASKS, render, render_image


@dataclass(frozen=True)
class GANConfig:
    """How the generator was trained (StyleGAN2-ADA's defaults where not said otherwise)."""

    resolution: int = 64
    channels: tuple[int, ...] = (128, 128, 128, 128, 96)  # generator, 4 … 64
    d_channels: tuple[int, ...] = (128, 128, 128, 64, 32)
    w_dim: int = 128            # = z_dim
    mapping_layers: int = 8
    w_std: float = 0.25         # of the codes: at 1 the styles are all noise to a young generator, and 400 steps got a third less far
    colouring: int = 4          # the first layer that colours: those before it draw, see GANTraining.warm_step
    map_steps: int = 8000       # of regression of the mapping network, see GANTraining.map_step
    map_pool: int = 30_000
    map_batch: int = 512
    map_lr: float = 10.0        # the mapping network's own lr_mul is 0.01; at 0.3 it was left with ten times the error
    warm_steps: int = 5000      # of regression before the adversarial training
    warm_batch: int = 8
    warm_lr: float = 0.05       # at 0.01 it took thrice as long, at 0.16 it diverged
    small_parts: float = 6.0    # weight of a pixel of SMALL_PARTS in the regression error, 1 for the others
    steps: int = 1200
    batch: int = 16             # of the adversarial training
    lr: float = 0.001
    anchor: float = 10.0        # weight of the regression error beside the adversarial loss
    r1_gamma: float = 1.0       # on every r1_every-th step, weighted accordingly
    r1_every: int = 16
    mixing: float = 0.5         # share of adversarial samples with the shapes of one face and the colours of another
    ema_images: int = 5_000    # half-life of the averaged generator
    seed: int = 0
    dtype: str = "auto"         # of the convolutions; R1 and the RGB sums stay float32

    def __post_init__(self):
        if self.w_dim < LATENT_DRAWS:
            raise ValueError(f"w_dim (= z_dim) must be at least {LATENT_DRAWS}, one number per factor of a face, not {self.w_dim}")


SMALL_PARTS = ("eyebrows", "eyes", "eye_white", "pupil", "lipstick", "mouth", "glasses")
"""A twentieth of the picture: an unweighted error leaves them soft for very long."""


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
            for a, b in pairwise(top))
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


def to_tensor(images: Sequence[np.ndarray] | np.ndarray) -> Tensor:
    """uint8 [R, R, 3] pictures -> float32 [N, 3, R, R] in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


class FactorsToW(nn.Module):
    """The w that stands for a factor vector: every factor at mean 0 and variance 1 over ``faces`` [N, F], turned at random; ``std`` wide.

    So no factor is small in W, and the mapping network can be taught what W holds before any picture is drawn.
    """

    def __init__(self, faces: Tensor, w_dim: int, std: float, seed: int):
        super().__init__()
        turn = torch.linalg.qr(torch.randn(w_dim, faces.shape[1], generator=torch.Generator().manual_seed(seed)))[0]
        self.register_buffer("mean", faces.mean(0))
        self.register_buffer("turn", turn.T * std * math.sqrt(w_dim / faces.shape[1]) / faces.std(0)[:, None])     # [F, D]

    def forward(self, factors: Tensor) -> Tensor:
        return (factors - self.mean) @ self.turn

    def factors(self, w: Tensor) -> Tensor:
        """The factors that ``w`` [N, D] stands for."""
        return w @ torch.linalg.pinv(self.turn) + self.mean


class GANTraining:
    """Generator, discriminator, EMA and the three kinds of training steps."""

    def __init__(self, config: GANConfig):
        torch.manual_seed(config.seed)
        self.config, self.dtype = config, getattr(torch, config.dtype)
        self.g = Generator(config.resolution, config.channels, config.w_dim, config.w_dim, config.mapping_layers)
        self.d = Discriminator(config.resolution, config.d_channels)
        self.z = torch.randn(config.map_pool, config.w_dim, generator=torch.Generator().manual_seed(config.seed))
        people = (sample_face(LatentDraws(code)) for code in tqdm(pixel_norm(self.z).double().numpy(), "faces", leave=False))
        factors = torch.from_numpy(np.stack([factor_vector(face) for face in people]))
        self.factors_to_w = FactorsToW(factors, config.w_dim, config.w_std, config.seed)
        self.w = self.factors_to_w(factors)                        # what z stands for
        self.ema = copy.deepcopy(self.g).eval().requires_grad_(False)
        synthesis = [p for name, p in self.g.named_parameters() if not name.startswith("style.")]
        self.opt_warm = torch.optim.Adam(synthesis, betas=(0.9, 0.99))
        self.opt_map = torch.optim.Adam(self.g.style.parameters(), betas=(0.9, 0.99))
        self.opt_g = torch.optim.Adam(synthesis, config.lr, betas=(0.0, 0.99), eps=1e-8)
        lazy = config.r1_every / (config.r1_every + 1)
        self.opt_d = torch.optim.Adam(self.d.parameters(), config.lr * lazy, betas=(0.0, 0.99 ** lazy), eps=1e-8)

    @property
    def state(self) -> dict:
        return {"g": self.g, "d": self.d, "ema": self.ema, "opt_g": self.opt_g, "opt_d": self.opt_d, "opt_warm": self.opt_warm,
                "opt_map": self.opt_map}

    def load(self, state: dict) -> None:
        """Take up ``state``, as a checkpoint holds it."""
        for name, thing in self.state.items():
            thing.load_state_dict(state[name])

    def map_step(self, i: int) -> dict[str, float]:
        """One step of regression of the mapping network: from z to the w of the face that it stands for, in units of ``w_std``.

        Most of what is left unexplained is at z's corners, one hair colour beside another: what lies between is natural too, see NATURAL.
        """
        c = self.config
        self.opt_map.param_groups[0]["lr"] = c.map_lr * min(1.0, (i + 1) / 50, 1.1 - i / c.map_steps)
        batch = torch.randint(len(self.z), (c.map_batch,))
        loss = ((self.g.map_one(self.z[batch]) - self.w[batch]) / c.w_std).square().mean()
        self.opt_map.zero_grad()
        loss.backward()
        self.opt_map.step()
        self._average(math.inf)
        return {"unexplained": loss.item()}

    def _mixed(self, shapes: Tensor, colours: Tensor) -> Tensor:
        """W+ with the shapes of one w [N, D] and the colours of another."""
        layers = torch.arange(self.g.num_ws)[None, :, None]
        return torch.where(layers < self.config.colouring, shapes[:, None], colours[:, None])

    def _regression(self, n: int, seed: tuple[int, ...]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """W+ [n, L, D] with the shapes of one natural face and the colours of another, and the error of pictures made from them.

        The error is the mean one of pictures and of their gradients; small parts weigh more.
        """
        rng = np.random.default_rng(seed)
        shapes, others = ([sample_face((*seed, role, k)) for k in range(n)] for role in (0, 1))
        colours = [independent_colours(face, rng) for face in others]
        drawn = [render(repainted(*pair), self.config.resolution) for pair in zip(shapes, colours, strict=True)]
        target = to_tensor([one.image for one in drawn])
        small = torch.from_numpy(np.stack([one.masks[[MASKS.index(part) for part in SMALL_PARTS]].sum(0) for one in drawn]))[:, None]
        weight = 1 + (self.config.small_parts - 1) * small

        def error(images: Tensor) -> Tensor:
            wrong = images - target
            return sum((e.abs() * weight[..., :e.shape[2], :e.shape[3]]).mean() * k
                       for e, k in ((wrong, 1), (wrong.diff(dim=2), 0.5), (wrong.diff(dim=3), 0.5))) / weight.mean()

        w = (self.factors_to_w(torch.from_numpy(np.stack([factor_vector(face) for face in faces]))) for faces in (shapes, colours))
        return self._mixed(*w), error

    def warm_step(self, i: int) -> dict[str, float]:
        """One step of regression: the synthesis network learns to draw a face from the w that stands for it (:class:`FactorsToW`).

        The layers before ``colouring`` are given one face and the others another, and the picture to draw has the shapes of the first and the
        colours of the second: so what colours is what those layers say, by construction. Without noise: toon faces have no stochastic detail,
        and a young generator hides behind it. A purely adversarial start took many times as long on a CPU.
        """
        c = self.config
        self.opt_warm.param_groups[0]["lr"] = c.warm_lr * min(1.0, (i + 1) / 200, 1.1 - i / c.warm_steps)
        w, error = self._regression(c.warm_batch, (c.seed, 1, i))
        loss = error(self.g.synthesis(w, "none", self.dtype))
        self.opt_warm.zero_grad()
        loss.backward()
        self.opt_warm.step()
        self._average(c.warm_batch * (i + 1))
        return {"error": loss.item()}

    def _average(self, images: float) -> None:
        """The averaged generator after ``images`` pictures."""
        decay = 0.5 ** (self.config.batch / min(self.config.ema_images, 0.05 * images + 1e-8))
        with torch.no_grad():
            for averaged, live in zip(self.ema.parameters(), self.g.parameters(), strict=True):
                averaged.lerp_(live, 1 - decay)
            for averaged, live in zip(self.ema.buffers(), self.g.buffers(), strict=True):
                averaged.copy_(live)

    def step(self, i: int) -> dict[str, float]:
        """One step of StyleGAN2's adversarial training of the synthesis network: logistic loss, lazy R1; regression stays as an anchor."""
        c, half = self.config, self.config.batch // 2
        w, error = self._regression(half, (c.seed, 2, i))
        with torch.no_grad():
            one, other = self.g.map_one(torch.randn(2 * half, c.w_dim)).chunk(2)
            sampled = self._mixed(one, other.where(torch.rand(half, 1) < c.mixing, one))
        self.d.requires_grad_(False)
        drawn, fakes = self.g.synthesis(torch.cat([w, sampled]), "none", self.dtype).split(half)
        loss_g, wrong = F.softplus(-self.d(fakes, self.dtype)).mean(), error(drawn)
        self.opt_g.zero_grad()
        (loss_g + c.anchor * wrong).backward()
        self.opt_g.step()

        self.d.requires_grad_(True)
        reals = to_tensor([render_image(sample_face((c.seed, 3, i, k)), c.resolution) for k in range(half)])
        logits_real, logits_fake = self.d(reals, self.dtype), self.d(fakes.detach(), self.dtype)  # one forward of G serves both
        loss_d = F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()
        if i % c.r1_every == 0:
            reals.requires_grad_(True)
            grad, = torch.autograd.grad(self.d(reals).sum(), reals, create_graph=True)
            loss_d = loss_d + grad.square().sum((1, 2, 3)).mean() * (0.5 * c.r1_gamma * c.r1_every)
        self.opt_d.zero_grad()
        loss_d.backward()
        self.opt_d.step()

        self._average(math.inf)
        return {"loss_g": loss_g.item(), "error": wrong.item(), "loss_d": loss_d.item(), "real": logits_real.detach().sign().mean().item(),
                "fake": logits_fake.detach().sign().mean().item()}


def sample_grid(generator: Generator, rows: int = 8, columns: int = 8, seed: int = 1, truncation: float = 1.0) -> np.ndarray:
    """Uncurated samples as one uint8 picture [rows * R, columns * R, 3]."""
    z = torch.randn(rows * columns, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        images = generator.synthesis(generator.mapping(z, truncation))
    images = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    r = generator.resolution
    return images.reshape(rows, columns, 3, r, r).permute(0, 3, 1, 4, 2).reshape(rows * r, columns * r, 3).numpy()


def save_grid(generator: Generator, path: Path) -> None:
    """:func:`sample_grid` as a PNG."""
    atomic_save(Image.fromarray(sample_grid(generator)), path, lambda image, part: image.save(part, format="PNG"))


def train(config: GANConfig, out: Path, preview_every: int = 250) -> Generator:
    """Train (or go on training) in ``out``; returns the averaged generator. Sample grids land in ``out/samples``."""
    training = GANTraining(settled(config, out=out))
    after = ""
    for phase, step, steps in (("1-regression", training.warm_step, config.warm_steps), ("2-mapping", training.map_step, config.map_steps),
                               ("3-adversarial", training.step, config.steps)):
        folder, start = out / phase, out / after / "checkpoint.pt"
        if after and not (folder / "checkpoint.pt").exists():      # each phase goes on from the end of the one before
            training.load(torch.load(start, weights_only=True)["state"])
        fit(step, steps, state=training.state, out=folder, seed=config.seed, checkpoint_every=250, desc=f"generator, {phase}",
            callbacks=[Callback(preview_every, lambda done, phase=phase: save_grid(training.ema, out / "samples" / f"{phase}-{done:06d}.png"))])
        after = phase
    return training.ema
