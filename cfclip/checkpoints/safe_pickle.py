"""Read a pickle as data: nothing is imported, nothing is called.

NVIDIA's networks are pickles of live objects that carry their own source code; the usual unpickler imports
classes, calls functions and runs that source. Here ``pickletools`` decodes the opcodes, and :func:`load`
interprets them without running anything: a class becomes a :class:`Name`, and a call a :class:`Record`.
Only the few calls that make plain data (tensors, containers, bytes) are carried out, by functions of this
module. All work is paid from the file's budget. Nothing from the file is hashed, compared or printed before
its type and size are known, because a tuple nested a million deep would overflow the C stack.
"""

import _compat_pickle
import io
import mmap
import pickletools
import re
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor, UntypedStorage

from cfclip.checkpoints.budget import BudgetError, current, spend
from cfclip.checkpoints.values import Name, PickleError, Record, Storage, View, sizes

MAX_NAME = 4096
"""The most characters in a key, or in the name of a class together with its module."""

MAX_DEPTH = 100
"""How deep values may be nested in each other; NVIDIA's networks are nested 30 deep."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of a torch file from before the zip format."""

STORAGES = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16}
STORAGES |= {"BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16}
STORAGES |= {"Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool, "Untyped": torch.uint8}
STORAGES |= {"ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}
"""Name of a storage class of torch, without its ending "Storage" -> dtype."""

PLAIN_TYPES = (bool, bytearray, bytes, complex, dict, float, frozenset, int)
PLAIN_TYPES += (list, object, range, set, slice, str, tuple)
PLAIN_BUILTINS = {kind.__name__ for kind in PLAIN_TYPES}
PLAIN_MODULES = {"_codecs", "argparse", "collections", "copyreg", "datetime"}
PLAIN_MODULES |= {"functools", "pathlib", "types", "typing"}
"""Standard-library modules and builtins that honest files call. Calls of others are reported as hostile."""

VALUES = (
    "(SHORT_)?BIN(BYTES|STRING|UNICODE)8?|BYTEARRAY8|(BIN)?FLOAT|BININT[12]?|INT|LONG[14]?|STRING|UNICODE"
)
PUSHED = {op.name: lambda arg: arg for op in pickletools.opcodes if re.fullmatch(VALUES, op.name)}
PUSHED |= {"NONE": lambda _: None, "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False}
PUSHED |= {"EMPTY_LIST": lambda _: [], "EMPTY_DICT": lambda _: {}, "EMPTY_SET": lambda _: set()}
PUSHED |= {"EMPTY_TUPLE": lambda _: ()}
"""Opcode -> function from the argument of the opcode to the value that it pushes."""

KEYS = {type(None), bool, bytes, float, str}
"""Types of dict keys and set members that are kept, besides int. No weight file needs any others."""


def load(file: BinaryIO, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Interpret one pickle (protocol 2 … 5) from ``file`` and stop at its end.

    ``file.read(n)`` must not allocate more than the file holds (BytesIO, mmap). ``persistent`` resolves
    persistent ids. Raises PickleError or BudgetError.
    """
    try:
        value = _interpret(file, persistent)
        _check_depth(value)
        return value
    except (PickleError, BudgetError):
        raise
    except Exception as error:  # a damaged pickle may break anything
        why = f"{type(error).__name__}: {str(error)[:100]}"
        raise PickleError(f"the pickle is damaged or truncated ({why})") from error


def _interpret(file: BinaryIO, persistent: Callable[[Any], Any] | None) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    budget = current()

    def pop(count: int | None = None) -> list[Any]:
        """Remove and return the top ``count`` values, or without ``count`` all above the last mark."""
        start = marks.pop() if count is None else len(stack) - count
        if not 0 <= start <= len(stack):
            raise PickleError("the pickle is damaged: it takes more values than it has")
        values = stack[start:]
        del stack[start:]
        return values

    for op, arg, _ in pickletools.genops(file):
        budget.spend(steps=1)
        match op.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case name if name in PUSHED:
                stack.append(PUSHED[name](arg))
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[arg])
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                if arg >= 1 << 32:  # a file could choose large numbers that share a hash
                    raise PickleError("the pickle is damaged: it remembers more values than it has")
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
                stack.append(frozenset(_members(pop())))
            case "ADDITEMS":
                values = pop()
                stack[-1].update(_members(values))
            case "GLOBAL" | "STACK_GLOBAL":
                module, name = arg.split(" ", 1) if op.name == "GLOBAL" else pop(2)
                if not (type(module) is type(name) is str and len(module) + len(name) <= MAX_NAME):
                    raise PickleError("the pickle is damaged: it names a class by something else than a name")
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
                elif not isinstance(stack[-1], dict):  # an OrderedDict's ``_metadata`` is not needed
                    raise PickleError("the pickle sets the state of something that is not an object")
            case "BINPERSID" if persistent is not None:
                stack.append(persistent(stack.pop()))
            case name:
                raise PickleError(f"the pickle uses {name}, which no weight file needs")
    (result,) = stack
    return result


def _check_depth(value: Any) -> None:
    """PickleError if a value is nested more than MAX_DEPTH deep, counted along the shortest path to it."""
    seen, level = {id(value)}, [value]
    for _ in range(MAX_DEPTH):
        deeper: dict[int, Any] = {}
        for node in level:
            for child in _children(node):
                if isinstance(child, tuple | list | dict | Record) and id(child) not in seen:
                    deeper[id(child)] = child
        if not deeper:
            return
        seen.update(deeper)
        level = list(deeper.values())
    raise PickleError(f"it nests values more than {MAX_DEPTH} deep, which no weight file needs")


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, Record):
        return node.args, node.state, node.items, node.values
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, tuple | list) else ()


def _is_key(value: Any) -> bool:
    """Whether ``value`` may be hashed: its type is in KEYS, or it is an int too small for hash collisions."""
    if type(value) in (str, bytes):
        if len(value) > MAX_NAME:
            raise PickleError(f"it has a name of {len(value)} characters, which no weight file needs")
        spend(steps=len(value) // 64)
    return type(value) in KEYS or (type(value) is int and value.bit_length() < 60)


def _members(values: Any) -> set:
    if not isinstance(values, tuple | list | set | frozenset):
        raise PickleError("the pickle is damaged: it makes a set of something that is not a list")
    spend(steps=len(values))
    return {value for value in values if _is_key(value)}


def _set_items(target: Any, pairs: list[Any]) -> None:
    items = target.items if isinstance(target, Record) else target
    if not isinstance(items, dict):
        raise PickleError("the pickle sets items of something that is not a dict")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if _is_key(key):
            items[key] = value


def _extend(target: Any, values: list[Any]) -> None:
    items = target.values if isinstance(target, Record) else target
    if not isinstance(items, list):
        raise PickleError("the pickle appends to something that is not a list")
    items.extend(values)


def _call(name: Any, args: Any) -> Any:
    """The result of ``name(*args)`` for CALLS, otherwise a Record. PickleError if the call may be hostile."""
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
    name = meta.get("class_name")
    return Record(Name("persistence", name if type(name) is str else "?"), state=meta["state"])


def _load_from_bytes(data: Any) -> Storage:
    """The storage in ``data``. A plain pickle stores each one as a whole torch file of the old format."""
    storage = load_legacy(io.BytesIO(data), data) if isinstance(data, bytes) else None
    if not isinstance(storage, Storage):
        raise PickleError("a storage holds something else")
    return storage


def _dict(pairs: Any = (), *_: Any) -> dict:
    result: dict = {}
    for pair in pairs if isinstance(pairs, list | tuple) else ():
        spend(steps=1)
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise PickleError("the pickle is damaged: it makes a dict of something that is not pairs")
        _set_items(result, list(pair))
    return result


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """The bytes that protocol 2 stores as text."""
    if not (type(text) is type(encoding) is str and encoding == "latin1"):
        raise PickleError("the pickle is damaged: it encodes something that is not text")
    spend(len(text))
    return text.encode("latin1")


def _view(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> View:
    return View(storage, offset, size, stride)


def _meta(dtype: Any, size: Any, *_: Any) -> Tensor:
    """A tensor that was saved without its numbers. Readers that need the numbers raise an error."""
    return torch.empty(sizes(size), device="meta")


def _unusual(*_: Any) -> Any:
    raise PickleError("it holds a sparse or quantised tensor: save it as tensor.dequantize() or .to_dense()")


def _first(value: Any, *_: Any) -> Any:
    return value


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "builtins.set": lambda values=(): _members(values),
    "builtins.frozenset": lambda values=(): frozenset(_members(values)),
    "builtins.bytes": lambda: b"",  # how protocol 2 stores empty bytes
    "_codecs.encode": _encode,
    "torch.storage._load_from_bytes": _load_from_bytes,
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_qtensor": _unusual,
    "torch._utils._rebuild_sparse_tensor": _unusual,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, args, state: _call(function, args),
}
"""Calls that make plain data."""


def load_legacy(file: BinaryIO, content: UntypedStorage | bytes) -> Any:
    """The data in a torch file from before the zip format. ``content``: all bytes of ``file``.

    Each tensor is a :class:`View` that lies within ``content``. Raises PickleError.
    """
    if type(magic := load(file)) is not int or magic != LEGACY_MAGIC:
        raise PickleError("it is not a torch file")
    load(file), load(file)  # protocol version, byte order of the machine
    storages: dict[str, Storage] = {}
    value = load(file, lambda pid: _declare(pid, storages))
    keys = load(file)
    start, missing = file.tell(), set(storages)
    file.seek(0, io.SEEK_END)
    end = file.tell()
    for key in keys if isinstance(keys, list) else ():
        storage = storages.get(key) if type(key) is str else None
        file.seek(start)
        if storage is None or int.from_bytes(file.read(8), "little") != storage.numel:
            raise PickleError("the storages of the torch file do not match what it declares")
        storage.content, storage.start = content, start + 8
        start += 8 + storage.nbytes
        missing.discard(key)
        if start > end:
            raise PickleError(f"the torch file is truncated: it declares {start} bytes and has {end}")
    if missing:
        raise PickleError("the torch file is truncated: a storage is missing")
    return value


def _declare(pid: Any, storages: dict[str, Storage]) -> Any:
    """Persistent id ``("storage", torch.FloatStorage, key, location, numel[, None])`` -> Storage."""
    kind = pid[0] if type(pid) is tuple and 4 <= len(pid) <= 6 and type(pid[0]) is str else ""
    if kind == "module":  # of a saved module: its class, and its source code, which is not needed
        return pid[1]
    if kind != "storage" or len(pid) == 4:
        raise PickleError("the torch file refers to something that is not a storage")
    if len(pid) == 6 and pid[5] is not None:
        raise PickleError("the torch file refers to a part of a storage, as very old ones do: save it again")
    _, kind, key, _, numel, *_ = pid
    dtype = STORAGES.get(kind.name.removesuffix("Storage")) if isinstance(kind, Name) else None
    if dtype is None:
        named = f" ({kind})" if isinstance(kind, Name) else ""
        raise PickleError(f"the torch file declares a storage of unknown kind{named}")
    if not _is_key(key) or type(key) is not str or type(numel) is not int or not 0 <= numel < 1 << 48:
        raise PickleError("the torch file declares a storage without a proper name and size")
    storage = storages.setdefault(key, Storage(dtype, numel))
    if (storage.dtype, storage.numel) != (dtype, numel):
        raise PickleError("the torch file declares one storage in two ways")
    return storage


def load_zip(file: BinaryIO, content: UntypedStorage) -> Any:
    """The data in a torch file of the zip format. ``content``: all bytes of ``file``.

    Checksums are verified. Each tensor is a :class:`View` that lies within ``content``. Raises PickleError,
    or zipfile's errors for a damaged archive.
    """
    with open_zip(file) as archive:
        all_entries = archive.infolist()
        entries = {entry.filename: entry for entry in all_entries}
        roots = [name.removesuffix("data.pkl") for name in entries if re.fullmatch(r"[^/]*/data\.pkl", name)]
        if len(roots) != 1:
            raise PickleError("it is a zip archive, but not a torch file: unpack it first")
        (root,) = roots
        if root + "constants.pkl" in entries:
            raise PickleError("it is a TorchScript archive, a program: export a plain state dict instead")
        if any(e.compress_type != ZIP_STORED or e.file_size != e.compress_size for e in all_entries):
            raise PickleError("the torch file was re-compressed: save it again with torch.save")
        held = sum(entry.file_size for entry in all_entries)
        if held > content.nbytes() or len(entries) != len(all_entries):
            raise PickleError("its entries overlap, as in hostile archives: save it again with torch.save")
        if damaged := archive.testzip():
            raise PickleError(f"its checksums do not match (at {damaged[:80]})")
        order = entries.get(root + "byteorder")
        if order is not None and archive.read(order) != b"little":
            raise PickleError("it was written on a machine of another byte order: save it again on this one")
        storages: dict[str, Storage] = {}
        value = load(io.BytesIO(archive.read(root + "data.pkl")), lambda pid: _declare(pid, storages))
    for key, storage in storages.items():
        entry = entries.get(f"{root}data/{key}")
        held = entry.file_size if entry else 0
        if entry is None or held < storage.nbytes:
            raise PickleError(f"it declares {storage.nbytes} bytes for a storage that has {held}")
        file.seek(entry.header_offset)
        name, extra = struct.unpack("<26x2H", file.read(30))
        storage.content, storage.start = content, entry.header_offset + 30 + name + extra
        if storage.start + storage.nbytes > content.nbytes():
            raise PickleError("the torch file is truncated")
    return value


def open_zip(file: BinaryIO) -> ZipFile:
    """Open a zip archive, after paying for its list of entries. Raises BudgetError, or zipfile's errors."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = content.find(b"PK\1\2")
        while found >= 0:  # each entry costs zipfile a kilobyte and ten microseconds
            spend(steps=8)
            found = content.find(b"PK\1\2", found + 46)
    return ZipFile(file)
