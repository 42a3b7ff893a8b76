"""One offset in W+ for all faces: what CF-CLIP's objective gives without a mapper that sees the face."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cfclip.baselines.editor import Editor
from cfclip.baselines.mappers import MapperEditor
from cfclip.checkpoints import weights
from cfclip.method.trainer import MapperTrainer
from cfclip.models.clip import ClipGuide
from cfclip.models.mapper import RESIDUAL_SCALE, level_slices
from cfclip.models.stylegan2 import Generator


class Offset(nn.Module):
    """A mapper whose residual ``delta`` [L, D] is the same for every face and every text."""

    def __init__(self, num_ws: int, w_dim: int):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(num_ws, w_dim))
        self.register_buffer("edited", torch.ones(num_ws, 1))  # 0 for the layers that stay as they are

    def read(self, clip: ClipGuide, texts: str | Sequence[str]) -> Tensor:
        """An empty feature [P, 0] of P texts: the offset does not depend on them."""
        return torch.zeros(1 if isinstance(texts, str) else len(texts), 0, device=clip.mean.device)

    def residual(self, w: Tensor, text_feature: Tensor | None = None) -> Tensor:
        """delta [N, L, D], before it is scaled by 0.1."""
        return (self.delta * self.edited).expand_as(w)

    def edit(self, w: Tensor, text_feature: Tensor | None = None, strength: float = 1.0) -> Tensor:
        """``w' = w + strength * 0.1 * delta``. w: [N, L, D]."""
        return w + (strength * RESIDUAL_SCALE) * self.residual(w)

    forward = edit


class OffsetTrainer(MapperTrainer):
    """CF-CLIP's step with an :class:`Offset` in the mapper's place: same losses, same optimiser."""

    def first_mapper(self, start: nn.Module | None = None) -> Offset:
        g, draw = self.domain.generator, torch.Generator().manual_seed(self.config.seed)
        offset = Offset(g.num_ws, g.w_dim)
        offset.delta.data.normal_(0, 0.01, generator=draw)  # at 0 a change of the picture has no direction
        for level, layers in level_slices(self.domain.level_split).items():
            offset.edited[layers] = float(level in self.config.levels)
        return offset


class OffsetEditor(MapperEditor):
    """``x' = G(w + strength * 0.1 * delta)``."""

    KIND, STORE_AS, sizes = "offset", None, Editor.sizes
    TRAINER = OffsetTrainer
    module: Offset

    @classmethod
    def open(cls, path: Path, generator: Generator) -> nn.Module:
        blank = Offset(generator.num_ws, generator.w_dim)
        return weights.load_into(blank, weights.read(path, cls.KIND)[0], path).to(generator.w_avg.device)
