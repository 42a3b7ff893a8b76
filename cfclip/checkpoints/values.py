"""The content of a file before it is used: names, records of calls, and tensors that are views of it."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage

from cfclip.checkpoints.budget import EXPANSION, BudgetError, spend

MAX_DIMS, MAX_LENGTH = 16, 2**31
"""The most dimensions of a tensor, and the largest size or stride of one."""


class PickleError(ValueError):
    """A pickle that is damaged, or that holds something that no weight file needs."""


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle mentions: its name, nothing more."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module[:80]}.{self.name[:80]}"[:120]


@dataclass(eq=False)
class Record:
    """An object that the pickle would have built: its class or function, arguments, state and contents."""

    name: Name
    args: tuple = ()
    state: Any = None
    items: dict = field(default_factory=dict)
    values: list = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        """The item ``key`` of a dict-like object, otherwise the attribute ``key``, otherwise ``default``."""
        attributes = self.state if isinstance(self.state, dict) else {}
        return self.items[key] if key in self.items else attributes.get(key, default)


@dataclass(eq=False)
class Storage:
    """The memory behind tensors: a part of the open file or, inside a pickle, of a byte string."""

    dtype: torch.dtype
    numel: int
    content: UntypedStorage | bytes = b""
    start: int = 0

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @cached_property
    def tensor(self) -> Tensor:
        if not self.numel:
            return torch.empty(0, dtype=self.dtype)
        if isinstance(self.content, UntypedStorage) and self.start % self.dtype.itemsize == 0:
            part = self.content[self.start : self.start + self.nbytes]
            return torch.empty(0, dtype=self.dtype).set_(part, 0, (self.numel,), (1,))
        spend(self.nbytes)
        if isinstance(self.content, bytes):
            part = bytearray(memoryview(self.content)[self.start : self.start + self.nbytes])
            return torch.frombuffer(part, dtype=self.dtype)
        part = self.content[self.start : self.start + self.nbytes].clone()  # copied: numbers must be aligned
        return torch.empty(0, dtype=self.dtype).set_(part, 0, (self.numel,), (1,))


def sizes(values: Any) -> tuple[int, ...]:
    """``values`` as a tuple, if they can be a tensor's sizes or strides; PickleError for anything else."""
    if not isinstance(values, tuple | list) or len(values) > MAX_DIMS:
        raise PickleError("a tensor is declared without proper sizes")
    if not all(type(n) is int and 0 <= n <= MAX_LENGTH for n in values):
        raise PickleError("a tensor is declared with a size that is none")
    return tuple(values)


@dataclass(eq=False)
class View:
    """A tensor that is not built yet. PickleError if it exceeds its storage or repeats it too often."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self):
        self.size, self.stride = sizes(self.size), sizes(self.stride)
        proper = type(self.offset) is int and self.offset >= 0 and len(self.size) == len(self.stride)
        if type(self.storage) is not Storage or not proper:
            raise PickleError("a tensor is declared without proper storage, size and strides")
        count = math.prod(self.size)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        held = self.storage.numel
        if count and (last >= held or count > EXPANSION * held):
            raise PickleError(f"a tensor of size {list(self.size)[:8]} is declared over {held} elements")

    def tensor(self) -> Tensor:
        return self.storage.tensor.as_strided(self.size, self.stride, self.offset)


def is_array(value: Any) -> bool:
    """Whether ``value`` is a tensor, View or numpy Record. :func:`to_tensor` also accepts plain numbers."""
    numpy = isinstance(value, Record) and value.name.module.split(".")[0] == "numpy"
    return numpy or isinstance(value, Tensor | View)


def to_tensor(value: Any) -> Tensor:
    """A tensor, array or number from :func:`safe_pickle.load` as a torch tensor. Raises PickleError."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, View):
        return value.tensor()
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64):
        return torch.tensor(value)
    if is_array(value):
        try:
            match value.name.name:
                case "_reconstruct":
                    _, shape, dtype, fortran, raw = value.state
                    return _array(raw, dtype, shape, "F" if fortran is True else "C")
                case "_frombuffer":
                    raw, dtype, shape, order = value.args
                    return _array(raw, dtype, shape, "F" if type(order) is str and order == "F" else "C")
                case "scalar":
                    dtype, raw = value.args
                    return _array(raw, dtype, (), "C")
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            if isinstance(error, (PickleError, BudgetError)):
                raise
            raise PickleError(f"a numpy array is damaged ({str(error)[:100]})") from None
    kind = value.name if isinstance(value, Record) else type(value).__name__
    raise PickleError(f"a {kind} is in the place of a tensor")


def _array(raw: Any, dtype: Any, shape: Any, order: str) -> Tensor:
    code = dtype.args[0] if isinstance(dtype, Record) else None
    if type(code) is not str or not re.fullmatch(r"[fiu][1248]|b1", code):
        named = f" of dtype {code[:20]}" if type(code) is str else ""
        raise PickleError(f"a numpy array{named} is in the place of numbers")
    byte_order = dtype.state[1] if isinstance(dtype.state, tuple) else "="
    big = type(byte_order) is str and byte_order == ">"
    kind = np.dtype((">" if big else "<") + code)
    if type(raw) not in (bytes, bytearray, str):
        raise PickleError("a numpy array has no numbers")
    spend(len(raw))
    raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 pickled bytes as text
    array = np.frombuffer(raw, kind).reshape(sizes(shape), order=order)
    return torch.from_numpy(array.astype(kind.newbyteorder("="), order="C"))
