from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch

from cfclip.evaluation import report
from cfclip.evaluation.figures import image_grid
from cfclip.evaluation.tables import means
from cfclip.files import read_rows, write_rows
from cfclip.images import to_uint8


def test_means_and_markdown_by_hand():
    table = pd.DataFrame({
        "prompt": ["b", "b", "a"],
        "index": [0, 1, 0],
        "seed": 0,
        "success_after": [1.0, 0.0, 1.0],
        "clip_after": [20.0, 30.0, 5.0],
    })
    summary = means(table)
    assert summary.to_dict("records") == [
        {"prompt": "b", "n": 2, "success_after": 0.5, "clip_after": 25.0},
        {"prompt": "a", "n": 1, "success_after": 1.0, "clip_after": 5.0},
    ]
    text = report.markdown(summary, "a note")
    assert "50 %" in text and "| 25.0" in text and text.endswith("a note\n")


def test_a_number_that_is_not_there_is_a_dash():
    table = pd.DataFrame({
        "prompt": ["a", "a", "face"],
        "group": ["x", "x", "y"],
        "index": [0, 1, 0],
        "success_inverted": [1.0, 0.0, None],
        "kid_natural": [1.0, 1.0, None],
    })
    summary = means(table, by=["prompt", "group"])
    assert summary[["prompt", "group", "n"]].to_numpy().tolist() == [["a", "x", 2], ["face", "y", 1]]
    assert summary.success_inverted[0] == 0.5
    lines = report.markdown(summary).splitlines()[2:]
    shown = [[cell.strip() for cell in line.split("|")[4:6]] for line in lines]
    assert shown == [["50 %", "1.000"], ["–", "–"]]


def test_shares_are_per_cent_and_counts_are_whole_also_where_some_are_missing():
    table = pd.DataFrame({"success_a": [0.25, None], "progress": [0.25, None], "n_with_part": [3, None]})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.markdown(table).splitlines()]
    assert lines[0] == ["success a", "progress", "n with part"]
    assert lines[2:] == [["25 %", "0.250", "3"], ["–", "–", "–"]]


def test_a_page_leaves_out_what_is_empty():
    table = pd.DataFrame({"a": [1]})
    blocks = ["begin", report.section("None", table.iloc[:0]), report.section("Some", table, "note"), ""]
    text = report.page("Title", *blocks, report.pictures(["x", "y"]))
    assert text == (
        "# Title\n\nbegin\n\n## Some\n\n| a   |\n|:----|\n| 1   |\n\nnote\n\n"
        "![x](x.png)\n\n[x.pdf](x.pdf)\n\n![y](y.png)\n\n[y.pdf](y.pdf)\n"
    )


def test_a_report_is_written_and_the_same_twice(tmp_path):
    table = pd.DataFrame({
        "prompt": ["x", "x"],
        "index": [0, 1],
        "identity": [0.25, 0.75],
        "leakage": [None, 1],
    })
    grid = image_grid({"source": torch.zeros(2, 3, 8, 8)}, columns=2)
    files = {"README.md": "text", "table.csv": table, "metrics.jsonl": table, "grid.png": grid, "both": grid}
    for folder in ("a", "b"):
        report.write(tmp_path / folder, files)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"README.md", "table.csv", "metrics.jsonl", "grid.png", "both.png", "both.pdf"}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert (tmp_path / "a" / "both.pdf").read_bytes().startswith(b"%PDF")
    assert read_rows(tmp_path / "a" / "metrics.jsonl") == [
        {"prompt": "x", "index": 0, "identity": 0.25, "leakage": None},
        {"prompt": "x", "index": 1, "identity": 0.75, "leakage": 1.0},
    ]


def test_many_threads_may_write_one_file(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: report.write(tmp_path, {"rows.jsonl": pd.DataFrame({"i": [i]})}), range(100)))
    write_rows(tmp_path / "rows.jsonl", [{"i": 0}])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert read_rows(tmp_path / "rows.jsonl") == [{"i": 0}]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match=r"cannot write to .*file"):
        report.write(tmp_path / "file" / "reports", {})


def test_pictures_are_rounded_and_clamped():
    image = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(image)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_a_command_can_be_copied_and_its_remark_cannot():
    assert report.quoted("cfclip sweep a.yaml (on a GPU)") == "`cfclip sweep a.yaml` (on a GPU)"
    assert report.quoted("cfclip sweep a.yaml") == "`cfclip sweep a.yaml`"
