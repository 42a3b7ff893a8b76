"""Inversion on a tiny generator whose codes are known, and its regularisers against their formulas."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from cfclip.evaluation import metrics
from cfclip.evaluation.figures import tradeoff_curves
from cfclip.evaluation.inversions import tradeoff
from cfclip.inversion import projector
from cfclip.inversion.projector import InversionConfig
from cfclip.models.mapper import Mapper, MapperConfig

QUICK = InversionConfig(steps=80, noise_maps=False, w_noise=0.0)


def invert(domain, photos, config, start=None, **changes):
    return projector.invert(domain, photos, dataclasses.replace(config, **changes), start, progress=False)


def column(inversion, name):
    return np.array([row[name] for row in inversion.metrics])


@pytest.mark.parametrize("space", projector.SPACES)
def test_the_code_of_a_sample_is_found_again(still, sample, space):
    _, photos = sample()
    before = invert(still, photos, QUICK, steps=0)
    after = invert(still, photos, QUICK, space=space)
    assert torch.equal(before.w_plus, still.generator.w_avg.expand_as(before.w_plus))
    gained = column(after, "psnr") - column(before, "psnr")
    assert gained.min() > 4 and gained.max() > 15 and column(after, "psnr").min() > 38
    name = still.distance().name
    assert column(after, name).max() < 0.2 * column(before, name).min()
    assert after.log[-1]["loss"] < 0.2 * after.log[0]["loss"] and after.noise is None
    assert all((layer == after.w_plus[:, 0]).all() for layer in after.w_plus.unbind(1)) == (space == "w")
    torch.testing.assert_close(after.images, still.generator.synthesis(after.w_plus))


def test_photos_do_not_influence_each_other(still, sample):
    _, photos = sample(3)
    config = dataclasses.replace(QUICK, steps=5, w_noise=0.05)
    together, alone = invert(still, photos, config), invert(still, photos[:1], config)
    torch.testing.assert_close(together.w_plus[:1], alone.w_plus, rtol=1e-3, atol=1e-4)
    assert torch.equal(alone.w_plus, invert(still, photos[:1], config).w_plus)
    assert not torch.equal(alone.w_plus, invert(still, photos[:1], config, seed=1).w_plus)


def test_photos_of_several_batches_are_put_together_in_order(still, sample):
    w, photos = sample(67)  # batches hold at most 64 pictures
    config = dataclasses.replace(QUICK, steps=2, w_noise=0.05)
    together, last = invert(still, photos, config, w), invert(still, photos[64:], config, w[64:])
    torch.testing.assert_close(together.w_plus[64:], last.w_plus, rtol=1e-3, atol=1e-4)
    assert len(together.metrics) == len(together.images) == 67
    first = invert(still, photos[:64], config, w[:64])
    losses = [[row["loss"] for row in one.log] for one in (first, last, together)]
    assert losses[2] == pytest.approx((64 * np.array(losses[0]) + 3 * np.array(losses[1])) / 67)


def test_the_centre_penalty_keeps_w_near_the_centre(still, sample):
    _, photos = sample()
    near, free = (invert(still, photos, QUICK, steps=30, w_centre=weight) for weight in (10.0, 0.0))
    assert column(near, "centre_distance").max() < 0.5 * column(free, "centre_distance").min()


def test_the_centre_distance_of_samples_is_one(still, sample):
    g = still.generator
    w, _ = sample(500)
    distance = projector.centre_distance(g, w).square().mean().sqrt()
    assert distance.item() == pytest.approx(1, abs=0.1)
    signs = torch.tensor([1.0, -1.0]).repeat(g.w_dim // 2).expand(1, g.num_ws, -1)
    w = g.w_avg + 3 * projector.w_spread(g) * signs
    assert projector.centre_distance(g, w).item() == pytest.approx(3, rel=1e-4)


def test_a_start_is_kept_and_refined(still, sample):
    w, photos = sample()
    kept = invert(still, photos, InversionConfig(steps=0), w)
    torch.testing.assert_close(kept.w_plus, w)
    assert column(kept, "psnr").min() > 60
    # the first step changes nothing: lr starts at 0, and no noise is added to a start
    torch.testing.assert_close(invert(still, photos, InversionConfig(steps=1), w).w_plus, w)


def test_psnr_is_the_formula_for_clamped_pictures():
    a = torch.zeros(1, 3, 4, 4)
    assert projector.psnr(a, a + 0.2).item() == pytest.approx(10 * np.log10(4 / 0.04), abs=1e-3)
    same = projector.psnr(a + 1, a + 5).item()  # clamped to the same picture
    assert same == pytest.approx(10 * np.log10(4 / 1e-10))


def autocorrelation(x):
    """numpy, one map."""
    total = 0.0
    while True:
        total += np.mean(x * np.roll(x, 1, 0)) ** 2 + np.mean(x * np.roll(x, 1, 1)) ** 2
        if len(x) <= 8:
            return total
        x = (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4


def test_noise_autocorrelation_is_the_formula():
    maps = [torch.randn(2, 1, r, r, dtype=torch.float64).cumsum(-1) for r in (4, 8, 16, 32)]
    wanted = [sum(autocorrelation(x[k, 0].numpy()) for x in maps) for k in range(2)]
    assert projector.noise_autocorrelation(maps).tolist() == pytest.approx(wanted)


def test_noise_maps_are_optimised_where_they_are_used(domain):
    g = domain.generator
    for rgb in g.rgbs:
        rgb.weight.mul_(0.1)
    with torch.no_grad():
        photos = g.synthesis(domain.latents(2, "test"), "random").clamp(-1, 1)
    config = InversionConfig(steps=40, w_noise=0.0)
    free = invert(domain, photos, config)
    assert [tuple(x.shape) for x in free.noise] == [(2, 1, *conv.noise_const.shape) for conv in g.convs]
    for x in free.noise:
        torch.testing.assert_close(x.mean((1, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
        torch.testing.assert_close(x.square().mean((1, 2, 3)), torch.ones(2))
    assert "noise" in free.log[0] and free.synthesis_noise is free.noise
    torch.testing.assert_close(free.images, g.synthesis(free.w_plus, free.noise))
    fixed = invert(domain, photos, config, noise_maps=False)
    assert fixed.noise is None and fixed.synthesis_noise == "const" and "noise" not in fixed.log[0]
    unweighted = invert(domain, photos, config, noise_weight=0.0)
    kept, lost = (projector.noise_autocorrelation(one.noise).sum() for one in (free, unweighted))
    assert kept < 0.5 * lost


def test_the_learning_rate_is_the_projectors():
    rates = [projector.learning_rate(t) for t in (0, 0.025, 0.05, 0.5, 0.75, 0.875, 1)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0])
    assert projector.learning_rate(0.0, 0, 0) == 1


@pytest.mark.parametrize(
    ("name", "value"), [("space", "z"), ("steps", -1), ("steps", 1.5), ("w_noise", -1), ("lr", -1)]
)
def test_wrong_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* not {value!r}"):
        InversionConfig(**{name: value})


def test_wrong_photos_and_starts_are_named(still, sample):
    _, photos = sample()
    for wrong in (photos[..., :8, :8], photos[0], photos[:0]):
        with pytest.raises(ValueError, match=r"\[N, 3, 16, 16\].*not \[") as caught:
            invert(still, wrong, QUICK)
        assert str(list(wrong.shape)) in str(caught.value)
    with pytest.raises(ValueError, match=r"in \[-1, 1\]"):
        invert(still, photos * 255, QUICK)
    with pytest.raises(ValueError, match=r"start .*\[1, 6, 16\].*\[2, 6, 16\]"):
        invert(still, photos, QUICK, torch.zeros(1, 6, 16))
    with pytest.raises(ValueError, match="domain tiny has no encoder"):
        projector.encode(still, photos)


def test_without_a_perceptual_distance_its_weight_must_be_zero(still, sample, monkeypatch):
    monkeypatch.setattr("cfclip.domain.find_lpips", lambda device: None)
    _, photos = sample()
    bare = dataclasses.replace(still, truth=None)
    with pytest.raises(ValueError, match=r"domain tiny has no ground truth.*perceptual=0"):
        invert(bare, photos, QUICK)
    inverted = invert(bare, photos, QUICK, perceptual=0.0, steps=2)
    assert list(inverted.metrics[0]) == ["psnr", "centre_distance"]


def test_without_a_ground_truth_the_photos_are_samples_with_a_warning(still, sample):
    with pytest.warns(UserWarning, match="domain tiny has no ground truth"):
        photos = projector.held_out(dataclasses.replace(still, truth=None), 3, seed=2)
    torch.testing.assert_close(photos, sample(3, 2)[1])
    torch.testing.assert_close(projector.held_out(still, 2, 5), still.truth.photos(2, 5), rtol=0, atol=0)


def test_the_perceptual_distance_is_the_metric_and_has_a_gradient(still, sample):
    _, photos = sample()
    distance = still.distance()
    other = photos.flip(0).clone().requires_grad_()
    values = distance.between(other, photos)
    values.sum().backward()
    assert other.grad.abs().max() > 0
    column = metrics.evaluate(metrics.Edit(still, "x", photos, other.detach()))[distance.name]
    assert column == pytest.approx(values.detach().numpy(), rel=1e-4)


def test_tradeoff_has_a_row_per_config_and_photo(still, sample):
    _, photos = sample()
    torch.manual_seed(0)
    mapper = Mapper(MapperConfig(6, 16, still.clip.embed_dim)).requires_grad_(False)
    configs = [({"varied": "steps", "value": n}, dataclasses.replace(QUICK, steps=n)) for n in (0, 3)]
    table = pd.DataFrame(tradeoff(still, photos, mapper, "green lipstick", configs, progress=False))
    assert table[["value", "index"]].to_numpy().tolist() == [[0, 0], [0, 1], [3, 0], [3, 1]]
    assert {"psnr", "centre_distance", "clip_direction", "moved"} <= set(table)
    assert table.centre_distance[0] < 1e-3 < table.centre_distance[2]
    shown = ["varied", "value", "index", "psnr", "centre_distance", "clip_direction"]
    titles = [axis.get_title() for axis in tradeoff_curves(table[shown]).axes]
    assert titles == ["psnr", "clip direction"]
