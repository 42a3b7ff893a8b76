"""House rules of the notebooks; pytest also runs each at presets/smoke.yaml (notebooks/conftest.py)."""

import ast
import base64
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from example import example
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from cfclip.domains import load_domain
from cfclip.evaluation import ablation, claims, report, tables
from cfclip.evaluation.frames import FRAMES
from cfclip.experiments import check_parameters, gather, notebooks
from cfclip.experiments.runs import notebook_hash, run_notebook
from cfclip.experiments.spec import load_preset, parameters_of
from cfclip.files import NOTEBOOKS, ROOT, slug

BOOKS = sorted(NOTEBOOKS.glob("*.ipynb"))
PRESETS = sorted((NOTEBOOKS / "presets").glob("*.yaml"))
PRESETS = [path for path in PRESETS if not path.name.startswith("paper-")]  # those are sweeps
MACHINE = re.compile(rf"/(?:home|root|tmp|Users|mnt|usr|opt|var)/|[A-Z]:\\\\|{re.escape(str(ROOT))}")


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def parameters(path: Path) -> dict[str, ast.expr]:
    (cell,) = (c for c in code_cells(path) if "parameters" in c.metadata.get("tags", []))
    return {node.targets[0].id: node.value for node in ast.parse(cell.source).body}


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_a_notebook_defines_nothing_and_checks_itself(path):
    definitions = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    for cell in code_cells(path):
        assert not any(isinstance(node, definitions) for node in ast.walk(ast.parse(cell.source)))
    assert any("assert " in cell.source for cell in code_cells(path))


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_committed_with_the_outputs_of_its_code(path):
    """And with nothing of the machine that made them. ``make notebooks NAMES=…`` mends it."""
    book = nbformat.read(path, as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert book.metadata.get(notebooks.EXECUTED) == notebook_hash(path), "its code is not what was executed"
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and all(output.output_type != "error" for output in outputs)
    texts = [
        str(output.get("text", "")) + str(output.get("data", {}).get("text/html", "")) for output in outputs
    ]
    texts += [str(output.get("data", {}).get("text/plain", "")) for output in outputs]
    assert not [found for text in texts for found in MACHINE.findall(text)], "a path of a machine"
    assert {*book.metadata} == {"kernelspec", "language_info", notebooks.EXECUTED}
    assert path.stat().st_size <= 1_500_000, "larger than 1.5 MB: fewer or smaller pictures"


@pytest.mark.parametrize("path", [*BOOKS, ROOT / "README.md"], ids=lambda p: p.stem)
def test_links_to_code_lead_to_its_line(path):
    """``make format`` mends them."""
    text = path.read_text(encoding="utf-8")
    assert notebooks.linked(text, path.parent) == text


def test_a_link_follows_its_code_and_one_to_nothing_is_named(tmp_path):
    (tmp_path / "a.py").write_text("import os\n\nclass A:\n    def b(self): ...\n", encoding="utf-8")
    assert notebooks.linked("see [`A.b`](a.py#L1) there", tmp_path) == "see [`A.b`](a.py#L4) there"
    with pytest.raises(ValueError, match=r"names A.c, which is not in .*a\.py"):
        notebooks.linked("[`A.c`](a.py)", tmp_path)
    with pytest.raises(ValueError, match=r"names .*b\.py, which does not exist"):
        notebooks.linked("[`A`](b.py#L3)", tmp_path)


def test_executing_a_notebook_keeps_what_it_shows_and_nothing_of_the_machine(tmp_path):
    shows = "import tqdm.auto as t, sys; print('seen', file=sys.stderr); list(t.tqdm([1])); print('shown')"
    draws = "from PIL import Image; Image.linear_gradient('L')"
    cells = [
        new_code_cell("n = 1", metadata={"tags": ["parameters"]}),
        new_code_cell(shows),
        new_code_cell(draws),
    ]
    nbformat.write(new_notebook(cells=cells), path := tmp_path / "a.ipynb")
    first = notebooks.execute(path).read_bytes()
    book = nbformat.reads(first.decode(), as_version=4)
    assert [output.get("text") for output in book.cells[1].outputs] == ["shown\n"]
    drawn = Image.open(io.BytesIO(base64.b64decode(book.cells[2].outputs[0].data["image/png"])))
    exact = np.asarray(Image.linear_gradient("L"), dtype=int)
    assert np.abs(np.asarray(drawn.convert("L"), dtype=int) - exact).max() <= 2
    assert book.metadata[notebooks.EXECUTED] == notebook_hash(path)
    assert notebooks.execute(path).read_bytes() == first


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


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_the_smoke_preset_makes_every_training_a_short_one(path):
    """The notebooks' own settings take minutes; pytest replaces them as notebooks/conftest.py says."""
    smoke = load_preset(NOTEBOOKS / "presets" / "smoke.yaml")
    long = {"settings", "inversion_steps", "curve_steps", "snapshots", "rows", "seeds"} & parameters_of(
        path
    ).keys()
    assert long <= smoke.keys()


def test_a_training_of_ones_own_begins_with_the_worlds_recipe():
    recipe = load_preset(NOTEBOOKS / "presets" / "toonfaces.yaml")["settings"]
    assert parameters_of("02_training")["settings"] == recipe
    others = parameters_of("00b_method")["settings"], parameters_of("05_explorer")["refine"]["cfclip"]
    for name in ("steps", "lr", "lambda_l2", "lambda_perc", "perc_limit", "train_strength", "levels"):
        assert [one[name] for one in others] == [recipe[name]] * 2, name  # they have fewer pictures only
    assert ablation.ROWS["pixels held, to a limit"].items() <= recipe.items()


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


@pytest.mark.parametrize("book", ["06_paper_tables", "07_tuning"])
def test_the_tables_are_those_of_a_sweep_and_their_rows_can_be_opened_again(book, tmp_path):
    domain = load_domain("toonfaces")
    runs = example(domain, tmp_path / "runs")
    given = {"runs": str(runs), "reports": str(tmp_path)}
    run_notebook(book, tmp_path / "out", given | ({"ceiling": 1} if book == "06_paper_tables" else {}))
    folder = tmp_path / {"06_paper_tables": "paper", "07_tuning": "tuning"}[book]
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "12 runs" in text and "styleclip-mapper" in text
    if book == "06_paper_tables":
        written = report.read(folder / "curves.csv")
        assert set(FRAMES) < set(written.method)
        each, methods = tables.trainings(gather(runs), domain.group_of), written[~written.method.isin(FRAMES)]
        methods = methods.astype({"method": each.method.dtype}).reset_index(drop=True)
        pd.testing.assert_frame_equal(methods, each, rtol=1e-5)
        assert claims.UNTESTED in set(pd.read_csv(folder / "claims.csv").verdict)


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
