"""Read a pickle as data: nothing is imported, nothing is called.

NVIDIA's networks are pickles of live objects that carry their own source code; the usual unpickler imports
classes, calls functions and runs that source. Here ``pickletools`` decodes the opcodes, and :func:`load`
interprets them with no function to call: a class is a :class:`Name`, a call gives a :class:`Record` of it.
Only the few calls that make plain data (tensors, arrays, containers) are understood, by code of this module.
"""

import _compat_pickle
import io
import math
import pickletools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import torch
from torch import Tensor

MAX_REPEAT = 64
"""How often a tensor may repeat its storage with strides of 0; W expanded over 18 layers does it 18 times."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of a torch file from before the zip format."""

STORAGES = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16}
STORAGES |= {"BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16}
STORAGES |= {"Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool, "Untyped": torch.uint8}
STORAGES |= {"ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}
"""dtype of ``torch.FloatStorage`` and its siblings."""

PLAIN_TYPES = (bool, bytearray, bytes, complex, dict, float, frozenset, int)
PLAIN_TYPES += (list, object, range, set, slice, str, tuple)
PLAIN_BUILTINS = {kind.__name__ for kind in PLAIN_TYPES}
PLAIN_MODULES = {"_codecs", "argparse", "collections", "copyreg", "datetime"}
PLAIN_MODULES |= {"functools", "pathlib", "types", "typing"}
"""What honest files call of the standard library; a call of anything else there is reported as hostile."""

VALUES = (
    "(SHORT_)?BIN(BYTES|STRING|UNICODE)8?|BYTEARRAY8|(BIN)?FLOAT|BININT[12]?|INT|LONG[14]?|STRING|UNICODE"
)
PUSHED = {op.name: lambda arg: arg for op in pickletools.opcodes if re.fullmatch(VALUES, op.name)}
PUSHED |= {"NONE": lambda _: None, "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False}
PUSHED |= {"EMPTY_LIST": lambda _: [], "EMPTY_DICT": lambda _: {}, "EMPTY_SET": lambda _: set()}
PUSHED |= {"EMPTY_TUPLE": lambda _: ()}
"""Opcode -> the value that it pushes, from its argument."""

SCALARS = (str, int, float)
"""Kept in sets and, with bytes and None, as keys. Others are dropped: hashing may overflow the C stack."""


class PickleError(ValueError):
    """A pickle that is damaged, or that holds something that no weight file needs."""


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle mentions: its name, nothing more."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:120]


@dataclass(eq=False)
class Record:
    """An object that the pickle would have built: its class or function, arguments, state and contents."""

    name: Name
    args: tuple = ()
    state: Any = None
    items: dict = field(default_factory=dict)
    values: list = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        """An item (of a dict-like object) or an attribute."""
        attributes = self.state if isinstance(self.state, dict) else {}
        return self.items[key] if key in self.items else attributes.get(key, default)


@dataclass(eq=False)
class Storage:
    """The memory behind tensors; ``data`` stays None if only the declared sizes are checked."""

    dtype: torch.dtype
    numel: int
    data: bytes | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @cached_property
    def tensor(self) -> Tensor:
        if not self.numel:
            return torch.empty(0, dtype=self.dtype)
        return torch.frombuffer(bytearray(self.data), dtype=self.dtype)


@dataclass(eq=False)
class View:
    """A tensor that is not built yet. PickleError if it leaves its storage or repeats it too often."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self):
        whole = all(type(n) is int and n >= 0 for n in (self.offset, *self.size, *self.stride))
        if not isinstance(self.storage, Storage) or len(self.size) != len(self.stride) or not whole:
            raise PickleError("a tensor is declared without proper storage, size and strides")
        count = math.prod(self.size)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        held = self.storage.numel
        if count and (last >= held or count > MAX_REPEAT * held):
            raise PickleError(
                f"a tensor of size {list(self.size)[:8]} is declared over a storage of {held} elements"
            )

    def tensor(self) -> Tensor:
        return self.storage.tensor.as_strided(self.size, self.stride, self.offset)


def load(file: BinaryIO, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Interpret one pickle (protocol 2 … 5) from ``file`` and stop at its end. Raises PickleError.

    ``file.read(n)`` must not allocate more than the file holds (BytesIO, mmap). ``persistent`` resolves
    persistent ids.
    """
    try:
        return _interpret(file, persistent)
    except PickleError:
        raise
    except Exception as error:  # a damaged pickle may break anything
        why = f"{type(error).__name__}: {str(error)[:100]}"
        raise PickleError(f"the pickle is damaged or truncated ({why})") from error


def _interpret(file: BinaryIO, persistent: Callable[[Any], Any] | None) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(count: int | None = None) -> list[Any]:
        """The top ``count`` values, or those above the last mark."""
        start = marks.pop() if count is None else len(stack) - count
        if not 0 <= start <= len(stack):
            raise PickleError("the pickle is damaged: it takes more values than it has")
        values = stack[start:]
        del stack[start:]
        return values

    for op, arg, _ in pickletools.genops(file):
        match op.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case name if name in PUSHED:
                stack.append(PUSHED[name](arg))
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[arg])
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "MARK":
                marks.append(len(stack))
            case "POP":
                stack.pop()
            case "POP_MARK":
                pop()
            case "DUP":
                stack.append(stack[-1])
            case "TUPLE":
                stack.append(tuple(pop()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(op.name[-1]))))
            case "LIST":
                stack.append(pop())
            case "APPEND" | "APPENDS":
                values = pop(1) if op.name == "APPEND" else pop()
                _extend(stack[-1], values)
            case "DICT":
                pairs = pop()
                stack.append({})
                _set_items(stack[-1], pairs)
            case "SETITEM" | "SETITEMS":
                pairs = pop(2) if op.name == "SETITEM" else pop()
                _set_items(stack[-1], pairs)
            case "FROZENSET":
                stack.append(frozenset(_scalars(pop())))
            case "ADDITEMS":
                values = pop()
                stack[-1].update(_scalars(values))
            case "GLOBAL" | "STACK_GLOBAL":
                module, name = map(str, arg.split(" ", 1) if op.name == "GLOBAL" else pop(2))
                module = _compat_pickle.IMPORT_MAPPING.get(module, module)  # protocol 2 uses Python 2's names
                stack.append(Name(module, name))
            case "REDUCE" | "NEWOBJ":
                stack.append(_call(*pop(2)))
            case "NEWOBJ_EX":
                function, args, _ = pop(3)
                stack.append(_call(function, args))
            case "BUILD":
                (state,) = pop(1)
                if isinstance(stack[-1], Record):
                    stack[-1].state = state
                elif not isinstance(
                    stack[-1], dict
                ):  # an OrderedDict's attributes (``_metadata``) are not needed
                    raise PickleError("the pickle sets the state of something that is not an object")
            case "BINPERSID" if persistent is not None:
                stack.append(persistent(stack.pop()))
            case name:
                raise PickleError(f"the pickle uses {name}, which no weight file needs")
    (result,) = stack
    return result


def _scalars(values: Any) -> set:
    return {value for value in values if isinstance(value, SCALARS)}


def _set_items(target: Any, pairs: list[Any]) -> None:
    items = target.items if isinstance(target, Record) else target
    if not isinstance(items, dict):
        raise PickleError("the pickle sets items of something that is not a dict")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if key is None or isinstance(key, (*SCALARS, bytes)):
            items[key] = value


def _extend(target: Any, values: list[Any]) -> None:
    items = target.values if isinstance(target, Record) else target
    if not isinstance(items, list):
        raise PickleError("the pickle appends to something that is not a list")
    items.extend(values)


def _call(name: Any, args: Any) -> Any:
    """The result of ``name(*args)``: data that this module understands, or a record of the call."""
    if not isinstance(name, Name) or not isinstance(args, tuple):
        raise PickleError("the pickle calls something that is not a function")
    if (known := CALLS.get(str(name))) is not None:
        return known(*args)
    if name.name == "_reconstruct_persistent_obj" and name.module.endswith("persistence"):
        return _persistent_object(*args)
    root = name.module.split(".")[0]
    plain = name.name in PLAIN_BUILTINS if root == "builtins" else root in PLAIN_MODULES
    if not plain and root in sys.stdlib_module_names:
        raise PickleError(
            f"it would call {name} when opened the usual way: no weight file needs that, and it may be "
            "hostile (nothing was run); delete it"
        )
    return Record(name, args)


def _persistent_object(meta: Any) -> Record:
    """An object of NVIDIA's ``torch_utils.persistence``: class name and state, without its source code."""
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise PickleError("a persistent object has no state")
    return Record(Name("persistence", str(meta.get("class_name"))), state=meta["state"])


def _load_from_bytes(data: Any) -> Storage:
    """A storage inside a plain pickle of tensors: a whole torch file of the old format."""
    storage = load_legacy(io.BytesIO(data), keep=True) if isinstance(data, bytes) else None
    if not isinstance(storage, Storage):
        raise PickleError("a storage holds something else")
    return storage


def _dict(pairs: Any = (), *_: Any) -> dict:
    result: dict = {}
    for pair in pairs if isinstance(pairs, list | tuple) else ():
        _set_items(result, list(pair))
    return result


def _view(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> View:
    return View(storage, offset, tuple(size), tuple(stride))


def _first(value: Any, *_: Any) -> Any:
    return value


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "builtins.set": lambda values=(): _scalars(values),
    "builtins.frozenset": lambda values=(): frozenset(_scalars(values)),
    "builtins.bytes": lambda: b"",  # the empty one in protocol 2
    "_codecs.encode": lambda text, encoding="latin1": text.encode("latin1"),
    "torch.storage._load_from_bytes": _load_from_bytes,
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, args, state: _call(function, args),
}
"""Calls that make plain data."""


def load_legacy(file: BinaryIO, keep: bool = False) -> Any:
    """A torch file from before the zip format, as data. Storages are checked; ``keep`` also reads them."""
    if load(file) != LEGACY_MAGIC:
        raise PickleError("it is not a torch file")
    load(file), load(file)  # protocol version, byte order of the machine
    storages: dict[str, Storage] = {}
    value = load(file, lambda pid: _declare(pid, storages))
    for key in load(file):
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or int.from_bytes(file.read(8), "little") != storage.numel:
            raise PickleError("the storages of the torch file do not match what it declares")
        start = file.tell()
        file.seek(0, io.SEEK_END)
        if (left := file.tell() - start) < storage.nbytes:
            raise PickleError(
                f"the torch file is truncated: it declares {storage.nbytes} bytes and has {left}"
            )
        file.seek(start)
        if keep:
            storage.data = file.read(storage.nbytes)
        file.seek(start + storage.nbytes)
    if keep and any(storage.data is None for storage in storages.values()):
        raise PickleError("the torch file is truncated: a storage is missing")
    return value


def _declare(pid: Any, storages: dict[str, Storage]) -> Storage:
    """Persistent id ``("storage", torch.FloatStorage, key, location, numel[, None])`` -> Storage."""
    if (
        not isinstance(pid, tuple)
        or len(pid) not in (5, 6)
        or pid[0] != "storage"
        or pid[5:] not in ((), (None,))
    ):
        raise PickleError("the torch file refers to something that is not a storage")
    _, kind, key, _, numel, *_ = pid
    dtype = STORAGES.get(kind.name.removesuffix("Storage")) if isinstance(kind, Name) else None
    if dtype is None or not isinstance(key, str) or type(numel) is not int or numel < 0:
        raise PickleError(f"the torch file declares a storage of unknown kind ({str(kind)[:60]})")
    storage = storages.setdefault(key, Storage(dtype, numel))
    if (storage.dtype, storage.numel) != (dtype, numel):
        raise PickleError("the torch file declares one storage in two ways")
    return storage


def check_zip(path: Any) -> None:
    """Check the checksums, declared sizes and calls of a torch file of the zip format; reads no tensor.

    Raises PickleError, or zipfile's errors for a damaged archive.
    """
    with ZipFile(path) as archive:
        _check_archive(archive)


def _check_archive(archive: ZipFile) -> None:
    entries = {entry.filename: entry for entry in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in entries if re.fullmatch(r"[^/]*/data\.pkl", name)]
    if len(roots) != 1:
        raise PickleError("it is a zip archive, but not a torch file: unpack it first")
    (root,) = roots
    if root + "constants.pkl" in entries:
        raise PickleError(
            "it is a TorchScript archive, which is a program: export a plain state dict instead"
        )
    if any(entry.compress_type != ZIP_STORED for entry in entries.values()):
        raise PickleError("the torch file was re-compressed: save it again with torch.save")
    if damaged := archive.testzip():
        raise PickleError(f"its checksums do not match (at {damaged})")
    storages: dict[str, Storage] = {}
    load(io.BytesIO(archive.read(root + "data.pkl")), lambda pid: _declare(pid, storages))
    for key, storage in storages.items():
        entry = entries.get(f"{root}data/{key}")
        held = entry.file_size if entry else 0
        if entry is None or held < storage.nbytes:
            raise PickleError(f"it declares {storage.nbytes} bytes for a storage that has {held}")


def to_tensor(value: Any) -> Tensor:
    """A tensor, array or number from :func:`load` as a torch tensor. Raises PickleError."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, View):
        return value.tensor()
    if isinstance(value, bool | int | float):
        return torch.tensor(value)
    if isinstance(value, Record) and value.name.module.split(".")[0] == "numpy":
        try:
            match value.name.name:
                case "_reconstruct":
                    _, shape, dtype, fortran, raw = value.state
                    return _array(raw, dtype, shape, "F" if fortran else "C")
                case "_frombuffer":
                    raw, dtype, shape, order = value.args
                    return _array(raw, dtype, shape, order)
                case "scalar":
                    dtype, raw = value.args
                    return _array(raw, dtype, (), "C")
        except (TypeError, ValueError, AttributeError) as error:
            raise PickleError(f"a numpy array is damaged ({str(error)[:100]})") from None
    kind = value.name if isinstance(value, Record) else type(value).__name__
    raise PickleError(f"a {kind} is in the place of a tensor")


def _array(raw: Any, dtype: Any, shape: Any, order: str) -> Tensor:
    code = str(dtype.args[0])
    if not isinstance(dtype, Record) or not re.fullmatch(r"[fiu][1248]|b1", code):
        raise PickleError(f"a numpy array of dtype {code[:20]} is in the place of numbers")
    byte_order = dtype.state[1] if isinstance(dtype.state, tuple) else "="
    kind = np.dtype((byte_order if byte_order in ("<", ">") else "=") + code)
    raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 had no bytes
    array = np.frombuffer(raw, kind).reshape([int(n) for n in shape], order=order)
    return torch.from_numpy(array.astype(kind.newbyteorder("="), order="C"))
