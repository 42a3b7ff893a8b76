"""Augmentation of training pictures: perspectives, blur, noise, tints, halos."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from cfclip.toonfaces.factors import PARTS, Face, colours
from cfclip.toonfaces.render import MASKS, render


def random_warp(images: Tensor, share: float, strength: float = 0.5) -> Tensor:
    """Random perspectives of a random ``share`` of the images, mid-grey outside. [N, 3, R, R] in [-1, 1]."""
    n = len(images)
    corners = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
    moved = corners * (1 - strength * torch.rand(n, 4, 2))
    x, y = corners[:, 0].expand(n, 4), corners[:, 1].expand(n, 4)
    u, v = moved.unbind(-1)
    o, z = torch.ones_like(u), torch.zeros_like(u)
    rows = [[u, v, o, z, z, z, -x * u, -x * v], [z, z, z, u, v, o, -y * u, -y * v]]
    rows = torch.cat([torch.stack(row, -1) for row in rows], 1)
    h = torch.linalg.solve(rows, torch.cat([x, y], 1))  # output point -> input point
    h = torch.cat([h, torch.ones(n, 1)], 1).reshape(n, 3, 3)
    r = images.shape[-1]
    axis = (torch.arange(r) + 0.5) * 2 / r - 1
    grid = torch.stack([*torch.meshgrid(axis, axis, indexing="xy"), torch.ones(r, r)], -1)
    p = torch.einsum("nij,hwj->nhwi", h, grid)
    warped = F.grid_sample(images, p[..., :2] / p[..., 2:], padding_mode="zeros", align_corners=False)
    return torch.where(torch.rand(n, 1, 1, 1) < share, warped, images)


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and tint some of the images, and add noise to all. ``generator``: on the device of the images.

    Blur and noise: so that the network does not depend on the renderer's exact edges. Soft patches of colour:
    otherwise it takes a green glow around the mouth for green lips, and edits learn to add that glow.
    """
    n, r = len(images), images.shape[-1]

    def some(share: float) -> Tensor:
        """A random amount from 0 to 1 for a ``share`` of the images, 0 for the others [N, 1, 1, 1]."""
        amount, chosen = torch.rand(2, n, 1, 1, 1, generator=generator, device=images.device)
        return amount * (chosen < share)

    def noise(*shape: int) -> Tensor:
        return torch.randn(n, 3, *shape, generator=generator, device=images.device)

    small = F.interpolate(images, scale_factor=0.6, mode="bilinear", antialias=True)
    images = torch.lerp(images, F.interpolate(small, (r, r), mode="bilinear"), some(0.5))
    for cells in (4, 8):
        tint = F.interpolate(noise(cells, cells), (r, r), mode="bicubic")
        images = images + 0.2 * some(0.5) * tint
    return images + 0.06 * some(1) * noise(r, r)


HALOED = {"skin": 0.05, "hair": 0.1, "eyebrows": 0.35, "eyes": 0.2, "lipstick": 0.25, "beard": 0.05}
"""How often :func:`with_halo` chooses which part: small ones more often, as CLIP confuses them easily."""


def with_halo(face: Face, rng: np.random.Generator, resolution: int = 64) -> np.ndarray:
    """``face`` with a colour smeared *around* one of its parts, but not on a small part; uint8 [R, R, 3].

    Its captions stay true. If CLIP took purple lids for purple eyebrows, edits would paint the lids.
    """
    drawn, part = render(face, resolution), rng.choice(PARTS, p=[HALOED[part] for part in PARTS])
    mask = drawn.masks[MASKS.index(part)]
    around = gaussian_filter(mask, rng.uniform(0.015, 0.06) * resolution)
    small = sum(drawn.masks[MASKS.index(name)] for name in ("eyebrows", "eyes", "lipstick", "beard"))
    kept = np.maximum(mask, small)
    alpha = (around / max(around.max(), 1e-6) * rng.uniform(0.5, 2.5)).clip(0, 1) * (1 - kept)
    tint = np.array(list(colours(part).values())[rng.integers(len(colours(part)))])
    return np.rint(drawn.image + alpha[..., None] * (tint - drawn.image)).astype(np.uint8)
