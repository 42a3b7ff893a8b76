"""What frames a table, in the embedded world: doing nothing, the recoloured part, and the world's ceiling."""

import numpy as np
import pytest
import torch

import cfclip
from cfclip.evaluation import frames, metrics, tables


@pytest.fixture(scope="module")
def toonfaces():
    return cfclip.load_domain("toonfaces")


@pytest.mark.parametrize("prompt", ["green lipstick", "blue hair", "purple eyes", "red glasses"])
@torch.no_grad()
def test_a_composite_succeeds_and_leaves_the_rest_alone(toonfaces, prompt):
    d, w = toonfaces, toonfaces.latents(8, "test")
    source = d.generator.synthesis(w)
    edited = frames.recolour(d.truth, source, d.truth.claim(prompt))
    scores = metrics.evaluate(metrics.Edit(d, prompt, source, edited))
    assert np.nanmean(scores["success_after"]) > 0.85 and np.nanmean(scores["progress"]) > 0.6
    assert scores["leakage"].mean() < 0.15 and scores["identity"].mean() > 0.9
    outside = d.truth.masks(source)[:, d.truth.parts.index(d.truth.claim(prompt)[0])] < 1e-3
    moved = (edited - source.clamp(-1, 1)).abs().amax(1)
    assert moved[outside].max() < 0.01 < moved.max()


def test_a_face_without_the_part_stays_as_it_is(toonfaces):
    with torch.no_grad():
        source = toonfaces.generator.synthesis(toonfaces.latents(12, "test")).clamp(-1, 1)
    has = toonfaces.truth.measure(source).has("beard")
    edited = frames.recolour(toonfaces.truth, source, ("beard", "blue"))
    moved = (edited - source).abs().amax((1, 2, 3)).numpy()
    assert 0 < has.sum() < 12 and moved[has].min() > 0.1 and np.median(moved[~has]) < 0.05


def test_the_frames_are_the_ends_of_the_table(toonfaces):
    limit = [{"prompt": "green lipstick", "success_before": 0.0, "success_after": 1.0, "identity": 0.98}]
    limit[0] |= {"progress": 0.97, "leakage": 0.17, "clean": 1.0, "n": 6}
    table = frames.frames(toonfaces, ["green lipstick", "face"], (0, 1), 3, limit)
    assert table.groupby(["method", "prompt"]).size().to_dict() == {
        ("do nothing", "green lipstick"): 6,
        ("do nothing", "face"): 6,
        ("composite", "green lipstick"): 6,
        ("ceiling", "green lipstick"): 1,
    }
    best = tables.headline(tables.trainings(table, toonfaces.group_of))
    means = best.groupby(["group", "method"], observed=True)[["area", "clean", "leakage_beyond"]].mean()
    asked = means.loc["counterfactual"]
    assert asked.area["do nothing"] == 0 and asked.area["composite"] > 0.9
    assert asked.area["ceiling"] == pytest.approx(0.39 / 0.4)
    assert asked.leakage_beyond["do nothing"] == pytest.approx(-0.17) and asked.clean["composite"] > 0.9
    order = tables.headline_table(best).query("group == 'counterfactual'").method.tolist()
    assert order[-1] == "do nothing"
