"""Weight files of every kind, mangled at random: bytes, pieces, numbers and the pickle's own instructions."""

import argparse
import io
import pickle
import pickletools
import random
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, is_zipfile

import numpy as np
import official
import torch

from cfclip.checkpoints import weights
from cfclip.models.mapper import Mapper

HUGE = (0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
OPCODES = [ord(op.code) for op in pickletools.opcodes]


def originals(folder: Path) -> dict[str, tuple[str, bytes]]:
    """File name -> the function that reads it, and its content."""
    g, m = official.random_generator(), Mapper(official.SMALL_MAPPER)
    tree, old = (
        {"g_ema": official.rosinality(g), "latent_avg": g.w_avg},
        {"_use_new_zipfile_serialization": False},
    )
    state = {"state_dict": official.mapper_state(m), "opts": argparse.Namespace(stylegan_size=64)}
    codes = {f"{i}.jpg": torch.randn(4, 8) for i in range(5)}
    arrays = {name: code.numpy() for name, code in codes.items()}
    makers = {
        "load_generator": {
            "zip.pt": lambda path: torch.save(tree, path),
            "legacy.pt": lambda path: torch.save(tree, path, **old),
            "nvidia.pkl": lambda path: official.nvidia(g, path),
            "nvidia4.pkl": lambda path: official.nvidia(g, path, protocol=4),
            "tensorflow.pkl": lambda path: official.tensorflow(g, path),
            "tensorflow2.pkl": lambda path: official.tensorflow(g, path, protocol=2),
            "own.safetensors": lambda path: weights.save(g, path, "generator", g.config),
        },
        "load_mapper": {
            "mapper.pt": lambda path: torch.save(state, path),
            "mapper_legacy.pt": lambda path: torch.save(state, path, **old),
            "mapper.safetensors": lambda path: weights.save(m, path, "mapper", m.metadata, prompt="x"),
        },
        "load_latents": {
            "codes.pt": lambda path: torch.save(codes, path),
            "codes.npy": lambda path: np.save(path, np.zeros((3, 4, 8), np.float32)),
            "codes.npz": lambda path: np.savez(path, **arrays),
            "packed.npz": lambda path: np.savez_compressed(path, **arrays),
            "arrays.pkl": lambda path: path.write_bytes(pickle.dumps(arrays)),
            "tensors.pkl": lambda path: path.write_bytes(pickle.dumps(codes)),
        },
    }
    out = {}
    for loader, files in makers.items():
        for name, make in files.items():
            make(folder / name)
            out[name] = loader, (folder / name).read_bytes()
    return out


def files(folder: str, count: str, seed: str) -> Iterator[tuple[str, str, Path]]:
    """``count`` files; number ``i`` is the same whatever ``count`` is."""
    folder = Path(folder)
    kinds = list(originals(folder).items())
    for i in range(int(count)):
        rng = random.Random(f"{seed} {i}")
        name, (loader, content) = kinds[i % len(kinds)]
        if rng.random() < 0.1:
            loader = rng.choice([
                "load_generator",
                "load_mapper",
                "load_latents",
                "load_e4e",
                "load_identity",
            ])
        path = folder / f"mangled_{name}"
        path.write_bytes(mangle(content, rng))
        yield f"{i} {name}", loader, path


def mangle(content: bytes, rng: random.Random) -> bytes:
    if is_zipfile(io.BytesIO(content)) and rng.random() < 0.6:
        return _inside_zip(content, rng)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        change = rng.choice([_flip, _cut, _repeat, _remove, _insert, _swap, _number, _digits])
        if content[:1] == b"\x80" and rng.random() < 0.6:
            change = rng.choice([_opcodes, _opcodes, _repeat_opcode, _argument])
        content = change(content, rng)
    return content


def _inside_zip(content: bytes, rng: random.Random) -> bytes:
    """One entry mangled, with a checksum that is right again; or entries that are lost, repeated, packed."""
    with ZipFile(io.BytesIO(content)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    chosen = 0 if rng.random() < 0.7 else rng.randrange(len(entries))
    name, data = entries[chosen]
    what = rng.random()
    if what < 0.8:
        entries[chosen] = name, mangle(data, rng)
    elif what < 0.9:
        entries.pop(chosen)
    else:
        entries.insert(rng.randrange(len(entries)), (rng.choice(entries)[0], data))
    method = ZIP_DEFLATED if rng.random() < 0.1 else ZIP_STORED
    with ZipFile(out := io.BytesIO(), "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return out.getvalue()


def _place(content: bytes, rng: random.Random) -> int:
    """The first bytes hold most of the structure."""
    return rng.randrange(min(len(content), rng.choice([64, 1024, len(content)])) or 1)


def _span(content: bytes, rng: random.Random) -> tuple[int, int]:
    start = _place(content, rng)
    return start, min(len(content), start + rng.choice([1, 8, 100, 5000]))


def _flip(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 3, 20])):
        if data:
            data[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    start, end = _span(content, rng)
    return content[:end] + content[start:end] * rng.choice([1, 10, 1000]) + content[end:]


def _remove(content: bytes, rng: random.Random) -> bytes:
    start, end = _span(content, rng)
    return content[:start] + content[end:]


def _insert(content: bytes, rng: random.Random) -> bytes:
    start, _ = _span(content, rng)
    return content[:start] + rng.randbytes(rng.choice([1, 8, 1000])) + content[start:]


def _swap(content: bytes, rng: random.Random) -> bytes:
    (a, b), (c, d) = sorted([_span(content, rng), _span(content, rng)])
    return content if b > c else content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def _number(content: bytes, rng: random.Random) -> bytes:
    size, start = rng.choice([1, 2, 4, 8]), _place(content, rng)
    number = (rng.choice(HUGE) & (256**size - 1)).to_bytes(size, "little")
    return content[:start] + number + content[start + size :]


def _digits(content: bytes, rng: random.Random) -> bytes:
    """A number that is written in letters, as in the headers of .npy and .safetensors."""
    head = content[:20_000]
    if not (numbers := list(re.finditer(rb"-?\d+", head))):
        return content
    found = rng.choice(numbers)
    new = rng.choice([*(str(n) for n in HUGE), "-1", "0", "1e999", "9" * 5000, "[" * 500, "null"]).encode()
    content = content[: found.start()] + new + content[found.end() :]
    if content[8:9] == b"{" and rng.random() < 0.8:  # the header's length is right again
        size = int.from_bytes(content[:8], "little") + len(new) - len(found[0])
        content = struct.pack("<Q", max(size, 0)) + content[8:]
    return content


def _starts(content: bytes) -> list[int]:
    """Where the pickle's instructions begin; the last entry is where the first pickle ends, or is damaged."""
    starts = []
    try:
        starts += [position for _, _, position in pickletools.genops(content)]
    except Exception:
        return starts
    return [*starts, starts[-1] + 1]


def _opcodes(content: bytes, rng: random.Random) -> bytes:
    """An instruction of another kind, or two that changed places."""
    starts = _starts(content)
    if len(starts) < 6:
        return _flip(content, rng)
    i, j = sorted(rng.sample(range(1, len(starts) - 1), 2))
    if rng.random() < 0.5:
        return content[: starts[i]] + bytes([rng.choice(OPCODES)]) + content[starts[i] + 1 :]
    pieces = [content[starts[k] : starts[k + 1]] for k in range(len(starts) - 1)]
    pieces[i], pieces[j] = pieces[j], pieces[i]
    return content[: starts[0]] + b"".join(pieces) + content[starts[-1] :]


def _repeat_opcode(content: bytes, rng: random.Random) -> bytes:
    starts = _starts(content)
    if len(starts) < 6:
        return _flip(content, rng)
    i = rng.randrange(1, len(starts) - 1)
    end = starts[min(i + rng.choice([1, 3, 30]), len(starts) - 1)]
    return content[:end] + content[starts[i] : end] * rng.choice([1, 10, 1000]) + content[end:]


def _argument(content: bytes, rng: random.Random) -> bytes:
    """A number of the pickle made huge, or of another type."""
    numbers = [at for at in _starts(content)[:-1] if content[at : at + 1] in (b"K", b"M", b"J", b"\x8a")]
    if not numbers:
        return _number(content, rng)
    at = rng.choice(numbers)
    size = {75: 2, 77: 3, 74: 5}.get(content[at], 2 + content[at + 1])
    new = rng.choice(
        [b"\x8a\x09" + n.to_bytes(9, "little") for n in HUGE] + [b"N", b"\x88", b"}", b")", b"X\1\0\0\0x"]
    )
    return content[:at] + new + content[at + size :]
