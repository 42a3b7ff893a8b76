"""Editors that train a latent mapper: CF-CLIP, StyleCLIP's mapper, StyleGAN-NADA's loss on that mapper."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cfclip.baselines.editor import Editor
from cfclip.checkpoints.mappers import load_mapper
from cfclip.domain import Domain
from cfclip.method.loop import Loop
from cfclip.method.trainer import MapperTrainer, mapper_loop
from cfclip.models.mapper import Mapper
from cfclip.models.stylegan2 import Generator


class MapperEditor(Editor):
    """``x' = G(w + strength * 0.1 * delta(w, t))``. Weights are rounded to half floats, as in the file."""

    KIND, STORE_AS = "mapper", torch.float16
    TRAINER: ClassVar[type[MapperTrainer]] = MapperTrainer
    module: Mapper

    def edit(self, w: Tensor, strength: float = 1.0) -> Tensor:
        return self.domain.edit(w, self.config.prompt, self.module, strength)

    @torch.no_grad()
    def round_trip(self, w: Tensor, strength: float = 1.0) -> Tensor:
        """``G(w' - strength * 0.1 * delta(w', t))``: the residual at w' differs from that at w."""
        edited = self.domain.edited(w, self.config.prompt, self.module, strength)
        return self.edit(edited, -strength)

    @property
    def sizes(self) -> Mapping[str, Any]:
        return self.module.metadata

    @classmethod
    def loop(cls, method: str, domain: Domain, config: Any, out: Path | None, **loop: Any) -> Loop:
        """Like :func:`.mapper_loop`, so that the training can be one of a pack."""
        run, rows = yield from mapper_loop(domain, config, out, method, trainer=cls.TRAINER, **loop)
        module = run.mapper
        if cls.STORE_AS is not None:
            module = module.to(cls.STORE_AS).float()  # rounded as in its file
        return cls(method, domain, run.config, module, rows)

    @classmethod
    def open(cls, path: Path, generator: Generator) -> nn.Module:
        return load_mapper(path).to(generator.w_avg.device)
