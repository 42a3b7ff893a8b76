"""The ceiling of any editor of this generator: W+ optimised straight to the rendered true counterfactual."""

import numpy as np
import torch

from .. import metrics
from ..domains import Domain
from .captions import claim_of
from .factors import sample_face
from .gan import to_tensor
from .render import MASKS, render


def ceiling(domain: Domain, prompt: str, n: int = 16, steps: int = 200, lr: float = 0.05, seed: int = 60_000) -> dict[str, float]:
    """Metrics of ``G(w_plus*)``, the closest (L1) the generator comes to ``n`` natural renders with the part recoloured.

    The part weighs as much as all the rest of the picture, or lips would hardly count. The source is the same
    optimisation towards the render itself, so what is scored is the edit and not the inversion.
    """
    part, colour = claim_of(prompt) or (None, None)
    if part is None:
        raise ValueError(f"{prompt!r} names no colour of a part: there is no true counterfactual to aim at")
    faces = [f for f in (sample_face((seed, k)) for k in range(4 * n)) if f.has(part)][:n]
    g = domain.generator
    area = torch.from_numpy(np.stack([render(f, g.resolution).masks[MASKS.index(part)] for f in faces]))[:, None]
    weight = area / area.mean((1, 2, 3), keepdim=True) + (1 - area) / (1 - area).mean((1, 2, 3), keepdim=True)

    def invert(target: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        w = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([w], lr)
        for i in range(steps):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - i / steps))
            error = g.synthesis(w) - target
            loss = (weight * error.abs()).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return w.detach()

    natural, wanted = (to_tensor([render(f, g.resolution).image for f in group]) for group in (faces, [f.with_colour(part, colour) for f in faces]))
    w = invert(natural, g.w_avg.expand(len(faces), g.num_ws, -1))
    w_edited = invert(wanted, w)
    with torch.no_grad():
        source, edited = g.synthesis(w), g.synthesis(w_edited)
    scores = metrics.evaluate(metrics.Edit(domain, prompt, source, edited))
    return {"prompt": prompt, "n": len(faces)} | {name: float(np.nanmean(values)) for name, values in scores.items()}
