"""The frozen networks that make pictures from codes, and features from pictures.

Shapes: N pictures, L layers of W+, D = w_dim, R = resolution, V views, E = CLIP's embedding width. The unit
vectors of several guides are concatenated: E is then the sum of their widths.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.domain import Domain
from cfclip.method.config import GuidedConfig
from cfclip.method.loop import resolve_dtype
from cfclip.method.views import draw_perspectives, each_view
from cfclip.models.clip import autocast
from cfclip.models.stylegan2 import max_batch

KEPT = 2**27
"""How many numbers of the sources' perceptual features are kept; if more, each step computes its own."""


def check_networks(domain: Domain, config: GuidedConfig) -> None:
    """ValueError names a loss of ``config`` whose network ``domain`` lacks, or says it has too few guides."""
    domain.first_guides(config.guides)
    for name, network, kind in (
        ("lambda_id", domain.identity, "identity"),
        ("lambda_perc", domain.perceptual, "perceptual"),
    ):
        if getattr(config, name, 0) and network is None:
            raise ValueError(
                f"{name} is {getattr(config, name):g}, but domain {domain.name} has no {kind} network: "
                f"set {name}=0 (notebooks/presets/ has the paper's values)"
            )


class Sources(NamedTuple):
    """Codes to edit, and the features of their pictures, which are constant."""

    w: Tensor  # [N, L, D]
    clip: Tensor  # unit CLIP features [N, E]
    identity: Tensor | None  # unit identity features [N, I]; None without such a network
    perceptual: Tensor | None  # features [N, C, H, W]; None if not asked for, or more than KEPT


class FrozenNetworks:
    """A domain's generator and first ``guides`` CLIPs. They convolve in ``dtype`` and return float32."""

    def __init__(self, domain: Domain, dtype: str, guides: int = 1):
        self.domain, self.dtype = domain, getattr(torch, resolve_dtype(dtype, domain.device))
        self.half = None if self.dtype == torch.float32 else self.dtype
        self.generator = domain.generator
        self.guides = [guide.in_dtype(self.dtype) for guide in domain.first_guides(guides)]
        self._sources: dict[tuple[int, int, bool], Sources] = {}

    def synthesise(self, w: Tensor) -> Tensor:
        """w [N, L, D] -> pictures [N, 3, R, R]."""
        return self.generator.synthesis(w, dtype=self.half)

    def clip(self, images: Tensor, num_views: int = 0, generator: torch.Generator | None = None) -> Tensor:
        """Pictures [N, 3, R, R] in [-1, 1] -> unit CLIP features [N, E].

        With ``num_views`` the features are of random perspective views, [num_views * N, E], draw-major. All
        guides see the same views.
        """
        perspectives = draw_perspectives(num_views, *images.shape[-2:], generator=generator)
        return self.encode([(images, perspectives)])[0].flatten(0, 1)

    def encode(self, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Encode batches of (pictures, perspectives), see :func:`each_view`, in one pass of each guide.

        Returns the unit CLIP features [V, N, E] of each batch; V = 1 without perspectives.
        """
        views = [
            [guide.preprocess(view) for guide in self.guides]
            for images, perspectives in batches
            for view in each_view(images, perspectives)
        ]
        with autocast(batches[0][0].device, self.dtype):
            features = [
                guide.encode_image(torch.cat(seen), preprocessed=True)
                for guide, seen in zip(self.guides, zip(*views, strict=True), strict=True)
            ]
        units = torch.cat([F.normalize(feature.float(), dim=-1) for feature in features], -1)
        sizes = [max(1, len(perspectives)) * len(images) for images, perspectives in batches]
        parts = zip(units.split(sizes), batches, strict=True)
        return [part.unflatten(0, (-1, len(images))) for part, (images, _) in parts]

    @torch.no_grad()
    def sources(self, n: int, seed: int, perceptual: bool = False) -> Sources:
        """The first ``n`` training codes of ``seed``, encoded once; ``perceptual``: add those features."""
        if (key := (n, seed, perceptual)) not in self._sources:
            every, clip, identity, judged = self.domain.latents(n, "train", seed), [], [], []
            judge = self.domain.perceptual if perceptual else None
            for w in every.split(max_batch(self.generator)):
                images = self.synthesise(w)
                clip.append(self.clip(images))
                if self.domain.identity is not None:
                    identity.append(self.domain.identity(images))
                if judge is not None:
                    judged.append(judge(images))
                    if n * judged[0][0].numel() > KEPT:
                        judge, judged = None, []
            known = [torch.cat(some) if some else None for some in (clip, identity, judged)]
            self._sources[key] = Sources(every, *known)
        return self._sources[key]
