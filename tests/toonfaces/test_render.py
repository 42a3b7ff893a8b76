import numpy as np
import pytest

from cfclip.toonfaces.factors import (
    COUNTERFACTUAL,
    IDENTITY_FACTORS,
    LATENT_DRAWS,
    NATURAL,
    PARTS,
    LatentDraws,
    sample_face,
)
from cfclip.toonfaces.render import ERASABLE, LABELS, MASKS, render, render_image


def test_the_same_seed_gives_the_same_picture():
    assert np.array_equal(render_image(sample_face((3, 1))), render_image(sample_face((3, 1))))
    assert not np.array_equal(render_image(sample_face(3)), render_image(sample_face(4)))


@pytest.mark.parametrize("resolution", [32, 64, 200])
def test_masks_sum_to_one_at_every_resolution(resolution):
    drawn = render(sample_face(7, "both"), resolution)
    assert drawn.image.shape == (resolution, resolution, 3) and drawn.image.dtype == np.uint8
    assert drawn.masks.shape == (len(MASKS), resolution, resolution)
    np.testing.assert_allclose(drawn.masks.sum(0), 1, atol=1e-6)
    assert np.array_equal(drawn.image, render_image(sample_face(7, "both"), resolution))


def test_a_large_picture_is_the_small_one_with_more_detail():
    face = sample_face(11)
    small, large = render_image(face, 64).astype(float), render_image(face, 256).astype(float)
    assert np.abs(large.reshape(64, 4, 64, 4, 3).mean((1, 3)) - small).mean() < 3


@pytest.mark.parametrize("part", [part for part in PARTS if COUNTERFACTUAL[part]])
def test_the_true_counterfactual_changes_only_its_part(part):
    face = next(f for f in (sample_face(k) for k in range(100)) if f.has(part))
    name = next(iter(COUNTERFACTUAL[part]))
    before, after = render(face), render(face.with_colour(part, name))
    np.testing.assert_array_equal(before.masks, after.masks)
    changed = (before.image != after.image).any(-1)
    parts = (part, "mouth") if part == "lipstick" else (part,)  # the line between the lips is darker lipstick
    may_change = sum(before.masks[MASKS.index(one)] for one in parts) > 0
    assert changed.any() and not (changed & ~may_change).any()


@pytest.mark.parametrize("part", ERASABLE)
def test_a_part_that_is_left_out_is_skin_and_the_rest_stays(part):
    face = sample_face(7)
    whole, bare = render(face), render(face, without=[part])
    gone = [MASKS.index(name) for name in {LABELS[label] for label in ERASABLE[part]}]
    assert whole.masks[gone].max() == 1 and bare.masks[gone].max() == 0 and bare.area(part) == 0
    np.testing.assert_allclose(bare.masks.sum(0), 1, atol=1e-6)
    others = [i for i, name in enumerate(MASKS) if i not in gone and name != "skin"]
    np.testing.assert_array_equal(bare.masks[others], whole.masks[others])
    elsewhere = whole.masks[gone].sum(0) == 0
    np.testing.assert_array_equal(bare.image[elsewhere], whole.image[elsewhere])


def test_parts_that_a_face_may_lack_anyway_cannot_be_left_out():
    face = sample_face(7)
    nothing, everything = render(face, without=()), render(face, without=list(ERASABLE))
    assert np.array_equal(nothing.image, render_image(face))
    assert not any(everything.area(part) for part in ERASABLE)
    with pytest.raises(ValueError, match="cannot leave out hair"):
        render(face, without=["hair"])


def test_natural_faces_have_natural_colours_and_one_hair_colour():
    for k in range(200):
        face = sample_face(k)
        assert all(getattr(face, part).name in NATURAL[part] for part in PARTS)
        assert face.eyebrows.name == face.hair.name == face.beard.name


def test_both_supports_show_every_colour():
    faces = [sample_face(k, "both") for k in range(1500)]
    for part in PARTS:
        assert {getattr(f, part).name for f in faces} == set(NATURAL[part]) | set(COUNTERFACTUAL[part])


def test_another_photo_keeps_the_person():
    face = sample_face(5)
    other = sample_face(6, "both").of_person(face)
    assert all(getattr(face, name) == getattr(other, name) for name in IDENTITY_FACTORS)
    assert face.background != other.background


def test_an_unknown_support_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="'odd'"):
        sample_face(0, "odd")


def test_a_latent_code_determines_the_face_with_every_one_of_its_numbers():
    z = np.random.default_rng(0).standard_normal(LATENT_DRAWS)
    face = sample_face(LatentDraws(z))
    assert face == sample_face(LatentDraws(z)) != sample_face(LatentDraws(-z))
    with pytest.raises(StopIteration):
        sample_face(LatentDraws(z[:-1]))
