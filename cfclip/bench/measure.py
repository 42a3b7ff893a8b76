"""How to measure: seconds, peak memory, arithmetic and traffic."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cfclip.models.ops import fast_dtype, name_of


def stats(seconds: Sequence[float]) -> dict[str, Any]:
    """What a row says of its repeats: all of them, median, least, most and how many."""
    return {
        "seconds": [round(s, 7) for s in seconds],
        "median": median(seconds),
        "low": min(seconds),
        "high": max(seconds),
        "n": len(seconds),
    }


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], device: str, repeats: int, warm: int = 1) -> list[float]:
    """Seconds of ``repeats`` calls after ``warm`` ones."""
    seconds = []
    for _ in range(warm + repeats):
        synchronise(device)
        begun = time.perf_counter()
        call()
        synchronise(device)
        seconds.append(time.perf_counter() - begun)
    return seconds[warm:]


def peak_gb(device: str) -> float:
    """The most memory that this process ever had, GB (CUDA: that its tensors had since :func:`forget_peak`)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with the parent's memory there
        return (
            next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            * 1024
            / 1e9
        )
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    )


def forget_peak(device: str) -> None:
    """CUDA counts from here; a process's peak on a CPU stays, so there small things are measured before large ones."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


class Work(TorchDispatchMode):
    """Counts what runs inside: (dtype, FLOP, bytes) of convolutions, matrix products and attention.

    A multiply-add is two FLOP. Bytes are each such operator's inputs and outputs, once each: what is left to move if all else were fused into these.
    """

    def __init__(self):
        super().__init__()
        self.found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if count := flop_registry.get(func._overloadpacket):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            entry = self.found[name_of(tensors[-1].dtype)]
            entry[0] += count(*args, **kwargs, out_val=out)
            entry[1] += sum(t.numel() * t.element_size() for t in tensors)
        return out

    def take(self) -> dict[str, list[float]]:
        """dtype -> [FLOP, bytes] since the last time."""
        found = {dtype: list(entry) for dtype, entry in self.found.items()}
        self.found.clear()
        return found


def work_of(call: Callable[[], Any]) -> dict[str, list[float]]:
    """dtype -> [FLOP, bytes] of ``call``."""
    with Work() as work:
        call()
    return work.take()


def dtypes(device: str) -> tuple[torch.dtype, ...]:
    """What is worth convolving in there: on a CPU bfloat16 only where it is faster, by the rule of ``dtype="auto"``."""
    if device == "cuda":
        return torch.float32, torch.bfloat16, torch.float16
    return tuple(dict.fromkeys((torch.float32, fast_dtype(torch.device(device)))))
