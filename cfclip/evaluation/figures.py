"""Figures, each a function of a tidy table, and grids of pictures."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.colors import CSS4_COLORS
from matplotlib.figure import Figure
from torch import Tensor

from cfclip.baselines.library import load_editor
from cfclip.baselines.methods import METHODS
from cfclip.domain import GROUPS, Domain
from cfclip.evaluation.frames import FRAMES
from cfclip.evaluation.metrics import MAIN, PERCENT
from cfclip.evaluation.stats import crossed, interval
from cfclip.evaluation.tables import LOWEST_IDENTITY, columns_of, differences, label, whole_curve
from cfclip.files import atomic_write
from cfclip.images import to_uint8

ON_WHITE = {"white": "0.8", "grey": "0.5", "yellow": "gold", "cyan": "darkturquoise"}
"""Colours of prompts that are drawn in another shade, to be seen on white."""
ABLATED = ("area", "clean", "leakage", "identity")
"""The metrics that the ablation's figure shows."""
MARKERS = "oXsPD^v*"


def panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of ``size`` inches with its axes [rows, columns]."""
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)


def save_figure(figure: Figure, path: str | os.PathLike) -> Path:
    """Write PNG or PDF, by the suffix, atomically; no time stamp: the same run writes the same file."""
    kind = Path(path).suffix.removeprefix(".")
    untimed = {"CreationDate" if kind == "pdf" else "Software": None}
    return atomic_write(path, lambda part: figure.savefig(part, dpi=120, format=kind, metadata=untimed))


# ---- pictures ----


def image_grid(
    rows: Mapping[str, Tensor], columns: int = 8, title: str = "", headers: Sequence[str] = ()
) -> Figure:
    """One row of pictures per entry of ``rows``: label -> [N, 3, R, R] in [-1, 1].

    ``headers``: texts above the columns.
    """
    above = (0.4 if title else 0) + (0.45 if headers else 0)
    width, height = columns + 1.6, len(rows) + above
    figure, axis = plt.subplots(figsize=(width, height))  # one axis for all, because axes are slow
    apart = 1.03
    for y, (name, images) in enumerate(rows.items()):
        for x, picture in enumerate(to_uint8(images[:columns])):
            place = (apart * x, apart * x + 1, apart * y + 1, apart * y)
            axis.imshow(picture, interpolation="lanczos", extent=place)
        axis.text(-0.12, apart * y + 0.5, fill(name, 18), ha="right", va="center", fontsize=11)
    for x, header in enumerate(headers[:columns]):
        axis.text(apart * x + 0.5, -0.06, header, ha="center", va="bottom", fontsize=8)
    axis.set(xlim=(0, apart * columns - 0.03), ylim=(apart * len(rows) - 0.03, 0))
    axis.axis("off")
    if title:
        figure.suptitle(title, fontsize=13)
    top = 1 - (above - 0.05) / height if above else 1
    figure.subplots_adjust(left=1.5 / width, right=1, bottom=0, top=top)
    return figure


def scored_picture(image: Tensor, scores: pd.Series, title: str = "", unit: str = "") -> Figure:
    """A picture [3, R, R] in [-1, 1] beside a bar for each of its scores in ``unit``, the largest on top."""
    figure, axes = panels(1, 2, (8, 3), gridspec_kw={"width_ratios": [1, 1.6]})
    picture, bars = axes[0]
    picture.imshow(to_uint8(image[None])[0], interpolation="lanczos")
    picture.axis("off")
    sorted_scores = scores.sort_values()
    bars.barh(sorted_scores.index, sorted_scores, color=["0.75"] * (len(scores) - 1) + ["C0"])
    bars.bar_label(bars.containers[0], fmt="%.1f", padding=3, fontsize=8)
    bars.margins(x=0.15)
    bars.set_title(title, fontsize=11, loc="left")
    bars.set_xlabel(unit)
    bars.spines[["top", "right"]].set_visible(False)
    return figure


def readings(images: Tensor, measured: pd.DataFrame, truth: pd.DataFrame) -> Figure:
    """Pictures [N, 3, R, R], and under each its line of ``measured``; both tables: N rows, a column per part.

    A value that differs from ``truth`` is red and followed by the true one; an en dash is a missing part.
    """
    measured, truth = (table.astype(object).fillna("–") for table in (measured, truth))
    parts, n = list(measured.columns), len(measured)
    figure, axes = panels(2, n, (1.3 * n + 0.8, 1.3 + 0.22 * len(parts)), gridspec_kw={
        "height_ratios": [1.2, 0.22 * len(parts)]
    })  # fmt: skip
    for i, (picture, texts) in enumerate(zip(*axes, strict=True)):
        picture.imshow(to_uint8(images[i : i + 1])[0], interpolation="lanczos")
        texts.set(xlim=(0, 1), ylim=(len(parts) - 0.5, -0.5))
        for row, part in enumerate(parts):
            seen, true = measured[part].iloc[i], truth[part].iloc[i]
            wrong = {"color": "C3", "weight": "bold"} if seen != true else {}
            texts.text(
                0.5, row, seen if seen == true else f"{seen} ({true})", ha="center", va="center", **wrong
            )
            if i == 0:
                texts.text(-0.05, row, part, ha="right", va="center", color="0.4")
        for axis in (picture, texts):
            axis.axis("off")
    return figure


def pictures_by_method(
    table: pd.DataFrame,
    runs: str | os.PathLike,
    domain: Domain,
    w: Tensor,
    prompts: Sequence[str] = (),
    strength: float = 1.0,
) -> dict[str, Tensor]:
    """prompt -> pictures [N (1 + M), 3, R, R]: each source G(w), followed by its edits by M methods.

    w: [N, L, D]. table: :func:`cfclip.experiments.gather` of the folder ``runs``. prompts: default: all, by
    group. Each method shows its lowest seed. It shows white if it has no run for the prompt, or if the run's
    network files were not kept, for example those from a borrowed machine.
    """
    trained = table[table.method.notna()].drop_duplicates("run").sort_values("seed")
    trained = trained.drop_duplicates(["method", "prompt"])
    methods = [method for method in METHODS if method in set(trained.method)]
    known = sorted(set(trained.prompt), key=lambda prompt: (GROUPS.index(domain.group_of(prompt)), prompt))
    with torch.no_grad():
        source = domain.generator.synthesis(w)
    rows = {}
    for prompt in prompts or known:
        run, pictures = trained[trained.prompt == prompt].set_index("method").run, [source]
        for method in methods:
            folder = Path(runs) / run[method] if method in run else None
            kept = folder is not None and any(folder.glob("*.safetensors"))
            editor = load_editor(folder, domain) if kept else None
            pictures.append(editor.edit(w, strength) if editor else torch.ones_like(source))
        rows[prompt] = torch.stack(pictures, 1).flatten(0, 1)
    return rows


def picture_grid(rows: Mapping[str, Tensor], methods: Sequence[str]) -> Figure:
    """:func:`pictures_by_method` with the methods' names above. A column without any picture is left out."""
    n = len(next(iter(rows.values())))
    headers = [name.replace("-", "-\n") for name in ("source", *methods)] * (n // (1 + len(methods)))
    drawn = [k for k in range(n) if any(images[k].min() < 1 for images in rows.values())]
    rows = {name: images[drawn] for name, images in rows.items()}
    return image_grid(rows, columns=len(drawn), headers=[headers[k] for k in drawn])


# ---- one training, one editor ----


def loss_curves(log: pd.DataFrame) -> Figure:
    """Every logged number against the step, one panel each."""
    names = [name for name in log.columns if name not in ("step", "seconds")]
    figure, axes = panels(1, len(names), (3.2 * len(names), 2.4))
    for axis, name in zip(axes[0], names, strict=True):
        sns.lineplot(log, x="step", y=name, ax=axis)
        axis.set(title=name, ylabel="")
    return figure


def distributions(table: pd.DataFrame) -> Figure:
    """How each metric spreads over the pictures, per prompt; without success, KID and round trips."""
    columns = 4
    names = [name for name in MAIN if name in table and table[name].dtype.kind == "f"]
    names = [name for name in names if not name.startswith(("success", "clean", "kid", "round_trip"))]
    rows = -(-len(names) // columns)
    height = 0.7 + 0.4 * table.prompt.nunique()
    figure, axes = panels(rows, columns, (2.6 * columns + 1, height * rows), sharey=True)
    for axis, name in zip(axes.flat, names, strict=False):
        sns.boxplot(table, x=name, y="prompt", ax=axis, fliersize=2, linewidth=0.8, color="C0")
        axis.set(xlabel=name.replace("_", " "), ylabel="")
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    return figure


def tradeoff_curves(table: pd.DataFrame) -> Figure:
    """Means over photos against the distance to the centre of W, one panel per number.

    table: rows of :func:`cfclip.evaluation.inversions.tradeoff`. A line is a varied setting, a point a value.
    """
    x, means = "centre_distance", table.groupby(["varied", "value"], sort=False).mean(numeric_only=True)
    means = means.reset_index()
    names = [name for name in means.columns if name not in ("varied", "value", "index", x)]
    figure, axes = panels(1, len(names), (2.5 * len(names), 2.7))
    for axis, name in zip(axes[0], names, strict=True):
        for what, line in means.groupby("varied", sort=False):
            axis.plot(line[x], line[name], marker="o", label=what)
            for at, *point in zip(line["value"], line[x], line[name], strict=True):
                axis.annotate(f"{at:g}", point, textcoords="offset points", xytext=(3, 3), fontsize=7)
        axis.margins(0.15)
        axis.set(title=name.replace("_", " "), xlabel=x.replace("_", " "))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def strength_curves(table: pd.DataFrame) -> Figure:
    """Gains and costs of an edit against its strength, by prompt; 95 % intervals over the pictures."""
    names = ("success_after", "clip_after", "heldout_clip_after", "identity", "leakage", "truth_distance")
    several = table.groupby("strength").count().gt(0).sum().gt(1)  # measured at more than one strength
    names = [name for name in names if several.get(name, False)]
    figure, axes = panels(1, len(names), (2.3 * len(names), 2.6))
    styles = prompt_styles(table.prompt.unique())
    look: dict[str, Any] = {"x": "strength", "hue": "prompt", "style": "prompt", "dashes": False, "seed": 0}
    look["palette"] = {prompt: style["color"] for prompt, style in styles.items()}
    look["markers"] = {prompt: style["marker"] for prompt, style in styles.items()}
    for axis, name in zip(axes[0], names, strict=True):
        sns.lineplot(table, y=name, ax=axis, legend=axis is axes[0, 0], **look)
        axis.set(title=name.removesuffix("_after").replace("_", " "), ylabel="")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].get_legend().remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def leakage_matrix(table: pd.DataFrame) -> Figure:
    """Prompts [rows] x parts [columns]: how far each part moved; NaN (the part asked for) is blank."""
    figure, axes = panels(1, 1, (0.75 * len(table.columns) + 2, 0.45 * len(table) + 1.2))
    axis = axes[0, 0]
    look = {"cmap": "rocket_r", "linewidths": 0.5, "cbar_kws": {"label": "1 = two random faces"}}
    sns.heatmap(table, annot=True, fmt=".2f", vmin=0, vmax=max(0.5, table.max(axis=None)), ax=axis, **look)
    parts = [text.get_text().replace("_", " ") for text in axis.get_xticklabels()]
    axis.set_xticklabels(parts, rotation=40, ha="right")
    return figure


def prompt_styles(prompts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """prompt -> the colour that it names, if any, and a marker, the same for prompts that name one part."""
    styles, parts = {}, {}
    for i, prompt in enumerate(prompts):
        words = prompt.split()
        named = next((word for word in words if word in CSS4_COLORS), f"C{i % 10}")
        part = " ".join(word for word in words if word not in CSS4_COLORS)
        marker = MARKERS[parts.setdefault(part, len(parts)) % len(MARKERS)]
        styles[prompt] = {"color": ON_WHITE.get(named, named), "marker": marker}
    return styles


# ---- a sweep: tables of cfclip.evaluation.tables.trainings ----


def tradeoff(each: pd.DataFrame) -> Figure:
    """Success against identity, one panel per group: a line per method, with a point per strength.

    Each line begins at the source (strength 0). Only the identities over which the area is taken are shown.
    """
    defined = set(each.group[each.success_after.notna()])
    groups = [group for group in each.group.cat.categories if group in defined]
    size = max(3.4 * len(groups) + 0.4, 6.0), 3.3  # the legend needs this width
    figure, axes = panels(1, len(groups), size, sharex=True, sharey=True)
    for axis, group in zip(axes[0], groups, strict=True):
        shown = each[each.group == group]
        for method, style in _styles(each).items():
            means = shown[shown.method == method].groupby("strength")[columns_of(each)].mean().reset_index()
            if len(means):
                axis.plot(*whole_curve(means), markersize=5, linewidth=1.2, **style)
        axis.set(title=group, xlabel="identity", ylabel="success")
    axes[0, 0].set_xlim(1.01, LOWEST_IDENTITY)  # strength grows to the right
    return _with_legend(figure, each)


def ablated(best: pd.DataFrame) -> list[str]:
    """The columns of :func:`.tables.headline` that an ablation shows; CLIP's score if there is no other."""
    return [name for name in ABLATED if name in columns_of(best)] or ["clip_direction"]


def ablation_figure(best: pd.DataFrame) -> Figure:
    """The difference of each row from the first one at the same prompt and seed, a panel per metric.

    A dot is a training, coloured by its prompt. Black is the mean with its 95 % interval over prompts and
    seeds (:func:`.stats.crossed`), which needs two of each. best: :func:`.tables.headline` of
    :func:`.tables.trainings` ``by="row"``.
    """
    first, *rows = best.method.cat.remove_unused_categories().cat.categories
    names = ablated(best)
    styles = prompt_styles(best.prompt.unique())
    figure, axes = panels(1, len(names), (2.6 * len(names) + 1.5, 1.5 + 0.45 * len(rows)), sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        scale = 100 if name in PERCENT else 1
        axis.axvline(0, color="0.5", linewidth=0.8, zorder=0)
        for at, row in enumerate(rows):
            table = scale * differences(best, row, first, name)
            if table.empty:
                continue
            for prompt, values in table.iterrows():
                heights = [at - 0.15] * len(values)
                axis.plot(values, heights, linestyle="", markersize=4, alpha=0.7, **styles[prompt])
            over = crossed(table)
            half = 0 if np.isnan(over.error) else over.half
            axis.errorbar(over.mean, at + 0.15, xerr=half, marker="D", color="black", markersize=4, capsize=3)
        axis.set_xlabel(label(name).replace(" %", ", points"))
        axis.set_yticks(range(len(rows)), rows)
        axis.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    figure.suptitle(f"difference from {first}", fontsize=11)
    dots = [plt.Line2D([], [], linestyle="", label=name, **style) for name, style in styles.items()]
    figure.legend(handles=dots, loc="outside lower center", ncols=4, frameon=False)
    return figure


def guides_figure(best: pd.DataFrame) -> Figure:
    """The area of each method in each variant: does the order of methods depend on the CLIP that guides?

    best: :func:`cfclip.evaluation.tables.headline` with a column ``variant``, and the same prompts and seeds
    in each variant. Shown are means over prompts and seeds, with 95 % intervals over seeds.
    """
    figure, axes = panels(1, 1, (6.5, 3.6))
    keys, styles = ["variant", "method", "seed"], _styles(best).values()
    per_seed = best.groupby(keys, observed=True, sort=False).area.mean().reset_index()
    looks = {"markers": [one["marker"] for one in styles], "palette": [one["color"] for one in styles]}
    looks |= {"errorbar": interval, "dodge": 0.3, "capsize": 0.05, "err_kws": {"linewidth": 1.2}}
    sns.pointplot(per_seed, x="variant", y="area", hue="method", ax=axes[0, 0], legend=False, **looks)
    axes[0, 0].set(xlabel="", ylabel=label("area").replace(" %", ""))
    return _with_legend(figure, best)


def _styles(each: pd.DataFrame) -> dict[str, dict[str, str]]:
    """method -> its colour and marker, the same in every figure."""
    known = [*METHODS, *FRAMES]
    places = {name: known.index(name) for name in each.method.cat.categories}
    return {name: {"color": f"C{i}", "marker": MARKERS[i % len(MARKERS)]} for name, i in places.items()}


def _with_legend(figure: Figure, each: pd.DataFrame) -> Figure:
    handles = [plt.Line2D([], [], label=method, **style) for method, style in _styles(each).items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure
