import dataclasses

import pytest
import torch
from written_out import one_step

from cfclip import latents
from cfclip.baselines import methods as baselines
from cfclip.baselines.library import find_mappers
from cfclip.checkpoints import weights
from cfclip.method.config import CFCLIPConfig, MultiPromptConfig
from cfclip.method.losses import identity_loss, latent_l2
from cfclip.method.trainer import MapperTrainer, train_mapper

CONFIG = CFCLIPConfig("green lipstick", steps=6, train_latents=6)


def test_two_runs_agree_to_the_digit_and_a_resumed_one_too(domain, tmp_path):
    first, rows = train_mapper(domain, CONFIG, progress=False)
    second, rows2 = train_mapper(domain, CONFIG, tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in rows] == [
        {k: v for k, v in r.items() if k != "seconds"} for r in rows2
    ]
    train_mapper(domain, dataclasses.replace(CONFIG, steps=4), tmp_path / "resumed", progress=False)
    third, _ = train_mapper(domain, CONFIG, tmp_path / "resumed", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "losses"),
    [
        ({}, [1.2364740, 1.2165965, 1.3847997, 0.9191295, 1.2304802]),
        ({"objective": "clip", "draws": 0}, [0.1590795, 0.1870897, 0.1923889, 0.1313275, 0.164637]),
        ({"objective": "directional"}, [0.269423, 0.2530524, 0.2578161, 0.2807584, 0.2951617]),
    ],
)
def test_the_losses_of_the_commit_before_many_prompts(change, losses, domain):
    """Five steps as they were when the step knew one prompt only."""
    run = MapperTrainer(domain, dataclasses.replace(CONFIG, steps=5, **change))
    rows = fit(run.step, 5, state={}, log_every=1, progress=False)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("many", [False, True])
def test_micro_batches_are_the_same_step(many, domain):
    """The batch's losses, gradients and random numbers, whichever part of it is held at a time."""
    config = dataclasses.replace(
        MultiPromptConfig(prompts=("green lipstick", "blue hair", "red skin"), prompts_at_once=2)
        if many
        else CONFIG,
        batch=4,
        train_latents=6,
    )
    found = []
    for micro_batch in (None, 1, 3):
        run = MapperTrainer(domain, dataclasses.replace(config, micro_batch=micro_batch))
        torch.manual_seed(5)
        found.append((run.step(0), [p.grad for p in run.mapper.parameters()], torch.get_rng_state()))
    for logs, gradients, random in found[1:]:
        assert logs == pytest.approx(found[0][0], rel=1e-5) and torch.equal(random, found[0][2])
        for a, b in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())


def test_training_lowers_the_loss(domain):
    _, rows = train_mapper(
        domain, dataclasses.replace(CONFIG, steps=40, lambda_l2=0.0, lambda_id=0.0), progress=False
    )
    assert rows[-1]["nce"] < rows[0]["nce"]


def test_the_cached_step_is_the_published_loss(domain):
    logs, w, w_edited, x, edited, nce = one_step(MapperTrainer(domain, CONFIG))
    loss = 0.3 * nce + 0.2 * identity_loss(domain.identity, edited, x) + 0.8 * latent_l2(w_edited, w)
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_checkpoint_is_the_mapper_alone(domain, tmp_path):
    mapper, _ = train_mapper(domain, CONFIG, tmp_path / "run", progress=False)
    stored = find_mappers(tmp_path)["green lipstick"]
    assert {n: p.shape for n, p in stored.named_parameters()} == {
        n: p.shape for n, p in mapper.named_parameters()
    }
    size = (tmp_path / "run" / "mapper.safetensors").stat().st_size
    assert size < 2 * sum(p.numel() for p in mapper.parameters()) + 20_000  # half floats and a header


def test_train_and_test_latents_are_disjoint(generator):
    train, test = latents.sample(generator, 50, "train"), latents.sample(generator, 50, "test")
    assert torch.cdist(train[:, 0], test[:, 0]).min() > 1e-3
    assert torch.equal(train[:10], latents.sample(generator, 10, "train"))
    with pytest.raises(ValueError, match="'all'"):
        latents.sample(generator, 1, "all")


@pytest.mark.parametrize("fast", ["float32", "bfloat16"])
def test_auto_is_what_is_fast_here_and_is_written_down(fast, domain, tmp_path, monkeypatch):
    monkeypatch.setattr("cfclip.training.fast_dtype", lambda device: getattr(torch, fast))
    auto, told = (dataclasses.replace(CONFIG, dtype=dtype, steps=2) for dtype in ("auto", fast))
    mapper, _ = train_mapper(domain, auto, tmp_path, progress=False)
    expected, _ = train_mapper(domain, told, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(mapper.parameters(), expected.parameters(), strict=True))
    assert weights.read(tmp_path / "mapper.safetensors", "mapper")[2]["dtype"] == fast
    for method in ("nada", "styleclip-optimization"):
        chosen = baselines.fit(method, domain, "green lipstick", steps=1, dtype="auto")
        assert chosen.config.dtype == fast


def test_a_run_goes_on_in_the_dtype_it_began_with(domain, tmp_path, monkeypatch):
    auto = dataclasses.replace(CONFIG, dtype="auto", steps=1)
    for fast in (torch.bfloat16, torch.float32):  # begun on one machine, and resumed on another
        monkeypatch.setattr("cfclip.training.fast_dtype", lambda device, fast=fast: fast)
        train_mapper(domain, auto, tmp_path / "run", progress=False)
        auto = dataclasses.replace(auto, steps=2)
    train_mapper(
        domain, dataclasses.replace(auto, dtype="bfloat16"), tmp_path / "never stopped", progress=False
    )
    resumed, whole = (
        weights.read(tmp_path / name / "mapper.safetensors", "mapper") for name in ("run", "never stopped")
    )
    assert resumed[2]["dtype"] == "bfloat16"
    assert all(torch.equal(resumed[0][name], tensor) for name, tensor in whole[0].items())


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch": 1.5},
        {"dtype": "int8"},
        {"draws": -1},
        {"objective": "gan"},
        {"negatives": "all"},
        {"query": "text"},
        {"positives": ()},
        {"positives": ("image",)},
        {"negative_templates": 0},
    ],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CFCLIPConfig("x", **wrong)


@pytest.mark.parametrize(
    ("change", "term"),
    [
        ({"draws": 0}, "nce"),
        ({"negative_templates": 3}, "nce"),
        ({"text_mapper": False}, "nce"),
        ({"query": "image"}, "nce"),
        ({"negatives": "none"}, "nce"),
        ({"objective": "clip"}, "clip"),
        ({"objective": "directional"}, "directional"),
    ],
)
def test_every_switch_reaches_the_step(change, term, domain):
    run, published = (
        MapperTrainer(domain, dataclasses.replace(CONFIG, **change)),
        MapperTrainer(domain, CONFIG),
    )
    torch.manual_seed(5)
    logs = run.step(0)
    torch.manual_seed(5)
    default = published.step(0)
    assert set(logs) == {"loss", term, "l2", "id"}
    assert logs["loss"] != default["loss"]
    assert (run.mapper.config.text_dim is None) == (not run.config.text_mapper)


def test_a_setting_that_does_not_exist():
    with pytest.raises(TypeError, match="lamda"):
        CFCLIPConfig("x", lamda=1)


@pytest.mark.parametrize(
    ("prompt", "words"), [("", "empty"), ("  ", "empty"), ("very " * 60 + "green", "24")]
)
def test_prompts_that_cannot_be_used(domain, prompt, words):
    with pytest.raises(ValueError, match=words):
        train_mapper(domain, CFCLIPConfig(prompt, steps=1), progress=False)
