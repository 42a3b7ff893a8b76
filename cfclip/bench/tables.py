"""Rows of bench.jsonl -> tables. Ratios are of medians of one bench."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from cfclip.bench.published import WORDS
from cfclip.evaluation.report import markdown
from cfclip.evaluation.stats import half_width, plus_minus

Row = Mapping[str, Any]
Rows = Sequence[Row]

STEPS = 50_000
"""Steps of the paper's trainings."""

TOLERANCE = 1e-5
"""Allowed relative difference of float32 losses; a hundred times that for the gradient's norm."""


def select(rows: Rows, part: str, **known: Any) -> list[Row]:
    """The measured rows of ``part`` with these values."""
    measured = [row for row in rows if row["part"] == part and "status" not in row]
    return [row for row in measured if all(row.get(name) == value for name, value in known.items())]


def number(value: float | None) -> str:
    """Three significant digits; a dash for None and NaN."""
    if value is None or pd.isna(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def spread(row: Row, scale: float = 1) -> str:
    """The range of a row's repeats."""
    return f"{number(scale * row['low'])}–{number(scale * row['high'])}" if row["n"] > 1 else "–"


def to_markdown(table: pd.DataFrame, note: str = "") -> str:
    """``table`` in Markdown with three significant digits, and ``note`` below."""
    if table.empty:
        return "Nothing was measured.\n"
    shown = table.apply(lambda column: column.map(number) if column.dtype.kind == "f" else column)
    return markdown(shown.where(shown.notna(), "–"), note)


def make_table(rows: Rows, columns: Mapping[str, str | Callable[[Row], Any]]) -> pd.DataFrame:
    """A line per row. A column is a key of the rows, None in rows that lack it, or a function of a row."""
    return pd.DataFrame([
        {name: of(row) if callable(of) else row.get(of) for name, of in columns.items()} for row in rows
    ])


TIMES = {"ms": lambda row: 1000 * row["median"], "low–high, ms": lambda row: spread(row, 1000), "n": "n"}


# ---- what the device can do ----


def peaks(rows: Rows, device: str) -> dict[str, float]:
    """dtype -> FLOP/s, and "copy" -> byte/s: the best that was measured on this device."""
    best: dict[str, float] = {}
    for row in select(rows, "floors", device=device):
        if row["name"] == "copy":
            best["copy"] = row["gb_per_second"] * 1e9
        else:
            best[row["dtype"]] = max(best.get(row["dtype"], 0), row["tflops"] * 1e12)
    return best


def floor(best: Mapping[str, float], work: Mapping[str, Sequence[float]]) -> tuple[float, str]:
    """The minimum seconds of ``work``, dtype -> [FLOP, bytes], and what sets them; ``best``: see peaks."""
    arithmetic = sum(flop / best[dtype] for dtype, (flop, _) in work.items() if dtype in best)
    bandwidth = sum(moved for _, moved in work.values()) / best["copy"]
    return max((arithmetic, "arithmetic"), (bandwidth, "bandwidth"))


def floors_table(rows: Rows) -> pd.DataFrame:
    """The best that each device does."""
    columns = {"device": "device", "what": "name", "dtype": "dtype", "TFLOP/s": "tflops"}
    return make_table(select(rows, "floors"), columns | {"GB/s": "gb_per_second", "n": "n"})


# ---- generator and step ----


def generator_table(rows: Rows) -> pd.DataFrame:
    """Pictures per second, the speed relative to plain operators, and the floor's share of the time."""
    measured = [row for row in select(rows, "generator") if "pass" in row]
    case = ("device", "resolution", "batch", "pass")

    def alike(row: Row) -> list[Row]:
        return [other for other in measured if all(other[name] == row[name] for name in case)]

    def times_plain(row: Row) -> float | None:
        plain = [other["median"] for other in alike(row) if other["name"] == "plain"]
        return plain[0] / row["median"] if plain else None

    def of_floor(row: Row) -> str:
        best = peaks(rows, row["device"])
        if "tflop" not in row or row["dtype"] not in best:
            return "–"
        fewest = min(other["tflop"] for other in alike(row) if "tflop" in other)
        seconds, by = floor(best, {row["dtype"]: (fewest * 1e12, row["moved_gb"] * 1e9)})
        return f"{100 * seconds / row['median']:.0f} % ({by})"

    columns = {name: name for name in case} | {
        "generator": "name",
        "dtype": "dtype",
        "images/s": lambda row: row["batch"] / row["median"],
        "ms per image": lambda row: 1000 * row["median"] / row["batch"],
        "low–high, ms": lambda row: spread(row, 1000 / row["batch"]),
        "n": "n",
        "× plain": times_plain,
        "GFLOP per image": lambda row: 1000 * row["tflop"] / row["batch"] if "tflop" in row else None,
        "of the floor": of_floor,
    }
    ordered = sorted(measured, key=lambda row: (row["device"], row["resolution"], row["pass"]))
    return make_table(ordered, columns)


def step_table(rows: Rows, device: str) -> pd.DataFrame:
    """The steps whose memory was measured, slowest first: the published one, and ours in every form."""
    measured = [row for row in select(rows, "step", device=device) if "peak_gb" in row]
    published = next((row for row in measured if row["name"] == "published"), None)

    def difference(row: Row) -> str | None:
        return published and f"{abs(row['losses']['loss'] / published['losses']['loss'] - 1):.0e}"

    columns = {"step": "name", "dtype": "dtype", "s": "median", "low–high": spread, "n": "n"}
    columns |= {
        "times faster": lambda row: published and published["median"] / row["median"],
        "peak GB": "peak_gb",
        "loss": lambda row: f"{row['losses']['loss']:.6f}",
        "loss differs by": difference,
        f"hours for {STEPS} steps": lambda row: row["median"] * STEPS / 3600,
    }
    return make_table(sorted(measured, key=lambda row: -row["median"]), columns)


def ladder_table(rows: Rows, device: str) -> pd.DataFrame:
    """The published step's seconds, split: what each waste costs when those above it are already off."""
    if not (published := select(rows, "step", device=device, name="published")):
        return pd.DataFrame()
    total = before = published[0]["median"]
    table = []
    for row in select(rows, "step", device=device):
        if row.get("off"):
            after = row.get("median", before)
            table.append({
                "turned off": WORDS[row["off"]],
                "s per step": after,
                "cost, s": before - after,
                "of the published step": f"{100 * (before - after) / total:.0f} %",
                "extra memory, GB": row.get("saves_gb"),
            })
            before = after
    return pd.DataFrame(table)


def wastes_table(rows: Rows, device: str) -> pd.DataFrame:
    """Each waste turned off alone (what it saves) and turned on alone (what it adds)."""
    everything, off, on, nothing = (
        {row["waste"]: row for row in select(rows, "step", device=device, kind=kind)}
        for kind in ("all", "off", "on", "none")
    )
    if not everything:
        return pd.DataFrame()
    everything, nothing = everything[None], nothing[None]
    # the views of a source need the source: what they add is measured against a step that synthesises it
    base = {"source_views": on["sources"]["median"]}
    table = [
        {
            "waste": WORDS[name],
            "s without it": without["median"],
            "saves, s": everything["median"] - without["median"],
            "s with it alone": on[name]["median"],
            "adds, s": on[name]["median"] - base.get(name, nothing["median"]),
            "low–high with it alone": spread(on[name]),
            "n": without["n"],
        }
        for name, without in off.items()
    ]
    table.append({"waste": "all (published)", "s with it alone": everything["median"], "n": everything["n"]})
    table.append({"waste": "none (ours)", "s without it": nothing["median"], "n": nothing["n"]})
    return pd.DataFrame(table)


def memory_table(rows: Rows) -> pd.DataFrame:
    """Peak memory of steps and of the generator alone."""
    what = {"step": "step", "generator": "generator forward + backward"}
    measured = [row for part in what for row in select(rows, part) if "peak_gb" in row]
    columns = {"device": "device", "what": lambda row: f"{what[row['part']]}, {row['name']}"}
    columns |= {name: name for name in ("dtype", "resolution", "batch")} | {"peak GB": "peak_gb"}
    return make_table(measured, columns)


def unequal(rows: Rows) -> str:
    """The float32 steps whose losses or gradient's norm differ from the published one's; "" if none does.

    A difference counts if it is above what :data:`TOLERANCE` allows, plus 1e-6 for the losses.
    """
    measured, differ = [row for row in select(rows, "step") if "losses" in row], []
    for device, size in dict.fromkeys((row["device"], row["resolution"]) for row in measured):
        same = select(measured, "step", device=device, resolution=size, dtype="float32")
        published = next((row["losses"] for row in same if row["name"] in ("published", "all")), {})
        for row in same:
            for name, value in published.items():
                allowed = 100 * TOLERANCE * value if name == "gradient" else TOLERANCE * abs(value) + 1e-6
                if abs(row["losses"][name] - value) > allowed:
                    what = f"{row['name']} at {size}²: {name} {row['losses'][name]:.8g}"
                    differ.append(f"{what}, published {value:.8g}")
    return "; ".join(differ)


# ---- explorer, scaling, fidelity ----


def explorer_table(rows: Rows) -> pd.DataFrame:
    """The time from a change to its picture."""
    columns = {"what": "name", "faces": "faces", "ms": TIMES["ms"]}
    columns |= {"p90, ms": lambda row: 1000 * row["p90"]} | TIMES | {"different values": "different"}
    return make_table(select(rows, "explorer"), columns)


def scaling_table(rows: Rows, name: str) -> pd.DataFrame:
    """The measurements at several values of ``name``."""
    columns = {"device": "device", name: "value"} | TIMES
    if name == "batch" or name.startswith("sweep"):
        unit = "picture" if name == "batch" else "run"
        columns[f"ms per {unit}"] = lambda row: 1000 * row["median"] / row["value"]
    columns |= {"peak GB": "peak_gb", "text features before, s": "preparing"}
    return make_table(select(rows, "scaling", name=name), columns).dropna(axis=1, how="all")


def pack_table(rows: Rows) -> pd.DataFrame:
    """Trainings an hour by the size of the pack, and their ratio to those of one training alone."""
    measured = select(rows, "scaling", name="pack")

    def an_hour(row: Row) -> float:
        return 3600 * row["value"] / (row["steps"] * row["median"])

    alone = {(row["device"], row["dtype"]): an_hour(row) for row in measured if row["value"] == 1}

    def times_alone(row: Row) -> float | None:
        one = alone.get((row["device"], row["dtype"]))
        return one and an_hour(row) / one

    columns = {"device": "device", "dtype": "dtype", "together": "value"} | TIMES
    columns |= {"trainings an hour": an_hour, "× one": times_alone, "peak GB": "peak_gb"}
    return make_table(measured, columns)


def pictures_table(rows: Rows) -> pd.DataFrame:
    """How far pictures are from those of the reference operators."""
    measured = [row for row in select(rows, "fidelity") if "most" in row]
    columns = {"device": "device", "dtype": "dtype", "filters": "name", "faces": "faces"}
    return make_table(measured, columns | {"mean": "mean", "maximum": "most"})


def success_table(rows: Rows) -> pd.DataFrame:
    """Success and identity by prompt, operators and dtype; difference from the reference, paired by seed."""
    measured = pd.DataFrame([row for row in select(rows, "fidelity") if "success_after" in row])
    if measured.empty:
        return measured
    table = []
    for (device, prompt), group in measured.groupby(["device", "prompt"], sort=False):
        reference = group[group["name"] == "reference"].set_index("seed")["success_after"]
        for (name, dtype), way in group.groupby(["name", "dtype"], sort=False):
            success, identity = way.set_index("seed")["success_after"], way["identity"]
            apart = 100 * (success - reference).dropna()
            table.append({
                "device": device,
                "prompt": prompt,
                "operators": name,
                "dtype": dtype,
                "steps": way["steps"].iloc[0],
                "seeds": len(way),
                "faces": way["faces"].iloc[0],
                "success": plus_minus(success.mean(), half_width(success), 100),
                "by seed": ", ".join(f"{100 * value:.0f}" for value in success),
                "identity": plus_minus(identity.mean(), half_width(identity)),
                "difference": "–" if name == "reference" else plus_minus(apart.mean(), half_width(apart)),
            })
    return pd.DataFrame(table)


# ---- the profile ----


def phases_table(rows: Rows, device: str, dtype: str) -> pd.DataFrame:
    """Where a step's time goes, and how far each phase is from its floor on this device."""
    best, phases = peaks(rows, device), select(rows, "profile", device=device, dtype=dtype, kind="phase")
    total = sum(row["median"] for row in phases)
    table = []
    for row in phases:
        minimum, by = floor(best, row["work"]) if best else (None, "–")
        table.append({
            "phase": row["name"],
            "s": row["median"],
            "share": row["median"] / total,
            "TFLOP": sum(flop for flop, _ in row["work"].values()) / 1e12,
            "GB": sum(moved for _, moved in row["work"].values()) / 1e9,
            "floor, s": minimum,
            "× floor": row["median"] / minimum if minimum else None,
            "set by": by if minimum else "–",
        })
    return pd.DataFrame(table)


def next_bound(phases: pd.DataFrame) -> str:
    """Words on the phase of :func:`phases_table` that takes the most time, and what its floor would save."""
    first = phases.loc[phases["s"].idxmax()]
    words = f"**The next bound: {first['phase']}**, {100 * first['share']:.0f} % of the step"
    if pd.isna(first["× floor"]):
        return words + "; it has no convolutions, matrix products or attention, so its floor is unknown."
    total, floors = phases["s"].sum(), phases["floor, s"]
    return (
        f"{words}, {number(first['× floor'])} times its floor, which is set by {first['set by']}. "
        f"At its floor the step would take {number(total - first['s'] + first['floor, s'])} s "
        f"instead of {number(total)} s; with every phase at its floor, {number(floors.sum())} s."
    )


def operators_table(rows: Rows, device: str, dtype: str) -> pd.DataFrame:
    """The operators that take the most time themselves."""
    columns = {
        "operator": lambda row: f"`{row['name']}`",
        "self time, s": "median",
        "share": lambda row: f"{100 * row['share']:.0f} %",
        "calls": "calls",
    }
    return make_table(select(rows, "profile", device=device, dtype=dtype, kind="operator"), columns)
