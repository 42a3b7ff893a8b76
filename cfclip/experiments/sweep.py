"""A grid of papermill runs on any ``concurrent.futures`` executor: this machine's cores, or a dask cluster.

A run's folder is named by its content: the notebook's code, its parameters, this package, the weights it loads. So a sweep that is
started again, after a crash or an edit, does what is missing or has changed and nothing else.
"""

import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm.auto import tqdm

from cfclip.experiments.executors import LocalExecutor
from cfclip.experiments.runs import (
    OUTPUT_PARAMS,
    Run,
    code_hash,
    digest,
    execute,
    notebook_hash,
    status,
    weights_hash,
    write_record,
)
from cfclip.experiments.spec import Spec, cells, find_notebook, parameters_of
from cfclip.files import writable, write_json

ATTEMPTS = 3  # workers that one run may take with it


def _parameters(notebook: Path, spec: Spec, own: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults < preset < the spec's parameters < ``own``, checked against the notebook."""
    defaults = parameters_of(notebook)
    if unknown := [name for name in own if name not in defaults]:
        raise ValueError(
            f"{notebook.stem} has no parameter {', '.join(map(repr, unknown))}; it has: {', '.join(defaults)}"
        )
    values = defaults | {
        name: value for name, value in {**spec.preset, **spec.parameters, **own}.items() if name in defaults
    }
    for name, default in defaults.items():
        if name in OUTPUT_PARAMS and values[name] != default:
            raise ValueError(
                f"{name} of {notebook.stem} is set by the sweep: leave it out (--out and --reports choose where)"
            )
        if isinstance(default, float) and type(values[name]) is int:
            values[name] = float(values[name])  # 40 and 40.0 are one run
        if default is not None and type(values[name]) is not type(default):
            raise ValueError(
                f"{name} of {notebook.stem} must be a {type(default).__name__}, not {values[name]!r}"
                + (" (YAML reads 1e3 as text: write 1.0e+3)" if isinstance(default, float) else "")
            )
    return {name: value for name, value in values.items() if name not in OUTPUT_PARAMS}


def plan(spec: Spec, out: str | os.PathLike = "reports/runs") -> tuple[list[Run], list[Run]]:
    """The runs of the grid, and the notebooks that gather them. ValueError names what in the spec does not fit a notebook."""
    hashes = Path(out) / ".hashes.json"  # of weights: gigabytes are not read twice
    known = json.loads(hashes.read_text()) if hashes.exists() else {}
    before, code, weights, used = (
        dict(known),
        code_hash(),
        cache(lambda domain: weights_hash(domain, known)),
        set(),
    )

    def run(cell: Mapping[str, Any], name: str, gathers: tuple[str, ...] | None = None) -> Run:
        notebook = find_notebook(cell["notebook"], spec.folder)
        parameters = _parameters(
            notebook, spec, {key: value for key, value in cell.items() if key != "notebook"}
        )
        used.update(parameters)
        content = {
            "notebook": notebook_hash(notebook),
            "code": code,
            "weights": weights(parameters["domain"]) if "domain" in parameters else "",
        }
        return Run(
            name if gathers is not None else f"{name}-{digest([parameters, content])[:12]}",
            notebook,
            parameters,
            content,
            gathers,
        )

    grid = {
        one.id: one for block in spec.grid for one in itertools.starmap(run, cells(block))
    }  # the same content is the same run
    then = [run(block, f"{spec.name}-{Path(block['notebook']).stem}", tuple(grid)) for block in spec.then]
    if unused := [name for name in spec.parameters if name not in used]:
        raise ValueError(f"no notebook of {spec.name} has a parameter {', '.join(map(repr, unused))}")
    if known != before and hashes.parent.is_dir():
        write_json(hashes, known)
    return list(grid.values()), then


# ---- the sweep ----


def sweep(
    spec: Spec,
    out: str | os.PathLike = "reports/runs",
    reports: str | os.PathLike = "reports",
    executor: Executor | None = None,
) -> list[Run]:
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
    failed = _drive(
        todo,
        out,
        reports,
        executor,
        tqdm(total=len(runs), initial=len(runs) - len(todo), desc="runs", smoothing=0),
    )
    for run in then if not failed else ():
        failed |= _drive([run], out, reports, executor, tqdm(total=1, desc=run.notebook.stem, disable=True))
    if failed:
        rows = [(run, error, out / run) for run, error in sorted(failed.items())]
        waiting = (
            ", and the notebooks of `then` wait for them"
            if then and failed.keys() & {run.id for run in runs}
            else ""
        )
        raise ValueError(
            f"{len(failed)} of {len(runs) + len(then)} runs failed; the same command does only these again{waiting}:\n"
            + tabulate(rows, ("run", "error", "its notebook is in"))
        )
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
                bar.refresh()  # the clock goes on while nothing ends
            for future in done:
                run = pending.pop(future)
                result = _outcome(future)
                if result["status"] == "busy":
                    start(run, patient=True)  # at the end of the queue: first what nobody does
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
    except Exception as error:  # dask's KilledWorker; a full disk
        return {
            "status": "failed",
            "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
        }
