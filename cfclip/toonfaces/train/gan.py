"""Trains the embedded generator: StyleGAN2's discriminator and losses, on natural toon faces only.

Three phases: regression of pictures from their factors, adversarial training of the mapping network in W, and
StyleGAN2's adversarial training of both networks.
"""

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
from cfclip.images import to_tensor, to_uint8
from cfclip.method.config import DTYPES
from cfclip.method.loop import CHECKPOINT, Callback, load_checkpoint, resolve_dtype
from cfclip.models.ops import bias_act, setup_filter
from cfclip.models.stylegan2 import EqualLinear, Generator, pixel_norm
from cfclip.settings import Settings, int_at_least, number, one_of, seed_number, setting
from cfclip.toonfaces.factors import FACTORS, LATENT_DRAWS, Face, LatentDraws, factor_vector, sample_face
from cfclip.toonfaces.render import MASKS, render, render_image
from cfclip.toonfaces.train.run import run_training, seeded, sizes


@dataclass(frozen=True)
class GANConfig(Settings):
    """How the generator is trained; unless said otherwise the defaults are StyleGAN2-ADA's."""

    resolution: int = setting(64, int_at_least(8))
    channels: tuple[int, ...] = setting((128, 128, 128, 96, 64), sizes)  # of the generator at 4, 8, … R
    d_channels: tuple[int, ...] = setting((128, 128, 128, 64, 32), sizes)
    w_dim: int = setting(128, int_at_least(LATENT_DRAWS))  # = z_dim; one number of z per factor of a face
    mapping_layers: int = setting(4, int_at_least(1))
    batch: int = setting(16, int_at_least(2))
    warm_steps: int = setting(6000, int_at_least(1))  # of GANTraining.warm_step
    map_steps: int = setting(6000, int_at_least(1))  # of GANTraining.map_step
    warm_pool: int = setting(30_000, int_at_least(1))
    small_parts: float = setting(6.0, number())  # weight of a pixel of SMALL_PARTS in the error; others: 1
    warm_lr: float = setting(0.01, number(above=True))  # of the mapping network: 50 times that
    steps: int = setting(1000, int_at_least(1))  # of GANTraining.step
    lr: float = setting(0.001, number(above=True))
    anchor: float = setting(10.0, number())  # weight of the regression error beside the adversarial loss
    r1_gamma: float = setting(1.0, number())
    r1_every: int = setting(16, int_at_least(1))  # steps from one R1 to the next; it weighs that much more
    # probability of style mixing; 0.5 raised KID from 0.2 to 1.5, as regression never mixes two faces
    mixing: float = setting(0.0, number(0, 1))
    ema_images: int = setting(5_000, int_at_least(1))  # half-life of the averaged generator
    seed: int = setting(0, seed_number)
    dtype: str = setting("auto", one_of(DTYPES))  # of the convolutions; R1 and the RGB sums stay float32


SMALL_PARTS = ("eyebrows", "eyes", "eye_white", "pupil", "lipstick", "mouth", "glasses")
"""A twentieth of the picture: without weights they stay blurred for very long."""


class EqualConv(nn.Module):
    """3x3 or 1x1 convolution with weights scaled at run time; optionally bias and leaky ReLU.

    down: box-filter and down-sample by 2.
    """

    def __init__(self, in_ch: int, out_ch: int, kernel: int, down: bool = False, activate: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_ch, in_ch, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_ch)) if activate else None
        self.scale, self.down, self.activate = 1 / math.sqrt(in_ch * kernel**2), down, activate
        self.register_buffer("fir", setup_filter((1, 1)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight, k = (self.weight * self.scale), self.weight.shape[-1]
        if self.down:  # box filter and strided convolution as one kernel of size k + 1
            o, i = weight.shape[:2]
            weight = F.conv2d(weight.reshape(o * i, 1, k, k), self.fir[None, None], padding=1)
            weight = weight.reshape(o, i, k + 1, k + 1)
            x = F.conv2d(x, weight.to(x.dtype), stride=2, padding=k // 2)
        else:
            x = F.conv2d(x, weight.to(x.dtype), padding=k // 2)
        return bias_act(x, self.bias) if self.activate else x


class Discriminator(nn.Module):
    """StyleGAN2's residual discriminator with minibatch deviation. Images [N, 3, R, R] -> logits [N]."""

    def __init__(self, resolution: int, channels: tuple[int, ...]):
        super().__init__()
        top = list(reversed(channels))  # R … 4
        self.from_rgb = EqualConv(3, top[0], 1)
        self.blocks = nn.ModuleList()
        for a, b in pairwise(top):
            convs = EqualConv(a, a, 3), EqualConv(a, b, 3, down=True)
            skip = EqualConv(a, b, 1, down=True, activate=False)
            self.blocks.append(nn.ModuleList([*convs, skip]))
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
    """The networks in training, their optimizers, and one step of each phase."""

    def __init__(self, config: GANConfig):
        self.config, self.dtype = config, getattr(torch, resolve_dtype(config.dtype, "cpu"))
        w_dim = config.w_dim
        with seeded(config.seed):
            self.g = Generator(config.resolution, config.channels, w_dim, w_dim, config.mapping_layers)
            self.d = Discriminator(config.resolution, config.d_channels)
            self.factors_to_w = nn.Linear(FACTORS, w_dim)
            layers = [nn.Linear(w_dim, 256), nn.LeakyReLU(0.2), nn.Linear(256, 256), nn.LeakyReLU(0.2)]
            self.d_w = nn.Sequential(*layers, nn.Linear(256, 1))
        self.ema = copy.deepcopy(self.g).eval().requires_grad_(False)
        self._drawn = None
        synthesis = [p for name, p in self.g.named_parameters() if not name.startswith("style.")]
        style = self.g.style
        warm = [
            {"params": synthesis, "boost": 1},
            {"params": self.factors_to_w.parameters(), "boost": 0.5},
            {"params": style.parameters(), "boost": 50},
        ]
        self.opt_warm = torch.optim.Adam(warm, betas=(0.9, 0.99))
        self.opt_map = torch.optim.Adam([{"params": style.parameters(), "boost": 0.2}], betas=(0.5, 0.99))
        self.opt_dw = torch.optim.Adam([{"params": self.d_w.parameters(), "boost": 1e-3}], betas=(0.5, 0.99))
        self.opt_g = torch.optim.Adam(self.g.parameters(), config.lr, betas=(0.0, 0.99), eps=1e-8)
        lazy = config.r1_every / (config.r1_every + 1)
        lr, betas = config.lr * lazy, (0.0, 0.99**lazy)
        self.opt_d = torch.optim.Adam(self.d.parameters(), lr, betas=betas, eps=1e-8)

    @property
    def state(self) -> dict:
        """name -> network or optimizer: the content of a checkpoint."""
        networks = ("g", "d", "ema", "factors_to_w", "d_w")
        optimizers = ("opt_g", "opt_d", "opt_warm", "opt_map", "opt_dw")
        return {name: getattr(self, name) for name in networks + optimizers}

    def load(self, state: dict) -> None:
        """Load the state of a checkpoint."""
        for name, part in self.state.items():
            part.load_state_dict(state[name])

    def _pool(self, pictures: bool = True) -> tuple[Tensor, Tensor, np.ndarray | None]:
        """Codes z [N, D], their factor vectors [N, F], and with ``pictures`` uint8 pictures [N, R, R, 4].

        The fourth channel of a picture is the coverage by :data:`SMALL_PARTS`.
        """
        if self._drawn is None or (pictures and self._drawn[2] is None):
            c, drawn = self.config, None
            z = torch.randn(c.warm_pool, c.w_dim, generator=torch.Generator().manual_seed(c.seed))
            codes = tqdm(pixel_norm(z).double().numpy(), "faces", leave=False)
            people = [sample_face(LatentDraws(code)) for code in codes]
            if pictures:
                drawn = np.stack([self._picture(face) for face in tqdm(people, "pictures", leave=False)])
            self._drawn = z, torch.from_numpy(np.stack([factor_vector(face) for face in people])), drawn
        return self._drawn

    def _picture(self, face: Face) -> np.ndarray:
        drawn = render(face, self.config.resolution)
        small = drawn.masks[[MASKS.index(part) for part in SMALL_PARTS]].sum(0)
        return np.concatenate([drawn.image, np.rint(255 * small).astype(np.uint8)[..., None]], 2)

    def _error(self, images: Tensor, index: Tensor) -> Tensor:
        """Weighted L1 error of ``images`` against pictures ``index`` of the pool, and of their gradients.

        Pixels of :data:`SMALL_PARTS` weigh ``small_parts`` times as much as others.
        """
        *rgb, small = to_tensor(self._pool()[2][index]).unbind(1)
        error = images - torch.stack(rgb, 1)
        weight = 1 + (self.config.small_parts - 1) * (small[:, None] + 1) / 2
        terms = (
            (e.abs() * weight[..., : e.shape[2], : e.shape[3]]).mean() * k
            for e, k in ((error, 1), (error.diff(dim=2), 0.5), (error.diff(dim=3), 0.5))
        )
        return sum(terms) / weight.mean()

    def warm_step(self, i: int) -> dict[str, float]:
        """One step of regression on natural faces.

        The synthesis network learns to draw a face from its factors (:meth:`_error`), through a linear layer
        ``factors -> w`` that is not kept; the mapping network learns to give that w for the face's z. On a
        CPU a purely adversarial start took many times as long.
        """
        c = self.config
        for group in self.opt_warm.param_groups:
            group["lr"] = group["boost"] * c.warm_lr * min(1.0, (i + 1) / 50, 1.1 - i / c.warm_steps)
        z, factors, _ = self._pool()
        batch, many = torch.randint(len(z), (c.batch,)), torch.randint(len(z), (512,))
        w = self.factors_to_w(factors[batch])
        images = self.g.synthesis(w[:, None].expand(-1, self.g.num_ws, -1), "none", self.dtype)
        loss = self._error(images, batch)
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

        Regression alone pulls w towards the mean, because w jumps where z crosses from one hair colour to the
        next. Its error stays in the loss as an anchor, so that every kind of face is still generated.
        """
        z, factors, _ = self._pool(pictures=False)
        for group in (*self.opt_map.param_groups, *self.opt_dw.param_groups):
            group["lr"] = group["boost"] * min(1.0, 1.1 - i / self.config.map_steps)
        with torch.no_grad():
            everyone = self.factors_to_w(factors[:4096])
            mean, std = everyone.mean(0), everyone.std(0) + 1e-3
            self.g.w_avg.copy_(mean)
            paired, others = torch.randint(len(z), (512,)), torch.randint(len(z), (512,))
            real, target = ((self.factors_to_w(factors[index]) - mean) / std for index in (others, paired))
        fake = (self.g.map_one(z[paired]) - mean) / std
        anchor = (fake - target).square().mean()
        loss_g = F.softplus(-self.d_w(fake)).mean() + anchor
        self.opt_map.zero_grad()
        loss_g.backward()
        self.opt_map.step()
        real.requires_grad_(True)
        logits = self.d_w(real)
        (grad,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        loss_d = F.softplus(-logits).mean() + F.softplus(self.d_w(fake.detach())).mean()
        loss_d = loss_d + 0.5 * grad.square().sum(1).mean()
        self.opt_dw.zero_grad()
        loss_d.backward()
        self.opt_dw.step()
        self._average(math.inf)
        spread = fake.detach().std(0).mean()
        return {"anchor": anchor.item(), "spread": spread.item(), "loss_d": loss_d.item()}

    def _average(self, images: float) -> None:
        """Update the averaged generator; ``images``: how many pictures were seen."""
        decay = 0.5 ** (self.config.batch / min(self.config.ema_images, 0.05 * images + 1e-8))
        with torch.no_grad():
            for averaged, live in zip(self.ema.parameters(), self.g.parameters(), strict=True):
                averaged.lerp_(live, 1 - decay)
            for averaged, live in zip(self.ema.buffers(), self.g.buffers(), strict=True):
                averaged.copy_(live)

    def _reals(self, step: int) -> Tensor:
        c = self.config
        return to_tensor([render_image(sample_face((c.seed, step, k)), c.resolution) for k in range(c.batch)])

    def _fakes(self) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, R, R], half from known factors, half from z with style mixing; an index [B / 2].

        The index: where in the pool the known factors are. Without noise: toon faces have no random
        detail, and early in training noise would hide the generator's errors.
        """
        c, g, half = self.config, self.g, self.config.batch // 2
        _, factors, _ = self._pool()
        index = torch.randint(len(factors), (half,))
        with torch.no_grad():
            known = self.factors_to_w(factors[index])[:, None].expand(-1, g.num_ws, -1)
        w, other = g.map_one(torch.randn(2 * half, c.w_dim)).chunk(2)
        layer = torch.arange(g.num_ws)[None, :, None]
        cut = torch.randint(1, g.num_ws, (half, 1, 1))
        cut = cut.where(torch.rand(half, 1, 1) < c.mixing, torch.tensor(g.num_ws))
        mixed = torch.where(layer < cut, w[:, None], other[:, None])
        return g.synthesis(torch.cat([known, mixed]), "none", self.dtype), index

    def step(self, i: int) -> dict[str, float]:
        """One step of StyleGAN2's adversarial training: logistic loss, lazy R1; regression is an anchor."""
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
        logits_real = self.d(reals, self.dtype)
        logits_fake = self.d(fakes.detach(), self.dtype)  # the fakes of above, to save a forward of G
        loss_d = F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()
        if i % c.r1_every == 0:
            reals.requires_grad_(True)
            (grad,) = torch.autograd.grad(self.d(reals).sum(), reals, create_graph=True)
            loss_d = loss_d + grad.square().sum((1, 2, 3)).mean() * (0.5 * c.r1_gamma * c.r1_every)
        self.opt_d.zero_grad()
        loss_d.backward()
        self.opt_d.step()

        self._average(c.batch * (c.warm_steps + i + 1))
        losses = {"loss_g": loss_g, "error": error, "loss_d": loss_d}
        signs = {"real": logits_real.sign().mean(), "fake": logits_fake.sign().mean()}
        return {name: value.item() for name, value in (losses | signs).items()}


def sample_grid(generator: Generator, rows: int = 8, columns: int = 8, seed: int = 1) -> np.ndarray:
    """Uncurated samples at psi = 1 as one uint8 picture [rows * R, columns * R, 3]."""
    z = torch.randn(rows * columns, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        images = to_uint8(generator.synthesis(generator.mapping(z)))
    r = generator.resolution
    grid = images.reshape(rows, columns, r, r, 3).swapaxes(1, 2)
    return grid.reshape(rows * r, columns * r, 3)


def save_grid(generator: Generator, path: Path) -> None:
    """:func:`sample_grid` as a PNG."""
    picture = Image.fromarray(sample_grid(generator))
    atomic_write(path, lambda part: picture.save(part, format="PNG"))


def train(config: GANConfig, out: Path, preview_every: int = 250) -> Generator:
    """Train, or resume the training in ``out``; returns the averaged generator.

    Each phase has its own folder and starts from the end of the one before; sample grids are in
    ``out/samples``.
    """
    training, before = GANTraining(config), None
    for phase, step, steps in (
        ("1-regression", training.warm_step, config.warm_steps),
        ("2-mapping", training.map_step, config.map_steps),
        ("3-adversarial", training.step, config.steps),
    ):
        folder = out / phase
        if before and not (folder / CHECKPOINT).exists():
            training.load(load_checkpoint(before)["state"])

        def preview(done: int, phase: str = phase) -> None:
            save_grid(training.ema, out / "samples" / f"{phase}-{done:06d}.png")

        callbacks = [Callback(preview_every, preview)]
        run_training(f"generator, {phase}", step, config, training.state, folder, steps, callbacks)
        before = folder
    return training.ema
