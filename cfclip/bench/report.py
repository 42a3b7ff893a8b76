"""bench.jsonl -> bench.md and its figures. Nothing is measured here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from cfclip.bench import tables
from cfclip.bench.tables import Rows, number, select, to_markdown
from cfclip.evaluation.figures import save_figure
from cfclip.evaluation.report import commit_of, markdown, other_pages, page
from cfclip.files import read_rows, write_text

NOTES = {
    "floors": "The best of the repeats. A copy reads and writes; both are counted.",
    "generator": (
        "plain: the published operators, un-fused, weights frozen. folded: ours with every FIR filter folded "
        "into a kernel; unfolded: with none. ours folds none in float32, and in half precision what is "
        "faster. backward: the gradient with respect to w. of the floor: the minimum time over the measured "
        "time; the minimum is that of the arithmetic (the fewest FLOP of these rows) or of the traffic "
        "(inputs and outputs of convolutions and matrix products, once each) at the rates above."
    ),
    "step": (
        "The same mapper, latents and random numbers in every row. loss differs by: relative to the "
        'published step. Ours caches the features of the sources; "sources drawn" does not.'
    ),
    "ladder": (
        "From the published step to ours, one waste after the other, n = 1. Our fused operators are used "
        "once both the FIR filters and the weights per sample are off. The last row still holds all views at "
        "full size; ours shrinks each view before it makes the next."
    ),
    "wastes": "Without the sources there are no views of them either.",
    "memory": "On a CPU: of a process that also draws the four sources. On CUDA: of its tensors.",
    "explorer": (
        "Through a Jupyter kernel that runs 05_explorer: from the message of a control until the new picture "
        "has come and the panel has stopped drawing. dragged: a value every 60 ms, whatever has come; "
        "1000 / ms is pictures a second. Preview: from the button until a trained picture has come."
    ),
    "pictures": (
        "toonfaces' pictures of held-out latents, seed 0: their difference from those of the reference "
        "operators in float32, in grey levels of 255."
    ),
    "success": (
        "Mappers trained alike on toonfaces: success (%) and identity of held-out faces at strength 1, mean "
        "± half of the 95 % interval over the seeds (Student's t). difference: from the reference operators "
        "with the same seed, in percentage points, with its interval."
    ),
    "phases": "FLOP and bytes of convolutions, matrix products and attention only.",
}
SCALING = {
    "resolution": "Our step, batch 2.",
    "batch": "Our step.",
    "prompts": "One mapper of many prompts, batch 8; each step is for one of them.",
    "prompts at once": "The same with the most prompts; each step is for several.",
    "sweep, plan": "What `cfclip sweep --dry-run` does.",
    "sweep, resume": "The same command when every run is finished.",
}
PACK = (
    "Trainings in lock-step on toonfaces with its preset's settings; ms: a step of all. An hour's trainings "
    "are of their steps alone, without what is computed before them."
)


# ---- the figures ----


def wastes_figure(rows: Rows, device: str) -> Figure:
    """The published step with its wastes stacked, and ours below it."""
    table, ladder = tables.step_table(rows, device), tables.ladder_table(rows, device)
    ladder = ladder[ladder["cost, s"] > 0]
    longest = table["s"].max()
    figure, axis = plt.subplots(figsize=(10, 0.45 * len(table) + 1.6), layout="constrained")
    for place, row in enumerate(table.to_dict("records")):
        if row["step"] == "published":
            left = row["s"] - ladder["cost, s"].sum()
            axis.barh(place, left, color="C0", label="what ours does too")
            for i, waste in enumerate(ladder[::-1].to_dict("records"), 1):
                axis.barh(place, waste["cost, s"], left=left, color=f"C{i}", label=waste["turned off"])
                left += waste["cost, s"]
        else:
            axis.barh(place, row["s"], color="C0")
        result = f" {number(row['s'])} s, {number(row['times faster'])}×"
        axis.text(row["s"], place, result, va="center", fontsize=9)
        label = f"{row['step']}, {row['dtype']}"
        axis.text(-0.01 * longest, place, label, ha="right", va="center", fontsize=9)
    axis.set(yticks=[], xlabel="seconds per step", xlim=(0, 1.18 * longest))
    axis.set_title(f"The mapper's step on the {device}")
    axis.invert_yaxis()
    axis.legend(fontsize=8, loc="lower right")
    return figure


def scaling_figure(rows: Rows, device: str) -> Figure:
    """Cost against what makes it grow; both axes logarithmic."""
    rows, points = [row for row in rows if row.get("device") == device], []
    for row in tables.generator_table(rows).to_dict("records"):
        panel, line = f"generator, {row['pass']}: images/s", f"{row['generator']}, {row['dtype']}"
        points.append((panel, "resolution", line, row["resolution"], row["images/s"]))
    for name in SCALING:
        x = "runs" if name.startswith("sweep") else name.partition(" ")[0]
        panel = "sweep: ms" if x == "runs" else f"step against {x}: ms"
        for row in select(rows, "scaling", name=name):
            points.append((panel, x, name, row["value"], 1000 * row["median"]))
    for row in tables.pack_table(rows).to_dict("records"):
        panel = "a pack: trainings an hour"
        points.append((panel, "trainings together", row["dtype"], row["together"], row["trainings an hour"]))
    panels = pd.DataFrame(points, columns=["panel", "x", "line", "at", "cost"]).groupby("panel", sort=False)
    figure, axes = plt.subplots(2, 4, figsize=(16, 6.6), layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (panel, shown) in zip(axes.flat, panels, strict=False):
        for line, curve in shown.groupby("line", sort=False):
            axis.plot(curve["at"], curve["cost"], marker="o", label=line)
        axis.set(title=panel, xlabel=shown["x"].iloc[0], yscale="log")
        axis.set_xscale("log", base=2)
        axis.legend(fontsize=7)
    return figure


# ---- the page ----


def write(rows: Rows, out: Path) -> Path:
    """Write ``bench.md`` and its figures into ``out``; returns the path of bench.md."""
    machine = next(row for row in rows if row["job"] == "machine")
    devices = list(dict.fromkeys(row["device"] for row in rows if row.get("device") and "status" not in row))
    page = ["# Bench\n", "Written by `make bench` from `bench.jsonl`. Ratios are of medians.\n"]
    if machine["quick"]:
        page.append("**`--quick`: the smallest sizes. The numbers only show that everything runs.**\n")
    page += [
        machine_text(rows, machine),
        "## Floors of the device\n",
        to_markdown(tables.floors_table(rows), NOTES["floors"]),
        "## (a) Generator\n",
        to_markdown(tables.generator_table(rows), NOTES["generator"] + _compiling(rows)),
    ]
    for device in devices:
        page += _step_section(rows, device, out)
    page += ["## (c) Peak memory\n", to_markdown(tables.memory_table(rows), NOTES["memory"])]
    page += ["## (d) Explorer\n", to_markdown(tables.explorer_table(rows), NOTES["explorer"])]
    page.append("## (e) How cost grows\n")
    for name, note in SCALING.items():
        page += [f"### {name}\n", to_markdown(tables.scaling_table(rows, name), note)]
    page += ["### pack\n", to_markdown(tables.pack_table(rows), PACK)]
    for device in devices:
        if select(rows, "scaling", device=device):
            page.append(_figure(scaling_figure(rows, device), out, f"scaling-{device}"))
    page += [
        "## (f) What the fast ways change\n",
        to_markdown(tables.pictures_table(rows), NOTES["pictures"]),
        to_markdown(tables.success_table(rows), NOTES["success"]),
        "## Profile of our step\n",
    ]
    for device, dtype in dict.fromkeys((row["device"], row["dtype"]) for row in select(rows, "profile")):
        phases = tables.phases_table(rows, device, dtype)
        page += [
            f"### {device}, {dtype}\n",
            to_markdown(phases, NOTES["phases"]),
            tables.next_bound(phases) + "\n",
            to_markdown(tables.operators_table(rows, device, dtype)),
        ]
    return write_text(out / "bench.md", "\n".join(page))


def machine_text(rows: Rows, machine: Mapping[str, Any]) -> str:
    """The machine, how busy it was, and what was not measured."""
    busy = max((row["others"] for row in rows if "others" in row), default=0)
    libraries = ("python", "torch", "torchvision", "open_clip_torch", "numpy")
    lines = [
        f"{machine['cpu']} ({', '.join(machine['flags']) or 'no known flags'}), {machine['memory_gb']:g} GB; "
        f"GPU: {machine['gpu'] or 'none'}",
        f"{machine['cpu_threads']} threads, niceness {machine['niceness']}; "
        f"before each measurement other processes used at most {100 * busy:.0f} % of the processor",
        f"{', '.join(f'{name} {machine[name]}' for name in libraries)}; {machine['system']}",
        f"allocator: {', '.join(f'{name}={value}' for name, value in machine['allocator'].items())}",
        ", commit ".join(filter(None, (machine["date"], machine.get("commit")))),
    ]
    for row in rows:
        if row.get("status") in ("skipped", "failed"):
            what = row.get("device", "") if row["part"] == "machine" else f"{row['device']} {row['job']}"
            lines.append(f"{row['status']}: {what} ({row['why']})")
    return "".join(f"- {line}\n" for line in lines)


# ---- all machines ----

OVERVIEW = (
    "`make bench` writes a folder per machine, and then this page. A ratio compares measurements of one run "
    "on one machine; n: the number of repeats, whose median is shown; –: not measured. commit: of the "
    "measured code, or where the rows do not say it, of the rows. its floor: the share of our step's time "
    "that all its products and convolutions, or their traffic, would take at the best rates there."
)


def write_overview(folder: Path) -> Path:
    """Write ``README.md`` of ``folder``: a column for each machine, whose results are in a subfolder."""
    columns = {}
    for file in sorted(folder.glob("*/bench.jsonl")):
        rows = read_rows(file)
        machine = next(row for row in rows if row["job"] == "machine")
        title = ", ".join(filter(None, (machine["cpu"], machine["gpu"])))
        columns[f"[{title}]({file.parent.name}/bench.md)"] = {
            "instructions": "CUDA" if machine["gpu"] else next(iter(machine["flags"][::-1]), "–"),
            "commit": machine.get("commit") or f"rows came with {commit_of(file) or '–'}",
        } | overview(rows, "cuda" if machine["gpu"] else "cpu")
    # the machine with the most numbers decides the order
    known = dict.fromkeys(name for one in sorted(columns.values(), key=len, reverse=True) for name in one)
    table = pd.DataFrame([
        {"": name} | {title: one.get(name, "–") for title, one in columns.items()} for name in known
    ])
    more = {*folder.glob("*/*.md")} - {*folder.glob("*/bench.md")}
    text = page("What it costs", OVERVIEW, markdown(table), other_pages(folder, more))
    return write_text(folder / "README.md", text)


def overview(rows: Rows, device: str) -> dict[str, str]:
    """The main results of a machine: what was measured -> the number and n."""
    lines = {}
    for row in select(rows, "floors", device=device, name="convolution"):
        lines[f"convolutions in {row['dtype']}, TFLOP/s"] = f"{number(row['tflops'])} (n = {row['n']})"
    for row in tables.step_table(rows, device).to_dict("records"):
        text = f"{number(row['s'])} s, {number(row['peak GB'])} GB (n = {row['n']})"
        if row["step"] == "published":
            lines["FFHQ's step, published"] = text
        elif row["step"] == "ours":
            faster = f": {number(row['times faster'])} times faster" if row["times faster"] else ""
            lines[f"ours, {row['dtype']}"] = text + faster
            if len(phases := tables.phases_table(rows, device, row["dtype"])):
                share = phases["floor, s"].sum() / phases["s"].sum()
                lines[f"its floor, {row['dtype']}"] = f"{100 * share:.0f} % of the step's time"
    for row in tables.explorer_table(rows).to_dict("records"):
        lines[f"explorer: {row['what']}"] = f"{number(row['ms'])} ms (n = {row['n']})"
    packs = tables.pack_table(rows)
    for dtype, one in packs.groupby("dtype", sort=False) if len(packs) else ():
        text = "a step {} ms, {} trainings an hour".format
        for row in one[one.together == 1].to_dict("records"):
            alone = text(number(row["ms"]), number(row["trainings an hour"]))
            lines[f"toonfaces, one training, {dtype}"] = f"{alone} (n = {row['n']})"
        best = one.loc[one["trainings an hour"].idxmax()]
        if best.together > 1:
            best_text = text(number(best.ms), number(best["trainings an hour"]))
            times = f"{number(best['× one'])} times as many (n = {best.n})"
            lines[f"toonfaces, the best pack, {dtype}"] = f"{best.together} together: {best_text}, {times}"
    return lines


def _compiling(rows: Rows) -> str:
    compiled = [row for row in select(rows, "generator") if "compiling" in row]
    case = "{compiling:.0f} s ({device}, {resolution}², {pass})"
    times = [case.format(**row) for row in compiled]
    return f" torch.compile took {', '.join(times)} before its first picture." if times else ""


def _step_section(rows: Rows, device: str, out: Path) -> list[str]:
    if not len(step := tables.step_table(rows, device)):
        return []
    differ = tables.unequal(rows)
    equal = f"All float32 losses equal the published ones, to {tables.TOLERANCE:g}."
    note = f"{NOTES['step']} {f'**Not equal**: {differ}.' if differ else equal}"
    ladder = to_markdown(tables.ladder_table(rows, device), NOTES["ladder"])
    section = [f"## (b) The mapper's step, {device}\n", to_markdown(step, note), ladder]
    if len(alone := tables.wastes_table(rows, device)):
        size = select(rows, "step", device=device, kind="all")[0]["resolution"]
        section += [f"Each waste by itself, at {size}²:\n", to_markdown(alone, NOTES["wastes"])]
    if select(rows, "step", device=device, name="published"):
        section.append(_figure(wastes_figure(rows, device), out, f"wastes-{device}"))
    return section


def _figure(figure: Figure, out: Path, name: str) -> str:
    save_figure(figure, out / f"{name}.png")
    plt.close(figure)
    return f"![{name}]({name}.png)\n"
