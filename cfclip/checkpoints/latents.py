"""Latent codes from files."""

import math
import os
import warnings
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED

import numpy as np
import torch
from torch import Tensor

from cfclip.checkpoints import safe_pickle
from cfclip.checkpoints.budget import spend
from cfclip.checkpoints.reading import about, describe, mapped, read_torch, sniff
from cfclip.checkpoints.safe_pickle import open_zip
from cfclip.checkpoints.values import is_array, sizes, to_tensor
from cfclip.checkpoints.weights import WeightsError, check_numbers, read_tensors
from cfclip.models.stylegan2 import Generator

NAMES = ("w", "w_plus", "wplus", "ws", "latent", "latents", "codes", "dlatents", "projected_w", "arr_0")
"""Keys under which other tools store codes; their files may have more keys, which are not needed."""

MADE_FOR = {2 * level - 2: 2**level for level in range(3, 13)}
"""Layers L of a W+ code -> size of the generator in pixels."""

WANTED = "latents are needed: floats [N, L, D] (W+) or [N, D] (W), or a list or dict of one code a picture"
ONE_CODE = "its {} has {} codes, but one a picture is needed: keep the best one"


def load_latents(path: str | os.PathLike, generator: Generator | None = None) -> Tensor:
    """Load latent codes as float32: W+ [N, L, D], or W [N, D] or [N, 1, D].

    The file is a ``.pt``, ``.npy``, ``.npz`` (also NVIDIA's ``projected_w.npz``), ``.safetensors``, or a
    pickle of plain arrays. It holds one of:

    - a float tensor [N, L, D] or [N, D];
    - a list or a dict with one code per picture, [L, D], [1, L, D] or [D]; the order of the file is kept;
    - a dict with either of these under one of ``NAMES``. The code of a single picture may also be in such a
      dict, as in the files of rosinality's projector.

    With ``generator``, the codes must fit it, and W is repeated over its layers: the result is always
    [N, L, D]. A tensor [L, D] with exactly the generator's L is read as one W+ code, with a warning, because
    L codes of W have the same shape. Save L codes of W as [L, 1, D]. Raises WeightsError.
    """
    path, kind = Path(path), sniff(path)
    with about(path):
        parts = _codes(_open(path, kind))
        w = torch.cat([part.detach().float() for part in parts])
        if not w.numel():
            raise ValueError(f"it holds {describe(w)}, but {WANTED}")
    return w if generator is None else fit_latents(w, generator, str(path))


def _open(path: Path, kind: str) -> Any:
    """The content of the file: a tensor, or lists and dicts of tensors, which may be Views or Records."""
    if kind == "safetensors":
        return read_tensors(path)
    if kind == "npz":
        return _open_npz(path)
    if kind.startswith("torch"):
        return read_torch(path)
    with mapped(path) as file:
        return _array(file) if kind == "npy" else safe_pickle.load(file)


def _open_npz(path: Path) -> dict[str, Tensor]:
    """The arrays that NAMES lists, without reading any other; all arrays if NAMES lists none of them."""
    with path.open("rb") as file, open_zip(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type not in (ZIP_STORED, ZIP_DEFLATED) for entry in entries):
            raise ValueError("it is compressed in an unusual way: save it again with numpy.savez")
        arrays = {entry.filename.removesuffix(".npy"): entry for entry in entries}
        wanted = [name for name in NAMES if name in arrays] or list(arrays)
        found = {}
        for name in wanted:
            size = arrays[name].file_size
            spend(size)
            with archive.open(arrays[name]) as entry:
                found[name] = _array(BytesIO(entry.read(size)))  # without a size, zipfile unpacks all first
        return found


def _array(file: BinaryIO) -> Tensor:
    """The floats of an ``.npy`` file as float32. ValueError if its header declares more data than it has."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError("it is a .npy of named fields, but plain numbers are needed")
    one = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(file, max_header_size=1000)
    except Exception:  # numpy parses it as Python source, which may fail in any way
        raise ValueError("its header is damaged: save it again with numpy.save") from None
    if dtype.hasobject:
        raise ValueError(
            "it is a .npy of Python objects (a pickle, which may run code); for safety it is not opened. "
            "Where you made it, save its codes as plain numbers: numpy.savez(path, **{picture: code, …}), "
            "each a float array [L, D]"
        )
    if dtype.kind != "f":
        raise ValueError(f"it holds numbers of type {dtype.name}, but {WANTED}")
    data, size = file.read(), math.prod(sizes(shape))
    if size * dtype.itemsize > len(data):
        raise ValueError(f"it is truncated: its header says {list(shape)}, which is more than it holds")
    array = np.frombuffer(data, dtype, size).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(array.astype(np.float32, order="C"))


def _codes(tree: Any) -> list[Tensor]:
    """All codes of an opened file, [N, L, D] or [N, D], to be concatenated."""
    held = _named(tree)
    if is_array(held):
        codes = _tensor("tensor", held)
        if codes.ndim not in (2, 3):
            raise ValueError(f"it holds {describe(codes)}, but {WANTED}")
        return [codes]
    if not isinstance(held, Mapping | list | tuple) or not held:
        raise ValueError(f"it holds {describe(tree)}, but {WANTED}")
    pairs = held.items() if isinstance(held, Mapping) else enumerate(held)
    pictures = [
        (key[:80] if isinstance(key, str) else f"entry {i}", one) for i, (key, one) in enumerate(pairs)
    ]
    parts: list[Tensor] = []
    for name, value in pictures:
        code = _one_code(name, value)
        if code.ndim not in (1, 2, 3):
            raise ValueError(
                f"it holds {describe(tree)} with a {name} of shape {list(code.shape)}, but {WANTED}"
            )
        if code.ndim == 1 and isinstance(held, Mapping):
            code = code[None]  # in a dict by picture, [D] is a W code, not one layer of W+
        code = code if code.ndim == 3 else code[None]
        if parts and code.shape[1:] != parts[0].shape[1:]:
            shapes = f"{pictures[0][0]} {list(parts[0].shape[1:])}, {name} {list(code.shape[1:])}"
            raise ValueError(f"it holds {describe(tree)} that differ in shape ({shapes}), but {WANTED}")
        parts.append(code)
    return parts


def _named(tree: Any) -> Any:
    """The entry of ``tree`` whose key is in NAMES, or ``tree`` without such a key. ValueError for several."""
    keys = [key for key in NAMES if key in tree] if isinstance(tree, Mapping) else []
    if len(keys) > 1:
        raise ValueError(f"it holds codes under {' and '.join(keys)}: save those to use alone")
    return tree[keys[0]] if keys else tree


def _tensor(name: str, value: Any) -> Tensor:
    tensor = to_tensor(value)
    if not tensor.is_floating_point():
        raise ValueError(f"its {name} holds numbers of type {tensor.dtype}, but {WANTED}")
    if tensor.numel():
        check_numbers(name, tensor)
    return tensor


def _one_code(name: str, value: Any) -> Tensor:
    """The code of one picture: [L, D], [1, L, D] or [D] in a valid file. Its shape is not checked here."""
    value = _named(value)
    if isinstance(value, list | tuple) and len(value) == 1:
        (value,) = value
    if isinstance(value, list | tuple) and value and is_array(value[0]):
        raise ValueError(ONE_CODE.format(name, len(value)))
    if not is_array(value):
        raise ValueError(f"its {name} is {describe(value)}, but {WANTED}")
    code = _tensor(name, value)
    if code.ndim == 3 and len(code) > 1:
        raise ValueError(ONE_CODE.format(name, len(code)))
    return code


def fit_latents(w: Tensor, generator: Generator, what: str = "the latents") -> Tensor:
    """W [N, D] (or [N, 1, D]) or W+ [N, L, D] or [L, D] -> [N, L, D] for ``generator``.

    [L, D] with the generator's L is one W+ code. If a 2-D tensor is ambiguous, a warning says how it was
    read. Raises WeightsError if the codes do not fit.
    """
    layers, width, res = generator.num_ws, generator.w_dim, generator.resolution
    if w.shape[-1] != width:
        raise WeightsError(
            f"{what}: codes are {w.shape[-1]} wide, but this generator's are {width}: "
            "they belong to another generator"
        )
    if w.ndim == 2 and len(w) == layers:
        warnings.warn(
            f"{what}: {list(w.shape)} is read as one W+ code, because this generator takes {layers} layers; "
            f"save {layers} codes of W as [{layers}, 1, {width}]",
            stacklevel=3,
        )
        return w[None]
    if w.ndim == 2 and (size := MADE_FOR.get(len(w), 0)) >= 64:
        warnings.warn(
            f"{what}: {list(w.shape)} is read as {len(w)} codes of W, because this generator takes {layers} "
            f"layers; if it is one W+ code of a {size} px generator, load that one",
            stacklevel=3,
        )
    if w.ndim == 2 or w.shape[1] == 1:
        return w.reshape(-1, 1, width).repeat(1, layers, 1)
    if (given := w.shape[1]) != layers:
        origin = f" (those of a {MADE_FOR[given]} px generator)" if given in MADE_FOR else ""
        raise WeightsError(
            f"{what}: codes have {given} layers{origin}, but this {res} px generator takes {layers}: "
            "load the generator they were made with, or invert the photos again; "
            f"w[:, :{layers}] removes layers that are too many"
        )
    return w
