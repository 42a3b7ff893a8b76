"""Choices by speed on this machine, measured when first needed, once per process and device."""

import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)

MIN_SPEEDUP = 1.2
"""The factor by which an alternative must beat the plain way to be chosen, so that noise does not decide."""


def name_of(dtype: torch.dtype) -> str:
    """The name of ``dtype`` as in a config, e.g. "float32"."""
    return str(dtype).removeprefix("torch.")


def layout_of(dtype: torch.dtype) -> torch.memory_format:
    """Memory format of a frozen network's activations and kernels.

    Channels last is faster in half precision; in float32 it is not, and its rounding errors are twice as
    large.
    """
    return torch.channels_last if dtype in HALF else torch.contiguous_format


def best_times(
    ways: Sequence[Callable[[], object]], device: torch.device, rounds: int = 5, patience: float = 0.5
) -> list[float]:
    """The shortest time in seconds of each of ``ways``.

    They are called in turn: once each to warm up, then ``rounds`` times each. No further round starts after
    ``patience`` seconds.
    """
    best, start = [float("inf")] * len(ways), time.perf_counter()
    for turn in range(1 + rounds):
        for i, way in enumerate(ways):
            before = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elif device.type == "mps":
                torch.mps.synchronize()
            if turn:
                best[i] = min(best[i], time.perf_counter() - before)
        if turn and time.perf_counter() - start > patience:
            break
    return best


@cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype for convolutions on ``device``: bfloat16 if it is clearly faster, otherwise float32.

    On a processor without bfloat16 instructions, bfloat16 is ten times slower than float32.
    """
    # a GPU needs large tensors: for small ones only the launches would be measured
    n, channels, side = (2, 64, 64) if device.type == "cpu" else (4, 256, 128)

    def convolve_in(dtype: torch.dtype) -> Callable[[], Tensor]:
        x, kernel = (
            torch.ones(shape, dtype=dtype, device=device).contiguous(memory_format=layout_of(dtype))
            for shape in ((n, channels, side, side), (channels, channels, 3, 3))
        )
        return lambda: F.conv2d(x, kernel, padding=1)

    with torch.no_grad():
        try:
            plain, half = best_times([convolve_in(torch.float32), convolve_in(torch.bfloat16)], device)
        except (RuntimeError, TypeError):  # a device without bfloat16
            return torch.float32
    return torch.bfloat16 if plain > MIN_SPEEDUP * half else torch.float32
