"""A run: one notebook with its parameters, identified by its content and executed in a separate folder."""

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from cfclip.baselines import Editor
from cfclip.checkpoints.sources import SOURCES
from cfclip.evaluation import measure
from cfclip.evaluation.versions import versions
from cfclip.experiments.spec import code_of, find_notebook, parameters_of
from cfclip.files import (
    DATA,
    DOWNLOADS,
    PACKAGE,
    FolderInUse,
    locked,
    read_object,
    read_rows,
    sha256,
    write_json,
)

logger = logging.getLogger(__name__)

KERNEL_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # one run per core; and numbers do not depend on the number of cores
    "OMP_WAIT_POLICY": "PASSIVE",  # a thread that waits leaves its core to the other runs
    # otherwise glibc returns every large tensor to the system, and the next one faults its pages in again
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "500000000",
}
OUTPUT_PARAMS = ("out", "runs", "reports")
"""Parameters that the sweep sets; they are not part of a run's content."""
_PRESENTATION = ("claims", "explain", "figures", "frames", "report", "stats", "tables", "versions")
NOT_HASHED = ("cli.py", "bench/", "experiments/", "explorer/")
NOT_HASHED += tuple(f"evaluation/{name}.py" for name in _PRESENTATION)
"""Files and folders of the package that no run's numbers depend on: changing them makes no run outdated."""


# ---- what a run is: its content ----


@dataclass(frozen=True)
class Run:
    """One notebook and everything that its numbers depend on."""

    id: str  # the name of its folder
    notebook: Path
    parameters: Mapping[str, Any]  # all of the notebook except OUTPUT_PARAMS
    content: Mapping[str, str]  # hashes of the notebook, the code and the weights
    gathers: tuple[str, ...] | None = None  # ids of the runs that a notebook of `then` gathers


def digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def notebook_hash(notebook: Path) -> str:
    """Hash of the code cells and their tags. Outputs and text are left out: they change no number."""
    return digest(code_of(notebook))


def code_hash(ignored: tuple[str, ...] = NOT_HASHED) -> str:
    """Hash of the package's .py and .json files, without those whose path begins with one of ``ignored``."""
    files = (path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".json"))
    names = sorted(path.relative_to(PACKAGE).as_posix() for path in files)
    return digest([(name, sha256(PACKAGE / name)) for name in names if not name.startswith(ignored)])


def weights_hash(domain: str, known: dict[str, list]) -> str:
    """Hash of the weights of ``domain``. ``known``, path -> [size, mtime, sha256], is read and updated."""
    folder = DATA / domain
    beside = (".md", ".png", ".part", ".json")  # cards, unfinished files, checksums: not weights
    found = [p for p in folder.rglob("*") if p.is_file() and p.suffix not in beside]
    files = {path.relative_to(DATA): path for path in found}
    files |= {Path("downloads", one.name): DOWNLOADS / one.name for one in SOURCES if domain in one.domains}
    hashes = []
    for name, path in sorted((name, path) for name, path in files.items() if path.exists()):
        stat = path.stat()
        size_and_time = [stat.st_size, stat.st_mtime_ns]
        match known.get(str(path)):
            case [*before, str()] if before == size_and_time:
                pass
            case _:  # new, changed, or not what this function wrote
                known[str(path)] = [*size_and_time, sha256(path)]
        hashes.append((name.as_posix(), known[str(path)][2]))
    return digest(hashes)


# ---- one run, in a worker ----


class Outcome(NamedTuple):
    """How a run ended."""

    status: str  # finished, failed, lost (its kernel or worker died) or busy (another sweep is doing it)
    error: str = ""


def run_notebook(
    notebook: str | os.PathLike, folder: str | os.PathLike, parameters: Mapping[str, Any]
) -> Path:
    """Execute ``notebook``; the executed copy, also of a failed run, is in ``folder``."""
    import papermill  # takes two seconds, which kernels and packs do not need to spend

    source = find_notebook(notebook)
    path = Path(folder) / source.name
    path.parent.mkdir(parents=True, exist_ok=True)
    # papermill formats paths: braces in them have to be doubled
    literal = [str(p).replace("{", "{{").replace("}", "}}") for p in (source, path)]
    kernel = {"kernel_name": "python3", "language": "python", "start_timeout": 300}
    quiet = {"progress_bar": False, "extra_arguments": ["--log-level=50"]}  # kernels warn about transport
    before = dict(os.environ)
    os.environ.update(KERNEL_ENVIRONMENT)  # for the kernel, which inherits it
    try:
        papermill.execute_notebook(*literal, dict(parameters), **kernel, **quiet)
    finally:
        for name in KERNEL_ENVIRONMENT:
            os.environ.pop(name, None)  # another thread may have removed it already
            if name in before:
                os.environ[name] = before[name]
    return path


def run_cells(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Run the code cells of ``notebook`` in this process, without a kernel and without an executed copy.

    Starting a kernel and importing torch in it takes longer than measuring a small run on a GPU.
    ``display`` shows nothing.
    """
    names: dict[str, Any] = {"__name__": "__main__", "display": lambda *shown: None}
    for number, (source, tags) in enumerate(code_of(notebook)):
        exec(compile(source, f"{notebook.name}, code cell {number}", "exec"), names)
        if "parameters" in tags:
            names |= parameters
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def status(folder: Path) -> str:
    """What run.json in ``folder`` says: finished or failed; "" without one, or if it is damaged."""
    return _record(folder).get("status", "")


def is_finished(run: Run, folder: Path) -> bool:
    """Whether ``folder`` says that this run, and no other one, is finished."""
    record = _record(folder)
    return record.get("status") == "finished" and record["run"] == run.id


def _record(folder: Path) -> dict[str, Any]:
    """run.json in ``folder``; empty without one, or if it is not what :func:`write_record` wrote."""
    record = read_object(folder / "run.json")
    kinds = {"run": str, "notebook": str, "status": str, "parameters": dict, "gathers": list | None}
    kinds |= {"seconds": int | float, "versions": dict}
    return record if all(isinstance(record.get(name, ...), kind) for name, kind in kinds.items()) else {}


def write_record(run: Run, folder: Path, status: str, error: str = "", seconds: float = 0.0) -> Outcome:
    """Write run.json, the last step of a run: it makes the run finished or failed."""
    device = run.parameters.get("device", "cpu")
    made_with = versions(device if status == "finished" else "cpu")  # a failed run's device may not exist
    made_with |= {"device": device, "threads": KERNEL_ENVIRONMENT["OMP_NUM_THREADS"]}
    record = {"run": run.id, "notebook": run.notebook.stem}
    record |= {"status": status, "error": error, "seconds": round(seconds, 2)}
    record |= {"seed": run.parameters.get("seed"), "parameters": run.parameters}
    record |= {"content": run.content, "gathers": run.gathers, "versions": made_with}
    write_json(folder / "run.json", record)
    return Outcome(status, error)


def execute(run: Run, out: str, reports: str, patient: bool = False, kernel: bool = True) -> Outcome:
    """Execute ``run`` in its folder. A run of the grid is not executed again if it is finished there.

    Without ``kernel`` a run of the grid is executed by :func:`run_cells`. If another sweep of the same folder
    is executing the run, the outcome is "busy". With ``patient``, this function waits for that sweep instead,
    and executes the run if that sweep dies.
    """
    folder = Path(out) / run.id
    try:
        with locked(folder, "run", wait=patient):
            return _execute(run, folder, reports, kernel)
    except FolderInUse:
        return Outcome("busy", "another sweep is doing it")


def _execute(run: Run, folder: Path, reports: str, kernel: bool) -> Outcome:
    if run.gathers is None and is_finished(run, folder):
        return Outcome("finished")
    start = time.perf_counter()
    try:
        if (run.content["notebook"], run.content["code"]) != (notebook_hash(run.notebook), code_hash()):
            raise RuntimeError("the notebook or the package changed: start the sweep again")
        values = {**run.parameters, "out": str(folder)}
        if run.gathers is not None:
            _link(folder / "runs", run.gathers)
            values |= {"runs": str(folder / "runs"), "reports": reports}
        defaults = parameters_of(run.notebook).items()
        changed = {name: values[name] for name, value in defaults if values.get(name, value) != value}
        if kernel or run.gathers is not None:
            run_notebook(run.notebook, folder, changed)
        else:
            run_cells(run.notebook, changed)
    except Exception as error:
        if str(error).startswith("Kernel died"):  # e.g. out of memory; papermill has no class for all cases
            return Outcome("lost", "its kernel died")
        logger.debug("run %s failed", run.id, exc_info=True)
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return write_record(run, folder, "failed", lines[-1].strip(), time.perf_counter() - start)
    return write_record(run, folder, "finished", seconds=time.perf_counter() - start)


def _link(folder: Path, ids: Sequence[str]) -> None:
    """Make a folder of links to these runs only: ``out`` may hold other grids and runs of older code."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for one in ids:
        (folder / one).symlink_to(Path("../..") / one, target_is_directory=True)


# ---- finished runs ----


def records(out: str | os.PathLike) -> list[dict[str, Any]]:
    """run.json (parameters, seconds, versions, …) of each finished run of a grid in ``out``, in order.

    The folder of a run has the run's id as its name: a copied folder is left out, with a warning.
    """
    found = []
    for path in sorted(Path(out).glob("*/run.json")):
        record = _record(path.parent)
        if record.get("status") != "finished" or record["gathers"] is not None:
            continue
        if record["run"] == path.parent.name:
            found.append(record)
        else:
            logger.warning("%s is a record of run %s, and is left out", path, record["run"])
    return found


def measured(editor: Editor, n: int, seed: int, strengths: list[float], **where: Any) -> list[dict]:
    """The rows of :func:`.measure` on the first ``n`` held-out faces of ``seed``.

    If the editor is in the folder of a finished run of 02_training that measured exactly this, with the
    current code and weights, the rows are read from there. where: more parameters that the run must have,
    such as its device.
    """
    wanted = where | {"n": n, "seed": seed, "strengths": strengths}
    record = _record(editor.path.parent) if editor.path else {}
    same = record and wanted == {name: record["parameters"].get(name) for name in wanted}
    kind, content = (record.get("status"), record.get("notebook")), record.get("content", {})
    today = {"code": code_hash(), "weights": weights_hash(editor.domain.name, {})} if same else {}
    if same and kind == ("finished", "02_training") and today.items() <= content.items():
        rows = read_rows(editor.path.parent / "metrics.jsonl")
        return [{name: value for name, value in row.items() if value == value} for row in rows]  # no NaN
    return measure(editor, editor.domain.latents(n, "test", seed), strengths)


def gather(out: str | os.PathLike) -> pd.DataFrame:
    """The rows of ``metrics.jsonl`` of all finished runs in ``out``, with their parameters, in order.

    If the rows of a run have other values under a parameter's name, the parameter's column is called
    ``<name>_parameter``: the ``strength`` of a notebook, for example, concerns only its table.
    """
    rows = []
    for record in records(out):
        path = Path(out) / record["run"] / "metrics.jsonl"
        measured = read_rows(path) if path.exists() else [{}]
        first = {"run": record["run"], "notebook": record["notebook"]}
        for name, value in record["parameters"].items():
            differs = any(row.get(name, value) != value for row in measured)
            first[f"{name}_parameter" if differs else name] = value
        rows += [first | row for row in measured]
    return pd.DataFrame(rows)
