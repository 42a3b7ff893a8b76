"""The library of trained editors: found by headers, opened once."""

import dataclasses
import math
from functools import partial

import pytest
import torch

from cfclip import latents
from cfclip.baselines.library import (
    committed,
    find_editors,
    load_editor,
    mapper_for,
    open_mapper,
    read_trained,
    scan,
)
from cfclip.baselines.methods import fit, settings
from cfclip.checkpoints import weights
from cfclip.checkpoints.mappers import save_mapper
from cfclip.checkpoints.weights import WeightsError
from cfclip.domains import load_domain
from cfclip.models.mapper import Mapper, MapperConfig

SMALL = {
    "steps": 2,
    "batch": 1,
    "train_latents": 2,
    "num_views": 1,
    "samples": 2,
    "style_samples": 20,
    "beta": 0.0,
}


def quick(method, domain, out=None, prompt="green lipstick", **changes):
    small = {name: value for name, value in SMALL.items() if name in settings(method)}
    return fit(method, domain, prompt, out=out, progress=False, **small | changes)


def stored(path, **card):
    return save_mapper(Mapper(MapperConfig(6, 16, 16)), path, method="cfclip", domain="tiny", **card)


def test_scanning_reads_headers_only(tmp_path):
    path = stored(tmp_path / "a" / "mapper.safetensors", training={"prompt": "green lipstick", "seed": 3})
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:size] + bytes(len(content) - size))  # tensors of zeros are not looked at
    (one,) = scan(tmp_path)
    assert (one.path, one.kind, one.method, one.domain) == (path, "mapper", "cfclip", "tiny")
    assert (one.prompt, one.seed) == ("green lipstick", 3)


def test_a_damaged_file_is_named_or_skipped(tmp_path):
    stored(tmp_path / "a.safetensors", training={"prompt": "green lipstick"})
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"b\.safetensors"):
        scan(tmp_path)
    assert [one.prompt for one in scan(tmp_path, skip_damaged=True)] == ["green lipstick"]


def test_an_opened_editor_is_kept_until_its_file_changes(domain, tmp_path):
    quick("nada", domain, tmp_path)
    first = load_editor(tmp_path, domain)
    assert load_editor(tmp_path, domain) is first and load_editor(tmp_path, domain).module is first.module
    other = dataclasses.replace(domain, source_text="a cat")
    again = load_editor(tmp_path, other)
    assert again.module is first.module and again.domain is other and first.domain is domain
    path = tmp_path / "mapper.safetensors"
    opened = open_mapper(path, domain)
    assert open_mapper(path, domain) is opened
    quick("nada", domain, tmp_path / "other", seed=1)
    (tmp_path / "other" / "mapper.safetensors").replace(path)
    assert load_editor(tmp_path, domain).module is not first.module
    assert open_mapper(path, domain) is not opened
    path.unlink()
    with pytest.raises(WeightsError, match="does not exist"):
        open_mapper(path, domain)


def test_a_committed_mapper_comes_before_the_one_of_any_prompt():
    domain = load_domain("toonfaces")
    assert {"green lipstick", "purple eyebrows"} <= set(committed(domain))
    assert mapper_for(domain, "green lipstick") is not domain.mapper
    assert mapper_for(domain, "blue hair") is domain.mapper
    with pytest.raises(ValueError, match="no mapper for 'blue hair', only for 'green lipstick'"):
        mapper_for(dataclasses.replace(domain, mapper=None), "blue hair")


@pytest.mark.parametrize(("success", "read"), [(math.nan, None), (0.0, 0.0), (0.75, 0.75)])
def test_a_measured_success_is_in_the_file(success, read, domain, tmp_path):
    path = quick("nada", domain).save(tmp_path, success)
    assert read_trained(path).success == read


def test_folders_that_hold_no_editor(domain, tmp_path):
    with pytest.raises(WeightsError, match="holds no editor"):
        load_editor(tmp_path, domain)
    quick("nada-generator", domain).save(tmp_path)
    with pytest.raises(WeightsError, match="made for domain tiny, not other"):
        load_editor(tmp_path, dataclasses.replace(domain, name="other"))
    quick("nada", domain).save(tmp_path)
    with pytest.raises(WeightsError, match="several editors"):
        load_editor(tmp_path, domain)
    g = domain.generator
    save = partial(weights.save, g, tmp_path / "b" / "generator.safetensors", "generator", g.config)
    save()
    with pytest.raises(WeightsError, match="holds no editor"):
        load_editor(tmp_path / "b", domain)
    save(method="dreambooth", training={"prompt": "x"})
    with pytest.raises(WeightsError, match="does not say by which method"):
        load_editor(tmp_path / "b", domain)


def test_editors_are_found_by_prompt_method_and_seed(domain, tmp_path):
    def run(name, method, prompt, seed=0, **changes):
        quick(method, domain, tmp_path / name, prompt, seed=seed, **changes)

    run("1", "nada", "green lipstick")
    run("2", "nada", "blue hair")
    assert list(find_editors(tmp_path, domain)) == ["green lipstick", "blue hair"]
    run(
        "3", "styleclip-global", "blue hair"
    )  # leaves channel statistics in the folder, which are not an editor
    found = find_editors(tmp_path, domain, ["blue hair", "green lipstick"])
    assert list(found) == ["blue hair, nada", "blue hair, styleclip-global", "green lipstick, nada"]
    assert {label: editor.method for label, editor in found.items()}[
        "blue hair, styleclip-global"
    ] == "styleclip-global"
    run("4", "nada", "blue hair", seed=1)
    assert list(find_editors(tmp_path, domain, ["green lipstick"])) == ["green lipstick"]
    assert "blue hair, nada, seed 1" in find_editors(tmp_path, domain)
    with pytest.raises(ValueError, match=r"no editor for \['red skin'\].*'green lipstick', 'blue hair'"):
        find_editors(tmp_path, domain, ["red skin"])
    with pytest.raises(ValueError, match="no editor in"):
        find_editors(tmp_path / "1" / "nothing", domain)
    run("5", "nada", "blue hair", lambda_id=0.0)
    with pytest.raises(ValueError, match=r"several runs of \['blue hair, nada, seed 0'\]"):
        find_editors(tmp_path, domain)


def test_mapper_files_are_editors_too(domain, tmp_path):
    quick("cfclip", domain, tmp_path / "run")
    (tmp_path / "run" / "mapper.safetensors").rename(tmp_path / "green-lipstick.safetensors")
    found = find_editors(tmp_path, domain)
    w = latents.sample(domain.generator, 1, "test")
    assert torch.equal(found["green lipstick"].edit(w), quick("cfclip", domain).edit(w))
