"""A grid of papermill runs on any ``concurrent.futures`` executor: this machine's cores, or a dask cluster.

A run's folder is named by its content: the notebook's code, its parameters, this package and the weights.
So a sweep that is started again, after a crash or an edit, does only what is missing or has changed.
"""

import itertools
import logging
import math
import os
import sys
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm.auto import tqdm

from cfclip.experiments.executors import LocalExecutor
from cfclip.experiments.packs import kind_of_device, packs, train
from cfclip.experiments.parameters import CHECKS, check_settings
from cfclip.experiments.runs import (
    OUTPUT_PARAMS,
    Outcome,
    Run,
    code_hash,
    digest,
    execute,
    is_finished,
    notebook_hash,
    weights_hash,
    write_record,
)
from cfclip.experiments.spec import Spec, cells, find_notebook, named, parameters_of, points
from cfclip.files import NOTEBOOKS, read_object, writable, write_json
from cfclip.settings import check_known, finite

logger = logging.getLogger(__name__)

MAX_RUNS = 10_000
"""A larger grid is a mistake, and planning it alone would take hours."""
MAX_ATTEMPTS = 3
"""A run whose worker or kernel dies this often has failed."""


# ---- planning ----


def _parameters(notebook: Path, spec: Spec, given: Mapping[str, Any]) -> dict[str, Any]:
    """The checked parameters, without OUTPUT_PARAMS: defaults < preset < spec's parameters < ``given``."""
    defaults = parameters_of(notebook)
    check_known(given, defaults, notebook.stem)
    merged = {**defaults, **spec.preset, **spec.parameters, **given}
    values = {}
    for name, default in defaults.items():
        value, what = merged[name], f"{name} of {notebook.stem}"
        if name in OUTPUT_PARAMS:
            if value != default:
                raise ValueError(f"{what} is set by the sweep: use --out and --reports instead")
            continue
        if isinstance(default, float) and type(value) is int:
            value = float(value)  # 40 and 40.0 are one run
        if default is not None and type(value) is not type(default):
            hint = " (YAML reads 1e3 as text: write 1.0e+3)" if isinstance(default, float) else ""
            hint = f" (write it as `{name}: [{value}]`)" if isinstance(default, list) else hint
            raise ValueError(f"{what} must be of type {type(default).__name__}, not {value!r}{hint}")
        if isinstance(value, dict):
            named(value, what)
        check = CHECKS.get(name, finite if isinstance(value, float) else None)
        # if the check refuses the default too, a user's notebook gives this name another meaning
        if check and not check(default) and (wanted := check(value)):
            raise ValueError(f"{what} must be {wanted}, not {value!r}")
        values[name] = value
    check_settings(values, f"settings of {notebook.stem}")
    return values


def plan(spec: Spec, out: str | os.PathLike = "reports/runs") -> tuple[list[Run], list[Run]]:
    """The runs of the grid, and the runs of notebooks that gather them (none if ``spec.only`` is set).

    Raises ValueError that names what in the spec does not fit a notebook.
    """
    hashes = Path(out) / ".hashes.json"  # hashes of weights, so that gigabytes are not read twice
    known = read_object(hashes)
    before, code, used = dict(known), code_hash(), set()
    weights = cache(lambda domain: weights_hash(domain, known))

    def run(cell: Mapping[str, Any], name: str, gathers: tuple[str, ...] | None = None) -> Run:
        notebook = find_notebook(cell["notebook"], spec.folder)
        given = {key: value for key, value in cell.items() if key != "notebook"}
        parameters = _parameters(notebook, spec, given)
        used.update(parameters)
        loaded = weights(parameters["domain"]) if "domain" in parameters else ""
        content = {"notebook": notebook_hash(notebook), "code": code, "weights": loaded}
        if gathers is None:
            name = f"{name}-{digest([parameters, content])[:12]}"
        return Run(name, notebook, parameters, content, gathers)

    if sum(map(points, spec.grid)) > MAX_RUNS:
        raise ValueError(f"the grid of {spec.name} has more than {MAX_RUNS:,} runs")
    each = (one for block in spec.grid for one in itertools.starmap(run, cells(block)))
    grid = {one.id: one for one in each if spec.keeps(one.parameters)}  # the same content is the same run
    if not grid:
        raise ValueError(f"no run of {spec.name} has {' and '.join(map(str, spec.only.items()))}")
    then = [run(block, f"{spec.name}-{Path(block['notebook']).stem}", tuple(grid)) for block in spec.then]
    if unused := [name for name in spec.parameters if name not in used]:
        raise ValueError(f"no notebook of {spec.name} has a parameter {', '.join(map(repr, unused))}")
    # a preset serves many notebooks, and each takes the parameters that it has
    taken = used.union(OUTPUT_PARAMS, *map(parameters_of, NOTEBOOKS.glob("*.ipynb")))
    if unused := [name for name in spec.preset if name not in taken]:
        names = ", ".join(map(repr, unused))
        raise ValueError(f"no notebook has a parameter {names} of {spec.name}'s preset")
    if known != before and hashes.parent.is_dir():
        write_json(hashes, known)
    return list(grid.values()), [] if spec.only else then


# ---- driving ----


def sweep(
    spec: Spec,
    out: str | os.PathLike = "reports/runs",
    reports: str | os.PathLike = "reports",
    executor: Executor | None = None,
    pack: int | None = None,
    kernel: bool = True,
) -> list[Run]:
    """Execute the missing runs of the grid, each in ``out``/<its id>, then the notebooks that gather them.

    The notebooks of ``then`` run every time and write to ``reports``. They need the whole grid: if a run
    fails, the other runs are still done, and then a ValueError shows a table of the failures.
    ``executor``: default: this machine's cores; a given executor is not closed.
    ``pack``: the most runs in a pack, and trainings at a time in it, see :mod:`.packs`; default: as many as
    gain something; 1: each notebook does its trainings. Without ``kernel``: see :func:`.runs.run_cells`.
    """
    out, reports = writable(out).resolve(), writable(reports).resolve()
    if executor is None:
        with LocalExecutor() as executor:
            return sweep(spec, out, reports, executor, pack, kernel)
    runs, then = plan(spec, out)
    missing = [run for run in runs if not is_finished(run, out / run.id)]
    with tqdm(total=len(runs), initial=len(runs) - len(missing), desc="runs", smoothing=0) as bar:
        together = packs(missing, out, getattr(executor, "workers", {}), pack) if pack != 1 else []
        failed = _drive(missing, out, reports, executor, bar, together, pack, kernel)
    waiting = ", and the notebooks of `then` wait for them" if then and failed else ""
    for run in then if not failed else ():
        failed |= _drive([run], out, reports, executor, tqdm(disable=True))
    if failed:
        rows = [(run, error, out / run) for run, error in sorted(failed.items())]
        raise ValueError(
            f"{len(failed)} of {len(runs) + len(then)} runs failed; "
            f"the same command does only these again{waiting}:\n"
            + tabulate(rows, ("run", "error", "its notebook is in"))
        )
    return runs


def _drive(
    runs: Sequence[Run],
    out: Path,
    reports: Path,
    executor: Executor,
    bar: tqdm,
    together: Sequence[Sequence[Run]] = (),
    pack: int | None = None,
    kernel: bool = True,
) -> dict[str, str]:
    """Execute ``runs``; those in ``together`` wait for their packs. Returns id -> error of failed runs."""
    here = isinstance(executor, LocalExecutor)
    room = executor.workers if here else {}  # a cluster has its own queue
    packed = {run.id for some in together for run in some}
    waiting, queue = list(together), deque((run, False) for run in runs if run.id not in packed)
    pending: dict[Future, Run] = {}
    training: dict[Future, Sequence[Run]] = {}
    failed: dict[str, str] = {}
    lost: Counter[str] = Counter()

    def show() -> None:
        """Show packs in the bar too: the first packs are trained long before a run is finished."""
        done = f"{len(together) - len(waiting) - len(training)}/{len(together)}"
        bar.set_postfix(({"packs": done} if together else {}) | {"failed": len(failed)})

    def hand_over() -> None:
        """Submit what the workers can begin now: packs first, because many runs wait for each of them."""
        busy = Counter(kind_of_device(some[0]) for some in training.values())
        for some in waiting.copy():
            if busy[device := kind_of_device(some[0])] < room.get(device, math.inf):
                waiting.remove(some)
                busy[device] += 1
                training[executor.submit(train, some, str(out), pack)] = some
        while queue and len(pending) + len(training) < room.get("cpu", math.inf):
            run, patient = queue.popleft()
            pending[executor.submit(execute, run, str(out), str(reports), patient, kernel)] = run

    try:
        show()
        while waiting or queue or pending or training:
            hand_over()
            done, _ = wait([*pending, *training], timeout=1.0, return_when=FIRST_COMPLETED)
            if sys.stderr.isatty():
                bar.refresh()  # keeps the clock running
            for future in training.keys() & done:
                if (outcome := _outcome(future)).status != "finished":
                    logger.info("a pack failed (%s): its runs are trained one by one", outcome.error)
                queue.extend((run, False) for run in training.pop(future))
                show()
            done = pending.keys() & done
            for future in done:
                run = pending.pop(future)
                outcome = _outcome(future)
                if outcome.status == "busy":
                    queue.append((run, True))  # at the end of the queue, behind the runs that are free
                    continue
                if outcome.status == "lost":
                    lost[run.id] += 1
                    if lost[run.id] < MAX_ATTEMPTS:
                        queue.append((run, False))
                        continue
                    outcome = Outcome("failed", f"{outcome.error}, {MAX_ATTEMPTS} times")
                    with suppress(OSError):
                        write_record(run, out / run.id, *outcome)
                if outcome.status == "failed":
                    failed[run.id] = outcome.error
                bar.update()
                show()
    finally:
        for future in (*pending, *training):
            future.cancel()
    return failed


def _outcome(future: Future) -> Outcome:
    """What :func:`execute` or :func:`train` returned, or what kept it from returning."""
    try:
        return future.result()
    except BrokenExecutor:
        return Outcome("lost", "its worker died")
    except CancelledError:
        return Outcome("failed", "cancelled: the scheduler went away")
    except Exception as error:  # e.g. dask's KilledWorker, or a full disk
        logger.debug("a run did not return", exc_info=True)
        text = str(error).strip().partition("\n")[0]
        return Outcome("failed", f"{type(error).__name__}: {text}")
