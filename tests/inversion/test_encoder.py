"""The embedded encoder of toonfaces: its training, and that a domain takes only the one of its generator."""

import dataclasses

import numpy as np
import pytest
import torch

from cfclip.checkpoints import weights
from cfclip.files import DATA, read_rows
from cfclip.inversion.projector import encode, held_out, w_spread
from cfclip.toonfaces.domain import load_toonfaces
from cfclip.toonfaces.encoder import ToonEncoder
from cfclip.toonfaces.train import cards, encoder, run
from cfclip.toonfaces.train.encoder import EncoderConfig

SMALL = EncoderConfig(stages=((16, 16, 1), (16, 16, 1)), width=16, batch=4, steps=30)


class Interrupted(Exception):
    pass


class Breaking:
    """A ground truth whose features fail at their n-th call."""

    def __init__(self, truth, n):
        self.truth, self.readout, self.left = truth, truth.readout, n

    def features(self, images):
        self.left -= 1
        if not self.left:
            raise Interrupted
        return self.truth.features(images)


def test_a_training_that_was_stopped_is_resumed(still, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CHECKPOINT_EVERY", 5)
    config = dataclasses.replace(SMALL, steps=9)
    whole = encoder.train(config, tmp_path / "whole", domain=still)
    with pytest.raises(Interrupted):  # two calls per step: in the eighth
        breaking = dataclasses.replace(still, truth=Breaking(still.truth, 15))
        encoder.train(config, tmp_path / "cut", domain=breaking)
    resumed = encoder.train(config, tmp_path / "cut", domain=still)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_training_brings_the_codes_nearer_to_the_truth(still, sample, tmp_path):
    model = encoder.train(SMALL, tmp_path, domain=still)
    assert model.fits(still.generator) and not model.training
    rows = read_rows(tmp_path / "log.jsonl")
    assert rows[-1]["w"] < rows[0]["w"] and all(np.isfinite(list(row.values())).all() for row in rows)
    w, photos = sample(8, seed=3)
    known = dataclasses.replace(still, encoder=model)
    guess = encode(known, photos)
    assert guess.shape == w.shape
    assert (guess - w).square().mean() < (still.generator.w_avg - w).square().mean()
    torch.testing.assert_close(encode(known, photos[:1]), guess[:1])
    with torch.no_grad():
        still.generator.w_avg += 1
    assert not model.fits(still.generator)


def test_the_offsets_are_unlocked_layer_by_layer():
    steps = (0, 19, 20, 26, 32, 49, 50, 99)
    unlocked = [encoder.unlocked_layers(EncoderConfig(steps=100), step, 6) for step in steps]
    assert unlocked == [1, 1, 1, 2, 3, 5, 6, 6]
    torch.manual_seed(0)
    model = ToonEncoder(16, 6, 16, SMALL.stages, 16).eval()
    torch.nn.init.normal_(model.offsets.weight)
    images = torch.randn(2, 3, 16, 16)
    one, three = (model.unlocked(images, layers)[0] for layers in (1, 3))
    assert (one == one[:, :1]).all() and not torch.equal(three[:, 2], three[:, 0])
    assert torch.equal(three[:, 3:], one[:, 3:]) and torch.equal(three[:, 0], one[:, 0])
    assert torch.equal(model(images)[:, :3], three[:, :3])
    with pytest.raises(ValueError, match=r"\[N, 3, 16, 16\]"):
        model(torch.zeros(1, 3, 8, 8))


def test_the_domain_takes_only_the_encoder_of_its_generator(tmp_path, monkeypatch):
    for path in (DATA / "toonfaces").glob("*.safetensors"):
        if path.stem not in ("encoder", "multi"):
            (tmp_path / path.name).symlink_to(path)
    d = load_toonfaces(tmp_path)
    assert d.encoder is None
    g, c, path = d.generator, EncoderConfig(), tmp_path / "encoder.safetensors"
    model = ToonEncoder(g.resolution, g.num_ws, g.w_dim, c.stages, c.width)
    model.w_avg.copy_(g.w_avg)
    model.w_spread.fill_(w_spread(g))
    weights.save(model, path, "encoder", model.metadata, store_as=torch.float16, device="cpu")
    d = load_toonfaces(tmp_path)
    assert encode(d, held_out(d, 2)).shape == (2, g.num_ws, g.w_dim)
    measure = encoder.refinement
    monkeypatch.setattr(encoder, "refinement", lambda domain: measure(domain, n=2, steps=1))
    card = cards.write_card("encoder", tmp_path).read_text(encoding="utf-8")
    assert all(words in card for words in ("encoder, then 1 steps", "psnr", "±", "train encoder"))
    model.w_avg += w_spread(g)
    weights.save(model, path, "encoder", model.metadata, store_as=torch.float16)
    with pytest.warns(UserWarning, match=r"encoder\.safetensors was trained for other networks"):
        assert load_toonfaces(tmp_path).encoder is None


def test_the_default_encoder_is_small_and_registered():
    c = EncoderConfig()
    model = ToonEncoder(64, 10, 128, c.stages, c.width)
    assert 2 * sum(t.numel() for t in model.state_dict().values()) < 1.5e6  # bytes of float16
    assert cards.NETWORKS["encoder"].config is EncoderConfig
    ToonEncoder(**model.metadata).load_state_dict(model.state_dict())
