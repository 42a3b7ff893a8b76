import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import RandomPerspective

from cfclip.method.losses import (
    clip_distance,
    clip_nce,
    directional,
    identity_loss,
    latent_l2,
    perceptual_loss,
)
from cfclip.method.views import perspective_views


def unit(*shape, seed=0):
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1
    )


def test_clip_nce_by_hand():
    s, edited = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])  # q = (-1, 1) / sqrt 2
    target, source = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, -1.0]])
    first, second, against = math.sqrt(0.5), 1.0, 0.0  # p1 = (0, 1); p2 = q; n = (-1, -1) / sqrt 2

    def of(p):
        return -math.log(math.exp(p / 0.1) / (math.exp(p / 0.1) + math.exp(against / 0.1)))

    expected = (of(first) + of(second)) / 2
    assert clip_nce(edited, s, target, source).item() == pytest.approx(expected, rel=1e-4)


def test_sources_repeat_draw_major():
    edited, source, t, s = unit(6, 8), unit(2, 8, seed=1), unit(5, 8, seed=2), unit(5, 8, seed=3)
    torch.testing.assert_close(clip_nce(edited, source, t, s), clip_nce(edited, source.repeat(3, 1), t, s))
    with pytest.raises(ValueError, match="5 edited features"):
        clip_nce(edited[:5], source, t, s)


def test_an_edit_that_changes_nothing_is_finite():
    source = unit(2, 8)
    edited = source.clone().requires_grad_()
    loss = clip_nce(edited, source, unit(5, 8, seed=2), unit(5, 8, seed=3))
    loss.backward()
    assert loss.isfinite() and edited.grad.isfinite().all()


def test_per_image_negatives_equal_the_published_for_one_image():
    edited, source, t, s = unit(4, 8), unit(1, 8, seed=1), unit(5, 8, seed=2), unit(5, 8, seed=3)
    torch.testing.assert_close(
        clip_nce(edited, source, t, s, negatives="per_image"), clip_nce(edited, source, t, s)
    )


@pytest.mark.parametrize(
    "wrong", [{"positives": ()}, {"positives": ("text", "x")}, {"negatives": "x"}, {"query": "x"}]
)
def test_unknown_variants_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        clip_nce(unit(2, 8), unit(2, 8), unit(5, 8), unit(5, 8), **wrong)


def test_identity_and_latent_losses():
    net = lambda x: F.normalize(x.flatten(1), dim=1)  # noqa: E731
    a = torch.randn(2, 3, 4, 4)
    assert identity_loss(net(a), net(a)).item() == pytest.approx(0, abs=1e-6)
    assert identity_loss(net(-a), net(a)).item() == pytest.approx(2, abs=1e-6)
    assert latent_l2(torch.ones(2, 3), torch.zeros(2, 3)).item() == 1


def test_views_are_draw_major_and_share_a_warp():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 16, 16)
    views = perspective_views(image.repeat(2, 1, 1, 1), num_views=3)
    assert views.shape == (6, 3, 16, 16)
    for draw in range(3):
        torch.testing.assert_close(views[2 * draw], views[2 * draw + 1])
    assert not torch.allclose(views[0], views[2])


@pytest.mark.parametrize("size", [(16, 16), (33, 50), (1024, 1024)])
def test_views_are_torchvisions(size):
    """RandomPerspective's, but for the mask that today's torchvision multiplies its rim by."""
    image = torch.rand(1, 3, *size)
    torch.manual_seed(3)
    ours = perspective_views(image, num_views=2)
    torch.manual_seed(3)
    theirs = [RandomPerspective(0.5, p=1, fill=0.0) for _ in range(2)]
    mask = torch.ones_like(image)
    torch.manual_seed(3)
    inside = perspective_views(mask, num_views=2) > 0.999
    torch.manual_seed(3)
    theirs = torch.cat([warp(image) for warp in theirs])
    assert inside.float().mean() > 0.3
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=0, atol=3e-4 * max(size) / 64)


def test_no_views_are_the_images_and_cost_no_random_number():
    image = torch.rand(2, 3, 8, 8)
    state = torch.get_rng_state()
    assert torch.equal(perspective_views(image, num_views=0), image)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("negatives", ["first", "per_image"])
@pytest.mark.parametrize("query", ["difference", "image"])
@pytest.mark.parametrize("count", [None, 1, 3])
def test_clip_nce_variants_against_numpy(negatives, query, count):
    """Row by row, from the equations of the method."""
    edited, source, target, described = unit(6, 8), unit(2, 8, seed=1), unit(5, 8, seed=2), unit(5, 8, seed=3)
    normal = lambda v: v / np.linalg.norm(v)  # noqa: E731
    e, s, t, d = (x.numpy() for x in (edited, source, target, described))
    rows = []
    for positive in ("text", "target"):
        for i in range(6):
            q = normal(e[i] - s[i % 2]) if query == "difference" else e[i]
            p = normal((t - d).mean(0)) if positive == "text" else normal(t.mean(0) - s[i % 2])
            against = [
                np.exp(q @ normal(d[k] - s[0 if negatives == "first" else i % 2]) / 0.07)
                for k in range(count or 5)
            ]
            rows.append(-np.log(np.exp(q @ p / 0.07) / (np.exp(q @ p / 0.07) + sum(against))))
    loss = clip_nce(
        edited, source, target, described, 0.07, negatives=negatives, query=query, negative_templates=count
    )
    assert loss.item() == pytest.approx(np.mean(rows), rel=1e-9)


@pytest.mark.parametrize("count", [0, 6])
def test_a_number_of_negatives_that_there_are_not(count):
    with pytest.raises(ValueError, match="from 1 to 5"):
        clip_nce(unit(2, 8), unit(2, 8), unit(5, 8), unit(5, 8), negative_templates=count)


def test_the_losses_of_the_methods_before_against_numpy():
    edited, source, target, described = unit(6, 8), unit(2, 8, seed=1), unit(5, 8, seed=2), unit(5, 8, seed=3)
    assert clip_distance(edited, target[:1]).item() == pytest.approx(
        np.mean([1 - e @ target[0].numpy() for e in edited.numpy()]), rel=1e-9
    )
    text = (target.mean(0) - described.mean(0)).numpy()
    moves = [e - source[i % 2].numpy() for i, e in enumerate(edited.numpy())]
    expected = np.mean([1 - m @ text / np.linalg.norm(m) / np.linalg.norm(text) for m in moves])
    assert directional(edited, source, target, described).item() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="5 edited features"):
        directional(edited[:5], source, target, described)


def test_directional_has_a_way_to_go_from_the_source_itself():
    source, target, described = unit(2, 8), unit(5, 8, seed=2), unit(5, 8, seed=3)
    edited = source.clone().requires_grad_()
    loss = directional(edited, source, target, described)
    loss.backward()
    assert loss.item() == 1
    text = F.normalize((target - described).mean(0), dim=-1)
    torch.testing.assert_close(edited.grad, -text.expand(2, -1) / 2)


def test_changes_beyond_the_limit_cost_hardly_more():
    edited = torch.tensor([[[[0.3, 4.0]], [[0.1, 2.0]]], [[[0.0, 0.0]], [[0.0, -0.2]]]])  # [2, 2, 1, 2]
    source = torch.zeros_like(edited)
    d = np.array([0.2, 3.0, 0.0, 0.1])  # of each pixel, over its channels
    assert perceptual_loss(edited, source).item() == pytest.approx(d.mean())
    limited = np.mean(d * 0.5 / (0.5 + d))
    assert perceptual_loss(edited, source, 0.5).item() == pytest.approx(limited)
    assert perceptual_loss(edited, source, 1e9).item() == pytest.approx(d.mean())
