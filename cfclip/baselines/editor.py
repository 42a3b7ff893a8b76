"""The interface of all methods: an editor turns codes into edited pictures."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cfclip.checkpoints import weights
from cfclip.domain import Domain
from cfclip.method.config import card_of
from cfclip.method.loop import Loop
from cfclip.models.stylegan2 import Generator
from cfclip.settings import Settings

Rows = list[dict[str, float]]


class Editor:
    """The result of :func:`cfclip.baselines.fit`. ``rows``: the log of its training."""

    KIND: ClassVar[str]  # the kind of its file, <KIND>.safetensors
    STORE_AS: ClassVar[torch.dtype | None] = None  # dtype of the tensors in the file; None: the module's
    path: Path | None = None  # the file that it was opened from

    def __init__(
        self, method: str, domain: Domain, config: Settings, module: nn.Module, rows: Rows | None = None
    ):
        self.method, self.domain, self.config = method, domain, config
        self.module, self.rows = module, rows or []

    def edit(self, w: Tensor, strength: float = 1.0) -> Tensor:
        """w [N, L, D] -> edited pictures [N, 3, R, R]; ``strength=0`` gives the source pictures."""
        raise NotImplementedError

    def round_trip(self, w: Tensor, strength: float = 1.0) -> Tensor | None:
        """Pictures [N, 3, R, R] after the edit and then its reverse; None if the method cannot be reversed.

        By default these are the source pictures: a step that is the same for all pictures is undone exactly.
        """
        return self.edit(w, 0.0)

    @property
    def sizes(self) -> Mapping[str, Any]:
        """The constructor's arguments of ``module``."""
        return {}

    def save(self, out: str | os.PathLike, success: float | None = None) -> Path:
        """Write the editor into the folder ``out``, for :func:`cfclip.baselines.load_editor`.

        success: as for :func:`.card_of`; the explorer shows it.
        """
        card = card_of(self.method, self.domain.name, self.config, success)
        path = Path(out) / f"{self.KIND}.safetensors"
        return weights.save(self.module, path, self.KIND, self.sizes, self.STORE_AS, **card)

    @classmethod
    def fit(cls, method: str, domain: Domain, config: Any, out: Path | None, **loop: Any) -> "Editor":
        """Train an editor, or resume its training in ``out``; ``loop``: options of :func:`run_loop`."""
        raise NotImplementedError

    @classmethod
    def loop(cls, method: str, domain: Domain, config: Any, out: Path | None, **loop: Any) -> Loop:
        """:meth:`fit` as a generator that yields a trainer and its steps; by default it yields nothing."""
        yield from ()
        return cls.fit(method, domain, config, out, **loop)

    @classmethod
    def open(cls, path: Path, generator: Generator) -> nn.Module:
        """``module`` from its file, on the device of ``generator``."""
        raise NotImplementedError
