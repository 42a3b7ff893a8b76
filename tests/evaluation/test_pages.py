"""Pages of results and the figures of the notebooks, for people."""

import re

import pandas as pd
import torch

from cfclip.evaluation import report
from cfclip.evaluation.figures import readings


def test_a_table_across_has_its_columns_as_rows():
    table = pd.DataFrame({"prompt": ["a", "b"], "success_after": [1.0, 0.5], "leakage": [0.1, float("nan")]})
    lines = [re.sub(r"\s+", " ", line) for line in report.markdown(table, across="prompt").splitlines()]
    assert lines[0] == "| | a | b |"
    assert lines[2:] == ["| success after | 100.0 % | 50.0 % |", "| leakage | 0.100 | – |"]


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
