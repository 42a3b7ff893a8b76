"""``kill -9`` of a sweep whose packs are in the middle, here and on a cluster: the table stays the same."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import yaml
from psutil import Process, wait_procs

from cfclip.experiments import gather, load_spec, packs, sweep
from cfclip.experiments.runs import KERNEL_ENVIRONMENT
from cfclip.method.loop import load_checkpoint

SETTINGS = {"steps": 80, "batch": 1, "train_latents": 2, "num_views": 1, "lr": 0.05}
"""Small steps, because a difference of rounding grows with every one."""
KILLED = {
    "notebook": "02_training",
    "method": ["cfclip", "nada", "offset", "styleclip-mapper"],
    "prompt": "red hair",
    "settings": [SETTINGS],
    "n": 2,
    "preview": 1,
    "strengths": [[1.0]],
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """A sweep of 02_training without packs: its spec, and its runs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "grid.yaml").write_text(yaml.safe_dump({"grid": [KILLED]}))
    with ThreadPoolExecutor(1) as executor:
        spec = load_spec(folder / "grid.yaml")
        sweep(spec, folder / "runs", folder / "reports", executor, pack=1, kernel=False)
    return folder


def start(module: str, *arguments: str | Path) -> subprocess.Popen:
    env = os.environ | KERNEL_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-m", module, *map(str, arguments)], env=env)


def wait_for(condition, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def kill_in_the_middle(sweeping: subprocess.Popen, out: Path, *others: subprocess.Popen) -> None:
    """``kill -9``, when all trainings of the packs are at their first checkpoint."""
    wait_for(lambda: sweeping.poll() is not None or len(list(out.glob("*/checkpoint.pt"))) == 4)
    assert sweeping.poll() is None and not list(out.glob("*/run.json"))
    started = [child for one in (sweeping, *others) for child in Process(one.pid).children(recursive=True)]
    for one in (sweeping, *others):
        one.kill()
        one.wait()
    _, left = wait_procs(started, 60)
    assert not left, "what they had started ends with them"
    steps = [load_checkpoint(folder.parent)["step"] for folder in out.glob("*/checkpoint.pt")]
    assert min(steps) == packs.CHECKPOINT_EVERY["cpu"] < SETTINGS["steps"]


def trained_before_it_began(run: Path) -> bool:
    """Whether a pack did, and not the notebook."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    begun = (run / "run.json").stat().st_mtime - record["seconds"]
    return (run / "checkpoint.pt").stat().st_mtime < begun


def same_table(out: Path, uninterrupted: Path) -> None:
    tables = [gather(one).drop(columns="settings") for one in (out, uninterrupted / "runs")]
    assert len(tables[0]) == 4 * KILLED["n"]
    pd.testing.assert_frame_equal(*tables, rtol=1e-2, atol=1e-3)


@pytest.mark.long
def test_a_sweep_that_is_killed_in_its_packs_has_the_table_of_the_uninterrupted_one(uninterrupted, tmp_path):
    places = ("--out", tmp_path / "runs", "--reports", tmp_path / "reports", "--workers", "1", "--no-kernel")
    command = ("cfclip.cli", "sweep", uninterrupted / "grid.yaml", *places)
    kill_in_the_middle(start(*command), tmp_path / "runs")
    assert start(*command).wait() == 0
    same_table(tmp_path / "runs", uninterrupted)
    assert all(trained_before_it_began(path.parent) for path in tmp_path.glob("runs/*/run.json"))
    assert not any(trained_before_it_began(path.parent) for path in uninterrupted.glob("runs/*/run.json"))


@pytest.mark.long
def test_so_has_one_on_two_workers_of_a_cluster(uninterrupted, tmp_path):
    """The sweep and one of the workers are killed, another worker comes: with two runs left, each alone."""
    distributed = pytest.importorskip("distributed", reason="needs dask: pip install 'cfclip[cluster]'")
    with distributed.LocalCluster(n_workers=0, dashboard_address=None, host="127.0.0.1") as cluster:
        places = ("--out", tmp_path / "runs", "--reports", tmp_path / "reports", "--no-kernel")
        places += ("--scheduler", cluster.scheduler_address)
        options = ("--nthreads=1", "--resources=run=1", "--no-nanny", "--no-dashboard")
        options += ("--local-directory", tmp_path / "dask")

        def begin_worker() -> subprocess.Popen:
            before = len(cluster.scheduler.workers)
            worker = start("dask", "worker", cluster.scheduler_address, *options)
            wait_for(lambda: len(cluster.scheduler.workers) > before)
            return worker

        workers = [begin_worker(), begin_worker()]
        try:
            sweeping = start("cfclip.cli", "sweep", uninterrupted / "grid.yaml", *places)
            kill_in_the_middle(sweeping, tmp_path / "runs", workers[0])
            wait_for(lambda: len(cluster.scheduler.workers) == 1)
            workers.append(begin_worker())
            assert start("cfclip.cli", "sweep", uninterrupted / "grid.yaml", *places).wait() == 0
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    same_table(tmp_path / "runs", uninterrupted)
