"""What reading one file may cost: everything that is built from it is paid from one budget."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

EXPANSION = 64
"""How many times larger than a small file its tensors may be; W repeated over 18 layers shrinks well."""

LARGE = 1 << 30
"""Bytes up to which a file may grow by EXPANSION; a larger one is needed for more, a quarter of it."""


class BudgetError(ValueError):
    """A file that costs more than a file of its size may."""


class Budget:
    """What is left for a file of ``size`` bytes: bytes of memory, and steps of a microsecond or two."""

    def __init__(self, size: int):
        self.size = size
        self.bytes = (1 << 20) + max(min(EXPANSION * size, LARGE), 4 * size)
        self.steps = min(50_000 + size // 8, 3_000_000)  # a code in a dict of codes takes 40 to 100

    def spend(self, nbytes: int = 0, steps: int = 0) -> None:
        """Pay, before the memory or the time is used. Raises BudgetError."""
        self.bytes -= nbytes
        self.steps -= steps
        if self.bytes < 0:
            times = min(EXPANSION, max(LARGE // max(self.size, 1), 4))
            raise BudgetError(
                f"it is damaged or hostile: what it holds is more than {times} times larger than the file; "
                "save its tensors again, uncompressed and each with memory of its own (tensor.clone())"
            )
        if self.steps < 0:
            raise BudgetError(
                "it is damaged or hostile: it takes more steps to read than a weight file of its size; "
                "save its tensors again, as a plain dict of tensors"
            )


_current: ContextVar[Budget | None] = ContextVar("budget", default=None)


@contextmanager
def budget_of(size: int) -> Iterator[Budget]:
    """All that is read inside is paid from the budget of a file of ``size`` bytes, unless one is open."""
    budget = current() if _current.get() else Budget(size)
    before = _current.set(budget)
    try:
        yield budget
    finally:
        _current.reset(before)


def current() -> Budget:
    """The budget of the file that is being read; outside of any file a new one, of a large file."""
    return _current.get() or Budget(1 << 40)


def spend(nbytes: int = 0, steps: int = 0) -> None:
    """Pay from the budget of the file that is being read. Raises BudgetError."""
    current().spend(nbytes, steps)
