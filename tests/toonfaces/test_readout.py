"""The readout without its weights: presence, colours and distances, against numpy, scipy and scikit-image."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.color import deltaE_cie76, rgb2lab

from cfclip.checkpoints import weights
from cfclip.images import to_tensor
from cfclip.toonfaces.factors import HAIR_STYLES, PARTS, colours, sample_face
from cfclip.toonfaces.readout import VISIBLE, Measurement, Readout, soften, unmix
from cfclip.toonfaces.render import MASKS, render


def drawn(faces):
    """Pictures [N, 3, 64, 64] in [-1, 1] and exact masks [N, P, 64, 64]."""
    each = [render(face) for face in faces]
    return to_tensor([one.image for one in each]), torch.from_numpy(np.stack([one.masks for one in each]))


@pytest.fixture
def faces():
    return [sample_face((79, k)) for k in range(6)]


def measurement(rgb, part, present=None):
    """Of pictures in which ``part`` has these colours [N, 3], 0 … 255, and everything is large."""
    n = len(rgb)
    lab = np.zeros((n, len(MASKS), 3))
    lab[:, MASKS.index(part)] = rgb2lab(np.asarray(rgb, dtype=float) / 255)
    masks, area = np.zeros((n, len(MASKS), 4, 4)), np.full((n, len(MASKS)), 2 * VISIBLE)
    present = np.ones((n, len(PARTS)), dtype=bool) if present is None else present
    return Measurement(masks, area, lab, np.zeros(n, dtype=int), present)


def test_each_part_whose_colour_a_prompt_can_name_may_be_absent():
    present = np.zeros((2, len(PARTS)), dtype=bool)
    present[1, PARTS.index("beard")] = True
    seen = measurement([[0, 0, 0]] * 2, "hair", present)
    assert seen.has("beard").tolist() == [False, True] and seen.has("hair").tolist() == [False, False]


def test_the_distance_to_a_named_colour_is_the_one_of_cielab():
    green = colours("lipstick")["green"]
    seen = measurement([green, [255, 0, 0]], "lipstick")
    distance = seen.distance("lipstick", "green")
    red, wanted = rgb2lab([1.0, 0, 0]), rgb2lab(np.array(green) / 255)
    assert distance == pytest.approx([0, deltaE_cie76(red, wanted)], abs=1e-4)
    assert seen.colour("lipstick") == ["green", "red"]


def test_what_is_not_visible_has_no_colour_and_no_distance():
    seen = measurement([[9, 9, 9]], "beard")
    seen.lab[:] = np.nan
    assert np.isnan(seen.distance("beard", "green")).all() and seen.colour("beard") == [None]


@pytest.mark.parametrize("width", [8, 24])
def test_hair_styles_and_parts_have_outputs_of_their_own(width, faces):
    torch.manual_seed(0)
    readout, (images, _) = Readout(width).eval(), drawn(faces)
    parts, presence = readout(images)
    assert parts.shape == (6, len(MASKS), 64, 64)
    assert presence.shape == (6, len(HAIR_STYLES) + len(PARTS)) and readout.metadata == {"width": width}
    seen, presence = readout.measure(images), presence.detach().numpy()
    assert seen.hair_style.tolist() == presence[:, : len(HAIR_STYLES)].argmax(1).tolist()
    for part, logit in zip(PARTS, presence[:, len(HAIR_STYLES) :].T, strict=True):
        assert seen.has(part).tolist() == (logit > 0).tolist()
    assert seen.lab.shape == (6, len(MASKS), 3)


def test_a_file_with_other_presence_outputs_is_refused(tmp_path):
    readout = Readout(8)
    tensors = readout.state_dict() | {"presence.bias": torch.zeros(len(HAIR_STYLES) + 2)}
    with pytest.raises(weights.WeightsError, match=r"readout\.safetensors does not fit.*presence\.bias"):
        weights.load_into(readout, tensors, tmp_path / "readout.safetensors")


def test_a_picture_that_is_mixed_is_unmixed():
    """By numpy's least squares, one system per part; a pixel's weight is the square of the part's share."""
    rng = np.random.default_rng(0)
    masks = rng.dirichlet(np.ones(4), (2, 8, 8)).transpose(0, 3, 1, 2)
    true = rng.uniform(0, 255, (2, 4, 3))
    images = np.einsum("npyx,npc->ncyx", masks, true)
    found = unmix(torch.from_numpy(images), torch.from_numpy(masks), ridge=0)
    np.testing.assert_allclose(found, true, atol=1e-6)
    images += rng.normal(0, 20, images.shape)  # now no colours explain it
    found = unmix(torch.from_numpy(images), torch.from_numpy(masks), ridge=0)
    for n in range(2):
        m, x = masks[n].reshape(4, -1).T, images[n].reshape(3, -1).T
        for p in range(4):
            near = m[:, [p]]
            fitted = np.linalg.lstsq(near * m, near * x, rcond=None)[0]
            np.testing.assert_allclose(found[n, p], fitted[p], atol=1e-6)


def test_colours_are_unmixed_from_soft_pictures(faces):
    images, masks = soften(*drawn(faces), torch.full((6,), 0.7))
    found = unmix(images * 127.5 + 127.5, masks)
    for part in ("eyes", "eyebrows"):
        true = torch.tensor([getattr(face, part).rgb for face in faces])
        assert (found[:, MASKS.index(part)] - true).norm(dim=1).max() < 20, part


def test_parts_that_are_nowhere_do_not_disturb_the_others():
    masks = torch.zeros(1, 3, 4, 4)
    masks[:, 0, :2], masks[:, 1, 2:] = 1, 1
    images = masks[:, :1] * 10 + masks[:, 1:2] * 20
    found = unmix(images, masks)
    assert found.isfinite().all() and found[0, :2, 0].tolist() == pytest.approx([10, 20], rel=0.01)


def test_softening_is_gaussian_and_takes_pictures_and_masks_alike(faces):
    images, masks = drawn(faces[:3])
    sigma = torch.tensor([0.0, 0.6, 1.0])
    soft, covers = soften(images, masks, sigma)
    assert soft.shape == images.shape and covers.shape == masks.shape
    torch.testing.assert_close((soft[0], covers[0]), (images[0], masks[0]))
    torch.testing.assert_close(covers.sum(1), torch.ones(3, 64, 64))
    for i in (1, 2):
        blur = {"sigma": sigma[i].item(), "axes": (1, 2), "mode": "nearest", "radius": 3}
        np.testing.assert_allclose(soft[i], gaussian_filter(images[i].numpy(), **blur), atol=1e-5)
        np.testing.assert_allclose(covers[i], gaussian_filter(masks[i].numpy(), **blur), atol=1e-5)
