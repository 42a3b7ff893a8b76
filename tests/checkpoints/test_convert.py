"""Generators and mappers of other formats, rewritten as safetensors."""

import official
import pytest
import torch
from typer.testing import CliRunner

import cfclip
from cfclip.checkpoints import weights
from cfclip.checkpoints.convert import convert
from cfclip.checkpoints.generators import load_generator
from cfclip.checkpoints.mappers import load_mapper
from cfclip.cli import app
from cfclip.models.mapper import Mapper


def assert_same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)


def test_generators_are_converted(tmp_path):
    g = official.random_generator(16, (6, 5, 4), conv_clamp=256)
    pytorch = official.nvidia(g, tmp_path / "a.pkl")
    tensorflow = official.tensorflow(g, tmp_path / "b.pkl", conv_clamp=256)
    for path in (pytorch, tensorflow):
        out = tmp_path / "new" / f"{path.stem}.safetensors"
        result = CliRunner().invoke(app, ["convert", str(path), str(out)])
        assert result.exit_code == 0 and "a generator" in result.output
        assert_same(load_generator(out), load_generator(path))
        assert load_generator(out).conv_clamp == 256
    assert convert(out, tmp_path / "again.safetensors") == "generator"
    assert_same(load_generator(tmp_path / "again.safetensors"), load_generator(out))


def test_mappers_are_converted_with_their_prompt(tmp_path):
    m = Mapper(official.SMALL_MAPPER).eval()
    g = official.random_generator(64, (6, 5, 4, 3, 2))
    decoder = {f"decoder.{k}": v for k, v in official.rosinality(g).items()}
    state, opts = official.mapper_state(m) | decoder, {"stylegan_size": 64, "description": "green lipstick"}
    torch.save({"state_dict": state, "opts": opts}, tmp_path / "m.pt")
    assert convert(tmp_path / "m.pt", tmp_path / "m.safetensors") == "mapper"
    assert_same(load_mapper(tmp_path / "m.safetensors"), m)
    assert list(cfclip.find_mappers(tmp_path)) == ["green lipstick"]
    assert convert(tmp_path / "m.safetensors", tmp_path / "m2.safetensors") == "mapper"
    assert weights.read_header(tmp_path / "m2.safetensors").card["training"]["prompt"] == "green lipstick"
    assert convert(tmp_path / "m.pt", tmp_path / "g.safetensors", "generator") == "generator"
    assert load_generator(tmp_path / "g.safetensors").resolution == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("page.pt o.safetensors", "web page"),
        ("none.pt o.safetensors", "does not exist"),
        ("g.pkl o.pt", "must end in .safetensors"),
        ("g.safetensors g.safetensors", "is the input itself"),
        ("g.safetensors link.safetensors", "is the input itself"),
        ("g.pkl o.safetensors --kind mapper", "g.pkl is a pickle file"),
        ("g.pkl o.safetensors --kind x", "kind must be"),
        ("g.pkl g.pkl/o.safetensors", "g.pkl"),
    ],
)
def test_what_cannot_be_converted_is_named_in_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.pt").write_bytes(b"<html>")
    official.tensorflow(official.random_generator(), tmp_path / "g.pkl")
    convert("g.pkl", "g.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "g.safetensors")
    before = (tmp_path / "g.safetensors").read_bytes()
    result = CliRunner().invoke(app, ["convert", *words.split()])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1
    assert message in result.output + str(result.exception) and "\n" not in str(result.exception)
    assert not (tmp_path / "o.safetensors").exists()
    assert (tmp_path / "g.safetensors").read_bytes() == before
