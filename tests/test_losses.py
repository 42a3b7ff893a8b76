import math

import pytest
import torch
import torch.nn.functional as F

from cfclip.losses import clip_nce, identity_loss, latent_l2, perspective_views


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def test_clip_nce_by_hand():
    s, edited = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])       # q = (-1, 1) / sqrt 2
    target, source = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, -1.0]])  # p1 = (0, 1); p2 = q; n = (-1, -1) / sqrt 2
    first, second, against = math.sqrt(0.5), 1.0, 0.0
    expected = sum(-math.log(math.exp(p / 0.1) / (math.exp(p / 0.1) + math.exp(against / 0.1))) for p in (first, second)) / 2
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
    torch.testing.assert_close(clip_nce(edited, source, t, s, negatives="per_image"), clip_nce(edited, source, t, s))


@pytest.mark.parametrize("wrong", [{"positives": ()}, {"positives": ("text", "x")}, {"negatives": "x"}, {"query": "x"}])
def test_unknown_variants_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        clip_nce(unit(2, 8), unit(2, 8), unit(5, 8), unit(5, 8), **wrong)


def test_identity_and_latent_losses():
    net = lambda x: F.normalize(x.flatten(1), dim=1)  # noqa: E731
    a = torch.randn(2, 3, 4, 4)
    assert identity_loss(net, a, a).item() == pytest.approx(0, abs=1e-6)
    assert identity_loss(net, -a, a).item() == pytest.approx(2, abs=1e-6)
    assert latent_l2(torch.ones(2, 3), torch.zeros(2, 3)).item() == 1


def test_views_are_draw_major_and_share_a_warp():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 16, 16)
    views = perspective_views(image.repeat(2, 1, 1, 1), draws=3)
    assert views.shape == (6, 3, 16, 16)
    for draw in range(3):
        torch.testing.assert_close(views[2 * draw], views[2 * draw + 1])
    assert not torch.allclose(views[0], views[2])
