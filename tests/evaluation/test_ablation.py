import numpy as np
import pandas as pd
import pytest

from cfclip.baselines.library import load_editor
from cfclip.evaluation import ablation, report, tables
from cfclip.evaluation.figures import ablation_figure
from cfclip.evaluation.stats import half_width
from cfclip.method.config import CFCLIPConfig, with_settings


def test_every_row_but_the_first_changes_a_setting_of_toonfaces():
    default = CFCLIPConfig("x", levels=("fine",))
    for name, change in ablation.ROWS.items():
        assert (name == "CF-CLIP") == (with_settings(default, change) == default), name
    assert len({str(sorted(change.items())) for change in ablation.ROWS.values()}) == len(ablation.ROWS)


def test_the_interval_by_hand():
    # Student's t with 2 degrees of freedom: 4.302653 at 97.5 %
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 * 1.0 / np.sqrt(3), rel=1e-6)
    assert np.isnan(half_width([1.0]))


@pytest.fixture
def table():
    """Two rows of three trainings, whose means are 1, 2, 3 and 5, 5, 5; their two faces differ far more."""
    means = {"CF-CLIP": (1, 2, 3), "views: none": (5, 5, 5)}
    same = {"prompt": "p", "strength": 1.0, "success_after": 0.5}
    return pd.DataFrame([
        {"row": row, "seed": seed, "index": face, "identity": mean + (-10, 10)[face]} | same
        for row, values in means.items()
        for seed, mean in enumerate(values)
        for face in range(2)
    ])


def trainings(table):
    return tables.trainings(table, lambda prompt: "other", by="row")


def test_the_interval_is_over_trainings_not_faces(table):
    summary = tables.over_seeds(trainings(table), ["method"])
    first, second = summary[summary.metric == "identity"].to_dict("records")
    assert (first["method"], first["mean"], first["seeds"]) == ("CF-CLIP", 2, 3)
    assert first["half"] == pytest.approx(half_width([1, 2, 3]))
    assert (second["method"], second["mean"], second["half"]) == ("views: none", 5, 0)
    shown = tables.wide(summary, ["method"])
    assert shown.to_dict("records")[0] == {
        "method": "CF-CLIP",
        "success % ↑": "50 ± 0",
        "identity ↑": "2.0 ± 2.5",
    }


def test_one_training_has_no_interval(table):
    summary = tables.over_seeds(trainings(table[table.seed == 0]), ["method"])
    assert summary.half.isna().all()
    assert tables.wide(summary, ["method"])["identity ↑"].tolist() == ["1", "5"]


def test_a_row_is_compared_with_the_first_at_equal_prompt_and_seed(table):
    """Its prompts are 10 apart, and the row always 1 above: the prompts' spread is not in the interval."""
    both = pd.concat([table, table.assign(prompt="q", identity=table.identity + 10)])
    both.loc[both.row == "views: none", "identity"] = both.identity[both.row == "CF-CLIP"].to_numpy() + 1
    each = trainings(both)
    lines = tables.against_first(each, ("identity",)).set_index("row")
    assert lines["identity ↑"].to_dict() == {"CF-CLIP": "7", "views: none": "8 (+1 ± 0)"}
    assert lines["it changes"].to_dict() == {"CF-CLIP": "", "views: none": "num_views 0"}
    both.loc[both.prompt == "q", "seed"] += 7  # no seed of both prompts: a mean of nothing
    assert ablation_figure(trainings(both[both.row == "CF-CLIP"])).axes


def test_the_report_is_written(table, tmp_path):
    each = trainings(table)
    shown = tables.wide(tables.over_seeds(each, ["method"]), ["method"])
    text = report.page(
        "Ablation", report.section("Rows", shown, "a note"), report.pictures(["ablation"], False)
    )
    files = {"ablation.csv": table, "ablation.md": text, "ablation.png": ablation_figure(each)}
    report.write(tmp_path, files)
    assert {path.name for path in tmp_path.iterdir()} == files.keys()
    text = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert "2.0 ± 2.5" in text and "a note" in text and text.endswith("\n\n![ablation](ablation.png)\n")
    assert len(pd.read_csv(tmp_path / "ablation.csv")) == 12


def test_a_row_is_trained_as_its_name_says_and_measured(domain, tmp_path):
    given = {"steps": 2, "train_latents": 4, "num_views": 5}
    jobs = ablation.jobs(["views: none"], ["green lipstick", "blue hair"], [3], given, tmp_path)
    table, editors = ablation.run(domain, jobs, 4, [1.0])
    config = load_editor(tmp_path / "views-none-green-lipstick-3", domain).config
    assert (config.num_views, config.seed) == (0, 3)
    assert [config.prompt for config in (one.config for one in editors.values())] == [
        "green lipstick",
        "blue hair",
    ]
    table = table[table.prompt == "green lipstick"]
    assert table["index"].tolist() == [0, 1, 2, 3] and set(table.row) == {"views: none"}
    assert {"clip_after", "clip_direction", "identity", "success_after", "leakage"} <= set(table.columns)
    # the tiny network's edit moves the picture: before and after differ
    assert (table.clip_before - table.clip_after).abs().min() > 1e-6


def test_an_unknown_row_is_named_and_a_failed_training_is_raised(domain):
    assert [row for row, *_ in ablation.jobs([], ["a"], [0], {})] == list(ablation.ROWS)
    with pytest.raises(ValueError, match=r"unknown rows \['query: x'\]"):
        ablation.jobs(["query: x"], ["green lipstick"], [0], {})
    with pytest.raises(ValueError, match="guides"):
        ablation.run(domain, ablation.jobs(["CF-CLIP"], ["a"], [0], {"guides": 9}), 1, [1.0])
