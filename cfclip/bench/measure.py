"""How to measure: seconds, peak memory, arithmetic and memory traffic."""

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
    """The columns of a row that come from its repeats: all, their median, minimum, maximum and number."""
    return {
        "seconds": [round(s, 7) for s in seconds],
        "median": median(seconds),
        "low": min(seconds),
        "high": max(seconds),
        "n": len(seconds),
    }


def synchronise(device: str) -> None:
    """Wait until ``device`` has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], device: str, repeats: int = 1, warm: int = 0) -> list[float]:
    """Seconds of ``repeats`` calls after ``warm`` ones that are not counted."""
    seconds = []
    for _ in range(warm + repeats):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return seconds[warm:]


def peak_gb(device: str) -> float:
    """Peak memory, GB: of this process since it started; on CUDA of its tensors since :func:`reset_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss is at least the memory of the parent process
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def reset_peak(device: str) -> None:
    """Start a new peak on CUDA. On a CPU the peak stays: measure small things before large ones."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


class Work(TorchDispatchMode):
    """Counts, per dtype, the FLOP and bytes of convolutions, matrix products and attention that run inside.

    A multiply-add is two FLOP. Bytes are the inputs and outputs of each such operator, counted once: the
    traffic that would remain if all other operators were fused into these.
    """

    def __init__(self):
        super().__init__()
        self.counted: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if count := flop_registry.get(func._overloadpacket):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            entry = self.counted[name_of(tensors[-1].dtype)]
            entry[0] += count(*args, **kwargs, out_val=out)
            entry[1] += sum(t.numel() * t.element_size() for t in tensors)
        return out

    def take(self) -> dict[str, list[float]]:
        """dtype -> [FLOP, bytes] since the last call."""
        counted = dict(self.counted)
        self.counted.clear()
        return counted


def work_of(call: Callable[[], Any]) -> dict[str, list[float]]:
    """dtype -> [FLOP, bytes] of ``call``."""
    with Work() as work:
        call()
    return work.take()


def dtypes(device: str) -> tuple[torch.dtype, ...]:
    """The dtypes worth using on ``device``: on a CPU bfloat16 only where ``dtype="auto"`` would choose it."""
    if device == "cuda":
        return torch.float32, torch.bfloat16, torch.float16
    return tuple(dict.fromkeys((torch.float32, fast_dtype(torch.device(device)))))
