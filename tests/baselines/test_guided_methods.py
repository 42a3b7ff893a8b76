"""Several CLIP guides in every method; tests/method/test_guides.py has those that train a mapper."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from quick_fits import quick

from cfclip.baselines.methods import METHODS
from cfclip.method.loop import Callback, generator_for
from cfclip.method.losses import directional

PROMPT = "green lipstick"


def unit(guide, images):
    return F.normalize(guide.encode_image(images), dim=-1)


@pytest.mark.parametrize("method", METHODS)
def test_two_guides_that_are_the_same_are_one_in_every_method(method, domain, two_guides):
    w = domain.latents(2, "test")
    once = quick(method, domain).edit(w)
    twice = quick(method, replace(domain, more_guides=(domain.clip,)), guides=2).edit(w)
    other = quick(method, two_guides, guides=2).edit(w)
    assert (twice - once).abs().max() < 0.05 * (other - once).abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_more_guides_than_there_are_is_an_error_in_every_method(method, domain, tmp_path):
    with pytest.raises(ValueError, match="guides is 2, but domain tiny has 1"):
        quick(method, domain, tmp_path, guides=2)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_optimisation_goes_by_the_mean_of_the_cosines(two_guides):
    """The loss of its first step, which is that of the source pictures."""
    d, w = two_guides, two_guides.latents(2, "test")
    editor = quick("styleclip-optimization", d, steps=1, guides=2, guide_weights=(3.0, 1.0))
    editor.edit(w)
    x = d.generator.synthesis(w)
    each = [1 - (unit(g, x) * F.normalize(g.encode_text(PROMPT), dim=-1)).sum(1).mean() for g in d.guides]
    assert editor.rows[0]["clip"] == pytest.approx((0.75 * each[0] + 0.25 * each[1]).item(), rel=1e-5)


def test_a_generator_is_tuned_by_the_mean_of_the_directional_losses(two_guides):
    """The loss of the second step; that of the first is 1, whatever the guides see."""
    d = two_guides
    tuned = quick("nada-generator", d, steps=1, guides=2).module
    w = d.latents(6, "train")[torch.randint(6, (2,), generator=generator_for(0, 1))]
    x, edited = d.generator.synthesis(w), tuned.synthesis(w)
    each = []
    for guide in d.guides:
        texts = (guide.template_features(text) for text in (PROMPT, "face"))
        each.append(directional(unit(guide, edited), unit(guide, x), *texts).item())
    logged = quick("nada-generator", d, steps=2, guides=2).rows[-1]["directional"]  # the mean of both steps
    assert abs(each[0] - each[1]) > 1e-3
    assert 2 * logged - 1 == pytest.approx((each[0] + each[1]) / 2, rel=1e-3)


def test_a_channels_relevance_is_the_mean_over_guides(two_guides, tmp_path):
    both = quick("styleclip-global", two_guides, tmp_path / "both", guides=2, guide_weights=(3.0, 1.0))
    assert len(list(tmp_path.glob("channels-*"))) == 2, "the statistics are each guide's own"
    first, second = (
        quick("styleclip-global", replace(two_guides, clip=guide), tmp_path / name).module.relevance
        for name, guide in zip("ab", two_guides.guides, strict=True)
    )
    assert len(list(tmp_path.glob("channels-*"))) == 2, "and serve a single guide too"
    torch.testing.assert_close(both.module.relevance, 0.75 * first + 0.25 * second)


@pytest.mark.parametrize("method", ["nada-generator", "styleclip-global"])
def test_a_run_with_two_guides_is_resumed(method, two_guides, tmp_path):
    w, whole = two_guides.latents(2, "test"), quick(method, two_guides, guides=2)
    done = []

    def stop(step):
        done.append(step)
        if len(done) == (4 if method == "nada-generator" else 40):  # the latter with the second guide
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(
            method, two_guides, tmp_path / "run", callbacks=[Callback(1, stop)], guides=2, checkpoint_every=2
        )
    resumed = quick(method, two_guides, tmp_path / "run", guides=2, checkpoint_every=2)
    assert torch.equal(whole.edit(w), resumed.edit(w))
