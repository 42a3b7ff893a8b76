"""How well inversion reconstructs a photo, against how well the code that it finds can be edited."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cfclip.domain import Domain
from cfclip.evaluation.metrics import Edit, evaluate
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
    """Invert ``photos`` [N, 3, R, R] by each config and edit the codes: one row per config and photo.

    Args:
        configs: pairs of a label (columns, e.g. ``{"varied": "w_centre", "value": 0.1}``) and a config.

    A row has the label, the ``index`` of the photo, the inversion's ``metrics`` (against the photo), and the
    columns of :func:`cfclip.evaluation.evaluate` (the edit against the inversion), whose perceptual column is
    renamed ``moved``.
    """
    rows = []
    for label, config in configs:
        inverted = invert(domain, photos, config, start, progress)
        with torch.no_grad():
            w_edited = domain.edited(inverted.w_plus, prompt, mapper, strength)
            edited = domain.generator.synthesis(w_edited, inverted.synthesis_noise)
        scores = evaluate(Edit(domain, prompt, inverted.images, edited))
        scores = {"moved" if name.startswith("lpips") else name: values for name, values in scores.items()}
        for i, reconstruction in enumerate(inverted.metrics):
            edit = {name: float(values[i]) for name, values in scores.items()}
            rows.append({**label, "index": i, **reconstruction, **edit})
    return rows
