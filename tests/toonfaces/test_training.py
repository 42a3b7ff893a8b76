"""The trainings of the embedded networks, at tiny sizes."""

import copy
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch

from cfclip.checkpoints import weights
from cfclip.files import read_object, read_rows, sha256
from cfclip.images import to_tensor
from cfclip.toonfaces.domain import CHECKSUMS
from cfclip.toonfaces.render import render, render_image
from cfclip.toonfaces.train import cards, clip, encoder, generator, identity, multi, readout
from cfclip.toonfaces.train.pool import Pool, part_masks, picture
from cfclip.toonfaces.train.run import run_training, seeded

STAGES = ((16, 16, 1), (16, 16, 1), (16, 16, 1))
GENERATOR = generator.GeneratorConfig(
    resolution=16, channels=(16,) * 3, w_dim=80, mapping_layers=2, batch=4, dtype="float32", pool=8, steps=8,
    codes=32, map_steps=3,
)  # fmt: skip
TINY = {
    "readout": readout.ReadoutConfig(width=8, batch=2, steps=2, pool=4),
    "identity": identity.IdentityConfig(stages=STAGES, embed_dim=8, people=4, photos=2, batch=2, steps=2),
    "encoder": encoder.EncoderConfig(stages=STAGES, width=8, batch=2, steps=2, pool=4, dtype="float32"),
    "generator": replace(GENERATOR, map_steps=1, steps=1),
    "multi": multi.config(
        steps=1,
        batch=2,
        prompts_at_once=2,
        prompts=("red hair", "smiling"),
        shapes=("smiling",),
        train_latents=2,
        dtype="float32",
    ),
}


def stop_at(name, generator, path):
    """In the place of ``save_grid``."""
    if path.stem == name:
        raise InterruptedError


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.fixture
def few_calibrated(monkeypatch):
    """One face and two strengths, where :func:`multi.calibrate` has 32 and six for half of the prompts."""
    monkeypatch.setattr(multi, "calibrate", partial(multi.calibrate, n=1))
    monkeypatch.setattr(multi, "GAINS", (1.0, 2.5))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.usefixtures("few_calibrated")
def test_a_training_leaves_the_callers_random_state_alone(name, toonfaces, tmp_path):
    networks = []
    for user_seed in (1, 2):
        torch.manual_seed(user_seed)
        np.random.seed(user_seed)
        before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
        domain = {"domain": toonfaces} if name in ("encoder", "multi") else {}
        networks.append(cards.NETWORKS[name].train(TINY[name], tmp_path / str(user_seed), **domain))
        assert torch.equal(torch.get_rng_state(), before)
        assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert same(*networks)


def test_seeded_restores_the_random_state_also_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(3):
        first = torch.rand(4)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, torch.rand(4, generator=torch.Generator().manual_seed(3)))


def test_the_steps_of_a_training_draw_the_same_numbers_each_time(tmp_path):
    drawn = {}
    for run in ("a", "b"):
        numbers = drawn.setdefault(run, [])

        def step(i, generator, numbers=numbers):
            numbers.append(torch.rand((), generator=generator).item())
            return {"loss": 0.0}

        run_training("test", step, TINY["readout"], {}, tmp_path / run, steps=3)
    assert drawn["a"] == drawn["b"] and len(set(drawn["a"])) == 3


@pytest.mark.parametrize("config", [clip.CLIPConfig, *map(type, TINY.values())])
def test_every_setting_has_a_check_that_accepts_its_default(config):
    checks = {one.name: one.metadata["check"] for one in fields(config)}
    assert checks and all(map(callable, checks.values()))


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (generator.GeneratorConfig, {"w_dim": 16}),
        (generator.GeneratorConfig, {"channels": ()}),
        (generator.GeneratorConfig, {"w_std": 0.0}),
        (clip.CLIPConfig, {"model": "ViT-B-32"}),
        (clip.GuideConfig, {"moved": 1.5}),
        (clip.JudgeConfig, {"dtype": "float8"}),
        (readout.ReadoutConfig, {"steps": 0}),
        (identity.IdentityConfig, {"stages": ((16, 16),)}),
        (encoder.EncoderConfig, {"stages": [[16, 16, 0]]}),
        (encoder.EncoderConfig, {"unlock": (0.5, 0.2)}),
    ],
)
def test_a_setting_that_cannot_work_is_named(config, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} must be"):
        config(**wrong)


def test_generator_training_passes_its_phases_and_resumes(tmp_path, monkeypatch):
    whole = generator.train(GENERATOR, tmp_path / "whole")
    monkeypatch.setattr("cfclip.toonfaces.train.run.CHECKPOINT_EVERY", 2)
    for stop in ("1-drawing-000004", "2-mapping-000003"):
        with monkeypatch.context() as stopping, pytest.raises(InterruptedError):
            stopping.setattr(generator, "save_grid", partial(stop_at, stop))
            generator.train(GENERATOR, tmp_path / "cut", preview_every=1)
    assert same(whole, generator.train(GENERATOR, tmp_path / "cut"))
    with pytest.raises(ValueError, match="another steps, seed"):
        generator.train(replace(GENERATOR, steps=2, seed=1), tmp_path / "cut")
    errors = [row["error"] for row in read_rows(tmp_path / "whole" / "1-drawing" / "log.jsonl")]
    assert np.isfinite(errors).all()
    assert (tmp_path / "whole" / "samples" / "2-mapping-000003.png").exists()


def test_a_pool_paints_what_the_renderer_draws():
    pool = Pool((9,), 6, 2, "both")
    shapes, colours = torch.tensor([0, 3, 7]), torch.tensor([5, 3, 1])
    faces = [pool.faces[s].in_the_colours_of(pool.faces[c]) for s, c in zip(shapes, colours, strict=True)]
    drawn = to_tensor([render_image(face) for face in faces])
    assert ((pool.paint(shapes, colours) - drawn).abs() * 127.5).max() < 1.5  # rounded once, not twice
    masks = torch.from_numpy(np.stack([render(face).masks for face in faces]))
    torch.testing.assert_close(part_masks(pool.covered(shapes)), masks)
    erased = torch.tensor([[False, True, False]] * 3)
    without = to_tensor([render(face, without=["eyes"]).image for face in faces])
    painted = picture(pool.covered(shapes, erased), pool.palettes[colours])
    assert ((painted - without).abs() * 127.5).max() < 1.5


def test_layers_that_colour_are_taught_the_colours_of_another_face():
    training = generator.GeneratorTraining(GENERATOR, torch.device("cpu"))
    shapes, colours = torch.zeros(2, 80), torch.ones(2, 80)
    mixed = training._mixed(shapes, colours)
    assert (mixed[:, :4] == 0).all() and (mixed[:, 4:] == 1).all()
    assert training.w.std() == pytest.approx(GENERATOR.w_std, rel=0.2)


def test_a_network_is_stored_with_its_settings_and_its_training_can_be_repeated(tmp_path):
    settings = {one.name: getattr(TINY["identity"], one.name) for one in fields(TINY["identity"])}
    path = cards.train("identity", tmp_path / "run", tmp_path, **settings)
    first, sizes, card = weights.read(path, "identity")
    assert read_object(tmp_path / CHECKSUMS) == {path.name: sha256(path)}, "written with the weights"
    assert sizes["stages"] == [list(one) for one in STAGES] and card["training"]["people"] == 4
    again, _, _ = weights.read(cards.train("identity", tmp_path / "run", tmp_path, **settings), "identity")
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, value in {"lr": 0.1, "seed": 1, "steps": 1, "people": 5}.items():
        (tmp_path / "run" / "settings.json").unlink(missing_ok=True)  # the checkpoint knows as well
        with pytest.raises(ValueError, match=f"another {name};"):
            cards.train("identity", tmp_path / "run", tmp_path, **settings | {name: value})


@pytest.mark.parametrize("name", ["multi", "encoder"])
@pytest.mark.usefixtures("few_calibrated")
def test_a_training_for_networks_that_changed_is_not_resumed(name, toonfaces, tmp_path, monkeypatch):
    """Those beside the file that is trained: a generator, and what the losses use."""
    settings = {one.name: getattr(TINY[name], one.name) for one in fields(TINY[name])}
    domain = toonfaces
    for module in (cards, multi, encoder):
        monkeypatch.setattr(module, "load_toonfaces", lambda *folder: domain)
    first = cards.train(name, tmp_path / "run", tmp_path, **settings).read_bytes()
    assert cards.train(name, tmp_path / "run", tmp_path, **settings).read_bytes() == first
    domain = replace(toonfaces, generator=copy.deepcopy(toonfaces.generator))
    with torch.no_grad():
        domain.generator.const[0, 0, 0] += 1e-4
    for left in ("settings.json", "only the checkpoint"):
        if left == "only the checkpoint":
            (tmp_path / "run" / "settings.json").unlink()
        with pytest.raises(ValueError, match="holds a run with another generator;"):
            cards.train(name, tmp_path / "run", tmp_path, **settings)
    assert (tmp_path / f"{name}.safetensors").read_bytes() == first
