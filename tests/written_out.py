"""One training step written out from images, nothing cached: what the cached step must agree with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.method.losses import clip_nce
from cfclip.method.views import perspective_views


def one_step(run: CFCLIP) -> tuple[dict[str, float], Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Takes ``run``'s step, undoes it and draws the same again: (its logs, w, w_edited, source, edited, NCE)."""
    d, prompt = run.domain, run.config.prompt
    before = [p.clone() for p in run.mapper.parameters()]
    torch.manual_seed(5)
    logs = run.step(0)
    for p, old in zip(run.mapper.parameters(), before, strict=True):
        p.data.copy_(old)
    torch.manual_seed(5)
    w = run.w[torch.randint(len(run.w), (2,))]
    w_edited = run.mapper.edit(w, d.clip.encode_text(prompt))
    source, edited = d.generator.synthesis(w), d.generator.synthesis(w_edited)
    views, unit_source = (
        F.normalize(d.clip.encode_image(x), dim=-1) for x in (perspective_views(edited, 8), source)
    )
    nce = clip_nce(
        views, unit_source, d.clip.template_features(prompt), d.clip.template_features(d.source_text)
    )
    return logs, w, w_edited, source, edited, nce
