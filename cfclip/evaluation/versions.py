"""What numbers were made with: the versions of the libraries, and the machine."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from cfclip.models.ops import fast_dtype, name_of


def versions(device: str = "cpu") -> dict[str, str]:
    """Versions and settings that the numbers computed on ``device`` depend on."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "dtype auto": name_of(fast_dtype(torch.device(device))),
    } | {name: version(name) for name in ("torch", "torchvision", "open_clip_torch", "numpy")}


def machine() -> str:
    """The processor's name and its number of cores."""
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"
