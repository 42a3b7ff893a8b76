"""Trains the embedded generator, a StyleGAN2, on natural toon faces only.

W is defined first: it holds the factors of a face. Two regressions follow, which share no weights: pictures
from W (:meth:`GeneratorTraining.draw_step`) and W from Z (:meth:`GeneratorTraining.map_step`). There is no
adversarial phase: in trials of a few hundred steps it undid what the regressions had learned.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cfclip.files import atomic_write
from cfclip.images import to_uint8
from cfclip.method.config import DTYPES
from cfclip.method.loop import CHECKPOINT, Callback, load_checkpoint, resolve_dtype
from cfclip.models.stylegan2 import Generator, pixel_norm
from cfclip.settings import Settings, batch_size, int_at_least, number, one_of, seed_number, setting
from cfclip.toonfaces.domain import COLOURING
from cfclip.toonfaces.factors import LATENT_DRAWS, LatentDraws, colour_array, sample_face, shape_vector
from cfclip.toonfaces.render import MASKS
from cfclip.toonfaces.train.pool import Pool, on_all_cores, part_masks, picture
from cfclip.toonfaces.train.run import run_training, seeded, sizes


@dataclass(frozen=True)
class GeneratorConfig(Settings):
    """How the generator is trained."""

    resolution: int = setting(64, int_at_least(8))
    channels: tuple[int, ...] = setting((128, 128, 128, 128, 96), sizes)  # at 4, 8, … R
    w_dim: int = setting(128, int_at_least(LATENT_DRAWS))  # = z_dim; one number of z per factor of a face
    mapping_layers: int = setting(8, int_at_least(1))
    w_std: float = setting(0.25, number(above=True))  # of W; at 1 it is only noise to an untrained generator
    colouring: int = setting(COLOURING, int_at_least(1))  # the first layer that colours; earlier ones draw
    pool: int = setting(12_000, int_at_least(1))  # shapes, in independent natural colours
    steps: int = setting(2800, int_at_least(1))  # of GeneratorTraining.draw_step
    batch: int = setting(64, batch_size)
    lr: float = setting(0.05, number(above=True))  # at 0.01 it took three times as long, at 0.16 it diverged
    small_parts: float = setting(6.0, number())  # weight of a pixel of SMALL_PARTS in the error; others: 1
    codes: int = setting(340_000, int_at_least(2))  # of faces; with 40 000 the mapping learned them by heart
    map_steps: int = setting(16_000, int_at_least(1))  # of GeneratorTraining.map_step
    map_batch: int = setting(512, batch_size)
    map_lr: float = setting(10.0, number(above=True))  # high, because the mapping network's lr_mul is 0.01
    ema_images: int = setting(20_000, int_at_least(1))  # half-life of the averaged generator
    seed: int = setting(0, seed_number)
    dtype: str = setting("auto", one_of(DTYPES))  # of the convolutions; the RGB sums stay float32


STATISTICS = 40_000
"""How many codes are used for the means and deviations of the factors, and for the mean of W."""

SMALL_PARTS = ("eyebrows", "eyes", "eye_white", "pupil", "lipstick", "mouth", "glasses")
"""These cover a twentieth of the picture; without weights they stay blurred for very long."""


class FactorsToW(nn.Module):
    """Turns the F factors of a face into its w: :meth:`forward` [N, F] -> [N, D].

    Over ``faces`` [M, F] each factor is scaled to mean 0 and the same variance. Then all are rotated at
    random; the standard deviation of w is ``std``. So no factor is small in W, and the mapping network can
    learn W before any picture is drawn.
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


def _factors(z: Tensor) -> Tensor:
    """The factors [N, 54] of the faces that the codes z [N, D] stand for."""
    make = partial(_people, pixel_norm(z).double().numpy())
    arrays = (np.concatenate(one) for one in zip(*on_all_cores(make, len(z), "codes", 1000), strict=True))
    return factors_of(*(torch.from_numpy(array) for array in arrays))


def _people(codes: np.ndarray, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    faces = [sample_face(LatentDraws(codes[k])) for k in numbers]
    return np.stack([colour_array(face) for face in faces]), np.stack([shape_vector(face) for face in faces])


class GeneratorTraining:
    """The generator in training, its average, and one step of each regression."""

    def __init__(self, config: GeneratorConfig, device: torch.device):
        self.config, self.device = config, device
        self.dtype = getattr(torch, resolve_dtype(config.dtype, device))
        with seeded(config.seed):
            self.g = Generator(
                config.resolution, config.channels, config.w_dim, config.w_dim, config.mapping_layers
            )
        random = torch.Generator().manual_seed(config.seed)
        counted = min(config.codes, STATISTICS)
        z = torch.randn(counted, config.w_dim, generator=random)
        factors = _factors(z)
        self.to_w = FactorsToW(factors, config.w_dim, config.w_std, random)
        more = torch.randn(config.codes - counted, config.w_dim, generator=random)
        self.z = torch.cat([z, more]).to(device)
        self.w = self.to_w(torch.cat([factors, _factors(more)]) if len(more) else factors).to(device)
        self.g, self.to_w = self.g.to(device), self.to_w.to(device)
        self.ema = copy.deepcopy(self.g).eval().requires_grad_(False)
        mapping = set(self.g.style.parameters())
        self.synthesis = [p for p in self.g.parameters() if p not in mapping]
        adam = partial(torch.optim.Adam, betas=(0.9, 0.99), fused=device.type == "cuda")
        self.opt_draw, self.opt_map = adam(self.synthesis), adam(self.g.style.parameters())
        self.faces = Pool((config.seed, 1), config.pool, 1, "independent", config.resolution, device)

    @property
    def state(self) -> dict:
        """The content of a checkpoint."""
        return {name: getattr(self, name) for name in ("g", "ema", "opt_draw", "opt_map")}

    def _mixed(self, shapes: Tensor, colours: Tensor) -> Tensor:
        """W+ [N, L, D]: ``shapes`` [N, D] in the layers that draw, ``colours`` [N, D] in the others."""
        layers = torch.arange(self.g.num_ws, device=self.device)[None, :, None]
        return torch.where(layers < self.config.colouring, shapes[:, None], colours[:, None])

    def draw_step(self, i: int, generator: torch.Generator) -> dict[str, Tensor]:
        """One step of regression: the synthesis network learns to draw the face that W+ stands for.

        The layers that draw get the w of one face, and the layers that colour get the w of another. The
        target has the shapes of the first face in the colours of the second, so each group of layers learns
        its task. There is no noise: toon faces have no random detail, and noise would hide early errors.
        """
        c, pool = self.config, self.faces
        self.opt_draw.param_groups[0]["lr"] = c.lr * min(1.0, (i + 1) / 200, 1.1 - i / c.steps)
        shape, its_colours, its_shape, colour = (pool.draw(c.batch, generator) for _ in range(4))
        pairs = (its_colours, shape), (colour, its_shape)
        w = self._mixed(*(self.to_w(factors_of(pool.colours[c], pool.shapes[s])) for c, s in pairs))
        covered = pool.covered(shape)
        wrong = self.g.synthesis(w, "none", self.dtype) - picture(covered, pool.palettes[colour])
        small = part_masks(covered)[:, [MASKS.index(part) for part in SMALL_PARTS]].sum(1, keepdim=True)
        weight = 1 + (c.small_parts - 1) * small
        loss = 0.0  # weighted L1 error of the pictures and of their gradients
        for e, k in ((wrong, 1), (wrong.diff(dim=2), 0.5), (wrong.diff(dim=3), 0.5)):
            loss = loss + k * (e.abs() * weight[..., : e.shape[2], : e.shape[3]]).mean() / weight.mean()
        self._descend(self.opt_draw, loss, self.synthesis, c.batch, c.batch * (i + 1))
        return {"error": loss.detach()}

    def map_step(self, i: int, generator: torch.Generator) -> dict[str, Tensor]:
        """One step of regression: the mapping network learns to map z to the w of the face it stands for.

        The error is in units of W's variance. Most of it arises where z crosses from one hair colour to the
        next, because w jumps there. Mixtures of the two colours are natural too, see ``NATURAL``.
        """
        c = self.config
        self.opt_map.param_groups[0]["lr"] = c.map_lr * min(1.0, (i + 1) / 50, 1.02 - i / c.map_steps)
        batch = torch.randint(len(self.z), (c.map_batch,), generator=generator).to(self.device)
        loss = ((self.g.map_one(self.z[batch]) - self.w[batch]) / c.w_std).square().mean()
        self._descend(self.opt_map, loss, list(self.g.style.parameters()), c.batch, math.inf)
        return {"unexplained": loss.detach()}

    def _descend(self, optimizer, loss: Tensor, parameters: list, batch: int, images: float) -> None:
        """One step of ``optimizer``; then the average follows ``parameters``. images: how many were seen."""
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = 0.5 ** (batch / min(self.config.ema_images, 0.05 * images + 1e-8))
        average = dict(zip(self.g.parameters(), self.ema.parameters(), strict=True))
        with torch.no_grad():
            torch._foreach_lerp_([average[p] for p in parameters], parameters, 1 - decay)

    @torch.no_grad()
    def finished(self) -> Generator:
        """Set the mean of W in the averaged generator, and return this generator."""
        sample = self.z[:STATISTICS]
        self.ema.w_avg.copy_(self.ema.map_one(sample).mean(0))
        return self.ema


def save_grid(generator: Generator, path: Path) -> None:
    """Save 8 x 8 uncurated samples at psi = 1 as a PNG."""
    z = torch.randn(64, generator.z_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        images = to_uint8(generator.synthesis(generator.mapping(z.to(generator.w_avg.device))))
    r = generator.resolution
    grid = Image.fromarray(images.reshape(8, 8, r, r, 3).swapaxes(1, 2).reshape(8 * r, 8 * r, 3))
    atomic_write(path, lambda part: grid.save(part, format="PNG"))


def train(
    config: GeneratorConfig, out: Path, device: torch.device | str = "cpu", preview_every: int = 500
) -> Generator:
    """Train, or resume the training in ``out``; returns the averaged generator.

    Each regression has its own folder, and the second starts from the end of the first; sample grids are in
    ``out/samples``.
    """
    training, before = GeneratorTraining(config, torch.device(device)), None
    for phase, step, steps in (
        ("1-drawing", training.draw_step, config.steps),
        ("2-mapping", training.map_step, config.map_steps),
    ):
        folder = out / phase
        if before and not (folder / CHECKPOINT).exists():
            for name, state in load_checkpoint(before)["state"].items():
                training.state[name].load_state_dict(state)

        def preview(done: int, phase: str = phase) -> None:
            save_grid(training.ema, out / "samples" / f"{phase}-{done:06d}.png")

        callbacks = [Callback(preview_every, preview)]
        run_training(f"generator, {phase}", step, config, training.state, folder, steps, callbacks)
        before = folder
    return training.finished()
