"""Every method behind the one interface, and what each computes, against formulas written out here."""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quick_fits import quick, small
from torch import nn

from cfclip import latents
from cfclip.baselines.library import find_mappers, load_editor
from cfclip.baselines.mappers import MapperEditor
from cfclip.baselines.methods import METHODS, configure, fit, settings
from cfclip.baselines.offset import OffsetTrainer
from cfclip.baselines.stylespace import (
    GlobalConfig,
    GlobalEditor,
    automatic_beta,
    channel_statistics,
    convolutions,
    global_direction,
)
from cfclip.checkpoints.generators import load_generator
from cfclip.method.config import CFCLIPConfig
from cfclip.method.loop import Callback, generator_for
from cfclip.method.losses import clip_distance, clip_nce, directional
from cfclip.method.trainer import MapperTrainer, train_mapper

TRAINED = ["cfclip", "styleclip-mapper", "nada", "nada-generator", "offset"]
every = pytest.mark.parametrize("method", METHODS)


def test_defaults_are_the_papers():
    mapper, tuned = settings("styleclip-mapper"), settings("nada-generator")
    optimization = settings("styleclip-optimization")
    published = {"lr": 0.5, "batch": 2, "steps": 50_000, "lambda_l2": 0.8, "lambda_nce": 1.0, "num_views": 0}
    assert published.items() <= mapper.items() and mapper["lambda_id"] == 0.1
    assert {"lr": 0.1, "steps": 300, "lambda_l2": 0.008, "lambda_id": 0.005}.items() <= optimization.items()
    assert {"lr": 0.002, "batch": 2, "steps": 300}.items() <= tuned.items()
    assert configure("cfclip", "x") == CFCLIPConfig("x")


REFUSED = [
    ("cfclip", {"lambda_id": 0.2}, "lambda_id", {"lambda_id": 0.0}),
    ("cfclip", {"lambda_id": 0.0, "negative_templates": 80}, "from 1 to 79", {"lambda_id": 0.0}),
    ("nada-generator", {"layers": 99}, "set it to that or less", {"layers": 2}),
    ("styleclip-global", {"beta": 0.99}, "lower", {"beta": 0.0}),
]


@pytest.mark.parametrize(("method", "bad", "words", "good"), REFUSED)
def test_a_run_whose_settings_were_refused_can_be_begun_with_others(
    method, bad, words, good, domain, tmp_path
):
    domain = dataclasses.replace(domain, identity=None)
    with pytest.raises(ValueError, match=words):
        quick(method, domain, tmp_path, **bad)
    quick(method, domain, tmp_path, **good)
    with pytest.raises(ValueError, match="holds a run with another seed"):
        quick(method, domain, tmp_path, **good | {"seed": 1})


@every
def test_strength_and_files(method, domain, tmp_path):
    editor, w = quick(method, domain, tmp_path / "run"), latents.sample(domain.generator, 3, "test")
    source, edited = domain.generator.synthesis(w), editor.edit(w)
    assert torch.equal(editor.edit(w, 0.0), source)
    assert (edited - source).abs().amax((1, 2, 3)).min() > 1e-4
    assert not torch.allclose(editor.edit(w, 0.5), edited)
    again = load_editor(tmp_path / "run", domain)
    assert torch.equal(again.edit(w), edited) and again.config == editor.config and again.method == method
    assert not list((tmp_path / "run").rglob("*.part"))


@every
def test_there_and_back(method, domain):
    editor, w = quick(method, domain), latents.sample(domain.generator, 2, "test")
    back, g = editor.round_trip(w, 0.7), domain.generator
    if method == "styleclip-optimization":
        assert back is None
    elif isinstance(editor, MapperEditor):
        residual = lambda w: 0.07 * editor.module.residual(w, domain.clip.encode_text("green lipstick"))  # noqa: E731
        moved = w + residual(w)
        torch.testing.assert_close(back, g.synthesis(moved - residual(moved)))
    else:
        assert torch.equal(back, g.synthesis(w))


@every
def test_a_null_edit_asks_for_nothing(method, domain):
    """The prompt is the source text: no direction to go in, and nothing that is not a number. It says so."""
    changes = {name: value for name, value in {"steps": 3, "beta": 0.15}.items() if name in settings(method)}
    with pytest.warns(UserWarning, match="nothing can move: the prompt ' Face' is the source text") as said:
        editor = quick(method, domain, prompt=" Face", **changes)
    assert len(said) == 1
    w = latents.sample(domain.generator, 2, "test")
    assert editor.edit(w).isfinite().all() and all(
        math.isfinite(value) for row in editor.rows for value in row.values()
    )
    if method in ("styleclip-global", "nada-generator"):
        assert torch.equal(editor.edit(w), domain.generator.synthesis(w))


@every
def test_an_edit_leaves_the_networks_and_the_random_numbers_alone(method, domain):
    editor, w = quick(method, domain), latents.sample(domain.generator, 2, "test")
    before = {name: t.clone() for name, t in domain.generator.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with torch.no_grad():  # where evaluation calls it
        editor.edit(w)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(t, before[name]) for name, t in domain.generator.state_dict().items())
    assert not any(p.requires_grad for p in domain.generator.parameters())


@pytest.mark.parametrize("method", [*TRAINED, "styleclip-global"])
def test_a_resumed_run_is_the_uninterrupted_one(method, domain, tmp_path):
    w = latents.sample(domain.generator, 2, "test")
    whole = quick(method, domain)

    def stop(step):
        if step == 4:
            raise KeyboardInterrupt

    steps, loop = [], {"out": tmp_path / "run", "progress": False, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        fit(method, domain, "green lipstick", callbacks=[Callback(1, stop)], **loop, **small(method))
    count = [Callback(1, steps.append)]
    resumed = fit(method, domain, "green lipstick", callbacks=count, **loop, **small(method))
    assert steps[0] == 5
    assert torch.equal(whole.edit(w), resumed.edit(w))


def texts(domain):
    return (domain.clip.template_features(text) for text in ("green lipstick", "face"))


def plain(domain):
    return F.normalize(domain.clip.encode_text("green lipstick"), dim=-1)


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        ("cfclip", lambda e, s, d: clip_nce(e, s, *texts(d))),
        ("styleclip-mapper", lambda e, s, d: clip_distance(e, plain(d))),
        ("nada", lambda e, s, d: directional(e, s, *texts(d))),
        ("nada-generator", lambda e, s, d: directional(e, s, *texts(d))),
        ("offset", lambda e, s, d: clip_nce(e, s, *texts(d))),
    ],
)
def test_training_lowers_its_own_objective(method, loss, domain):
    """On the same pictures, after 1 and after 40 steps; the logged means are over other pictures each."""
    changes = {"lambda_l2": 0.0, "lambda_id": 0.0, "lr": 5.0} if method != "nada-generator" else {}
    w, unit = domain.latents(6, "train"), lambda x: F.normalize(domain.clip.encode_image(x), dim=-1)
    source = unit(domain.generator.synthesis(w))
    before, after = (
        loss(unit(quick(method, domain, **changes, steps=steps).edit(w)), source, domain) for steps in (1, 40)
    )
    assert after < before - 1e-3


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("method", ["styleclip-mapper", "nada"])
def test_the_logged_loss_is_the_papers(method, domain):
    """One step, written out from pictures with numpy."""
    config = configure(method, "green lipstick", train_latents=6)
    run, clip = MapperTrainer(domain, config), domain.clip
    w = run.w[torch.randint(6, (2,), generator=generator_for(0, 5))]
    w_edited = run.mapper.edit(w)
    with torch.no_grad():
        x, edited = (domain.generator.synthesis(v) for v in (w, w_edited))
        e, s = (clip.encode_image(v).double().numpy() for v in (edited, x))
        r, r_source = (domain.identity(v).double().numpy() for v in (edited, x))
        text = clip.encode_text("green lipstick")[0].double().numpy()
        target, source = (clip.template_features(t).double().numpy() for t in ("green lipstick", "face"))
    unit = [[v / np.linalg.norm(v) for v in rows] for rows in (e, s)]
    towards = (
        np.mean([1 - cosine(a, text) for a in e])
        if method == "styleclip-mapper"
        else np.mean([1 - cosine(a - b, (target - source).mean(0)) for a, b in zip(*unit, strict=True)])
    )
    expected = (
        towards
        + 0.8 * (w_edited - w).square().mean().item()
        + 0.1 * np.mean([1 - a @ b for a, b in zip(r, r_source, strict=True)])
    )
    assert run.step(0, generator_for(0, 5))["loss"] == pytest.approx(expected, rel=1e-4)


def test_mappers_of_the_baselines_see_no_text(domain, tmp_path):
    quick("styleclip-mapper", domain, tmp_path / "a")
    assert find_mappers(tmp_path)["green lipstick"].config.text_dim is None


def test_cfclip_is_train_mapper(domain, tmp_path):
    w, text = latents.sample(domain.generator, 2, "test"), domain.clip.encode_text("green lipstick")
    train_mapper(domain, configure("cfclip", "green lipstick", **small("cfclip")), tmp_path, progress=False)
    stored = domain.generator.synthesis(find_mappers(tmp_path)["green lipstick"].edit(w, text))
    assert torch.equal(quick("cfclip", domain).edit(w), stored)
    assert torch.equal(load_editor(tmp_path, domain).edit(w), stored)


# --- optimisation


def test_optimisation_is_adam_on_the_published_sum(domain):
    """Two steps of one picture, by hand: the first has learning rate 0, the second is Adam's."""
    w = latents.sample(domain.generator, 1, "test")
    editor = quick("styleclip-optimization", domain, steps=2, lambda_l2=0.5, lambda_id=0.3)
    shift, m, v = torch.zeros_like(w), 0.0, 0.0
    text = F.normalize(domain.clip.encode_text("green lipstick"), dim=-1)
    for i in range(2):
        d = shift.clone().requires_grad_()
        x = domain.generator.synthesis(w + d)
        loss = 1 - (F.normalize(domain.clip.encode_image(x), dim=-1) * text).sum() + 0.5 * (d**2).sum()
        loss = loss + 0.3 * (1 - (domain.identity(x) * domain.identity(domain.generator.synthesis(w))).sum())
        (g,) = torch.autograd.grad(loss, d)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        rate = 0.1 * (0.5 - 0.5 * math.cos(math.pi * min(1, (1 - i / 2) / 0.25))) * min(1, i / 2 / 0.05)
        shift = shift - rate * (m / (1 - 0.9 ** (i + 1))) / ((v / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
    torch.testing.assert_close(editor.shift(w), shift, rtol=1e-3, atol=1e-5)
    assert shift.abs().max() > 0.05


def test_optimisation_lowers_its_loss_and_pictures_do_not_touch(domain):
    w = latents.sample(domain.generator, 3, "test")
    editor = quick("styleclip-optimization", domain, steps=40, batch=3, lambda_id=0.0)
    together = editor.edit(w)
    assert editor.rows[-1]["loss"] < editor.rows[0]["loss"]
    alone = quick("styleclip-optimization", domain, steps=40, batch=1, lambda_id=0.0).edit(w[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-2, atol=1e-2)


def test_another_strength_is_no_second_optimisation(domain):
    seen, w = [], latents.sample(domain.generator, 1, "test")
    editor = fit(
        "styleclip-optimization",
        domain,
        "green lipstick",
        progress=False,
        callbacks=[Callback(6, seen.append)],
        steps=6,
    )
    for strength in (0.0, 1.0, 0.5):
        editor.edit(w, strength)
    assert seen == [6]
    editor.edit(w + 1)
    assert seen == [6, 6]
    both = editor.edit(torch.cat([w, w + 1]))  # nor is the same picture among others
    assert seen == [6, 6]
    torch.testing.assert_close(both[:1], editor.edit(w))


# --- global directions


class ToyGenerator(nn.Module):
    """Whose picture is its style channels, one a pixel: conv (3), rgb (2), conv (2)."""

    z_dim, w_dim, num_ws, resolution = 7, 7, 1, 8

    def __init__(self):
        super().__init__()
        self.register_buffer("w_avg", torch.zeros(7))

    def mapping(self, z, truncation=1.0):
        return (z * torch.tensor([1.0, 2, 1, 1, 1, 1, 0.5]) + 10)[:, None]

    def style_space(self, w):
        return list(w[:, 0].split([3, 2, 2], 1))

    def synthesis_from_styles(self, styles, dtype=None):
        return torch.cat(styles, 1)[:, None, None]


class ToyClip(nn.Module):
    """Sees the pixels; "target" is one of them more, and a little of another one less."""

    embed_dim = 7

    def in_dtype(self, dtype):
        return self

    def preprocess(self, images):
        return images

    def encode_image(self, images, preprocessed):
        return images.flatten(1)

    def template_features(self, text):
        base = torch.full((1, 7), 0.3)
        return F.normalize(
            base + (torch.tensor([0.0, 0, 0, 0, 1.2, 1, -0.2]) if text == "target" else 0.0), dim=-1
        ).repeat(3, 1)


@pytest.fixture
def toy():
    g, clip = ToyGenerator(), ToyClip()
    return SimpleNamespace(
        name="toy",
        generator=g,
        clip=clip,
        first_guides=lambda count: (clip,),
        truncation=1.0,
        source_text="face",
        device=torch.device("cpu"),
        latents=lambda n, split, seed=0: latents.sample(g, n, split, seed),
    )


def test_the_right_channel_is_relevant(toy):
    config = GlobalConfig("target", samples=5, style_samples=2500, alpha=3.0, beta=0.43)
    channels, _ = channel_statistics(toy, config, progress=False)
    found = global_direction(toy, config, channels)
    assert channels.std.numpy() == pytest.approx(
        [1, 2, 1, 1, 0.5], rel=0.05
    ) and channels.mean.numpy() == pytest.approx([10] * 5, abs=0.2)
    assert convolutions(toy.generator.style_space(torch.zeros(1, 1, 7))) == [0, 2]
    assert found.relevance.argmax() == 3  # pixel 5; pixel 4, the most relevant, belongs to ToRGB
    assert (found.step != 0).tolist() == [False, False, False, True, False]
    assert found.step[3].item() == pytest.approx(3.0 * channels.std[3].item())
    editor = GlobalEditor("styleclip-global", toy, config, found)
    w = latents.sample(toy.generator, 2, "test")
    moved = editor.edit(w, 2.0) - editor.edit(w, 0.0)
    assert moved.flatten(1).numpy() == pytest.approx(
        np.array([[0, 0, 0, 0, 0, 6 * channels.std[3].item(), 0]] * 2), abs=1e-4
    )


@pytest.mark.parametrize(
    ("channels", "expected"),
    [({0.205: 21, 0.12: 99}, 0.2), ({0.205: 20, 0.155: 1}, 0.15), ({0.5: 30}, 0.29), ({0.5: 20}, 0.1)],
)
def test_the_authors_own_beta_leaves_more_than_twenty_channels(channels, expected):
    relevance = torch.cat([torch.full((count,), value) for value, count in channels.items()])
    assert automatic_beta(-relevance) == expected


def test_relevance_by_hand(toy):
    """One picture, one channel: the published formula in numpy."""
    config = GlobalConfig("target", samples=1, style_samples=50, sigmas=2.0)
    channels, _ = channel_statistics(toy, config, progress=False)
    picture = latents.sample(toy.generator, 1, "train")[0, 0].double().numpy()
    ends = []
    for sign in (1, -1):
        moved = picture.copy()
        moved[5] = channels.mean[3].item() + sign * 2.0 * channels.std[3].item()
        ends.append(moved / np.linalg.norm(moved))
    target, source = (toy.clip.template_features(t)[0].double().numpy() for t in ("target", "face"))
    expected = cosine(ends[0] - ends[1], target - source)
    assert global_direction(toy, config, channels).relevance[3].item() == pytest.approx(expected, abs=1e-4)


def test_channel_statistics_are_shared_by_prompts_and_by_nothing_else(domain, tmp_path):
    quick("styleclip-global", domain, tmp_path / "a")
    tried = []

    def blue_hair(folder, **changes):
        loop = {"out": tmp_path / folder, "progress": False, "callbacks": [Callback(1, tried.append)]}
        fit("styleclip-global", domain, "blue hair", **loop, **small("styleclip-global", **changes))

    blue_hair("b")
    assert tried == [] and len(list(tmp_path.glob("channels-*"))) == 1
    blue_hair("c", sigmas=4.0)
    assert tried and len(list(tmp_path.glob("channels-*"))) == 2
    with torch.no_grad():
        domain.generator.const += 1  # another generator of the same name
    tried.clear()
    blue_hair("d")
    assert tried


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"\xff" * 99])
def test_damaged_channel_statistics_are_measured_again(damage, domain, tmp_path):
    first = quick("styleclip-global", domain, tmp_path / "a")
    (file,) = tmp_path.glob("channels-*/channels.safetensors")
    good = file.read_bytes()
    file.write_bytes(damage(good))
    with pytest.warns(UserWarning, match=r"measured again: .*channels\.safetensors"):
        again = quick("styleclip-global", domain, tmp_path / "b")
    assert torch.equal(first.module.step, again.module.step) and file.read_bytes() == good


def test_a_run_waits_for_the_channel_statistics_of_another(domain, tmp_path):
    with ThreadPoolExecutor(2) as both:
        fits = [both.submit(quick, "styleclip-global", domain, tmp_path / name) for name in "ab"]
        steps = [one.result().module.step for one in fits]
    assert torch.equal(*steps) and len(list(tmp_path.glob("channels-*"))) == 1
    assert sorted(len(one.result().rows) > 0 for one in fits) == [False, True], "they are measured once"


def test_no_beta_is_the_authors_own(toy):
    config = GlobalConfig("target", samples=2, style_samples=50, beta=None)
    channels, _ = channel_statistics(toy, config, progress=False)
    same = dataclasses.replace(config, beta=0.1)  # fewer than twenty channels in all
    steps = [global_direction(toy, one, channels).step for one in (config, same)]
    assert torch.equal(*steps) and steps[0].any()


def test_a_threshold_that_nothing_reaches(domain):
    with pytest.raises(ValueError, match=r"beta = 1\.5 for 'green lipstick', the most is 0\."):
        quick("styleclip-global", domain, beta=1.5)


# --- one offset


def test_an_offset_is_one_step_for_all_faces_in_the_layers_that_are_edited(domain):
    editor = quick("offset", domain, levels=["medium"], lr=5.0)
    w = latents.sample(domain.generator, 3, "test")
    moved = editor.module.edit(w, strength=2.0) - w
    assert torch.allclose(moved, moved[:1].expand_as(moved), atol=1e-6)
    first = domain.level_split[0]
    assert (moved[:, :first] == 0).all() and (moved[:, first:] != 0).any()
    torch.testing.assert_close(moved, 0.2 * editor.module.delta * editor.module.edited + 0 * w)


def test_an_offsets_loss_is_cfclips(domain):
    """The logged loss of the first step is that of a mapper that gives the same residual."""
    config = configure("offset", "green lipstick", train_latents=6)
    run, mapper = OffsetTrainer(domain, config), MapperTrainer(domain, config)
    mapper.mapper = run.mapper
    terms = [trainer.step(0, generator_for(0, 5)) for trainer in (mapper, run)]
    assert terms[0] == pytest.approx(terms[1], rel=1e-6) and {"loss", "nce", "l2", "id"} <= terms[1].keys()
    assert run.optimizer.param_groups[0]["lr"] == 0.5 and len(run.optimizer.param_groups) == 1


# --- StyleGAN-NADA's generator


def test_the_layers_are_chosen_whose_codes_move_most(domain):
    """One step of gradient descent on the CLIP loss, written out; only these layers are then trained."""
    g, clip = domain.generator, domain.clip
    w = domain.latents(6, "train")[torch.randint(6, (8,), generator=generator_for(0, 0))]
    moved = w.clone().requires_grad_()
    images = g.synthesis(moved)
    (1 - F.cosine_similarity(clip.encode_image(images), clip.encode_text("green lipstick"))).sum().backward()
    after = w - 0.01 * moved.grad
    order = (after - w).abs().mean((0, 2))[: len(g.convs)].argsort(descending=True)[:2].tolist()
    tuned = quick("nada-generator", domain, steps=1, layers=2).module
    changed = [k for k, conv in enumerate(tuned.convs) if not torch.equal(conv.weight, g.convs[k].weight)]
    assert changed == sorted(order) and torch.equal(tuned.const, g.const)
    with pytest.raises(ValueError, match=r"layers is 99, but this generator has 5: set it to that or less"):
        quick("nada-generator", domain, layers=99)


def test_only_synthesis_is_tuned_and_its_file_is_a_generator(domain, tmp_path):
    editor = quick("nada-generator", domain, tmp_path / "run")
    source = domain.generator.state_dict()
    changed = {
        name
        for name, t in load_generator(tmp_path / "run" / "generator.safetensors").state_dict().items()
        if not torch.equal(t, source[name])
    }
    assert {"const", "convs.0.weight", "convs.4.bias", "convs.1.affine.weight"} <= changed
    assert not any(name.startswith(("style.", "rgbs.", "w_avg")) or "noise_const" in name for name in changed)
    w = latents.sample(domain.generator, 2, "test")
    torch.testing.assert_close(editor.edit(w), editor.module.synthesis(w), rtol=1e-4, atol=1e-5)
    doubled = editor.edit(w, 2.0) - editor.edit(w, 0.0)
    assert doubled.abs().mean() > 1.2 * (editor.edit(w) - editor.edit(w, 0.0)).abs().mean()


def test_its_first_step_leaves_the_source_though_the_cosine_is_undefined(domain):
    rows = quick("nada-generator", domain, steps=1).rows
    assert rows[0]["directional"] == pytest.approx(1, abs=1e-5)  # E(x') = E(x)
    editor = quick("nada-generator", domain, steps=1)
    assert not torch.equal(editor.module.const, domain.generator.const)


# --- what cannot be


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("dreambooth", {}, "'dreambooth'; choose one of cfclip, styleclip-mapper"),
        ("cfclip", {"lamda_id": 1}, "cfclip: .*no setting 'lamda_id'; it has: .*lambda_id"),
        ("styleclip-mapper", {"temperature": 1.0}, "no setting 'temperature'"),
        ("styleclip-mapper", {"objective": "nce"}, "no setting 'objective'"),
        ("styleclip-global", {"steps": 3}, "no setting 'steps'.*alpha, beta"),
        ("styleclip-optimization", {"steps": 0}, "steps must be a whole number from 1"),
        ("nada-generator", {"batch": 1.5}, "batch must be a whole number"),
        ("styleclip-global", {"samples": 0}, "samples must be"),
    ],
)
def test_wrong_methods_and_settings_are_named(method, changes, words, domain):
    with pytest.raises(ValueError, match=words):
        fit(method, domain, "green lipstick", progress=False, **changes)


@every
@pytest.mark.parametrize(("prompt", "words"), [(" ", "prompt must be"), ("very " * 60 + "green", "24")])
def test_prompts_that_cannot_be_used(method, prompt, words, domain, tmp_path):
    with pytest.raises(ValueError, match=words):
        fit(method, domain, prompt, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["cfclip", "styleclip-mapper", "styleclip-optimization"])
def test_a_domain_without_identity(method, domain):
    dog = dataclasses.replace(domain, identity=None)
    with pytest.raises(ValueError, match="no identity network: set lambda_id=0"):
        quick(method, dog)
    w = latents.sample(dog.generator, 1, "test")
    assert quick(method, dog, lambda_id=0.0).edit(w).isfinite().all()


def test_a_folder_holds_one_run(domain, tmp_path):
    quick("nada", domain, tmp_path)
    with pytest.raises(ValueError, match="another seed; refusing to resume"):
        quick("nada", domain, tmp_path, seed=1)
    with pytest.raises(ValueError, match="another method"):
        quick("cfclip", domain, tmp_path)
