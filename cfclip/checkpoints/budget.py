"""The limit on the cost of reading a file: everything that is built from it is paid from one budget."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

EXPANSION = 64
"""How many times larger than a small file its tensors may be; W repeated over 18 layers compresses well."""

LARGE = 1 << 30
"""The most bytes that EXPANSION allows; more bytes need a file of at least a quarter of their size."""


class BudgetError(ValueError):
    """A file costs more to read than its size allows."""


class Budget:
    """What a file of ``size`` bytes may still use: bytes of memory, and steps of one or two microseconds."""

    def __init__(self, size: int):
        self.size = size
        self.bytes = (1 << 20) + max(min(EXPANSION * size, LARGE), 4 * size)
        self.steps = min(50_000 + size // 8, 3_000_000)  # a code in a dict of codes takes 40 to 100

    def spend(self, nbytes: int = 0, steps: int = 0) -> None:
        """Pay for memory or time before it is used. Raises BudgetError."""
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
    """Pay for all reading inside from one budget: the open one, or a new one for a file of ``size`` bytes."""
    budget = current() if _current.get() else Budget(size)
    before = _current.set(budget)
    try:
        yield budget
    finally:
        _current.reset(before)


def current() -> Budget:
    """The budget of the file that is being read; if there is none, a new budget for a very large file."""
    return _current.get() or Budget(1 << 40)


def spend(nbytes: int = 0, steps: int = 0) -> None:
    """Pay from the budget of the file that is being read. Raises BudgetError."""
    current().spend(nbytes, steps)
