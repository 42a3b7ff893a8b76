from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch

from cfclip.evaluation import report as reporting


def test_summary_and_markdown_by_hand():
    table = pd.DataFrame({
        "prompt": ["b", "b", "a"],
        "index": [0, 1, 0],
        "seed": 0,
        "success_after": [1.0, 0.0, 1.0],
        "clip_after": [20.0, 30.0, 5.0],
    })
    summary = reporting.summary(table)
    assert summary.to_dict("records") == [
        {"prompt": "b", "n": 2, "success_after": 0.5, "clip_after": 25.0},
        {"prompt": "a", "n": 1, "success_after": 1.0, "clip_after": 5.0},
    ]
    text = reporting.markdown(summary, "a note")
    assert "50.0 %" in text and "| 25.0" in text and text.endswith("a note\n")


def test_groups_and_numbers_that_are_not_there():
    table = pd.DataFrame({
        "prompt": ["a", "a", "face"],
        "group": ["x", "x", "y"],
        "index": [0, 1, 0],
        "success_inverted": [1.0, 0.0, None],
        "kid_natural": 1.0,
    })
    summary = reporting.summary(table, by=["prompt", "group"])
    assert (
        summary[["prompt", "group", "n"]].to_numpy().tolist() == [["a", "x", 2], ["face", "y", 1]]
        and summary.success_inverted[0] == 0.5
    )
    shown = [
        [cell.strip() for cell in line.split("|")[4:6]]
        for line in reporting.markdown(summary).splitlines()[2:]
    ]
    assert shown == [["50.0 %", "1.000"], ["–", "1.000"]]


def test_a_report_shows_its_main_columns_and_keeps_all(tmp_path):
    table = pd.DataFrame({
        "prompt": ["x"],
        "index": [0],
        "leakage_nose": [0.5],
        "leakage": [0.25],
        "success_after": [float("nan")],
    })
    reporting.write_report(tmp_path, table, reporting.summary(table), {}, "")
    assert (
        "leakage_nose" in (tmp_path / "table.csv").read_text()
        and "nose" not in (tmp_path / "README.md").read_text()
    )
    assert reporting.read_rows(tmp_path / "metrics.jsonl") == [
        {"prompt": "x", "n": 1, "leakage_nose": 0.5, "leakage": 0.25, "success_after": None}
    ]


def test_a_report_is_written_and_the_same_twice(tmp_path):
    table = pd.DataFrame({"prompt": ["x", "x"], "index": [0, 1], "seed": 0, "identity": [0.25, 0.75]})
    figures = {"grid": reporting.image_grid({"source": torch.zeros(2, 3, 8, 8)}, columns=2)}
    for folder in ("a", "b"):
        reporting.write_report(tmp_path / folder, table, reporting.summary(table), figures, "note")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "README.md",
        "table.csv",
        "metrics.jsonl",
        "grid.png",
    }
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert reporting.read_rows(tmp_path / "a" / "metrics.jsonl") == [{"prompt": "x", "n": 2, "identity": 0.5}]


def test_many_may_look_at_a_folder_at_once(tmp_path):
    def look(i: int) -> None:
        reporting.writable(tmp_path)
        reporting.write_rows([{"i": i}], tmp_path / "rows.jsonl")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look, range(400)))
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"] and len(
        reporting.read_rows(tmp_path / "rows.jsonl")
    ) == 1


def test_reports_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match=r"cannot write to .*file"):
        reporting.writable(tmp_path / "file" / "reports")


def test_pictures_are_rounded_and_clamped():
    image = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert reporting.to_uint8(image)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
