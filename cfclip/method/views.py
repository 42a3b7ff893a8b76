"""The published augmentation: random perspectives of the edited pictures, one warp for a batch."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Corners = list[list[int]]


def perspective_views(
    images: Tensor, num_views: int = 8, distortion: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """:func:`each_view` put together: [N, 3, H, W] -> [num_views * N, 3, H, W], draw-major."""
    return torch.cat(list(each_view(images, num_views, distortion, generator)))


def each_view(
    images: Tensor, num_views: int = 8, distortion: float = 0.5, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """``num_views`` random perspectives, each one warp for the whole batch, mid-grey outside.

    Yields [N, 3, H, W], one view after the other: eight of 1024² are better shrunk one by one.
    ``num_views=0`` yields the images themselves.

    Args:
        distortion: how far a corner may move, as a share of half the side.
        generator: random numbers (CPU), drawn exactly as torchvision's ``RandomPerspective(distortion, p=1)``
            does. Default: torch's global ones.
    """
    if not num_views:
        yield images
    height, width = images.shape[-2:]
    for _ in range(num_views):
        start, end = draw_corners(width, height, distortion, generator)
        grid = perspective_grid(start, end, height, width, images.device).to(images)
        grid = grid.expand(len(images), -1, -1, -1)
        yield F.grid_sample(images, grid, align_corners=False)


def draw_corners(
    width: int, height: int, distortion: float = 0.5, generator: torch.Generator | None = None
) -> tuple[Corners, Corners]:
    """The four corners and where they move to, in pixels, clockwise from the top left.

    The same random numbers as torchvision's ``RandomPerspective.forward`` and ``get_params``, which take no
    generator.
    """

    def draw(size: int, far: bool) -> int:
        reach = int(distortion * (size // 2))
        low, high = (size - reach - 1, size) if far else (0, reach + 1)
        return int(torch.randint(low, high, (1,), generator=generator).item())

    torch.rand(1, generator=generator)  # torchvision compares it with p
    start = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
    return start, [[draw(width, x > 0), draw(height, y > 0)] for x, y in start]


def perspective_grid(
    start: Sequence[Sequence[float]],
    end: Sequence[Sequence[float]],
    height: int,
    width: int,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Where to read a picture so that its four points ``start`` come to lie at ``end``.

    Points in pixels; returns [1, H, W, 2] as ``F.grid_sample`` takes it. ``u = (a x + b y + c) / (g x + h y +
    1)``, ``v = (d x + e y + f) / (g x + h y + 1)``; twice as fast at 1024² as torchvision's matrix product
    per pixel.
    """
    rows = [
        row
        for (x, y), (u, v) in zip(end, start, strict=True)
        for row in ([x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y])
    ]
    values = torch.tensor(start, dtype=torch.float64).flatten()
    solved = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), values)
    a, b, c, d, e, f, g, h = solved.tolist()
    x, y = torch.arange(width, device=device) + 0.5, torch.arange(height, device=device)[:, None] + 0.5
    below = g * x + (h * y + 1)
    u, v = (a * x + (b * y + c)) / below, (d * x + (e * y + f)) / below
    return torch.stack([u * (2 / width) - 1, v * (2 / height) - 1], -1)[None]
