"""CF-CLIP's text-conditioned latent mapper: text embedding mapping (TEM), fusion, three residual mappers.

Shapes: N latents, L layers of W+, D = w_dim, E = width of the CLIP embedding (E = D = 512 in the paper).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cfclip.models.stylegan2 import EqualLinear, pixel_norm
from cfclip.settings import Settings, int_at_least, one_of, setting, some_of

LEVELS = ("coarse", "medium", "fine")
"""Layer groups of W+, each with its own residual mapper."""

PUBLISHED_SPLIT = (4, 8)
"""The first layers of medium and of fine. Published for 18 layers: 4² and 8², 16² and 32², 64² and more."""


def level_slices(split: Sequence[int] = PUBLISHED_SPLIT) -> dict[str, slice]:
    """Level -> its layers of W+."""
    medium, fine = split
    return dict(zip(LEVELS, (slice(0, medium), slice(medium, fine), slice(fine, None)), strict=True))


def split_or_error(value: Any) -> str | None:
    """The check of a split."""
    whole = isinstance(value, tuple | list) and all(type(layer) is int for layer in value)
    fine = whole and len(value) == 2 and 0 < value[0] < value[1]
    return None if fine else "two whole numbers from 1 that rise, the first layers of medium and of fine"


NORM_AXES = {"layer": 1, "channel": -1}
"""The dim of [N, L', D] that PixelNorm averages over."""

RESIDUAL_SCALE = 0.1
"""The published scale of the residual: ``w' = w + 0.1 delta``."""


@dataclass(frozen=True)
class MapperConfig(Settings):
    """What a mapper is made of; everything else can be read off its tensors."""

    num_ws: int = setting(18, int_at_least(1))  # L
    w_dim: int = setting(512, int_at_least(1))  # D
    # E; None: not conditioned on text (StyleCLIP's mapper)
    text_dim: int | None = setting(512, int_at_least(1, optional=True))
    levels: tuple[str, ...] = setting(LEVELS, some_of(LEVELS))
    norm_axis: str = setting("layer", one_of(NORM_AXES))  # see PixelNormMLP
    split: tuple[int, int] = setting(PUBLISHED_SPLIT, split_or_error)  # the domain's, see level_slices

    def fits(self, generator: nn.Module, clip: nn.Module) -> bool:
        """Whether the sizes are those of this generator and this CLIP."""
        sizes = self.num_ws, self.w_dim
        return sizes == (generator.num_ws, generator.w_dim) and self.text_dim in (None, clip.embed_dim)


class PixelNormMLP(nn.Module):
    """PixelNorm, then four ``EqualLinear(lr_mul=0.01)`` with leaky ReLU. [N, L', D_in] -> [N, L', D].

    ``norm_axis="layer"`` normalises over dim 1 as the published code does: for a single layer ``x / sqrt(x^2
    + 1e-8)``, which keeps only the sign of x. ``"channel"`` normalises over the last dim, as the paper's
    figure suggests.
    """

    def __init__(self, in_dim: int, dim: int, norm_axis: str):
        super().__init__()
        self.dim = NORM_AXES[norm_axis]
        self.layers = nn.ModuleList(
            EqualLinear(in_dim if i == 0 else dim, dim, lr_mul=0.01, activate=True) for i in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = pixel_norm(x, self.dim)
        for layer in self.layers:
            x = layer(x)
        return x


class Mapper(nn.Module):
    """CF-CLIP's mapper; with ``text_dim=None`` StyleCLIP's."""

    def __init__(self, config: MapperConfig):
        super().__init__()
        self.config = config
        d, norm = config.w_dim, config.norm_axis
        if config.text_dim is not None:
            self.text = nn.ModuleList(PixelNormMLP(config.text_dim, d, norm) for _ in range(config.num_ws))
            self.fuse = EqualLinear(2 * d, d, lr_mul=0.01, activate=True)
        self.levels = nn.ModuleDict({name: PixelNormMLP(d, d, norm) for name in config.levels})

    @classmethod
    def initialised(cls, config: MapperConfig, generator: torch.Generator) -> "Mapper":
        """An untrained mapper on the CPU, its weights drawn from ``generator`` alone."""
        with torch.device("meta"):
            mapper = cls(config)
        mapper.to_empty(device="cpu")
        for layer in mapper.modules():
            if isinstance(layer, EqualLinear):
                layer.reset(generator)
        return mapper

    @property
    def metadata(self) -> dict:
        """The configuration, for a file's header."""
        return asdict(self.config)

    def embed_text(self, text_feature: Tensor) -> Tensor:
        """TEM: raw CLIP feature of the plain prompt [1 or N, E] -> t [1 or N, L, D]. Raises ValueError."""
        if text_feature.ndim != 2 or text_feature.shape[1] != self.config.text_dim:
            raise ValueError(
                f"this mapper takes a text feature of shape [N, {self.config.text_dim}], "
                f"not {list(text_feature.shape)}: it was trained with another CLIP"
            )
        return torch.cat([mlp(text_feature[:, None]) for mlp in self.text], 1)

    def residual(self, w: Tensor, text_feature: Tensor | None = None) -> Tensor:
        """delta [N, L, D], before it is scaled by 0.1. Raises ValueError for a wrong shape."""
        num_ws, w_dim = self.config.num_ws, self.config.w_dim
        if w.ndim != 3 or w.shape[1:] != (num_ws, w_dim):
            raise ValueError(
                f"this mapper takes w of shape [N, {num_ws}, {w_dim}], not {list(w.shape)}: "
                "it belongs to a generator of another size"
            )
        x = w
        if self.config.text_dim is not None:
            if text_feature is None:
                raise ValueError("this mapper needs text_feature, the raw CLIP feature of the prompt")
            t = self.embed_text(text_feature).expand(len(w), -1, -1)
            x = self.fuse(torch.cat([w, t], -1))
        deltas = [
            self.levels[name](x[:, layers]) if name in self.levels else torch.zeros_like(w[:, layers])
            for name, layers in level_slices(self.config.split).items()
        ]
        return torch.cat(deltas, 1)

    def edit(self, w: Tensor, text_feature: Tensor | None = None, strength: float = 1.0) -> Tensor:
        """``w' = w + strength * 0.1 * delta(w, text)``. w: [N, L, D]; text_feature: [1, E] or [N, E]."""
        return w + (strength * RESIDUAL_SCALE) * self.residual(w, text_feature)
