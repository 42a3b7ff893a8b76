"""Packs: many trainings of a grid at a time, in one separate process, before the notebooks of the runs start.

A pack does not change a run: it writes into the run's folder what the notebook would have trained there, up
to rounding. If a training is missing because a pack failed or died, the notebook does the training.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cfclip.baselines import METHODS, Job, fit_many
from cfclip.baselines.many import MOST
from cfclip.domains import load_domain
from cfclip.evaluation import ablation
from cfclip.experiments.runs import KERNEL_ENVIRONMENT, Outcome, Run, code_hash
from cfclip.files import NOTEBOOKS, FolderInUse, locked

logger = logging.getLogger(__name__)

CHECKPOINT_EVERY = {"cpu": 50, "cuda": 150}
"""Device -> steps that are lost if a pack is killed. On a GPU, 50 steps take less time than a checkpoint."""
COMMAND = (sys.executable, "-c", "from cfclip.experiments.packs import main; main()")
"""The command that starts the process of a pack."""


def _training(p: dict[str, Any], folder: Path) -> list[Job]:
    """The training of a run of 02_training: the one in its cell ``baselines.fit(…)``."""
    return [Job(p["method"], p["prompt"], str(folder), {"seed": p["seed"]} | p["settings"])]


def _ablation(p: dict[str, Any], folder: Path) -> list[Job]:
    """The trainings of a run of 03_ablation_directions: those that its cell ``ablation.jobs(…)`` lists."""
    return [*ablation.jobs(p["rows"], p["prompts"], p["seeds"], p["settings"], folder).values()]


TRAINED_BY = {
    NOTEBOOKS / "02_training.ipynb": _training,
    NOTEBOOKS / "03_ablation_directions.ipynb": _ablation,
}
"""Notebook -> a function of a run's parameters and folder that returns the trainings of this run."""


def trainings(run: Run, out: Path) -> list[Job]:
    """The trainings of ``run`` that a pack can do and that are not finished in its folder."""
    found = []
    for notebook, jobs_of in TRAINED_BY.items():
        if run.gathers is None and run.notebook == notebook.resolve():
            with suppress(ValueError):  # the notebook will report the error
                found = [job for job in jobs_of(dict(run.parameters), out / run.id) if job.shared]
    files = [Path(job.out, f"{METHODS[job.method].editor.KIND}.safetensors") for job in found]
    return [job for job, file in zip(found, files, strict=True) if not file.exists()]


def kind_of_device(run: Run) -> str:
    """ "cpu" or "cuda": where ``run`` happens."""
    return _kind(run.parameters.get("device"))


def _kind(device: str | None) -> str:
    return "cpu" if device == "cpu" else "cuda"


def packs(
    runs: Sequence[Run], out: Path, workers: Mapping[str, int], most: int | None = None
) -> list[list[Run]]:
    """Packs for the ``workers``, of runs whose trainings share the frozen networks and are equally long.

    ``workers``: "cpu" or "cuda" -> how many workers it has. ``most``: the most runs in a pack; default:
    :data:`MOST` of the device. A run that would be alone in its pack is left out.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        if jobs := trainings(run, out):
            steps = jobs[0].settings.get("steps")  # otherwise short trainings would wait for long ones
            where = tuple(run.parameters.get(name) for name in ("domain", "device", "label"))
            groups.setdefault((where, jobs[0].shared, steps), []).append(run)
    found = []
    for group in groups.values():
        device = kind_of_device(group[0])
        size = min(most or MOST[device], -(-len(group) // workers.get(device, 1)))
        found += [group[i : i + size] for i in range(0, len(group), size)] if size > 1 else []
    return [some for some in found if len(some) > 1]


def train(runs: Sequence[Run], out: str, most: int | None = None) -> Outcome:
    """Do the missing trainings of ``runs``, all of one domain, in a process that ends when this one ends.

    Runs that another sweep is doing are left out. Nothing is trained if fewer than two trainings are missing,
    or if the code has changed since the runs were planned.
    """
    with ExitStack() as held:
        jobs = []
        for run in runs:
            with suppress(FolderInUse):
                held.enter_context(locked(Path(out) / run.id, "run"))
                jobs += trainings(run, Path(out))
        if len(jobs) < 2 or runs[0].content["code"] != code_hash():
            return Outcome("finished")  # the notebooks do the rest, or report why they cannot
        where = {name: runs[0].parameters.get(name) for name in ("domain", "device", "label")}
        given = {"jobs": [asdict(job) for job in jobs], "most": most} | where
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with subprocess.Popen(COMMAND, env=os.environ | KERNEL_ENVIRONMENT, **streams) as process:
            try:
                with suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(given).encode() + b"\n")
                    process.stdin.flush()  # stays open: it closes when this process ends, see main
                errors = process.stderr.read().decode(errors="replace")
                code = process.wait()
            finally:
                process.kill()
    if code:
        logger.warning("a pack of %d trainings failed, they are done one by one:\n%s", len(jobs), errors)
    return Outcome("failed", f"ended with {code}") if code else Outcome("finished")


def main() -> None:
    """Run a pack in its process. Its jobs are a line of JSON on stdin; the process ends when stdin closes."""
    given = json.loads(sys.stdin.buffer.readline())

    def follow() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    domain = load_domain(given["domain"], given["device"], given["label"])
    jobs, every = [Job(**job) for job in given["jobs"]], CHECKPOINT_EVERY[_kind(domain.device.type)]
    for job, result in zip(jobs, fit_many(domain, jobs, given["most"], False, every), strict=True):
        if isinstance(result, Exception):  # the notebook will report it
            logger.warning("%s, %s: %s", job.method, job.prompt, result)
