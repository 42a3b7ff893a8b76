"""Figures of the method for ``notebooks/00b_method.ipynb``: what each step of CF-CLIP passes to the next.

Shapes: P prompts, E = CLIP's embedding width, L layers of W+, D = w_dim, N pictures of R x R pixels.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from cfclip.evaluation.figures import panels
from cfclip.method.loop import Callback, generator_for, run_loop
from cfclip.method.losses import Directions
from cfclip.method.trainer import Edit, MapperTrainer, Seen
from cfclip.models.mapper import Mapper, level_slices

COLOURS = {"q": "C0", "p1": "C3", "p2": "C2", "n_k": "0.6"}
LABELS = {"q": "$q$", "p1": "$p_1$", "p2": "$p_2$", "n_k": "$n_k$"}
"""Colours and labels of the directions that CLIP-NCE compares, the same in all figures."""
TITLES = {"nce": "CLIP-NCE", "id": "identity", "perc": "perceptual", "l2": "latent L2"}
"""Titles of the loss's terms."""


def text_features(stages: Mapping[str, Tensor], prompts: Sequence[str]) -> Figure:
    """A panel per stage, title -> [P, E], with a strip per prompt; red is positive, blue negative."""
    figure, axes = panels(len(stages), 1, (11, 0.5 + len(stages) * (0.5 + 0.24 * len(prompts))))
    for axis, (title, values) in zip(axes[:, 0], stages.items(), strict=True):
        _signed(axis, values)
        for row in range(1, len(prompts)):
            axis.axhline(row - 0.5, color="white", linewidth=2)
        axis.set_yticks(range(len(prompts)), prompts)
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xticks([])
    axes[-1, 0].set_xlabel(f"the {next(iter(stages.values())).shape[1]} numbers of the feature")
    return figure


def w_plus_maps(stages: Mapping[str, Tensor], split: Sequence[int]) -> Figure:
    """A panel per stage of an edit, title -> [L, D], with its own colour scale and marks between levels."""
    figure, axes = panels(1, len(stages), (2.5 * len(stages) + 0.5, 2.6), sharey=True)
    levels = level_slices(split)
    for axis, (title, values) in zip(axes[0], stages.items(), strict=True):
        _signed(axis, values)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(f"{values.shape[1]} channels")
        axis.set_xticks([])
        for layers in [*levels.values()][1:]:
            axis.axhline(layers.start - 0.5, color="black", linewidth=1)
    middles = [np.arange(len(values))[layers].mean() for layers in levels.values()]
    axes[0, 0].set_yticks(middles, levels)
    axes[0, 0].tick_params(axis="y", length=0)
    return figure


def _signed(axis, values: Tensor) -> None:
    limit = values.abs().quantile(0.99).item() or 1.0
    look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "aspect": "auto", "interpolation": "nearest"}
    axis.imshow(values.detach().cpu(), **look)


def cosines(directions: Directions) -> pd.DataFrame:
    """Cosines of each query with p1, its p2 and each n_k: a tidy table of columns ``with`` and ``cosine``."""
    q, p1, p2, n_k = directions
    pairs = {"p1": (q * p1).sum(-1), "p2": (q * p2).sum(-1), "n_k": (q @ n_k.T).flatten()}
    return pd.concat([pd.DataFrame({"with": name, "cosine": values}) for name, values in pairs.items()])


def compass(stages: Mapping[str, Directions]) -> Figure:
    """Above, the directions as arrows on two axes; below, the queries' cosines. A column per stage.

    The axes are the first two principal axes of all stages' arrows. q, p1, p2 and n_k have the same weight in
    them, however many arrows each has. An arrow that seems short points out of the plane. The negatives must
    be one set for the whole batch: n_k [T, E].
    """
    kinds = [kind / len(kind) ** 0.5 for directions in stages.values() for kind in directions]
    axes_of_all = torch.linalg.svd(torch.cat(kinds), full_matrices=False).Vh[:2]
    size, shares = (4.2 * len(stages), 6), {"height_ratios": [2.6, 1]}
    figure, axes = panels(2, len(stages), size, gridspec_kw=shares, sharey="row")
    for (above, below), (title, directions) in zip(axes.T, stages.items(), strict=True):
        for name in ("n_k", "p2", "q", "p1"):
            x, y = (getattr(directions, name) @ axes_of_all.T).T.cpu()
            width = 0.009 if name == "p1" else 0.004
            arrows = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": width}
            above.quiver(0 * x, 0 * y, x, y, color=COLOURS[name], alpha=0.8, **arrows)
            far = int(x.square().add(y.square()).argmax())
            beyond = 1 + 0.12 / max(float(torch.hypot(x[far], y[far])), 0.12)
            tip = beyond * x[far], beyond * y[far]
            above.text(*tip, LABELS[name], color=COLOURS[name], ha="center", va="center", fontsize=13)
        above.set(xlim=(-0.7, 1.2), ylim=(-0.9, 1.2), aspect="equal", title=title, xticks=[], yticks=[])
        above.plot(0, 0, "o", color="black", markersize=4)
        look = {"palette": COLOURS, "hue": "with", "legend": False, "size": 3, "alpha": 0.5, "ax": below}
        sns.stripplot(cosines(directions), x="cosine", y="with", **look)
        below.axvline(0, color="0.5", linewidth=0.8)
        below.set(xlim=(-1, 1), xticks=(-1, 0, 1), xlabel="cosine with a query", ylabel="")
        below.set_yticks(range(3), [LABELS[name] for name in ("p1", "p2", "n_k")])
    return figure


class Pulls(NamedTuple):
    """Each weighted term of the loss, and its pull: the negative gradient, along which it falls fastest."""

    edited: Tensor  # the edited pictures x' [N, 3, R, R]
    loss: dict[str, float]
    on_picture: dict[str, Tensor]  # [N, 3, R, R], for the terms that depend on the picture
    on_code: dict[str, Tensor]  # on w' [N, L, D], for all terms


def pulls(run: MapperTrainer, mapper: Mapper, w: Tensor, num_views: int) -> Pulls:
    """The pulls of ``run``'s loss where ``mapper`` edits w [N, L, D], seen in ``num_views`` perspectives."""
    c, networks = run.config, run.networks
    with torch.no_grad():
        source = networks.synthesise(w)
        source_clip = networks.clip(source)
        w_edited = mapper.edit(w, run.text_feature[[0]], c.train_strength)
    w_edited = w_edited.requires_grad_()
    edited = networks.synthesise(w_edited)
    views = networks.clip(edited, num_views, generator_for(c.seed, 0))
    judges = (c.lambda_id, run.domain.identity), (c.lambda_perc, run.domain.perceptual)
    seen = Seen(views, *((judge(edited), judge(source)) if weight else () for weight, judge in judges))
    pull = run.pull(run.features(0, views, source_clip, source_clip[:1]))
    terms = run.weighted(pull, Edit(w, w_edited, w_edited), seen)
    del terms["loss"]
    terms = {TITLES.get(name, name): term for name, term in c.weighted(terms).items()}
    on_picture, on_code = {}, {}
    for name, term in terms.items():
        options = {"retain_graph": True, "allow_unused": True}
        of_code, of_picture = torch.autograd.grad(term, (w_edited, edited), **options)
        on_code[name] = -of_code
        if of_picture is not None:
            on_picture[name] = -of_picture
    loss = {name: term.item() for name, term in terms.items()}
    return Pulls(edited.detach(), loss, on_picture, on_code)


def as_pictures(pull: Tensor) -> Tensor:
    """Changes of pictures [N, 3, R, R], as pictures in [-1, 1], each scaled separately; grey: no change."""
    limit = pull.abs().flatten(1).quantile(0.998, dim=1).clamp(min=1e-20)
    return (pull / limit[:, None, None, None]).clamp(-1, 1)


def pull_by_layer(on_code: Mapping[str, Tensor]) -> Figure:
    """How strongly each term pulls on each layer of W+: :class:`Pulls`' ``on_code``."""
    figure, axes = panels(1, 1, (8, 2.4))
    sizes = pd.DataFrame({name: pull.norm(dim=-1).mean(0).tolist() for name, pull in on_code.items()})
    lines = sizes.rename_axis("layer").reset_index().melt("layer", var_name="term", value_name="pull")
    sns.barplot(lines, x="layer", y="pull", hue="term", ax=axes[0, 0])
    axes[0, 0].set(yscale="log", xlabel="layer of W+", ylabel="length of the pull")
    sns.move_legend(axes[0, 0], "center left", bbox_to_anchor=(1, 0.5), title="", frameon=False)
    return figure


def along(pull: Tensor, layers: slice, length: float) -> Tensor:
    """``pull`` [N, L, D] with zeros outside of ``layers``, each of the N scaled to ``length``."""
    kept = torch.zeros_like(pull)
    kept[:, layers] = pull[:, layers]
    return length * kept / kept.flatten(1).norm(dim=1)[:, None, None]


def film(
    run: MapperTrainer, w: Tensor, at: Sequence[int]
) -> tuple[dict[int, Tensor], list[dict[str, float]]]:
    """Train ``run`` to its end. Returns (step -> edited pictures of ``w`` after that step, the logged rows).

    w: [N, L, D]; at: the steps to show, 0 for the untrained mapper.
    """
    pictures: dict[int, Tensor] = {}

    @torch.no_grad()
    def take(step: int) -> None:
        if step in at:
            pictures[step] = run.domain.generator.synthesis(run.mapper.edit(w, run.text_feature[[0]]))

    take(0)
    options = {"seed": run.config.seed, "callbacks": [Callback(1, take)], "log_every": 10, "progress": False}
    return pictures, run_loop(run.step, run.config.steps, state={}, **options)
