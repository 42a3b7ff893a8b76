"""Files that are not weights, hostile or damaged: one clear error each, and nothing in a file ever runs."""

import io
import os
import pickle
from zipfile import ZipFile

import numpy as np
import official
import pytest
import torch

from cfclip.checkpoints.generators import load_generator
from cfclip.checkpoints.latents import load_latents
from cfclip.checkpoints.mappers import load_mapper
from cfclip.checkpoints.networks import load_e4e, load_identity, load_openai_clip, load_vgg
from cfclip.checkpoints.weights import WeightsError

LOADERS = {
    "generator": load_generator,
    "mapper": load_mapper,
    "latents": load_latents,
    "identity": load_identity,
    "e4e": load_e4e,
    "vgg": load_vgg,
    "clip": load_openai_clip,
}
BAD = {
    "missing": (None, "does not exist"),
    "empty": (b"", "is empty"),
    "page": (b"<!DOCTYPE html><html>Quota exceeded", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "gzip": (b"\x1f\x8b\x08\0", "gzip"),
    "json": (b'{"error": "not found"}', "JSON"),
    "text": (b"hello", "not a weight file"),
    "magic": (b"\x80\x03", "damaged or truncated|is needed"),
    "zip": (b"PK\x03\x04" + bytes(40), "damaged or truncated|is needed"),
    "call": (b"\x80\x03cposix\nsystem\n(X\x04\0\0\0truetR.", "posix.system|is needed"),
    "deep": (b"\x80\x03" + b"]" * 3 + b"(" * 200_000, "is needed|damaged"),
    "npy": (b"\x93NUMPY\x01\0\xff\xff", "npy|damaged|cannot be used"),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_file_is_refused_with_its_cause(loader, bad, tmp_path):
    content, message = BAD[bad]
    path = tmp_path / f"{bad}.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        LOADERS[loader](path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600
    with pytest.raises(WeightsError, match="is a folder"):
        LOADERS[loader](tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_cannot_declare_more_than_the_file_holds(zipped, tmp_path):
    path = tmp_path / "w.pt"
    torch.save(torch.zeros(1000), path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes().replace(b"M\xe8\x03", b"M\xff\xff")  # every 1000 becomes 65535
    if zipped:
        with ZipFile(path) as old, ZipFile(out := io.BytesIO(), "w") as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry).replace(b"M\xe8\x03", b"M\xff\xff"))
        data = out.getvalue()
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"declare|truncated|match"):
        load_latents(path)


# ---- nothing runs ---------------------------------------------------------------------------------


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_pickle_does_not_run(loader, protocol, tmp_path):
    marker = tmp_path / "ran"
    tree = {"g_ema": official.rosinality(official.random_generator()), "opts": Hostile(marker)}
    old = {"_use_new_zipfile_serialization": False}
    for name, write in {
        "plain.pkl": lambda p: p.write_bytes(pickle.dumps(Hostile(marker), protocol)),
        "dict.pkl": lambda p: p.write_bytes(pickle.dumps({"G_ema": Hostile(marker)}, protocol)),
        "zip.pt": lambda p: torch.save(tree, p, pickle_protocol=protocol),
        "legacy.pt": lambda p: torch.save(tree, p, pickle_protocol=protocol, **old),
        "object.npy": lambda p: np.save(p, np.array([Hostile(marker)], dtype=object), allow_pickle=True),
    }.items():
        write(tmp_path / name)
        with pytest.raises(WeightsError, match=name):
            LOADERS[loader](tmp_path / name)
        assert not marker.exists(), f"{name} ran"
    with pytest.raises(WeightsError, match=r"would call posix\.system"):
        load_generator(tmp_path / "dict.pkl")
    pickle.loads((tmp_path / "plain.pkl").read_bytes())  # the usual way runs it
    assert marker.exists()


def test_the_source_in_a_network_does_not_run(tmp_path):
    g, marker = official.random_generator(), tmp_path / "source_ran"
    loaded = load_generator(official.nvidia(g, tmp_path / "g.pkl", marker=marker))
    assert torch.equal(loaded.convs[2].weight, g.convs[2].weight)
    assert not marker.exists()
    exec(official.SOURCE.format(marker=str(marker)))  # the usual way runs it
    assert marker.exists()
