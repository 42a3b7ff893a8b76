"""Reports: Markdown pages, CSV files and figures in a folder, and what they were made with."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cfclip.baselines.methods import METHODS
from cfclip.domain import GROUPS
from cfclip.evaluation.ablation import ROWS
from cfclip.evaluation.figures import save_figure
from cfclip.evaluation.frames import FRAMES
from cfclip.evaluation.metrics import MAIN, PERCENT
from cfclip.evaluation.tables import label, means, ordered, over_seeds, wide
from cfclip.evaluation.versions import machine, versions
from cfclip.files import ROOT, writable, write_csv, write_rows, write_text

HEADLINE = (
    "prompt", "n", "n_with_part", "success_before", "success_after", "progress", "leakage", "identity",
)  # fmt: skip
"""The columns of the first table of 04_evaluation."""
SHARES = ("kept", "done", "predicted")
"""More columns that are shares; like success, they are shown as whole per cent."""


def _cell(column: str, value: float) -> str:
    if np.isnan(value):
        return "–"
    if column in (*PERCENT, *SHARES) or column.startswith("success"):
        return f"{100 * value:.0f} %"
    if column in ("n_with_part", "n_judged", "seconds"):
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 or column.startswith(("clip", "heldout")) else f"{value:.3f}"


def markdown(table: pd.DataFrame, note: str = "", across: str = "") -> str:
    """A Markdown table of ``table``, with ``note`` below it.

    Shares are in per cent, counts are whole numbers, CLIP's scores and floats from 10 on have one decimal,
    other floats have three; NaN is "–". ``across``: the column whose values become the header, which makes a
    table of many columns easier to read.
    """
    shown = table.copy()
    for column in shown.columns:
        if shown[column].dtype.kind == "f" or (column in PERCENT and shown[column].dtype.kind == "i"):
            shown[column] = [_cell(str(column), value) for value in shown[column]]
    shown = shown.rename(columns=lambda column: str(column).replace("_", " "))
    if across:
        shown = shown.set_index(across).T.rename_axis("", axis=0).reset_index()
    text = shown.to_markdown(index=False, disable_numparse=True)
    return text + "\n" + (f"\n{note}\n" if note else "")


def section(heading: str, table: pd.DataFrame, note: str = "") -> str:
    """A block of :func:`page`: a table under its heading, the note below it; "" if the table is empty."""
    return f"## {heading}\n\n{markdown(table, note)}" if len(table) else ""


def pictures(names: Iterable[str], pdf: bool = True) -> str:
    """A block of :func:`page`: the PNG files of these names; with ``pdf`` each has a link to its PDF."""
    links = [f"![{name}]({name}.png)" + (f"\n\n[{name}.pdf]({name}.pdf)" if pdf else "") for name in names]
    return "\n\n".join(links)


def page(title: str, *blocks: str) -> str:
    """A Markdown page of the blocks that are not empty."""
    return "\n\n".join(block.strip("\n") for block in (f"# {title}", *blocks) if block) + "\n"


def other_pages(folder: Path, pages: Iterable[Path] | None = None) -> str:
    """A block of :func:`page`: links to the other ``pages`` below ``folder``, by their titles.

    Default: all Markdown files of ``folder``, and the README of each of its folders.
    """
    if pages is None:
        pages = {*folder.glob("*.md"), *folder.glob("*/README.md")} - {folder / "README.md"}
    found = sorted(pages)
    lines = [path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for path in found]
    paths = [path.relative_to(folder).as_posix() for path in found]
    links = [f"- [{title}]({path})" for title, path in zip(lines, paths, strict=True)]
    return "\n".join(["## Other pages", "", *links]) if links else ""


def commit() -> str:
    """The commit of this working tree, with "-dirty" if it has changed; "" without git."""
    return _git(ROOT, "describe", "--always", "--dirty")


def commit_of(file: Path) -> str:
    """The last commit that changed ``file``; "" if none is known."""
    return _git(file.parent, "log", "-1", "--format=%h", "--", file.name)


def _git(folder: Path, *arguments: str) -> str:
    """The output of git in ``folder``; "" without git, and outside of a working tree."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "-C", folder, *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8").stdout.strip()


def quoted(command: str) -> str:
    """``command`` in backticks, so that it can be copied; a remark in brackets after it stays outside."""
    line, bracket, remark = command.partition(" (")
    return f"`{line}`{bracket}{remark}"


def how_it_was_made(command: str) -> str:
    """A block of :func:`page`: the command, and the current commit, machine and versions."""
    return f"## How it was made\n\n`{command}` at commit {commit()} on {machine()}: {made_with()}"


def write_evaluation(
    folder: str | os.PathLike,
    curves: pd.DataFrame,
    table: pd.DataFrame,
    summary: pd.DataFrame,
    note: str,
    drawn: Mapping[str, Figure | None],
) -> Path:
    """Write the tables, the figures and the page of 04_evaluation into ``folder``.

    curves: a row per face and strength; table: its rows at one strength; summary: the means of these, a line
    per prompt; note: what was measured (faces, seed, device, strength); drawn: name -> figure, or None.
    """
    folder, figures = writable(folder), {name: figure for name, figure in drawn.items() if figure}
    by_strength = means(curves, by=["prompt", "group", "strength"]).drop(columns="n")

    def shown(*names: str) -> str:
        return pictures([name for name in names if name in figures], pdf=False)

    text = page(
        "Results",
        "What CF-CLIP does on faces that no training saw, written by `make reproduce`.",
        shown("grid"),
        "## Success and leakage",
        markdown(summary[[name for name in HEADLINE if name in summary]], note),
        "## More strength, and where it leaks",
        shown("strength", "leakage"),
        "## Every number",
        markdown(summary[[name for name in MAIN if name in summary and name != "group"]], across="prompt"),
        shown("distributions"),
        "What the rows mean: [04_evaluation](../notebooks/04_evaluation.ipynb). `table.csv` has a line per "
        "face, `strengths.csv` one per strength, `metrics.jsonl` the means with all digits.",
        how_it_was_made("make reproduce"),
        other_pages(folder),
    )
    files = {"table.csv": table, "metrics.jsonl": summary, "strengths.csv": by_strength, "README.md": text}
    return write(folder, files | {f"{name}.png": figure for name, figure in figures.items()})


def by_prompt(each: pd.DataFrame) -> str:
    """Markdown: a section per group with a table per metric, in which prompts are rows and methods columns.

    each: :func:`cfclip.evaluation.tables.headline`.
    """
    parts = []
    for group, long in over_seeds(each, ("group", "method", "prompt")).groupby("group", observed=True):
        parts.append(f"## {group[0].upper()}{group[1:]}\n")
        for metric, one in long.groupby("metric", sort=False):
            if one["mean"].notna().any() and not metric.endswith("_before"):
                parts.append(f"{label(metric)}\n\n{markdown(wide(one, ['prompt'], 'method'))}")
    return "\n".join(parts)


def write(folder: str | os.PathLike, files: Mapping[str, pd.DataFrame | str | Figure]) -> Path:
    """Write each of ``files``, name -> content, into ``folder``.

    The suffix of a name decides the format: CSV or JSON lines for a table, PNG or PDF for a figure. A figure
    without a suffix is written as both. A text is written as it is.
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


def read(path: Path) -> pd.DataFrame:
    """A table that :func:`write` wrote as CSV, with methods and groups in order; empty without the file."""
    if not path.exists():
        return pd.DataFrame()
    table = pd.read_csv(path)
    for name, order in {"method": [*METHODS, *ROWS, *FRAMES], "group": GROUPS}.items():
        if name in table:
            table[name] = ordered(table[name], order)
    return table


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
