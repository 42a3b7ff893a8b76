"""What is measured of an editor, against numbers computed here."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import cfclip
from cfclip.baselines.methods import METHODS, fit, settings
from cfclip.domain import GROUPS
from cfclip.evaluation import metrics
from cfclip.evaluation.kid import kid, kid_to_renders
from cfclip.evaluation.measure import TrueEdits, measure
from cfclip.images import to_tensor
from cfclip.models.clip import ClipGuide
from cfclip.toonfaces.clip import build
from cfclip.toonfaces.factors import sample_face
from cfclip.toonfaces.render import render_image


@pytest.fixture(scope="module")
def toonfaces():
    return cfclip.load_domain("toonfaces")


class Centre(nn.Module):
    """An encoder that returns the average code for every photo."""

    def __init__(self, generator):
        super().__init__()
        self.image_size, self.w = generator.resolution, generator.w_avg.expand(generator.num_ws, -1)

    def forward(self, photos):
        return self.w.expand(len(photos), -1, -1)


def stub(domain, prompt, edit):
    """An editor that is only its ``edit``."""
    return SimpleNamespace(
        domain=domain, config=SimpleNamespace(prompt=prompt), edit=edit, round_trip=lambda w, strength: None
    )


def drawn(faces):
    return to_tensor([render_image(face) for face in faces])


def unit(x):
    x = x.double().numpy()
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_a_held_out_clip_scores_as_the_other_does(domain):
    torch.manual_seed(2)
    heldout = ClipGuide(build("toonfaces-convnext"))
    a, b = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    without = metrics.evaluate(metrics.Edit(domain, "green lipstick", a, b))
    assert not any("heldout" in name for name in without)
    judged = dataclasses.replace(domain, heldout_clip=heldout)
    scores = metrics.evaluate(metrics.Edit(judged, "green lipstick", a, b))
    with torch.no_grad():
        before, after = (unit(heldout.encode_image(x)) for x in (a, b))
    target, source = (heldout.template_features(text).double().numpy() for text in ("green lipstick", "face"))
    text, step = target.mean(0) / np.linalg.norm(target.mean(0)), (target - source).mean(0)
    moved = (after - before) / np.linalg.norm(after - before, axis=1, keepdims=True)
    assert scores["heldout_clip_before"] == pytest.approx(100 * before @ text, abs=1e-3)
    assert scores["heldout_clip_after"] == pytest.approx(100 * after @ text, abs=1e-3)
    assert scores["heldout_direction"] == pytest.approx(100 * moved @ step / np.linalg.norm(step), abs=0.2)


def test_kid_by_hand():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 2, (3, 2)), rng.normal(0, 1, (4, 2))
    x, y = ((v - b.mean(0)) / b.std(0) for v in (a, b))
    within = [
        np.mean([(u @ v / 2 + 1) ** 3 for u, v in itertools.permutations(points, 2)]) for points in (x, y)
    ]
    between = np.mean([(u @ v / 2 + 1) ** 3 for u, v in itertools.product(x, y)])
    assert kid(a, b) == pytest.approx(sum(within) - 2 * between)


def test_a_set_is_nearest_to_the_renders_it_came_from(toonfaces):
    faces = [sample_face((79, k)) for k in range(48)]
    natural, blue = drawn(faces), drawn([face.with_colour("hair", "blue") for face in faces])
    unchanged, right = (
        kid_to_renders(metrics.Edit(toonfaces, "blue hair", natural, x)) for x in (natural, blue)
    )
    assert abs(unchanged["kid_natural"]) < unchanged["kid_counterfactual"] / 3
    assert abs(right["kid_counterfactual"]) < right["kid_natural"] / 3
    assert set(kid_to_renders(metrics.Edit(toonfaces, "face", natural, blue))) == {"kid_natural"}
    assert kid_to_renders(metrics.Edit(toonfaces, "blue hair", natural[:1], blue[:1])) == {}


def test_the_true_counterfactual_has_no_distance_to_itself(toonfaces):
    domain = dataclasses.replace(toonfaces, encoder=Centre(toonfaces.generator))
    known = TrueEdits.of(domain, "blue beard", 3)
    seen = domain.truth.measure(known.renders)
    assert all(name is not None for name in seen.colour("beard"))
    beard = seen.masks[:, domain.truth.parts.index("beard")]
    changed = (known.renders != known.wanted).any(1).numpy()
    assert beard[changed].mean() > 0.5 and beard[~changed].mean() < 0.1
    right = known.columns(stub(domain, "blue beard", lambda w, s: known.wanted), 1.0)
    wrong = known.columns(stub(domain, "blue beard", lambda w, s: known.renders), 1.0)
    assert right["truth_distance"].max() < 1e-6 and right["success_inverted"].mean() > 0.6
    assert wrong["truth_distance"].min() > 1e-3 and wrong["success_inverted"].tolist() == [0, 0, 0]
    with torch.no_grad():
        between = domain.distance().between
        centre = domain.generator.synthesis(domain.generator.w_avg.expand(1, domain.generator.num_ws, -1))
        floor = [between(centre, render[None]).item() for render in known.renders]
    assert right["truth_floor"] == pytest.approx(floor, rel=1e-4)
    assert TrueEdits.of(dataclasses.replace(toonfaces, encoder=None), "blue beard", 3) is None
    assert TrueEdits.of(domain, "face", 3) is None


def test_a_null_edit_leaks_wherever_it_moves(toonfaces):
    faces = [face for face in (sample_face((78, k)) for k in range(8)) if face.has("hair")][:4]
    source, moved = drawn(faces), drawn([face.with_colour("hair", "blue") for face in faces])
    edit = metrics.Edit(toonfaces, "face", source, moved)
    columns = metrics.evaluate(edit)
    assert not any(name.startswith("success") for name in columns)
    spread = np.concatenate(metrics.natural_spread(toonfaces.truth))
    expected = np.nanmean(np.concatenate(metrics.movement(edit.before.seen, edit.after.seen), 1) / spread, 1)
    assert columns["leakage"] == pytest.approx(expected)
    asked_for = metrics.Edit(toonfaces, "blue hair", edit.before, moved)
    assert (columns["leakage"] > metrics.ground_truth(asked_for)["leakage"]).all()
    assert "leakage" not in metrics.evaluate(metrics.Edit(toonfaces, "happy", edit.before, moved))


def test_sources_are_measured_once(domain, monkeypatch):
    measured, honest = [], domain.truth.measure
    monkeypatch.setattr(
        domain.truth, "measure", lambda images: measured.append(len(images)) or honest(images)
    )
    monkeypatch.setattr(metrics, "natural_spread", lambda truth: (np.ones(len(truth.parts)),) * 2)
    w = domain.latents(3, "test")
    together, alone = (
        metrics.over_strengths(
            domain, "green lipstick", lambda w, s: domain.generator.synthesis(w + s), w, strengths
        )
        for strengths in ([0.5, 1.0], [1.0])
    )
    assert measured == [3, 2 * 3, 3, 3], "the sources once in each call, and all edits together"
    assert together[3:] == [pytest.approx(row, abs=1e-4) for row in alone]


@pytest.mark.parametrize("method", METHODS)
def test_a_row_has_all_columns_that_the_domain_allows(method, domain):
    domain = dataclasses.replace(domain, encoder=Centre(domain.generator), heldout_clip=domain.clip)
    short = {"steps": 2, "train_latents": 4, "samples": 2, "style_samples": 20, "beta": 0.0}
    given = {name: value for name, value in short.items() if name in settings(method)}
    editor = fit(method, domain, "blue skin", progress=False, **given)
    w = domain.latents(2, "test")
    rows = measure(editor, w, [0.0, 1.0], whole=None)
    assert [(row["strength"], row["index"]) for row in rows] == [(0.0, 0), (0.0, 1), (1.0, 0), (1.0, 1)]
    distance = domain.distance().name
    wanted = {"clip_after", "heldout_clip_after", "heldout_direction", "identity", "truth_distance"}
    wanted |= {distance, "truth_floor", "kid_natural", "kid_counterfactual"}
    back = {"round_trip_identity", f"round_trip_{distance}"}
    for row in rows:
        assert wanted <= row.keys() and (back <= row.keys()) == (method != "styleclip-optimization")
        assert all(np.isfinite(value) for value in row.values())
    assert rows[0]["kid_natural"] == rows[1]["kid_natural"]
    assert rows[0]["truth_floor"] == rows[2]["truth_floor"]
    for name in ("identity", "round_trip_identity"):
        assert rows[0].get(name, 1) == pytest.approx(1, abs=1e-5)
    lean = measure(editor, w, [0.0, 1.0])
    assert lean[2:] == rows[2:], "at strength 1 all is measured"
    left = {"truth_distance", "truth_floor", "success_inverted", "kid_natural", "kid_counterfactual"} | back
    assert lean[:2] == [{name: row[name] for name in row if name not in left} for row in rows[:2]]


@pytest.mark.parametrize(
    ("prompt", "group"),
    [
        ("green lipstick", "counterfactual"),
        ("a man with a blue beard", "counterfactual"),
        ("purple skin", "counterfactual, held out from CLIP"),
        ("red lipstick", "in the domain"),
        ("blonde hair", "in the domain"),
        ("face", "null edit"),
        (" Face", "null edit"),
        ("a happy face", "other"),
    ],
)
def test_a_prompt_has_the_group_of_what_it_asks_for(prompt, group, domain):
    assert domain.group_of(prompt) == group and group in GROUPS


def test_the_null_edit_asks_for_the_source_text(domain):
    dogs = dataclasses.replace(domain, source_text="dog")
    assert dogs.group_of("face") == "other" and dogs.group_of("dog") == "null edit"
