"""The machine on which the numbers are measured, and how much of it is free."""

import os
import platform
import re
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from cfclip.evaluation.versions import machine, versions
from cfclip.experiments.runs import KERNEL_ENVIRONMENT

ALLOCATOR = {name: value for name, value in KERNEL_ENVIRONMENT.items() if name.startswith("MALLOC")}
"""Environment variables of every process that measures; ``make`` sets the same."""
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16")
"""Instruction sets that matter for speed; the last one that a processor has is part of its folder's name."""


def name(where: dict[str, Any]) -> str:
    """A folder name for the machine of :func:`describe`: processor, cores, best instruction set, GPU."""
    words = f"{where['cpu']} {next(iter(where['flags'][::-1]), '')} {where['gpu'] or ''}"
    return "-".join(re.findall(r"[a-z0-9]+", words.lower().replace("_", " ")))


def describe(threads: int) -> dict[str, Any]:
    """Everything that a measured number depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else set()
    libraries = {k: v for k, v in versions().items() if k not in ("device", "threads", "machine")}
    return {
        "cpu": machine(),
        "flags": [flag for flag in FLAGS if flag in words],
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_threads": threads,
        "niceness": os.nice(0),
        "date": date.today().isoformat(),
    } | libraries


def free_gb(device: str) -> float:
    """Memory that a new process can have on ``device``, GB."""
    return (torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available) / 1e9
