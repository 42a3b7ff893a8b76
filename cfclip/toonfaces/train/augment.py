"""What training pictures are put through: perspectives, blur, tints, halos."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from cfclip.toonfaces.factors import PARTS, Face, colours
from cfclip.toonfaces.render import MASKS, render


def random_warp(images: Tensor, share: float, strength: float = 0.5) -> Tensor:
    """Another random perspective for each image (a ``share`` of them), mid-grey outside. [N, 3, R, R] in [-1, 1]."""
    n = len(images)
    corners = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
    moved = corners * (1 - strength * torch.rand(n, 4, 2))
    x, y = corners[:, 0].expand(n, 4), corners[:, 1].expand(n, 4)
    u, v = moved.unbind(-1)
    o, z = torch.ones_like(u), torch.zeros_like(u)
    rows = torch.cat(
        [
            torch.stack([u, v, o, z, z, z, -x * u, -x * v], -1),
            torch.stack([z, z, z, u, v, o, -y * u, -y * v], -1),
        ],
        1,
    )
    h = torch.linalg.solve(rows, torch.cat([x, y], 1))  # output point -> input point
    h = torch.cat([h, torch.ones(n, 1)], 1).reshape(n, 3, 3)
    r = images.shape[-1]
    axis = (torch.arange(r) + 0.5) * 2 / r - 1
    grid = torch.stack([*torch.meshgrid(axis, axis, indexing="xy"), torch.ones(r, r)], -1)
    p = torch.einsum("nij,hwj->nhwi", h, grid)
    warped = F.grid_sample(images, p[..., :2] / p[..., 2:], padding_mode="zeros", align_corners=False)
    return torch.where(torch.rand(n, 1, 1, 1) < share, warped, images)


def degrade(images: Tensor) -> Tensor:
    """Blur and noise on some images, so that the network does not depend on the renderer's exact edges; tints in soft patches on
    some, or it would take a green glow about the mouth for green lips, and edits would make one."""
    n, r = len(images), images.shape[-1]
    soft = F.interpolate(
        F.interpolate(images, scale_factor=0.6, mode="bilinear", antialias=True), (r, r), mode="bilinear"
    )
    images = torch.lerp(images, soft, torch.rand(n, 1, 1, 1) * (torch.rand(n, 1, 1, 1) < 0.5))
    for cells in (4, 8):
        tint = F.interpolate(torch.randn(n, 3, cells, cells), (r, r), mode="bicubic")
        images = images + 0.2 * torch.rand(n, 1, 1, 1) * (torch.rand(n, 1, 1, 1) < 0.5) * tint
    return images + 0.06 * torch.rand(n, 1, 1, 1) * torch.randn_like(images)


HALOED = {"skin": 0.05, "hair": 0.1, "eyebrows": 0.35, "eyes": 0.2, "lipstick": 0.25, "beard": 0.05}
"""How often :func:`with_halo` takes which part: the smaller, the more often it is mistaken."""


def with_halo(face: Face, rng: np.random.Generator, resolution: int = 64) -> np.ndarray:
    """``face`` with a colour smeared *around* one of its parts, and not on it or another small one; uint8 [R, R, 3].

    Its captions stay true. A CLIP that takes purple lids for purple eyebrows is one that edits will satisfy with purple lids.
    """
    drawn, part = render(face, resolution), rng.choice(PARTS, p=[HALOED[part] for part in PARTS])
    mask = drawn.masks[MASKS.index(part)]
    around = gaussian_filter(mask, rng.uniform(0.015, 0.06) * resolution)
    kept = np.maximum(
        mask, sum(drawn.masks[MASKS.index(small)] for small in ("eyebrows", "eyes", "lipstick", "beard"))
    )
    alpha = (around / max(around.max(), 1e-6) * rng.uniform(0.5, 2.5)).clip(0, 1) * (1 - kept)
    tint = np.array(list(colours(part).values())[rng.integers(len(colours(part)))])
    return np.rint(drawn.image + alpha[..., None] * (tint - drawn.image)).astype(np.uint8)
