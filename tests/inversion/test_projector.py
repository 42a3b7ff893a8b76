"""Inversion on a tiny generator whose truth is known, and its regularisers against their formulas."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from cfclip import domains
from cfclip.checkpoints import weights
from cfclip.evaluation import metrics
from cfclip.evaluation.figures import tradeoff_curves
from cfclip.files import read_rows
from cfclip.inversion import projector as inversion
from cfclip.inversion.projector import InversionConfig, invert
from cfclip.models.mapper import Mapper, MapperConfig
from cfclip.toonfaces.factors import sample_face
from cfclip.toonfaces.train import cards, encoder
from cfclip.toonfaces.train.encoder import EncoderConfig

QUICK = InversionConfig(steps=150, noise_maps=False, w_noise=0.0)


@pytest.fixture
def still(domain):
    """The tiny domain, without a use of noise, and with pictures that stay in [-1, 1]."""
    g = domain.generator
    for conv in g.convs:
        conv.noise_strength.fill_(0.0)
    largest = g.synthesis(torch.cat([domain.latents(500, "test"), domain.latents(8, "test", 3)])).abs().max()
    for rgb in g.rgbs:  # the picture is linear in these weights
        rgb.weight.div_(largest)
    z = torch.randn(4096, g.z_dim, generator=torch.Generator().manual_seed(5))
    g.w_avg.copy_(g.map_one(z).mean(0))
    return dataclasses.replace(domain, identity=None)


def sample(domain, n=2, seed=0):
    w = domain.latents(n, "test", seed)
    with torch.no_grad():
        images = domain.generator.synthesis(w)
    assert images.abs().max() <= 1
    return w, images


@pytest.mark.parametrize("space", inversion.SPACES)
def test_a_samples_picture_is_found_again(still, space):
    _, photos = sample(still)
    before = invert(still, photos, dataclasses.replace(QUICK, steps=0), progress=False)
    found = invert(still, photos, dataclasses.replace(QUICK, space=space), progress=False)
    assert torch.equal(before.w_plus, still.generator.w_avg.expand_as(before.w_plus))
    gained = [b["psnr"] - a["psnr"] for a, b in zip(before.metrics, found.metrics, strict=True)]
    assert min(gained) > 4 and min(row["psnr"] for row in found.metrics) > 38 and max(gained) > 15
    name, _ = metrics.perceptual_distance(still)
    assert max(row[name] for row in found.metrics) < 0.2 * min(row[name] for row in before.metrics)
    assert found.log[-1]["loss"] < 0.2 * found.log[0]["loss"] and found.noise is None
    assert all((layer == found.w_plus[:, 0]).all() for layer in found.w_plus.unbind(1)) == (space == "w")
    with torch.no_grad():
        torch.testing.assert_close(found.images, still.generator.synthesis(found.w_plus))


def test_photos_do_not_influence_each_other(still):
    _, photos = sample(still, 3)
    config = dataclasses.replace(QUICK, steps=5, w_noise=0.05)
    together, alone = (
        invert(still, photos, config, progress=False),
        invert(still, photos[:1], config, progress=False),
    )
    torch.testing.assert_close(together.w_plus[:1], alone.w_plus, rtol=1e-3, atol=1e-4)
    assert torch.equal(alone.w_plus, invert(still, photos[:1], config, progress=False).w_plus)
    assert not torch.equal(
        alone.w_plus, invert(still, photos[:1], dataclasses.replace(config, seed=1), progress=False).w_plus
    )


def test_the_centre_penalty_keeps_w_near_the_centre(still):
    _, photos = sample(still)
    near, free = (
        invert(still, photos, dataclasses.replace(QUICK, steps=60, w_centre=c), progress=False).metrics
        for c in (10.0, 0.0)
    )
    assert max(row["centre_distance"] for row in near) < 0.5 * min(row["centre_distance"] for row in free)


def test_centre_distance_is_one_for_samples(still):
    w, _ = sample(still, 500)
    assert inversion.centre_distance(still.generator, w).square().mean().sqrt().item() == pytest.approx(
        1, abs=0.1
    )
    g = still.generator
    w = g.w_avg + 3 * inversion.w_spread(g) * torch.tensor([1.0, -1.0]).repeat(g.w_dim // 2).expand(
        1, g.num_ws, -1
    )
    assert inversion.centre_distance(g, w).item() == pytest.approx(3, rel=1e-4)


def test_a_start_is_kept_and_refined(still):
    w, photos = sample(still)
    kept = invert(still, photos, InversionConfig(steps=0), w, progress=False)
    torch.testing.assert_close(kept.w_plus, w)
    assert min(row["psnr"] for row in kept.metrics) > 60
    one_step = invert(
        still, photos, InversionConfig(steps=1), w, progress=False
    )  # lr starts at 0, and a start is not shaken
    torch.testing.assert_close(one_step.w_plus, w)


def test_psnr_by_hand():
    a = torch.zeros(1, 3, 4, 4)
    assert inversion.psnr(a, a + 0.2).item() == pytest.approx(10 * np.log10(4 / 0.04), abs=1e-3)
    assert inversion.psnr(a + 1, a + 5).item() == pytest.approx(
        10 * np.log10(4 / 1e-10)
    )  # clamped: the same picture


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
    assert inversion.noise_autocorrelation(maps).tolist() == pytest.approx(wanted)


def test_noise_maps_are_optimised_where_they_are_used(domain):
    for rgb in domain.generator.rgbs:
        rgb.weight.mul_(0.1)
    with torch.no_grad():
        photos = domain.generator.synthesis(domain.latents(2, "test"), "random").clamp(-1, 1)
    config = InversionConfig(steps=40, w_noise=0.0)
    found = invert(domain, photos, config, progress=False)
    assert [tuple(x.shape) for x in found.noise] == [
        (2, 1, *shape) for shape in domain.generator.noise_shapes()
    ]
    for x in found.noise:
        torch.testing.assert_close(x.mean((1, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
        torch.testing.assert_close(x.square().mean((1, 2, 3)), torch.ones(2))
    assert "noise" in found.log[0] and found.synthesis_noise is found.noise
    torch.testing.assert_close(found.images, domain.generator.synthesis(found.w_plus, found.noise))
    fixed = invert(domain, photos, dataclasses.replace(config, noise_maps=False), progress=False)
    assert fixed.noise is None and fixed.synthesis_noise == "const" and "noise" not in fixed.log[0]
    loose = invert(domain, photos, dataclasses.replace(config, noise_weight=0.0), progress=False)
    assert (
        inversion.noise_autocorrelation(found.noise).sum()
        < 0.5 * inversion.noise_autocorrelation(loose.noise).sum()
    )


def test_the_learning_rate_is_the_projectors():
    assert [
        inversion.learning_rate(t, 0.05, 0.25) for t in (0, 0.025, 0.05, 0.5, 0.75, 0.875, 1)
    ] == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0])
    assert inversion.learning_rate(0.0, 0, 0) == 1


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"space": "z"}, "'z'"),
        ({"steps": -1}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"mse": -1}, "mse"),
        ({"ramp_up": 2}, "ramp_up"),
    ],
)
def test_wrong_settings_are_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        InversionConfig(**kwargs)


def test_wrong_pictures_and_starts_are_named(still, monkeypatch):
    _, photos = sample(still)
    with pytest.raises(ValueError, match=r"\[N, 3, 16, 16\].*\[2, 3, 8, 8\]"):
        invert(still, photos[..., :8, :8])
    with pytest.raises(ValueError, match=r"in \[-1, 1\]"):
        invert(still, photos * 255)
    with pytest.raises(ValueError, match=r"start .*\[1, 6, 16\].*\[2, 6, 16\]"):
        invert(still, photos, start=torch.zeros(1, 6, 16))
    with pytest.raises(ValueError, match="domain tiny has no encoder"):
        inversion.encode(still, photos)
    monkeypatch.setattr(metrics, "_alex", lambda: None)
    with pytest.raises(ValueError, match="perceptual=0"):
        invert(dataclasses.replace(still, readout=None), photos, progress=False)
    bare = invert(
        dataclasses.replace(still, readout=None),
        photos,
        dataclasses.replace(QUICK, perceptual=0.0, steps=2),
        progress=False,
    )
    assert list(bare.metrics[0]) == ["psnr", "centre_distance"]


def test_the_perceptual_distance_is_the_metric_and_has_a_gradient(still):
    _, photos = sample(still)
    name, distance = metrics.perceptual_distance(still)
    other = photos.flip(0).clone().requires_grad_()
    values = distance(other, photos)
    values.sum().backward()
    assert other.grad.abs().max() > 0
    assert metrics.perceptual(metrics.Edit(still, "x", photos, other.detach()))[name] == pytest.approx(
        values.detach().numpy(), rel=1e-4
    )


def test_tradeoff_has_a_row_per_config_and_photo(still):
    _, photos = sample(still)
    torch.manual_seed(0)
    mapper = Mapper(MapperConfig(6, 16, still.clip.embed_dim)).requires_grad_(False)
    configs = [
        ({"varied": "steps", "value": steps}, dataclasses.replace(QUICK, steps=steps)) for steps in (0, 3)
    ]
    rows = inversion.tradeoff(still, photos, mapper, "green lipstick", configs, progress=False)
    assert [(row["value"], row["index"]) for row in rows] == [(0, 0), (0, 1), (3, 0), (3, 1)]
    assert {"psnr", "centre_distance", "clip_direction", "moved"} <= set(rows[0]) and rows[0][
        "centre_distance"
    ] < 1e-3 < rows[2]["centre_distance"]
    figure = tradeoff_curves(
        pd.DataFrame(rows)[["varied", "value", "index", "psnr", "centre_distance", "clip_direction"]]
    )
    assert [axis.get_title() for axis in figure.axes] == ["psnr", "clip direction"]


SMALL = EncoderConfig(stages=((16, 16, 1), (16, 16, 1)), width=16, batch=4, steps=30)


def test_encoder_training_resumes(still, tmp_path, monkeypatch):
    monkeypatch.setattr(
        encoder, "fit", lambda *args, **kwargs: fit(*args, **kwargs | {"checkpoint_every": 5})
    )
    config = dataclasses.replace(SMALL, steps=9)
    whole = encoder.train(config, tmp_path / "whole", still)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(encoder, "sample_face", lambda seed: 1 / 0 if seed[2] == 7 else sample_face(seed))
        encoder.train(config, tmp_path / "cut", still)
    resumed = encoder.train(config, tmp_path / "cut", still)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_encoder_training_helps(still, tmp_path):
    whole = encoder.train(SMALL, tmp_path / "whole", still)
    assert whole.fits(still.generator) and not whole.training
    rows = read_rows(tmp_path / "whole" / "log.jsonl")
    assert rows[-1]["w"] < rows[0]["w"] and all(np.isfinite(list(row.values())).all() for row in rows)
    w, photos = sample(still, 8, seed=3)
    known = dataclasses.replace(still, encoder=whole)
    guess = inversion.encode(known, photos)
    assert (
        guess.shape == w.shape and (guess - w).square().mean() < (still.generator.w_avg - w).square().mean()
    )
    torch.testing.assert_close(inversion.encode(known, photos[:1]), guess[:1])
    with torch.no_grad():
        still.generator.w_avg += 1
    assert not whole.fits(still.generator)


def test_the_offsets_are_unlocked_layer_by_layer(still):
    assert [
        encoder.unlocked_layers(EncoderConfig(steps=100), i, 6) for i in (0, 19, 20, 26, 32, 49, 50, 99)
    ] == [1, 1, 1, 2, 3, 5, 6, 6]
    torch.manual_seed(0)
    model = encoder.ToonEncoder(16, 6, 16, SMALL.stages, 16).eval()
    torch.nn.init.normal_(model.offsets.weight)
    images = torch.randn(2, 3, 16, 16)
    one, three = (model.unlocked(images, k)[0] for k in (1, 3))
    assert (one == one[:, :1]).all() and not torch.equal(three[:, 2], three[:, 0])
    assert (
        torch.equal(three[:, 3:], one[:, 3:])
        and torch.equal(three[:, 0], one[:, 0])
        and torch.equal(model(images)[:, :3], three[:, :3])
    )
    with pytest.raises(ValueError, match=r"\[N, 3, 16, 16\]"):
        model(torch.zeros(1, 3, 8, 8))


def test_the_domain_takes_the_encoder_of_its_generator_only(tmp_path, monkeypatch):
    for path in (domains.DATA / "toonfaces").glob("*.safetensors"):
        if path.stem != "encoder":
            (tmp_path / path.name).symlink_to(path)
    d = domains.load_toonfaces(tmp_path)
    assert d.encoder is None
    g, c = d.generator, EncoderConfig()
    model = encoder.ToonEncoder(g.resolution, g.num_ws, g.w_dim, c.stages, c.width)
    model.w_avg.copy_(g.w_avg)
    model.w_spread.fill_(inversion.w_spread(g))
    weights.save(model, tmp_path / "encoder.safetensors", "encoder", model.metadata, store_as=torch.float16)
    d = domains.load_toonfaces(tmp_path)
    assert inversion.encode(d, inversion.held_out(d, 2)).shape == (2, g.num_ws, g.w_dim)
    measure = encoder.refinement
    monkeypatch.setattr(encoder, "refinement", lambda domain: measure(domain, n=2, steps=1))
    card = cards.write_card("encoder", tmp_path).read_text()
    assert all(words in card for words in ("encoder, then 1 steps", "psnr", "±", "train encoder"))
    model.w_avg += inversion.w_spread(g)
    weights.save(model, tmp_path / "encoder.safetensors", "encoder", model.metadata, store_as=torch.float16)
    with pytest.warns(UserWarning, match=r"encoder\.safetensors was trained for other networks"):
        assert domains.load_toonfaces(tmp_path).encoder is None


def test_mean_interval_by_hand():
    mean, half = encoder.mean_interval([1, 2, 3, 4])
    assert mean == 2.5 and half == pytest.approx(
        3.1824 * np.sqrt(5 / 3) / 2, rel=1e-4
    )  # Student's t, 3 degrees of freedom


def test_the_default_encoder_is_small_and_registered():
    c = EncoderConfig()
    model = encoder.ToonEncoder(64, 10, 128, c.stages, c.width)
    assert (
        2 * sum(t.numel() for t in model.state_dict().values()) < 1.5e6
        and cards.NETWORKS["encoder"].config is EncoderConfig
    )
    encoder.ToonEncoder(**model.metadata).load_state_dict(model.state_dict())
