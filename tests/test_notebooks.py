"""House rules of the notebooks; pytest also runs each of them at its defaults, a smoke run (nbval)."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from cfclip.experiments.runs import run_notebook
from cfclip.experiments.spec import load_preset, parameters_of
from cfclip.files import NOTEBOOKS, slug

BOOKS = sorted(NOTEBOOKS.glob("*.ipynb"))
PRESETS = sorted((NOTEBOOKS / "presets").glob("*.yaml"))
PRESETS = [path for path in PRESETS if not path.name.startswith("paper-")]  # those are sweeps


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def parameters(path: Path) -> dict[str, ast.expr]:
    (cell,) = (c for c in code_cells(path) if "parameters" in c.metadata.get("tags", []))
    return {node.targets[0].id: node.value for node in ast.parse(cell.source).body}


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_stripped_defines_nothing_and_checks_itself(path):
    definitions = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    for cell in code_cells(path):
        stripped = not cell.outputs and cell.execution_count is None
        assert stripped, "commit notebooks stripped: nbstripout notebooks/*.ipynb"
        assert not any(isinstance(node, definitions) for node in ast.walk(ast.parse(cell.source)))
    assert any("assert " in cell.source for cell in code_cells(path))


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_parameters_are_literals(path):
    for value in parameters(path).values():
        ast.literal_eval(value)


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_key_of_a_preset_is_a_parameter_of_its_type(path):
    books = {book.stem: parameters(book) for book in BOOKS}
    for key, value in load_preset(path).items():
        defaults = {name: ast.literal_eval(known[key]) for name, known in books.items() if key in known}
        assert defaults, f"{key} of {path.name} is not a parameter of any notebook"
        for name, default in defaults.items():
            assert type(default) is type(value), f"{key}: {value!r} is not of the type it has in {name}"


def test_the_smoke_preset_is_the_notebooks_defaults():
    smoke = load_preset(NOTEBOOKS / "presets" / "smoke.yaml")
    # 04_evaluation measures all prompts; the explorer's settings are one dict per method
    exceptions = {("04_evaluation", "prompts")}
    for book in BOOKS:
        for key, value in parameters(book).items():
            if key in smoke and (book.stem, key) not in exceptions:
                assert ast.literal_eval(value) == smoke[key], f"{key} of {book.stem}"


def test_papermill_sees_the_parameters():
    assert {"prompt", "settings", "out"} <= parameters_of("02_training").keys()


@pytest.mark.parametrize("name", ["encoder", "detect"])
def test_the_word_false_of_a_command_line_is_not_true(name, tmp_path):
    """``papermill -p encoder false`` gives the text "false"; only ``False`` is read as a flag."""
    with pytest.raises(Exception, match="encoder and detect are True or False, not 'false'"):
        run_notebook("01_inversion", tmp_path, {name: "false"})


def test_a_failed_notebook_keeps_the_output_of_its_cells(tmp_path):
    cells = [
        new_code_cell("word = 'default'", metadata={"tags": ["parameters"]}),
        new_code_cell("print(word + ' was printed')"),
        new_code_cell("raise ValueError('unknown ' + word)"),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "failing.ipynb")
    with pytest.raises(Exception, match="ValueError: unknown word"):
        run_notebook(tmp_path / "failing.ipynb", tmp_path / "out", {"word": "word"})
    executed = (tmp_path / "out" / "failing.ipynb").read_text(encoding="utf-8")
    assert "word was printed" in executed and "unknown word" in executed


@pytest.mark.parametrize(
    ("text", "name"), [("green lipstick", "green-lipstick"), ("Ünï/../x", "ünï-x"), ("🙂", "prompt")]
)
def test_a_prompt_becomes_a_file_name(text, name):
    assert slug(text) == name


def test_a_preset_that_does_not_exist_or_is_not_a_mapping_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"smoke\.yaml, toonfaces\.yaml"):
        load_preset("nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- 1", encoding="utf-8")
    with pytest.raises(ValueError, match="must be a mapping"):
        load_preset(tmp_path / "list.yaml")
