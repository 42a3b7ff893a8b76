"""One training step written out from images, nothing cached: what the cached step must agree with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.method.loop import generator_for
from cfclip.method.losses import clip_nce
from cfclip.method.trainer import MapperTrainer
from cfclip.method.views import perspective_views


def one_step(run: MapperTrainer) -> tuple[dict[str, float], Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Take ``run``'s step, undo it and draw the same again: (its logs, w, w_edited, source, edited, NCE)."""
    d, prompt = run.domain, run.config.prompt
    before = [p.clone() for p in run.mapper.parameters()]
    logs = run.step(0, generator_for(0, 5))
    for p, old in zip(run.mapper.parameters(), before, strict=True):
        p.data.copy_(old)
    generator = generator_for(0, 5)
    w = run.w[torch.randint(len(run.w), (2,), generator=generator)]
    w_edited = run.mapper.edit(w, d.clip.encode_text(prompt))
    source, edited = d.generator.synthesis(w), d.generator.synthesis(w_edited)
    views = perspective_views(edited, 8, generator=generator)
    views, unit_source = (F.normalize(d.clip.encode_image(x), dim=-1) for x in (views, source))
    texts = (d.clip.template_features(text) for text in (prompt, d.source_text))
    return logs, w, w_edited, source, edited, clip_nce(views, unit_source, *texts)
