"""The embedded encoder, photo -> W+."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cfclip.models.arcface import body, input_layer
from cfclip.models.stylegan2 import Generator


class ToonEncoder(nn.Module):
    """Photos [N, 3, S, S] in [-1, 1] -> W+ [N, L, D].

    ``w_l = w_avg + s (base + offset_l)`` with offset_0 = 0; s is the spread of W, ``w_spread``.

    Args:
        image_size: S, a multiple of 2^stages.
        num_ws, w_dim: L and D.
        stages: (in, out, units) per stage of the IR-SE body; each starts with stride 2.
        width: width of the code from which base and offsets are computed.
    """

    def __init__(self, image_size: int, num_ws: int, w_dim: int, stages: Sequence[Sequence[int]], width: int):
        super().__init__()
        self.image_size, self.num_ws, self.w_dim = image_size, num_ws, w_dim
        self.stages, self.width = tuple(map(tuple, stages)), width
        first, last, side = stages[0][0], stages[-1][1], image_size // 2 ** len(stages)
        self.body = nn.Sequential(*input_layer(first), *body(self.stages), nn.BatchNorm2d(last))
        self.code = nn.Sequential(nn.Flatten(), nn.Linear(last * side * side, width), nn.PReLU(width))
        self.base, self.offsets = nn.Linear(width, w_dim), nn.Linear(width, (num_ws - 1) * w_dim)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)
        self.register_buffer("w_avg", torch.zeros(w_dim))
        self.register_buffer("w_spread", torch.ones(()))

    @property
    def metadata(self) -> dict:
        """The constructor's arguments, ready for JSON."""
        sizes = {name: getattr(self, name) for name in ("image_size", "num_ws", "w_dim")}
        return sizes | {"stages": [list(s) for s in self.stages], "width": self.width}

    def fits(self, generator: Generator) -> bool:
        """Whether it was trained for this generator: same L, D and, to float16 precision, ``w_avg``."""
        if (self.num_ws, self.w_dim) != (generator.num_ws, generator.w_dim):
            return False
        return torch.allclose(self.w_avg, generator.w_avg, rtol=2e-3, atol=1e-3 * self.w_spread.item())

    def forward(self, images: Tensor) -> Tensor:
        return self.unlocked(images, self.num_ws)[0]

    def unlocked(self, images: Tensor, layers: int) -> tuple[Tensor, Tensor]:
        """W+ [N, L, D] with offsets in the first ``layers`` layers only; offsets [N, L - 1, D] in units of s.

        Raises ValueError for photos of another shape.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"the encoder needs photos of shape [N, 3, {self.image_size}, {self.image_size}], "
                f"not {list(images.shape)}: resize them first"
            )
        code = self.code(self.body(images))
        offsets = self.offsets(code).reshape(len(images), self.num_ws - 1, self.w_dim)
        offsets = offsets * (torch.arange(1, self.num_ws, device=images.device) < layers)[:, None]
        w = self.base(code)[:, None] + torch.cat([torch.zeros_like(offsets[:, :1]), offsets], 1)
        return self.w_avg + self.w_spread * w, offsets
