"""Inversions, measured: how well a photo is reconstructed, against how well its code can be edited."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cfclip.domain import Domain
from cfclip.evaluation import metrics
from cfclip.inversion.projector import InversionConfig, invert
from cfclip.models.mapper import Mapper


def tradeoff(
    domain: Domain,
    photos: Tensor,
    mapper: Mapper,
    prompt: str,
    configs: Iterable[tuple[Mapping[str, Any], InversionConfig]],
    start: Tensor | None = None,
    strength: float = 1.0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Reconstruction against editability: invert under each config, edit what comes out, score both.

    ``configs``: pairs of a label (columns, e.g. ``{"varied": "w_centre", "value": 0.1}``) and a config. A row per config and photo:
    the label, :func:`reconstruction`'s columns (inversion against photo), :func:`metrics.evaluate`'s (edit against inversion;
    its perceptual column is called ``moved``).
    """
    text, rows = domain.clip.encode_text(prompt), []
    for label, config in configs:
        found = invert(domain, photos, config, start, progress)
        with torch.no_grad():
            edited = domain.generator.synthesis(
                mapper.edit(found.w_plus, text, strength), found.synthesis_noise
            )
        scores = metrics.evaluate(metrics.Edit(domain, prompt, found.images, edited))
        scores = {"moved" if name.startswith("lpips") else name: values for name, values in scores.items()}
        rows += [
            {**label, "index": k, **row, **{name: float(values[k]) for name, values in scores.items()}}
            for k, row in enumerate(found.metrics)
        ]
    return rows
