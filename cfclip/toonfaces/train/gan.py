"""Trains the embedded generator: StyleGAN2's discriminator and losses, on natural toon faces only.

Three phases: regression of pictures from the factors that W holds, regression of the mapping network, and
StyleGAN2's adversarial training of the synthesis network.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cfclip.files import atomic_write
from cfclip.images import to_uint8
from cfclip.method.config import DTYPES
from cfclip.method.loop import CHECKPOINT, Callback, load_checkpoint, resolve_dtype
from cfclip.models.ops import bias_act, setup_filter
from cfclip.models.stylegan2 import EqualLinear, Generator, pixel_norm
from cfclip.settings import Settings, int_at_least, number, one_of, setting
from cfclip.toonfaces.factors import LATENT_DRAWS, LatentDraws, colour_array, sample_face, shape_vector
from cfclip.toonfaces.render import MASKS
from cfclip.toonfaces.train.pool import Pool, on_all_cores, part_masks, picture
from cfclip.toonfaces.train.run import run_training, seeded, sizes


@dataclass(frozen=True)
class GANConfig(Settings):
    """How the generator is trained; unless said otherwise the defaults are StyleGAN2-ADA's."""

    resolution: int = setting(64, int_at_least(8))
    channels: tuple[int, ...] = setting((128, 128, 128, 128, 96), sizes)  # of the generator at 4, 8, … R
    d_channels: tuple[int, ...] = setting((128, 128, 128, 64, 32), sizes)
    w_dim: int = setting(128, int_at_least(LATENT_DRAWS))  # = z_dim; one number of z per factor of a face
    mapping_layers: int = setting(8, int_at_least(1))
    w_std: float = setting(0.25, number(above=True))  # of W; at 1 a young generator sees only noise in it
    colouring: int = setting(4, int_at_least(1))  # the first layer that colours; those before it draw
    pool: int = setting(20_000, int_at_least(1))  # shapes, of natural and of independent colours
    warm_steps: int = setting(12_000, int_at_least(1))  # of GANTraining.warm_step
    warm_batch: int = setting(64, int_at_least(1))
    warm_lr: float = setting(0.05, number(above=True))  # at 0.01 it took three times as long
    small_parts: float = setting(6.0, number())  # weight of a pixel of SMALL_PARTS in the error; others: 1
    map_steps: int = setting(16_000, int_at_least(1))  # of GANTraining.map_step
    map_pool: int = setting(60_000, int_at_least(1))
    map_batch: int = setting(512, int_at_least(1))
    map_lr: float = setting(10.0, number(above=True))  # high, because the mapping network's lr_mul is 0.01
    steps: int = setting(8000, int_at_least(1))  # of GANTraining.step
    batch: int = setting(64, int_at_least(2))  # of the adversarial training
    lr: float = setting(0.001, number(above=True))
    anchor: float = setting(10.0, number())  # weight of the regression error beside the adversarial loss
    r1_gamma: float = setting(1.0, number())
    r1_every: int = setting(16, int_at_least(1))  # steps from one R1 to the next; it weighs that much more
    mixing: float = setting(0.5, number(0, 1))  # share of samples with the colours of another
    ema_images: int = setting(20_000, int_at_least(1))  # half-life of the averaged generator
    seed: int = setting(0, int_at_least(0))
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


class FactorsToW(nn.Module):
    """The w that stands for the factors of a face, F numbers: :meth:`forward` [N, F] -> [N, D].

    Over ``faces`` [M, F] each factor has mean 0 and the same variance; all are turned at random, and the
    deviation of w is ``std``. So no factor is small in W, and the mapping network can be taught W before a
    picture is drawn.
    """

    def __init__(self, faces: Tensor, w_dim: int, std: float, generator: torch.Generator):
        super().__init__()
        turn = torch.linalg.qr(torch.randn(w_dim, faces.shape[1], generator=generator))[0].T
        spread = faces.std(0).clamp_min(1e-3)[:, None]
        self.register_buffer("mean", faces.mean(0))
        self.register_buffer("turn", turn * std * math.sqrt(w_dim / faces.shape[1]) / spread)  # [F, D]

    def forward(self, factors: Tensor) -> Tensor:
        return (factors - self.mean) @ self.turn


def factors_of(colours: Tensor, shapes: Tensor) -> Tensor:
    """All factors, in about [-1, 1]: colours [N, 9, 3] in 0 … 255 and shapes [N, 27] -> [N, 54]."""
    return torch.cat([colours.flatten(1) / 127.5 - 1, shapes], 1)


def _people(codes: np.ndarray, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    faces = [sample_face(LatentDraws(codes[k])) for k in numbers]
    return np.stack([colour_array(face) for face in faces]), np.stack([shape_vector(face) for face in faces])


class GANTraining:
    """The networks in training, their optimizers, and one step of each phase."""

    def __init__(self, config: GANConfig, device: torch.device):
        self.config, self.device = config, device
        self.dtype = getattr(torch, resolve_dtype(config.dtype, device))
        w_dim, fused = config.w_dim, device.type == "cuda"
        with seeded(config.seed):
            self.g = Generator(config.resolution, config.channels, w_dim, w_dim, config.mapping_layers)
            self.d = Discriminator(config.resolution, config.d_channels)
        random = torch.Generator().manual_seed(config.seed)
        self.z = torch.randn(config.map_pool, w_dim, generator=random)
        make = partial(_people, pixel_norm(self.z).double().numpy())
        made = on_all_cores(make, config.map_pool, "codes", 1000)
        arrays = (np.concatenate(one) for one in zip(*made, strict=True))
        factors = factors_of(*(torch.from_numpy(array) for array in arrays))
        to_w = FactorsToW(factors, w_dim, config.w_std, random)
        w = to_w(factors)  # what z stands for
        self.g.w_avg.copy_(w.mean(0))
        self.z, self.w = self.z.to(device), w.to(device)
        self.g, self.d, self.to_w = self.g.to(device), self.d.to(device), to_w.to(device)
        self.ema = copy.deepcopy(self.g).eval().requires_grad_(False)
        synthesis = [p for name, p in self.g.named_parameters() if not name.startswith("style.")]
        adam = partial(torch.optim.Adam, betas=(0.9, 0.99), fused=fused)
        self.opt_warm, self.opt_map = adam(synthesis), adam(self.g.style.parameters())
        self.opt_g = torch.optim.Adam(synthesis, config.lr, betas=(0.0, 0.99), eps=1e-8, fused=fused)
        lazy = config.r1_every / (config.r1_every + 1)  # StyleGAN2's correction for the lazy R1
        lr, betas = config.lr * lazy, (0.0, 0.99**lazy)
        self.opt_d = torch.optim.Adam(self.d.parameters(), lr, betas=betas, eps=1e-8, fused=fused)
        pool = partial(Pool, people=config.pool, resolution=config.resolution, device=device)
        self.faces = pool((config.seed, 1), support="independent")
        self.natural = pool((config.seed, 2), support="natural")

    @property
    def state(self) -> dict:
        names = ("g", "d", "ema", "opt_warm", "opt_map", "opt_g", "opt_d")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict) -> None:
        """Take over the ``state`` of a checkpoint."""
        for name, thing in self.state.items():
            thing.load_state_dict(state[name])

    def _mixed(self, shapes: Tensor, colours: Tensor) -> Tensor:
        """W+ [N, L, D]: the layers that draw have one w [N, D], those that colour another."""
        layers = torch.arange(self.g.num_ws, device=self.device)[None, :, None]
        return torch.where(layers < self.config.colouring, shapes[:, None], colours[:, None])

    def _regression(self, n: int, generator: torch.Generator) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """W+ [n, L, D] of faces with independent colours, and the error of the pictures made from them.

        The layers that draw are given one face and those that colour another; the picture to draw has the
        shapes of the first in the colours of the second. So what colours is what those layers say.
        """
        pool = self.faces
        shape, its_colours, its_shape, colour = (pool.draw(n, generator) for _ in range(4))
        pairs = (its_colours, shape), (colour, its_shape)
        factors = [factors_of(pool.colours[c], pool.shapes[s]) for c, s in pairs]
        covered = pool.covered(shape)
        target, masks = picture(covered, pool.palettes[colour]), part_masks(covered)
        small = masks[:, [MASKS.index(part) for part in SMALL_PARTS]].sum(1, keepdim=True)
        weight = 1 + (self.config.small_parts - 1) * small

        def error(images: Tensor) -> Tensor:
            """Weighted L1 error of the pictures and of their gradients."""
            wrong, total = images - target, 0.0
            for e, k in ((wrong, 1), (wrong.diff(dim=2), 0.5), (wrong.diff(dim=3), 0.5)):
                total = total + k * (e.abs() * weight[..., : e.shape[2], : e.shape[3]]).mean()
            return total / weight.mean()

        return self._mixed(*map(self.to_w, factors)), error

    def warm_step(self, i: int, generator: torch.Generator) -> dict[str, Tensor]:
        """One step of regression: the synthesis network learns to draw the face that w stands for.

        Without noise: toon faces have no random detail, and noise would hide a young generator's errors. A
        start that is only adversarial takes many times as long.
        """
        c = self.config
        self.opt_warm.param_groups[0]["lr"] = c.warm_lr * min(1.0, (i + 1) / 200, 1.1 - i / c.warm_steps)
        w, error = self._regression(c.warm_batch, generator)
        loss = error(self.g.synthesis(w, "none", self.dtype))
        self.opt_warm.zero_grad()
        loss.backward()
        self.opt_warm.step()
        self._average(c.warm_batch, c.warm_batch * (i + 1))
        return {"error": loss.detach()}

    def map_step(self, i: int, generator: torch.Generator) -> dict[str, Tensor]:
        """One step of regression of the mapping network, from z to the w that z stands for.

        The error is in units of W's variance. Most of it is where z crosses from one hair colour to the next,
        where w jumps; what is between them is natural too, see ``NATURAL``.
        """
        c = self.config
        self.opt_map.param_groups[0]["lr"] = c.map_lr * min(1.0, (i + 1) / 50, 1.1 - i / c.map_steps)
        batch = torch.randint(len(self.z), (c.map_batch,), generator=generator).to(self.device)
        loss = ((self.g.map_one(self.z[batch]) - self.w[batch]) / c.w_std).square().mean()
        self.opt_map.zero_grad()
        loss.backward()
        self.opt_map.step()
        self._average(c.batch, math.inf)
        return {"unexplained": loss.detach()}

    def _average(self, batch: int, images: float) -> None:
        """Update the averaged generator after a ``batch``; ``images``: how many pictures were seen."""
        decay = 0.5 ** (batch / min(self.config.ema_images, 0.05 * images + 1e-8))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.g.parameters()), 1 - decay)

    def step(self, i: int, generator: torch.Generator) -> dict[str, Tensor]:
        """One step of StyleGAN2's adversarial training: logistic loss, lazy R1; regression is an anchor."""
        c, half = self.config, self.config.batch // 2
        w, error = self._regression(half, generator)
        z = torch.randn(2 * half, c.w_dim, generator=generator).to(self.device)
        mix = (torch.rand(half, 1, generator=generator) < c.mixing).to(self.device)
        with torch.no_grad():
            one, other = self.g.map_one(z).chunk(2)
            sampled = self._mixed(one, other.where(mix, one))
        self.d.requires_grad_(False)
        drawn, fakes = self.g.synthesis(torch.cat([w, sampled]), "none", self.dtype).split(half)
        loss_g, wrong = F.softplus(-self.d(fakes, self.dtype)).mean(), error(drawn)
        self.opt_g.zero_grad()
        (loss_g + c.anchor * wrong).backward()
        self.opt_g.step()

        self.d.requires_grad_(True)
        shapes, colours = (self.natural.draw(half, generator) for _ in range(2))
        reals = self.natural.paint(shapes, colours)
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

        self._average(c.batch, math.inf)
        losses = {"loss_g": loss_g, "error": wrong, "loss_d": loss_d}
        signs = {"real": logits_real.sign().mean(), "fake": logits_fake.sign().mean()}
        return {name: value.detach() for name, value in (losses | signs).items()}


def sample_grid(generator: Generator, rows: int = 8, columns: int = 8, seed: int = 1) -> np.ndarray:
    """Uncurated samples at psi = 1 as one uint8 picture [rows * R, columns * R, 3]."""
    z = torch.randn(rows * columns, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        images = to_uint8(generator.synthesis(generator.mapping(z.to(generator.w_avg.device))))
    r = generator.resolution
    grid = images.reshape(rows, columns, r, r, 3).swapaxes(1, 2)
    return grid.reshape(rows * r, columns * r, 3)


def save_grid(generator: Generator, path: Path) -> None:
    """:func:`sample_grid` as a PNG."""
    picture = Image.fromarray(sample_grid(generator))
    atomic_write(path, lambda part: picture.save(part, format="PNG"))


def train(
    config: GANConfig, out: Path, device: torch.device | str = "cpu", preview_every: int = 500
) -> Generator:
    """Train, or resume the training in ``out``; returns the averaged generator.

    Each phase has its own folder and starts from the end of the one before; sample grids are in
    ``out/samples``.
    """
    training, before = GANTraining(config, torch.device(device)), None
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
