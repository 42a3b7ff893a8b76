"""The ceiling of any editor of this generator: W+ optimised straight to the rendered true counterfactual."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import metrics
from ..domains import Domain
from ..ops import fast_dtype
from .captions import claim_of
from .factors import Face, sample_face
from .gan import to_tensor
from .render import MASKS, render

PROMPTS: tuple[str, ...] = (
    "green skin", "blue skin", "blue hair", "pink hair", "purple eyebrows", "cyan eyebrows", "red eyes", "purple eyes",
    "green lipstick", "blue lipstick", "green beard", "white beard",
)
"""Two of every part, all of them counterfactual."""


def _weights(faces: Sequence[Face], resolution: int, part: str | None) -> Tensor:
    """Of the error at every pixel [N, 1, R, R]: ``part`` weighs as much as all the rest together, or without ``part`` every one as much."""
    masks = torch.from_numpy(np.stack([render(face, resolution).masks for face in faces]))
    if part is not None:
        masks = masks[:, [MASKS.index(part)]]
        masks = torch.cat([masks, 1 - masks], 1)
    share = masks.mean((2, 3), keepdim=True)
    return (masks / share.clamp_min(0.002)).sum(1, keepdim=True)


def _fit(domain: Domain, target: Tensor, weight: Tensor, start: Tensor, layers: slice, steps: int, lr: float) -> Tensor:
    """W+ that draws ``target``, changed from ``start`` in ``layers`` only."""
    free = start[:, layers].clone().requires_grad_()
    optimizer, dtype = torch.optim.Adam([free], lr), fast_dtype(domain.device)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - i / steps))
        w = start.clone()
        w[:, layers] = free
        loss = (weight * (domain.generator.synthesis(w, dtype=dtype) - target).abs()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return w.detach()


@dataclass(frozen=True)
class Start:
    """Where an edit by ``prompt`` begins and where it should end: renders [N, 3, R, R], and the W+ that draw the closest to them."""

    prompt: str
    natural: Tensor
    wanted: Tensor
    w: Tensor
    w_edited: Tensor


def starts(domain: Domain, prompts: Sequence[str], n: int, steps: int, lr: float = 0.05, seed: int = 60_000,
           first_layer: int = 0) -> Iterator[Start]:
    """One :class:`Start` a prompt, of ``n`` natural faces that have the part.

    ``w`` is all layers fitted (L1) to the render; ``w_edited`` is ``w`` with the layers from ``first_layer`` on fitted to the recoloured one.
    """
    if unclear := [prompt for prompt in prompts if claim_of(prompt) is None]:
        raise ValueError(f"{unclear[0]!r} names no colour of a part: there is no true counterfactual to aim at")
    g, sources = domain.generator, {}
    for prompt in prompts:
        part, colour = claim_of(prompt)
        faces = tuple([face for face in (sample_face((seed, k)) for k in range(6 * n)) if face.has(part)][:n])
        natural, wanted = (to_tensor([render(face, g.resolution).image for face in group])
                           for group in (faces, [face.with_colour(part, colour) for face in faces]))
        if faces not in sources:                                   # most parts are asked of the same faces
            start = g.w_avg.expand(n, g.num_ws, -1)
            sources[faces] = _fit(domain, natural, _weights(faces, g.resolution, None), start, slice(None), steps, lr)
        w = sources[faces]
        yield Start(prompt, natural, wanted, w, _fit(domain, wanted, _weights(faces, g.resolution, part), w, slice(first_layer, None), steps, lr))


def ceiling(domain: Domain, prompts: Sequence[str] = PROMPTS, n: int = 12, steps: int = 150, lr: float = 0.05, seed: int = 60_000,
            first_layer: int = 0) -> list[dict[str, float]]:
    """Metrics of ``G(w_plus*)``, the closest the generator comes to ``n`` natural renders with the part recoloured; a row per prompt.

    See :func:`starts`; the source is what the generator makes of the render itself, so what is scored is the edit and not the inversion.
    ``true_*``: what the same metrics say of the renders themselves. No editor can be asked for less leakage than that, or more identity.
    """
    rows = []
    for start in starts(domain, prompts, n, steps, lr, seed, first_layer):
        with torch.no_grad():
            source, edited = (domain.generator.synthesis(w) for w in (start.w, start.w_edited))
        scores, truth = (metrics.evaluate(metrics.Edit(domain, start.prompt, *pair))
                         for pair in ((source, edited), (start.natural, start.wanted)))
        truth = {f"true_{name}": truth[name] for name in ("success_after", "leakage", "identity")}
        rows.append({"prompt": start.prompt, "n": n} | {name: float(np.nanmean(values)) for name, values in (scores | truth).items()})
    return rows
