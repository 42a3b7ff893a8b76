"""StyleCLIP's latent optimisation (Patashnik et al. 2021, section 4): a search for each picture."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfclip.baselines.editor import Editor
from cfclip.domain import Domain, warn_null_edit
from cfclip.method.config import DTYPES, GuidedConfig
from cfclip.method.loop import begin_run, learning_rate, run_loop
from cfclip.method.networks import FrozenNetworks, check_networks
from cfclip.models.stylegan2 import Generator
from cfclip.settings import batch_size, int_at_least, number, one_of, seed_number, setting, text


@dataclass(frozen=True)
class OptimizationConfig(GuidedConfig):
    """``1 - cos(E_I(x'), E_T(t)) + lambda_l2 |w' - w|^2 + lambda_id L_id``, minimised for each picture."""

    prompt: str = setting(MISSING, text)
    steps: int = setting(300, int_at_least(1))
    lr: float = setting(0.1, number(above=True))  # of Adam, at the top of its ramp
    lambda_id: float = setting(0.005, number())
    lambda_l2: float = setting(0.008, number())  # of the sum of squares, not of their mean
    batch: int = setting(4, batch_size)  # pictures at a time; they do not influence each other
    seed: int = setting(0, seed_number)  # unused: nothing is random here, but all methods have it
    dtype: str = setting("float32", one_of(DTYPES))  # of the convolutions


class OptimizationEditor(Editor):
    """``x' = G(w + strength * d)``, with d optimised for each w in :meth:`edit`. Fitting does nothing."""

    KIND = "optimization"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._shifts: dict[bytes, Tensor] = {}
        self.options: dict[str, Any] = {}  # options of :func:`run_loop`, e.g. progress

    def edit(self, w: Tensor, strength: float = 1.0) -> Tensor:
        shift = torch.zeros_like(w) if strength == 0 else self.shift(w)
        with torch.no_grad():
            return self.domain.generator.synthesis(w + strength * shift)

    def round_trip(self, w: Tensor, strength: float = 1.0) -> None:
        """None: the reverse would be a second optimisation, for another prompt."""

    def shift(self, w: Tensor) -> Tensor:
        """d [N, L, D], kept for each picture: another strength costs no second optimisation."""
        keys = [one.cpu().numpy().tobytes() for one in w]
        if new := [i for i, key in enumerate(keys) if key not in self._shifts]:
            shifts = torch.cat([self._optimise(part) for part in w[new].split(self.config.batch)])
            self._shifts |= {keys[i]: shift for i, shift in zip(new, shifts, strict=True)}
        return torch.stack([self._shifts[key] for key in keys])

    @torch.enable_grad()
    def _optimise(self, w: Tensor) -> Tensor:
        c, identity = self.config, self.domain.identity
        networks = FrozenNetworks(self.domain, c.dtype, c.guides)
        # weighted, so that the product with the features of all guides is the weighted mean of their cosines
        each = zip(c.guide_shares, self.domain.first_guides(c.guides), strict=True)
        target = [share * F.normalize(guide.encode_text(c.prompt), dim=-1) for share, guide in each]
        target = torch.cat(target, -1)  # [1, E], E the sum of the guides' widths
        with torch.no_grad():
            source = identity(networks.synthesise(w)) if c.lambda_id else None
        shift = torch.zeros_like(w).requires_grad_()
        optimizer = torch.optim.Adam([shift], lr=c.lr)

        def step(i: int, generator: torch.Generator) -> dict[str, float]:
            optimizer.param_groups[0]["lr"] = c.lr * learning_rate(i / c.steps)
            images = networks.synthesise(w + shift)
            clip, l2 = 1 - networks.clip(images) @ target[0], shift.square().sum((1, 2))  # [N] each
            loss, losses = clip + c.lambda_l2 * l2, {"clip": clip, "l2": l2}
            if source is not None:
                losses["id"] = 1 - (identity(images) * source).sum(1)
                loss = loss + c.lambda_id * losses["id"]
            optimizer.zero_grad()
            loss.sum().backward()  # a sum: each picture's gradient is its own
            optimizer.step()
            return {name: value.mean().item() for name, value in ({"loss": loss} | losses).items()}

        self.rows = run_loop(step, c.steps, state={}, **{"desc": c.prompt, "progress": False} | self.options)
        return shift.detach()

    @classmethod
    def fit(cls, method: str, domain: Domain, config: Any, out: Path | None, **loop: Any) -> Editor:
        check_networks(domain, config)
        warn_null_edit(domain, config)
        config = begin_run(config, domain.device, out, method=method, **domain.described)
        editor = cls(method, domain, config, nn.Module())
        editor.options = loop
        return editor

    @classmethod
    def open(cls, path: Path, generator: Generator) -> nn.Module:
        return nn.Module()
