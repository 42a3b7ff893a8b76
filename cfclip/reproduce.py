"""Runs the ordered notebooks through papermill and rewrites ``reports/``."""

import os
import re
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import papermill
import yaml
from tqdm.auto import tqdm

from .reporting import writable

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
KERNEL_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",                    # one run a core: runs do not disturb each other, and numbers do not depend on the cores
    "MALLOC_MMAP_THRESHOLD_": "4000000000",    # glibc would give every big tensor back to the kernel and fault it in again
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "500000000",
}


def slug(text: str) -> str:
    """A prompt as a file name: "green lipstick" -> "green-lipstick"."""
    return re.sub(r"[^\w]+", "-", text.strip().lower()).strip("-") or "prompt"


def load_preset(path: str | os.PathLike) -> dict[str, Any]:
    """A flat YAML mapping of papermill parameters. ValueError if it is anything else."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"preset {path} does not exist; there are: {', '.join(sorted(p.name for p in (NOTEBOOKS / 'presets').glob('*.yaml')))}")
    preset = yaml.safe_load(path.read_text())
    if not isinstance(preset, dict):
        raise ValueError(f"preset {path} must be a mapping of parameter names to values")
    return preset


def parameters_of(notebook: str) -> set[str]:
    """Names in the notebook's ``parameters`` cell."""
    return set(papermill.inspect_notebook(str(NOTEBOOKS / f"{notebook}.ipynb")))


def run_notebook(notebook: str, out: str | os.PathLike, parameters: Mapping[str, Any]) -> Path:
    """Execute ``notebook`` with those of ``parameters`` that it has; the executed copy (also of a failed run) lands in ``out``."""
    os.environ.update(KERNEL_ENVIRONMENT)      # the kernel inherits it
    path = Path(out) / f"{notebook}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = parameters_of(notebook)
    papermill.execute_notebook(str(NOTEBOOKS / f"{notebook}.ipynb"), str(path), {k: v for k, v in parameters.items() if k in known},
                               kernel_name="python3", progress_bar=False, log_output=False)
    return path


def reproduce(reports: str | os.PathLike, preset: str | os.PathLike, workers: int | None = None) -> None:
    """Train a mapper per prompt of the preset, evaluate all of them, write tables and figures to ``reports``.

    Trainings run side by side, one a core. A failed run keeps its notebook and does not stop the others; the error
    names it at the end.
    """
    reports = writable(reports).resolve()
    values = load_preset(preset)
    if not values.get("prompts"):
        raise ValueError(f"preset {preset} names no prompts")
    runs = reports / "runs"
    failed = []
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(run_notebook, "02_training", runs / slug(prompt), values | {"prompt": prompt, "out": str(runs / slug(prompt))}): prompt
                for prompt in values["prompts"]}
        jobs[pool.submit(run_notebook, "00_tour", runs, values)] = "tour"
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="runs"):
            if job.exception():
                failed.append(f"{jobs[job]}: {str(job.exception()).strip().splitlines()[-1]}")
    if failed:
        raise ValueError(f"{len(failed)} runs failed; their notebooks are in {runs}:\n" + "\n".join(failed))
    run_notebook("04_evaluation", runs, values | {"runs": str(runs), "reports": str(reports)})
