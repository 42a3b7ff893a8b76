"""The paper's tables: means, intervals and verdicts by hand, on rows that were made up."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from example import example

from cfclip.baselines.library import load_editor
from cfclip.baselines.methods import METHODS
from cfclip.evaluation import ablation, claims, figures, report, tables
from cfclip.evaluation.stats import crossed, half_width, plan
from cfclip.experiments import gather, load_spec, records, sweep
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
        table.loc["null edit", "success % ↑"] == "–" and table.loc["null edit", "identity ↑"] == "0.90 ± 0.25"
    )
    best = tables.headline(each).set_index(["group", "seed"])
    assert best.area["null edit"].isna().all() and best.area["counterfactual"].notna().all()
    assert tables.headline_table(best.reset_index())["area % ↑"].tolist()[1] == "–"
    figures.tradeoff(each)


def test_success_is_that_of_the_faces_that_have_the_part():
    """Of four faces two have none, and are left out of the mean of a training."""
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
    assert each.loc[0, ["success_after", "progress", "identity"]].tolist() == [0.5, 0.5, 1.0]
    table = tables.wide(tables.over_seeds(each), ["method"])
    assert list(table)[1:] == ["success before %", "success % ↑", "progress ↑", "identity ↑"]
    assert table.loc[0, "success % ↑"] == "50" and table.loc[0, "progress ↑"] == "0.5"


def test_a_training_whose_faces_all_lack_the_part_is_left_out():
    bare = [row | {"success_before": np.nan, "success_after": np.nan} for row in rows("cfclip", "blue beard")]
    each = each_of(bare, rows("cfclip", "green lipstick"), rows("nada", "blue beard"))
    assert each[each.method == "cfclip"].prompt.unique().tolist() == ["green lipstick"]
    (line,) = claims.judge(tables.headline(each)).query("claim == 'CF-CLIP edits better than nada'").why
    assert line == "no prompt and seed at which both are defined"


def test_one_seed_has_no_interval_and_no_verdict():
    each = each_of(rows("cfclip"), rows("nada", success=(0.1,) * 3)).query("seed == 0")
    assert tables.over_seeds(each).half.isna().all()
    assert verdict_of(tables.headline(each)).verdict == claims.UNDECIDED


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


def curve(*points):
    """(identity, success) at growing strength, from the source on."""
    return (np.array(values, float) for values in zip((1, 0), *points, strict=True))


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 0)], 0),  # does nothing
        ([(1, 1)], 1),  # succeeds, and it is the same person
        ([(0.6, 1)], 0.5),  # a straight line: a triangle
        ([(0.9, 1), (0.2, 1)], 0.875),  # (0.3 + 0.1 / 2) / 0.4
        ([(0.8, 0.5)], 0.375),  # never beyond the largest strength: (0.2 * 0.5 + 0.2 * 0.5 / 2) / 0.4
        ([(0.2, 1)], 0.25),  # half of success at 0.6: 0.4 * 0.5 / 2 / 0.4
        ([(0.8, 1), (0.7, 0.2)], 0.75),  # a larger strength that fails costs nothing
        ([(0.8, 0), (0.8, 1)], 0.5),  # a jump
        ([(0.5, 0), (0.4, 1)], 0),  # succeeds only as another person
        # a curve may come back, above the way there: (0.1 * 0.8 + 0.2 * 0.6 + 0.1 * 0.8 / 6) / 0.4
        ([(0.7, 0.8), (0.9, 0.4)], 0.53333333),
    ],
)
def test_the_area_under_success_over_identity_by_hand(points, expected):
    assert tables.area(*curve(*points)) == pytest.approx(expected, abs=1e-6)


def test_an_area_is_read_at_each_trainings_own_best_strength():
    """The most clean success, of equals the most progress; leakage is told above the ceiling's."""
    steps = [
        (0.5, 0.4, 0.0, 0.3, 0.1),
        (1.0, 0.8, 0.6, 0.7, 0.2),
        (1.5, 0.9, 0.6, 0.9, 0.25),
        (2.0, 1, 0.1, 1, 2),
    ]
    scored = [
        rows("cfclip", success=(s,), identity=(1 - 0.1 * at,), strength=at, clean=c, progress=p, leakage=leak)
        for at, s, c, p, leak in steps
    ]
    limit = rows("ceiling", success=(1,), identity=(0.98,), clean=1.0, progress=1.0, leakage=0.15)
    best = tables.headline(each_of(*scored, limit)).set_index("method")
    line = best.loc["cfclip"]
    assert (line.strength, line.clean, line.progress) == (1.5, 0.6, 0.9)
    assert line.leakage_beyond == pytest.approx(0.1) and best.leakage_beyond["ceiling"] == 0
    assert best.area["ceiling"] == pytest.approx((0.38 + 0.01) / 0.4)
    assert line.open == 0, "it succeeds at strength 2"


def test_a_curve_that_could_go_on_is_open():
    def is_open(identity, success):
        return tables.headline(each_of(rows("cfclip", success=(success,), identity=(identity,)))).open.iloc[0]

    assert is_open(0.7, 0.5) == 1 and is_open(0.6, 0.5) == 0 and is_open(0.7, 1.0) == 0


def test_the_table_begins_with_the_largest_area():
    each = each_of(
        rows("cfclip", success=(0.2,) * 3),
        rows("nada", success=(0.9,) * 3),
        rows("do nothing", success=(0,) * 3),
    )
    table = tables.headline_table(tables.headline(each))
    assert table.method.tolist() == ["nada", "cfclip", "do nothing"]
    # identity 0.9, success 0.9: (0.3 * 0.9 + 0.1 * 0.9 / 2) / 0.4
    assert table["area % ↑"].tolist() == ["78.8 ± 0", "17.5 ± 0", "0 ± 0"]
    assert table["open %"].tolist() == ["100", "100", "100"]


def verdict_of(best, claim="CF-CLIP edits better than nada"):
    return claims.judge(best).set_index("claim").loc[claim]


PROMPTS = ("green lipstick", "blue hair", "purple eyebrows", "green skin")


def compared(theirs, ours=0.5, identity=0.9):
    """Headlines of CF-CLIP and of nada, whose success is ``theirs`` [prompt][seed]."""
    parts = []
    for prompt, success in zip(PROMPTS, theirs, strict=False):
        same = {"prompt": prompt, "identity": (identity,) * len(success)}
        parts += [
            rows("cfclip", success=(ours,) * len(success), **same),
            rows("nada", success=success, **same),
        ]
    return tables.headline(each_of(*parts))


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [
        ([(0.1, 0.1, 0.2), (0.1, 0.2, 0.1), (0.2, 0.1, 0.1)], claims.HOLDS),
        ([(0.9, 0.9, 0.8), (0.9, 0.8, 0.9), (0.8, 0.9, 0.9)], claims.FAILS),
        ([(0.5, 0.51, 0.49), (0.49, 0.5, 0.51), (0.51, 0.49, 0.5)], claims.EQUAL),
        ([(0.2, 0.9, 0.4), (0.9, 0.1, 0.3), (0.6, 0.4, 0.9)], claims.UNDECIDED),
        ([(0.1, 0.1, 0.1), (0.8, 0.8, 0.8)], claims.UNDECIDED),  # sharp over seeds, and not over prompts
    ],
)
def test_a_verdict_follows_the_numbers(theirs, verdict):
    best = compared(theirs)
    line = verdict_of(best)
    # at identity 0.9 an area is 0.875 of the success
    expected = crossed(0.875 * (0.5 - pd.DataFrame(theirs)))
    assert line.verdict == verdict
    assert [line.difference, line.half, line.p] == pytest.approx([expected.mean, expected.half, expected.p])
    assert f"43.8 against {87.5 * np.mean(theirs):.3g}: " in line.why and "3 seeds" in line.why
    others = claims.judge(best).set_index("claim").drop(line.name)
    assert set(others.verdict) == {claims.UNTESTED}
    assert others.why["CF-CLIP edits better than styleclip-global"] == "no runs of styleclip-global"
    assert others.why["negatives contribute"] == "no runs of CF-CLIP and negatives: none"
    claims.figure(claims.judge(best))


def test_holm_takes_back_what_one_of_several_comparisons_finds():
    alone = compared([(0.3, 0.35, 0.35), (0.2, 0.2, 0.3), (0.35, 0.3, 0.4)])
    sharp = verdict_of(alone)
    assert sharp.verdict == claims.HOLDS and 0.05 / 6 < sharp.p < 0.05
    text = alone.astype({"method": str})
    others = [name for name in METHODS if name not in ("cfclip", "nada")]
    area = [0.1, 0.9, 0.4, 0.9, 0.1, 0.3, 0.6, 0.4, 0.9]
    noise = [text[text.method == "nada"].assign(method=name, area=area) for name in others]
    among = verdict_of(pd.concat([text, *noise]))
    assert among.p == pytest.approx((1 + len(others)) * sharp.p) and among.verdict == claims.UNDECIDED
    assert (among.difference, among.half) == (sharp.difference, sharp.half)


def test_a_pilot_says_how_many_prompts_and_seeds_are_needed():
    best = compared([(0.1, 0.3, 0.2), (0.2, 0.2, 0.1), (0.3, 0.1, 0.1)])
    planned = claims.planned(best)
    spread = crossed(claims.differences(best, "cfclip", "nada")).spread
    assert planned.to_dict() == plan([spread], len(claims.CLAIMS)).to_dict() and len(planned)
    with pytest.raises(ValueError, match="run it with more of both"):
        claims.planned(best[best.seed == 0])


def test_there_are_at_most_a_dozen_claims_of_what_can_be_run():
    assert len(claims.CLAIMS) <= 12
    known = {*METHODS, *ablation.ROWS}
    assert all({one.ours, one.other} <= known for one in claims.CLAIMS)


def test_pairs_are_of_the_same_prompt_and_seed():
    # each pair differs by 0.1, while seeds and prompts differ by far more: unpaired, it would be undecided
    ours = rows("cfclip", success=(0.2, 0.5, 0.8)), rows("cfclip", "blue hair", (0.7, 0.4, 0.3))
    theirs = (
        rows("nada", success=(0.1, 0.4, 0.7)),
        rows("nada", "blue hair", (0.6, 0.3, 0.2)),
        rows("nada", "red lipstick", (1, 1, 1)),  # in the domain: no claim is about it
    )
    line = verdict_of(tables.headline(each_of(*ours, *theirs)))
    assert line.verdict == claims.HOLDS and line.difference == pytest.approx(0.0875)
    assert "ahead on 2 of 2 prompts" in line.why


def test_words_that_clip_never_saw_together_are_beside_the_verdict():
    seen = [rows("cfclip", success=(0.5,) * 3), rows("nada", success=(0.5,) * 3)]
    unseen = [rows("cfclip", "cyan hair", (0.9,) * 3), rows("nada", "cyan hair", (0.1,) * 3)]
    line = verdict_of(tables.headline(each_of(*seen, *unseen)))
    assert line.difference == 0 and "ahead on 0 of 1 prompt," in line.why and line.unseen == "+70"
    assert verdict_of(tables.headline(each_of(*seen))).unseen == ""


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
    judged = claims.judge(tables.headline(ablated)).set_index("claim")
    assert judged.difference["negatives contribute"] == pytest.approx(0.875 * 0.6)
    assert judged.verdict["negatives contribute"] == claims.UNDECIDED, "one prompt"
    assert judged.why["the text mapper contributes"] == "no runs of no text mapper"
    seconds = [{"run": run, "seconds": 2.0} for run in table.run.unique()]
    assert tables.budget(table, seconds).method.tolist() == ["ablation", "cfclip"]
    # without a row CF-CLIP the method's runs with the same prompts and seeds are it
    beside = table[table.get("row") != "CF-CLIP"]
    beside = pd.concat([beside, pd.DataFrame(rows("cfclip", "purple eyebrows", (0.8, 0.9), (0.9, 0.9)))])
    beside = beside[(beside.prompt != "purple eyebrows") | (beside.seed < 2)]
    ablated = tables.trainings(beside, group_of, by="row")
    assert list(ablated.method) == ["CF-CLIP"] * 2 + ["negatives: none"] * 2
    assert set(ablated.prompt) == {"purple eyebrows"}, "cfclip's green lipstick has no rows beside it"
    assert ablated.success_after.tolist() == pytest.approx([0.8, 0.9, 0.2, 0.2])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "first guide"),
        ({"guides": 2}, "both guides"),
        ({"guides": 2, "guide_weights": [1.0, 0.5]}, "both guides"),
        ({"guides": 2, "guide_weights": [1e-6, 1.0]}, "second guide"),
        ({"steps": 300}, "first guide"),
        ({"steps": 50_000}, "published budget"),
    ],
)
def test_a_run_belongs_to_one_variant_of_the_comparison(settings, expected):
    assert tables.variant(settings) == expected and expected in tables.VARIANTS


def test_figures_are_written_and_the_same_twice(tmp_path):
    each = each_of(rows("cfclip"), rows("nada", success=(0.1, 0.2, 0.3)))
    judged = claims.judge(tables.headline(each))
    for folder in ("a", "b"):
        drawn = {"tradeoff": figures.tradeoff(each), "claims": claims.figure(judged)}
        both = [tables.headline(each).assign(variant=name) for name in tables.VARIANTS[:2]]
        drawn["guides"] = figures.guides_figure(pd.concat(both))
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
    specs = [
        load_spec(NOTEBOOKS / "presets" / f"paper-toonfaces{more}.yaml")
        for more in ("", "-held", "-more", "-budget")
    ]
    blocks = [list(cells(block)) for spec in specs for block in spec.grid]
    for block in blocks:
        assert len({name for _, name in block}) == len(block)
    every = [cell for block in blocks for cell, _ in block]
    ablated = [cell for cell in every if cell["notebook"] == "03_ablation_directions"]
    assert {cell["rows"][0] for cell in ablated} == set(ablation.ROWS)
    assert {len(cell["rows"]) for cell in ablated} == {len(cell["seeds"]) for cell in ablated} == {1}
    methods = [cell for cell in every if cell["notebook"] == "02_training"]
    assert {cell["method"] for cell in methods} == set(METHODS)
    tuned = load_spec(NOTEBOOKS / "presets" / "paper-toonfaces-tuning.yaml")
    trials = [cell for block in tuned.grid for cell, _ in cells(block)]
    shown = {prompt for cell in every for prompt in cell.get("prompts", [cell.get("prompt")])}
    assert not {cell["prompt"] for cell in trials} & shown
    assert not {cell["seed"] for cell in trials} & {cell["seed"] for cell in methods}
    sizes = (
        pd.DataFrame(trials).groupby("method").settings.agg(lambda given: len({str(one) for one in given}))
    )
    assert {*sizes.index} == {*METHODS} and sizes.min() == 9, "the same number of trials for every method"
    assert sizes.max() - sizes.min() <= 2, "but for one or two where the best one was at an edge"


SWEEP = """
parameters:
  {settings: {steps: 1, batch: 1, train_latents: 1}, n: 2, preview: 1, faces: 1, strengths: [1.0], ceiling: 1}
grid:
  - notebook: 02_training
    method: {cfclip: , styleclip-optimization: {settings: {steps: 1, batch: 1}}}
    prompt: green lipstick
  - {notebook: 03_ablation_directions, rows: [[CF-CLIP], ["views: 1"]], prompts: [[blue hair]], seeds: [[0]]}
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
    runs = [
        ("cfclip", 0, {}),
        ("cfclip", 1, {}),
        ("nada", 0, {"steps": 9, "lr": 0.5}),
        ("styleclip-global", 0, {}),
    ]
    seconds = (10, 30, 5, 1)
    table = pd.DataFrame([
        {"run": run, "method": method, "steps": 700, "n": 4, "seed": seed, "settings": given}
        for run, (method, seed, given) in enumerate(runs)
    ])
    budget = tables.budget(table, [{"run": run, "seconds": one} for run, one in enumerate(seconds)])
    assert budget.drop(columns="pictures").to_numpy().tolist() == [
        ["cfclip", 2, "–", "–", "–", "0, 1", "20"],
        ["nada", 1, "9", "0.5", "–", "0", "5"],
        ["styleclip-global", 1, "–", "–", "–", "0", "1"],
    ]
