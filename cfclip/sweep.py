"""A grid of papermill runs on any ``concurrent.futures`` executor: this machine's cores, or a dask cluster.

A run's folder is named by its content: the notebook's code, its parameters, this package, the weights it loads. So a sweep that is
started again, after a crash or an edit, does what is missing or has changed and nothing else.
"""

import ast
import fcntl
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import papermill
import yaml
from tabulate import tabulate
from tqdm.auto import tqdm

from .executors import LocalExecutor
from .metrics import ALEXNET
from .reporting import read_rows, versions, writable
from .sources import DATA, SOURCES
from .training import atomic_save

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
KERNEL_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",                    # one run a core: runs do not disturb each other, and numbers do not depend on the cores
    "MALLOC_MMAP_THRESHOLD_": "4000000000",    # glibc would give every big tensor back to the kernel and fault it in again
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "500000000",
}
TEXT = ("prompt", "prompts")                   # keys under which YAML's `no` and `1e3` are words
PLACES = ("out", "runs", "reports")            # parameters that the sweep sets, and that make no run another one
OUTSIDE = ("sweep.py", "executors.py", "cli.py", "tables.py", "claims.py",
           "bench/", "recipes.py", "explorer.py", "explorer_frames.py", "explorer_workers.py", "explorer_view.py")  # code that no run of a grid depends on
KEYS = ("preset", "parameters", "grid", "then")
ATTEMPTS = 3                                   # workers that one run may take with it


# ---- what to run: the YAML ----

class _Loader(yaml.SafeLoader):
    """YAML in which prompts stay text and a key cannot silently replace an earlier one."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands there twice", key.start_mark)
            seen.add(key.value)
            if key.value in TEXT:
                inside = {"sequence": lambda v=value: v.value, "mapping": lambda v=value: [k for k, _ in v.value]}.get(value.id, lambda v=value: [v])()
                for one in inside:
                    if one.id == "scalar":
                        one.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path, what: str) -> dict[str, Any]:
    if not path.exists():
        there = ", ".join(sorted(p.name for p in (NOTEBOOKS / "presets").glob("*.yaml")))
        raise ValueError(f"{what} {path} does not exist; there are: {there}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{what} {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{what} {path} must be a mapping of names to values")
    return values


def load_preset(path: str | os.PathLike) -> dict[str, Any]:
    """A flat YAML mapping of papermill parameters. ValueError if it is anything else."""
    return _read_yaml(Path(path), "preset")


@dataclass(frozen=True)
class Spec:
    """What a sweep file says."""

    name: str                            # the file's, with "-quick" for its quick version
    folder: Path                         # where its relative paths start
    grid: tuple[Mapping[str, Any], ...]  # blocks; each is the product of its axes, "notebook" being one
    then: tuple[Mapping[str, Any], ...] = ()                     # notebooks that gather, one after the other
    preset: Mapping[str, Any] = field(default_factory=dict)      # every notebook takes what it has of these
    parameters: Mapping[str, Any] = field(default_factory=dict)  # … and of these, which win


def load_spec(path: str | os.PathLike, quick: bool = False) -> Spec:
    """Read a sweep file; ``quick``: the keys of its ``quick`` section replace the file's. ValueError names what is wrong."""
    path = Path(path)
    values = _read_yaml(path, "sweep")
    _known(values, (*KEYS, "quick"), f"{path.name}")
    if quick:
        if not isinstance(values.get("quick"), dict):
            raise ValueError(f"{path.name} has no section quick: run it without --quick, or write one with any of {', '.join(KEYS)}")
        _known(values["quick"], KEYS, f"quick of {path.name}")
        values |= values["quick"]
    for name in ("grid", "then"):
        blocks = values.get(name) or []
        if not isinstance(blocks, list) or not all(isinstance(block, dict) and block.get("notebook") for block in blocks):
            raise ValueError(f"{name} of {path.name} must be a list of blocks like `- notebook: 02_training`")
    if not values.get("grid"):
        raise ValueError(f"{path.name} has no grid: nothing to run")
    if not isinstance(values.get("parameters") or {}, dict):
        raise ValueError(f"parameters of {path.name} must be a mapping of names to values")
    preset = load_preset(path.parent / values["preset"]) if values.get("preset") else {}
    return Spec(path.stem + ("-quick" if quick else ""), path.parent.resolve(), tuple(values["grid"]), tuple(values.get("then") or ()),
                preset, values.get("parameters") or {})


def _known(given: Mapping, known: Sequence[str], where: str) -> None:
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"{where}: unknown {', '.join(map(repr, unknown))}; known are: {', '.join(known)}")


def _cells(block: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every combination of a block's axes -> (notebook and parameters, a file name that tells it from its neighbours)."""
    axes = {name: list(axis.items()) if isinstance(axis, dict) else [(value, None) for value in (axis if isinstance(axis, list) else [axis])]
            for name, axis in block.items()}
    for name, axis in axes.items():
        if not axis or (name in TEXT and any(value == "" for value, _ in axis)):
            raise ValueError(f"grid: {name} has an empty value" if axis else f"grid: {name} lists nothing")
        for value, overrides in axis:
            if not isinstance(overrides or {}, dict) or (overrides or {}).keys() & axes.keys():
                raise ValueError(f"grid: {name} {value!r} may change parameters that are no axis, as `{value}: {{steps: 9}}`, not {overrides!r}")
    for choice in itertools.product(*axes.values()):
        cell = dict(zip(axes, (value for value, _ in choice), strict=True))
        for _, overrides in choice:
            cell |= overrides or {}
        told = [name for name in axes if name in ("notebook", "prompt") or len(axes[name]) > 1]
        parts = [slug(Path(cell[name]).stem if name == "notebook" else str(cell[name])) for name in told]
        yield cell, _cut("-".join(_cut(part, 40) for part in parts), 160)


def _cut(text: str, limit: int) -> str:
    """As much of ``text`` as ``limit`` bytes hold: a file system counts those."""
    return text.encode()[:limit].decode(errors="ignore")


# ---- what a run is: its content ----

@dataclass(frozen=True)
class Run:
    """One notebook and everything that its numbers depend on."""

    id: str                              # its folder's name
    notebook: Path
    parameters: Mapping[str, Any]        # all the notebook has, but for PLACES
    content: Mapping[str, str]           # what was hashed: notebook, code, weights
    gathers: tuple[str, ...] | None = None  # of a notebook of `then`: the runs it looks at


def slug(text: str) -> str:
    """A prompt as a file name: "green lipstick" -> "green-lipstick"."""
    return re.sub(r"[^\w]+", "-", text.strip().lower()).strip("-") or "prompt"


def find_notebook(name: str | os.PathLike, folder: Path = Path()) -> Path:
    """``02_training`` -> the notebook of that name in ``notebooks/``; ``….ipynb`` is a path that starts in ``folder``."""
    path = folder / name if str(name).endswith(".ipynb") else NOTEBOOKS / f"{name}.ipynb"
    if not path.exists():
        raise ValueError(f"notebook {name} does not exist; there are: {', '.join(sorted(p.stem for p in NOTEBOOKS.glob('*.ipynb')))}")
    return path.resolve()


def _code(notebook: Path) -> list[tuple[str, list[str]]]:
    """(source, tags) of each code cell."""
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    return [("".join(cell["source"]), cell.get("metadata", {}).get("tags", [])) for cell in cells]


def parameters_of(notebook: str | os.PathLike) -> dict[str, Any]:
    """The notebook's ``parameters`` cell: name -> default."""
    sources = [source for source, tags in _code(find_notebook(notebook)) if "parameters" in tags]
    return {node.targets[0].id: ast.literal_eval(node.value) for source in sources for node in ast.parse(source).body if isinstance(node, ast.Assign)}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def notebook_hash(notebook: Path) -> str:
    """Of the code cells: neither outputs nor prose change a number."""
    return _digest(_code(notebook))


def code_hash() -> str:
    """Of the installed package, but for :data:`OUTSIDE`."""
    here = Path(__file__).parent
    files = sorted(p for p in here.rglob("*") if p.suffix in (".py", ".json") and not p.relative_to(here).as_posix().startswith(OUTSIDE))
    return _digest([(p.relative_to(here).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files])


def weights_hash(domain: str, known: dict[str, list]) -> str:
    """Of every file that ``domain`` loads. ``known``: path -> [size, mtime, sha256] of files hashed before; grows."""
    folder = DATA / domain
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".md", ".png", ".part")]
    files += [DATA / "downloads" / source.name for source in SOURCES if domain in source.domains] + [DATA / "downloads" / ALEXNET]
    hashes = []
    for path in sorted(p for p in files if p.exists()):
        stat = path.stat()
        if known.get(str(path), [])[:2] != [stat.st_size, stat.st_mtime_ns]:
            with path.open("rb") as file:
                known[str(path)] = [stat.st_size, stat.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()]
        hashes.append((path.relative_to(DATA).as_posix(), known[str(path)][2]))
    return _digest(hashes)


def _parameters(notebook: Path, spec: Spec, own: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults < preset < the spec's parameters < ``own``, checked against the notebook."""
    defaults = parameters_of(notebook)
    if unknown := [name for name in own if name not in defaults]:
        raise ValueError(f"{notebook.stem} has no parameter {', '.join(map(repr, unknown))}; it has: {', '.join(defaults)}")
    values = defaults | {name: value for name, value in {**spec.preset, **spec.parameters, **own}.items() if name in defaults}
    for name, default in defaults.items():
        if name in PLACES and values[name] != default:
            raise ValueError(f"{name} of {notebook.stem} is set by the sweep: leave it out (--out and --reports choose where)")
        if isinstance(default, float) and type(values[name]) is int:
            values[name] = float(values[name])               # 40 and 40.0 are one run
        if default is not None and type(values[name]) is not type(default):
            raise ValueError(f"{name} of {notebook.stem} must be a {type(default).__name__}, not {values[name]!r}"
                             + (" (YAML reads 1e3 as text: write 1.0e+3)" if isinstance(default, float) else ""))
    return {name: value for name, value in values.items() if name not in PLACES}


def plan(spec: Spec, out: str | os.PathLike = "reports/runs") -> tuple[list[Run], list[Run]]:
    """The runs of the grid, and the notebooks that gather them. ValueError names what in the spec does not fit a notebook."""
    hashes = Path(out) / ".hashes.json"                      # of weights: gigabytes are not read twice
    known = json.loads(hashes.read_text()) if hashes.exists() else {}
    before, code, weights, used = dict(known), code_hash(), cache(lambda domain: weights_hash(domain, known)), set()

    def run(cell: Mapping[str, Any], name: str, gathers: tuple[str, ...] | None = None) -> Run:
        notebook = find_notebook(cell["notebook"], spec.folder)
        parameters = _parameters(notebook, spec, {key: value for key, value in cell.items() if key != "notebook"})
        used.update(parameters)
        content = {"notebook": notebook_hash(notebook), "code": code, "weights": weights(parameters["domain"]) if "domain" in parameters else ""}
        return Run(name if gathers is not None else f"{name}-{_digest([parameters, content])[:12]}", notebook, parameters, content, gathers)

    grid = {one.id: one for block in spec.grid for one in itertools.starmap(run, _cells(block))}  # the same content is the same run
    then = [run(block, f"{spec.name}-{Path(block['notebook']).stem}", tuple(grid)) for block in spec.then]
    if unused := [name for name in spec.parameters if name not in used]:
        raise ValueError(f"no notebook of {spec.name} has a parameter {', '.join(map(repr, unused))}")
    if known != before and hashes.parent.is_dir():
        atomic_save(known, hashes, lambda known, part: part.write_text(json.dumps(known)))
    return list(grid.values()), then


# ---- one run, in a worker ----

def run_notebook(notebook: str | os.PathLike, folder: str | os.PathLike, parameters: Mapping[str, Any]) -> Path:
    """Execute ``notebook``; the executed copy (also of a failed run) lands in ``folder``."""
    source = find_notebook(notebook)
    path = Path(folder) / source.name
    path.parent.mkdir(parents=True, exist_ok=True)
    literal = [str(p).replace("{", "{{").replace("}", "}}") for p in (source, path)]  # papermill takes braces in a path for parameters
    before = dict(os.environ)
    os.environ.update(KERNEL_ENVIRONMENT)      # the kernel inherits it, and nobody else
    try:
        papermill.execute_notebook(*literal, dict(parameters), kernel_name="python3", language="python", progress_bar=False, start_timeout=300,
                                   extra_arguments=["--log-level=50"])  # a kernel warns of its own transport, once a run
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


def write_record(run: Run, folder: Path, status: str, error: str = "", seconds: float = 0.0) -> dict[str, str]:
    """Write run.json, which makes a run finished (or failed); the last thing that happens in its folder."""
    device = run.parameters.get("device", "cpu")
    found = versions(device if status == "finished" else "cpu")    # that of a failed run may not be there
    record = {"run": run.id, "notebook": run.notebook.stem, "status": status, "error": error, "seconds": round(seconds, 2),
              "seed": run.parameters.get("seed"), "parameters": run.parameters, "content": run.content, "gathers": run.gathers,
              "versions": found | {"device": device, "threads": KERNEL_ENVIRONMENT["OMP_NUM_THREADS"]}}
    atomic_save(record, folder / "run.json", lambda record, part: part.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8"))
    return {"status": status, "error": error}


@contextmanager
def _claim(folder: Path, patient: bool) -> Iterator[bool]:
    """Hold ``folder``'s lock; yields False if someone else does. The system drops a dead holder's lock, so none is ever stale."""
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if patient else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {platform.node()}\n")  # for people: who is at it
        lock.flush()
        yield True


def execute(run: Run, out: str, reports: str, patient: bool = False) -> dict[str, str]:
    """Do ``run`` in its folder unless it is finished there -> its status and error: finished, failed, lost (its kernel was killed) or busy.

    Busy: another sweep of the same folder is doing it; ``patient`` waits for that one, and takes over if it dies.
    """
    folder = Path(out) / run.id
    folder.mkdir(parents=True, exist_ok=True)
    with _claim(folder, patient) as mine:
        if not mine:
            return {"status": "busy", "error": "another sweep is doing it"}
        if run.gathers is None and status(folder) == "finished":
            return {"status": "finished", "error": ""}
        start = time.perf_counter()
        try:
            if (run.content["notebook"], run.content["code"]) != (notebook_hash(run.notebook), code_hash()):
                raise RuntimeError("the notebook or the package is not what it was when the sweep began: start it again")
            if run.gathers is not None:
                _view(folder / "runs", run.gathers)
            places = {"out": str(folder)} | ({} if run.gathers is None else {"runs": str(folder / "runs"), "reports": reports})
            values = {**run.parameters, **places}
            run_notebook(run.notebook, folder, {name: values[name] for name, default in parameters_of(run.notebook).items()
                                                if values.get(name, default) != default})
        except Exception as error:
            if str(error).startswith("Kernel died"):         # as out of memory ends it; papermill has no class for all of these
                return {"status": "lost", "error": "its kernel died"}
            text = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            return write_record(run, folder, "failed", text[-1].strip(), time.perf_counter() - start)
        return write_record(run, folder, "finished", seconds=time.perf_counter() - start)


def _view(folder: Path, ids: Sequence[str]) -> None:
    """A folder of links to just these runs: beside them may lie those of other grids and of earlier code."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for one in ids:
        (folder / one).symlink_to(Path("../..") / one, target_is_directory=True)


# ---- the sweep ----

def sweep(spec: Spec, out: str | os.PathLike = "reports/runs", reports: str | os.PathLike = "reports", executor: Executor | None = None) -> list[Run]:
    """Do what is missing of the grid, then the notebooks that gather it; every run's folder is ``out``/its id.

    Notebooks of ``then`` run every time: what they write lies in ``reports``. They need the whole grid: if a run failed, the others
    still end, and ValueError then shows the table of failures. ``executor``: default this machine's cores; the caller's stays open.
    """
    out, reports = writable(out).resolve(), writable(reports).resolve()
    if executor is None:
        with LocalExecutor() as executor:
            return sweep(spec, out, reports, executor)
    runs, then = plan(spec, out)
    todo = [run for run in runs if status(out / run.id) != "finished"]
    failed = _drive(todo, out, reports, executor, tqdm(total=len(runs), initial=len(runs) - len(todo), desc="runs", smoothing=0))
    for run in then if not failed else ():
        failed |= _drive([run], out, reports, executor, tqdm(total=1, desc=run.notebook.stem, disable=True))
    if failed:
        rows = [(run, error, out / run) for run, error in sorted(failed.items())]
        waiting = ", and the notebooks of `then` wait for them" if then and failed.keys() & {run.id for run in runs} else ""
        raise ValueError(f"{len(failed)} of {len(runs) + len(then)} runs failed; the same command does only these again{waiting}:\n"
                         + tabulate(rows, ("run", "error", "its notebook is in")))
    return runs


def _drive(runs: Sequence[Run], out: Path, reports: Path, executor: Executor, bar: tqdm) -> dict[str, str]:
    """Run all of ``runs`` -> id -> error of those that failed."""
    def start(run: Run, patient: bool = False) -> None:
        pending[executor.submit(execute, run, str(out), str(reports), patient)] = run

    pending: dict[Future, Run] = {}
    failed: dict[str, str] = {}
    lost: Counter[str] = Counter()
    try:
        for run in runs:
            start(run)
        while pending:
            done, _ = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
            if sys.stderr.isatty():
                bar.refresh()                                # the clock goes on while nothing ends
            for future in done:
                run = pending.pop(future)
                result = _outcome(future)
                if result["status"] == "busy":
                    start(run, patient=True)                 # at the end of the queue: first what nobody does
                    continue
                if result["status"] == "lost":
                    lost[run.id] += 1
                    if lost[run.id] < ATTEMPTS:
                        start(run)
                        continue
                    result = {"status": "failed", "error": f"{result['error']}, {ATTEMPTS} times"}
                    with suppress(OSError):
                        write_record(run, out / run.id, **result)
                if result["status"] == "failed":
                    failed[run.id] = result["error"]
                bar.update()
                bar.set_postfix(failed=len(failed), refresh=False)
    finally:
        for future in pending:
            future.cancel()
        bar.close()
    return failed


def _outcome(future: Future) -> dict[str, str]:
    """What :func:`execute` returned, or what kept it from returning."""
    try:
        return future.result()
    except BrokenExecutor:
        return {"status": "lost", "error": "its worker died"}
    except CancelledError:
        return {"status": "failed", "error": "cancelled: the scheduler went away"}
    except Exception as error:                               # dask's KilledWorker; a full disk
        return {"status": "failed", "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"}


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
        given = {f"{name}_parameter" if any(row.get(name, value) != value for row in own) else name: value
                 for name, value in record["parameters"].items()}
        rows += [{"run": record["run"], "notebook": record["notebook"], **given} | row for row in own]
    return pd.DataFrame(rows)
