"""The paper's tables: means, intervals and verdicts by hand, on rows that were made up."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from cfclip.baselines.library import load_editor
from cfclip.evaluation import ablation, claims, figures, report, tables
from cfclip.evaluation.stats import half_width
from cfclip.experiments import gather, load_spec, records, sweep
from cfclip.experiments.example import example
from cfclip.experiments.spec import cells
from cfclip.files import NOTEBOOKS
from cfclip.toonfaces.truth import ToonTruth


def group_of(prompt: str) -> str:
    """As the domain toonfaces has it; its truth needs no network for this."""
    truth = ToonTruth(None, 64)
    return "null edit" if prompt == "face" else truth.group(truth.claim(prompt))


def rows(
    method: str,
    prompt: str = "green lipstick",
    success=(0.5, 0.5, 0.5),
    identity=(0.9, 0.9, 0.9),
    strength: float = 1.0,
    **more,
) -> list[dict]:
    """One training per seed, two faces per training; their success is the training's mean +- 0.25."""
    same = {"method": method, "prompt": prompt, "strength": strength, "success_before": 0.0}
    same |= {"notebook": "02_training", "levels": ["fine"], "steps": 700, "n": 2}
    return [
        {"run": f"{method}-{prompt}-{seed}", "seed": seed, "index": face, "identity": i}
        | {"success_after": s + (-0.25, 0.25)[face]}
        | same
        | more
        for seed, (s, i) in enumerate(zip(success, identity, strict=True))
        for face in range(2)
    ]


def each_of(*parts: list[dict]) -> pd.DataFrame:
    return tables.trainings(pd.DataFrame([*itertools.chain(*parts)]), group_of)


def test_means_and_intervals_by_hand():
    each = each_of(
        rows("nada", "green lipstick", (0.2, 0.4, 0.6)),
        rows("nada", "blue hair", (0.4, 0.6, 0.8)),
        rows("cfclip", "purple skin", (1, 1, 1)),
    )
    long = tables.over_seeds(each).set_index(["group", "method", "metric"])
    line = long.loc["counterfactual", "nada", "success_after"]
    # by seed, over the two prompts: 0.3, 0.5, 0.7
    assert line["mean"] == pytest.approx(0.5) and line.seeds == 3
    assert line.half == pytest.approx(half_width([0.3, 0.5, 0.7]))
    table = tables.wide(long.reset_index(), ["group", "method"])
    assert table.to_dict("records") == [
        {
            "group": "counterfactual",
            "method": "nada",
            "success before %": "0 ± 0",
            "success % ↑": "50 ± 50",
            "identity ↑": "0.9 ± 0",
        },
        {
            "group": "counterfactual, held out from CLIP",
            "method": "cfclip",
            "success before %": "0 ± 0",
            "success % ↑": "100 ± 0",
            "identity ↑": "0.9 ± 0",
        },
    ]
    text = report.by_prompt(each)
    assert text.index("## Counterfactual\n") < text.index("## Counterfactual, held out")
    assert "| 60 ± 50" in text and "| 40 ± 50" in text


def test_known_metrics_in_their_order_and_new_ones_by_pattern():
    table = pd.DataFrame({
        "kid_natural": [1.0],
        "lpips_alex": [1.0],
        "steps": [3],
        "success_after": [1.0],
        "clip_after": [np.nan],
    })
    assert tables.columns_of(table) == ["success_after", "lpips_alex", "kid_natural"]
    assert [tables.label(name) for name in ("success_after", "lpips_alex", "truth_floor")] == [
        "success % ↑",
        "lpips alex ↓",
        "truth floor",
    ]


def test_the_null_edit_has_no_success():
    null = [
        {key: value for key, value in row.items() if not key.startswith("success")}
        for row in rows("cfclip", "face", identity=(0.9, 1, 0.8))
    ]
    each = each_of(rows("cfclip"), null)
    table = tables.wide(tables.over_seeds(each), ["group", "method"]).set_index("group")
    assert (
        table.loc["null edit", "success % ↑"] == "–" and table.loc["null edit", "identity ↑"] == "0.9 ± 0.25"
    )
    assert set(tables.fair(each, 0.8, 0.5).group) == {"counterfactual"}
    figures.curves(each), figures.tradeoff(each)


def test_success_is_that_of_the_faces_that_have_the_part():
    """Of four faces two have none: they count in the other means only."""
    part = {"success_before": [0.0, 0.0, None, None], "success_after": [1.0, 0.0, None, None]}
    beards = pd.DataFrame({
        "method": "cfclip",
        "prompt": "blue beard",
        "seed": 0,
        "index": range(4),
        "strength": 1.0,
        "identity": [1.0, 1.0, 0.5, 0.5],
        "progress": [0.75, 0.25, None, None],
        **part,
    })
    lips = beards.assign(prompt="blue lipstick", success_after=1.0)
    means = tables.means(pd.concat([beards, lips])).set_index("prompt")
    assert means.n.tolist() == [4, 4] and means.n_with_part.tolist() == [2, 4]
    assert means.loc["blue beard", ["success_after", "progress", "identity"]].tolist() == [0.5, 0.5, 0.75]
    assert "n_with_part" not in tables.means(lips), "where every face has the part"
    each = tables.trainings(beards, group_of)
    assert each.loc[0, ["success_after", "progress", "identity"]].tolist() == [0.5, 0.5, 0.75]
    table = tables.wide(tables.over_seeds(each), ["method"])
    assert list(table)[1:] == ["success before %", "success % ↑", "progress ↑", "identity ↑"]
    assert table.loc[0, "success % ↑"] == "50" and table.loc[0, "progress ↑"] == "0.5"


def test_a_training_whose_faces_all_lack_the_part_is_left_out_of_success():
    bare = [row | {"success_before": np.nan, "success_after": np.nan} for row in rows("cfclip", "blue beard")]
    each = each_of(bare, rows("cfclip", "green lipstick"), rows("nada", "blue beard"))
    means = tables.over_seeds(each, ["method"]).set_index(["method", "metric"])["mean"]
    assert means["cfclip", "success_after"] == pytest.approx(0.5)
    gained = tables.matched(each, "identity", 0.8, "success_after").query("method == 'cfclip'")
    assert gained.groupby("prompt").success_after.count().tolist() == [0, 3]
    judged = claims.compare(each, "cfclip", "nada", "success_after")
    assert judged["why"] == "no prompt and seed at which both are defined"
    reached = tables.fair(each, 0.8, 0.5).set_index("method")["reached %"]
    assert reached["cfclip"] == 100, "of those that could"
    figures.curves(each), figures.tradeoff(each)


def test_one_seed_has_no_interval():
    each = each_of(rows("cfclip")).query("seed == 0")
    assert tables.over_seeds(each).half.isna().all()
    assert claims.decide(pd.Series([0.3]))[0] == claims.UNDECIDED


def test_what_no_training_reaches_is_not_compared():
    each = each_of(rows("cfclip"), rows("nada"))
    judged = claims.panel(each, each.iloc[:0], success_at=0.9).set_index(["claim", "measure"])
    line = judged.loc["CF-CLIP keeps identity better than nada", "identity at success ≥ 90 %"]
    assert (line.verdict, line.why) == (claims.UNTESTED, "undefined in every training")


def test_two_settings_of_one_training_are_refused():
    with pytest.raises(ValueError, match=r"2 runs of cfclip, green lipstick, 0 differ in other parameters"):
        each_of(rows("cfclip"), rows("cfclip", run="another"))
    with pytest.raises(ValueError, match=r"cfclip, green lipstick, 0 has two rows of one face at strength 1"):
        each_of(rows("cfclip"), rows("cfclip"))


def test_the_best_on_a_curve_by_hand():
    identity, success = np.array([1.0, 0.9, 0.7]), np.array([0.0, 0.4, 0.8])
    assert tables.best_where(identity, success, 0.8) == pytest.approx(0.6), "half way between the points"
    assert tables.best_where(identity, success, 0.5) == 0.8, "never beyond the last one"
    assert tables.best_where(identity, success, 1.0) == 0.0, "the source itself"
    assert tables.best_where(success, identity, 0.2) == pytest.approx(0.95)
    assert np.isnan(tables.best_where(success, identity, 0.9))
    assert tables.best_where(np.array([1.0, 0.7, 0.9]), np.array([0.0, 0.9, 0.5]), 0.8) == pytest.approx(
        0.7
    ), "a curve may come back"


def test_matched_success_and_identity():
    steps = [(0.5, (0.4,) * 3, (0.9,) * 3), (1.0, (0.8,) * 3, (0.7,) * 3)]
    each = each_of(*(rows("cfclip", success=s, identity=i, strength=strength) for strength, s, i in steps))
    gained = tables.matched(each, "identity", 0.8, "success_after")
    assert gained.success_after.tolist() == pytest.approx([0.6] * 3) and not gained.open.any()
    assert tables.matched(each, "identity", 0.6, "success_after").open.all()
    (line,) = tables.fair(each, 0.8, 0.6).to_dict("records")
    assert line == {
        "group": "counterfactual",
        "method": "cfclip",
        "success % at identity ≥ 0.8": "60 ± 0",
        "identity at success ≥ 60 %": "0.8 ± 0",
        "open %": 0,
        "reached %": 100,
    }
    without = tables.matched(each.drop(columns="identity"), "identity", 0.8, "success_after")
    assert without.success_after.isna().all()


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [((0.1, 0.1, 0.2), claims.HOLDS), ((0.9, 0.9, 0.8), claims.FAILS), ((0.2, 0.9, 0.4), claims.UNDECIDED)],
)
def test_a_verdict_follows_the_numbers(theirs, verdict):
    each = each_of(rows("cfclip"), rows("nada", success=theirs))
    judged = claims.panel(each, each.iloc[:0])
    claim = "CF-CLIP edits counterfactual prompts better than nada"
    line = judged.set_index(["claim", "measure"]).loc[claim, "success at strength 1"]
    differences = 0.5 - np.array(theirs)
    assert line.verdict == verdict and line.difference == pytest.approx(differences.mean())
    assert line.half == pytest.approx(half_width(differences))
    assert f"50 % against {100 * np.mean(theirs):.3g} %" in line.why and "of 1 prompts; 3 seeds" in line.why
    assert (judged.verdict[judged.claim.str.contains("styleclip-global")] == claims.UNTESTED).all()
    assert "no runs of styleclip-global" in set(judged.why)
    assert (judged.verdict[judged.claim.isin(claims.PARTS.values())] == claims.UNTESTED).all()
    assert set(judged.verdict[judged.measure.isin(["user study", "the paper's tables"])]) == {claims.UNTESTED}
    claims.figure(judged)


def test_pairs_are_of_the_same_prompt_and_seed():
    # each pair differs by 0.1, while seeds and prompts differ by far more: unpaired, it would be undecided
    ours = rows("cfclip", success=(0.2, 0.5, 0.8)), rows("cfclip", "blue hair", (0.7, 0.4, 0.3))
    theirs = (
        rows("nada", success=(0.1, 0.4, 0.7)),
        rows("nada", "blue hair", (0.6, 0.3, 0.2)),
        rows("nada", "red lipstick", (1, 1, 1)),
    )
    result = claims.compare(each_of(*ours, *theirs), "cfclip", "nada", "success_after")
    assert result["verdict"] == claims.HOLDS and result["difference"] == pytest.approx(0.1)
    assert "ahead on 2 of 2 prompts" in result["why"]


def test_rankings_agree_or_not():
    methods = enumerate(("cfclip", "nada", "styleclip-global"))
    scored = [rows(method, clip_after=20 + i, heldout_clip_after=20 + i) for i, method in methods]
    alike = each_of(*scored)
    opposite = alike.assign(heldout_clip_after=-alike.heldout_clip_after)
    clips = "clip_after", "heldout_clip_after"
    assert claims.agreement(alike, *clips)["verdict"] == claims.HOLDS
    result = claims.agreement(opposite, *clips)
    assert (result["verdict"], result["difference"], result["half"]) == (claims.FAILS, -1, 0)
    missing = claims.agreement(alike, "clip_after", "nothing")
    assert missing == {"verdict": claims.UNTESTED, "why": "no metric nothing"}
    assert claims.agreement(alike.query("method != 'nada'"), *clips)["verdict"] == claims.UNTESTED


def test_ablation_rows_are_kept_apart_from_methods():
    ablated = rows("CF-CLIP", "purple eyebrows", (0.8, 0.9, 0.8))
    ablated = rows("negatives: none", "purple eyebrows", (0.2, 0.2, 0.3)) + ablated
    ablated = [{("row" if name == "method" else name): row[name] for name in row} for row in ablated]
    table = pd.DataFrame(rows("cfclip") + ablated)
    each = tables.trainings(table, group_of)
    ablated = tables.trainings(table, group_of, by="row")
    assert list(each.method.cat.categories) == ["cfclip"]
    assert list(ablated.method.cat.categories) == ["CF-CLIP", "negatives: none"]
    shown = tables.wide(tables.over_seeds(ablated, ["method"]), ["method"])
    assert shown.method.tolist() == ["CF-CLIP", "negatives: none"]
    judged = claims.panel(each, ablated).set_index(["claim", "measure"])
    assert judged.verdict["negatives contribute", "success at strength 1"] == claims.HOLDS
    assert judged.why["the text mapper contributes", "success at strength 1"] == "no runs of no text mapper"
    seconds = [{"run": run, "seconds": 2.0} for run in table.run.unique()]
    assert tables.budget(table, seconds).method.tolist() == ["ablation", "cfclip"]


def test_a_strength_that_could_have_been_larger_is_told():
    steps = [rows(method, strength=strength) for method in ("cfclip", "nada") for strength in (0.5, 1.0)]
    gained = tables.matched(each_of(*steps), "identity", 0.85, "success_after")
    why = claims.compare(gained, "cfclip", "nada", "success_after")["why"]
    assert why.endswith(
        "identity was still above the threshold at the largest strength in 100 % of ours and 100 % of the "
        "other's trainings"
    )


def test_the_best_trial_of_a_search_is_the_first_of_equals():
    tried = [("cfclip", 1, 0.5), ("cfclip", 2, 0.5), ("nada", 1, 0.2), ("nada", 4, 0.3)]
    trials = [
        rows(method, success=[success], identity=[0.9], settings={"lr": lr, "steps": 9})
        for method, lr, success in tried
    ]
    result = tables.search(pd.DataFrame([*itertools.chain(*trials)]), 0.9)
    assert result.trial.tolist() == ["cfclip: lr 1", "cfclip: lr 2", "nada: lr 1", "nada: lr 4"]
    assert result.chosen.tolist() == [True, False, False, True]
    assert result["mean"].tolist() == pytest.approx([0.5, 0.5, 0.2, 0.3])
    assert result["green lipstick"].tolist() == result["mean"].tolist()


def test_figures_are_written_and_the_same_twice(tmp_path):
    each = each_of(rows("cfclip"), rows("nada", success=(0.1, 0.2, 0.3)))
    judged = claims.panel(each, each.iloc[:0])
    for folder in ("a", "b"):
        drawn = {"curves": figures.curves(each), "claims": claims.figure(judged)}
        drawn["tradeoff"] = figures.tradeoff(each, marks=(0.8, 0.5))
        report.write(tmp_path / folder, {"claims.csv": judged} | drawn)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"claims.csv"} | {f"{name}.{kind}" for name in drawn for kind in ("png", "pdf")}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_example_has_runs_of_both_notebooks_and_their_pictures(domain, tmp_path):
    runs = example(domain, tmp_path)
    table = gather(runs)
    assert len(table) == (8 + 4) * 2 * 2
    assert set(table.notebook) == {"02_training", "03_ablation_directions"}
    each = tables.trainings(table, domain.group_of)
    ablated = tables.trainings(table, domain.group_of, by="row")
    assert len(each) == 8 * 2 and len(ablated) == 4 * 2
    assert set(each.group) == {"counterfactual", "null edit"}
    written = pd.concat([pd.read_json(path, lines=True) for path in tmp_path.glob("03_*/metrics.jsonl")])
    expected = written.groupby(["row", "seed", "strength"]).identity.mean()
    identity = ablated.set_index(["method", "seed", "strength"]).identity
    assert len(identity) == len(expected), "each strength is a line, also the one that the notebook shows"
    assert identity.to_dict() == pytest.approx(expected.to_dict())
    w = domain.latents(2, "test", 0)
    shown = figures.pictures_by_method(table, runs, domain, w)
    assert list(shown) == ["green lipstick", "face"] and shown["face"].shape == (6, 3, 16, 16)
    # face by face: the source, then the methods
    assert torch.equal(shown["face"][3], domain.generator.synthesis(w)[1])
    chosen = table[(table.method == "styleclip-mapper") & (table.prompt == "face") & (table.seed == 0)]
    editor = load_editor(tmp_path / chosen.run.iloc[0], domain)
    assert torch.equal(shown["face"][[2, 5]], editor.edit(w, 1.0))
    figures.picture_grid(shown, ["cfclip", "styleclip-mapper"])
    assert "12 runs, 0 seconds" in report.provenance(records(runs))


def test_names_in_the_papers_sweep_tell_its_runs_apart():
    spec = load_spec(NOTEBOOKS / "presets" / "paper-toonfaces.yaml")
    runs = [(cell, name) for block in spec.grid for cell, name in cells(block)]
    names = [name for _, name in runs]
    assert len(set(names)) == len(names)
    assert "03_ablation_directions-purple-eyebrows-positive-text-direction-only-2" in names
    ablated = [cell for cell, _ in runs if cell["notebook"] == "03_ablation_directions"]
    assert {"CF-CLIP", *claims.PARTS} <= set(ablation.ROWS)
    assert [cell["rows"] for cell in ablated] == [[row] for row in ablation.ROWS for _ in range(3)]
    assert {cell["seeds"][0] for cell in ablated} == {0, 1, 2}


SWEEP = """
parameters: {settings: {steps: 1, batch: 1, train_latents: 1}, n: 2, preview: 1, faces: 1, strengths: [1.0]}
grid:
  - notebook: 02_training
    method: {cfclip: , styleclip-optimization: {settings: {steps: 1, batch: 1}}}
    prompt: green lipstick
  - {notebook: 03_ablation_directions, rows: [[CF-CLIP], ["views: 1"]], seeds: [[0]]}
then:
  - notebook: 06_paper_tables
"""


@pytest.mark.slow
def test_a_sweep_from_end_to_end(tmp_path):
    (tmp_path / "small.yaml").write_text(SWEEP, encoding="utf-8")
    runs = sweep(load_spec(tmp_path / "small.yaml"), tmp_path / "runs", tmp_path / "reports")
    assert len(runs) == 4
    folder = tmp_path / "reports" / "paper"
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "prompts.md", "claims.csv", "pictures.pdf", "ablation.png"} <= names
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "An example" not in text
    assert all(words in text for words in ("views: 1", "styleclip-optimization", "4 runs"))
    assert claims.UNTESTED in set(pd.read_csv(folder / "claims.csv").verdict)


def test_the_budget_is_what_a_run_really_took():
    runs = [("cfclip", 0, {}), ("cfclip", 1, {}), ("nada", 0, {"steps": 9}), ("styleclip-global", 0, {})]
    seconds = (10, 30, 5, 1)
    table = pd.DataFrame([
        {"run": run, "method": method, "steps": 700, "n": 4, "seed": seed, "settings": given}
        for run, (method, seed, given) in enumerate(runs)
    ])
    budget = tables.budget(table, [{"run": run, "seconds": one} for run, one in enumerate(seconds)])
    assert budget.drop(columns="pictures").to_numpy().tolist() == [
        ["cfclip", 2, "", "0, 1", "20"],
        ["nada", 1, "9", "0", "5"],
        ["styleclip-global", 1, "", "0", "1"],
    ]
