"""Sweeps of throw-away notebooks: what is done, done again, or left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from cfclip.experiments import sweep
from cfclip.experiments.executors import LocalExecutor, cluster_executor

PARAMETERS = 'prompt = "a"\nsource_text = ""\nscale = 1.0\nseed = 0\nmarker = ""\ndomain = "tiny"\nout = ""'
BODY = """
import json, os, pathlib, signal, time
mark = pathlib.Path(marker)
first = prompt not in mark.read_text().split("\\n")
with mark.open("a") as file:
    file.write(prompt + "\\n")
if prompt == "slow" and not mark.with_suffix(".mended").exists():
    mark.with_suffix(".pids").write_text(f"{os.getpid()} {os.getppid()}")
    time.sleep(100)
if prompt == "kill worker once" and first:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(100)
if prompt == "kill kernel" or prompt == "kill kernel once" and first:
    os._exit(1)
assert prompt != "fail" or mark.with_suffix(".mended").exists(), "told to fail"
time.sleep(0.3)
pathlib.Path(out, "metrics.jsonl").write_text(json.dumps({"prompt": prompt, "seed": 7, "score": len(prompt) * scale}) + "\\n")
"""
GATHER = """
import cfclip.sweep
cfclip.sweep.gather(runs).to_csv(reports + "/table.csv", index=False)
"""
WORKDIR_ENV = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def write_book(path: Path, *cells: str) -> None:
    book = new_notebook(
        cells=[new_code_cell(cells[0], metadata={"tags": ["parameters"]}), *map(new_code_cell, cells[1:])]
    )
    nbformat.write(book, path)


def write_spec(folder: Path, prompts: str = "[a]", **more) -> Path:
    """A sweep of the throw-away notebook; ``prompts`` as a person writes them."""
    text = yaml.safe_dump({"parameters": {"marker": str(folder / "mark")}} | more, allow_unicode=True)
    (folder / "tiny.yaml").write_text(
        f"grid:\n  - notebook: echo.ipynb\n    prompt: {prompts}\n{text}", encoding="utf-8"
    )
    return folder / "tiny.yaml"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """With the notebooks, a domain's weights, and {braces} in its name."""
    for name, value in sweep.KERNEL_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)  # so that it is undone: a sweep on threads sets this process's
    folder = tmp_path / "{work} ü"
    (folder / "data" / "tiny").mkdir(parents=True)
    (folder / "data" / "tiny" / "generator.safetensors").write_text("weights")
    monkeypatch.setattr(sweep, "DATA", folder / "data")
    write_book(folder / "echo.ipynb", PARAMETERS, BODY)
    write_book(folder / "gather.ipynb", 'runs = ""\nreports = ""', GATHER)
    (folder / "mark").touch()
    return folder


def counts(folder: Path) -> Counter:
    return Counter((folder / "mark").read_text().splitlines())


def ids(spec: Path) -> list[str]:
    return [run.id for run in sweep.plan(sweep.load_spec(spec), spec.parent / "runs")[0]]


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def test_prompts_stay_what_they_are_and_a_failure_stops_nobody(folder):
    prompts = ["no", "1e3", "~", 'say "hi" \\n {x}', "口红", "👩‍🦰", "fail"]
    spec = sweep.load_spec(
        write_spec(
            folder,
            "\n" + "".join(f"      - {prompt}\n" for prompt in prompts),
            then=[{"notebook": "gather.ipynb"}],
        )
    )
    with ThreadPoolExecutor(3) as executor:
        with pytest.raises(ValueError, match=r"(?s)1 of 8 runs failed.*`then` wait.*echo-fail.*told to fail"):
            sweep.sweep(spec, folder / "runs", folder / "reports", executor)
        assert counts(folder) == Counter(prompts), "each once, to the letter"
        (broken,) = (folder / "runs").glob("echo-fail-*")
        assert "told to fail" in (broken / "echo.ipynb").read_text() and sweep.status(broken) == "failed"
        (folder / "mark.mended").touch()
        runs = sweep.sweep(spec, folder / "runs", folder / "reports", executor)
    assert counts(folder) == Counter([*prompts, "fail"]), "only the failed run was done again"
    table = sweep.gather(folder / "runs")
    assert list(table.run) == sorted(run.id for run in runs)
    assert dict(zip(table.prompt, table.score, strict=True)) == {
        prompt: float(len(prompt)) for prompt in prompts
    }
    assert set(table.seed) == {7} and set(table.seed_parameter) == {0}, "a row knows best"
    seen = pd.read_csv(folder / "reports" / "table.csv", keep_default_na=False, dtype={"prompt": str})
    assert list(seen.prompt) == list(table.prompt), "what gathers sees this grid"
    record = json.loads((folder / "runs" / runs[0].id / "run.json").read_text())
    assert (
        record["parameters"]["prompt"] == "no"
        and record["seed"] == 0
        and record["seconds"] > 0
        and "torch" in record["versions"]
    )


def test_a_run_that_failed_for_its_device_is_recorded(tmp_path):
    run = sweep.Run("a", sweep.find_notebook("02_training"), {"device": "gpu"}, {})
    sweep.write_record(run, tmp_path, "failed", "device 'gpu' cannot be used")
    assert (
        sweep.status(tmp_path) == "failed"
        and json.loads((tmp_path / "run.json").read_text())["versions"]["device"] == "gpu"
    )


def test_only_content_makes_a_run_another_one(folder, monkeypatch):
    spec, weights = write_spec(folder), folder / "data" / "tiny" / "generator.safetensors"
    first = ids(spec)
    (folder / "data" / "tiny" / "generator.md").write_text("a card")
    os.utime(weights, (1, 1))
    (folder / "preset.yaml").write_text("not_here: 1\nseed: 0\nprompts: [b]")
    book = nbformat.read(folder / "echo.ipynb", 4)
    book.cells.insert(0, new_markdown_cell("prose"))
    book.cells[-1].execution_count = 3
    nbformat.write(book, folder / "echo.ipynb")
    spec = write_spec(folder, preset="preset.yaml", parameters={"marker": str(folder / "mark"), "scale": 1})
    assert ids(spec) == first, "a card, a date, prose, outputs, a default written out"
    seen = [first]
    seen.append(ids(write_spec(folder, parameters={"marker": str(folder / "mark"), "scale": 2})))
    spec = write_spec(folder)
    weights.write_text("changed")
    seen.append(ids(spec))
    book.cells[-1].source += "\n1 + 1"
    nbformat.write(book, folder / "echo.ipynb")
    seen.append(ids(spec))
    monkeypatch.setattr(sweep, "code_hash", lambda: "another package")
    seen.append(ids(spec))
    assert len({one for (one,) in seen}) == 5, "a parameter, a weights file, the notebook's code, the package"


def test_weights_are_read_once(folder):
    known = {}
    first = sweep.weights_hash("tiny", known)
    ((path, entry),) = known.items()
    assert path.endswith("generator.safetensors") and entry[0] == len("weights")
    entry[2] = "as remembered"
    assert sweep.weights_hash("tiny", known) != first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gird: []", r"unknown 'gird'; known are: preset, parameters, grid, then, quick"),
        ("then: []", "has no grid"),
        ("grid: [02_training]", "list of blocks like"),
        ("grid: [{notebook: nowhere}]", r"notebook nowhere does not exist; there are: 00_tour"),
        (
            "grid: [{notebook: echo.ipynb, stepz: 3}]",
            r"echo has no parameter 'stepz'; it has: prompt, source_text",
        ),
        (
            "grid: [{notebook: echo.ipynb, scale: 1e3}]",
            r"scale of echo must be a float, not '1e3' \(YAML reads",
        ),
        ("grid: [{notebook: echo.ipynb, seed: true}]", r"seed of echo must be a int, not True"),
        ("grid: [{notebook: echo.ipynb, out: here}]", r"out of echo is set by the sweep"),
        ("grid: [{notebook: echo.ipynb, seed: []}]", "seed lists nothing"),
        (
            "grid: [{notebook: echo.ipynb, prompt: [a, ]}, {notebook: echo.ipynb, prompt: ['']}]",
            "prompt has an empty value",
        ),
        (
            "grid: [{notebook: echo.ipynb, seed: [1], prompt: {a: {seed: 3}}}]",
            "prompt 'a' may change parameters that are no axis",
        ),
        (
            "grid: [{notebook: echo.ipynb}]\nparameters: {stepz: 1}",
            "no notebook of s has a parameter 'stepz'",
        ),
        ("grid: [{notebook: echo.ipynb}]\ngrid: [{notebook: echo.ipynb}]", "'grid' stands there twice"),
        (
            "grid: [{notebook: echo.ipynb}]\npreset: nowhere.yaml",
            r"preset .*nowhere\.yaml does not exist; there are: afhq-cat\.yaml",
        ),
        ("grid: [", "is not YAML"),
    ],
)
def test_what_is_wrong_with_a_spec(folder, text, message):
    (folder / "s.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        sweep.plan(sweep.load_spec(folder / "s.yaml"), folder / "runs")


def test_quick_replaces_and_axes_multiply(folder):
    spec = write_spec(
        folder,
        "{a: {scale: 2}, no: }",
        quick={"grid": [{"notebook": "echo.ipynb", "prompt": "b", "seed": [0, 1, 1]}]},
    )
    runs, _ = sweep.plan(sweep.load_spec(spec), folder / "runs")
    assert [(run.parameters["prompt"], run.parameters["scale"]) for run in runs] == [("a", 2.0), ("no", 1.0)]
    quick, _ = sweep.plan(sweep.load_spec(spec, quick=True), folder / "runs")
    assert [run.id.rsplit("-", 1)[0] for run in quick] == ["echo-b-0", "echo-b-1"], (
        "the same content is the same run"
    )
    with pytest.raises(ValueError, match="has no section quick"):
        sweep.load_spec(write_spec(folder), quick=True)


def test_the_papers_sweep():
    path = sweep.NOTEBOOKS / "presets" / "paper-toonfaces.yaml"
    spec = sweep.load_spec(path)
    cells = [cell for block in spec.grid for cell, _ in sweep._cells(block)]
    assert Counter(cell["notebook"] for cell in cells) == {
        "02_training": 5 * 13 * 3,
        "03_ablation_directions": 16 * 3,
    }
    assert {"cyan skin", "cyan beard"} <= {cell["prompt"] for cell in cells}
    runs, then = sweep.plan(sweep.load_spec(path, quick=True), "nowhere")
    assert [run.parameters["prompt"] for run in runs if run.notebook.stem == "02_training"] == list(
        spec.preset["prompts"]
    )
    assert [run.id for run in then] == ["paper-toonfaces-quick-04_evaluation"]
    assert all(
        run.parameters["steps"] == spec.preset["steps"] for run in runs if run.notebook.stem == "02_training"
    )


def test_killed_and_started_again(folder):
    spec = write_spec(folder, "[a, b, slow]")
    command = [
        sys.executable,
        "-m",
        "cfclip.cli",
        "sweep",
        spec,
        "--out",
        folder / "runs",
        "--reports",
        folder / "reports",
        "--workers",
        "1",
    ]
    process = subprocess.Popen(command, env=WORKDIR_ENV, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list((folder / "runs").glob("*/run.json"))) == 2 and (folder / "mark.pids").exists())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kernel, worker = map(int, (folder / "mark.pids").read_text().split())
    wait_for(lambda: not any(is_alive(pid) for pid in (kernel, worker)), 30)
    (folder / "mark.mended").touch()
    with ThreadPoolExecutor(1) as executor:
        sweep.sweep(load_as_the_command(spec), folder / "runs", folder / "reports", executor)
    assert counts(folder) == {"a": 1, "b": 1, "slow": 2}
    assert len(sweep.gather(folder / "runs")) == 3


def load_as_the_command(spec: Path) -> sweep.Spec:
    """The command knows no domain "tiny": here, too, its weights are nothing."""
    (spec.parent / "data" / "tiny" / "generator.safetensors").unlink(missing_ok=True)
    return sweep.load_spec(spec)


def is_alive(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
            if Path("/proc").exists()
            else os.kill(pid, 0) is None
        )
    except (OSError, ProcessLookupError):
        return False


def test_a_dead_worker_is_replaced(folder):
    spec = sweep.load_spec(write_spec(folder, "[kill worker once, kill kernel once, kill kernel]"))
    with (
        LocalExecutor(1) as executor,
        pytest.raises(ValueError, match=r"(?s)1 of 3 runs failed.*kill-kernel-\w+ +its kernel died, 3 times"),
    ):
        sweep.sweep(spec, folder / "runs", folder / "reports", executor)
    assert counts(folder) == {"kill worker once": 2, "kill kernel once": 2, "kill kernel": 3}
    assert set(sweep.gather(folder / "runs").prompt) == {"kill worker once", "kill kernel once"}


def test_a_run_that_always_kills_its_worker_ends(folder):
    class Deadly:
        submitted = 0

        def submit(self, *_):
            self.submitted += 1
            future = Future()
            future.set_exception(BrokenExecutor())
            return future

    executor = Deadly()
    with pytest.raises(ValueError, match="its worker died, 3 times"):
        sweep.sweep(sweep.load_spec(write_spec(folder)), folder / "runs", folder / "reports", executor)
    assert executor.submitted == 3


def test_two_sweeps_share_a_folder(folder):
    spec = sweep.load_spec(write_spec(folder, "[a, b, c]"))
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two, ThreadPoolExecutor(2) as both:
        list(
            both.map(
                lambda executor: sweep.sweep(spec, folder / "runs", folder / "reports", executor), (one, two)
            )
        )
    assert counts(folder) == {"a": 1, "b": 1, "c": 1}


def test_a_cluster_gives_the_same_table_though_a_worker_dies(folder):
    distributed = pytest.importorskip("distributed", reason="needs dask: pip install 'cfclip[cluster]'")
    spec = sweep.load_spec(write_spec(folder, "[kill worker once, b, c]"))
    with distributed.LocalCluster(n_workers=0, dashboard_address=None, host="127.0.0.1") as cluster:
        workers = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "dask",
                    "worker",
                    cluster.scheduler_address,
                    "--nthreads",
                    "1",
                    "--resources",
                    "run=1",
                    "--no-nanny",
                    "--no-dashboard",
                    "--local-directory",
                    folder / "dask",
                ],
                env=WORKDIR_ENV,
                stderr=subprocess.DEVNULL,
            )
            for _ in range(2)
        ]
        try:
            with cluster_executor(cluster.scheduler_address) as executor:
                sweep.sweep(spec, folder / "runs", folder / "reports", executor)
            assert sorted(worker.poll() for worker in workers if worker.poll() is not None) == [
                -signal.SIGKILL
            ], "one was killed, one is left"
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    assert counts(folder) == {"kill worker once": 2, "b": 1, "c": 1}
    with ThreadPoolExecutor(2) as executor:
        sweep.sweep(spec, folder / "again", folder / "reports", executor)
    pd.testing.assert_frame_equal(sweep.gather(folder / "runs"), sweep.gather(folder / "again"))


def test_no_scheduler_there():
    pytest.importorskip("distributed", reason="needs dask: pip install 'cfclip[cluster]'")
    with pytest.raises(ValueError, match="unknown address scheme"), cluster_executor("nonsense://1"):
        pass
