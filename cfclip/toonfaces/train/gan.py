"""Trains the embedded generator: StyleGAN2's discriminator and losses, on natural toon faces only."""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from cfclip.files import atomic_write
from cfclip.images import to_tensor
from cfclip.method.loop import Callback, resolve_dtype, run_loop, with_global_seed
from cfclip.models.ops import bias_act, setup_filter
from cfclip.models.stylegan2 import EqualLinear, Generator, pixel_norm
from cfclip.settings import Settings
from cfclip.toonfaces.factors import FACTORS, LATENT_DRAWS, Face, LatentDraws, factor_vector, sample_face
from cfclip.toonfaces.render import MASKS, render, render_image


@dataclass(frozen=True)
class GANConfig(Settings):
    """How the generator was trained (StyleGAN2-ADA's defaults where not said otherwise)."""

    resolution: int = 64
    channels: tuple[int, ...] = (128, 128, 128, 96, 64)  # generator, 4 … 64
    d_channels: tuple[int, ...] = (128, 128, 128, 64, 32)
    w_dim: int = 128  # = z_dim
    mapping_layers: int = 4
    batch: int = 16
    warm_steps: int = 6000  # of regression before the adversarial training, see GANTraining.warm_step
    map_steps: int = 6000  # of adversarial training of the mapping network in W, see GANTraining.map_step
    warm_pool: int = 30_000
    small_parts: float = 6.0  # weight of a pixel of SMALL_PARTS in the regression error, 1 for the others
    warm_lr: float = 0.01  # fifty times that for the mapping network, whose own lr_mul is 0.01
    steps: int = 1000
    lr: float = 0.001
    anchor: float = 10.0  # weight of the regression error beside the adversarial loss
    r1_gamma: float = 1.0  # on every r1_every-th step, weighted accordingly
    r1_every: int = 16
    mixing: float = 0.0  # probability of style mixing; 0.5 took KID from 0.2 to 1.5: regression never saw two faces in one
    ema_images: int = 5_000  # half-life of the averaged generator
    seed: int = 0
    dtype: str = "auto"  # of the convolutions; R1 and the RGB sums stay float32

    def __post_init__(self):
        super().__post_init__()
        if self.w_dim < LATENT_DRAWS:
            raise ValueError(
                f"w_dim (= z_dim) must be at least {LATENT_DRAWS}, one number per factor of a face, not {self.w_dim}"
            )


SMALL_PARTS = ("eyebrows", "eyes", "eye_white", "pupil", "lipstick", "mouth", "glasses")
"""A twentieth of the picture: an unweighted error leaves them soft for very long."""


class EqualConv(nn.Module):
    """3x3 or 1x1 convolution with run-time weight scaling, optional box-filtered down-sampling by 2, bias and leaky ReLU."""

    def __init__(self, in_ch: int, out_ch: int, kernel: int, down: bool = False, activate: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_ch, in_ch, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_ch)) if activate else None
        self.scale, self.down, self.activate = 1 / math.sqrt(in_ch * kernel**2), down, activate
        self.register_buffer("fir", setup_filter((1, 1)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight, k = (self.weight * self.scale), self.weight.shape[-1]
        if self.down:  # box filter and strided convolution as one kernel of k + 1
            o, i = weight.shape[:2]
            weight = F.conv2d(weight.reshape(o * i, 1, k, k), self.fir[None, None], padding=1).reshape(
                o, i, k + 1, k + 1
            )
            x = F.conv2d(x, weight.to(x.dtype), stride=2, padding=k // 2)
        else:
            x = F.conv2d(x, weight.to(x.dtype), padding=k // 2)
        return bias_act(x, self.bias) if self.activate else x


class Discriminator(nn.Module):
    """StyleGAN2's residual discriminator with minibatch standard deviation. Images [N, 3, R, R] -> logits [N]."""

    def __init__(self, resolution: int, channels: tuple[int, ...]):
        super().__init__()
        top = list(reversed(channels))  # R … 4
        self.from_rgb = EqualConv(3, top[0], 1)
        self.blocks = nn.ModuleList(
            nn.ModuleList([
                EqualConv(a, a, 3),
                EqualConv(a, b, 3, down=True),
                EqualConv(a, b, 1, down=True, activate=False),
            ])
            for a, b in pairwise(top)
        )
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


class GANTraining:
    """Generator, discriminator, EMA and one training step."""

    def __init__(self, config: GANConfig):
        torch.manual_seed(config.seed)
        self.config, self.dtype = config, getattr(torch, resolve_dtype(config.dtype, "cpu"))
        self.g = Generator(
            config.resolution, config.channels, config.w_dim, config.w_dim, config.mapping_layers
        )
        self.d = Discriminator(config.resolution, config.d_channels)
        self.ema = copy.deepcopy(self.g).eval().requires_grad_(False)
        self.factors_to_w, self._drawn = nn.Linear(FACTORS, config.w_dim), None
        synthesis = [p for name, p in self.g.named_parameters() if not name.startswith("style.")]
        self.opt_warm = torch.optim.Adam(
            [
                {"params": synthesis, "boost": 1},
                {"params": self.factors_to_w.parameters(), "boost": 0.5},
                {"params": self.g.style.parameters(), "boost": 50},
            ],
            betas=(0.9, 0.99),
        )
        self.d_w = nn.Sequential(
            nn.Linear(config.w_dim, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 1),
        )
        self.opt_map = torch.optim.Adam(
            [{"params": self.g.style.parameters(), "boost": 0.2}], betas=(0.5, 0.99)
        )
        self.opt_dw = torch.optim.Adam([{"params": self.d_w.parameters(), "boost": 1e-3}], betas=(0.5, 0.99))
        self.opt_g = torch.optim.Adam(self.g.parameters(), config.lr, betas=(0.0, 0.99), eps=1e-8)
        lazy = config.r1_every / (config.r1_every + 1)
        self.opt_d = torch.optim.Adam(
            self.d.parameters(), config.lr * lazy, betas=(0.0, 0.99**lazy), eps=1e-8
        )

    def _pool(self, pictures: bool = True) -> tuple[Tensor, Tensor, np.ndarray | None]:
        """Codes z, what they stand for (factor vectors) and, if asked for, the pictures with :data:`SMALL_PARTS` as a fourth channel."""
        if self._drawn is None or (pictures and self._drawn[2] is None):
            c = self.config
            z = torch.randn(c.warm_pool, c.w_dim, generator=torch.Generator().manual_seed(c.seed))
            people = [
                sample_face(LatentDraws(code))
                for code in tqdm(pixel_norm(z).double().numpy(), "faces", leave=False)
            ]
            drawn = (
                np.stack([self._picture(face) for face in tqdm(people, "pictures", leave=False)])
                if pictures
                else None
            )
            self._drawn = z, torch.from_numpy(np.stack([factor_vector(face) for face in people])), drawn
        return self._drawn

    def _picture(self, face: Face) -> np.ndarray:
        drawn = render(face, self.config.resolution)
        small = drawn.masks[[MASKS.index(part) for part in SMALL_PARTS]].sum(0)
        return np.concatenate([drawn.image, np.rint(255 * small).astype(np.uint8)[..., None]], 2)

    def _error(self, images: Tensor, index: Tensor) -> Tensor:
        """Mean error of ``images`` against pictures ``index`` of the pool, and of their gradients; small parts weigh more."""
        *rgb, small = to_tensor(self._pool()[2][index]).unbind(1)
        error = images - torch.stack(rgb, 1)
        weight = 1 + (self.config.small_parts - 1) * (small[:, None] + 1) / 2
        return (
            sum(
                (e.abs() * weight[..., : e.shape[2], : e.shape[3]]).mean() * k
                for e, k in ((error, 1), (error.diff(dim=2), 0.5), (error.diff(dim=3), 0.5))
            )
            / weight.mean()
        )

    def warm_step(self, i: int) -> dict[str, float]:
        """One step of regression, on natural faces like all that the generator sees.

        The synthesis network learns to draw a face from its factors (:meth:`_error`), through a linear layer ``factors -> w``
        that is thrown away; the mapping network learns to give that w for the z that stands for the face. A purely
        adversarial start took many times as long on a CPU.
        """
        c = self.config
        for group in self.opt_warm.param_groups:
            group["lr"] = group["boost"] * c.warm_lr * min(1.0, (i + 1) / 50, 1.1 - i / c.warm_steps)
        z, factors, _ = self._pool()
        batch, many = torch.randint(len(z), (c.batch,)), torch.randint(len(z), (512,))
        w = self.factors_to_w(factors[batch])
        loss = self._error(
            self.g.synthesis(w[:, None].expand(-1, self.g.num_ws, -1), "none", self.dtype), batch
        )
        with torch.no_grad():
            w_true = self.factors_to_w(factors[many])
            self.g.w_avg.lerp_(w_true.mean(0), 0.005)
        loss_w = (self.g.map_one(z[many]) - w_true).square().mean() / w_true.var(0).mean()
        self.opt_warm.zero_grad()
        (loss + loss_w).backward()
        self.opt_warm.step()
        self._average(c.batch * (i + 1))
        return {"error": loss.item(), "unexplained_w": loss_w.item()}

    def map_step(self, i: int) -> dict[str, float]:
        """One adversarial step in W: the mapping network learns the *distribution* of the factors' w.

        Regression alone draws it towards the mean, as z's corners (one hair colour beside another) are hard to hit;
        its error stays as an anchor, so that no kind of face is lost.
        """
        z, factors, _ = self._pool(pictures=False)
        for group in (*self.opt_map.param_groups, *self.opt_dw.param_groups):
            group["lr"] = group["boost"] * min(1.0, 1.1 - i / self.config.map_steps)
        with torch.no_grad():
            everyone = self.factors_to_w(factors[:4096])
            mean, std = everyone.mean(0), everyone.std(0) + 1e-3
            self.g.w_avg.copy_(mean)
            paired = torch.randint(len(z), (512,))
            real, target = (
                (self.factors_to_w(factors[index]) - mean) / std
                for index in (torch.randint(len(z), (512,)), paired)
            )
        fake = (self.g.map_one(z[paired]) - mean) / std
        anchor = (fake - target).square().mean()
        loss_g = F.softplus(-self.d_w(fake)).mean() + anchor
        self.opt_map.zero_grad()
        loss_g.backward()
        self.opt_map.step()
        real.requires_grad_(True)
        logits = self.d_w(real)
        (grad,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        loss_d = (
            F.softplus(-logits).mean()
            + F.softplus(self.d_w(fake.detach())).mean()
            + 0.5 * grad.square().sum(1).mean()
        )
        self.opt_dw.zero_grad()
        loss_d.backward()
        self.opt_dw.step()
        self._average(math.inf)
        return {
            "anchor": anchor.item(),
            "spread": fake.detach().std(0).mean().item(),
            "loss_d": loss_d.item(),
        }

    def _average(self, images: int) -> None:
        """The averaged generator after ``images`` pictures."""
        decay = 0.5 ** (self.config.batch / min(self.config.ema_images, 0.05 * images + 1e-8))
        with torch.no_grad():
            for averaged, live in zip(self.ema.parameters(), self.g.parameters(), strict=True):
                averaged.lerp_(live, 1 - decay)
            for averaged, live in zip(self.ema.buffers(), self.g.buffers(), strict=True):
                averaged.copy_(live)

    @property
    def state(self) -> dict:
        return {
            "g": self.g,
            "d": self.d,
            "ema": self.ema,
            "opt_g": self.opt_g,
            "opt_d": self.opt_d,
            "opt_warm": self.opt_warm,
            "factors_to_w": self.factors_to_w,
            "d_w": self.d_w,
            "opt_map": self.opt_map,
            "opt_dw": self.opt_dw,
        }

    def _reals(self, step: int) -> Tensor:
        c = self.config
        return to_tensor([render_image(sample_face((c.seed, step, k)), c.resolution) for k in range(c.batch)])

    def _fakes(self) -> tuple[Tensor, Tensor]:
        """Half a batch drawn from known factors, half from z with style mixing: (pictures, where in the pool the first half is from).

        Without noise: toon faces have no stochastic detail, and a young generator hides behind it.
        """
        c, g, half = self.config, self.g, self.config.batch // 2
        _, factors, _ = self._pool()
        index = torch.randint(len(factors), (half,))
        with torch.no_grad():
            known = self.factors_to_w(factors[index])[:, None].expand(-1, g.num_ws, -1)
        w, other = g.map_one(torch.randn(2 * half, c.w_dim)).chunk(2)
        layer = torch.arange(g.num_ws)[None, :, None]
        cut = torch.randint(1, g.num_ws, (half, 1, 1)).where(
            torch.rand(half, 1, 1) < c.mixing, torch.tensor(g.num_ws)
        )
        mixed = torch.where(layer < cut, w[:, None], other[:, None])
        return g.synthesis(torch.cat([known, mixed]), "none", self.dtype), index

    def load(self, state: dict) -> None:
        """Take up ``state``, as a checkpoint holds it."""
        for name, thing in self.state.items():
            thing.load_state_dict(state[name])

    def step(self, i: int) -> dict[str, float]:
        """One step of StyleGAN2's adversarial training: logistic loss, lazy R1; regression stays as an anchor."""
        c = self.config
        self.d.requires_grad_(False)
        fakes, known = self._fakes()
        loss_g = F.softplus(-self.d(fakes, self.dtype)).mean()
        error = self._error(fakes[: len(known)], known)
        self.opt_g.zero_grad()
        (loss_g + c.anchor * error).backward()
        self.opt_g.step()

        self.d.requires_grad_(True)
        reals = self._reals(i)
        logits_real, logits_fake = (
            self.d(reals, self.dtype),
            self.d(fakes.detach(), self.dtype),
        )  # one forward of G serves both
        loss_d = F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()
        if i % c.r1_every == 0:
            reals.requires_grad_(True)
            (grad,) = torch.autograd.grad(self.d(reals).sum(), reals, create_graph=True)
            loss_d = loss_d + grad.square().sum((1, 2, 3)).mean() * (0.5 * c.r1_gamma * c.r1_every)
        self.opt_d.zero_grad()
        loss_d.backward()
        self.opt_d.step()

        self._average(c.batch * (c.warm_steps + i + 1))
        return {
            "loss_g": loss_g.item(),
            "error": error.item(),
            "loss_d": loss_d.item(),
            "real": logits_real.detach().sign().mean().item(),
            "fake": logits_fake.detach().sign().mean().item(),
        }


def sample_grid(
    generator: Generator, rows: int = 8, columns: int = 8, seed: int = 1, truncation: float = 1.0
) -> np.ndarray:
    """Uncurated samples as one uint8 picture [rows * R, columns * R, 3]."""
    z = torch.randn(rows * columns, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        images = generator.synthesis(generator.mapping(z, truncation))
    images = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    r = generator.resolution
    return (
        images
        .reshape(rows, columns, 3, r, r)
        .permute(0, 3, 1, 4, 2)
        .reshape(rows * r, columns * r, 3)
        .numpy()
    )


def save_grid(generator: Generator, path: Path) -> None:
    """:func:`sample_grid` as a PNG."""
    picture = Image.fromarray(sample_grid(generator))
    atomic_write(path, lambda part: picture.save(part, format="PNG"))


def train(config: GANConfig, out: Path, preview_every: int = 250) -> Generator:
    """Train (or go on training) in ``out``; returns the averaged generator. Sample grids land in ``out/samples``."""
    training = GANTraining(config)
    after = ""
    for phase, step, steps in (
        ("1-regression", training.warm_step, config.warm_steps),
        ("2-mapping", training.map_step, config.map_steps),
        ("3-adversarial", training.step, config.steps),
    ):
        folder, start = out / phase, out / after / "checkpoint.pt"
        if (
            after and not (folder / "checkpoint.pt").exists()
        ):  # each phase goes on from the end of the one before
            training.load(torch.load(start, weights_only=True)["state"])
        run_loop(
            with_global_seed(step),
            steps,
            state=training.state,
            out=folder,
            seed=config.seed,
            checkpoint_every=250,
            desc=f"generator, {phase}",
            callbacks=[
                Callback(
                    preview_every,
                    lambda done, phase=phase: save_grid(
                        training.ema, out / "samples" / f"{phase}-{done:06d}.png"
                    ),
                )
            ],
        )
        after = phase
    return training.ema
