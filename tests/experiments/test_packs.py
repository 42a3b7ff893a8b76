"""Trainings of a sweep, many at a time: the same table, whatever dies on the way."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from cfclip.experiments import gather, load_spec, packs, plan, sweep
from cfclip.experiments.runs import KERNEL_ENVIRONMENT, Outcome
from cfclip.experiments.spec import code_of, find_notebook
from cfclip.files import locked

PARAMETERS = """
domain = "toonfaces"
device = "cpu"
label = None
method = "cfclip"
prompt = "a"
settings = {}
seed = 0
out = ""
"""
BODY = """
import os
import cfclip
from cfclip.baselines import fit
from cfclip.files import write_rows
from cfclip.method.loop import load_checkpoint
begun = load_checkpoint(out)
d = cfclip.load_domain(domain, device, label)
chosen = {"seed": seed} | settings
editor = fit(method, d, prompt, out=out or None, progress=False, **chosen)
rows = [{key: value for key, value in row.items() if key != "seconds"} for row in editor.rows]
write_rows(f"{out}/metrics.jsonl", [row | {"begun": begun["step"] if begun else 0} for row in rows])
"""
WHERE = {"domain": "toonfaces", "device": "cpu", "label": None}
SMALL = {"steps": 3, "batch": 1, "train_latents": 2, "num_views": 1}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A notebook that only trains, and a grid of it."""
    for name, value in KERNEL_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(BODY)]
    nbformat.write(new_notebook(cells=cells), tmp_path / "train.ipynb")
    monkeypatch.setattr(packs, "TRAINED_BY", {tmp_path / "train.ipynb": packs._training})
    return tmp_path


def grid(folder: Path, *methods: str, **settings):
    block = {"notebook": "train.ipynb", "method": list(methods), "prompt": "red hair"}
    block |= {"settings": [SMALL | settings]}
    (folder / "grid.yaml").write_text(yaml.safe_dump({"grid": [block]}))
    return load_spec(folder / "grid.yaml")


def table(out: Path) -> pd.DataFrame:
    return gather(out).drop(columns=["begun", "settings"])


def test_the_notebooks_train_what_the_sweep_takes_for_their_training():
    """A change of these cells has to be one of :data:`packs.TRAINED_BY` too."""
    training = "\n".join(source for source, _ in code_of(find_notebook("02_training")))
    assert 'chosen = {"seed": seed} | settings\n' in training
    assert "baselines.fit(method, d, prompt, out=out or None, **chosen)" in training
    rows = "\n".join(source for source, _ in code_of(find_notebook("03_ablation_directions")))
    assert "ablation.jobs(rows, prompts, seeds, settings, out)" in rows


def planned(out: Path, text: str) -> list:
    (out / "s.yaml").write_text(text)
    return plan(load_spec(out / "s.yaml"), out)[0]


def test_runs_that_share_networks_and_length_are_packed_for_the_workers(tmp_path):
    text = """
grid:
  - {notebook: 02_training, method: [cfclip, nada, offset, styleclip-mapper], prompt: [a, b], seed: [0, 1]}
  - {notebook: 02_training, method: [styleclip-global, nada-generator], prompt: [a, b], settings: [{}]}
  - {notebook: 02_training, prompt: [a, b], settings: [{steps: 9}]}
  - {notebook: 02_training, prompt: [c], settings: [{steps: 9, guides: 2}]}
  - notebook: 03_ablation_directions
    prompts: [[a], [b]]
    seeds: [[3]]
    rows: [["two guides"], ["query: image"]]
    settings: [{steps: 100}]
  - {notebook: 00_tour}
"""
    runs = planned(tmp_path, text)
    found = packs.packs(runs, tmp_path, workers={"cpu": 1})
    assert sorted(map(len, found)) == [2, 2, 2, 8, 8], "of three lengths, two with two guides, no pack of one"
    assert sorted(map(len, packs.packs(runs, tmp_path, workers={"cpu": 4}))) == [4, 4, 4, 4], (
        "a pack for each worker"
    )
    in_packs = [run.id for some in found for run in some]
    assert len(set(in_packs)) == len(in_packs)
    assert not any("global" in name or "generator" in name or "tour" in name for name in in_packs)
    assert packs.packs(runs, tmp_path, workers={"cpu": 100}) == [], "every run has a worker of its own"
    assert max(map(len, packs.packs(runs, tmp_path, workers={"cpu": 1}, most=3))) == 3
    (tmp_path / runs[0].id).mkdir()
    (tmp_path / runs[0].id / "mapper.safetensors").touch()
    again = [run.id for some in packs.packs(runs, tmp_path, workers={"cpu": 1}) for run in some]
    assert runs[0].id in in_packs and runs[0].id not in again, "a finished training"


def test_a_row_of_the_ablation_is_trained_where_its_notebook_looks(tmp_path):
    (run,) = planned(
        tmp_path,
        "grid: [{notebook: 03_ablation_directions, "
        'rows: [["query: image"]], prompts: [[a]], seeds: [[3, 4]]}]',
    )
    three, four = packs.trainings(run, tmp_path)
    assert three.out == f"{tmp_path}/{run.id}/query-image-a-3" and four.settings["seed"] == 4
    assert three.settings == run.parameters["settings"] | {"query": "image", "seed": 3}


@pytest.mark.long
def test_a_sweep_with_packs_gives_the_table_of_one_without(folder, capsys):
    spec = grid(folder, "cfclip", "nada", "offset")
    with ThreadPoolExecutor(1) as executor:
        sweep(spec, folder / "runs", folder / "reports", executor)
        shown = capsys.readouterr().err
        assert "packs=0/1" in shown and "packs=1/1" in shown
        sweep(spec, folder / "alone", folder / "reports", executor, pack=1)
    assert set(gather(folder / "runs").begun) == {3}, "the notebooks find finished trainings"
    assert set(gather(folder / "alone").begun) == {0}
    pd.testing.assert_frame_equal(table(folder / "runs"), table(folder / "alone"), rtol=1e-4, atol=1e-5)


def test_a_pack_ends_with_the_process_that_started_it(tmp_path):
    jobs = [asdict(packs.Job("cfclip", "red hair", str(tmp_path / str(k)), {"seed": k})) for k in range(2)]
    given = {"jobs": jobs, "most": None} | WHERE
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(packs.COMMAND, env=env, stdin=subprocess.PIPE) as process:
        process.stdin.write(json.dumps(given).encode() + b"\n")
        process.stdin.close()
        assert process.wait(60) == 1


def test_a_pack_that_fails_leaves_the_runs_to_their_notebooks(folder, monkeypatch):
    runs, _ = plan(grid(folder, "cfclip", "nada"), folder / "runs")
    outside = [replace(run, parameters={**run.parameters, "device": "nowhere"}) for run in runs]
    assert packs.train(outside, str(folder / "runs")).status == "failed"
    with locked(folder / "runs" / runs[0].id, "run"):
        assert packs.train(runs, str(folder / "runs")).status == "finished", "another sweep does the first"
    assert not list((folder / "runs").glob("*/checkpoint.pt"))
    started = []
    driving = sys.modules["cfclip.experiments.sweep"]
    monkeypatch.setattr(driving, "train", lambda *_: 1 / 0)
    monkeypatch.setattr(driving, "execute", lambda run, *_: started.append(run.id) or Outcome("finished"))
    with ThreadPoolExecutor(1) as executor:
        sweep(load_spec(folder / "grid.yaml"), folder / "runs", folder / "reports", executor)
    assert sorted(started) == sorted(run.id for run in runs)
