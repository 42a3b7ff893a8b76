"""The ground truth of toonfaces: a cfclip.domain.GroundTruth that renders and measures."""

import inspect

import numpy as np
import pytest
import torch

from cfclip.domain import GROUPS, GroundTruth
from cfclip.toonfaces.factors import HELD_OUT, NATURAL, PARTS, colours, sample_face
from cfclip.toonfaces.readout import VISIBLE
from cfclip.toonfaces.truth import NATURAL_FACES

CLAIM = ("hair", "blue")


@pytest.fixture(scope="module")
def truth(toonfaces):
    return toonfaces.truth


def changed(a, b):
    """bool [N, R, R]."""
    return (a != b).any(1)


def test_it_has_every_member_of_the_protocol_with_the_same_arguments(truth):
    for name, wanted in inspect.getmembers(GroundTruth, inspect.isfunction):
        if not name.startswith("_"):
            given = inspect.signature(getattr(type(truth), name))
            assert list(given.parameters.values()) == list(inspect.signature(wanted).parameters.values()), (
                name
            )
    assert set(truth.regions) < set(truth.parts) and set(PARTS) < set(truth.parts)


def test_every_prompt_claims_the_colour_of_a_part_and_has_a_group(truth):
    counterfactual, held_out, in_the_domain = GROUPS[:3]
    claims = [truth.claim(prompt) for prompt in truth.prompts]
    assert claims == [(part, colour) for part in PARTS for colour in colours(part)]
    for part, colour in claims:
        group = held_out if (part, colour) in HELD_OUT else counterfactual
        assert truth.group((part, colour)) == (in_the_domain if colour in NATURAL[part] else group)
    assert truth.claim("happy") is None


def test_the_domain_groups_prompts_by_their_claims(toonfaces):
    groups = ["counterfactual", "counterfactual, held out from CLIP", "in the domain", "null edit", "other"]
    prompts = ["green lipstick", "pink beard", "red lipstick", toonfaces.source_text, "happy"]
    assert [toonfaces.group_of(prompt) for prompt in prompts] == groups


def test_each_claim_has_one_name_and_is_judged_where_there_was_something_to_do(truth):
    prompts = ["a smiling man with violet lips and curly hair", "spectacles", "a clean-shaven bald person"]
    claims = [truth.claims(prompt) for prompt in prompts]
    assert claims == [("purple lipstick", "curly hair"), ("glasses",), ("no beard", "bald")]
    assert truth.claims("happy") == truth.claims("smiling") == ()
    people = [sample_face((NATURAL_FACES, k)) for k in range(24)]
    before = truth.measure(truth.renders(24))
    for prompt, claim, had in (
        ("blond hair", "blonde hair", [face.hair_style == "bald" for face in people]),
        ("glasses", "glasses", [face.has_glasses for face in people]),
        ("bald", "bald", [face.hair_style == "bald" for face in people]),
    ):
        done = truth.done(prompt, before, before)
        assert list(done) == [claim] and np.isnan(done[claim]).tolist() == had
    colour = truth.done("blond hair", before, before)["blonde hair"]
    assert set(colour[~np.isnan(colour)]) == {0, 1}, "some are blonde, and some are not"


def test_renders_are_the_same_natural_faces_at_every_call(truth):
    images = truth.renders(6)
    assert images.shape == (6, 3, 64, 64) and images.min() >= -1 and images.max() <= 1
    assert torch.equal(truth.renders(6), images) and torch.equal(truth.renders(3), images[:3])
    seen = truth.measure(images)
    assert all(name in {None, *NATURAL["lipstick"]} for name in seen.colour("lipstick"))


def test_changing_a_render_does_not_change_the_next_one(truth):
    truth.renders(2).zero_()
    assert truth.renders(2).abs().sum() > 0


def test_a_claim_recolours_its_part_of_the_renders_and_nothing_else(truth):
    before, after = truth.renders(6), truth.renders(6, CLAIM)
    faces = [sample_face((NATURAL_FACES, k)) for k in range(6)]
    moved = changed(before, after)
    assert moved.flatten(1).any(1).tolist() == [face.has("hair") for face in faces]
    masks = truth.masks(after)[:, truth.parts.index("hair")]
    assert masks[moved].mean() > 0.7 and masks[~moved].mean() < 0.05


@pytest.mark.parametrize("claim", [("beard", "green"), ("lipstick", "red"), ("skin", "purple")])
def test_counterfactuals_show_the_part_in_both_colours(truth, claim):
    part, colour = claim
    natural, recoloured = truth.counterfactuals(claim, 8)
    assert natural.shape == recoloured.shape == (8, 3, 64, 64)
    assert changed(natural, recoloured).flatten(1).any(1).all()
    seen = truth.measure(recoloured)
    assert (seen.area[:, truth.parts.index(part)] > 0.8 * VISIBLE).all()
    assert np.mean([name == colour for name in seen.colour(part)]) > 0.8
    before = truth.measure(natural).colour(part)
    assert colour in NATURAL[part] or colour not in before
    again = truth.counterfactuals(claim, 3)
    assert torch.equal(again[0], natural[:3]) and torch.equal(again[1], recoloured[:3])


def test_photos_depend_on_their_seed_and_are_not_the_renders(truth):
    photos = truth.photos(4, seed=1)
    assert photos.shape == (4, 3, 64, 64) and torch.equal(photos, truth.photos(4, seed=1))
    for others in (truth.photos(4, seed=2), truth.renders(4), truth.counterfactuals(CLAIM, 4)[0]):
        assert changed(photos, others).flatten(1).any(1).all()


def test_measuring_agrees_with_the_masks_and_takes_no_notice_of_values_out_of_range(truth):
    images = truth.renders(3)
    seen, masks = truth.measure(images), truth.masks(images)
    assert masks.shape == (3, len(truth.parts), 64, 64)
    torch.testing.assert_close(masks.sum(1), torch.ones(3, 64, 64))
    torch.testing.assert_close(torch.from_numpy(seen.masks), masks)
    np.testing.assert_allclose(seen.area, seen.masks.mean((2, 3)) * 64 * 64, rtol=1e-5)
    far = torch.where(images == images.max(), 5.0, images)
    torch.testing.assert_close(truth.masks(far), truth.masks(far.clamp(-1, 1)))
    assert seen.lab.shape == (3, len(truth.parts), 3) and seen.is_face.all()


def test_a_part_that_is_too_small_has_no_colour(truth):
    seen = truth.measure(truth.renders(24))
    small = seen.area[:, truth.parts.index("beard")] < VISIBLE
    assert small.any() and not small.all()
    assert [name is None for name in seen.colour("beard")] == small.tolist()


def test_features_go_from_fine_to_coarse_and_are_differentiable(truth):
    images = truth.renders(2).requires_grad_()
    features = truth.features(images)
    assert [f.shape[-1] for f in features] == [64, 32, 16, 8] and sum(f.shape[1] for f in features) == 176
    (gradient,) = torch.autograd.grad(sum(f.mean() for f in features), images)
    assert gradient.abs().sum() > 0


def test_to_returns_a_copy_on_the_device_and_leaves_the_original(truth):
    moved = truth.to(torch.device("meta"))
    devices = [next(one.readout.parameters()).device.type for one in (truth, moved)]
    assert devices == ["cpu", "meta"] and moved.resolution == truth.resolution
    assert moved.renders(2).device.type == moved.photos(1, 0).device.type == "meta"
    assert truth.renders(2).device.type == "cpu"
