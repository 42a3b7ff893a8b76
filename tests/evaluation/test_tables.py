"""The paper's tables: means, intervals and verdicts by hand, on rows that were made up."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from cfclip.baselines import methods as baselines
from cfclip.evaluation import ablation, claims, tables
from cfclip.experiments import sweep
from cfclip.experiments.runs import gather
from cfclip.experiments.spec import NOTEBOOKS

T2 = 4.302653  # Student's t, 2 degrees of freedom, 97.5 %


def rows(
    method: str,
    prompt: str = "green lipstick",
    success=(0.5, 0.5, 0.5),
    identity=(0.9, 0.9, 0.9),
    strength: float = 1.0,
    **more,
) -> list[dict]:
    """Two faces a training, a training a seed; the faces' success is the training's mean +- 0.25."""
    return [
        {
            "run": f"{method}-{prompt}-{seed}",
            "notebook": "02_training",
            "method": method,
            "prompt": prompt,
            "seed": seed,
            "levels": ["fine"],
            "strength": strength,
            "index": face,
            "success_before": 0.0,
            "success_after": s + (-0.25, 0.25)[face],
            "identity": i,
            "steps": 700,
            "n": 2,
        }
        | more
        for seed, (s, i) in enumerate(zip(success, identity, strict=True))
        for face in range(2)
    ]


def each_of(*parts: list[dict]) -> pd.DataFrame:
    return tables.trainings(pd.DataFrame([*itertools.chain(*parts)]))


def test_means_and_intervals_by_hand():
    each = each_of(
        rows("nada", "green lipstick", (0.2, 0.4, 0.6)),
        rows("nada", "blue hair", (0.4, 0.6, 0.8)),
        rows("cfclip", "cyan skin", (1, 1, 1)),
    )
    long = tables.over_seeds(each).set_index(["group", "method", "metric"])
    line = long.loc["counterfactual", "nada", "success_after"]
    # by seed, over the two prompts: 0.3, 0.5, 0.7
    assert (
        line["mean"] == pytest.approx(0.5)
        and line.half == pytest.approx(T2 * 0.2 / np.sqrt(3), rel=1e-6)
        and line.seeds == 3
    )
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
    text = tables.sections(each)
    assert (
        text.index("## Counterfactual\n") < text.index("## Counterfactual, held out")
        and "| 60 ± 50" in text
        and "| 40 ± 50" in text
    )


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
    tables.curves(each), tables.tradeoff(each)


def test_one_seed_has_no_interval():
    each = each_of(rows("cfclip")).query("seed == 0")
    assert tables.over_seeds(each).half.isna().all()
    assert claims.decide(pd.Series([0.3]))[0] == claims.UNDECIDED


def test_what_nobody_reaches_is_not_compared():
    judged = claims.panel(
        each_of(rows("cfclip"), rows("nada")), each_of(rows("x")).iloc[:0], success_at=0.9
    ).set_index(["claim", "measure"])
    line = judged.loc["CF-CLIP keeps identity better than nada", "identity at success ≥ 90 %"]
    assert (line.verdict, line.why) == (claims.UNTESTED, "undefined in every training")


def test_two_settings_of_one_training_are_no_training():
    with pytest.raises(ValueError, match=r"2 runs of cfclip, green lipstick, 0 differ in other parameters"):
        each_of(rows("cfclip"), rows("cfclip", run="another"))
    with pytest.raises(ValueError, match=r"cfclip-green lipstick-0 has two rows of one face at strength 1"):
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
    assert (
        line["success % at identity ≥ 0.8"],
        line["identity at success ≥ 60 %"],
        line["open %"],
        line["reached %"],
    ) == ("60 ± 0", "0.8 ± 0", 0, 100)
    assert (
        tables
        .matched(each.drop(columns="identity"), "identity", 0.8, "success_after")
        .success_after.isna()
        .all()
    )


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [((0.1, 0.1, 0.2), claims.HOLDS), ((0.9, 0.9, 0.8), claims.FAILS), ((0.2, 0.9, 0.4), claims.UNDECIDED)],
)
def test_a_verdict_follows_the_numbers(theirs, verdict):
    each = each_of(rows("cfclip"), rows("nada", success=theirs))
    judged = claims.panel(each, each_of(rows("x")).iloc[:0])
    line = judged[
        judged.claim.eq("CF-CLIP edits counterfactual prompts better than nada")
        & judged.measure.eq("success at strength 1")
    ].iloc[0]
    d = 0.5 - np.array(theirs)
    assert line.verdict == verdict and line.difference == pytest.approx(d.mean())
    assert line.half == pytest.approx(T2 * d.std(ddof=1) / np.sqrt(3), rel=1e-6)
    assert f"50 % against {100 * np.mean(theirs):.3g} %" in line.why and "of 1 prompts; 3 seeds" in line.why
    assert (judged.verdict[judged.claim.str.contains("styleclip-global")] == claims.UNTESTED).all()
    assert "no runs of styleclip-global" in set(judged.why)
    assert (judged.verdict[judged.claim.isin(claims.PARTS.values())] == claims.UNTESTED).all()
    assert set(judged.verdict[judged.measure.isin(["user study", "the paper's tables"])]) == {claims.UNTESTED}
    claims.figure(judged)


def test_pairs_are_of_the_same_prompt_and_seed():
    # each pair differs by 0.1, though seeds and prompts differ by far more: unpaired, nothing could be told
    ours = rows("cfclip", success=(0.2, 0.5, 0.8)), rows("cfclip", "blue hair", (0.7, 0.4, 0.3))
    theirs = (
        rows("nada", success=(0.1, 0.4, 0.7)),
        rows("nada", "blue hair", (0.6, 0.3, 0.2)),
        rows("nada", "red lipstick", (1, 1, 1)),
    )
    result = claims.compare(each_of(*ours, *theirs), "cfclip", "nada", "success_after")
    assert (
        result["verdict"] == claims.HOLDS
        and result["difference"] == pytest.approx(0.1)
        and "ahead on 2 of 2 prompts" in result["why"]
    )


def test_rankings_agree_or_not():
    def each(sign: int) -> pd.DataFrame:
        return each_of(
            *(
                rows(method, clip_after=20 + i, heldout_clip_after=20 + sign * i)
                for i, method in enumerate(("cfclip", "nada", "styleclip-global"))
            )
        )

    assert claims.agreement(each(1), "clip_after", "heldout_clip_after")["verdict"] == claims.HOLDS
    assert claims.agreement(each(-1), "clip_after", "heldout_clip_after") | {"why": ""} == {
        "verdict": claims.FAILS,
        "why": "",
        "difference": -1,
        "half": 0,
    }
    assert claims.agreement(each(1), "clip_after", "nothing") == {
        "verdict": claims.UNTESTED,
        "why": "no metric nothing",
    }
    assert (
        claims.agreement(each(1).query("method != 'nada'"), "clip_after", "heldout_clip_after")["verdict"]
        == claims.UNTESTED
    )


def test_ablation_rows_are_kept_apart_from_methods():
    own = [
        row | {"notebook": "03_ablation_directions", "row": row["method"]}
        for name in ("negatives: none", "CF-CLIP")
        for row in rows(name, "purple eyebrows", (0.2, 0.2, 0.3) if name != "CF-CLIP" else (0.8, 0.9, 0.8))
    ]
    table = pd.DataFrame(rows("cfclip") + [{k: v for k, v in row.items() if k != "method"} for row in own])
    each, ablated = tables.trainings(table), tables.trainings(table, by="row")
    assert list(each.method.cat.categories) == ["cfclip"] and list(ablated.method.cat.categories) == [
        "CF-CLIP",
        "negatives: none",
    ]
    assert set(tables.ablation_rows(table).columns) == {
        *ablation.KEYS,
        "success_before",
        "success_after",
        "identity",
    }
    assert ablation.pretty(ablation.summarise(tables.ablation_rows(table)))["row"].tolist() == [
        "CF-CLIP",
        "negatives: none",
    ]
    judged = claims.panel(each, ablated).set_index(["claim", "measure"])
    assert judged.verdict["negatives contribute", "success at strength 1"] == claims.HOLDS
    assert judged.why["the text mapper contributes", "success at strength 1"] == "no runs of no text mapper"
    assert tables.budget(
        table, [{"run": run, "seconds": 2.0} for run in table.run.unique()]
    ).method.tolist() == ["ablation", "cfclip"]


def test_what_is_written_is_the_same_twice(tmp_path):
    each = each_of(rows("cfclip"), rows("nada", success=(0.1, 0.2, 0.3)))
    judged = claims.panel(each, each.iloc[:0])
    for folder in ("a", "b"):
        figures = {
            "curves": tables.curves(each),
            "tradeoff": tables.tradeoff(each, marks=(0.8, 0.5)),
            "claims": claims.figure(judged),
        }
        tables.write(
            tmp_path / folder,
            {"claims": judged},
            {
                "README": tables.readme(
                    "begin", {"Claims": judged, "None": judged.iloc[:0]}, {"Claims": claims.RULE}, figures
                )
            },
            figures,
        )
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {
        "README.md",
        "claims.csv",
        *(f"{name}.{kind}" for name in ("curves", "tradeoff", "claims") for kind in ("png", "pdf")),
    }
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    text = (tmp_path / "a" / "README.md").read_text()
    assert "## Claims" in text and "## None" not in text and "![tradeoff](tradeoff.png)" in text
    assert (tmp_path / "a" / "curves.pdf").read_bytes().startswith(b"%PDF")


def test_runs_of_both_notebooks_and_their_pictures(domain, tmp_path):
    runs = tables.example(domain, tmp_path)
    table = gather(runs)
    assert len(table) == (8 + 4) * 2 * 2 and set(table.notebook) == {"02_training", "03_ablation_directions"}
    each, ablated = tables.trainings(table), tables.trainings(table, by="row")
    assert len(each) == 8 * 2 and len(ablated) == 4 * 2 and set(each.group) == {"counterfactual", "null edit"}
    told = (
        pd
        .concat([pd.read_json(path, lines=True) for path in tmp_path.glob("03_*/metrics.jsonl")])
        .groupby(["row", "seed", "strength"])
        .identity.mean()
    )
    for found in (
        ablated.rename(columns={"method": "row"}),
        tables.ablation_rows(table, 0.5),
        tables.ablation_rows(table, 1.0),
    ):
        for key, identity in (
            found.groupby(["row", "seed", "strength"], observed=True).identity.mean().items()
        ):
            assert identity == pytest.approx(told[key]), (
                "each strength by itself, though the notebook has one as well"
            )
    assert set(tables.ablation_rows(table, 0.5).strength) == {0.5}
    w = domain.latents(2, "test", 0)
    shown = tables.edits(table, runs, domain, w)
    assert list(shown) == ["green lipstick", "face"] and shown["face"].shape == (6, 3, 16, 16)
    assert torch.equal(shown["face"][3], domain.generator.synthesis(w)[1]), (
        "face by face: source, then the methods"
    )
    run = table[(table.method == "styleclip-mapper") & (table.prompt == "face") & (table.seed == 0)].run.iloc[
        0
    ]
    assert torch.equal(shown["face"][[2, 5]], baselines.load_editor(tmp_path / run, domain).edit(w, 1.0))
    tables.picture_grid(shown, ["cfclip", "styleclip-mapper"])
    assert "12 runs, 0 seconds" in tables.provenance(sweep.records(runs))


def test_names_in_the_papers_sweep_tell_its_runs_apart():
    spec = sweep.load_spec(NOTEBOOKS / "presets" / "paper-toonfaces.yaml")
    cells = [(cell, name) for block in spec.grid for cell, name in sweep._cells(block)]
    assert len({name for _, name in cells}) == len(cells)
    assert "03_ablation_directions-purple-eyebrows-positive-text-direction-only-2" in {
        name for _, name in cells
    }
    ours = [cell for cell, _ in cells if cell["notebook"] == "03_ablation_directions"]
    assert {"CF-CLIP", *claims.PARTS} <= set(ablation.ROWS)
    assert [cell["rows"] for cell in ours] == [[row] for row in ablation.ROWS for _ in range(3)] and {
        cell["seeds"][0] for cell in ours
    } == {0, 1, 2}


SWEEP = """
parameters: {steps: 1, n: 2, batch: 1, train_latents: 1, preview: 1, faces: 1, strengths: [1.0]}
grid:
  - notebook: 02_training
    method: {cfclip: {draws: 1}, styleclip-optimization: }
    prompt: green lipstick
  - {notebook: 03_ablation_directions, rows: [[CF-CLIP], ["views: 1"]], seeds: [[0]]}
then:
  - notebook: 06_paper_tables
"""


@pytest.mark.slow
def test_a_sweep_from_end_to_end(tmp_path):
    (tmp_path / "small.yaml").write_text(SWEEP)
    runs = sweep.sweep(sweep.load_spec(tmp_path / "small.yaml"), tmp_path / "runs", tmp_path / "reports")
    assert len(runs) == 4
    folder = tmp_path / "reports" / "paper"
    assert {"README.md", "prompts.md", "claims.csv", "pictures.pdf", "ablation.png"} <= {
        path.name for path in folder.iterdir()
    }
    text = (folder / "README.md").read_text()
    assert (
        "An example" not in text
        and "views: 1" in text
        and "styleclip-optimization" in text
        and "4 runs" in text
    )
    assert claims.UNTESTED in set(pd.read_csv(folder / "claims.csv").verdict)


def test_the_budget_is_what_a_run_really_took():
    table = pd.DataFrame([
        {"run": run, "method": method, "steps": 700, "n": 4, "seed": seed, "settings": given}
        for run, method, seed, given in (
            ("a", "cfclip", 0, {}),
            ("b", "cfclip", 1, {}),
            ("c", "nada", 0, {"steps": 9}),
            ("d", "styleclip-global", 0, {}),
        )
    ])
    found = tables.budget(
        table, [{"run": run, "seconds": seconds} for run, seconds in zip("abcd", (10, 30, 5, 1), strict=True)]
    )
    assert found.set_index("method")[["runs", "steps", "seeds", "seconds a run"]].to_dict("index") == {
        "cfclip": {"runs": 2, "steps": "700", "seeds": "0, 1", "seconds a run": "20"},
        "nada": {"runs": 1, "steps": "9", "seeds": "0", "seconds a run": "5"},
        "styleclip-global": {"runs": 1, "steps": "", "seeds": "0", "seconds a run": "1"},
    }
