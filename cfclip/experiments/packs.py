"""The trainings of a grid, many at a time in a process of their own, before the runs' notebooks open them.

A pack changes no run: it leaves in a run's folder what its notebook would have trained there. A notebook
whose training is missing, because a pack failed or died, trains it itself.
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
"""Steps on a device: what is lost when a pack is killed. On a GPU fifty take less time than to write them."""
COMMAND = (sys.executable, "-c", "from cfclip.experiments.packs import main; main()")
"""The process of a pack."""


def _training(p: dict[str, Any], folder: Path) -> list[Job]:
    """Of 02_training: what its cell ``baselines.fit(…)`` trains."""
    return [Job(p["method"], p["prompt"], str(folder), {"seed": p["seed"]} | p["settings"])]


def _ablation(p: dict[str, Any], folder: Path) -> list[Job]:
    """Of 03_ablation_directions: what its cell ``ablation.jobs(…)`` names."""
    return [*ablation.jobs(p["rows"], p["prompts"], p["seeds"], p["settings"], folder).values()]


TRAINED_BY = {
    NOTEBOOKS / "02_training.ipynb": _training,
    NOTEBOOKS / "03_ablation_directions.ipynb": _ablation,
}
"""Notebook -> (parameters, folder) -> its trainings."""


def trainings(run: Run, out: Path) -> list[Job]:
    """The trainings of ``run`` that a pack can do and that are not finished in its folder."""
    found = []
    for notebook, jobs_of in TRAINED_BY.items():
        if run.gathers is None and run.notebook == notebook.resolve():
            with suppress(ValueError):  # the notebook names what is wrong
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
    """Runs whose trainings share the frozen networks and are equally long, in packs for the ``workers``.

    ``workers``: how many work at a time on "cpu" and on "cuda". ``most``: runs in a pack; default: as many as
    gain something on the device. A run that would be alone is in none.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        if jobs := trainings(run, out):
            steps = jobs[0].settings.get("steps")  # the notebook of a short one would wait for a long one
            where = tuple(run.parameters.get(name) for name in ("domain", "device", "label"))
            groups.setdefault((where, jobs[0].shared, steps), []).append(run)
    found = []
    for group in groups.values():
        device = kind_of_device(group[0])
        size = min(most or MOST[device], -(-len(group) // workers.get(device, 1)))
        found += [group[i : i + size] for i in range(0, len(group), size)] if size > 1 else []
    return [some for some in found if len(some) > 1]


def train(runs: Sequence[Run], out: str, most: int | None = None) -> Outcome:
    """Train what is missing of ``runs``, all of one domain, in a process that ends with this one.

    A run that another sweep is doing is left out, and none is begun by other code than that of its plan.
    """
    with ExitStack() as held:
        jobs = []
        for run in runs:
            with suppress(FolderInUse):
                held.enter_context(locked(Path(out) / run.id, "run"))
                jobs += trainings(run, Path(out))
        if len(jobs) < 2 or runs[0].content["code"] != code_hash():
            return Outcome("finished")  # the notebooks do the rest, or say why they do not
        where = {name: runs[0].parameters.get(name) for name in ("domain", "device", "label")}
        given = {"jobs": [asdict(job) for job in jobs], "most": most} | where
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with subprocess.Popen(COMMAND, env=os.environ | KERNEL_ENVIRONMENT, **streams) as process:
            try:
                with suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(given).encode() + b"\n")
                    process.stdin.flush()  # and stays open: its end is the end of this process
                errors = process.stderr.read().decode(errors="replace")
                code = process.wait()
            finally:
                process.kill()
    if code:
        logger.warning("a pack of %d trainings failed, they are done one by one:\n%s", len(jobs), errors)
    return Outcome("failed", f"ended with {code}") if code else Outcome("finished")


def main() -> None:
    """In the process of a pack: the jobs come as a line of JSON; after it the input stays open."""
    given = json.loads(sys.stdin.buffer.readline())

    def follow() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    domain = load_domain(given["domain"], given["device"], given["label"])
    jobs, every = [Job(**job) for job in given["jobs"]], CHECKPOINT_EVERY[_kind(domain.device.type)]
    for job, result in zip(jobs, fit_many(domain, jobs, given["most"], False, every), strict=True):
        if isinstance(result, Exception):  # its notebook will say so
            logger.warning("%s, %s: %s", job.method, job.prompt, result)
