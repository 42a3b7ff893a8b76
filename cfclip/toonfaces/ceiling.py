"""The best edit this generator can make: W+ optimised directly to the rendered true counterfactual."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cfclip.domain import Domain
from cfclip.evaluation.metrics import Columns, Edit, evaluate
from cfclip.evaluation.report import markdown, page
from cfclip.files import write_text
from cfclip.models.ops import fast_dtype
from cfclip.toonfaces.captions import claim_of, phrase
from cfclip.toonfaces.domain import COLOURING, load_toonfaces
from cfclip.toonfaces.factors import PARTS, Face, sample_face
from cfclip.toonfaces.render import MASKS, pictures, render

_TWO_COLOURS = {
    "skin": ("green", "blue"),
    "hair": ("blue", "pink"),
    "eyebrows": ("purple", "cyan"),
    "eyes": ("red", "purple"),
    "lipstick": ("green", "blue"),
    "beard": ("green", "white"),
    "glasses": ("red", "cyan"),
    "shirt": ("green", "purple"),
}
PROMPTS: tuple[str, ...] = tuple(phrase(part, colour) for part in PARTS for colour in _TWO_COLOURS[part])
"""Two prompts per part. The generator was never trained on these colours, except those of the shirt."""


@dataclass(frozen=True)
class Start:
    """Where an edit by ``prompt`` begins and where it should end, for N faces that have the part."""

    prompt: str
    natural: Tensor  # renders [N, 3, R, R] in [-1, 1]
    wanted: Tensor  # the same renders with the part recoloured
    w: Tensor  # codes whose pictures are closest to ``natural`` [N, L, D]
    w_edited: Tensor  # closest to ``wanted``; equal to ``w`` in the layers before ``first_layer``


def starts(
    domain: Domain,
    prompts: Sequence[str] = PROMPTS,
    n: int = 12,
    steps: int = 150,
    seed: int = 60_000,
    first_layer: int = COLOURING,
) -> Iterator[Start]:
    """One :class:`Start` per prompt, of ``n`` natural faces that have its part.

    ``w`` is optimised in all layers to draw the render. From there ``w_edited`` is optimised to draw the
    recoloured render, in the layers from ``first_layer`` on. Each takes ``steps`` of Adam. Raises ValueError
    if a prompt does not name the colour of exactly one part, or if ``first_layer`` does not exist.
    """
    claims = [claim_of(prompt) for prompt in prompts]
    if None in claims:
        raise ValueError(
            f"{prompts[claims.index(None)]!r} does not name the colour of a part, so there is no true "
            'counterfactual to aim at; use a prompt such as "green lipstick"'
        )
    g, sources = domain.generator, {}
    if not 0 <= first_layer < g.num_ws:
        raise ValueError(f"first_layer must be from 0 to {g.num_ws - 1}, not {first_layer}")
    for prompt, (part, colour) in zip(prompts, claims, strict=True):
        everyone = (sample_face((seed, k)) for k in count())
        faces = tuple(islice((face for face in everyone if face.has(part)), n))
        recoloured = [face.with_colour(part, colour) for face in faces]
        natural, wanted = (pictures(group, g.resolution).to(domain.device) for group in (faces, recoloured))
        if faces not in sources:  # most parts have the same faces
            centre = g.w_avg.expand(n, g.num_ws, -1)
            sources[faces] = _fit(domain, natural, _weights(faces, g.resolution), centre, 0, steps)
        w, weights = sources[faces], _weights(faces, g.resolution, part)
        yield Start(prompt, natural, wanted, w, _fit(domain, wanted, weights, w, first_layer, steps))


def _weights(faces: Sequence[Face], resolution: int, part: str | None = None) -> Tensor:
    """Weights of the pixels' errors [N, 1, R, R]: each part has the same total, whether lips or background.

    With ``part`` there are only two parts: this one and the rest.
    """
    masks = torch.from_numpy(np.stack([render(face, resolution).masks for face in faces]))
    if part is not None:
        masks = masks[:, [MASKS.index(part)]]
        masks = torch.cat([masks, 1 - masks], 1)
    share = masks.mean((2, 3), keepdim=True)
    return (masks / share.clamp_min(0.002)).sum(1, keepdim=True)  # a part of a few pixels counts less


def _fit(
    domain: Domain, target: Tensor, weights: Tensor, start: Tensor, first_layer: int, steps: int
) -> Tensor:
    """Optimise ``start`` from ``first_layer`` on to draw ``target`` (weighted L1); codes [N, L, D]."""
    weights, dtype = weights.to(target), fast_dtype(domain.device)

    def loss(i: int, w: Tensor) -> Tensor:
        return (weights * (domain.generator.synthesis(w, dtype=dtype) - target).abs()).mean()

    return descend(start, first_layer, steps, lambda t: 0.05 * min(1.0, 2 * (1 - t)), loss)


def descend(
    start: Tensor,
    first_layer: int,
    steps: int,
    lr: Callable[[float], float],
    loss: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Codes after ``steps`` of Adam from ``start`` [N, L, D], in the layers from ``first_layer`` on.

    lr: share of the steps that are done -> learning rate; loss: (step i, codes) -> scalar.
    """
    fixed, free = start[:, :first_layer], start[:, first_layer:].clone().requires_grad_()
    optimizer = torch.optim.Adam([free])
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = lr(i / steps)
        value = loss(i, torch.cat([fixed, free], 1))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return torch.cat([fixed, free.detach()], 1)


def means(columns: Columns) -> dict[str, float]:
    """Column -> mean of its numbers without NaN; NaN if there are none."""
    return {name: float(pd.Series(values).mean()) for name, values in columns.items()}


def ceiling(domain: Domain, prompts: Sequence[str] = PROMPTS, n: int = 12, **options: int) -> list[dict]:
    """Metrics of the closest picture to the true counterfactual, means over ``n`` faces; a row per prompt.

    ``options``: see :func:`starts`. The source is the generator's version of the natural render, so that the
    scores describe the edit and not the inversion. ``true_success_after``, ``true_leakage`` and
    ``true_identity`` are measured on the renders themselves: no editor can be expected to leak less, or to
    keep more of the identity.
    """
    rows = []
    for start in starts(domain, prompts, n, **options):
        with torch.no_grad():
            source, edited = (domain.generator.synthesis(w) for w in (start.w, start.w_edited))
        scores = evaluate(Edit(domain, start.prompt, source, edited))
        truth = evaluate(Edit(domain, start.prompt, start.natural, start.wanted))
        known = {f"true_{name}": truth[name] for name in ("success_after", "leakage", "identity")}
        rows.append({"prompt": start.prompt, "n": n} | means(scores | known))
    return rows


def write_ceiling(
    path: Path, prompts: Sequence[str], n: int, steps: int, seed: int, first_layer: int, folder: Path
) -> Path:
    """Write the :func:`ceiling_table` of the networks in ``folder`` as a Markdown page."""
    rows = ceiling(load_toonfaces(folder), prompts, n, steps=steps, seed=seed, first_layer=first_layer)
    note = (
        f"W+ optimised to held-out renders ({steps} steps of Adam, all layers), then to the same renders "
        f"with the part recoloured (as many steps, the layers from {first_layer} on); n = {n} faces that "
        f"have the part per prompt, seed {seed}, device cpu. true: of the renders themselves; leakage "
        "beyond: what the generator adds to theirs. Neither CLIP nor a mapper is used: a low number is a "
        "limit of the generator."
    )
    title, by = "The best edits that this generator can draw", "Written by `cfclip toonfaces ceiling`."
    return write_text(path, page(title, by, markdown(ceiling_table(rows), note)))


def ceiling_table(rows: Sequence[dict]) -> pd.DataFrame:
    """The rows of :func:`ceiling` as a table to read. The last row has their means, and the sum of ``n``."""
    every = pd.DataFrame(rows).rename(columns={"success_after": "success"})
    every["leakage_beyond"] = every.leakage - every.true_leakage
    leakage = ["leakage", "true_leakage", "leakage_beyond"]
    table = every[["prompt", "n", "success", "progress", *leakage, "identity", "true_identity"]]
    mean = {"prompt": "mean", "n": table.n.sum()} | table.mean(numeric_only=True).drop("n").to_dict()
    return pd.concat([table, pd.DataFrame([mean])], ignore_index=True)
