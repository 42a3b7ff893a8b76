"""The one training loop: it knows no network and no loss.

Every step seeds its own randomness from (seed, step), so a resumed run takes the same steps as one never stopped.
"""

import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .ops import fast_dtype, name_of


@dataclass(frozen=True)
class Callback:
    """``call(step)`` after every ``every`` steps and after the last one."""

    every: int
    call: Callable[[int], Any]


def atomic_save(obj: Any, path: str | os.PathLike, save: Callable[[Any, Path], Any] = torch.save) -> Path:
    """``save(obj, path)``, but a reader (or a crash) never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")     # no pid: threads share one, and so do machines
    try:
        save(obj, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def learning_rate(t: float, ramp_up: float = 0.05, ramp_down: float = 0.25) -> float:
    """StyleGAN2's projector's (and StyleCLIP's) schedule at share ``t`` of the steps: linear up, cosine down, in [0, 1]."""
    down = min(1.0, (1 - t) / ramp_down) if ramp_down else 1.0
    return (0.5 - 0.5 * math.cos(math.pi * down)) * (min(1.0, t / ramp_up) if ramp_up else 1.0)


def seed_step(seed: int, step: int) -> None:
    """Seed torch for one step of one run."""
    torch.manual_seed((seed * 1_000_003 + step) % 2 ** 63)


def settled(config: Any, device: str | torch.device = "cpu", out: str | os.PathLike | None = None) -> Any:
    """``config``, a dataclass that may have a ``dtype`` by name; where that is "auto", with :func:`cfclip.ops.fast_dtype` of ``device`` in its place.

    With ``out`` that is written there, and what is written there already is taken: a run goes on in the dtype it began with, on any machine.
    """
    if getattr(config, "dtype", None) != "auto":
        return config
    path = None if out is None else Path(out) / "dtype.txt"
    if path is not None and path.exists():
        return replace(config, dtype=path.read_text(encoding="utf-8").strip())
    dtype = name_of(fast_dtype(torch.device(device)))
    if path is not None:
        atomic_save(dtype, path, lambda dtype, part: part.write_text(dtype + "\n", encoding="utf-8"))
    return replace(config, dtype=dtype)


def fit(step: Callable[[int], Mapping[str, float]], steps: int, *, state: Mapping[str, Any], out: str | os.PathLike | None = None,
        seed: int = 0, callbacks: Iterable[Callback] = (), log_every: int = 20, checkpoint_every: int = 1000,
        desc: str = "train", progress: bool = True) -> list[dict[str, float]]:
    """Run ``step(i)`` for i = 0 … steps - 1.

    Args:
        step: one optimisation step; returns the numbers to log.
        state: name -> object with ``state_dict``/``load_state_dict``; what a checkpoint holds.
        out: folder for ``log.jsonl`` and ``checkpoint.pt``; if it holds a checkpoint the run goes on from there.
            None keeps nothing on disk.

    Returns the logged rows: means over ``log_every`` steps, with ``step`` and ``seconds``.
    """
    first, rows = 0, []
    log = checkpoint = None
    if out is not None:
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        log, checkpoint = out / "log.jsonl", out / "checkpoint.pt"
        if checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
            for name, thing in state.items():
                thing.load_state_dict(saved["state"][name])
            first = saved["step"]
            rows = [row for row in map(json.loads, log.read_text().splitlines()) if row["step"] <= first] if log.exists() else []
        atomic_save(rows, log, lambda rows, path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)))

    def keep(done: int) -> None:
        if checkpoint is not None:
            atomic_save({"step": done, "state": {name: thing.state_dict() for name, thing in state.items()}}, checkpoint)

    sums: dict[str, float] = {}
    count, start, before = 0, time.perf_counter(), rows[-1]["seconds"] if rows else 0.0
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=desc, disable=not progress, mininterval=1.0)
    for i in bar:
        seed_step(seed, i)
        for name, value in step(i).items():
            sums[name] = sums.get(name, 0.0) + float(value)
        count += 1
        done, last = i + 1, i + 1 == steps
        if done % log_every == 0 or last:
            row = {"step": done, "seconds": round(before + time.perf_counter() - start, 2)} | {k: v / count for k, v in sums.items()}
            rows.append(row)
            bar.set_postfix({k: f"{v / count:.3g}" for k, v in sums.items()}, refresh=False)
            if log is not None:
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            sums, count = {}, 0
        if done % checkpoint_every == 0 or last:
            keep(done)
        for callback in callbacks:
            if done % callback.every == 0 or last:
                callback.call(done)
    return rows
