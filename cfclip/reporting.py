"""Runs -> tidy tables and figures. Numbers are JSON lines beside each run; every figure can be redrawn from files."""

import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from .ops import fast_dtype, name_of
from .training import atomic_save

PERCENT = ("success_before", "success_after", "success_inverted")
MAIN = ("prompt", "group", "n", "success_before", "success_after", "success_inverted", "leakage", "clip_before", "clip_after", "heldout_clip_after",
        "clip_direction", "heldout_direction", "identity", "lpips_alex", "lpips_readout", "kid_counterfactual", "truth_distance", "round_trip_identity")
"""The columns of a report that people read, in order; its files hold all."""


def to_uint8(images: Tensor) -> np.ndarray:
    """[N, 3, R, R] in [-1, 1] -> uint8 [N, R, R, 3]."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def writable(folder: str | os.PathLike) -> Path:
    """``folder``, made if need be; PermissionError that names it and the fix if nothing can be written there."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):          # a name of its own: others may be looking at the same moment
            pass
    except OSError as error:
        raise PermissionError(f"cannot write to {folder} ({error.strerror}): choose another folder or change its permissions") from None
    return folder


def write_rows(rows: Sequence[Mapping], path: str | os.PathLike) -> Path:
    """JSON lines, atomically."""
    return atomic_save(rows, path, lambda rows, part: part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)))


def read_rows(path: str | os.PathLike) -> list[dict]:
    """What :func:`write_rows` wrote."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def summary(table: pd.DataFrame, by: str | list[str] = "prompt") -> pd.DataFrame:
    """Mean of every number per group, in the groups' order of appearance, with n = pictures."""
    grouped = table.groupby(by, sort=False)
    means = grouped.mean(numeric_only=True).drop(columns=["index", "seed"], errors="ignore")
    means.insert(0, "n", grouped.size())
    return means.reset_index()


def half_width(values: Sequence[float], confidence: float = 0.95) -> float:
    """``t_{(1 + confidence) / 2, k - 1} s / sqrt(k)`` of k values; NaN for less than two: one training says nothing about others."""
    k = len(values)
    if k < 2:
        return float("nan")
    return float(stats.t.ppf((1 + confidence) / 2, k - 1) * np.std(values, ddof=1) / np.sqrt(k))


def plus_minus(mean: float, half: float, scale: float = 1) -> str:
    """"12 ± 3", or "12" where no interval is known, or "–" where there is no number."""
    half = 0.0 if half < 1e-9 * abs(mean) else half          # equal numbers whose mean was rounded
    return "–" if np.isnan(mean) else f"{scale * mean:.3g}" + ("" if np.isnan(half) else f" ± {scale * half:.2g}")


def markdown(table: pd.DataFrame, note: str = "") -> str:
    """A Markdown table: success in per cent, the rest to three digits, a dash where there is no number."""
    shown = table.copy()
    for column in shown.columns:
        if column in PERCENT:
            shown[column] = ["–" if np.isnan(v) else f"{100 * v:.1f} %" for v in shown[column]]
        elif shown[column].dtype.kind == "f":
            shown[column] = ["–" if np.isnan(v) else f"{v:.3f}" if abs(v) < 10 else f"{v:.1f}" for v in shown[column]]
    text = shown.rename(columns=lambda c: str(c).replace("_", " ")).to_markdown(index=False, disable_numparse=True)
    return text + "\n" + (f"\n{note}\n" if note else "")


def versions(device: str = "cpu") -> dict[str, str]:
    """What a number of that device depends on."""
    return {"python": platform.python_version(), "machine": platform.machine(), "device": device, "threads": str(torch.get_num_threads()),
            "dtype auto": name_of(fast_dtype(torch.device(device)))} | {
                name: version(name) for name in ("torch", "torchvision", "open_clip_torch", "numpy")}


def machine() -> str:
    """The processor's name and how many cores there are."""
    names = [line.split(":", 1)[1].strip() for path in (Path("/proc/cpuinfo"),) if path.exists()
             for line in path.read_text().splitlines() if line.startswith("model name")]
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {os.cpu_count()} cores"


def image_grid(rows: Mapping[str, Tensor], columns: int = 8, cell: float = 1.0, title: str = "", headers: Sequence[str] = ()) -> Figure:
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
    figure.subplots_adjust(left=1.5 / (cell * columns + 1.6), right=1, bottom=0, top=1 if not above else 1 - (above - 0.05) / height,
                           wspace=0.03, hspace=0.03)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike, dpi: int = 120) -> Path:
    """PNG or PDF, as the suffix says, atomically, without a time stamp inside, so that the same run writes the same file."""
    kind = Path(path).suffix.removeprefix(".")
    return atomic_save(figure, path, lambda figure, part: figure.savefig(part, dpi=dpi, format=kind,
                                                                         metadata={"CreationDate" if kind == "pdf" else "Software": None}))


def loss_curves(log: pd.DataFrame) -> Figure:
    """Every logged number against the step, one panel each."""
    names = [c for c in log.columns if c not in ("step", "seconds")]
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.4), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        sns.lineplot(log, x="step", y=name, ax=axis)
        axis.set(title=name, ylabel="")
    return figure


def distributions(table: pd.DataFrame) -> Figure:
    """How each metric is spread over the pictures, per prompt."""
    names = [c for c in MAIN if c in table and table[c].dtype.kind == "f" and not c.startswith(("success", "kid"))]
    figure, axes = plt.subplots(1, len(names), figsize=(2.6 * len(names), 0.7 + 0.45 * table.prompt.nunique()), sharey=True, squeeze=False,
                                layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        sns.boxplot(table, x=name, y="prompt", ax=axis, fliersize=2, linewidth=0.8, color="C0")
        axis.set(xlabel=name.replace("_", " "), ylabel="")
    return figure


def tradeoff_curves(table: pd.DataFrame, label: str = "varied", value: str = "value", x: str = "centre_distance") -> Figure:
    """Every number of ``table`` (:func:`cfclip.inversion.tradeoff`) against ``x``: a line per ``label``, a point per ``value``, means over photos."""
    means = table.drop(columns="index", errors="ignore").groupby([label, value], sort=False).mean(numeric_only=True).reset_index()
    names = [c for c in means.columns if c not in (label, value, x)]
    figure, axes = plt.subplots(1, len(names), figsize=(2.8 * len(names), 2.6), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        for what, line in means.groupby(label, sort=False):
            axis.plot(line[x], line[name], marker="o", label=what)
            for _, point in line.iterrows():
                axis.annotate(f"{point[value]:g}", (point[x], point[name]), textcoords="offset points", xytext=(3, 3), fontsize=7)
        axis.set(title=name.replace("_", " "), xlabel=x.replace("_", " "))
    axes[0, 0].legend(fontsize=7)
    return figure


def strength_curves(table: pd.DataFrame) -> Figure:
    """What an edit gains and costs (as far as it is there) against the strength, a line a prompt, with 95 % intervals over the pictures."""
    names = [c for c in ("success_after", "clip_after", "heldout_clip_after", "identity", "leakage", "truth_distance") if c in table]
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.8), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        sns.lineplot(table, x="strength", y=name, hue="prompt", marker="o", ax=axis, legend=axis is axes[0][0], seed=0)
        axis.set(title=name.removesuffix("_after").replace("_", " "), ylabel="")
    handles, labels = axes[0][0].get_legend_handles_labels()
    axes[0][0].get_legend().remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def leakage_matrix(table: pd.DataFrame) -> Figure:
    """Prompts [rows] x parts [columns]: how far each part moved."""
    figure, axis = plt.subplots(figsize=(0.75 * len(table.columns) + 2, 0.45 * len(table) + 1.2), layout="constrained")
    sns.heatmap(table, annot=True, fmt=".2f", vmin=0, vmax=1, cmap="rocket_r", linewidths=0.5, ax=axis)
    axis.set_xticklabels([label.get_text().replace("_", " ") for label in axis.get_xticklabels()], rotation=40, ha="right")
    return figure


def write_report(folder: str | os.PathLike, table: pd.DataFrame, summary: pd.DataFrame, figures: Mapping[str, Figure], note: str) -> Path:
    """``table.csv`` (a row a picture), ``metrics.jsonl`` (a row a prompt), ``README.md`` with the :data:`MAIN` columns, and the figures."""
    folder = writable(folder)
    atomic_save(table, folder / "table.csv", lambda table, part: table.to_csv(part, index=False, float_format="%.6g"))
    write_rows(summary.astype(object).where(summary.notna(), None).to_dict("records"), folder / "metrics.jsonl")
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")
    pictures = "\n".join(f"![{name}]({name}.png)\n" for name in figures)
    where = ", ".join(f"{name} {value}" for name, value in versions().items() if name != "device")       # the note says it
    main = markdown(summary[[c for c in MAIN if c in summary]], note)
    text = f"# Results\n\nRewritten by `make reproduce`; a row a picture in `table.csv`.\n\n{main}\n{where}.\n\n{pictures}"
    return atomic_save(text, folder / "README.md", lambda text, part: part.write_text(text))
