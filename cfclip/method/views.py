"""The published augmentation: random perspectives of the edited pictures, one warp for a batch."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

WARPED_AT_ONCE = 2**23
"""How many numbers are warped at a time: all eight views of small pictures, but only one view at 1024²."""
DISTORTION = 0.5
"""How far a corner may move, as a share of half the side."""
FAR = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]])
"""For each corner, clockwise from the top left: whether x, and whether y, is at the far end."""


def perspective_views(images: Tensor, num_views: int = 8, generator: torch.Generator | None = None) -> Tensor:
    """Random perspective views, mid-grey outside. Each view is one warp of the whole batch.

    [N, 3, H, W] -> [num_views * N, 3, H, W], draw-major; the images themselves for ``num_views=0``.
    """
    perspectives = draw_perspectives(num_views, *images.shape[-2:], generator)
    return torch.cat(list(each_view(images, perspectives)))


def each_view(images: Tensor, perspectives: Tensor) -> Iterator[Tensor]:
    """Views of images [N, 3, H, W], a few at a time, so that views of 1024² can be shrunk one by one.

    perspectives: [V, 8] from :func:`draw_perspectives`, or [V, N, 8], separate for each image. Yields
    [v N, 3, H, W], draw-major, V views in total; without perspectives the images themselves.
    """
    if not len(perspectives):
        yield images
        return
    size, perspectives = images.shape[-2:], perspectives.to(images.device, non_blocking=True)
    for some in perspectives.split(max(1, WARPED_AT_ONCE // images.numel())):
        grids = perspective_grids(some, *size).to(images)  # [v, H, W, 2] or [v, N, H, W, 2]
        # the views of an image lie below each other in one grid, so that the image need not be copied
        grid = grids.movedim(-4, 0).flatten(-4, -3) if grids.ndim == 5 else grids.flatten(0, 1)
        views = F.grid_sample(images, grid.expand(len(images), -1, -1, -1), align_corners=False)
        yield views.unflatten(2, (len(some), -1)).movedim(2, 0).flatten(0, 1)


def draw_perspectives(
    num_views: int, height: int, width: int, generator: torch.Generator | None = None
) -> Tensor:
    """Random perspectives [num_views, 8] from :func:`draw_corners`; see :func:`perspective_grids`."""
    return perspective_coefficients(draw_corners(num_views, height, width, generator), height, width)


def draw_corners(num_views: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """Where the four corners move to, in pixels (x, y), clockwise from the top left: [num_views, 4, 2].

    Drawn from ``generator`` (default: torch's global one) exactly as by torchvision's
    ``RandomPerspective(DISTORTION, p=1)``.
    """
    reach = torch.tensor([int(DISTORTION * (side // 2)) for side in (width, height)])
    # torchvision draws one number to compare with p, then x and y of each corner, both below reach + 1. One
    # call draws all of them below a common multiple; their remainders are torchvision's numbers
    several = math.lcm(*(reach + 1).tolist())
    drawn = torch.randint(several, (num_views, 9), generator=generator)[:, 1:].unflatten(1, (4, 2))
    return drawn % (reach + 1) + FAR * (torch.tensor([width - 1, height - 1]) - reach)


def perspective_coefficients(end: Tensor, height: int, width: int) -> Tensor:
    """a … h of the perspectives that bring a picture's corners to ``end``; [..., 4, 2] -> [..., 8].

    Solved in float64, returned in float32.
    """
    end = end.double()
    start = (FAR * torch.tensor([width - 1, height - 1])).to(end)
    moved = torch.cat([end, torch.ones_like(end[..., :1])], -1)  # [..., 4, 3]: x, y, 1
    none = torch.zeros_like(moved)
    rows = [
        torch.cat([*parts, -start[:, axis, None] * end], -1)  # [..., 4, 8]
        for axis, parts in enumerate(([moved, none], [none, moved]))
    ]
    wanted = start.T.flatten().expand(*end.shape[:-2], 8)
    return torch.linalg.solve(torch.cat(rows, -2), wanted[..., None])[..., 0].float()


def perspective_grids(coefficients: Tensor, height: int, width: int) -> Tensor:
    """Where to read a picture so that it is seen in these perspectives: [..., 8] -> [..., H, W, 2].

    The grid is for ``F.grid_sample``, and twice as fast at 1024² as torchvision's matrix product per pixel:
    ``u = (a x + b y + c) / (g x + h y + 1)``, ``v = (d x + e y + f) / (g x + h y + 1)``.
    """
    device = coefficients.device
    x, y = torch.arange(width, device=device) + 0.5, torch.arange(height, device=device)[:, None] + 0.5
    a, b, c, d, e, f, g, h = coefficients[..., None, None].unbind(-3)
    below = g * x + (h * y + 1)
    u, v = (a * x + (b * y + c)) / below, (d * x + (e * y + f)) / below
    return torch.stack([u * (2 / width) - 1, v * (2 / height) - 1], -1)
