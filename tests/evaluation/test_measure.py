"""What is measured of an editor, against numbers worked out here."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import cfclip
from cfclip.baselines import methods as baselines
from cfclip.evaluation import measure as evaluation
from cfclip.evaluation import metrics
from cfclip.images import to_tensor
from cfclip.models.clip import ClipGuide
from cfclip.toonfaces.clip import build
from cfclip.toonfaces.factors import sample_face
from cfclip.toonfaces.render import MASKS, render_image


@pytest.fixture(scope="module")
def toonfaces():
    return cfclip.load_domain("toonfaces")


class Centre(nn.Module):
    """An encoder that sees the same face in every photo."""

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


def unit(x):
    x = x.double().numpy()
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_a_held_out_clip_judges_as_the_other_does(domain):
    torch.manual_seed(2)
    heldout = ClipGuide(build("toonfaces-convnext"))
    a, b = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    assert not any(
        "heldout" in name for name in metrics.evaluate(metrics.Edit(domain, "green lipstick", a, b))
    )
    found = metrics.evaluate(
        metrics.Edit(dataclasses.replace(domain, heldout_clip=heldout), "green lipstick", a, b)
    )
    with torch.no_grad():
        before, after = (unit(heldout.encode_image(x)) for x in (a, b))
    target, source = (heldout.template_features(text).double().numpy() for text in ("green lipstick", "face"))
    text, moved = target.mean(0) / np.linalg.norm(target.mean(0)), after - before
    step = (target - source).mean(0)
    assert found["heldout_clip_before"] == pytest.approx(100 * before @ text, abs=1e-3)
    assert found["heldout_clip_after"] == pytest.approx(100 * after @ text, abs=1e-3)
    assert found["heldout_direction"] == pytest.approx(
        100 * moved @ step / np.linalg.norm(moved, axis=1) / np.linalg.norm(step), abs=0.2
    )


def test_kid_by_hand():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 2, (3, 2)), rng.normal(0, 1, (4, 2))
    x, y = ((v - b.mean(0)) / b.std(0) for v in (a, b))
    kernel = lambda u, v: (u @ v / 2 + 1) ** 3  # noqa: E731
    expected = (
        sum(kernel(x[i], x[j]) for i in range(3) for j in range(3) if i != j) / 6
        + sum(kernel(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
        - 2 * sum(kernel(u, v) for u in x for v in y) / 12
    )
    assert metrics.kid(a, b) == pytest.approx(expected)


def test_a_set_is_nearest_to_the_renders_it_came_from(toonfaces):
    faces = [sample_face((79, k)) for k in range(48)]
    natural, blue = (
        to_tensor([render_image(f) for f in group])
        for group in (faces, [f.with_colour("hair", "blue") for f in faces])
    )
    nothing, right = (
        metrics.kid_to_renders(metrics.Edit(toonfaces, "blue hair", natural, x)) for x in (natural, blue)
    )
    assert (
        abs(nothing["kid_natural"]) < nothing["kid_counterfactual"] / 3
        and abs(right["kid_counterfactual"]) < right["kid_natural"] / 3
    )
    assert set(metrics.kid_to_renders(metrics.Edit(toonfaces, "face", natural, blue))) == {"kid_natural"}
    assert metrics.kid_to_renders(metrics.Edit(toonfaces, "blue hair", natural[:1], blue[:1])) == {}


def test_the_true_counterfactual_is_no_distance_from_itself(toonfaces):
    domain = dataclasses.replace(toonfaces, encoder=Centre(toonfaces.generator))
    known = evaluation.truth(domain, "blue beard", 3)
    assert all(name is not None for name in domain.readout.measure(known.renders).colour("beard"))
    beard, changed = (
        domain.readout.measure(known.renders).masks[:, MASKS.index("beard")],
        (known.renders != known.wanted).any(1).numpy(),
    )
    assert beard[changed].mean() > 0.5 and beard[~changed].mean() < 0.1
    right = known.columns(stub(domain, "blue beard", lambda w, s: known.wanted), 1.0)
    wrong = known.columns(stub(domain, "blue beard", lambda w, s: known.renders), 1.0)
    assert right["truth_distance"].max() < 1e-6 and right["success_inverted"].mean() > 0.6
    assert wrong["truth_distance"].min() > 1e-3 and wrong["success_inverted"].tolist() == [0, 0, 0]
    with torch.no_grad():
        distance = metrics.perceptual_distance(domain)[1]
        centre = domain.generator.synthesis(domain.generator.w_avg.expand(1, domain.generator.num_ws, -1))
        assert right["truth_floor"] == pytest.approx(
            [distance(centre, x[None]).item() for x in known.renders], rel=1e-4
        )
    assert evaluation.truth(dataclasses.replace(toonfaces, encoder=None), "blue beard", 3) is None
    assert evaluation.truth(domain, "face", 3) is None


def test_a_null_edit_leaks_wherever_it_moves(toonfaces):
    faces = [face for face in (sample_face((78, k)) for k in range(8)) if face.has_hair][:4]
    source, moved = (
        to_tensor([render_image(f) for f in group])
        for group in (faces, [f.with_colour("hair", "blue") for f in faces])
    )
    edit = metrics.Edit(toonfaces, "face", source, moved)
    found = metrics.evaluate(edit)
    assert not any(name.startswith("success") for name in found)
    spread = np.concatenate(metrics.natural_spread(toonfaces))
    expected = np.nanmean(np.concatenate(metrics.movement(edit.before.seen, edit.after.seen), 1) / spread, 1)
    assert found["leakage"] == pytest.approx(expected)
    assert (
        found["leakage"]
        > metrics.ground_truth(metrics.Edit(toonfaces, "blue hair", edit.before, moved))["leakage"]
    ).all()
    assert "leakage" not in metrics.evaluate(metrics.Edit(toonfaces, "happy", edit.before, moved))


def test_sources_are_looked_at_once(domain, monkeypatch):
    asked = []
    honest = domain.readout.measure
    monkeypatch.setattr(domain.readout, "measure", lambda images: asked.append(len(images)) or honest(images))
    monkeypatch.setattr(metrics, "natural_spread", lambda domain: (np.ones(len(MASKS)),) * 2)
    w = domain.latents(3, "test")
    together = metrics.over_strengths(
        domain, "green lipstick", lambda w, s: domain.generator.synthesis(w + s), w, [0.5, 1.0]
    )
    assert asked == [3, 3, 3]
    alone = metrics.over_strengths(
        domain, "green lipstick", lambda w, s: domain.generator.synthesis(w + s), w, [1.0]
    )
    assert together[3:] == alone


@pytest.mark.parametrize("method", baselines.METHODS)
def test_a_row_holds_all_there_is(method, domain):
    domain = dataclasses.replace(domain, encoder=Centre(domain.generator), heldout_clip=domain.clip)
    editor = baselines.fit(
        method,
        domain,
        "blue skin",
        progress=False,
        **baselines.accepted(
            method, {"steps": 2, "train_latents": 4, "samples": 2, "style_samples": 20, "beta": 0.0}
        ),
    )
    rows = evaluation.measure(editor, domain.latents(2, "test"), [0.0, 1.0])
    assert [(row["strength"], row["index"]) for row in rows] == [(0.0, 0), (0.0, 1), (1.0, 0), (1.0, 1)]
    name, _ = metrics.perceptual_distance(domain)
    wanted = {
        "clip_after",
        "heldout_clip_after",
        "heldout_direction",
        "identity",
        name,
        "kid_natural",
        "kid_counterfactual",
        "truth_distance",
        "truth_floor",
    }
    back = {"round_trip_identity", f"round_trip_{name}"}
    assert all(
        wanted <= row.keys() and (back <= row.keys()) == (method != "styleclip-optimization") for row in rows
    )
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert (
        rows[0]["kid_natural"] == rows[1]["kid_natural"] and rows[0]["truth_floor"] == rows[2]["truth_floor"]
    )
    assert rows[0]["identity"] == pytest.approx(1, abs=1e-5) and rows[0].get(
        "round_trip_identity", 1
    ) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("prompt", "group"),
    [
        ("green lipstick", "counterfactual"),
        ("a man with a blue beard", "counterfactual"),
        ("cyan skin", "counterfactual, held out from CLIP"),
        ("red lipstick", "in the domain"),
        ("blonde hair", "in the domain"),
        ("face", "null edit"),
        ("a happy face", "other"),
    ],
)
def test_groups(prompt, group):
    assert evaluation.group_of(prompt) == group


def test_groups_follow_the_source_text():
    assert evaluation.group_of("face", "dog") == "other" and evaluation.group_of("dog", "dog") == "null edit"
