"""What this machine does faster: measured where it is first asked, once a process and device, in a fraction of a second."""

import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)

CLEARLY = 1.2
"""How many times faster the less plain way must be to be chosen: the luck of a measurement should not decide."""


def name_of(dtype: torch.dtype) -> str:
    """As a config has it: "float32"."""
    return str(dtype).removeprefix("torch.")


def layout_of(dtype: torch.dtype) -> torch.memory_format:
    """How a frozen network's activations and kernels lie: channels last is faster in half precision; in float32 it is not, and rounds twice as badly."""
    return torch.channels_last if dtype in HALF else torch.contiguous_format


def quickest(
    ways: Sequence[Callable[[], object]], device: torch.device, turns: int = 5, patience: float = 0.5
) -> list[float]:
    """The least seconds that each of ``ways`` took, called in turns: once to warm up, then ``turns`` times, or until ``patience`` seconds are over."""
    least, begun = [float("inf")] * len(ways), time.perf_counter()
    for turn in range(1 + turns):
        for i, way in enumerate(ways):
            before = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elif device.type == "mps":
                torch.mps.synchronize()
            if turn:
                least[i] = min(least[i], time.perf_counter() - before)
        if turn and time.perf_counter() - begun > patience:
            break
    return least


@cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """What to convolve in on ``device``: bfloat16 where that is clearly faster, else float32.

    A processor without instructions for bfloat16 takes ten times longer in it than in float32.
    """
    n, channels, side = (
        (2, 64, 64) if device.type == "cpu" else (4, 256, 128)
    )  # a GPU would only wait for its launches

    def way(dtype: torch.dtype) -> Callable[[], Tensor]:
        x, kernel = (
            torch.ones(shape, dtype=dtype, device=device).contiguous(memory_format=layout_of(dtype))
            for shape in ((n, channels, side, side), (channels, channels, 3, 3))
        )
        return lambda: F.conv2d(x, kernel, padding=1)

    with torch.no_grad():
        try:
            plain, half = quickest([way(torch.float32), way(torch.bfloat16)], device)
        except (RuntimeError, TypeError):  # a device that has no bfloat16
            return torch.float32
    return torch.bfloat16 if plain > CLEARLY * half else torch.float32
