"""Pages of results and the figures of the notebooks, for people."""

import re

import pandas as pd
import torch

from cfclip.evaluation import report
from cfclip.evaluation.figures import image_grid, readings
from cfclip.evaluation.tables import means


def test_a_table_across_has_its_columns_as_rows():
    table = pd.DataFrame({"prompt": ["a", "b"], "success_after": [1.0, 0.5], "leakage": [0.1, float("nan")]})
    lines = [re.sub(r"\s+", " ", line) for line in report.markdown(table, across="prompt").splitlines()]
    assert lines[0] == "| | a | b |"
    assert lines[2:] == ["| success after | 100 % | 50 % |", "| leakage | 0.100 | – |"]


def test_a_page_links_to_the_others_by_their_titles(tmp_path):
    (tmp_path / "speed").mkdir()
    for name, title in {"README.md": "Results", "limits.md": "Ceiling", "speed/README.md": "Cost"}.items():
        (tmp_path / name).write_text(f"# {title}\n\ntext\n", encoding="utf-8")
    links = report.other_pages(tmp_path).splitlines()
    assert links[2:] == ["- [Ceiling](limits.md)", "- [Cost](speed/README.md)"]


def test_what_the_readout_got_wrong_is_marked_with_the_truth():
    seen, true = pd.DataFrame({"hair": ["red", None]}), pd.DataFrame({"hair": ["blue", None]})
    figure = readings(torch.zeros(2, 3, 8, 8), seen, true)
    texts = {text.get_text(): text.get_color() for axis in figure.axes for text in axis.texts}
    assert texts["red (blue)"] == "C3" and texts["–"] != "C3"


def test_the_page_of_an_evaluation_shows_the_pictures_first_and_names_no_figure_that_is_missing(tmp_path):
    lines = [
        {"prompt": "a", "group": "x", "index": i, "seed": 0, "strength": s, "success_after": i, "leakage": s}
        for i in (0, 1)
        for s in (0.5, 1.0)
    ]
    curves = pd.DataFrame(lines)
    table = curves[curves.strength == 1.0].drop(columns="strength")
    summary = means(table, by=["prompt", "group"])
    drawn = {"grid": image_grid({"source": torch.zeros(1, 3, 8, 8)}, columns=1), "leakage": None}
    report.write_evaluation(tmp_path, curves, table, summary, "a note", drawn)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        text.index("grid.png") < text.index("| a ") < text.index("a note") < text.index("## How it was made")
    )
    assert "leakage.png" not in text and (tmp_path / "grid.png").exists()
    assert pd.read_csv(tmp_path / "strengths.csv").leakage.tolist() == [0.5, 1.0]
    assert len(pd.read_csv(tmp_path / "table.csv")) == 2


def test_rows_that_were_written_are_read_with_their_order(tmp_path):
    each = pd.DataFrame({"method": ["nada", "cfclip"], "group": ["null edit", "counterfactual"], "n": [1, 2]})
    report.write(tmp_path, {"curves.csv": each})
    read = report.read(tmp_path / "curves.csv")
    assert list(read.sort_values("method").method) == ["cfclip", "nada"]
    assert list(read.group.cat.categories) == ["counterfactual", "null edit"]
    assert report.read(tmp_path / "nowhere.csv").empty
