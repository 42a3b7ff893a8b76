"""The jobs of a bench, which run one after the other, each in a separate process."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm

from cfclip.bench import machine, report, tables
from cfclip.bench.measure import dtypes
from cfclip.evaluation.report import commit
from cfclip.experiments import runs
from cfclip.experiments.executors import cores
from cfclip.files import append_row, read_rows, writable, write_rows
from cfclip.models.ops import name_of

logger = logging.getLogger(__name__)

PARTS = ("generator", "step", "explorer", "scaling", "fidelity", "profile")


@dataclass(frozen=True)
class Job:
    """One measurement: the function ``what`` of :mod:`.parts` or :mod:`.explorer`."""

    part: str
    what: str
    arguments: Mapping[str, Any]
    need_gb: float  # memory; the job is skipped if less is free
    limit: float  # seconds after which the job is stopped

    @property
    def id(self) -> str:
        return " ".join([self.what, *(f"{name}={value}" for name, value in self.arguments.items())])

    def row(self, status: str, why: str) -> dict[str, Any]:
        """The row of a job that was not measured."""
        row = {"job": self.id, "part": self.part, "device": self.arguments["device"]}
        return row | {"status": status, "why": why}


def make_job(
    device: str, part: str, what: str, need_gb: float = 2.0, limit: float = 900.0, **arguments: Any
) -> Job:
    """A job on ``device`` whose function has these ``arguments``."""
    return Job(part, what, {"device": device} | arguments, need_gb, limit)


def full(device: str) -> Iterator[Job]:
    """The real sizes: FFHQ's step, 1024², batch 2. Ours is measured before and after the published step."""
    reduced = [name_of(dtype) for dtype in dtypes(device)[1:]]
    job, sizes = partial(make_job, device), {"resolution": 1024, "tiny": False}
    step = partial(job, "step", "step", 8, **sizes)
    side = 2048 if device == "cpu" else 8192
    yield job("floors", "floors", side=side, copied=2**29, repeats=5)
    yield step(dtype="float32", repeats=3)
    yield job("step", "ladder", 20, 2400, **sizes, repeats=1)
    yield step(dtype="float32", repeats=2, again=True)
    yield step(dtype="float32", repeats=2, sources=True)
    yield step(dtype="float32", repeats=2, micro_batch=1)
    for dtype in reduced:
        yield step(dtype=dtype, repeats=4)
        yield step(dtype=dtype, repeats=3, sources=True)
    batches = [[64, 4], [128, 4], [256, 2], [512, 1], [1024, 1]]
    yield job("generator", "generator", 8, sizes=batches, repeats=3, tiny=False)
    memory = partial(job, "generator", "generator_memory", **sizes, batch=2)
    yield memory(12, dtype="float32", plain=True)
    for dtype in ("float32", *reduced):
        yield memory(6, dtype=dtype, plain=False)
    for dtype in ("float32", *reduced):
        yield job("profile", "profile", 8, **sizes, dtype=dtype, repeats=2, top=12)
    yield job("fidelity", "pictures", faces=64)
    if device == "cpu":
        yield job("explorer", "explorer", 3, faces=8, moves=40)
        yield job("scaling", "growing_sweep", runs=[10, 100, 1000], repeats=3)
    growing, prompts = partial(job, "scaling", "growing_steps", tiny=False), {"prompts": [1, 8, 32]}
    yield growing(8, name="resolution", values=[64, 128, 256, 512, 1024], repeats=2)
    yield growing(6, name="batch", values=[1, 2, 4, 8], repeats=3, resolution=256)
    yield job("scaling", "growing_prompts", 3, **prompts, prompts_at_once=[1, 2, 4, 8], tiny=False, repeats=5)
    packs = [1, 2, 4, 8, 16] + [32, 64] * (device == "cuda")
    for dtype in ("float32", *reduced):
        yield job("scaling", "growing_pack", 8, values=packs, dtype=dtype, repeats=5, tiny=False)
    yield job("step", "wastes", 6, 1500, resolution=256, tiny=False, rounds=2)
    yield job("generator", "compiled", 6, 240, resolution=256, batch=2, repeats=3, tiny=False)
    # a job per training: a bench that is stopped keeps the finished trainings, and resumes after them
    for seed in (0, 1, 2):
        for prompt in ("green lipstick", "purple eyebrows"):
            train = partial(job, "fidelity", "success", 3, prompt=prompt, seed=seed, steps=300, faces=32)
            yield train(operators="reference", dtype="float32")
            for dtype in ("float32", *reduced):
                yield train(operators="ours", dtype=dtype)


def quick(device: str) -> Iterator[Job]:
    """Every part at the smallest size: the numbers only show that it runs."""
    job, sizes = partial(make_job, device), {"resolution": 16, "tiny": True}
    step = partial(job, "step", "step", **sizes, repeats=3)
    yield job("floors", "floors", side=256, copied=2**20, repeats=2)
    yield step(dtype="float32")
    yield step(dtype="float32", sources=True)
    yield step(dtype="float32", micro_batch=1)
    yield step(dtype="bfloat16")
    yield job("step", "ladder", **sizes, repeats=3)
    yield job("step", "wastes", **sizes, rounds=1)
    yield job("generator", "generator", sizes=[[8, 2], [16, 2]], repeats=2, tiny=True)
    yield job("generator", "generator_memory", **sizes, batch=2, dtype="float32", plain=False)
    growing = partial(job, "scaling", "growing_steps", tiny=True, repeats=1)
    yield growing(name="resolution", values=[8, 16])
    yield growing(name="batch", values=[1, 2], resolution=16)
    yield job("scaling", "growing_prompts", prompts=[1, 2], prompts_at_once=[1, 2], tiny=True, repeats=1)
    yield job("scaling", "growing_pack", values=[1, 2], dtype="float32", repeats=1, tiny=True)
    yield job("fidelity", "pictures", faces=2)
    tiny = {"seed": 0, "steps": 1, "faces": 2, "train_latents": 4}
    for operators in ("reference", "ours"):
        names = {"prompt": "green lipstick", "operators": operators, "dtype": "float32"}
        yield job("fidelity", "success", **names, **tiny)
    yield job("profile", "profile", **sizes, dtype="float32", repeats=1, top=5)
    if device == "cpu":
        yield job("scaling", "growing_sweep", runs=[3], repeats=1)
        yield job("explorer", "explorer", faces=2, moves=3)


def code_hash() -> str:
    """Hash of the package without the files that only choose the jobs and write the report."""
    return runs.code_hash(("bench/run.py", "bench/report.py", "bench/tables.py"))[:16]


def not_measurable(devices: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows that say why a device or a dtype is left out."""
    skipped = {"part": "machine", "status": "skipped"}
    if "cpu" in devices and len(dtypes("cpu")) == 1:
        why = "bfloat16 is not faster than float32 on this processor, see the floors"
        yield skipped | {"job": "bfloat16", "device": "cpu", "why": why}
    if "cuda" in devices and not torch.cuda.is_available():
        yield skipped | {"job": "cuda", "device": "cuda", "why": "no CUDA device"}


def bench(
    parts: Sequence[str] = (),
    small: bool = False,
    out: str | os.PathLike | None = None,
    threads: int | None = None,
    devices: Sequence[str] = ("cpu", "cuda"),
) -> Path:
    """Measure, write ``bench.jsonl``, ``bench.md`` and figures into ``out``, and return the path of bench.md.

    Every row is written as soon as it is known. Rows that the same code has measured on the same machine are
    kept, so an interrupted bench is resumed. Raises ValueError if a part is unknown, and, once everything is
    written, if our losses differ from those of the published step.

    Args:
        parts: some of :data:`PARTS`; default: all.
        small: the smallest sizes, to see that everything runs.
        out: default: a folder of reports/bench with the machine's name; reports/runs/bench with ``small``.
        threads: default: the number of cores, or 1 with ``small``.
        devices: some of "cpu" and "cuda".
    """
    if unknown := set(parts) - set(PARTS):
        names = ", ".join(map(repr, sorted(unknown)))
        raise ValueError(f"unknown part {names}; the parts are: {', '.join(PARTS)}")
    threads = threads or (1 if small else cores())  # tiny tensors are slower on several threads
    where = machine.describe(threads)
    with_others = out is None and not small
    out = writable(out or Path("reports/runs/bench" if small else f"reports/bench/{machine.name(where)}"))
    file = out / "bench.jsonl"
    same_key = [{name: value for name, value in where.items() if name != "date"}, code_hash(), small]
    key = {"key": runs.digest(same_key)[:16]}
    before = [row for row in read_rows(file) if row["key"] == key["key"]] if file.exists() else []
    done = {row["job"] for row in before if row.get("status") == "done"}
    about = {"job": "machine", "part": "machine", "quick": small, "allocator": machine.ALLOCATOR}
    about |= {"commit": commit()} | where
    rows = [row for row in before if row["job"] in done]
    write_rows(file, rows + [key | row for row in (about, *not_measurable(devices))])
    bar = tqdm(_groups(parts, small, devices, done), desc="bench", smoothing=0)
    try:
        for group in bar:
            bar.set_postfix_str(group[0].id if len(group) == 1 else f"{len(group)} jobs")
            run_jobs(group, threads, file, key, bar)
    finally:  # a bench that is stopped reports the rows it has
        rows = read_rows(file)
        path = report.write(rows, out)
        if with_others:
            report.write_overview(out.parent)
    if differ := tables.unequal(rows):
        raise ValueError(f"our losses differ from those of the published step: {differ}")
    return path


def _groups(parts: Sequence[str], small: bool, devices: Sequence[str], done: set[str]) -> list[list[Job]]:
    """Jobs still to do, by process: each alone, ``small`` ones together because a start takes seconds."""
    groups = []
    for device in devices:
        if device != "cuda" or torch.cuda.is_available():
            chosen = [job for job in (quick if small else full)(device) if job.id not in done]
            jobs = [job for job in chosen if not parts or job.part in (*parts, "floors")]
            groups += [jobs] if small and jobs else [[job] for job in jobs]
    return groups


def run_jobs(jobs: Sequence[Job], threads: int, file: Path, columns: Mapping[str, Any], bar: tqdm) -> None:
    """Do ``jobs``, all on one device, in one fresh process, which appends their rows to ``file``.

    Every row has the ``columns``. Jobs that do not fit into the free memory are skipped.
    """
    others = psutil.cpu_percent(interval=0.3) / 100  # the share of the processor that they use
    free = machine.free_gb(jobs[0].arguments["device"])
    for job in jobs:
        if job.need_gb > free:
            why = f"it needs {job.need_gb:.0f} GB, and {free:.0f} GB are free"
            append_row(file, {**columns, **job.row("skipped", why)})
    if not (jobs := [job for job in jobs if job.need_gb <= free]):
        return
    given = [{"id": job.id} | asdict(job) for job in jobs], {"others": others, **columns}
    command = [sys.executable, "-m", "cfclip.bench.worker", str(file), *map(json.dumps, given)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        env = os.environ | machine.ALLOCATOR | {"OMP_NUM_THREADS": str(threads)}
        streams = {"stdin": subprocess.DEVNULL, "stdout": errors, "stderr": errors}
        process = subprocess.Popen(command, env=env, start_new_session=True, **streams)
        why = _wait(process, sum(job.limit for job in jobs), bar)
        errors.seek(0)
        lines = [line for line in errors.read().splitlines() if line.strip()]
    logger.debug("output of %s:\n%s", command, "\n".join(lines))
    ended = {row["job"] for row in read_rows(file) if "status" in row}
    for job in jobs:
        if job.id not in ended:
            why_failed = f"{why}: {lines[-1] if lines else 'no output'}"[:300]
            append_row(file, {**columns, **job.row("failed", why_failed)})


def _wait(process: subprocess.Popen, limit: float, bar: tqdm) -> str:
    """Wait until ``process`` ends, or kill it and its children after ``limit`` seconds -> how it ended."""
    try:
        for _ in range(int(limit)):
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(1)
                return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            if sys.stderr.isatty():
                bar.refresh()  # shows the time that has passed
        return f"stopped after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
