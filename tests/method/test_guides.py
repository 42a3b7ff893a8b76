"""Several CLIP guides: each has a loss of its own features, and the weighted mean counts."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cfclip.checkpoints import weights
from cfclip.method import CLIPNCE, Callback, ClipDistance, Directional, train_mapper
from cfclip.method.config import CFCLIPConfig, MultiPromptConfig, with_settings
from cfclip.method.loop import generator_for
from cfclip.method.losses import clip_distance, clip_nce, directional
from cfclip.method.trainer import MapperTrainer
from cfclip.method.views import perspective_views

PROMPT = "green lipstick"
CONFIG = CFCLIPConfig(PROMPT, steps=6, train_latents=6, guides=2)
BY_HAND = [
    (CLIPNCE(), lambda e, s, plain, t, d: clip_nce(e, s, t, d)),
    (ClipDistance(), lambda e, s, plain, t, d: clip_distance(e, plain)),
    (Directional(), lambda e, s, plain, t, d: directional(e, s, t, d)),
]
objectives = pytest.mark.parametrize("objective", [one for one, _ in BY_HAND], ids=lambda one: one.name)


def first_step(domain, config):
    """The logs and the gradients of one step."""
    run = MapperTrainer(domain, config)
    logs = run.step(0, generator_for(0, 5))
    return logs, [p.grad for p in run.mapper.parameters()]


def close(a, b):
    """Gradients up to rounding."""
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5 * y.abs().max().item())


@objectives
def test_one_guide_of_several_trains_as_if_it_were_alone(objective, domain, two_guides):
    config = replace(CONFIG, objective=objective, guides=1)
    alone, among = (train_mapper(d, config, progress=False)[0] for d in (domain, two_guides))
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), among.parameters(), strict=True))


@objectives
def test_two_guides_that_are_the_same_are_one(objective, domain):
    config = replace(CONFIG, objective=objective, guide_weights=(1.0, 4.0))
    twice = first_step(replace(domain, more_guides=(domain.clip,)), config)
    once = first_step(domain, replace(config, guides=1, guide_weights=None))
    assert twice[0] == pytest.approx(once[0], rel=1e-5)
    close(twice[1], once[1])


@pytest.mark.parametrize("guide_weights", [None, (6.0, 2.0)])
@pytest.mark.parametrize(("objective", "by_hand"), BY_HAND, ids=[one.name for one, _ in BY_HAND])
def test_the_loss_is_the_mean_of_each_guides_own(objective, by_hand, guide_weights, two_guides):
    """Written out from images: all guides see the same views, each at its own size."""
    d = two_guides
    run = MapperTrainer(d, replace(CONFIG, objective=objective, guide_weights=guide_weights))
    generator = generator_for(0, 5)
    w = run.w[torch.randint(6, (2,), generator=generator)]
    text = d.clip.encode_text(PROMPT)  # the first guide's
    source, edited = d.generator.synthesis(w), d.generator.synthesis(run.mapper.edit(w, text))
    views = perspective_views(edited, 8, generator=generator)
    losses = []
    for guide in d.guides:
        e, s = (F.normalize(guide.encode_image(images), dim=-1) for images in (views, source))
        plain = F.normalize(guide.encode_text(PROMPT), dim=-1)
        losses.append(
            by_hand(e, s, plain, *(guide.template_features(text) for text in (PROMPT, "face"))).item()
        )
    assert abs(losses[0] - losses[1]) > 1e-3, "the guides differ, or this would show nothing"
    expected = (losses[0] + losses[1]) / 2 if guide_weights is None else 0.75 * losses[0] + 0.25 * losses[1]
    assert run.step(0, generator_for(0, 5))[objective.name] == pytest.approx(expected, rel=1e-5)


def test_many_prompts_and_micro_batches_are_the_same_step_with_two_guides(two_guides):
    prompts = ("green lipstick", "blue hair", "red skin")
    config = MultiPromptConfig(prompts=prompts, prompts_at_once=2, batch=4, train_latents=6, guides=2)
    whole, parts = (first_step(two_guides, replace(config, micro_batch=size)) for size in (None, 1))
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    close(parts[1], whole[1])
    one = first_step(two_guides, replace(config, guides=1))
    assert whole[0]["nce"] != pytest.approx(one[0]["nce"], rel=1e-3)


def test_a_run_with_two_guides_is_resumed_and_its_file_says_so(two_guides, tmp_path):
    def stop(done):
        if done == 3:
            raise KeyboardInterrupt

    interrupted = {"callbacks": [Callback(1, stop)], "checkpoint_every": 2, "progress": False}
    config = replace(CONFIG, guide_weights=(2.0, 1.0))
    with pytest.raises(KeyboardInterrupt):
        train_mapper(two_guides, config, tmp_path, **interrupted)
    for other in ({"guides": 1, "guide_weights": None}, {"guide_weights": (1.0, 2.0)}):
        with pytest.raises(ValueError, match=r"another guide.*refusing to resume"):
            train_mapper(two_guides, replace(config, **other), tmp_path, progress=False)
    resumed, _ = train_mapper(two_guides, config, tmp_path, progress=False)
    whole, _ = train_mapper(two_guides, config, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    training = weights.read_header(tmp_path / "mapper.safetensors").card["training"]
    assert (training["guides"], training["guide_weights"]) == (2, [2.0, 1.0])
    given = {name: value for name, value in training.items() if name != "prompt"}
    assert with_settings(CFCLIPConfig(PROMPT), given) == config


def test_a_run_is_refused_by_name_after_its_second_guide_changed(two_guides, tmp_path):
    train_mapper(two_guides, replace(CONFIG, steps=1), tmp_path, progress=False)
    other = deepcopy(two_guides)
    with torch.no_grad():
        next(other.more_guides[0].parameters()).view(-1)[0].add_(1e-3)
    with pytest.raises(ValueError, match="holds a run with another guide2;"):
        train_mapper(other, replace(CONFIG, steps=1), tmp_path, progress=False)


def test_more_guides_than_there_are(domain, two_guides, tmp_path):
    with pytest.raises(ValueError, match="guides is 2, but domain tiny has 1"):
        train_mapper(domain, CONFIG, tmp_path, progress=False)
    assert not list(tmp_path.iterdir()), "the folder is free for another run"
    with pytest.raises(ValueError, match="guides is 3, but domain tiny has 2"):
        MapperTrainer(two_guides, replace(CONFIG, guides=3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"guides": 0},
        {"guides": 1.0},
        {"guide_weights": 1.0},
        {"guide_weights": ()},
        {"guide_weights": (1.0,)},
        {"guide_weights": (1.0, 1.0, 1.0)},
        {"guide_weights": (1.0, 0.0)},
        {"guide_weights": (1.0, float("inf"))},
        {"guide_weights": (1.0, "1")},
    ],
    ids=str,
)
def test_wrong_settings_of_guides_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        replace(CONFIG, **wrong)
