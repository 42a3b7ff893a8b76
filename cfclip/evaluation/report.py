"""Reports: Markdown tables, CSV files and figures in a folder, and what they were made with."""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from cfclip.evaluation import ablation
from cfclip.evaluation.figures import save_figure
from cfclip.evaluation.metrics import MAIN, PERCENT
from cfclip.evaluation.tables import label, over_seeds, wide
from cfclip.files import writable, write_csv, write_rows, write_text
from cfclip.models.ops import fast_dtype, name_of


def markdown(table: pd.DataFrame, note: str = "") -> str:
    """A Markdown table: success in per cent, the rest to three digits, a dash where there is no number."""
    shown = table.copy()
    for column in shown.columns:
        if column in PERCENT:
            shown[column] = ["–" if np.isnan(v) else f"{100 * v:.1f} %" for v in shown[column]]
        elif shown[column].dtype.kind == "f":
            shown[column] = [
                "–" if np.isnan(v) else f"{v:.3f}" if abs(v) < 10 else f"{v:.1f}" for v in shown[column]
            ]
    text = shown.rename(columns=lambda c: str(c).replace("_", " ")).to_markdown(
        index=False, disable_numparse=True
    )
    return text + "\n" + (f"\n{note}\n" if note else "")


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of ``table`` as dicts, NaN as None."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def versions(device: str = "cpu") -> dict[str, str]:
    """What a number of that device depends on."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "dtype auto": name_of(fast_dtype(torch.device(device))),
    } | {name: version(name) for name in ("torch", "torchvision", "open_clip_torch", "numpy")}


def machine() -> str:
    """The processor's name and how many cores there are."""
    names = [
        line.split(":", 1)[1].strip()
        for path in (Path("/proc/cpuinfo"),)
        if path.exists()
        for line in path.read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {os.cpu_count()} cores"


def write_report(
    folder: str | os.PathLike,
    table: pd.DataFrame,
    summary: pd.DataFrame,
    figures: Mapping[str, Figure],
    note: str,
) -> Path:
    """``table.csv`` (a row a picture), ``metrics.jsonl`` (a row a prompt), ``README.md`` with the :data:`MAIN` columns, and the figures."""
    folder = writable(folder)
    write_csv(folder / "table.csv", table)
    write_rows(folder / "metrics.jsonl", records(summary))
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")
    pictures = "\n".join(f"![{name}]({name}.png)\n" for name in figures)
    where = ", ".join(
        f"{name} {value}" for name, value in versions().items() if name != "device"
    )  # the note says it
    main = markdown(summary[[c for c in MAIN if c in summary]], note)
    text = f"# Results\n\nRewritten by `make reproduce`; a row a picture in `table.csv`.\n\n{main}\n{where}.\n\n{pictures}"
    return write_text(folder / "README.md", text)


def sections(each: pd.DataFrame) -> str:
    """Markdown: a section a group, in it a table a metric, methods by prompts; of :func:`trainings` at one strength."""
    long, parts = over_seeds(each, ("group", "method", "prompt")), []
    for group, own in long.groupby("group", observed=True):
        parts.append(f"## {group[0].upper()}{group[1:]}\n")
        parts += [
            f"{label(metric)}\n\n{markdown(wide(one, ['method'], 'prompt'))}"
            for metric, one in own.groupby("metric", sort=False)
            if one["mean"].notna().any() and not metric.endswith("_before")
        ]
    return "\n".join(parts)


def readme(
    begin: str,
    parts: Mapping[str, pd.DataFrame],
    notes: Mapping[str, str],
    figures: Sequence[str],
    title: str = "The paper's tables",
) -> str:
    """Markdown: a section a table with its note below, those without a row left out; then the figures."""
    sections = [
        f"## {name}\n\n{markdown(table, notes.get(name, ''))}" for name, table in parts.items() if len(table)
    ]
    pictures = [f"![{name}]({name}.png)\n\n[{name}.pdf]({name}.pdf)\n" for name in figures]
    return "\n".join([
        f"# {title}\n\n{begin}\n",
        *sections,
        *(["## Figures\n"] if figures else []),
        *pictures,
    ])


def write(
    folder: str | os.PathLike,
    frames: Mapping[str, pd.DataFrame],
    texts: Mapping[str, str],
    figures: Mapping[str, Figure],
) -> Path:
    """Each frame as CSV, each text as Markdown, each figure as PNG and PDF -> ``folder``."""
    folder = writable(folder)
    for name, frame in frames.items():
        write_csv(folder / f"{name}.csv", frame)
    for name, text in texts.items():
        write_text(folder / f"{name}.md", text)
    for name, figure in figures.items():
        for kind in ("png", "pdf"):
            save_figure(figure, folder / f"{name}.{kind}")
    return folder


def provenance(records: Sequence[Mapping[str, Any]]) -> str:
    """One paragraph: how many runs, how long, under which versions, and on which machine the tables were made."""
    found = {
        name: sorted({str(record.get("versions", {}).get(name, "unknown")) for record in records})
        for name in versions()
    }
    seconds = sum(record["seconds"] for record in records)
    return (
        f"{len(records)} runs, {seconds:.0f} seconds ({seconds / 3600:.1f} hours) summed over them. Tables made on: {machine()}. Runs: "
        + ", ".join(f"{name} {' and '.join(values)}" for name, values in found.items())
        + "."
    )


def write_ablation(folder: str | os.PathLike, table: pd.DataFrame, drawn: Figure, note: str) -> Path:
    """``ablation.csv`` (a row a face), ``ablation.jsonl`` (the summary), ``ablation.png``, and ``ablation.md`` with the table."""
    folder, summary = writable(folder), ablation.summarise(table)
    write_csv(folder / "ablation.csv", table)
    write_rows(folder / "ablation.jsonl", records(summary))
    save_figure(drawn, folder / "ablation.png")
    text = (
        f"# Ablation of the directions\n\nWritten by `notebooks/03_ablation_directions.ipynb`; a row a face in `ablation.csv`.\n\n"
        f"{markdown(ablation.pretty(summary), note)}\n![ablation](ablation.png)\n"
    )
    return write_text(folder / "ablation.md", text)
