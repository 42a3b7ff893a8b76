"""A run: one notebook with its parameters, known by its content; done in a folder of its own."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import papermill

from cfclip.checkpoints.sources import SOURCES
from cfclip.evaluation.report import versions
from cfclip.experiments.spec import code_of, find_notebook, parameters_of
from cfclip.files import DATA, DOWNLOADS, PACKAGE, FolderInUse, locked, read_rows, write_json

KERNEL_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # one run a core: runs do not disturb each other, and numbers do not depend on the cores
    "MALLOC_MMAP_THRESHOLD_": "4000000000",  # glibc would give every big tensor back to the kernel and fault it in again
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "500000000",
}

OUTPUT_PARAMS = ("out", "runs", "reports")  # parameters that the sweep sets, and that make no run another one

NOT_HASHED = ("cli.py", "bench/", "experiments/", "explorer/", "evaluation/claims.py", "evaluation/tables.py")
"""Code that no run of a grid depends on."""


# ---- what a run is: its content ----


@dataclass(frozen=True)
class Run:
    """One notebook and everything that its numbers depend on."""

    id: str  # its folder's name
    notebook: Path
    parameters: Mapping[str, Any]  # all the notebook has, but for OUTPUT_PARAMS
    content: Mapping[str, str]  # what was hashed: notebook, code, weights
    gathers: tuple[str, ...] | None = None  # of a notebook of `then`: the runs it looks at


def digest(content: Any) -> str:
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, ensure_ascii=False, default=str).encode()
    ).hexdigest()


def notebook_hash(notebook: Path) -> str:
    """Of the code cells: neither outputs nor prose change a number."""
    return digest(code_of(notebook))


def code_hash() -> str:
    """Of the installed package, but for :data:`NOT_HASHED`."""
    names = {p.relative_to(PACKAGE).as_posix(): p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".json")}
    kept = sorted((name, path) for name, path in names.items() if not name.startswith(NOT_HASHED))
    return digest([(name, hashlib.sha256(path.read_bytes()).hexdigest()) for name, path in kept])


def weights_hash(domain: str, known: dict[str, list]) -> str:
    """Of every file that ``domain`` loads. ``known``: path -> [size, mtime, sha256] of files hashed before; grows."""
    folder = DATA / domain
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".md", ".png", ".part")]
    files += [DOWNLOADS / source.name for source in SOURCES if domain in source.domains]
    hashes = []
    for path in sorted(p for p in files if p.exists()):
        stat = path.stat()
        if known.get(str(path), [])[:2] != [stat.st_size, stat.st_mtime_ns]:
            with path.open("rb") as file:
                known[str(path)] = [
                    stat.st_size,
                    stat.st_mtime_ns,
                    hashlib.filedigest(file, "sha256").hexdigest(),
                ]
        hashes.append((path.relative_to(DATA).as_posix(), known[str(path)][2]))
    return digest(hashes)


# ---- one run, in a worker ----


def run_notebook(
    notebook: str | os.PathLike, folder: str | os.PathLike, parameters: Mapping[str, Any]
) -> Path:
    """Execute ``notebook``; the executed copy (also of a failed run) lands in ``folder``."""
    source = find_notebook(notebook)
    path = Path(folder) / source.name
    path.parent.mkdir(parents=True, exist_ok=True)
    literal = [
        str(p).replace("{", "{{").replace("}", "}}") for p in (source, path)
    ]  # papermill takes braces in a path for parameters
    before = dict(os.environ)
    os.environ.update(KERNEL_ENVIRONMENT)  # the kernel inherits it, and nobody else
    try:
        papermill.execute_notebook(
            *literal,
            dict(parameters),
            kernel_name="python3",
            language="python",
            progress_bar=False,
            start_timeout=300,
            extra_arguments=["--log-level=50"],
        )  # a kernel warns of its own transport, once a run
    finally:
        for name in KERNEL_ENVIRONMENT:
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]
    return path


def status(folder: Path) -> str:
    """What ``folder``'s run.json says: finished or failed; "" without one."""
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8"))["status"] if path.exists() else ""


def write_record(
    run: Run, folder: Path, status: str, error: str = "", seconds: float = 0.0
) -> dict[str, str]:
    """Write run.json, which makes a run finished (or failed); the last thing that happens in its folder."""
    device = run.parameters.get("device", "cpu")
    found = versions(device if status == "finished" else "cpu")  # that of a failed run may not be there
    record = {
        "run": run.id,
        "notebook": run.notebook.stem,
        "status": status,
        "error": error,
        "seconds": round(seconds, 2),
        "seed": run.parameters.get("seed"),
        "parameters": run.parameters,
        "content": run.content,
        "gathers": run.gathers,
        "versions": found | {"device": device, "threads": KERNEL_ENVIRONMENT["OMP_NUM_THREADS"]},
    }
    write_json(folder / "run.json", record)
    return {"status": status, "error": error}


def execute(run: Run, out: str, reports: str, patient: bool = False) -> dict[str, str]:
    """Do ``run`` in its folder unless it is finished there -> its status and error: finished, failed, lost (its kernel was killed) or busy.

    Busy: another sweep of the same folder is doing it; ``patient`` waits for that one, and takes over if it dies.
    """
    folder = Path(out) / run.id
    try:
        with locked(folder, "run", wait=patient):
            return _execute(run, folder, reports)
    except FolderInUse:
        return {"status": "busy", "error": "another sweep is doing it"}


def _execute(run: Run, folder: Path, reports: str) -> dict[str, str]:
    if run.gathers is None and status(folder) == "finished":
        return {"status": "finished", "error": ""}
    start = time.perf_counter()
    try:
        if (run.content["notebook"], run.content["code"]) != (notebook_hash(run.notebook), code_hash()):
            raise RuntimeError(
                "the notebook or the package changed since the sweep began: start the sweep again"
            )
        values = {**run.parameters, "out": str(folder)}
        if run.gathers is not None:
            _link(folder / "runs", run.gathers)
            values |= {"runs": str(folder / "runs"), "reports": reports}
        defaults = parameters_of(run.notebook)
        given = {
            name: values[name] for name, default in defaults.items() if values.get(name, default) != default
        }
        run_notebook(run.notebook, folder, given)
    except Exception as error:
        if str(error).startswith(
            "Kernel died"
        ):  # e.g. out of memory; papermill has no class for all of these
            return {"status": "lost", "error": "its kernel died"}
        text = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return write_record(run, folder, "failed", text[-1].strip(), time.perf_counter() - start)
    return write_record(run, folder, "finished", seconds=time.perf_counter() - start)


def _link(folder: Path, ids: Sequence[str]) -> None:
    """A folder of links to just these runs: beside them there may be those of other grids and of earlier code."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for one in ids:
        (folder / one).symlink_to(Path("../..") / one, target_is_directory=True)


def records(out: str | os.PathLike) -> list[dict[str, Any]]:
    """What run.json says of every finished run of a grid in ``out``, ordered by run: parameters, seconds, versions, …"""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(out).glob("*/run.json"))]
    return [record for record in found if record["status"] == "finished" and record["gathers"] is None]


def gather(out: str | os.PathLike) -> pd.DataFrame:
    """Every finished run in ``out``: its parameters and, a row each, the rows of its ``metrics.jsonl``; ordered by run.

    A row knows best what it is of: a parameter of the same name (a notebook's ``strength``, whose rows are of many) that is not that of
    every row gets the suffix ``_parameter``.
    """
    rows = []
    for record in records(out):
        metrics = Path(out) / record["run"] / "metrics.jsonl"
        own = read_rows(metrics) if metrics.exists() else [{}]
        given = {
            f"{name}_parameter" if any(row.get(name, value) != value for row in own) else name: value
            for name, value in record["parameters"].items()
        }
        rows += [{"run": record["run"], "notebook": record["notebook"], **given} | row for row in own]
    return pd.DataFrame(rows)
