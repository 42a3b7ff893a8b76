"""The committed networks, quickly; the full numbers are on their cards."""

import dataclasses

import numpy as np
import pytest
import torch

import cfclip
from cfclip import metrics, ops
from cfclip.reporting import read_rows
from cfclip.toonfaces import clip as toon_clip
from cfclip.toonfaces import identity as toon_identity
from cfclip.toonfaces import readout as toon_readout
from cfclip.toonfaces.ceiling import ceiling
from cfclip.toonfaces.factors import sample_face
from cfclip.toonfaces.gan import GANConfig, to_tensor
from cfclip.toonfaces.gan import train as train_generator
from cfclip.toonfaces.render import MASKS, render, render_image


@pytest.fixture(scope="module")
def toonfaces():
    return cfclip.load_domain("toonfaces")


def test_clip_names_counterfactual_colours(toonfaces):
    rows = {row["part"]: row for row in toon_clip.colour_accuracy(toonfaces.clip, faces=200)}
    assert min(rows[p]["accuracy"] for p in ("lipstick", "hair", "skin")) > 0.85
    assert min(rows[p]["accuracy"] for p in ("eyebrows", "eyes", "beard")) > 0.75


def test_readout_names_colours(toonfaces):
    assert min(row["accuracy"] for row in toon_readout.colour_accuracy(toonfaces.readout, faces=150)) > 0.93


def test_identity_knows_people_in_make_up(toonfaces):
    assert toon_identity.verification(toonfaces.identity, pairs=200)["auc"] > 0.95


def test_the_generator_draws_faces_of_natural_colour(toonfaces):
    with torch.no_grad():
        images = toonfaces.generator(torch.randn(100, toonfaces.generator.z_dim, generator=torch.Generator().manual_seed(0)))
    seen = toonfaces.readout.measure(images)
    assert seen.is_face.mean() > 0.9
    assert np.mean([name in ("green", "blue", "purple", "cyan") for name in seen.colour("lipstick")]) < 0.05


def test_ground_truth_scores_the_true_counterfactual(toonfaces):
    faces = [sample_face((77, k)) for k in range(16)]
    source, truth = (to_tensor([render_image(f) for f in group]) for group in (faces, [f.with_colour("lipstick", "green") for f in faces]))
    right = metrics.evaluate(metrics.Edit(toonfaces, "green lipstick", source, truth))
    none = metrics.evaluate(metrics.Edit(toonfaces, "green lipstick", source, source))
    other = metrics.evaluate(metrics.Edit(toonfaces, "green lipstick", source, source.roll(1, 0)))
    assert right["success_after"].mean() > 0.9 and right["success_before"].mean() == none["success_after"].mean() == 0
    assert right["leakage"].mean() < 0.15 and none["leakage"].max() < 1e-6 and other["leakage"].mean() > 0.5
    assert right["identity"].mean() > other["identity"].mean() and none["identity"].min() > 0.999
    assert none["lpips_readout"].max() == 0 if "lpips_readout" in none else none["lpips_alex"].max() < 1e-6
    assert right["clip_after"].mean() > right["clip_before"].mean()
    assert right["clip_direction"].mean() > 20 and none["clip_direction"].max() < 1


def test_a_recoloured_part_moves_and_no_other(toonfaces):
    faces = [sample_face((78, k)) for k in range(12)]
    source, truth = (to_tensor([render_image(f) for f in group]) for group in (faces, [f.with_colour("lipstick", "green") for f in faces]))
    edit = metrics.Edit(toonfaces, "green lipstick", source, truth)
    moved = {part: np.nanmean(values) for part, values in metrics.leakage_by_part(edit).items()}
    assert moved.pop("lipstick") > 1 and moved.pop("mouth") >= 0 and max(moved.values()) < 0.35


def test_metrics_over_strengths_start_from_the_source(toonfaces):
    w = toonfaces.latents(3, "test")
    rows = metrics.over_strengths(toonfaces, "green lipstick", lambda w, s: toonfaces.generator.synthesis(w + s * w.std()), w, [0.0, 0.2])
    assert [(row["strength"], row["index"]) for row in rows] == [(s, i) for s in (0.0, 0.2) for i in range(3)]
    assert all(row["identity"] > 0.999 and row["leakage"] < 1e-6 for row in rows[:3]) and all(row["leakage"] > 0.01 for row in rows[3:])


def test_colours_are_unmixed_from_soft_pictures():
    faces = [sample_face((79, k)) for k in range(6)]
    drawn = [render(face) for face in faces]
    images, masks = to_tensor([one.image for one in drawn]), torch.from_numpy(np.stack([one.masks for one in drawn]))
    images, masks = toon_readout.soften(images, masks, torch.full((6,), 0.7))
    found = toon_readout.unmix(images * 127.5 + 127.5, masks)
    for part in ("eyes", "eyebrows"):
        wrong = [(colour - torch.tensor(getattr(face, part).rgb)).norm() for colour, face in zip(found[:, MASKS.index(part)], faces, strict=True)]
        assert max(wrong) < 20, part


def test_a_halo_spares_its_part():
    rng = np.random.default_rng(0)
    changed = 0
    for k in range(20):
        face = sample_face((5, k), "both")
        drawn, haloed = render(face), toon_clip.with_halo(face, rng)
        for part in ("eyebrows", "lipstick", "eyes"):
            inside = drawn.masks[MASKS.index(part)] == 1
            assert (haloed[inside] == drawn.image[inside]).all()
        changed += (haloed != drawn.image).any()
    assert changed > 15


def test_the_ceiling_is_measured_against_the_truth(toonfaces):
    hair, lips = ceiling(toonfaces, ["blue hair", "green lipstick"], n=2, steps=3, first_layer=4)
    assert hair["n"] == 2 and hair["success_before"] == 0 and 0 <= hair["success_after"] <= 1
    assert lips["true_success_after"] == 1 and lips["true_leakage"] < 0.15
    with pytest.raises(ValueError, match="names no colour"):
        ceiling(toonfaces, ["happy"])


def test_generator_training_passes_its_phases_and_resumes(tmp_path):
    config = GANConfig(resolution=16, channels=(16, 16, 16), d_channels=(16, 16, 16), w_dim=80, mapping_layers=2, batch=4, dtype="float32",
                       warm_steps=8, warm_batch=2, map_steps=3, steps=4, map_pool=32)
    whole = train_generator(config, tmp_path / "whole")
    train_generator(dataclasses.replace(config, steps=2), tmp_path / "cut")
    resumed = train_generator(config, tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    errors = [row["error"] for row in read_rows(tmp_path / "whole" / "1-regression" / "log.jsonl")]
    assert np.isfinite(errors).all() and (tmp_path / "whole" / "samples" / "3-adversarial-000004.png").exists()
    with pytest.raises(ValueError, match="w_dim"):
        GANConfig(w_dim=16)


@pytest.mark.parametrize("fold", [False, True])
def test_fast_pictures_are_the_references(fold, toonfaces):
    """On real weights, in grey levels of 8 bits, the faces of the tables."""
    g = toonfaces.generator
    w = cfclip.latents.sample(g, 64, "test")
    with torch.no_grad(), ops.using("reference"):
        exact = g.synthesis(w)
    for dtype, mean, most in ((None, 1e-4, 0.01), (torch.float16, 0.1, 1), (torch.bfloat16, 0.3, 4)):
        with torch.no_grad(), ops.folding(fold):
            apart = (g.synthesis(w, dtype=dtype) - exact).abs() * 127.5
        assert apart.mean() <= mean and apart.max() <= most, (dtype, apart.mean(), apart.max())


def test_fast_gradients_are_as_good_as_the_references(toonfaces):
    """On real weights, towards a prompt: cosine with those of float32, the worst of 8 codes. (Half precision itself is far from 1.)"""
    target = torch.nn.functional.normalize(toonfaces.clip.encode_text("green lipstick"), dim=-1)

    def gradient(operators, dtype):
        w = cfclip.latents.sample(toonfaces.generator, 8, "test").requires_grad_()
        with ops.using(operators):
            images = toonfaces.generator.synthesis(w, dtype=dtype)
        score = (torch.nn.functional.normalize(toonfaces.clip.encode_image(images), dim=-1) * target).sum()
        return torch.autograd.grad(score, w)[0].flatten(1)

    exact = gradient("reference", None)
    for dtype, apart in ((None, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.03)):
        ours, theirs = (torch.nn.functional.cosine_similarity(gradient(operators, dtype), exact).min() for operators in ("frozen", "reference"))
        assert ours > theirs - apart, (dtype, ours, theirs)
