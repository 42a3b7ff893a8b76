"""Reports: Markdown pages, CSV files and figures in a folder, and what they were made with."""

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from cfclip.evaluation.figures import save_figure
from cfclip.evaluation.metrics import PERCENT
from cfclip.evaluation.tables import label, over_seeds, wide
from cfclip.files import writable, write_csv, write_rows, write_text
from cfclip.models.ops import fast_dtype, name_of


def _cell(column: str, value: float) -> str:
    if np.isnan(value):
        return "–"
    if column in PERCENT or column.startswith("success"):
        return f"{100 * value:.1f} %"
    if column == "n_with_part":
        return f"{value:.0f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def markdown(table: pd.DataFrame, note: str = "") -> str:
    """A Markdown table: success in per cent, counts whole, other floats with three decimals, "–" for NaN."""
    shown = table.copy()
    for column in shown.columns:
        if shown[column].dtype.kind == "f" or (column in PERCENT and shown[column].dtype.kind == "i"):
            shown[column] = [_cell(str(column), value) for value in shown[column]]
    shown = shown.rename(columns=lambda column: str(column).replace("_", " "))
    text = shown.to_markdown(index=False, disable_numparse=True)
    return text + "\n" + (f"\n{note}\n" if note else "")


def section(heading: str, table: pd.DataFrame, note: str = "") -> str:
    """A block of :func:`page`: a table under its heading, the note below it; "" if the table is empty."""
    return f"## {heading}\n\n{markdown(table, note)}" if len(table) else ""


def pictures(names: Iterable[str], pdf: bool = True) -> str:
    """A block of :func:`page`: the PNG files of these names, each with a link to its PDF."""
    links = [f"![{name}]({name}.png)" + (f"\n\n[{name}.pdf]({name}.pdf)" if pdf else "") for name in names]
    return "\n\n".join(links)


def page(title: str, *blocks: str) -> str:
    """A Markdown page of the blocks that are not empty."""
    return "\n\n".join(block.strip("\n") for block in (f"# {title}", *blocks) if block) + "\n"


def by_prompt(each: pd.DataFrame) -> str:
    """Markdown: one section per group, in it one table per metric, methods by prompts.

    each: :func:`cfclip.evaluation.tables.trainings` at one strength.
    """
    parts = []
    for group, long in over_seeds(each, ("group", "method", "prompt")).groupby("group", observed=True):
        parts.append(f"## {group[0].upper()}{group[1:]}\n")
        for metric, one in long.groupby("metric", sort=False):
            if one["mean"].notna().any() and not metric.endswith("_before"):
                parts.append(f"{label(metric)}\n\n{markdown(wide(one, ['method'], 'prompt'))}")
    return "\n".join(parts)


def write(folder: str | os.PathLike, files: Mapping[str, pd.DataFrame | str | Figure]) -> Path:
    """Write each of ``files``, name -> content, into ``folder``.

    A table is written as its suffix says, CSV or JSON lines; a text as it is; a figure as its suffix says, or
    both as PNG and as PDF if it has none.
    """
    folder = writable(folder)
    for name, content in files.items():
        path = folder / name
        if isinstance(content, str):
            write_text(path, content)
        elif isinstance(content, Figure):
            for suffix in [path.suffix] if path.suffix else [".png", ".pdf"]:
                save_figure(content, path.with_suffix(suffix))
        elif path.suffix == ".jsonl":
            write_rows(path, content.astype(object).where(content.notna(), None).to_dict("records"))
        else:
            write_csv(path, content)
    return folder


def versions(device: str = "cpu") -> dict[str, str]:
    """What numbers computed on ``device`` depend on."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "dtype auto": name_of(fast_dtype(torch.device(device))),
    } | {name: version(name) for name in ("torch", "torchvision", "open_clip_torch", "numpy")}


def machine() -> str:
    """The processor's name and its number of cores."""
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def made_with() -> str:
    """The versions of this process in one line, without the device, which the note names."""
    return ", ".join(f"{name} {value}" for name, value in versions().items() if name != "device") + "."


def provenance(records: Sequence[Mapping[str, Any]]) -> str:
    """One paragraph: how many runs, how long, with which versions, and where the tables were made."""
    seconds = sum(record["seconds"] for record in records)
    under = []
    for name in versions():
        values = {str(record.get("versions", {}).get(name, "unknown")) for record in records}
        under.append(f"{name} {' and '.join(sorted(values))}")
    return (
        f"{len(records)} runs, {seconds:.0f} seconds ({seconds / 3600:.1f} hours) summed over them. "
        f"Tables made on: {machine()}. Runs: {', '.join(under)}."
    )
