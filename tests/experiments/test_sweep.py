"""Sweeps of throw-away notebooks: what is run, run again, or left alone."""

import dataclasses
import json
import os
import shutil
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

from cfclip.experiments import gather, load_spec, plan, sweep
from cfclip.experiments.executors import LocalExecutor, cluster_executor
from cfclip.experiments.runs import KERNEL_ENVIRONMENT, Run, execute, status, weights_hash, write_record
from cfclip.experiments.spec import Spec, cells, find_notebook
from cfclip.files import NOTEBOOKS, PACKAGE, locked

PARAMETERS = 'prompt = "a"\nsource_text = ""\nscale = 1.0\nseed = 0\nmarker = ""\ndomain = "tiny"\nout = ""'
BODY = """
import json, os, pathlib, signal, time
mark = pathlib.Path(marker)
first = prompt not in mark.read_text(encoding="utf-8").split("\\n")
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
row = {"prompt": prompt, "seed": 7, "score": len(prompt) * scale}
pathlib.Path(out, "metrics.jsonl").write_text(json.dumps(row) + "\\n")
"""
GATHER = """
from cfclip.experiments import gather
gather(runs).to_csv(reports + "/table.csv", index=False)
"""


def start(module: str, *arguments: str | Path) -> subprocess.Popen:
    """``python -m module …`` with the import path of this process."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)


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
    """The notebooks and a domain's weights, in a folder with {braces} in its name."""
    for name, value in KERNEL_ENVIRONMENT.items():
        monkeypatch.setenv(
            name, value
        )  # a sweep on threads sets them in this process; the fixture undoes that
    folder = tmp_path / "{work} ü"
    (folder / "data" / "tiny").mkdir(parents=True)
    (folder / "data" / "tiny" / "generator.safetensors").write_text("weights")
    monkeypatch.setattr("cfclip.experiments.runs.DATA", folder / "data")
    write_book(folder / "echo.ipynb", PARAMETERS, BODY)
    write_book(folder / "gather.ipynb", 'runs = ""\nreports = ""', GATHER)
    (folder / "mark").touch()
    return folder


def counts(folder: Path) -> Counter:
    return Counter((folder / "mark").read_text(encoding="utf-8").splitlines())


def ids(spec: Path) -> list[str]:
    return [run.id for run in plan(load_spec(spec), spec.parent / "runs")[0]]


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def test_prompts_stay_text_and_a_failed_run_does_not_stop_the_others(folder):
    prompts = ["no", "1e3", "~", 'say "hi" \\n {x}', "口红", "👩‍🦰", "fail"]
    lines = "\n" + "".join(f"      - {prompt}\n" for prompt in prompts)
    spec = load_spec(write_spec(folder, lines, then=[{"notebook": "gather.ipynb"}]))
    with ThreadPoolExecutor(3) as executor:
        with pytest.raises(ValueError, match=r"(?s)1 of 8 runs failed.*`then` wait.*echo-fail.*told to fail"):
            sweep(spec, folder / "runs", folder / "reports", executor)
        assert counts(folder) == Counter(prompts), "each once, to the letter"
        (broken,) = (folder / "runs").glob("echo-fail-*")
        assert "told to fail" in (broken / "echo.ipynb").read_text(encoding="utf-8")
        assert status(broken) == "failed"
        (folder / "mark.mended").touch()
        done = sweep(spec, folder / "runs", folder / "reports", executor)
    assert counts(folder) == Counter([*prompts, "fail"]), "only the failed run is done again"
    table = gather(folder / "runs")
    assert list(table.run) == sorted(run.id for run in done)
    assert dict(zip(table.prompt, table.score, strict=True)) == {text: float(len(text)) for text in prompts}
    assert set(table.seed) == {7} and set(table.seed_parameter) == {0}, "the row's own value is kept"
    seen = pd.read_csv(folder / "reports" / "table.csv", keep_default_na=False, dtype={"prompt": str})
    assert list(seen.prompt) == list(table.prompt), "the notebook that gathers sees this grid"
    record = read_record(folder / "runs" / done[0].id)
    assert record["parameters"]["prompt"] == "no" and record["seed"] == 0
    assert record["seconds"] > 0 and "torch" in record["versions"]


def read_record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_a_run_that_failed_because_its_device_is_missing_is_recorded(tmp_path):
    run = Run("a", find_notebook("02_training"), {"device": "gpu"}, {})
    write_record(run, tmp_path, "failed", "device 'gpu' cannot be used")
    assert status(tmp_path) == "failed" and read_record(tmp_path)["versions"]["device"] == "gpu"


def test_a_run_is_identified_by_its_content(folder, monkeypatch):
    spec, weights = write_spec(folder), folder / "data" / "tiny" / "generator.safetensors"
    first = ids(spec)
    (folder / "data" / "tiny" / "generator.md").write_text("a card")
    os.utime(weights, (1, 1))
    (folder / "preset.yaml").write_text("inversion_steps: 1\nseed: 0\nprompts: [b]")
    book = nbformat.read(folder / "echo.ipynb", 4)
    book.cells.insert(0, new_markdown_cell("text"))
    book.cells[-1].execution_count = 3
    nbformat.write(book, folder / "echo.ipynb")
    spec = write_spec(folder, preset="preset.yaml", parameters={"marker": str(folder / "mark"), "scale": 1})
    assert ids(spec) == first, "a card, a date, text, outputs, a default that is written out"
    seen = [first]
    seen.append(ids(write_spec(folder, parameters={"marker": str(folder / "mark"), "scale": 2})))
    spec = write_spec(folder)
    weights.write_text("changed")
    seen.append(ids(spec))
    book.cells[-1].source += "\n1 + 1"
    nbformat.write(book, folder / "echo.ipynb")
    seen.append(ids(spec))
    package = folder / "package"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("cfclip.experiments.runs.PACKAGE", package)
    assert ids(spec) == seen[-1], "where the package is installed"
    for name in ("cli.py", "evaluation/tables.py", "explorer/view.py"):
        (package / name).write_text("changed")
    assert ids(spec) == seen[-1], "code that no number depends on"
    (package / "method" / "losses.py").write_text("changed")
    seen.append(ids(spec))
    assert len({one for (one,) in seen}) == 5, "a parameter, a weights file, the notebook's code, the package"


def test_a_hash_of_weights_is_remembered(folder):
    known = {}
    first = weights_hash("tiny", known)
    ((path, entry),) = known.items()
    assert path.endswith("generator.safetensors") and entry[0] == len("weights")
    entry[2] = "as remembered"
    assert weights_hash("tiny", known) != first


DAMAGED = [
    "",
    "{",
    "[]",
    "null",
    "\0\0",
    '{"status": "finished"}',
    '{"status": ["finished"], "run": 1}',
    "[" * 9999,
]


def test_a_run_whose_record_is_damaged_is_done_again(folder):
    spec = load_spec(write_spec(folder, "[a, b]"))
    with ThreadPoolExecutor(2) as executor:
        _, broken = sweep(spec, folder / "runs", folder / "reports", executor)
        whole = gather(folder / "runs")
        assert status(folder / "runs" / broken.id) == "finished"
        for text in DAMAGED:
            (folder / "runs" / broken.id / "run.json").write_text(text, encoding="utf-8")
            assert status(folder / "runs" / broken.id) == ""
            assert list(gather(folder / "runs").prompt) == ["a"], "not finished, as far as anyone can tell"
        sweep(spec, folder / "runs", folder / "reports", executor)
    assert counts(folder) == {"a": 1, "b": 2}
    pd.testing.assert_frame_equal(gather(folder / "runs"), whole)


def test_a_folder_that_was_copied_lends_nothing_to_another_run(folder, caplog):
    spec = load_spec(write_spec(folder, "[a]"))
    with ThreadPoolExecutor(1) as executor:
        (done,) = sweep(spec, folder / "runs", folder / "reports", executor)
        spec = load_spec(write_spec(folder, "[a, b]"))
        _, other = plan(spec, folder / "runs")[0]
        for copy in (other.id, "my copy"):
            shutil.copytree(folder / "runs" / done.id, folder / "runs" / copy)
        assert list(gather(folder / "runs").run) == [done.id]
        assert "my copy" in caplog.text and "is left out" in caplog.text
        sweep(spec, folder / "runs", folder / "reports", executor)
    assert counts(folder) == {"a": 1, "b": 1}
    assert list(gather(folder / "runs").prompt) == ["a", "b"]


def test_a_damaged_row_of_a_run_is_named(folder):
    spec = load_spec(write_spec(folder, "[a]"))
    with ThreadPoolExecutor(1) as executor:
        (done,) = sweep(spec, folder / "runs", folder / "reports", executor)
    rows = folder / "runs" / done.id / "metrics.jsonl"
    whole = rows.read_text(encoding="utf-8")
    rows.write_text(whole + '{"prompt": "a", "sc', encoding="utf-8")
    with pytest.warns(UserWarning, match=r"last line of .*metrics\.jsonl is cut off"):
        assert len(gather(folder / "runs")) == 1
    rows.write_text('{"prompt": "a", "sc\n' + whole, encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1 of .*metrics\.jsonl is damaged"):
        gather(folder / "runs")


def test_a_damaged_cache_of_hashes_is_ignored_and_written_again(folder):
    spec, hashes = write_spec(folder), folder / "runs" / ".hashes.json"
    hashes.parent.mkdir()
    first = ids(spec)
    good = hashes.read_text(encoding="utf-8")
    (path,) = json.loads(good)
    wrong = [None, 1, "x", [], [7], [7, 7], {"a": 1}, [7, 7, 7], [None, None, "x"]]
    for text in [*DAMAGED, *(json.dumps({path: one}) for one in wrong)]:
        hashes.write_text(text, encoding="utf-8")
        assert ids(spec) == first
        assert json.loads(hashes.read_text(encoding="utf-8")).get(path) == json.loads(good)[path]


def test_a_run_in_a_folder_that_is_in_use_is_busy(folder):
    (run,), _ = plan(load_spec(write_spec(folder)), folder / "runs")
    with locked(folder / "runs" / run.id, "run"):
        assert execute(run, str(folder / "runs"), str(folder)).status == "busy"
    assert counts(folder) == {}


ECHO = "grid: [{notebook: echo.ipynb, %s}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gird: []", r"s.yaml has no setting 'gird'; it has: preset, parameters, grid, then, quick"),
        ("then: []", "has no grid"),
        ("grid: [02_training]", "list of blocks like"),
        ("grid: [{notebook: nowhere}]", r"notebook nowhere does not exist; there are: 00_tour"),
        (ECHO % "stepz: 3", r"echo has no setting 'stepz'; it has: prompt, source_text"),
        (ECHO % "scale: 1e3", r"scale of echo must be of type float, not '1e3' \(YAML reads"),
        (ECHO % "seed: true", r"seed of echo must be of type int, not True"),
        (ECHO % "out: here", r"out of echo is set by the sweep"),
        (ECHO % "seed: []", "seed lists nothing"),
        (ECHO % "prompt: [a, ''], seed: 1", "prompt has an empty value"),
        (ECHO % "seed: [1], prompt: {a: {seed: 3}}", "prompt 'a' may change parameters that are not axes"),
        (ECHO % "seed: 1" + "\nparameters: {stepz: 1}", "no notebook of s has a parameter 'stepz'"),
        (ECHO % "seed: 1" + "\ngrid: []", "'grid' is there twice"),
        (
            ECHO % "seed: 1" + "\npreset: no.yaml",
            r"preset .*no\.yaml does not exist; there are: afhq-cat\.yaml",
        ),
        ("grid: [", "is not YAML"),
    ],
)
def test_the_error_says_what_is_wrong_with_a_spec(folder, text, message):
    (folder / "s.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        plan(load_spec(folder / "s.yaml"), folder / "runs")


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghij", "bcdefghijk", strict=True)
)
TRAINING = "grid: [{notebook: 02_training, %s}]"
ROWS = "grid: [{notebook: 03_ablation_directions, %s}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "with its aliases written out it has more than 100,000 values"),
        (LAUGHS.replace("[", "{<<: [").replace("]", "]}"), "not YAML"),
        ("grid: &a [{notebook: echo.ipynb, prompt: *a}]", "contains itself"),
        ("grid: " + "[" * 5000, "nested too deeply"),
        ("# " + "x" * 300_000, "larger than 262,144 bytes"),
        (ECHO % f"seed: {'9' * 5000}", "more than 40 digits"),
        (ECHO % "seed: !!bool x", "not YAML"),
        ("[1]: 2", "a key must be a word or a number, not a list"),
        (ECHO % "{a: b}: 1", "a key must be a word or a number, not a list"),
        ("1: 2\ngrid: []", "must have names as its keys, not 1"),
        (ECHO % "no: 2", "must have names as its keys, not False"),
        (ECHO % "seed: 1" + "\nparameters: {3: 4}", "must have names as its keys, not 3"),
        (ECHO % "seed: 1" + "\nquick: {1: 2}", "has no section|names as its keys, not 1"),
        (ECHO % "seed: 1" + "\npreset: [a]", "preset of s.yaml must be the name of a file"),
        ("grid: [{notebook: 3}]", "notebook in grid of s.yaml must be a name, not 3"),
        ("grid: [{notebook: [[echo]]}]", "notebook in grid of s.yaml must be a name"),
        (ECHO % "seed: 1" + "\nthen: [{notebook: [a]}]", "notebook in then of s.yaml must be a name"),
        (
            ECHO % ", ".join(f"{k}: &{k}0 [1, 2, 3, 4, 5, 6, 7, 8, 9]" for k in "abcdefgh"),
            "more than 10,000 runs",
        ),
        (ECHO % "scale: .nan", "scale of echo must be a finite number, not nan"),
        (ECHO % "scale: -.inf", "scale of echo must be a finite number"),
        (ECHO % "seed: -1", "seed of echo must be a whole number from 0, not -1"),
        (ECHO % "prompt: '  '", "prompt has an empty value"),
        (TRAINING % "method: nope", "unknown method 'nope'; choose one of cfclip"),
        (TRAINING % "settings: [{steps: 0}]", "steps must be a whole number from 1, not 0"),
        (TRAINING % "settings: [{steps: yes}]", "steps must be a whole number from 1, not True"),
        (TRAINING % "settings: [{lr: .nan}]", "lr must be a finite number"),
        (TRAINING % "settings: [{lr: 1e3}]", "lr must be a finite number"),
        (TRAINING % "settings: [{stepz: 3}]", "no setting 'stepz'"),
        (TRAINING % "settings: [{levels: fine}]", "levels must be"),
        (TRAINING % "settings: [{text_mapper: 'false'}]", "text_mapper must be True or False, not 'false'"),
        (TRAINING % "settings: [{prompt: a}]", "prompt is a parameter, not one of the settings"),
        (TRAINING % "settings: [{1: 2}]", "must have names as its keys, not 1"),
        (TRAINING % "settings: [{objective: [a]}]", "settings of 02_training"),
        (TRAINING % "strengths: 1.0", r"must be of type list, not 1.0 \(write it as `strengths: \[1.0\]`\)"),
        (TRAINING % "strengths: [[]]", "must be a list of finite numbers, at least one"),
        (TRAINING % "strengths: [[1.0, .inf]]", "must be a list of finite numbers"),
        (TRAINING % "strengths: [[fine]]", "must be a list of finite numbers"),
        (TRAINING % "settings: {steps: 3}", r"as one value .* in a list: `settings: \[{…}\]`"),
        (TRAINING % "domain: toonface", "domain of 02_training must be one of toonfaces, ffhq, .*'toonface'"),
        (
            "grid: [{notebook: 02_training}]\nparameters: {domain: atlantis}",
            "domain of 02_training must be one",
        ),
        (
            "grid: [{notebook: 02_training}]\nthen: [{notebook: 07_tuning, domain: x}]",
            "domain of 07_tuning must be one",
        ),
        (TRAINING % "preview: 0", "preview of 02_training must be a whole number from 1, not 0"),
        (TRAINING % "settings: [{lr: 1.0e+39}]", r"lr must be a finite number above 0 to 1e\+30, not 1e\+39"),
        (TRAINING % "label: cat", "label of 02_training must be a whole number from 0, not 'cat'"),
        (TRAINING % "label: -1", "label of 02_training must be a whole number from 0, not -1"),
        (TRAINING % "n: 0", "n of 02_training must be a whole number from 1, not 0"),
        (ROWS % "rows: [[nope]]", r"unknown rows \['nope'\]"),
        (ROWS % "seeds: [[]]", "must be a list of whole numbers from 0, at least one"),
        (ROWS % "settings: [{steps: -3}]", "steps must be a whole number from 1"),
        (ROWS % "settings: [{guides: 2, guide_weights: [1]}]", "guide_weights must be one for each"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(folder, text, message):
    (folder / "s.yaml").write_text(text, encoding="utf-8")
    begin = time.monotonic()
    with pytest.raises(ValueError, match=message):
        plan(load_spec(folder / "s.yaml", quick="quick" in text), folder / "runs")
    assert time.monotonic() - begin < 20


def test_an_unknown_key_of_a_preset_is_named_and_a_known_one_may_be_unused(folder):
    (folder / "p.yaml").write_text("scale: 3.0\ninversion_steps: 9", encoding="utf-8")
    spec = write_spec(folder, preset="p.yaml")
    (run,), _ = plan(load_spec(spec), folder / "runs")
    assert run.parameters["scale"] == 3.0
    for key in ("stepz: 3", "Scale: 1.0", "settings.steps: 3"):
        (folder / "p.yaml").write_text(key, encoding="utf-8")
        with pytest.raises(ValueError, match=f"no notebook has a parameter '{key.split(':')[0]}'"):
            plan(load_spec(spec), folder / "runs")


def test_a_preset_chooses_the_class(folder):
    (folder / "p.yaml").write_text("label: 3", encoding="utf-8")
    (folder / "s.yaml").write_text("preset: p.yaml\n" + TRAINING % "prompt: b", encoding="utf-8")
    (run,), _ = plan(load_spec(folder / "s.yaml"), folder / "runs")
    assert run.parameters["label"] == 3


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"cells": 3}', '{"cells": [{}]}', "[" * 100_000])
def test_a_file_that_is_no_notebook_is_named(content, folder):
    (folder / "echo.ipynb").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"echo\.ipynb is not a notebook"):
        plan(load_spec(write_spec(folder)), folder / "runs")


def test_quick_replaces_the_grid_and_axes_multiply(folder):
    block = {"notebook": "echo.ipynb", "prompt": "b", "seed": [0, 1, 1]}
    spec = write_spec(folder, "{a: {scale: 2}, no: }", quick={"grid": [block]})
    runs, _ = plan(load_spec(spec), folder / "runs")
    assert [(run.parameters["prompt"], run.parameters["scale"]) for run in runs] == [("a", 2.0), ("no", 1.0)]
    quick, _ = plan(load_spec(spec, quick=True), folder / "runs")
    names = [run.id.rsplit("-", 1)[0] for run in quick]
    assert names == ["echo-b-0", "echo-b-1"], "the same content is the same run"
    with pytest.raises(ValueError, match="has no section quick"):
        load_spec(write_spec(folder), quick=True)


def test_a_sweep_can_be_a_part_of_its_grid_and_on_another_device(folder):
    spec = load_spec(write_spec(folder, "[a, b, c]", then=[{"notebook": "gather.ipynb"}]))
    assert len(plan(spec, folder / "runs")[1]) == 1
    runs, then = plan(spec.narrowed(["prompt=a", "prompt=c"]), folder / "runs")
    assert [run.parameters["prompt"] for run in runs] == ["a", "c"]
    assert then == [], "tables are of the whole grid"
    with pytest.raises(ValueError, match="no run of tiny has"):
        plan(spec.narrowed(["prompt=z"]), folder / "runs")
    with pytest.raises(ValueError, match="as in method=nada, not 'prompt'"):
        spec.narrowed(["prompt"])
    assert spec.narrowed([], "cuda").parameters["device"] == "cuda"
    assert "device" not in spec.narrowed([]).parameters
    named = dataclasses.replace(spec, grid=({"notebook": "02_training", "device": "cpu"},))
    assert named.narrowed([], "cuda").grid == ({"notebook": "02_training"},)
    assert named.narrowed([]).grid == named.grid


def test_without_a_kernel_the_numbers_are_the_same_and_a_failure_is_recorded(folder):
    spec = load_spec(write_spec(folder, "[a, bb]"))
    sweep(spec, folder / "runs", folder)
    with_kernels = gather(folder / "runs")
    assert list((folder / "runs").glob("*/echo.ipynb"))
    sweep(spec, folder / "others", folder, kernel=False)
    pd.testing.assert_frame_equal(gather(folder / "others"), with_kernels)
    assert not list((folder / "others").glob("*/echo.ipynb"))
    with pytest.raises(ValueError, match="told to fail"):
        sweep(load_spec(write_spec(folder, "[fail]")), folder / "others", folder, kernel=False)


def test_the_papers_sweeps_have_all_methods_prompts_and_seeds():
    def counted(name):
        spec = load_spec(NOTEBOOKS / "presets" / name)
        grid = [cell for block in spec.grid for cell, _ in cells(block)]
        return {cell.get("prompt") for cell in grid}, Counter(cell["notebook"] for cell in grid)

    prompts, count = counted("paper-toonfaces.yaml")
    assert count == {"02_training": 12 * (4 * 6 + 3 * 3), "03_ablation_directions": 15 * 7 * 6}
    assert {"purple skin", "green glasses"} <= prompts
    prompts, count = counted("paper-toonfaces-more.yaml")
    assert count == {"02_training": 2 * 3 * 6 * 3, "03_ablation_directions": 5 * 7 * 6}
    prompts, count = counted("paper-toonfaces-natural.yaml")
    assert count == {"02_training": 6 * 7} and {"red lipstick", "smiling", "face"} <= prompts
    assert counted("paper-toonfaces-budget.yaml")[1] == {"02_training": 4}


def test_the_quick_sweep_trains_the_prompts_of_its_preset():
    spec = load_spec(NOTEBOOKS / "presets" / "paper-toonfaces.yaml", quick=True)
    runs, then = plan(spec, "nowhere")
    training = [run.parameters for run in runs if run.notebook.stem == "02_training"]
    assert [parameters["prompt"] for parameters in training] == spec.preset["prompts"]
    assert all(parameters["settings"] == spec.preset["settings"] for parameters in training)
    assert [run.id for run in then] == ["paper-toonfaces-quick-04_evaluation"]


def test_a_sweep_that_was_killed_does_only_the_rest(folder):
    spec = write_spec(folder, "[a, b, slow]")
    places = ["--out", folder / "runs", "--reports", folder / "reports"]
    process = start("cfclip.cli", "sweep", spec, *places, "--workers", "1")
    wait_for(lambda: len(list((folder / "runs").glob("*/run.json"))) == 2 and (folder / "mark.pids").exists())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kernel, worker = map(int, (folder / "mark.pids").read_text(encoding="utf-8").split())
    wait_for(lambda: not any(is_alive(pid) for pid in (kernel, worker)), 30)
    (folder / "mark.mended").touch()
    with ThreadPoolExecutor(1) as executor:
        sweep(load_as_the_command(spec), folder / "runs", folder / "reports", executor)
    assert counts(folder) == {"a": 1, "b": 1, "slow": 2}
    assert len(gather(folder / "runs")) == 3


def load_as_the_command(spec: Path) -> Spec:
    """The command does not see the weights of the domain "tiny": without them the ids are the same here."""
    (spec.parent / "data" / "tiny" / "generator.safetensors").unlink(missing_ok=True)
    return load_spec(spec)


def is_alive(pid: int) -> bool:
    """False also for a process that has ended and was not waited for yet."""
    try:
        if not Path("/proc").exists():
            return os.kill(pid, 0) is None
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_dead_worker_is_replaced(folder):
    spec = load_spec(write_spec(folder, "[kill worker once, kill kernel once, kill kernel]"))
    with (
        LocalExecutor(1) as executor,
        pytest.raises(ValueError, match=r"(?s)1 of 3 runs failed.*kill-kernel-\w+ +its kernel died, 3 times"),
    ):
        sweep(spec, folder / "runs", folder / "reports", executor)
    assert counts(folder) == {"kill worker once": 2, "kill kernel once": 2, "kill kernel": 3}
    assert set(gather(folder / "runs").prompt) == {"kill worker once", "kill kernel once"}


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
        sweep(load_spec(write_spec(folder)), folder / "runs", folder / "reports", executor)
    assert executor.submitted == 3


def test_two_sweeps_share_a_folder_and_do_each_run_once(folder):
    spec = load_spec(write_spec(folder, "[a, b, c]"))
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two, ThreadPoolExecutor(2) as both:
        out = folder / "runs", folder / "reports"
        futures = [both.submit(sweep, spec, *out, executor) for executor in (one, two)]
        assert all(len(future.result()) == 3 for future in futures)
    assert counts(folder) == {"a": 1, "b": 1, "c": 1}


@pytest.mark.long
def test_a_cluster_gives_the_same_table_although_a_worker_dies(folder):
    distributed = pytest.importorskip("distributed", reason="needs dask: pip install 'cfclip[cluster]'")
    spec = load_spec(write_spec(folder, "[kill worker once, b, c]"))
    with distributed.LocalCluster(n_workers=0, dashboard_address=None, host="127.0.0.1") as cluster:
        options = ["--nthreads=1", "--resources=run=1", "--no-nanny", "--no-dashboard"]
        options += ["--local-directory", folder / "dask"]
        workers = [start("dask", "worker", cluster.scheduler_address, *options) for _ in range(2)]
        try:
            with cluster_executor(cluster.scheduler_address) as executor:
                sweep(spec, folder / "runs", folder / "reports", executor)
            ended = [code for worker in workers if (code := worker.poll()) is not None]
            assert ended == [-signal.SIGKILL], "one was killed, the other is left"
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    assert counts(folder) == {"kill worker once": 2, "b": 1, "c": 1}
    with ThreadPoolExecutor(2) as executor:
        sweep(spec, folder / "again", folder / "reports", executor)
    pd.testing.assert_frame_equal(gather(folder / "runs"), gather(folder / "again"))


def test_a_missing_scheduler_is_an_error():
    pytest.importorskip("distributed", reason="needs dask: pip install 'cfclip[cluster]'")
    with pytest.raises(ValueError, match="unknown address scheme"), cluster_executor("nonsense://1"):
        pass
