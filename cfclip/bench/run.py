"""Which measurements make a bench, and doing them one after the other, each in a process of its own."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from cfclip.bench import machine, report
from cfclip.bench.measure import dtypes
from cfclip.files import read_rows, writable, write_rows
from cfclip.models.ops import name_of

PARTS = {
    "generator": "(a)",
    "step": "(b) and (c)",
    "explorer": "(d)",
    "scaling": "(e)",
    "fidelity": "(f)",
    "profile": "where the time of a step goes",
}


@dataclass(frozen=True)
class Job:
    """One measurement: the function ``what`` of parts.py, in a process of its own."""

    part: str
    what: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    need_gb: float = 2.0  # memory; with less than that free it is skipped
    limit: float = 900.0  # seconds after which it is given up

    @property
    def id(self) -> str:
        return " ".join([self.what, *(f"{name}={value}" for name, value in self.arguments.items())])


def full(device: str) -> Iterator[Job]:
    """The real sizes: the step is that of FFHQ, 1024², batch 2. The order puts ours before and after the published step."""
    step, small = {"resolution": 1024, "tiny": False}, {"resolution": 256, "tiny": False}
    reduced = [name_of(dtype) for dtype in dtypes(device)[1:]]
    yield Job("floors", "floors", {"side": 2048 if device == "cpu" else 8192, "copied": 2**29, "repeats": 5})
    yield Job("step", "step", step | {"dtype": "float32", "repeats": 3}, 8)
    yield Job("step", "ladder", step | {"repeats": 1}, 20, 2400)
    yield Job("step", "step", step | {"dtype": "float32", "repeats": 2, "again": True}, 8)
    yield Job("step", "step", step | {"dtype": "float32", "repeats": 2, "sources": True}, 8)
    yield Job("step", "step", step | {"dtype": "float32", "repeats": 2, "micro_batch": 1}, 8)
    for dtype in reduced:
        yield Job("step", "step", step | {"dtype": dtype, "repeats": 4}, 8)
        yield Job("step", "step", step | {"dtype": dtype, "repeats": 3, "sources": True}, 8)
    yield Job(
        "generator",
        "generator",
        {"sizes": [[64, 4], [128, 4], [256, 2], [512, 1], [1024, 1]], "repeats": 3, "tiny": False},
        8,
    )
    for dtype, plain in (("float32", True), ("float32", False), *((dtype, False) for dtype in reduced)):
        yield Job(
            "generator",
            "generator_memory",
            {"resolution": 1024, "batch": 2, "dtype": dtype, "plain": plain, "tiny": False},
            12 if plain else 6,
        )
    for dtype in ("float32", *reduced):
        yield Job("profile", "profile", step | {"dtype": dtype, "repeats": 2, "top": 12}, 8)
    yield Job("fidelity", "pictures", {"faces": 64})
    if device == "cpu":
        yield Job("explorer", "explorer", {"faces": 8, "moves": 40}, 3)
        yield Job("scaling", "growing_sweep", {"runs": [10, 100, 1000], "repeats": 3})
    yield Job(
        "scaling",
        "growing_resolution",
        {"resolutions": [64, 128, 256, 512, 1024], "tiny": False, "dtype": "float32", "repeats": 2},
        8,
    )
    yield Job(
        "scaling", "growing_batch", small | {"batches": [1, 2, 4, 8], "dtype": "float32", "repeats": 3}, 6
    )
    yield Job(
        "scaling",
        "growing_prompts",
        {"prompts": [1, 8, 32], "prompts_at_once": [1, 2, 4, 8], "tiny": False, "repeats": 5},
        3,
    )
    yield Job("step", "wastes", small | {"rounds": 2}, 6, 1500)
    yield Job("generator", "compiled", {"resolution": 256, "batch": 2, "repeats": 3, "tiny": False}, 6, 240)
    yield Job(
        "fidelity",
        "success",
        {"prompts": ["green lipstick", "purple eyebrows"], "seeds": [0, 1, 2], "steps": 300, "faces": 32},
        3,
        5400,
    )


def quick(device: str) -> Iterator[Job]:
    """Every part at the smallest size: its numbers say nothing but that it runs."""
    step = {"resolution": 16, "tiny": True}
    yield Job("floors", "floors", {"side": 256, "copied": 2**20, "repeats": 2})
    for more in (
        {"dtype": "float32"},
        {"dtype": "float32", "sources": True},
        {"dtype": "float32", "micro_batch": 1},
        {"dtype": "bfloat16"},
    ):
        yield Job("step", "step", step | {"repeats": 3} | more)
    yield Job("step", "ladder", step | {"repeats": 3})
    yield Job("step", "wastes", step | {"rounds": 1})
    yield Job("generator", "generator", {"sizes": [[8, 2], [16, 2]], "repeats": 2, "tiny": True})
    yield Job(
        "generator",
        "generator_memory",
        {"resolution": 16, "batch": 2, "dtype": "float32", "plain": False, "tiny": True},
    )
    yield Job(
        "scaling",
        "growing_resolution",
        {"resolutions": [8, 16], "tiny": True, "dtype": "float32", "repeats": 1},
    )
    yield Job("scaling", "growing_batch", step | {"batches": [1, 2], "dtype": "float32", "repeats": 1})
    yield Job(
        "scaling",
        "growing_prompts",
        {"prompts": [1, 2], "prompts_at_once": [1, 2], "tiny": True, "repeats": 1},
    )
    yield Job("fidelity", "pictures", {"faces": 2})
    yield Job("fidelity", "success", {"prompts": ["green lipstick"], "seeds": [0], "steps": 1, "faces": 2})
    yield Job("profile", "profile", step | {"dtype": "float32", "repeats": 1, "top": 5})
    if device == "cpu":
        yield Job("scaling", "growing_sweep", {"runs": [3], "repeats": 1})
        yield Job("explorer", "explorer", {"faces": 2, "moves": 3})


def code() -> str:
    """Hash of the package, but for what only chooses the jobs and draws the report."""
    here = Path(__file__).resolve().parent.parent
    aside = (Path(__file__).resolve(), Path(report.__file__).resolve())
    files = sorted(p for p in here.rglob("*") if p.suffix in (".py", ".json") and p not in aside)
    return hashlib.sha256(
        b"".join(p.relative_to(here).as_posix().encode() + p.read_bytes() for p in files)
    ).hexdigest()[:16]


def bench(
    parts: Sequence[str] = (),
    small: bool = False,
    out: str | os.PathLike | None = None,
    threads: int | None = None,
    devices: Sequence[str] = ("cpu", "cuda"),
) -> Path:
    """Measure ``parts`` (default: all of :data:`PARTS`), write ``bench.jsonl``, ``bench.md`` and figures into ``out``; returns bench.md.

    ``out``: default a folder of reports/bench that is named after the machine, so that no machine's numbers replace another's.

    What the same code has measured on the same machine is kept, so that an interrupted bench goes on. ValueError if a part is unknown, or,
    once everything is written, if the published step and ours have different losses.
    """
    if unknown := set(parts) - set(PARTS):
        raise ValueError(
            f"unknown part {', '.join(map(repr, sorted(unknown)))}; there are: {', '.join(PARTS)}"
        )
    threads = threads or (1 if small else machine.cores())  # tiny tensors only wait for a second thread
    where = machine.describe(threads)
    out = writable(out or Path("reports/bench") / machine.name(where))
    key = hashlib.sha256(
        json.dumps([{k: v for k, v in where.items() if k != "date"}, code(), small]).encode()
    ).hexdigest()[:16]
    before = (
        [row for row in read_rows(out / "bench.jsonl") if row["key"] == key]
        if (out / "bench.jsonl").exists()
        else []
    )
    done = {row["job"] for row in before if row.get("status") == "done"}
    rows = [row for row in before if row["job"] in done]
    rows.append(
        {"key": key, "job": "machine", "part": "machine", "quick": small, "allocator": machine.ALLOCATOR}
        | where
    )
    jobs = []
    for device in devices:
        if device == "cuda" and not torch.cuda.is_available():
            rows.append({
                "key": key,
                "job": "cuda",
                "part": "machine",
                "device": device,
                "status": "skipped",
                "why": "no CUDA device",
            })
            continue
        if device == "cpu" and len(dtypes(device)) == 1:
            rows.append({
                "key": key,
                "job": "bfloat16",
                "part": "machine",
                "device": device,
                "status": "skipped",
                "why": "bfloat16 is not faster than float32 on this processor, see the floors",
            })
        chosen = [
            Job(j.part, j.what, {"device": device} | j.arguments, j.need_gb, j.limit)
            for j in (quick if small else full)(device)
        ]
        jobs += [j for j in chosen if j.id not in done and (not parts or j.part in (*parts, "floors"))]
    groups = [[job] for job in jobs]
    if small:  # a start takes seconds, and tiny peaks mean nothing
        groups = [
            group
            for device in devices
            if (group := [job for job in jobs if job.arguments["device"] == device])
        ]
    bar = tqdm(groups, desc="bench", smoothing=0)
    try:
        for group in bar:
            bar.set_postfix_str(group[0].id if len(group) == 1 else f"{len(group)} jobs")
            rows += [{"key": key} | row for row in _measure(group, threads, bar)]
            write_rows(out / "bench.jsonl", rows)
    finally:  # stopped, it reports what it has
        write_rows(out / "bench.jsonl", rows)
        path = report.write(rows, out)
    if unequal := report.unequal(rows):
        raise ValueError(f"the published step and ours have different losses: {unequal}")
    return path


def _measure(group: Sequence[Job], threads: int, bar: tqdm) -> list[dict[str, Any]]:
    """Rows of ``group``, done by one fresh process. What does not fit into memory is said, and not tried."""
    rows: list[dict[str, Any]] = []
    busy, free = machine.others(), machine.free_gb(group[0].arguments["device"])
    fit = [job for job in group if job.need_gb <= free]
    for job in group:
        if job not in fit:
            rows.append(_row(job, "skipped", f"it needs {job.need_gb:.0f} GB, and {free:.0f} GB are free"))
    if not fit:
        return rows
    with tempfile.TemporaryDirectory() as folder:
        jobs, found, errors = Path(folder, "jobs.json"), Path(folder, "rows.jsonl"), Path(folder, "errors")
        jobs.write_text(
            json.dumps([
                {"id": job.id, "part": job.part, "what": job.what, "arguments": job.arguments} for job in fit
            ]),
            encoding="utf-8",
        )
        found.touch()
        with errors.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker", jobs, found],
                env=machine.environment(threads),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            why = _wait(process, sum(job.limit for job in fit), bar)
        rows += [row | {"others": busy} for row in read_rows(found)]
        ended = {row["job"] for row in rows if "status" in row}
        last = (
            [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
            or ["it said nothing"]
        )[-1]
        return rows + [_row(job, "failed", f"{why}: {last}"[:300]) for job in fit if job.id not in ended]


def _row(job: Job, status: str, why: str) -> dict[str, Any]:
    return {"job": job.id, "part": job.part, "device": job.arguments["device"], "status": status, "why": why}


def _wait(process: subprocess.Popen, limit: float, bar: tqdm) -> str:
    """Until ``process`` ends, or for ``limit`` seconds -> how it ended; it and what it started are gone then."""
    try:
        for _ in range(int(limit)):
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(1)
                return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            if sys.stderr.isatty():
                bar.refresh()  # the clock goes on while nothing ends
        return f"given up after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
