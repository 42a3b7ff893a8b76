"""Our own files: what is saved comes back, and what cannot be used says why."""

import pytest
import torch
from safetensors.torch import save_file

from cfclip.checkpoints import weights
from cfclip.domains import load_domain
from cfclip.toonfaces.domain import load_toonfaces


def test_tensors_sizes_and_card_come_back(tmp_path):
    layer = torch.nn.Linear(3, 2)
    path = weights.save(layer, tmp_path / "x.safetensors", "layer", {"in": 3}, store_as=torch.float16, seed=7)
    tensors, config, card = weights.read(path, "layer")
    assert config == {"in": 3} and card == {"seed": 7} and tensors["weight"].dtype == torch.float32
    torch.testing.assert_close(tensors["weight"], layer.weight.detach(), rtol=1e-3, atol=1e-4)


def test_the_header_is_read_without_the_tensors(tmp_path):
    path = weights.save(torch.nn.Linear(3, 2), tmp_path / "x.safetensors", "layer", {"in": 3}, seed=7)
    size = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    with path.open("r+b") as file:  # overwrite every tensor
        file.seek(size)
        file.write(b"\xff" * (path.stat().st_size - size))
    assert weights.read_header(path) == ("layer", {"in": 3}, {"seed": 7})


def test_every_bad_file_says_what_it_is(tmp_path):
    layer = torch.nn.Linear(30, 20)
    good = weights.save(layer, tmp_path / "good.safetensors", "layer", {})
    for name, data, words in (
        ("truncated", good.read_bytes()[:-100], "truncated"),
        ("empty", b"", "truncated"),
        ("html", b"<!DOCTYPE html><p>404</p>", "truncated"),
    ):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        with pytest.raises(weights.WeightsError, match=words) as error:
            weights.read(path, "layer")
        assert str(path) in str(error.value)
    with pytest.raises(weights.WeightsError, match="does not exist"):
        weights.read(tmp_path / "missing", "layer")
    with pytest.raises(weights.WeightsError, match="holds a layer, but a mapper"):
        weights.read(good, "mapper")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(weights.WeightsError, match="without cfclip's header"):
        weights.read(tmp_path / "foreign.safetensors", "layer")
    tensors, _, _ = weights.read(good, "layer")
    with pytest.raises(weights.WeightsError, match=r"good\.safetensors does not fit"):
        weights.load_into(torch.nn.Linear(30, 21), tensors, good)


def test_a_missing_domain_file_is_named(tmp_path):
    with pytest.raises(weights.WeightsError, match="have the embedded generator, clip, identity, readout"):
        load_toonfaces(tmp_path)


def test_an_unknown_domain_is_named():
    with pytest.raises(ValueError, match="'tonfaces'; choose one of toonfaces"):
        load_domain("tonfaces")
