"""bench.jsonl -> tables and figures. Ratios are of medians of one run; nothing is measured here."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from cfclip.bench.published import WORDS
from cfclip.evaluation.figures import save_figure
from cfclip.evaluation.report import markdown
from cfclip.evaluation.stats import half_width, plus_minus
from cfclip.files import write_text

Rows = Sequence[Mapping[str, Any]]

STEPS = 50_000

TOLERANCE = 1e-5
"""Of the published step's losses and ours in float32, relative; a hundred times that for the norm of the gradient."""


def of(rows: Rows, part: str, **known: Any) -> list[Mapping[str, Any]]:
    """What was measured of ``part`` with these values."""
    return [
        row
        for row in rows
        if row["part"] == part
        and "status" not in row
        and all(row.get(name) == value for name, value in known.items())
    ]


def number(value: float | None) -> str:
    """Three digits, however large or small; a dash for none."""
    return (
        "–"
        if value is None or pd.isna(value)
        else f"{value:,.0f}"
        if abs(value) >= 1000
        else f"{value:#.3g}".rstrip(".")
    )


def spread(row: Mapping[str, Any], scale: float = 1) -> str:
    return f"{number(scale * row['low'])}–{number(scale * row['high'])}" if row["n"] > 1 else "–"


def text(table: pd.DataFrame, note: str = "") -> str:
    """``table`` in Markdown, numbers to three digits."""
    shown = table.copy()
    for name in shown.columns:
        if shown[name].dtype.kind == "f":
            shown[name] = [number(value) for value in shown[name]]
    shown = shown.where(shown.notna(), "–")
    return markdown(shown, note) if len(shown) else "Nothing was measured.\n"


def peaks(rows: Rows, device: str) -> dict[str, float]:
    """dtype -> FLOP/s, and "copy" -> byte/s, at this device's best."""
    best: dict[str, float] = {}
    for row in of(rows, "floors", device=device):
        if row["name"] == "copy":
            best["copy"] = row["gb_per_second"] * 1e9
        else:
            best[row["dtype"]] = max(best.get(row["dtype"], 0), row["tflops"] * 1e12)
    return best


def floor(best: Mapping[str, float], work: Mapping[str, Sequence[float]]) -> tuple[float, str]:
    """The least seconds of ``work``, dtype -> [FLOP, bytes], and what sets them."""
    arithmetic = sum(flop / best[dtype] for dtype, (flop, _) in work.items() if dtype in best)
    bandwidth = sum(moved for _, moved in work.values()) / best["copy"]
    return max((arithmetic, "arithmetic"), (bandwidth, "bandwidth"))


# ---- the tables ----


def floors_table(rows: Rows) -> pd.DataFrame:
    return pd.DataFrame([
        {
            "device": row["device"],
            "what": row["name"],
            "dtype": row.get("dtype", "–"),
            "TFLOP/s": row.get("tflops"),
            "GB/s": row.get("gb_per_second"),
            "n": row["n"],
        }
        for row in of(rows, "floors")
    ])


def generator_table(rows: Rows) -> pd.DataFrame:
    """Pictures a second, how many times plain's, and the share of what the device could do at best."""
    found = []
    for row in [row for row in of(rows, "generator") if "pass" in row]:
        same = of(
            rows,
            "generator",
            device=row["device"],
            resolution=row["resolution"],
            batch=row["batch"],
            **{"pass": row["pass"]},
        )
        plain, best, limit = (
            next((other for other in same if other["name"] == "plain"), None),
            peaks(rows, row["device"]),
            None,
        )
        if "tflop" in row and row["dtype"] in best:
            limit = floor(
                best,
                {
                    row["dtype"]: (
                        min(other["tflop"] for other in same if "tflop" in other) * 1e12,
                        row["moved_gb"] * 1e9,
                    )
                },
            )
        found.append({
            "device": row["device"],
            "resolution": row["resolution"],
            "batch": row["batch"],
            "pass": row["pass"],
            "generator": row["name"],
            "dtype": row["dtype"],
            "images/s": row["batch"] / row["median"],
            "ms an image": 1000 * row["median"] / row["batch"],
            "low–high, ms": spread(row, 1000 / row["batch"]),
            "n": row["n"],
            "× plain": plain["median"] / row["median"] if plain else None,
            "GFLOP an image": 1000 * row["tflop"] / row["batch"] if "tflop" in row else None,
            "of the floor": f"{100 * limit[0] / row['median']:.0f} % ({limit[1]})" if limit else "–",
        })
    order = {"forward": 0, "forward + backward": 1}
    return pd.DataFrame(sorted(found, key=lambda row: (row["device"], row["resolution"], order[row["pass"]])))


def step_table(rows: Rows, device: str) -> pd.DataFrame:
    """The steps that were measured with their memory: ours in every form, and the published one."""
    published = next(iter(of(rows, "step", device=device, name="published")), None)
    found = []
    for row in [row for row in of(rows, "step", device=device) if "peak_gb" in row]:
        apart = abs(row["losses"]["loss"] / published["losses"]["loss"] - 1) if published else None
        found.append({
            "step": row["name"],
            "dtype": row["dtype"],
            "s": row["median"],
            "low–high": spread(row),
            "n": row["n"],
            "times faster": published["median"] / row["median"] if published else None,
            "peak GB": row["peak_gb"],
            "loss": f"{row['losses']['loss']:.6f}",
            "loss apart": f"{apart:.0e}" if apart is not None else "–",
            f"hours of {STEPS} steps": row["median"] * STEPS / 3600,
        })
    return pd.DataFrame(sorted(found, key=lambda row: -row["s"]))


def ladder_table(rows: Rows, device: str) -> pd.DataFrame:
    """The published step's seconds, shared out: what each waste costs when those above it are off already."""
    published = of(rows, "step", device=device, name="published")
    if not published:
        return pd.DataFrame()
    before, found = published[0]["median"], []
    for row in [row for row in of(rows, "step", device=device) if row.get("off")]:
        after = row.get("median", before)
        found.append({
            "turned off": WORDS[row["off"]],
            "s a step": after,
            "it cost, s": before - after,
            "of the published step": f"{100 * (before - after) / published[0]['median']:.0f} %",
            "memory of its own, GB": row.get("saves_gb"),
        })
        before = after
    return pd.DataFrame(found)


def wastes_table(rows: Rows, device: str) -> pd.DataFrame:
    """Each waste off alone (what it saves) and on alone (what it adds), at the small size."""
    kinds = {
        kind: {row["waste"]: row for row in of(rows, "step", device=device, kind=kind)}
        for kind in ("all", "off", "on", "none")
    }
    if not kinds["all"]:
        return pd.DataFrame()
    everything, nothing = kinds["all"][None]["median"], kinds["none"][None]["median"]
    # the views of a source need the source: what they add is over a step that draws it
    base = {"source_views": kinds["on"]["sources"]["median"]}
    found = [
        {
            "waste": WORDS[name],
            "s without it": off["median"],
            "it saves, s": everything - off["median"],
            "s with it alone": on["median"],
            "it adds, s": on["median"] - base.get(name, nothing),
            "low–high with it alone": spread(on),
            "n": off["n"],
        }
        for name, off in kinds["off"].items()
        if (on := kinds["on"][name])
    ]
    ends = [
        {"waste": words, column: kinds[kind][None]["median"], "n": kinds[kind][None]["n"]}
        for words, kind, column in (
            ("all of them (published)", "all", "s with it alone"),
            ("none (ours)", "none", "s without it"),
        )
    ]
    return pd.DataFrame(found + ends)


def memory_table(rows: Rows) -> pd.DataFrame:
    steps = [
        {"device": row["device"], "what": f"step, {row['name']}"} | row
        for row in of(rows, "step")
        if "peak_gb" in row
    ]
    alone = [
        {"what": f"generator forward + backward, {row['name']}"} | row
        for row in of(rows, "generator")
        if "peak_gb" in row
    ]
    return pd.DataFrame([
        {
            "device": row["device"],
            "what": row["what"],
            "dtype": row["dtype"],
            "resolution": row["resolution"],
            "batch": row["batch"],
            "peak GB": row["peak_gb"],
        }
        for row in steps + alone
    ])


def explorer_table(rows: Rows) -> pd.DataFrame:
    return pd.DataFrame([
        {
            "what": row["name"],
            "faces": row["faces"],
            "median, ms": 1000 * row["median"],
            "p90, ms": 1000 * row["p90"],
            "low–high, ms": spread(row, 1000),
            "n": row["n"],
            "different values": row["different"],
        }
        for row in of(rows, "explorer")
    ])


def scaling_table(rows: Rows, name: str) -> pd.DataFrame:
    return pd.DataFrame([
        {
            "device": row["device"],
            name: row["value"],
            "ms": 1000 * row["median"],
            "low–high, ms": spread(row, 1000),
            "n": row["n"],
        }
        | ({"ms a picture": 1000 * row["median"] / row["value"]} if name == "batch" else {})
        | ({"ms a run": 1000 * row["median"] / row["value"]} if name.startswith("sweep") else {})
        | ({"peak GB": row["peak_gb"]} if "peak_gb" in row else {})
        | ({"text features before, s": row["preparing"]} if "preparing" in row else {})
        for row in of(rows, "scaling", name=name)
    ])


def pictures_table(rows: Rows) -> pd.DataFrame:
    return pd.DataFrame([
        {
            "device": row["device"],
            "dtype": row["dtype"],
            "filters": row["name"],
            "faces": row["faces"],
            "mean": row["mean"],
            "most": row["most"],
        }
        for row in of(rows, "fidelity")
        if "most" in row
    ])


def success_table(rows: Rows) -> pd.DataFrame:
    """Success and identity by prompt and way, and how far each seed's success is from that seed's with the reference operators."""
    table, found = pd.DataFrame([row for row in of(rows, "fidelity") if "success_after" in row]), []
    if table.empty:
        return table
    for (device, prompt), group in table.groupby(["device", "prompt"], sort=False):
        reference = group[group["name"] == "reference"].set_index("seed")
        for (name, dtype), way in group.groupby(["name", "dtype"], sort=False):
            apart = 100 * (way.set_index("seed")["success_after"] - reference["success_after"])
            found.append({
                "device": device,
                "prompt": prompt,
                "operators": name,
                "dtype": dtype,
                "steps": way["steps"].iloc[0],
                "seeds": len(way),
                "faces": way["faces"].iloc[0],
                "success": plus_minus(way["success_after"].mean(), half_width(way["success_after"]), 100),
                "each": ", ".join(f"{100 * value:.0f}" for value in way["success_after"]),
                "identity": plus_minus(way["identity"].mean(), half_width(way["identity"])),
                "apart": "–" if name == "reference" else plus_minus(apart.mean(), half_width(apart)),
            })
    return pd.DataFrame(found)


def phases_table(rows: Rows, device: str, dtype: str) -> pd.DataFrame:
    """Where a step's time goes, and how far each phase is from the least that this device could take for it."""
    best, phases = peaks(rows, device), of(rows, "profile", device=device, dtype=dtype, kind="phase")
    total = sum(row["median"] for row in phases)
    found = []
    for row in phases:
        least, by = floor(best, row["work"]) if best else (None, "–")
        found.append({
            "phase": row["name"],
            "s": row["median"],
            "share": row["median"] / total,
            "TFLOP": sum(w[0] for w in row["work"].values()) / 1e12,
            "GB": sum(w[1] for w in row["work"].values()) / 1e9,
            "floor, s": least,
            "× floor": row["median"] / least if least else None,
            "set by": by if least else "–",
        })
    return pd.DataFrame(found)


def bound(table: pd.DataFrame) -> str:
    """The next bound, by rule: of the phase with the most time, what its floor is and how far it is from it."""
    first = table.loc[table["s"].idxmax()]
    words = f"**The next bound: {first['phase']}**, {100 * first['share']:.0f} % of the step"
    if pd.isna(first["× floor"]):
        return words + "; it is neither arithmetic nor traffic of a counted operator."
    return words + (
        f", {number(first['× floor'])} times its floor, which {first['set by']} sets. At its floor the step would take "
        f"{number(table['s'].sum() - first['s'] + first['floor, s'])} s instead of {number(table['s'].sum())} s; "
        f"with every phase at its floor, {number(table['floor, s'].sum())} s."
    )


def operators_table(rows: Rows, device: str, dtype: str) -> pd.DataFrame:
    return pd.DataFrame([
        {
            "operator": f"`{row['name']}`",
            "self time, s": row["median"],
            "share": f"{100 * row['share']:.0f} %",
            "calls": row["calls"],
        }
        for row in of(rows, "profile", device=device, dtype=dtype, kind="operator")
    ])


def unequal(rows: Rows) -> str:
    """Which float32 steps lose otherwise than the published one (by :data:`TOLERANCE` and 1e-6), or have a mapper's gradient of another norm."""
    found = []
    for device, size in dict.fromkeys(
        (row["device"], row["resolution"]) for row in of(rows, "step") if "losses" in row
    ):
        same = [
            row
            for row in of(rows, "step", device=device, resolution=size, dtype="float32")
            if "losses" in row
        ]
        first = next((row["losses"] for row in same if row["name"] in ("published", "all")), {})
        for row in same:
            found += [
                f"{row['name']} at {size}²: {name} {row['losses'][name]:.8g}, published {value:.8g}"
                for name, value in first.items()
                if abs(row["losses"][name] - value)
                > (100 * TOLERANCE * value if name == "gradient" else TOLERANCE * abs(value) + 1e-6)
            ]
    return "; ".join(found)


# ---- the figures ----


def wastes_figure(rows: Rows, device: str) -> Figure:
    """The published step with its wastes stacked, and ours below it."""
    table, ladder = step_table(rows, device), ladder_table(rows, device)
    ladder = ladder[ladder["it cost, s"] > 0]
    figure, axis = plt.subplots(figsize=(10, 0.45 * len(table) + 1.6), layout="constrained")
    for place, row in enumerate(table.to_dict("records")):
        label = f"{row['step']}, {row['dtype']}"
        if row["step"] == "published":
            left = row["s"] - ladder["it cost, s"].sum()
            axis.barh(place, left, color="C0", label="what ours does too")
            for i, waste in enumerate(ladder[::-1].to_dict("records"), 1):
                axis.barh(place, waste["it cost, s"], left=left, color=f"C{i}", label=waste["turned off"])
                left += waste["it cost, s"]
        else:
            axis.barh(place, row["s"], color="C0")
        axis.text(
            row["s"], place, f" {number(row['s'])} s, {number(row['times faster'])}×", va="center", fontsize=9
        )
        axis.text(-0.01 * table["s"].max(), place, label, ha="right", va="center", fontsize=9)
    axis.set(
        yticks=[],
        xlabel="seconds a step",
        xlim=(0, 1.18 * table["s"].max()),
        title=f"The mapper's step on the {device}",
    )
    axis.invert_yaxis()
    axis.legend(fontsize=8, loc="lower right")
    return figure


def scaling_figure(rows: Rows, device: str) -> Figure:
    """Cost against what makes it grow; both axes logarithmic."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.6), layout="constrained")

    def curve(axis: plt.Axes, found: Rows, x: str, y: Callable[[Mapping], float], label: str) -> None:
        if found:
            axis.plot([row[x] for row in found], [y(row) for row in found], marker="o", label=label)

    for axis, which in zip(axes[0], ("forward", "forward + backward"), strict=False):
        kinds = dict.fromkeys(
            (row["name"], row["dtype"]) for row in of(rows, "generator", device=device) if "pass" in row
        )
        for name, dtype in kinds:
            curve(
                axis,
                of(rows, "generator", device=device, name=name, dtype=dtype, **{"pass": which}),
                "resolution",
                lambda row: row["batch"] / row["median"],
                f"{name}, {dtype}",
            )
        axis.set(title=f"generator, {which}", xlabel="resolution", ylabel="images/s")
    places = (
        (axes[0, 2], ("resolution",), "resolution"),
        (axes[1, 0], ("batch",), "batch"),
        (axes[1, 1], ("prompts", "prompts at once"), "prompts"),
        (axes[1, 2], ("sweep, plan", "sweep, resume"), "runs"),
    )
    for axis, names, title in places:
        for name in names:
            curve(
                axis,
                of(rows, "scaling", device=device, name=name),
                "value",
                lambda row: 1000 * row["median"],
                name,
            )
        axis.set(title="sweep" if title == "runs" else f"step against {title}", xlabel=title, ylabel="ms")
    for axis in axes.flat:
        if axis.lines:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.legend(fontsize=7)
        else:
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
    return figure


# ---- all of it ----


def write(rows: Rows, out: Path) -> Path:
    """``bench.md`` and its figures."""
    where = next(row for row in rows if row["job"] == "machine")
    devices = list(dict.fromkeys(row["device"] for row in rows if row.get("device") and "status" not in row))
    parts = [
        "# Bench\n",
        "Rewritten by `make bench`; every repeat in `bench.jsonl`. Ratios are of medians of this run.\n",
    ]
    if where["quick"]:
        parts.append(
            "**`--quick`: the smallest sizes, in one process. These numbers say nothing but that it runs.**\n"
        )
    parts.append(machine_text(rows, where))
    parts += [
        "## Floors of the device\n",
        text(
            floors_table(rows),
            "Measured: the best of the repeats. A copy reads and writes; both are counted.",
        ),
    ]
    parts += [
        "## (a) Generator\n",
        text(
            generator_table(rows),
            (
                "plain: the published operators un-fused, weights frozen; folded: ours, but every FIR filter is in its convolution's kernel; unfolded: none is. "
                "In float32 ours folds none, in half precision as measured. Forward + backward: the gradient with respect to w. Of the floor: "
                "the least time that the arithmetic (the fewest FLOP of these) or the traffic (inputs and "
                "outputs of every convolution and product, once each) takes at the floors above, over what it took. "
                + _compiling(rows)
            ),
        ),
    ]
    wrong = unequal(rows)
    equal = (
        f"**Not equal**: {wrong}."
        if wrong
        else f"All float32 losses are the published ones, to {TOLERANCE:g}."
    )
    for device in devices:
        step = step_table(rows, device)
        if len(step):
            parts += [
                f"## (b) The mapper's step, {device}\n",
                text(
                    step,
                    (
                        "Same mapper, same latents, same draws in every row. loss apart: relative, from the published one. Ours keeps the sources' features "
                        f'per latent; "sources drawn" does not, as with more latents than can be kept. {equal}'
                    ),
                ),
                text(
                    ladder_table(rows, device),
                    (
                        "From the published step to ours, one waste after the other, n = 1 each. Our own operators, with "
                        "which a layer is an epilogue and a convolution, are there from where both the FIR's and the weights' rows are off. The last row "
                        "still holds all views at full size at once; ours makes each small before the next."
                    ),
                ),
            ]
            alone = wastes_table(rows, device)
            if len(alone):
                parts += [
                    f"At {_size(rows, device)}², each by itself:\n",
                    text(
                        alone,
                        (
                            "Without the sources there are no views of them either. The Gram matrices need a perceptual network, which faces do not have."
                        ),
                    ),
                ]
            if of(rows, "step", device=device, name="published"):
                parts.append(_figure(wastes_figure(rows, device), out, f"wastes-{device}"))
    parts += [
        "## (c) Peak memory\n",
        text(
            memory_table(rows),
            (
                "Of a process of its own with its start, where the four sources are drawn (CPU), or of its tensors (CUDA)."
            ),
        ),
    ]
    parts += [
        "## (d) Explorer\n",
        text(
            explorer_table(rows),
            (
                "Through a Jupyter kernel that runs 05_explorer: from the control's message until the new picture has come and the panel has stopped drawing. "
                "Dragged: the next value follows at once, while the last picture is being scored."
            ),
        ),
    ]
    parts.append("## (e) How cost grows\n")
    for name, note in (
        ("resolution", "Our step, batch 2."),
        ("batch", "Our step."),
        ("prompts", "One mapper of many prompts, batch 8; each step is for one of them."),
        ("prompts at once", "The same, of the most prompts; each step is for so many."),
        ("sweep, plan", "What `cfclip sweep --dry-run` does."),
        ("sweep, resume", "The same command, when every run is finished."),
    ):
        parts += [f"### {name}\n", text(scaling_table(rows, name), note)]
    parts += [
        _figure(scaling_figure(rows, device), out, f"scaling-{device}")
        for device in devices
        if of(rows, "scaling", device=device)
    ]
    parts += [
        "## (f) What the fast ways change\n",
        text(
            pictures_table(rows),
            (
                "toonfaces' pictures of held-out latents, seed 0, in grey levels of 255: how far they are from those of the reference operators in float32."
            ),
        ),
        text(
            success_table(rows),
            (
                "Mappers trained alike on toonfaces, the readout's success and the identity of held-out faces at strength 1: mean ± half of the 95 % interval "
                "over the seeds (Student's t). apart: from the reference operators of the same seed, per cent, with its interval."
            ),
        ),
    ]
    parts.append("## Profile of our step\n")
    for device, dtype in dict.fromkeys((row["device"], row["dtype"]) for row in of(rows, "profile")):
        phases = phases_table(rows, device, dtype)
        parts += [
            f"### {device}, {dtype}\n",
            text(phases, "Bytes and FLOP of convolutions, products and attention only."),
            bound(phases) + "\n",
            text(operators_table(rows, device, dtype)),
        ]
    return write_text(out / "bench.md", "\n".join(parts))


def machine_text(rows: Rows, where: Mapping[str, Any]) -> str:
    """The machine, how quiet it was, and what was not measured."""
    busy = max((row["others"] for row in rows if "others" in row), default=0)
    lines = [
        f"- {where['cpu']} ({', '.join(where['flags']) or 'no known flags'}), {where['memory_gb']:g} GB; GPU: {where['gpu'] or 'none'}",
        f"- {where['cpu_threads']} threads, niceness {where['niceness']}; before a measurement others used up to {100 * busy:.0f} % of the processor",
        "- "
        + ", ".join(
            f"{name} {where[name]}" for name in ("python", "torch", "torchvision", "open_clip_torch", "numpy")
        )
        + f"; {where['system']}",
        f"- allocator: {', '.join(f'{name}={value}' for name, value in where['allocator'].items())}",
        f"- {where['date']}",
    ]
    lines += [
        f"- {row['status']}: {row.get('device', '')} {'' if row['part'] == 'machine' else row['job']} ({row['why']})".replace(
            "  ", " "
        )
        for row in rows
        if row.get("status") in ("skipped", "failed")
    ]
    return "\n".join(lines) + "\n"


def _compiling(rows: Rows) -> str:
    found = [
        f"{row['compiling']:.0f} s ({row['device']}, {row['resolution']}², {row['pass']})"
        for row in of(rows, "generator")
        if "compiling" in row
    ]
    return f"torch.compile took {', '.join(found)} before its first picture." if found else ""


def _size(rows: Rows, device: str) -> int | str:
    return next((row["resolution"] for row in of(rows, "step", device=device, kind="all")), "–")


def _figure(figure: Figure, out: Path, name: str) -> str:
    save_figure(figure, out / f"{name}.png")
    plt.close(figure)
    return f"![{name}]({name}.png)\n"
