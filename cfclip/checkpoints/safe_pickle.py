"""Read a pickle as data: nothing is imported, nothing is called.

NVIDIA's networks are pickles of live objects that carry their own source code; the usual unpickler imports classes,
calls functions and runs that source. Here ``pickletools`` finds the opcodes and :func:`load` interprets them with no
function to call: a class is a :class:`Name`, and calling or instantiating one gives a :class:`Record` of the call. Only
the few calls that stand for plain data (tensors, arrays, containers) are understood, by code of this module.
"""

import _compat_pickle
import io
import pickletools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import torch
from torch import Tensor

MAX_REPEAT = 64
"""How often a tensor may show each element of its storage (strides of 0): W expanded over 18 layers is 18 times."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of a torch file from before the zip format."""

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}

PLAIN_MODULES = {
    "_codecs",
    "argparse",
    "collections",
    "copyreg",
    "datetime",
    "functools",
    "pathlib",
    "types",
    "typing",
}

PLAIN_BUILTINS = {
    "bool",
    "bytearray",
    "bytes",
    "complex",
    "dict",
    "float",
    "frozenset",
    "int",
    "list",
    "object",
    "range",
    "set",
    "slice",
    "str",
    "tuple",
}
"""The part of the standard library that an honest weight file may mention; a call of the rest is reported as hostile."""

PUSHED = {
    "BINBYTES",
    "BINBYTES8",
    "BINFLOAT",
    "BININT",
    "BININT1",
    "BININT2",
    "BINSTRING",
    "BINUNICODE",
    "BINUNICODE8",
    "BYTEARRAY8",
    "FLOAT",
    "INT",
    "LONG",
    "LONG1",
    "LONG4",
    "SHORT_BINBYTES",
    "SHORT_BINSTRING",
    "SHORT_BINUNICODE",
    "STRING",
    "UNICODE",
}

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}

EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}


class PickleError(ValueError):
    """A pickle that is damaged, or that holds what no weight file needs."""


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle mentions: its name, nothing more."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:120]


@dataclass(eq=False)
class Record:
    """An object that the pickle would have built: which class or call, with which arguments, state and contents."""

    name: Name
    args: tuple = ()
    state: Any = None
    items: dict = field(default_factory=dict)
    values: list = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        """An item (of a dict-like object) or an attribute."""
        return (
            self.items[key]
            if key in self.items
            else self.state.get(key, default)
            if isinstance(self.state, dict)
            else default
        )


@dataclass(eq=False)
class Storage:
    """The memory behind tensors; ``data`` stays None where only the declared sizes are checked."""

    dtype: torch.dtype
    numel: int
    data: bytes | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @cached_property
    def tensor(self) -> Tensor:
        return (
            torch.frombuffer(bytearray(self.data), dtype=self.dtype)
            if self.numel
            else torch.empty(0, dtype=self.dtype)
        )


@dataclass(eq=False)
class View:
    """A tensor that is not built yet. Raises PickleError if it would reach outside its storage or blow it up."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self):
        numbers = (self.offset, *self.size, *self.stride)
        whole = all(type(n) is int and n >= 0 for n in numbers)
        if not isinstance(self.storage, Storage) or len(self.size) != len(self.stride) or not whole:
            raise PickleError("a tensor is declared without proper storage, size and strides")
        count = 1
        for n in self.size:
            count *= n
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        if count and (last >= self.storage.numel or count > MAX_REPEAT * self.storage.numel):
            raise PickleError(
                f"a tensor of size {list(self.size)[:8]} is declared over a storage of {self.storage.numel} elements"
            )

    def tensor(self) -> Tensor:
        return self.storage.tensor.as_strided(self.size, self.stride, self.offset)


def load(file: BinaryIO, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Interpret one pickle (protocol 2 … 5) from ``file``, leaving it behind the pickle's end. Raises PickleError.

    ``file.read(n)`` must not allocate more than the file holds (BytesIO, mmap). ``persistent`` resolves persistent ids.
    """
    try:
        return _interpret(file, persistent)
    except PickleError:
        raise
    except Exception as error:  # whatever a mangled pickle breaks, this is the cause
        raise PickleError(
            f"the pickle is damaged or truncated ({type(error).__name__}: {str(error)[:100]})"
        ) from None


def _interpret(file: BinaryIO, persistent: Callable[[Any], Any] | None) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def take(count: int | None = None) -> list[Any]:
        """The top ``count`` values, or those above the last mark."""
        start = marks.pop() if count is None else len(stack) - count
        if start < 0 or start > len(stack):
            raise PickleError("the pickle is damaged: it takes more values than it has")
        taken = stack[start:]
        del stack[start:]
        return taken

    for op, arg, _ in pickletools.genops(file):
        kind = op.name
        if kind in PUSHED:
            stack.append(arg)
        elif kind in CONSTANTS:
            stack.append(CONSTANTS[kind])
        elif kind in EMPTY:
            stack.append(EMPTY[kind]())
        elif kind in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[arg])
        elif kind in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[arg] = stack[-1]
        elif kind == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif kind == "MARK":
            marks.append(len(stack))
        elif kind in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(take(int(kind[-1]))))
        elif kind == "TUPLE":
            stack.append(tuple(take()))
        elif kind == "LIST":
            stack.append(take())
        elif kind in ("DICT", "SETITEM", "SETITEMS"):
            pairs = take(2 if kind == "SETITEM" else None)
            if kind == "DICT":
                stack.append({})
            _set_items(stack[-1], pairs)
        elif kind in ("APPEND", "APPENDS"):
            values = take(1 if kind == "APPEND" else None)
            _extend(stack[-1], values)
        elif kind in ("ADDITEMS", "FROZENSET"):
            values = {v for v in take() if isinstance(v, (str, int, float))}
            if kind == "FROZENSET":
                stack.append(frozenset(values))
            else:
                stack[-1].update(values)
        elif kind in ("GLOBAL", "STACK_GLOBAL"):
            module, name = map(str, arg.split(" ", 1) if kind == "GLOBAL" else take(2))
            stack.append(
                Name(_compat_pickle.IMPORT_MAPPING.get(module, module), name)
            )  # protocol 2 uses Python 2's names
        elif kind in ("REDUCE", "NEWOBJ"):
            stack.append(_call(*take(2)))
        elif kind == "NEWOBJ_EX":
            cls, args, _ = take(3)
            stack.append(_call(cls, args))
        elif kind == "BUILD":
            (state,) = take(1)
            if isinstance(stack[-1], Record):
                stack[-1].state = state
            elif not isinstance(
                stack[-1], dict
            ):  # an OrderedDict's own attributes (``_metadata``) are not needed
                raise PickleError("the pickle sets the state of something that is no object")
        elif kind == "BINPERSID" and persistent is not None:
            stack.append(persistent(stack.pop()))
        elif kind == "POP":
            stack.pop()
        elif kind == "POP_MARK":
            take()
        elif kind == "DUP":
            stack.append(stack[-1])
        elif kind not in ("PROTO", "FRAME", "STOP"):
            raise PickleError(f"the pickle uses {kind}, which no weight file needs")
    (result,) = stack
    return result


def _set_items(target: Any, pairs: list[Any]) -> None:
    items = target.items if isinstance(target, Record) else target
    if not isinstance(items, dict):
        raise PickleError("the pickle sets items of something that is no dict")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if isinstance(
            key, (str, int, float, bytes, type(None))
        ):  # hashing a deeply nested key would overflow the C stack
            items[key] = value


def _extend(target: Any, values: list[Any]) -> None:
    items = target.values if isinstance(target, Record) else target
    if not isinstance(items, list):
        raise PickleError("the pickle appends to something that is no list")
    items.extend(values)


def _call(name: Any, args: Any) -> Any:
    """What the call ``name(*args)`` stands for: data that this module understands, or a record."""
    if not isinstance(name, Name) or not isinstance(args, tuple):
        raise PickleError("the pickle calls something that is no function")
    known = CALLS.get(str(name))
    if known is not None:
        return known(*args)
    if name.name == "_reconstruct_persistent_obj" and name.module.endswith("persistence"):
        return _persistent_object(*args)
    root = name.module.split(".")[0]
    plain = name.name in PLAIN_BUILTINS if root == "builtins" else root in PLAIN_MODULES
    if not plain and root in sys.stdlib_module_names:
        raise PickleError(
            f"it would call {name} when opened the usual way: no weight file needs that, and it may be hostile "
            "(nothing was run); delete it"
        )
    return Record(name, args)


def _persistent_object(meta: Any) -> Record:
    """An object of NVIDIA's ``torch_utils.persistence``: class name and state; its source code is dropped unread."""
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise PickleError("a persistent object has no state")
    return Record(Name("persistence", str(meta.get("class_name"))), state=meta["state"])


def _load_from_bytes(data: Any) -> Storage:
    """A storage inside a plain pickle of tensors: a whole torch file of the old format."""
    if not isinstance(data, bytes):
        raise PickleError("a storage holds no bytes")
    value = load_legacy(io.BytesIO(data), keep=True)
    if not isinstance(value, Storage):
        raise PickleError("a storage holds something else")
    return value


def _from_type(call: Any, _type: Any, args: Any, _state: Any) -> Any:
    return _call(call, args)


def _declared_view(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> View:
    return View(storage, offset, tuple(size), tuple(stride))


def _dict(*pairs: Any) -> dict:
    result: dict = {}
    for pair in pairs[0] if pairs and isinstance(pairs[0], (list, tuple)) else ():
        _set_items(result, list(pair))
    return result


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "builtins.set": lambda values=(): {v for v in values if isinstance(v, (str, int, float))},
    "builtins.frozenset": lambda values=(): frozenset(v for v in values if isinstance(v, (str, int, float))),
    "builtins.bytes": lambda: b"",  # how protocol 2 writes the empty one
    "_codecs.encode": lambda text, encoding="latin1": text.encode("latin1"),
    "torch.storage._load_from_bytes": _load_from_bytes,
    "torch._utils._rebuild_tensor": _declared_view,
    "torch._utils._rebuild_tensor_v2": _declared_view,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _from_type,
}


def load_legacy(file: BinaryIO, keep: bool = False) -> Any:
    """A torch file from before the zip format, as data; with ``keep`` its storages are filled, else only checked."""
    if load(file) != LEGACY_MAGIC:
        raise PickleError("it is no torch file")
    load(file), load(file)  # protocol version, byte order of the machine
    storages: dict[str, Storage] = {}
    value = load(file, lambda pid: _declare(pid, storages))
    for key in load(file):
        storage = storages[key] if isinstance(key, str) and key in storages else None
        if storage is None or int.from_bytes(file.read(8), "little") != storage.numel:
            raise PickleError("the storages of the torch file do not match what it declares")
        start = file.tell()
        file.seek(0, io.SEEK_END)
        if file.tell() - start < storage.nbytes:
            raise PickleError(
                f"the torch file is truncated: {file.tell() - start} bytes where {storage.nbytes} are declared"
            )
        file.seek(start)
        if keep:
            storage.data = file.read(storage.nbytes)
        file.seek(start + storage.nbytes)
    if keep and any(storage.data is None for storage in storages.values()):
        raise PickleError("the torch file is truncated: a storage is missing")
    return value


def _declare(pid: Any, storages: dict[str, Storage]) -> Storage:
    """Persistent id ``("storage", torch.FloatStorage, key, location, numel[, view])`` -> Storage."""
    if (
        not isinstance(pid, tuple)
        or len(pid) not in (5, 6)
        or pid[0] != "storage"
        or (len(pid) == 6 and pid[5] is not None)
    ):
        raise PickleError("the torch file refers to something that is no storage")
    _, cls, key, _, numel, *_ = pid
    dtype = STORAGES.get(cls.name) if isinstance(cls, Name) else None
    if dtype is None or not isinstance(key, str) or type(numel) is not int or numel < 0:
        raise PickleError(f"the torch file declares a storage of unknown kind ({str(cls)[:60]})")
    storage = storages.setdefault(key, Storage(dtype, numel))
    if (storage.dtype, storage.numel) != (dtype, numel):
        raise PickleError("the torch file declares one storage in two ways")
    return storage


def check_zip(path: Any) -> None:
    """Check a torch file of the zip format without reading tensors into memory: checksums, declared sizes, hostile calls."""
    try:
        with ZipFile(path) as archive:
            entries = {i.filename: i for i in archive.infolist()}
            roots = [
                n.removesuffix("data.pkl") for n in entries if n.count("/") == 1 and n.endswith("/data.pkl")
            ]
            if len(roots) != 1:
                raise PickleError("it is a zip archive, but no torch file: unpack it first")
            if roots[0] + "constants.pkl" in entries:
                raise PickleError(
                    "it is a TorchScript archive, which is a program: export a plain state dict instead"
                )
            if any(i.compress_type != ZIP_STORED for i in entries.values()):
                raise PickleError("the torch file was re-compressed: save it again with torch.save")
            if damaged := archive.testzip():
                raise PickleError(f"its checksums do not match (at {damaged})")
            storages: dict[str, Storage] = {}
            load(io.BytesIO(archive.read(roots[0] + "data.pkl")), lambda pid: _declare(pid, storages))
            for key, storage in storages.items():
                entry = entries.get(f"{roots[0]}data/{key}")
                if entry is None or entry.file_size < storage.nbytes:
                    raise PickleError(
                        f"it declares {storage.nbytes} bytes for a storage that has {entry.file_size if entry else 0}"
                    )
    except PickleError:
        raise
    except (BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise PickleError(f"the zip archive is damaged or truncated ({str(error)[:100]})") from None


def to_tensor(value: Any) -> Tensor:
    """A tensor, numpy array or number from :func:`load` -> torch tensor (own memory not guaranteed). Raises PickleError."""
    if isinstance(value, View):
        return value.tensor()
    if isinstance(value, (bool, int, float)):
        return torch.tensor(value)
    if isinstance(value, Record) and value.name.module.split(".")[0] == "numpy":
        try:
            if value.name.name == "_reconstruct":
                _, shape, dtype, fortran, raw = value.state
                return _array(raw, dtype, shape, "F" if fortran else "C")
            if value.name.name == "_frombuffer":
                raw, dtype, shape, order = value.args
                return _array(raw, dtype, shape, order)
            if value.name.name == "scalar":
                dtype, raw = value.args
                return _array(raw, dtype, (), "C")
        except (TypeError, ValueError, AttributeError) as error:
            raise PickleError(f"a numpy array is damaged ({str(error)[:100]})") from None
    raise PickleError(
        f"a {value.name if isinstance(value, Record) else type(value).__name__} stands where a tensor is needed"
    )


def _array(raw: Any, dtype: Any, shape: Any, order: str) -> Tensor:
    code = str(dtype.args[0])
    if not isinstance(dtype, Record) or not re.fullmatch(r"[fiu][1248]|b1", code):
        raise PickleError(f"a numpy array of dtype {code[:20]} stands where numbers are needed")
    byte_order = dtype.state[1] if isinstance(dtype.state, tuple) else "="
    kind = np.dtype((byte_order if byte_order in ("<", ">") else "=") + code)
    raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 had no bytes
    array = np.frombuffer(raw, kind).reshape([int(n) for n in shape], order=order)
    return torch.from_numpy(array.astype(kind.newbyteorder("="), order="C"))
