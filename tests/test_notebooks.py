"""House rules of the notebooks; pytest also runs each of them at its defaults, a smoke run (nbval)."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from cfclip.experiments import check_parameters
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


WRONG = {
    bool: ["false", "true", 0, None],
    int: ["8", 8.0, True, -1, None, 10**20],
    float: ["1.0", float("nan"), float("inf"), False, None, 1e31],
    str: [42, 1e3, None, ["a"], True],
    list: ["fine", 1.0, None, {}, [None], [["a"]], "[0.5, 1.0]"],
    dict: ["fine", None, [], {1: 2}, "{steps: 3}"],
    type(None): ["3", "cat", -1, 1.0, True, [0]],  # the default of label, a whole number
}


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_a_parameter_of_a_wrong_type_is_named_at_the_first_cell(path):
    """As papermill gives it: each parameter of each notebook, with values of all other types."""
    cells = [cell.source for cell in code_cells(path)][:2]
    for name, default in parameters_of(path).items():
        for value in WRONG[type(default)]:
            space = {"__name__": "notebook"}
            exec(cells[0], space)
            space[name] = value
            with pytest.raises(ValueError, match=rf"^{name} must be .*, not ") as caught:
                exec(cells[1], space)
            assert repr(value) in str(caught.value) and "d" not in space


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_the_first_cell_checks_every_parameter_and_accepts_the_defaults(path):
    calls = [node for node in ast.walk(ast.parse(code_cells(path)[1].source)) if isinstance(node, ast.Call)]
    (call,) = (one for one in calls if ast.unparse(one.func) == "check_parameters")
    assert {one.arg: ast.unparse(one.value) for one in call.keywords} == {n: n for n in parameters(path)}
    check_parameters(**parameters_of(path))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"encoder": "false"}, r"encoder must be True or False, not 'false' \(papermill: -p encoder False\)"),
        ({"strengths": 1.0}, r"strengths must be a list of .*papermill: -y 'strengths: \[1.0\]'"),
        ({"prompts": "blue hair"}, r"prompts must be a list of .*papermill: -y 'prompts: \[blue hair\]'"),
        ({"prompt": 42}, r"prompt must be a text, not 42 \(papermill: -r prompt 42\)"),
        ({"domain": "toonface"}, "domain must be one of toonfaces, ffhq, afhq-dog, afhq-cat, not 'toonface'"),
        ({"settings": {"levels": "fine"}}, r"settings: .*levels must be a list .*write it as \[fine\]"),
        ({"settings": {"text_mapper": "false"}}, "settings: .*text_mapper must be True or False"),
        ({"settings": {"stepz": 3}}, "settings: .*no setting 'stepz'"),
        ({"settings": {"seed": "0"}}, "seed must be a whole number from 0, not '0'"),
        ({"method": "nope"}, "unknown method 'nope'; choose one of cfclip"),
        ({"refine": {"nada": {"lr": "60"}}}, "refine of nada: .*lr must be a finite number above 0"),
        ({"refine": {"nope": {}}}, "refine of nope: unknown method"),
        ({"points": [[1, 2], [3]]}, r"points must be a list of five points \[x, y\]"),
    ],
)
def test_the_message_says_how_a_parameter_is_written(given, words):
    defaults = {"method": "cfclip", "prompt": "green lipstick", "settings": {}}
    with pytest.raises(ValueError, match=words):
        check_parameters(**defaults | given)


def test_the_word_false_of_a_command_line_is_not_true(tmp_path):
    """``papermill -p encoder false`` gives the text "false"; only ``False`` is read as a flag."""
    with pytest.raises(Exception, match="encoder must be True or False, not 'false'"):
        run_notebook("01_inversion", tmp_path, {"encoder": "false"})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text_mapper": "false"}, r"parameter 'text_mapper': write it as -y 'settings: {text_mapper"),
        ({"stepz": 3, "n": 2}, "no notebook has a parameter 'stepz'; this one has: domain, device, label"),
    ],
)
def test_a_parameter_that_no_notebook_has_is_not_ignored(given, words, tmp_path):
    """One of another notebook is: a preset serves many."""
    given |= {"prompts": ["blue hair"], "inversion_steps": 3}
    with pytest.raises(Exception, match=words):
        run_notebook("02_training", tmp_path, given)


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
