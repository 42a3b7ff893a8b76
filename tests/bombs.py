"""Small files that would crash the interpreter, or cost gigabytes or minutes, if they were trusted."""

import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import torch

BOMBS: dict[str, tuple[str, Callable[[], bytes], str]] = {}
"""File name -> its loader, its content, and words of the right refusal."""


def bomb(name: str, loader: str, words: str) -> Callable:
    def keep(make: Callable[[], bytes]) -> Callable[[], bytes]:
        BOMBS[name] = loader, make, words
        return make

    return keep


def files(folder: str) -> Iterator[tuple[str, str, Path]]:
    for name, (loader, make, _) in BOMBS.items():
        path = Path(folder) / name
        path.write_bytes(make())
        yield name, loader, path


# ---- pickles, written opcode by opcode ------------------------------------------------------------


def text(s: str) -> bytes:
    return b"X" + struct.pack("<I", len(s)) + s.encode()


def number(n: int) -> bytes:
    return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def put(i: int) -> bytes:
    return b"r" + struct.pack("<I", i)


def get(i: int) -> bytes:
    return b"j" + struct.pack("<I", i)


def program(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def table(entries: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def torch_zip(data: bytes, **storages: bytes) -> bytes:
    with ZipFile(out := io.BytesIO(), "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/byteorder", "little")
        for key, content in storages.items():
            archive.writestr(f"a/data/{key.removeprefix('s')}", content)
    return out.getvalue()


STORAGE = put(0)  # where tensor() expects the storage's id tuple


def storage(numel: int, key: str = "0") -> bytes:
    parts = text("storage") + name("torch", "FloatStorage") + text(key) + text("cpu") + number(numel)
    return b"(" + parts + b"tQ" + STORAGE + b"0"


def tensor(size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    numbers = [b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride)]
    return (
        name("torch._utils", "_rebuild_tensor_v2") + b"(" + get(0) + b"K\0" + b"".join(numbers) + b"\x89}tR"
    )


def zeros(n: int) -> bytes:
    return bytes(4 * n)


def doubled(times: int) -> bytes:
    """A string in tuples of tuples: to print it takes 2 ** times strings."""
    return text("xx") + b"2\x86" * times


@bomb("deep_key.pt", "load_generator", "steps|is needed")
def _() -> bytes:
    return torch_zip(b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.")


@bomb("deep_key_within_the_steps.pt", "load_generator", "is needed")
def _() -> bytes:
    return torch_zip(b"\x80\x02})" + b"\x85" * 40_000 + b"Ns.")


@bomb("deep_value.pt", "load_latents", "nests values|steps")
def _() -> bytes:
    return torch_zip(b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".")


@bomb("deep_records.pkl", "load_generator", "nests values|steps")
def _() -> bytes:
    return program(*[name("a", "b")] * 9000, b")R", *[b"\x85R"] * 8999)


@bomb("bytearray.pt", "load_generator", "is needed")
def _() -> bytes:
    return torch_zip(program(name("__builtin__", "bytearray"), b"J" + struct.pack("<i", 2**31 - 1), b"\x85R"))


@bomb("name.pkl", "load_generator", "something else than a name")
def _() -> bytes:
    return b"\x80\x04" + doubled(40) + text("x") + b"\x93."


@bomb("class_name.pkl", "load_generator", "is needed|network")
def _() -> bytes:
    meta = table({"class_name": doubled(40), "state": b"}"})
    return program(name("torch_utils.persistence", "_reconstruct_persistent_obj"), meta, b"\x85R")


@bomb("activation.pkl", "load_generator", "modified StyleGAN2|architecture|lacks")
def _() -> bytes:
    return program(nvidia({"activation": doubled(40), "architecture": doubled(40)}))


@bomb("variable.pkl", "load_generator", "variable without a name")
def _() -> bytes:
    return program(tensorflow(b"](" + doubled(40) + b"K\1\x86" + b"e"))


@bomb("option.pt", "load_e4e", "is needed|no ")
def _() -> bytes:
    state = table({"latlayer1.weight": tensor((8, 8), (8, 1)), "input_layer.0.weight": tensor((8,), (1,))})
    return torch_zip(
        program(storage(64), table({"state_dict": state, "opts": table({"encoder_type": doubled(40)})})),
        s0=zeros(64),
    )


@bomb("encoded.pkl", "load_latents", "times larger than the file|steps")
def _() -> bytes:
    once = (
        name("_codecs", "encode")
        + put(1)
        + b"0"
        + text("x" * 200_000)
        + put(2)
        + b"0"
        + text("latin1")
        + put(3)
        + b"0"
    )
    return program(once, b"(", *[get(1) + get(2) + get(3) + b"\x86R"] * 7000, b"l")


@bomb("sets.pkl", "load_latents", "steps")
def _() -> bytes:
    once = b"(" + b"".join(text(f"{i:05}") for i in range(5000)) + b"l" + put(1) + b"0"
    return program(once, b"(", *[name("builtins", "frozenset") + get(1) + b"\x85R"] * 5000, b"l")


@bomb("empty_sets.pkl", "load_latents", "steps")
def _() -> bytes:
    return b"\x80\x04(" + b"\x8f" * 6_000_000 + b"l."


@bomb("marks.pkl", "load_latents", "steps|damaged")
def _() -> bytes:
    return b"\x80\x04" + b"(" * 6_000_000


@bomb("one_hash.pkl", "load_latents", "is needed|are needed")
def _() -> bytes:
    return program(
        b"}(",
        *[
            number(i * (2**61 - 1)) + b"N"
            if i < 7
            else b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N"
            for i in range(20_000)
        ],
        b"u",
    )


@bomb("one_hash_remembered.pkl", "load_latents", "remembers more")
def _() -> bytes:
    return program(b"N", *[f"p{i * (2**61 - 1)}\n".encode() for i in range(20_000)])


@bomb("long_names.pt", "load_generator", "a name of")
def _() -> bytes:
    once = text("." * 1_000_000) + put(1) + b"0" + tensor((1,), (1,)) + put(2) + b"0"
    return torch_zip(
        program(
            storage(1),
            once,
            b"}(",
            *[text(f"{i}") + b"}" + get(1) + get(2) + b"s" for i in range(2000)],
            b"u",
        ),
        s0=zeros(1),
    )


@bomb("prefixes.pt", "load_generator", "networks")
def _() -> bytes:
    once = tensor((1,), (1,)) + put(2) + b"0"
    entries = {f"p{i}.input.input": get(2) for i in range(20_000)}
    return torch_zip(program(storage(1), once, table(entries)), s0=zeros(1))


@bomb("inside.pkl", "load_latents", "times larger than the file|steps")
def _() -> bytes:
    torch.save(torch.zeros(200_000), inner := io.BytesIO(), _use_new_zipfile_serialization=False)
    data = inner.getvalue()
    once = (
        name("torch.storage", "_load_from_bytes")
        + put(1)
        + b"0"
        + name("torch._utils", "_rebuild_tensor_v2")
        + put(2)
        + b"0"
    )
    data = storage_file(data)
    once += b"B" + struct.pack("<I", len(data)) + data + put(3) + b"0"
    one = get(2) + b"(" + get(1) + get(3) + b"\x85RK\0K\1K\1\x86K\1K\1\x86\x89}tR"
    return b"\x80\x03" + once + b"(" + one * 2000 + b"l."


def storage_file(data: bytes) -> bytes:
    """A storage as a plain pickle of a tensor has it: a torch file of the old format."""
    torch.save(torch.zeros(200_000).storage(), out := io.BytesIO(), _use_new_zipfile_serialization=False)
    return out.getvalue()


@bomb("same_call.pkl", "load_latents", "not a function|damaged")
def _() -> bytes:
    call = name("torch._tensor", "_rebuild_from_type_v2")
    return program(call, *[b"(" + call + b"N"] * 5000, b"(t", *[b"NtN" for _ in range(5000)], b"R")


def nvidia(attributes: dict[str, bytes], modules: bytes = b"}") -> bytes:
    """``{"G_ema": network}`` with a mapping and a block b4 of ``attributes``."""

    def module(entries: dict[str, bytes]) -> bytes:
        meta = table({"class_name": text("M"), "state": table(entries)})
        return name("torch_utils.persistence", "_reconstruct_persistent_obj") + meta + b"\x85R"

    block = module(attributes)
    synthesis = module({
        "_modules": table({"b4": block, "b8": module({"_modules": table({"conv0": block})})})
    })
    network = module({"_modules": table({"mapping": module({"_modules": modules}), "synthesis": synthesis})})
    return table({"G_ema": network})


def tensorflow(variables: bytes) -> bytes:
    network = name("dnnlib.tflib.network", "Network") + b")\x81"
    full = network + table({"version": b"K\4", "variables": variables}) + b"b"
    return network + network + full + b"\x87"


@bomb("shared_modules.pkl", "load_generator", "steps")
def _() -> bytes:
    module, meta = name("torch_utils.persistence", "_reconstruct_persistent_obj"), {"class_name": text("M")}
    parts = [module + table(meta | {"state": b"}"}) + b"\x85R" + put(1) + b"0"]
    for i in range(1, 7):  # each holds the one before 20 times
        state = table({"_modules": table({str(j): get(i) for j in range(20)})})
        parts.append(module + table(meta | {"state": state}) + b"\x85R" + put(i + 1) + b"0")
    return program(*parts, nvidia({}, table({"a": get(7)})))


@bomb("one_array.pkl", "load_generator", "times larger than the file|steps|gap|no ")
def _() -> bytes:
    raw = b"X" + struct.pack("<I", 100_000) + b"\0" * 100_000 + put(1) + b"0"
    dtype = name("numpy", "dtype") + text("f4") + b"\x85R(K\3" + text("<") + b"NNNtb" + put(2) + b"0"
    array = (
        name("numpy.core.multiarray", "_reconstruct")
        + b")R(K\1J\xa8\x61\0\0\x85"
        + get(2)
        + b"\x89"
        + get(1)
        + b"tb"
    )
    layers = ["4x4/Const/const", "4x4/Conv/mod_weight", "4x4/Conv/weight"]
    layers += [f"{4 << i}x{4 << i}/Conv1/weight" for i in range(1, 13)]
    names = [f"synthesis/{layer}" for layer in layers] + [
        f"mapping/Dense{i}/{part}" for i in range(4000) for part in ("weight", "bias")
    ]
    return program(raw, dtype, tensorflow(b"](" + b"".join(text(n) + array + b"\x86" for n in names) + b"e"))


# ---- tensors --------------------------------------------------------------------------------------


def mapper(tensors: dict[str, bytes], texts: int = 100) -> bytes:
    stacks = ["mapper.course_mapping", *(f"text_mapper.mapper_{i}" for i in range(texts))]
    layers = [
        f"{stack}.mapping.{i}.{part}" for stack in stacks for i in range(1, 5) for part in ("weight", "bias")
    ]
    return table({
        layer: tensors[layer.rpartition(".")[2]] for layer in [*layers, "mapper.fc.weight", "mapper.fc.bias"]
    })


@bomb("400_on_one_storage.pt", "load_mapper", "times larger than the file")
def _() -> bytes:
    tensors = {"weight": tensor((224, 224), (224, 1)), "bias": tensor((224,), (1,))}
    return torch_zip(program(storage(224 * 224), mapper(tensors)), s0=zeros(224 * 224))


@bomb("one_tensor_400_times.pt", "load_mapper", "times larger than the file")
def _() -> bytes:
    once = tensor((224, 224), (224, 1)) + put(1) + b"0" + tensor((224,), (1,)) + put(2) + b"0"
    return torch_zip(
        program(storage(224 * 224), once, mapper({"weight": get(1), "bias": get(2)})), s0=zeros(224 * 224)
    )


@bomb("repeated_codes.pt", "load_latents", "times larger than the file")
def _() -> bytes:
    return torch_zip(
        program(storage(50_000), b"(" + tensor((1, 3200, 1000), (0, 15, 1)) * 400 + b"l"), s0=zeros(50_000)
    )


@bomb("repeated_pictures.pt", "load_latents", "one a picture is needed")
def _() -> bytes:
    return torch_zip(
        program(storage(50_000), b"(" + tensor((64, 50, 1000), (0, 1000, 1)) * 400 + b"l"), s0=zeros(50_000)
    )


@bomb("stride_0.pt", "load_latents", "declared")
def _() -> bytes:
    return torch_zip(program(storage(4), tensor((2**30, 4), (0, 1))), s0=zeros(4))


@bomb("built.pt", "load_latents", "latents are needed")
def _() -> bytes:
    state = b"(" + get(0) + b"K\0" + number(2**31) + b"K\4\x86K\0K\1\x86t"
    return torch_zip(program(storage(4), name("torch", "Tensor"), b")\x81", state, b"b"), s0=zeros(4))


@bomb("dimensions.pt", "load_latents", "sizes")
def _() -> bytes:
    return torch_zip(program(storage(4), tensor((1,) * 5000, (0,) * 5000)), s0=zeros(4))


@bomb("empty_and_wide.pt", "load_latents", "a size|sizes|are needed")
def _() -> bytes:
    return torch_zip(program(storage(4), tensor((0, 2**62), (1, 1))), s0=zeros(4))


def rosinality(levels: int, style: tuple[int, int] = (1, 1), depth: int = 1) -> dict[str, bytes]:
    """A generator of ``levels`` levels, one channel, and no noise maps."""
    one = tensor((1,), (1,))
    state = {"input.input": tensor((1, 1, 4, 4), (16, 16, 4, 1))}
    for i in range(depth):
        state |= {f"style.{i + 1}.weight": tensor(style, (style[1], 1)), f"style.{i + 1}.bias": one}
    convs = ["conv1", *(f"convs.{i}" for i in range(2 * levels - 2))]
    for place in [*convs, "to_rgb1", *(f"to_rgbs.{i}" for i in range(levels - 1))]:
        rgb = place.startswith("to_rgb")
        state[f"{place}.conv.weight"] = (
            tensor((1, 3, 1, 1, 1), (3, 1, 1, 1, 1)) if rgb else tensor((1, 1, 1, 3, 3), (9, 9, 9, 3, 1))
        )
        state |= {
            f"{place}.conv.modulation.weight": tensor((1, 1), (1, 1)),
            f"{place}.conv.modulation.bias": one,
        }
        state |= (
            {f"{place}.bias": tensor((1, 3, 1, 1), (3, 1, 1, 1))}
            if rgb
            else {f"{place}.activate.bias": one, f"{place}.noise.weight": one}
        )
    return state


@bomb("16384_px.pt", "load_generator", "times larger than the file")
def _() -> bytes:
    return torch_zip(program(storage(16), table(rosinality(13))), s0=zeros(16))


@bomb("4000_style_layers.pt", "load_generator", "4000 layers|times larger than the file|steps")
def _() -> bytes:
    return torch_zip(program(storage(2**16), table(rosinality(2, (256, 256), 4000))), s0=zeros(2**16))


@bomb("300_style_layers.pt", "load_generator", "300 layers")
def _() -> bytes:
    return torch_zip(program(storage(2**12), table(rosinality(2, (8, 8), 300))), s0=zeros(2**12))


@bomb("wide_z.pt", "load_generator", "times larger than the file")
def _() -> bytes:
    return torch_zip(program(storage(2**18), table(rosinality(2, (1, 2**18)))), s0=zeros(2**18))


@bomb("10000_texts.pt", "load_mapper", "times larger|steps|more layers")
def _() -> bytes:
    once = tensor((1, 1), (1, 1)) + put(1) + b"0" + tensor((1,), (1,)) + put(2) + b"0"
    return torch_zip(
        program(storage(1), once, mapper({"weight": get(1), "bias": get(2)}, 10_000)), s0=zeros(1)
    )


@bomb("5000_styles.pt", "load_e4e", "more layers|steps|no ")
def _() -> bytes:
    once = tensor((1, 1), (1, 1)) + put(1) + b"0"
    state = {"latlayer1.weight": get(1), "input_layer.0.weight": get(1), "latent_avg": get(1)}
    state |= {f"styles.{i}.x": get(1) for i in range(5000)}
    return torch_zip(program(storage(1), once, table(state)), s0=zeros(1))


@bomb("filters.pt", "load_generator", "differ|sum|no |gap|does not use|steps")
def _() -> bytes:
    once = tensor((1,), (1,)) + put(1) + b"0"
    state = {"synthesis.b4.const": tensor((4, 4, 4), (0, 0, 0))}
    state |= {f"synthesis.b{i}.x.resample_filter": get(1) for i in range(12_000)}
    return torch_zip(program(storage(1), once, table(state)), s0=zeros(1))


@bomb("empty_z.pt", "load_generator", "a size|is empty")
def _() -> bytes:
    return torch_zip(program(storage(16), table(rosinality(2, (0, 2**30)))), s0=zeros(16))


# ---- our own header -------------------------------------------------------------------------------


def ours(kind: str, config: object) -> bytes:
    """Our own format, with one tensor; ``config`` may be the text of a whole header."""
    tensor = {"w_avg": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    meta = config if isinstance(config, str) else json.dumps({"kind": kind, "config": config})
    header = json.dumps({"__metadata__": {"cfclip": meta}} | tensor).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


SIZES = {"resolution": 8, "channels": [4, 4], "z_dim": 8, "w_dim": 8, "conv_clamp": None}


@bomb("16384_layers.safetensors", "load_generator", "more layers than it has tensors")
def _() -> bytes:
    return ours("generator", SIZES | {"mapping_layers": 16384, "z_dim": 16384, "w_dim": 16384})


@bomb("16384_ws.safetensors", "load_mapper", "more layers than it has tensors")
def _() -> bytes:
    return ours("mapper", {"num_ws": 16384, "w_dim": 512, "text_dim": 512})


@bomb("16384_units.safetensors", "load_identity", "more layers than it has tensors")
def _() -> bytes:
    return ours("identity", {"stages": [[16384, 16384, 16384]] * 100})


@bomb("deep_header.safetensors", "load_mapper", "not a readable|damaged")
def _() -> bytes:
    return ours("mapper", '{"kind": "mapper", "config": ' + "[" * 100_000)


@bomb("nested_sizes.safetensors", "load_mapper", "damaged header")
def _() -> bytes:
    return ours("mapper", '{"kind": "mapper", "config": {"levels": ' + "[" * 500 + "]" * 500 + "}}")


@bomb("long_kind.safetensors", "load_mapper", "damaged header")
def _() -> bytes:
    return ours("k" * 5_000_000, {})


@bomb("huge_number.safetensors", "load_mapper", "declares a size|not a readable")
def _() -> bytes:
    return ours("mapper", '{"kind": "mapper", "config": {"num_ws": 1' + "0" * 4000 + "}}")


@bomb("long_filter.safetensors", "load_generator", "fir of shape|needs|no ")
def _() -> bytes:
    """Taps whose outer product would have 400 GB."""
    size = 4 * 300_000
    tensors = {"fir": {"dtype": "F32", "shape": [300_000], "data_offsets": [0, size]}}
    tensors |= {"w_avg": {"dtype": "F32", "shape": [8], "data_offsets": [size, size + 32]}}
    meta = json.dumps({"kind": "generator", "config": SIZES | {"mapping_layers": 0}})
    header = json.dumps({"__metadata__": {"cfclip": meta}} | tensors).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size + 32)


@bomb("300000_levels.safetensors", "load_mapper", "levels must be")
def _() -> bytes:
    return ours("mapper", {"levels": ["fine"] * 300_000})


@bomb("dimensions.safetensors", "load_latents", "sizes")
def _() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1] * 500_000, "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


@bomb("huge_keys.pkl", "load_latents", "are needed|steps")
def _() -> bytes:
    once = b"\x8b" + struct.pack("<I", 1_000_000) + b"\1" * 1_000_000 + put(1) + b"0"
    return program(once, b"(", *[b"}" + get(1) + b"Ns"] * 30_000, b"l")


@bomb("dotted_keys.pt", "load_generator", "steps")
def _() -> bytes:
    once = text("." * 4096) + put(1) + b"0" + tensor((1,), (1,)) + put(2) + b"0"
    each = [text(f"{i}") + b"}" + get(1) + get(2) + b"s" for i in range(30_000)]
    return torch_zip(program(storage(1), once, b"}(", *each, b"u"), s0=zeros(1))


@bomb("no_number.safetensors", "load_generator", "declares a size")
def _() -> bytes:
    return ours("generator", '{"kind": "generator", "config": {"conv_clamp": NaN}}')


# ---- numpy and zip --------------------------------------------------------------------------------


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + data


def npz(array: bytes, method: int = ZIP_DEFLATED, times: int = 1) -> bytes:
    with ZipFile(out := io.BytesIO(), "w", method) as archive:
        for i in range(times):
            archive.writestr(f"w{i}.npy", array)
    return out.getvalue()


@bomb("s0.npy", "load_latents", "numbers of type")
def _() -> bytes:
    return npy("{'descr': '|S0', 'fortran_order': False, 'shape': (1099511627776, 18, 512), }")


@bomb("large.npy", "load_latents", "truncated|a size")
def _() -> bytes:
    return npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2147483647, 18, 512), }")


@bomb("larger.npy", "load_latents", "header is damaged")
def _() -> bytes:
    return npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1" + "0" * 4000 + ", 18, 512), }")


@bomb("empty.npy", "load_latents", "a size|are needed")
def _() -> bytes:
    return npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4611686018427387904), }")


@bomb("deep.npy", "load_latents", "header is damaged")
def _() -> bytes:
    return npy("{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 9000 + ")" * 900 + "}")


@bomb("minus.npy", "load_latents", "header is damaged")
def _() -> bytes:
    return npy("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "-" * 9000 + "1,)}")


@bomb("dimensions.npy", "load_latents", "header is damaged")
def _() -> bytes:
    return npy("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 3000 + ")}", bytes(4))


@bomb("structure.npy", "load_latents", "numbers of type|header is damaged")
def _() -> bytes:
    return npy("{'descr': '(1000000000,1000000000)f4', 'fortran_order': False, 'shape': (1,)}", bytes(4))


@bomb("zeros.npz", "load_latents", "times larger than the file")
def _() -> bytes:
    return npz(
        npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({16 << 20}, 1), }}", bytes(64 << 20))
    )


@bomb("said_small.npz", "load_latents", "truncated|times larger|checksums|damaged|cannot be used")
def _() -> bytes:
    """The archive says 100 kB; there are 400 MB."""
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (25000, 1), }")
    data = (
        packed.compress(head) + b"".join(packed.compress(bytes(1 << 22)) for _ in range(100)) + packed.flush()
    )
    sizes = 0, 8, 0, 0, 0, len(data), 100_000, 5
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, *sizes, 0) + b"w.npy"
    central = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, *sizes, *[0] * 6) + b"w.npy"
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(central), len(local) + len(data), 0)
    return local + data + central + end


@bomb("many.npz", "load_latents", "times larger than the file")
def _() -> bytes:
    return npz(
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2000, 128), }", bytes(1_024_000)), times=40
    )


@bomb("overlap.pt", "load_generator", "overlap")
def _() -> bytes:
    """An archive that lists one entry of 1 MB 20 000 times."""
    data, file_name = bytes(1_000_000), b"a/data.pkl"
    sizes = zlib.crc32(data), len(data), len(data), len(file_name)
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, *[0] * 4, *sizes, 0) + file_name + data
    central = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, *[0] * 4, *sizes, *[0] * 6) + file_name
    size = 20_000 * len(central)
    return (
        local
        + central * 20_000
        + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 20_000, 20_000, size, len(local), 0)
    )


@bomb("many_entries.pt", "load_generator", "steps|not a torch file")
def _() -> bytes:
    with ZipFile(out := io.BytesIO(), "w") as archive:
        for i in range(60_000):
            archive.writestr(f"{i}", b"")
    return out.getvalue()


@bomb("recompressed.pt", "load_generator", "re-compressed")
def _() -> bytes:
    with ZipFile(out := io.BytesIO(), "w", ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(64 << 20))
    return out.getvalue()


@bomb("objects.npy", "load_latents", "Python objects")
def _() -> bytes:
    np.save(out := io.BytesIO(), np.array([{}], dtype=object), allow_pickle=True)
    return out.getvalue()
