import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from written_out import one_step

from cfclip import latents
from cfclip.baselines.library import find_mappers
from cfclip.checkpoints import weights
from cfclip.method import CLIPNCE, Callback, ClipDistance, Directional, FrozenNetworks, run_loop
from cfclip.method.config import CFCLIPConfig, MultiPromptConfig, flat, with_settings
from cfclip.method.loop import generator_for
from cfclip.method.losses import clip_distance, directional, identity_loss, latent_l2
from cfclip.method.trainer import MapperTrainer, train_mapper
from cfclip.method.views import perspective_views
from cfclip.models.ops import fast_dtype, name_of

CONFIG = CFCLIPConfig("green lipstick", steps=6, train_latents=6)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def interrupted_at(step):
    def stop(done):
        if done == step:
            raise KeyboardInterrupt

    return {"callbacks": [Callback(1, stop)], "checkpoint_every": 2, "progress": False}


def test_two_runs_agree_to_the_digit_and_a_resumed_one_too(domain, tmp_path):
    first, rows = train_mapper(domain, CONFIG, progress=False)
    second, rows2 = train_mapper(domain, CONFIG, tmp_path, progress=False)
    assert equal(first, second)
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in r] for r in (rows, rows2)]
    assert timeless[0] == timeless[1]
    with pytest.raises(KeyboardInterrupt):
        train_mapper(domain, CONFIG, tmp_path / "resumed", **interrupted_at(5))
    steps = []
    third, _ = train_mapper(
        domain, CONFIG, tmp_path / "resumed", progress=False, callbacks=[Callback(1, steps.append)]
    )
    assert steps == [5, 6] and equal(first, third)


def test_a_training_leaves_torchs_random_numbers_alone(domain):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    train_mapper(domain, CONFIG, progress=False)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "other", [{"prompt": "blue hair"}, {"seed": 1}, {"steps": 5}, {"objective": ClipDistance()}, {"lr": 1.0}]
)
def test_a_folder_does_not_lend_its_weights_to_another_run(other, domain, tmp_path):
    train_mapper(domain, CONFIG, tmp_path, progress=False)
    with pytest.raises(ValueError, match=f"another {next(iter(other))}.*refusing to resume"):
        train_mapper(domain, replace(CONFIG, **other), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("objective", "by_hand"),
    [
        (ClipDistance(), lambda e, s, plain, t, d: clip_distance(e, plain)),
        (Directional(), lambda e, s, plain, t, d: directional(e, s, t, d)),
    ],
)
def test_an_objective_takes_the_place_of_nce(objective, by_hand, domain):
    """The first step's loss, written out from images."""
    run = MapperTrainer(domain, replace(CONFIG, objective=objective, num_views=0))
    generator = generator_for(0, 0)
    w = run.w[torch.randint(6, (2,), generator=generator)]
    w_edited = run.mapper.edit(w, domain.clip.encode_text("green lipstick"))
    x, edited = domain.generator.synthesis(w), domain.generator.synthesis(w_edited)
    e, s = (F.normalize(domain.clip.encode_image(images), dim=-1) for images in (edited, x))
    plain = F.normalize(domain.clip.encode_text("green lipstick"), dim=-1)
    texts = (domain.clip.template_features(text) for text in ("green lipstick", "face"))
    expected = 0.3 * by_hand(e, s, plain, *texts) + 0.8 * latent_l2(w_edited, w)
    expected = expected + 0.2 * identity_loss(domain.identity(edited), domain.identity(x))
    assert run.step(0, generator_for(0, 0))["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_an_objective_shows_its_directions(domain):
    run = MapperTrainer(domain, CONFIG)
    w = run.w[:2]
    with torch.no_grad():
        views = run.networks.clip(run.networks.synthesise(run.mapper.edit(w, run.text_feature)), 8)
        features = run.features(0, views, run.sources.clip[:2], run.sources.clip[:1])
    q, p1, p2, n_k = run.config.objective.directions(features)
    assert (q.shape, p1.shape, p2.shape, n_k.shape) == ((16, 16), (1, 16), (16, 16), (79, 16))
    for x in (q, p1, p2, n_k):
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(len(x)))


@pytest.mark.parametrize("many", [False, True])
def test_micro_batches_are_the_same_step(many, domain):
    """The batch's losses, gradients and random numbers, whichever part of it is in memory at a time."""
    prompts = ("green lipstick", "blue hair", "red skin")
    config = MultiPromptConfig(prompts=prompts, prompts_at_once=2) if many else CONFIG
    results = []
    for micro_batch in (None, 1, 3):
        run = MapperTrainer(domain, replace(config, batch=4, train_latents=6, micro_batch=micro_batch))
        generator = generator_for(0, 5)
        logs = run.step(0, generator)
        results.append((logs, [p.grad for p in run.mapper.parameters()], generator.get_state()))
    for logs, gradients, random in results[1:]:
        assert logs == pytest.approx(results[0][0], rel=1e-5) and torch.equal(random, results[0][2])
        for a, b in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())


def test_training_lowers_the_loss(domain):
    config = replace(CONFIG, steps=40, lambda_l2=0.0, lambda_id=0.0)
    _, rows = train_mapper(domain, config, progress=False)
    assert rows[-1]["nce"] < rows[0]["nce"]


def test_the_cached_step_is_the_published_loss(domain):
    logs, w, w_edited, x, edited, nce = one_step(MapperTrainer(domain, CONFIG))
    loss = (
        0.3 * nce
        + 0.2 * identity_loss(domain.identity(edited), domain.identity(x))
        + 0.8 * latent_l2(w_edited, w)
    )
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_file_is_the_mapper_alone_and_says_how_it_was_trained(domain, tmp_path):
    mapper, _ = train_mapper(domain, CONFIG, tmp_path / "run", progress=False)
    stored = find_mappers(tmp_path)["green lipstick"]
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (stored, mapper)]
    assert shapes[0] == shapes[1]
    path = tmp_path / "run" / "mapper.safetensors"
    assert path.stat().st_size < 2 * sum(p.numel() for p in mapper.parameters()) + 20_000  # half floats
    card = weights.read_header(path).card
    assert (card["method"], card["domain"], card["training"]) == ("cfclip", "tiny", flat(CONFIG))


def test_train_and_test_latents_are_disjoint(generator):
    train, test = latents.sample(generator, 50, "train"), latents.sample(generator, 50, "test")
    assert torch.cdist(train[:, 0], test[:, 0]).min() > 1e-3
    assert torch.equal(train[:10], latents.sample(generator, 10, "train"))
    with pytest.raises(ValueError, match="'all'"):
        latents.sample(generator, 1, "all")


def test_auto_is_the_fast_dtype_of_this_machine_and_is_written_down(domain, tmp_path):
    fast = name_of(fast_dtype(torch.device("cpu")))
    mapper, _ = train_mapper(domain, replace(CONFIG, dtype="auto"), tmp_path, progress=False)
    expected, _ = train_mapper(domain, replace(CONFIG, dtype=fast), progress=False)
    assert equal(mapper, expected)
    assert weights.read_header(tmp_path / "mapper.safetensors").card["training"]["dtype"] == fast
    assert FrozenNetworks(domain, "auto").dtype == getattr(torch, fast)


@pytest.mark.parametrize("begun", ["bfloat16", "float32"])
def test_a_run_is_resumed_in_the_dtype_it_began_with(begun, domain, tmp_path):
    """Whatever "auto" means on the machine that resumes it."""
    with pytest.raises(KeyboardInterrupt):
        train_mapper(domain, replace(CONFIG, dtype=begun), tmp_path, **interrupted_at(3))
    resumed, _ = train_mapper(domain, replace(CONFIG, dtype="auto"), tmp_path, progress=False)
    whole, _ = train_mapper(domain, replace(CONFIG, dtype=begun), progress=False)
    assert equal(resumed, whole)


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (CFCLIPConfig, {"steps": 0}),
        (CFCLIPConfig, {"batch": 1.5}),
        (CFCLIPConfig, {"batch": True}),
        (CFCLIPConfig, {"micro_batch": 0}),
        (CFCLIPConfig, {"lr": float("nan")}),
        (CFCLIPConfig, {"lr": "0.5"}),
        (CFCLIPConfig, {"lambda_id": -1.0}),
        (CFCLIPConfig, {"dtype": "int8"}),
        (CFCLIPConfig, {"num_views": -1}),
        (CFCLIPConfig, {"objective": "gan"}),
        (CFCLIPConfig, {"levels": "fine"}),
        (CFCLIPConfig, {"levels": ("fine", "fine")}),
        (CFCLIPConfig, {"text_mapper": "false"}),
        (CFCLIPConfig, {"norm_axis": "depth"}),
        (CFCLIPConfig, {"seed": "0"}),
        (CFCLIPConfig, {"source_text": " "}),
        (CLIPNCE, {"temperature": 0.0}),
        (CLIPNCE, {"negatives": "all"}),
        (CLIPNCE, {"query": "text"}),
        (CLIPNCE, {"positives": ()}),
        (CLIPNCE, {"positives": ("image",)}),
        (CLIPNCE, {"negative_templates": 0}),
    ],
)
def test_wrong_settings_are_named(config, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        config(**({"prompt": "x"} if config is CFCLIPConfig else {}) | wrong)


def test_flat_settings_make_the_same_configuration_again():
    config = CFCLIPConfig("x", objective=CLIPNCE(positives=("text",), temperature=0.2), levels=("fine",))
    given = {name: value for name, value in flat(config).items() if name != "prompt"}
    assert with_settings(CFCLIPConfig("x"), given) == config
    assert with_settings(config, {"objective": "clip"}).objective == ClipDistance()
    with pytest.raises(ValueError, match="'clip' has no setting 'temperature'"):
        with_settings(config, {"objective": "clip", "temperature": 0.2})


@pytest.mark.parametrize(
    ("change", "term"),
    [
        ({"num_views": 0}, "nce"),
        ({"train_strength": 0.5}, "nce"),
        ({"objective": CLIPNCE(negative_templates=3)}, "nce"),
        ({"text_mapper": False}, "nce"),
        ({"objective": CLIPNCE(query="image")}, "nce"),
        ({"objective": CLIPNCE(negatives="none")}, "nce"),
        ({"objective": ClipDistance()}, "clip"),
        ({"objective": Directional()}, "directional"),
    ],
)
def test_every_setting_reaches_the_step(change, term, domain):
    run, published = (MapperTrainer(domain, replace(CONFIG, **c)) for c in (change, {}))
    logs, default = (one.step(0, generator_for(0, 5)) for one in (run, published))
    assert set(logs) == {"loss", term, "l2", "id"}
    assert logs["loss"] != default["loss"]
    assert (run.mapper.config.text_dim is None) == (not run.config.text_mapper)


def test_a_large_change_costs_no_more_than_the_limit(domain):
    domain = replace(domain, perceptual=torch.nn.Identity())
    run, plain = (MapperTrainer(domain, replace(CONFIG, lambda_perc=2.0, perc_limit=c)) for c in (0.01, None))
    logs, default = (one.step(0, generator_for(0, 5)) for one in (run, plain))
    assert 0 < logs["perc"] < 0.01 < default["perc"]
    assert default["loss"] - logs["loss"] == pytest.approx(2 * (default["perc"] - logs["perc"]), rel=1e-3)


def test_the_sources_are_kept_or_drawn_again_as_memory_allows(domain, monkeypatch):
    domain, config = replace(domain, perceptual=torch.nn.Identity()), replace(CONFIG, lambda_perc=2.0)
    kept, size = MapperTrainer(domain, config), domain.generator.resolution
    assert kept.sources.perceptual.shape == (config.train_latents, 3, size, size)
    assert MapperTrainer(domain, CONFIG).sources.perceptual is None, "nobody asks for them"
    logs = kept.step(0, generator_for(0, 5))
    monkeypatch.setattr("cfclip.method.networks.KEPT", config.train_latents * 3 * size**2 - 1)
    drawn = MapperTrainer(domain, config)
    assert drawn.sources.perceptual is None
    assert drawn.step(0, generator_for(0, 5)) == pytest.approx(logs, rel=1e-4)


def test_the_views_of_a_step_are_those_of_its_generator(domain):
    networks = FrozenNetworks(domain, "float32")
    images = domain.generator.synthesis(latents.sample(domain.generator, 2))
    features = networks.clip(images, 3, generator_for(0, 1))
    views = perspective_views(images, 3, generator=generator_for(0, 1))
    expected = F.normalize(domain.clip.encode_image(views), dim=-1)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


def test_a_setting_that_does_not_exist():
    with pytest.raises(TypeError, match="lamda"):
        CFCLIPConfig("x", lamda=1)


@pytest.mark.parametrize(("prompt", "words"), [("", "prompt"), ("  ", "prompt"), (42, "prompt")])
def test_a_prompt_must_be_a_text(prompt, words):
    with pytest.raises(ValueError, match=words):
        CFCLIPConfig(prompt, steps=1)


def test_a_prompt_that_is_too_long_for_clip_is_refused(domain):
    with pytest.raises(ValueError, match="at most 24"):
        train_mapper(domain, CFCLIPConfig("very " * 60 + "green", steps=1), progress=False)


def test_a_trainer_can_be_driven_by_the_loop_alone(domain):
    run = MapperTrainer(domain, CONFIG)
    rows = run_loop(run.step, 2, state={}, log_every=1, progress=False)
    assert [row["step"] for row in rows] == [1, 2]


@pytest.mark.parametrize(
    "fields", [{"prompt": "face"}, {"prompt": " Face"}, {"source_text": "Green lipstick"}], ids=str
)
def test_a_prompt_that_is_the_source_text_is_a_warning(fields, domain):
    with pytest.warns(UserWarning, match="nothing can move: the prompt '.*' is the source text"):
        MapperTrainer(domain, replace(CONFIG, **fields))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MapperTrainer(domain, CONFIG)


def test_a_training_starts_from_another_mapper(domain, tmp_path):
    """The first step is at the start's weights, which stay as they are; another start is another run."""
    start, _ = train_mapper(domain, replace(CONFIG, prompt="blue hair"), progress=False)
    before = [tensor.clone() for tensor in start.parameters()]
    assert equal(MapperTrainer(domain, CONFIG, start).mapper, start)
    mapper, _ = train_mapper(domain, CONFIG, tmp_path, start=start, progress=False)
    assert not equal(mapper, start) and all(map(torch.equal, start.parameters(), before))
    assert not equal(mapper, train_mapper(domain, CONFIG, progress=False)[0])
    with pytest.raises(ValueError, match="another start"):
        train_mapper(domain, CONFIG, tmp_path, start=mapper, progress=False)
    with pytest.raises(ValueError, match="the mapper to start from has"):
        MapperTrainer(domain, replace(CONFIG, levels=("fine",)), start)
