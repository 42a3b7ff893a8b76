"""The best edit this generator can make: W+ optimised directly to the rendered true counterfactual."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cfclip.domain import Domain
from cfclip.evaluation.metrics import Edit, evaluate
from cfclip.evaluation.report import markdown
from cfclip.files import write_text
from cfclip.images import to_tensor
from cfclip.toonfaces.captions import claim_of
from cfclip.toonfaces.domain import load_toonfaces
from cfclip.toonfaces.factors import sample_face
from cfclip.toonfaces.render import MASKS, render


def ceiling(
    domain: Domain, prompt: str, n: int = 16, steps: int = 200, lr: float = 0.05, seed: int = 60_000
) -> dict[str, float]:
    """Metrics of ``G(w_plus*)``, the closest to the true counterfactual in weighted L1; means of ``n`` faces.

    The part weighs as much as the rest of the picture, otherwise lips would hardly count. The source is
    optimised too, towards the natural render, so that the scores describe the edit and not the inversion.
    Raises ValueError if ``prompt`` does not name the colour of a part.
    """
    if (claim := claim_of(prompt)) is None:
        raise ValueError(
            f"{prompt!r} does not name the colour of a part, so there is no true counterfactual to aim at; "
            'use a prompt such as "green lipstick"'
        )
    part, colour = claim
    faces = [f for f in (sample_face((seed, k)) for k in range(4 * n)) if f.has(part)][:n]
    g = domain.generator
    drawn = [render(f, g.resolution) for f in faces]
    area = torch.from_numpy(np.stack([one.masks[MASKS.index(part)] for one in drawn]))[:, None]
    rest = 1 - area
    weight = area / area.mean((1, 2, 3), keepdim=True) + rest / rest.mean((1, 2, 3), keepdim=True)

    def invert(target: Tensor, start: Tensor) -> Tensor:
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

    natural = to_tensor([one.image for one in drawn])
    wanted = to_tensor([render(f.with_colour(part, colour), g.resolution).image for f in faces])
    w = invert(natural, g.w_avg.expand(len(faces), g.num_ws, -1))
    w_edited = invert(wanted, w)
    with torch.no_grad():
        source, edited = g.synthesis(w), g.synthesis(w_edited)
    scores = evaluate(Edit(domain, prompt, source, edited))
    return {"prompt": prompt, "n": len(faces)} | {name: float(np.nanmean(v)) for name, v in scores.items()}


def write_ceiling(path: Path, prompts: Sequence[str], n: int, steps: int) -> Path:
    """Write the :func:`ceiling` of the embedded domain for each prompt as a Markdown table."""
    domain = load_toonfaces()
    rows = [ceiling(domain, prompt, n, steps) for prompt in prompts]
    note = (
        f"W+ optimised to held-out renders ({steps} steps of Adam), then to the same renders "
        f"with the part recoloured; n = {n} faces per prompt, seed 60000, device cpu. Neither CLIP nor a "
        "mapper is used: a low number is a limit of the generator."
    )
    return write_text(
        path, f"# Ceiling\n\nWritten by `cfclip toonfaces ceiling`.\n\n{markdown(pd.DataFrame(rows), note)}"
    )
