"""Bad pictures for CLIP's training, on any device: smears, tints, blur, noise, perspectives.

CLIP must know the pictures that optimisers make; otherwise optimisers exploit its errors on them. All random
numbers come from a generator on the device of the pictures. Pictures: [N, 3, R, R] in [-1, 1].
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.toonfaces.factors import HELD_OUT, PARTS, colours
from cfclip.toonfaces.render import MASKS

PAINTS: tuple[tuple[str, str], ...] = tuple(
    (part, name) for part in PARTS for name in colours(part) if (part, name) not in HELD_OUT
)
"""The (part, colour) pairs that are smeared: all except those held out from CLIP."""

SMEARED = {
    "skin": 1, "hair": 2, "eyebrows": 4, "eyes": 4, "lipstick": 4, "beard": 2, "glasses": 1, "shirt": 2,
}  # fmt: skip
"""How often a part is smeared: small parts more often, because CLIP confuses them easily."""
SMALL = ("eyebrows", "eyes", "lipstick", "beard", "glasses")
"""Parts that a halo leaves as they are."""
HIDDEN, PAINTED = 0.12, 0.9
"""A part's colour is unknown if a share of it above HIDDEN is covered.

It has the new colour if the coat is more opaque than PAINTED and covers three quarters of the part.
"""
TINTED = 0.7
"""A coated part that is still farther than this from the new colour (RGB in [-1, 1]) surely lacks it."""


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of each picture [N, C, R, R] with its own ``sigma`` [N] in pixels; 0: none."""
    x = torch.arange(images.shape[-1], device=images.device, dtype=images.dtype)
    squared = (x[:, None] - x).square()
    kernel = torch.exp(-0.5 * squared / sigma.clamp_min(0.05).square()[:, None, None])  # [N, R, R]
    kernel = (kernel / kernel.sum(2, keepdim=True))[:, None]
    return kernel @ images @ kernel.transpose(2, 3)


@dataclass(frozen=True)
class Smears:
    """What :class:`Smear` did to N pictures; P parts in the order of ``PARTS``."""

    images: Tensor
    hidden: Tensor  # bool [N, P]: whether the part's colour is no longer known
    painted: Tensor  # bool [N, P]: whether the part has a new colour, number ``paint``
    tinted: Tensor  # bool [N, P]: whether it has only a tint of this colour, and surely not the colour
    paint: Tensor  # int64 [N], index into PAINTS


class Smear:
    """Smears a colour over some pictures, in one of four ways.

    A halo surrounds a part, but does not cover small parts. If CLIP took purple lids for purple eyebrows,
    edits would paint the lids. A spill covers any part, the background or a neighbourhood, more or less
    opaquely. A leak spreads the part's present colour around it. A coat covers the part, sometimes thinly.
    All but the leak use a named colour of the part.

    device: the device of the pictures. The tables are made once: at each call, a GPU would wait for them.
    """

    def __init__(self, device: torch.device):
        self.of_part = torch.tensor([MASKS.index(part) for part in PARTS], device=device)
        self.of_small = torch.tensor([MASKS.index(part) for part in SMALL], device=device)
        often = torch.tensor([float(SMEARED[part]) for part in PARTS])
        self.up_to = (often.cumsum(0) / often.sum())[:-1].to(device)
        owners = [part for part, _ in PAINTS]  # a part's paints are side by side
        self.first = torch.tensor([owners.index(part) for part in PARTS], device=device)
        self.count = torch.tensor([owners.count(part) for part in PARTS], device=device)
        self.rgb = torch.tensor([colours(part)[name] for part, name in PAINTS], device=device) / 127.5 - 1

    def __call__(self, images: Tensor, masks: Tensor, share: float, generator: torch.Generator) -> Smears:
        """Smear a random ``share`` of the pictures. masks: coverage [N, len(MASKS), R, R] in [0, 1]."""
        n, r, device = len(images), images.shape[-1], images.device
        draw = partial(torch.rand, generator=generator, device=device)

        def mask_of(part: Tensor) -> Tensor:
            """Numbers of masks [N] -> the masks [N, 1, R, R]."""
            return masks.gather(1, part[:, None, None, None].expand(n, 1, r, r))

        part = torch.searchsorted(self.up_to, draw(n), right=True)  # multinomial() waits for a GPU's checks
        paint = self.first[part] + torch.minimum((draw(n) * self.count[part]).long(), self.count[part] - 1)
        way = draw(n, 1, 1, 1)
        halo, leak, coat = way < 0.35, (way >= 0.35) & (way < 0.5), way >= 0.75  # between them: a spill

        mask = mask_of(self.of_part[part])
        area = mask.sum((2, 3), keepdim=True)
        own = (images * mask).sum((2, 3), keepdim=True) / area.clamp_min(1e-6)
        colour = self.rgb[paint][:, :, None, None] + 0.1 * (2 * draw(n, 3, 1, 1) - 1)
        colour = torch.where(leak, own, colour).clamp(-1, 1)

        around = blur(mask, (0.015 + 0.06 * draw(n)) * r)
        around = around / around.amax((2, 3), keepdim=True).clamp_min(1e-3)
        small = masks[:, self.of_small].sum(1, keepdim=True)
        anywhere = (draw(n) * len(MASKS)).long().clamp_max(len(MASKS) - 1)
        target = torch.where(coat, mask, mask_of(anywhere))
        near = draw(n, 1, 1, 1) < 0.4  # a spill over the neighbourhood of its part
        soft = blur(target, 1.2 * draw(n) * (draw(n) < 0.6))
        region = torch.where(~coat & near, (around * (1 + 2 * draw(n, 1, 1, 1))).clamp(0, 1), soft)
        strength = draw(n, 1, 1, 1)
        strength = torch.where(coat & (draw(n, 1, 1, 1) < 0.6), 0.92 + 0.08 * strength, strength)
        ring = (around * (0.5 + 2 * strength)).clamp(0, 1)
        alpha = torch.where(halo, ring * (1 - torch.maximum(mask, small).clamp(0, 1)), region * strength)
        alpha = torch.where(leak, ring * (1 - mask), alpha)
        # a part that is not there has no colour to smear
        alpha = alpha * (draw(n, 1, 1, 1) < share) * (area > 4)

        parts = masks[:, self.of_part]
        covered = (parts * alpha).sum((2, 3)) / parts.sum((2, 3)).clamp_min(1e-6)
        chosen = torch.arange(len(PARTS), device=device) == part[:, None]
        painted = chosen & coat.flatten(1) & (strength.flatten(1) > PAINTED) & (covered > 0.75)
        far = (1 - covered) * (own - colour).flatten(1).norm(dim=1, keepdim=True)
        tinted = chosen & coat.flatten(1) & ~painted & (covered > 0) & (far > TINTED)
        return Smears(torch.lerp(images, colour, alpha), covered > HIDDEN, painted, tinted, paint)


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and tint some of the images, and add noise to all.

    Blur and noise keep the network from depending on the renderer's exact edges. Without soft patches of
    colour it takes a green glow around the mouth for green lips, and edits learn to add that glow.
    """
    n, r, device = len(images), images.shape[-1], images.device
    draw = partial(torch.rand, generator=generator, device=device)
    images = blur(images, 1.2 * draw(n) * (draw(n) < 0.6))
    for cells in (4, 8):
        patches = torch.randn(n, 3, cells, cells, generator=generator, device=device)
        tint = F.interpolate(patches, (r, r), mode="bicubic")
        images = images + 0.2 * draw(n, 1, 1, 1) * (draw(n, 1, 1, 1) < 0.5) * tint
    noise = torch.randn(images.shape, generator=generator, device=device)
    return images + 0.06 * draw(n, 1, 1, 1) * noise


def random_warp(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Random perspectives of a random ``share`` of the images, mid-grey outside."""
    n, r, device = len(images), images.shape[-1], images.device
    draw = partial(torch.rand, generator=generator, device=device)
    corner = torch.arange(4, device=device)  # not copied from the CPU: a GPU would wait for that
    corners = torch.stack([(corner == 1) | (corner == 2), corner >= 2], 1) * 2.0 - 1  # clockwise
    moved = corners * (1 - 0.5 * draw(n, 4, 2))
    x, y = corners[:, 0].expand(n, 4), corners[:, 1].expand(n, 4)
    u, v = moved.unbind(-1)
    o, z = torch.ones_like(u), torch.zeros_like(u)
    rows = [[u, v, o, z, z, z, -x * u, -x * v], [z, z, z, u, v, o, -y * u, -y * v]]
    rows = torch.cat([torch.stack(row, -1) for row in rows], 1)
    # output point -> input point; solve() would wait for a GPU to check for errors
    h = torch.linalg.solve_ex(rows, torch.cat([x, y], 1)[..., None])[0][..., 0]
    h = torch.cat([h, o[:, :1]], 1).reshape(n, 3, 3)
    axis = (torch.arange(r, device=device) + 0.5) * 2 / r - 1
    grid = torch.stack([*torch.meshgrid(axis, axis, indexing="xy"), torch.ones(r, r, device=device)], -1)
    p = torch.einsum("nij,hwj->nhwi", h, grid)
    warped = F.grid_sample(images, p[..., :2] / p[..., 2:], padding_mode="zeros", align_corners=False)
    return torch.where(draw(n, 1, 1, 1) < share, warped, images)
