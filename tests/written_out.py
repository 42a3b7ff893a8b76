"""One training step written out from images, nothing cached: what the cached step must agree with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cfclip.method.loop import generator_for
from cfclip.method.losses import clip_nce
from cfclip.method.trainer import MapperTrainer
from cfclip.method.views import perspective_views


def one_step(run: MapperTrainer) -> tuple[dict[str, float], Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Take ``run``'s step, undo it and repeat it with the same random numbers.

    Returns (the logs of the step, w, w_edited, source images, edited images, CLIP-NCE).
    """
    d, prompt = run.domain, run.config.prompt
    before = {name: value.clone() for name, value in run.mapper.state_dict().items()}
    logs = run.step(0, generator_for(0, 5))
    run.mapper.load_state_dict(before)
    generator = generator_for(0, 5)
    w = run.w[torch.randint(len(run.w), (2,), generator=generator)]
    w_edited = run.mapper.edit(w, d.clip.encode_text(prompt))
    source, edited = d.generator.synthesis(w), d.generator.synthesis(w_edited)
    views = F.normalize(d.clip.encode_image(perspective_views(edited, 8, generator=generator)), dim=-1)
    unit_source = F.normalize(d.clip.encode_image(source), dim=-1)
    target_text, source_text = (d.clip.template_features(text) for text in (prompt, d.source_text))
    return logs, w, w_edited, source, edited, clip_nce(views, unit_source, target_text, source_text)
