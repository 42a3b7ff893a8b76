"""Figures, each a function of a tidy table, and grids of pictures."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from cfclip.baselines.library import load_editor
from cfclip.baselines.methods import METHODS
from cfclip.domain import GROUPS, Domain
from cfclip.evaluation import ablation
from cfclip.evaluation.metrics import MAIN
from cfclip.evaluation.stats import half_width
from cfclip.evaluation.tables import columns_of, label, whole_curve
from cfclip.files import atomic_write
from cfclip.images import to_uint8


def image_grid(
    rows: Mapping[str, Tensor],
    columns: int = 8,
    cell: float = 1.0,
    title: str = "",
    headers: Sequence[str] = (),
) -> Figure:
    """One labelled row of pictures per entry, label -> [N, 3, R, R] in [-1, 1]; ``headers`` stand above the columns."""
    above = (0.4 if title else 0) + (0.45 if headers else 0)
    height = cell * len(rows) + above
    figure, axes = plt.subplots(len(rows), columns, figsize=(cell * columns + 1.6, height), squeeze=False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(row, to_uint8(images[:columns]), strict=False):
            axis.imshow(picture, interpolation="lanczos")
        for axis in row:
            axis.axis("off")
        row[0].text(-0.12, 0.5, label, transform=row[0].transAxes, ha="right", va="center", fontsize=11)
    for axis, header in zip(axes[0], headers, strict=False):
        axis.set_title(header, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=13)
    figure.subplots_adjust(
        left=1.5 / (cell * columns + 1.6),
        right=1,
        bottom=0,
        top=1 if not above else 1 - (above - 0.05) / height,
        wspace=0.03,
        hspace=0.03,
    )
    return figure


def save_figure(figure: Figure, path: str | os.PathLike, dpi: int = 120) -> Path:
    """PNG or PDF, as the suffix says, atomically, without a time stamp inside, so that the same run writes the same file."""
    kind = Path(path).suffix.removeprefix(".")
    untimed = {"CreationDate" if kind == "pdf" else "Software": None}
    return atomic_write(path, lambda part: figure.savefig(part, dpi=dpi, format=kind, metadata=untimed))


def loss_curves(log: pd.DataFrame) -> Figure:
    """Every logged number against the step, one panel each."""
    names = [c for c in log.columns if c not in ("step", "seconds")]
    figure, axes = plt.subplots(
        1, len(names), figsize=(3.2 * len(names), 2.4), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        sns.lineplot(log, x="step", y=name, ax=axis)
        axis.set(title=name, ylabel="")
    return figure


def distributions(table: pd.DataFrame) -> Figure:
    """How each metric is spread over the pictures, per prompt."""
    names = [
        c for c in MAIN if c in table and table[c].dtype.kind == "f" and not c.startswith(("success", "kid"))
    ]
    figure, axes = plt.subplots(
        1,
        len(names),
        figsize=(2.6 * len(names), 0.7 + 0.45 * table.prompt.nunique()),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes[0], names, strict=True):
        sns.boxplot(table, x=name, y="prompt", ax=axis, fliersize=2, linewidth=0.8, color="C0")
        axis.set(xlabel=name.replace("_", " "), ylabel="")
    return figure


def tradeoff_curves(
    table: pd.DataFrame, label: str = "varied", value: str = "value", x: str = "centre_distance"
) -> Figure:
    """Every number of ``table`` (:func:`cfclip.inversion.tradeoff`) against ``x``: a line per ``label``, a point per ``value``, means over photos."""
    means = (
        table
        .drop(columns="index", errors="ignore")
        .groupby([label, value], sort=False)
        .mean(numeric_only=True)
        .reset_index()
    )
    names = [c for c in means.columns if c not in (label, value, x)]
    figure, axes = plt.subplots(
        1, len(names), figsize=(2.8 * len(names), 2.6), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        for what, line in means.groupby(label, sort=False):
            axis.plot(line[x], line[name], marker="o", label=what)
            for _, point in line.iterrows():
                axis.annotate(
                    f"{point[value]:g}",
                    (point[x], point[name]),
                    textcoords="offset points",
                    xytext=(3, 3),
                    fontsize=7,
                )
        axis.set(title=name.replace("_", " "), xlabel=x.replace("_", " "))
    axes[0, 0].legend(fontsize=7)
    return figure


def strength_curves(table: pd.DataFrame) -> Figure:
    """What an edit gains and costs (as far as it is there) against the strength, a line a prompt, with 95 % intervals over the pictures."""
    names = [
        c
        for c in (
            "success_after",
            "clip_after",
            "heldout_clip_after",
            "identity",
            "leakage",
            "truth_distance",
        )
        if c in table
    ]
    figure, axes = plt.subplots(
        1, len(names), figsize=(3.2 * len(names), 2.8), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        sns.lineplot(
            table, x="strength", y=name, hue="prompt", marker="o", ax=axis, legend=axis is axes[0][0], seed=0
        )
        axis.set(title=name.removesuffix("_after").replace("_", " "), ylabel="")
    handles, labels = axes[0][0].get_legend_handles_labels()
    axes[0][0].get_legend().remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def leakage_matrix(table: pd.DataFrame) -> Figure:
    """Prompts [rows] x parts [columns]: how far each part moved."""
    figure, axis = plt.subplots(
        figsize=(0.75 * len(table.columns) + 2, 0.45 * len(table) + 1.2), layout="constrained"
    )
    sns.heatmap(table, annot=True, fmt=".2f", vmin=0, vmax=1, cmap="rocket_r", linewidths=0.5, ax=axis)
    axis.set_xticklabels(
        [label.get_text().replace("_", " ") for label in axis.get_xticklabels()], rotation=40, ha="right"
    )
    return figure


HEADLINE = ("success_after", "truth_distance", "identity", "leakage", "heldout_clip_after", "clip_after")
"""What figures show."""

MARKERS = "oXsPD^v*"


def curves(each: pd.DataFrame, names: Sequence[str] = HEADLINE) -> Figure:
    """Metrics [rows] by groups [columns] against the strength: a line a method, the mean over prompts with its interval over seeds."""
    names = [name for name in names if name in columns_of(each)]
    groups = list(each.group.cat.categories)
    per_seed = (
        each.groupby(["group", "method", "seed", "strength"], observed=True)[names].mean().reset_index()
    )
    markers = dict(zip(each.method.cat.categories, MARKERS, strict=False))
    drawn, axes = plt.subplots(
        len(names),
        len(groups),
        figsize=(3.1 * len(groups) + 0.4, 2.1 * len(names) + 0.6),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for i, name in enumerate(names):
        for axis, group in zip(axes[i], groups, strict=True):
            shown = per_seed[(per_seed.group == group) & per_seed[name].notna()]
            if shown.empty:
                axis.text(
                    0.5, 0.5, "undefined", transform=axis.transAxes, ha="center", va="center", color="0.5"
                )
            else:
                sns.lineplot(
                    shown,
                    x="strength",
                    y=name,
                    hue="method",
                    style="method",
                    markers=markers,
                    dashes=False,
                    ax=axis,
                    legend=False,
                    errorbar=lambda v: (v.mean() - half_width(v), v.mean() + half_width(v)),
                )
            axis.set(
                title=group if i == 0 else "",
                xlabel="strength" if i == len(names) - 1 else "",
                ylabel=label(name).replace(" %", "") if axis is axes[i, 0] else "",
            )
    return _with_legend(drawn, each)


def tradeoff(
    each: pd.DataFrame,
    x: str = "identity",
    y: str = "success_after",
    marks: tuple[float, float] | None = None,
) -> Figure:
    """``y`` against ``x``, a panel a group: a line a method from strength 0 on, the source itself; a point a measured strength.

    ``marks``: dotted lines at this x and this y, where :func:`matched` compares.
    """
    groups = [group for group in each.group.cat.categories if each.loc[each.group == group, y].notna().any()]
    drawn, axes = plt.subplots(
        1,
        len(groups),
        figsize=(3.4 * len(groups) + 0.4, 3.3),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, group in zip(axes[0], groups, strict=True):
        shown = each[each.group == group]
        for i, method in enumerate(each.method.cat.categories):
            means = shown[shown.method == method].groupby("strength")[columns_of(each)].mean().reset_index()
            if len(means):
                axis.plot(
                    *whole_curve(means, x, y),
                    color=f"C{i}",
                    marker=MARKERS[i % len(MARKERS)],
                    markersize=5,
                    linewidth=1.2,
                )
        if marks:
            axis.axvline(marks[0], color="0.6", linewidth=0.8, linestyle=":", zorder=0)
            axis.axhline(marks[1], color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        axis.set(title=group, xlabel=x.replace("_", " "), ylabel=y.removesuffix("_after").replace("_", " "))
    axes[0, 0].invert_xaxis()  # so that strength grows to the right
    return _with_legend(drawn, each)


def _with_legend(drawn: Figure, each: pd.DataFrame) -> Figure:
    handles = [
        plt.Line2D([], [], color=f"C{i}", marker=MARKERS[i % len(MARKERS)], label=method)
        for i, method in enumerate(each.method.cat.categories)
    ]
    drawn.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return drawn


def edits(
    table: pd.DataFrame,
    runs: str | os.PathLike,
    domain: Domain,
    w: Tensor,
    prompts: Sequence[str] = (),
    strength: float = 1.0,
) -> dict[str, Tensor]:
    """prompt -> pictures [N (1 + M), 3, R, R]: each of the codes w [N, L, D], then what every method makes of it; each method's first seed.

    Ordered as :func:`trainings` has methods and groups; all prompts for none. A method that has no run for a prompt shows white.
    """
    own = (
        table[table.method.notna()]
        .drop_duplicates("run")
        .sort_values("seed")
        .drop_duplicates(["method", "prompt"])
    )
    methods = [method for method in METHODS if method in set(own.method)]
    known = sorted(set(own.prompt), key=lambda prompt: (GROUPS.index(domain.group_of(prompt)), prompt))
    with torch.no_grad():
        source = domain.generator.synthesis(w)
    rows = {}
    for prompt in prompts or known:
        run = own[own.prompt == prompt].set_index("method").run
        made = [
            load_editor(Path(runs) / run[method], domain).edit(w, strength)
            if method in run
            else torch.ones_like(source)
            for method in methods
        ]
        rows[prompt] = torch.stack([source, *made], 1).flatten(0, 1)
    return rows


def picture_grid(rows: Mapping[str, Tensor], methods: Sequence[str]) -> Figure:
    """:func:`edits` with the methods' names above."""
    n = len(next(iter(rows.values())))
    return image_grid(
        rows,
        columns=n,
        headers=[name.replace("-", "-\n") for name in ("source", *methods)] * (n // (1 + len(methods))),
    )


def ablation_figure(table: pd.DataFrame) -> Figure:
    """One panel a metric: every training a dot, the mean with its 95 % interval, the first row's mean as a line."""
    each = ablation.runs(table)
    names = [name for name in each.columns if name not in ablation.KEYS and not name.endswith("_before")]
    drawn, axes = plt.subplots(
        1,
        len(names),
        figsize=(2.4 * len(names) + 1.5, 0.9 + 0.35 * each.row.nunique()),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes[0], names, strict=True):
        sns.stripplot(each, x=name, y="row", ax=axis, color="0.7", size=4, jitter=False)
        sns.pointplot(
            each,
            x=name,
            y="row",
            ax=axis,
            linestyle="none",
            color="C0",
            markersize=5,
            capsize=0.3,
            err_kws={"linewidth": 1.5},
            errorbar=lambda v: (v.mean() - half_width(v), v.mean() + half_width(v)),
        )
        axis.axvline(
            each.loc[each.row == each.row.iloc[0], name].mean(), color="0.5", linewidth=0.8, zorder=0
        )
        axis.set(xlabel=name.replace("_", " "), ylabel="")
    return drawn
