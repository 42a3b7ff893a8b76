"""The restricted unpickler: data comes out as it was, and nothing else comes out."""

import io
import os
import pickle
import struct
import subprocess
from collections import OrderedDict
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfclip.checkpoints.safe_pickle import load, load_legacy, load_zip
from cfclip.checkpoints.values import Name, PickleError, Record, View, to_tensor

PROTOCOLS = [2, 3, 4, 5]


def read_zip(path):
    with path.open("rb") as file:
        return load_zip(file, torch.UntypedStorage.from_file(str(path), False, path.stat().st_size))


def read(value, protocol=4):
    return load(io.BytesIO(pickle.dumps(value, protocol)))


class Thing:
    """A class that the reader must not know."""

    def __init__(self):
        self.weight = np.float32(2.5)
        self.children = [Thing2(a=1)]


class Thing2(dict):
    pass


NUMBERS = st.integers() | st.floats(allow_nan=False)
PLAIN = st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.binary(max_size=5)


def nested(values):
    keyed = st.dictionaries(st.text(max_size=3), values, max_size=3)
    return st.lists(values, max_size=3) | st.tuples(values, values) | keyed


@pytest.mark.parametrize("protocol", PROTOCOLS)
@given(value=st.recursive(PLAIN, nested, max_leaves=12))
def test_plain_values_come_out_as_they_were(protocol, value):
    assert read(value, protocol) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_and_references_come_out_as_they_were(protocol):
    shared = [1, 2]
    value = read(OrderedDict(a=shared, b=shared, c={"x", "y"}, d=frozenset(["z"])), protocol)
    assert value["a"] is value["b"] and value["c"] == {"x", "y"} and value["d"] == {"z"}
    loop = []
    loop.append(loop)
    again = read(loop, protocol)
    assert again[0] is again


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "f8", "i1", "u1", ">i8", "i4", "b1"])
def test_numpy_arrays_come_out_as_they_were(protocol, dtype):
    array = (np.arange(24).reshape(2, 3, 4) % 7).astype(dtype)
    scalar = array.reshape(24)[3:4].reshape(())
    for value in (array, np.asfortranarray(array), array[:, ::2], array[0, 1, 1], array[:0], scalar):
        tensor = to_tensor(read(value, protocol))
        assert tensor.shape == value.shape and np.array_equal(tensor.numpy(), value)
        assert tensor.numpy().dtype.kind == value.dtype.kind


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64", "uint8", "bool"])
def test_tensors_in_a_plain_pickle_come_out_as_they_were(protocol, dtype):
    base = (torch.arange(24).reshape(4, 6) % 5).to(getattr(torch, dtype))
    for tensor in (base, base.t(), base[1:3, ::2], base[0, 0], base[:0], base[:1].expand(5, 6)):
        value = read([tensor, {"again": tensor}], protocol)
        assert isinstance(value[0], View) and value[1]["again"] is value[0]
        assert torch.equal(to_tensor(value[0]), tensor) and to_tensor(value[0]).dtype == base.dtype
    assert torch.equal(to_tensor(read(torch.nn.Parameter(torch.ones(3)), protocol)), torch.ones(3))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_are_inert(protocol):
    thing = read(Thing(), protocol)
    assert isinstance(thing, Record) and thing.name == Name(Thing.__module__, "Thing")
    assert to_tensor(thing.get("weight")).item() == 2.5 and thing.get("nothing", 7) == 7
    (child,) = thing.get("children")
    assert isinstance(child, Record) and child.items == {"a": 1} and child.get("a") == 1
    assert read(Path, protocol) == Name("pathlib", "Path")
    with pytest.raises(PickleError, match="Thing is in the place of a tensor"):
        to_tensor(thing)


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


CALLS = [
    (os.system, ("touch ran",)),
    (eval, ("open('ran', 'w')",)),
    (exec, ("open('ran', 'w')",)),
    (subprocess.Popen, (["touch", "ran"],)),
    (getattr, ("text", "upper")),
    (__import__, ("this",)),
    (open, ("ran", "w")),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("function", "args"), CALLS, ids=lambda x: getattr(x, "__name__", ""))
def test_calls_of_the_standard_library_are_reported(function, args, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PickleError, match=rf"would call \w+\.{function.__name__}"):
        read({"weights": Call(function, *args)}, protocol)
    assert not (tmp_path / "ran").exists()


def test_calls_of_other_libraries_are_inert():
    record = read(Call(np.ones, 3))
    assert isinstance(record, Record) and str(record.name).endswith("ones") and record.args == (3,)


def test_setting_state_touches_nothing_of_ours():
    """In the usual unpickler, BUILD on a function writes into it."""
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"K\x01", b"]"):
        with pytest.raises(PickleError, match="not an object"):
            load(io.BytesIO(b"\x80\x02" + target + b"}X\x01\0\0\0xK\x01sb."))


@pytest.mark.parametrize(
    "stream",
    [
        *(b"", b"\x80\x04", b"\x80\x04.", b"\x80\x044."),
        *(b"\x80\x02" + rest for rest in (b"t.", b"K\x01K\x02s.", b"]K\x01K\x02.", b"h\x05.", b"\x82\x01.")),
        *(b"\x80\x02" + rest for rest in (b"(K\x01K\x02d", b"}(]K\x01u", b"K\x01K\x02R.", b"K\x01Q.")),
        b"\x80\x02cos\nsystem\nK\x01R.",
        b"\x80\x02(cos\nsystem\no.",
        b"\x80\x02(ios\nsystem\n.",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x04\x8e" + b"\xff" * 8 + b"abc.",
        b"\x80\x02" + b"(" * 100_000,
        b"\x80\x02K\x01" + b"\x85" * 100_000,
        b"\x80\x02ctorch.storage\n_load_from_bytes\nU\x03abc\x85R.",
        b"\x80\x05\x97.",
    ],
)
def test_a_damaged_pickle_is_refused(stream):
    with pytest.raises(PickleError):
        load(io.BytesIO(stream))


def test_a_deeply_nested_key_is_not_hashed():
    nested = b"K\x01" + b"\x85" * 300_000
    assert load(io.BytesIO(b"\x80\x02}" + nested + b"K\x02s.")) == {}


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        *((0, (11,), (1,)), (5, (6,), (1,)), (0, (4, 4), (4, 1)), (0, (2**50,), (0,))),  # beyond the storage
        *((-1, (2,), (1,)), (0, (-1,), (1,)), (0, (2,), (-1,))),  # negative
        *((0, (2, 2), (1,)), (0, (True,), (1,)), (0, (2.0,), (1,))),  # malformed
    ],
)
def test_a_view_stays_in_its_storage(offset, size, stride):
    good = read(torch.zeros(10))
    with pytest.raises(PickleError, match="declared"):
        View(good.storage, offset, size, stride)


def test_numpy_sizes_are_checked():
    array = read(np.zeros(4, np.float32))
    version, _, dtype, fortran, raw = array.state
    for state in (
        (version, (2**40,), dtype, fortran, raw),
        (version, (4,), dtype, fortran, raw[:-1]),
        (version, (4,), None, fortran, raw),
        (version, (4,), read(np.dtype("O")), fortran, raw),
        (version, "x", dtype, fortran, raw),
        None,
    ):
        array.state = state
        with pytest.raises(PickleError):
            to_tensor(array)


def test_torch_files_of_both_formats_are_checked(tmp_path):
    tree = {"a": torch.arange(6.0).reshape(2, 3), "b": [torch.ones(2, dtype=torch.int64)]}
    tree["c"] = OrderedDict(x=1)
    torch.save(tree, tmp_path / "zip.pt")
    torch.save(tree, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "legacy.pt").read_bytes()
    for value in (read_zip(tmp_path / "zip.pt"), load_legacy(io.BytesIO(data), data)):
        assert torch.equal(to_tensor(value["a"]), tree["a"]) and torch.equal(
            to_tensor(value["b"][0]), tree["b"][0]
        )
        assert value["c"] == {"x": 1}
    for cut in (len(data) - 1, len(data) // 2, 20):
        with pytest.raises(PickleError):
            load_legacy(io.BytesIO(data[:cut]), data[:cut])
    count = data.index(struct.pack("<q", 6), data.rindex(b"."))
    with pytest.raises(PickleError, match="do not match"):
        bad = data[:count] + struct.pack("<q", 7) + data[count + 8 :]
        load_legacy(io.BytesIO(bad), bad)
    whole = (tmp_path / "zip.pt").read_bytes()
    at = whole.index(tree["a"].numpy().tobytes())
    (tmp_path / "zip.pt").write_bytes(whole[:at] + b"\1" + whole[at + 1 :])
    with pytest.raises(PickleError, match="checksums do not match"):
        read_zip(tmp_path / "zip.pt")


def test_other_zip_archives_are_refused(tmp_path):
    with ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/data.pkl", b"\x80\x02}.")
        archive.writestr("script/constants.pkl", b"\x80\x02).")
    with pytest.raises(PickleError, match="TorchScript"):
        read_zip(tmp_path / "script.pt")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    with pytest.raises(PickleError, match="not a torch file"):
        read_zip(tmp_path / "arrays.npz")
