import numpy as np
import pandas as pd
import pytest

from cfclip.evaluation import ablation
from cfclip.method.config import CFCLIPConfig


def test_every_row_is_a_change_that_its_name_says():
    default = CFCLIPConfig("x")
    for name, change in ablation.ROWS.items():
        assert (name == "CF-CLIP") == (CFCLIPConfig("x", **change) == default), name
    assert len({str(sorted(change.items())) for change in ablation.ROWS.values()}) == len(ablation.ROWS)


def test_the_interval_by_hand():
    # Student's t with 2 degrees of freedom: 4.302653 at 97.5 %
    assert ablation.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 * 1.0 / np.sqrt(3), rel=1e-6)
    assert np.isnan(ablation.half_width([1.0]))


@pytest.fixture
def table():
    """Two rows, three trainings of two faces: trainings' means are 1, 2, 3 and 5, 5, 5; the faces differ more than those."""
    means = {"CF-CLIP": (1, 2, 3), "views: none": (5, 5, 5)}
    return pd.DataFrame([
        {
            "row": row,
            "prompt": "p",
            "seed": seed,
            "index": face,
            "identity": mean + (-10, 10)[face],
            "success_after": 0.5,
        }
        for row, values in means.items()
        for seed, mean in enumerate(values)
        for face in range(2)
    ])


def test_the_interval_is_over_trainings_not_faces(table):
    summary = ablation.summarise(table)
    first, second = summary[summary.metric == "identity"].to_dict("records")
    assert (first["row"], first["mean"], first["trainings"]) == ("CF-CLIP", 2, 3) and first[
        "half"
    ] == pytest.approx(2.4841, rel=1e-4)
    assert (second["row"], second["mean"], second["half"]) == ("views: none", 5, 0)
    shown = ablation.pretty(summary)
    assert shown.to_dict("records")[0] == {
        "row": "CF-CLIP",
        "identity": "2 ± 2.5",
        "success after %": "50 ± 0",
    }


def test_one_training_has_no_interval(table):
    summary = ablation.summarise(table[table.seed == 0])
    assert summary.half.isna().all() and ablation.pretty(summary)["identity"].tolist() == ["1", "5"]


def test_the_report_is_written(table, tmp_path):
    ablation.write(tmp_path, table, ablation.figure(table), "a note")
    assert {p.name for p in tmp_path.iterdir()} == {
        "ablation.csv",
        "ablation.jsonl",
        "ablation.png",
        "ablation.md",
    }
    text = (tmp_path / "ablation.md").read_text()
    assert "2 ± 2.5" in text and "a note" in text
    assert len(pd.read_csv(tmp_path / "ablation.csv")) == 12


def test_a_row_is_trained_as_it_says_and_scored(domain, monkeypatch):
    seen = {}
    honest = ablation.baselines.fit
    monkeypatch.setattr(ablation.baselines, "fit", lambda *a, **k: seen.setdefault("editor", honest(*a, **k)))
    table = ablation.run_row(
        domain, "views: none", "green lipstick", seed=3, n=4, steps=2, train_latents=4, draws=5
    )
    assert (seen["editor"].config.draws, seen["editor"].config.seed) == (0, 3)
    assert table["index"].tolist() == [0, 1, 2, 3] and set(table.row) == {"views: none"}
    assert {"clip_after", "clip_direction", "identity", "success_after", "leakage"} <= set(table.columns)
    # the tiny network's edit moves the picture: before and after differ
    assert (table.clip_before - table.clip_after).abs().min() > 1e-6


def test_rows_that_do_not_exist(domain):
    assert ablation.choose(["query: image"]) == ["query: image"] and ablation.choose() == list(ablation.ROWS)
    with pytest.raises(ValueError, match=r"unknown rows \['query: x'\]"):
        ablation.run_row(domain, "query: x", "green lipstick")
