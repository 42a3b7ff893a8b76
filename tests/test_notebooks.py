"""House rules of the notebooks; pytest also runs each of them at its smoke defaults (nbval)."""

import ast
from pathlib import Path

import nbformat
import pytest

from cfclip.experiments.runs import run_notebook
from cfclip.experiments.spec import NOTEBOOKS, load_preset, parameters_of
from cfclip.files import slug

BOOKS = sorted(NOTEBOOKS.glob("*.ipynb"))
PRESETS = sorted(
    p for p in (NOTEBOOKS / "presets").glob("*.yaml") if not p.name.startswith("paper-")
)  # those are sweeps: test_sweep.py


def cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def parameters(path: Path) -> dict[str, ast.expr]:
    (cell,) = (c for c in cells(path) if "parameters" in c.metadata.get("tags", []))
    return {node.targets[0].id: node.value for node in ast.parse(cell.source).body}


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_house_rules(path):
    for cell in cells(path):
        assert not cell.outputs and cell.execution_count is None, (
            "commit notebooks stripped: nbstripout notebooks/*.ipynb"
        )
        assert not any(
            isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))
            for node in ast.walk(ast.parse(cell.source))
        )
    for name, value in parameters(path).items():
        ast.literal_eval(value), name
    assert any("assert " in cell.source for cell in cells(path)), "a notebook checks itself"


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_key_is_a_parameter(path):
    books = {book.stem: parameters(book) for book in BOOKS}
    for key, value in load_preset(path).items():
        owners = [name for name, known in books.items() if key in known]
        assert owners, f"{key} of {path.name} is a parameter of no notebook"
        for owner in owners:
            default = ast.literal_eval(books[owner][key])
            assert type(default) is type(value), (
                f"{key}: {value!r} is not a {type(default).__name__} as in {owner}"
            )


def test_smoke_is_the_defaults():
    smoke = load_preset(NOTEBOOKS / "presets" / "smoke.yaml")
    for book in BOOKS:
        for key, value in parameters(book).items():
            if key in smoke and key != "prompts":
                assert ast.literal_eval(value) == smoke[key], f"{key} of {book.stem}"


def test_papermill_sees_the_parameters():
    assert {"prompt", "steps", "out"} <= parameters_of("02_training").keys()


def test_a_failed_notebook_keeps_what_it_did(tmp_path):
    with pytest.raises(Exception, match="unknown domain 'atlantis'"):
        run_notebook("04_evaluation", tmp_path, {"domain": "atlantis"})
    assert "unknown domain" in (tmp_path / "04_evaluation.ipynb").read_text()


@pytest.mark.parametrize(
    ("text", "name"), [("green lipstick", "green-lipstick"), ("Ünï/../x", "ünï-x"), ("🙂", "prompt")]
)
def test_prompts_as_file_names(text, name):
    assert slug(text) == name


def test_a_preset_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"smoke\.yaml, toonfaces\.yaml"):
        load_preset("nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must be a mapping"):
        load_preset(tmp_path / "list.yaml")
