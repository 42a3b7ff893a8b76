"""The one training loop. It knows no network and no loss.

Each step has random numbers of its own, made from (seed, step): a resumed run takes the same steps as one
that was never stopped, and nothing outside of the loop is re-seeded.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from cfclip.files import atomic_write, locked, read_rows, write_json, write_rows
from cfclip.method.config import flat
from cfclip.models.ops import fast_dtype, name_of
from cfclip.settings import Settings

Step = Callable[[int, torch.Generator], Mapping[str, float]]
CHECKPOINT = "checkpoint.pt"
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Callback:
    """``call(step)`` after every ``every`` steps and after the last one."""

    every: int
    call: Callable[[int], Any]


def learning_rate(t: float, ramp_up: float = 0.05, ramp_down: float = 0.25) -> float:
    """The projector's and StyleCLIP's schedule at share t of the steps: linear up, cosine down; in [0, 1]."""
    down = min(1.0, (1 - t) / ramp_down) if ramp_down else 1.0
    return (0.5 - 0.5 * math.cos(math.pi * down)) * (min(1.0, t / ramp_up) if ramp_up else 1.0)


def generator_for(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step of one run."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def with_global_seed(step: Callable[[int], Mapping[str, float]]) -> Step:
    """A :data:`Step` from one that draws from torch's global random numbers, e.g. dropout; restores these."""

    def seeded(i: int, generator: torch.Generator) -> Mapping[str, float]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator.initial_seed())
            return step(i)

    return seeded


def resolve_dtype(name: str, device: str | torch.device) -> str:
    """``name``, or what "auto" means on ``device``."""
    return name_of(fast_dtype(torch.device(device))) if name == "auto" else name


def begin_run(
    config: Settings, device: str | torch.device, out: str | os.PathLike | None = None, **what: str
) -> Any:
    """``config`` with its dtype resolved. With ``out`` the folder is marked as that of this run.

    A run that is resumed keeps the dtype it began with. ``what`` else tells runs apart, e.g. the method.
    Raises ValueError if ``out`` holds another run.
    """
    path = None if out is None else Path(out) / SETTINGS
    before = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
    if hasattr(config, "dtype"):
        begun = before.get("dtype", "auto") if config.dtype == "auto" else config.dtype
        config = replace(config, dtype=resolve_dtype(begun, device))
    if path is None:
        return config
    run = json.loads(json.dumps(what | flat(config)))  # as it is read back: a tuple in a tuple becomes a list
    if before and (differ := [name for name in {**before, **run} if before.get(name) != run.get(name)]):
        raise ValueError(
            f"{out} holds a run with another {', '.join(differ)}; refusing to resume it with these settings: "
            "choose another folder, or delete this one"
        )
    write_json(path, run)
    return config


def run_loop(
    step: Step,
    steps: int,
    *,
    state: Mapping[str, Any],
    out: str | os.PathLike | None = None,
    seed: int = 0,
    callbacks: Iterable[Callback] = (),
    log_every: int = 20,
    checkpoint_every: int = 1000,
    desc: str = "train",
    progress: bool = True,
) -> list[dict[str, float]]:
    """Run ``step(i, generator)`` for i = 0 … steps - 1.

    Args:
        step: one optimisation step; takes its random numbers from ``generator`` and returns the numbers to
            log.
        state: name -> object with ``state_dict`` and ``load_state_dict``: the content of a checkpoint.
        out: folder for ``log.jsonl`` and the checkpoint; a run that was stopped is resumed. None writes
            nothing.

    Returns the logged rows: means over ``log_every`` steps, with ``step`` and ``seconds``.
    Raises FolderInUse if another process is running in ``out``.
    """
    options = (seed, tuple(callbacks), log_every, checkpoint_every, desc, progress)
    if out is None:
        return _run(step, steps, state, None, *options)
    with locked(out, "training"):
        return _run(step, steps, state, Path(out), *options)


def _run(step, steps, state, out, seed, callbacks, log_every, checkpoint_every, desc, progress):
    first, rows = 0, []
    if out is not None:
        first, rows = _restore(state, out)
        write_rows(out / "log.jsonl", rows)
    sums: dict[str, float] = {}
    count, start, before = 0, time.perf_counter(), rows[-1]["seconds"] if rows else 0.0
    bar = tqdm(
        range(first, steps), initial=first, total=steps, desc=desc, disable=not progress, mininterval=1.0
    )
    for i in bar:
        for name, value in step(i, generator_for(seed, i)).items():
            sums[name] = sums.get(name, 0.0) + float(value)
        count += 1
        done, last = i + 1, i + 1 == steps
        if done % log_every == 0 or last:
            means = {name: value / count for name, value in sums.items()}
            rows.append({"step": done, "seconds": round(before + time.perf_counter() - start, 2)} | means)
            bar.set_postfix({name: f"{value:.3g}" for name, value in means.items()}, refresh=False)
            if out is not None:
                with (out / "log.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            sums, count = {}, 0
        if out is not None and (done % checkpoint_every == 0 or last):
            saved = {"step": done, "state": {name: thing.state_dict() for name, thing in state.items()}}
            atomic_write(out / CHECKPOINT, lambda part, saved=saved: torch.save(saved, part))
        for callback in callbacks:
            if done % callback.every == 0 or last:
                callback.call(done)
    return rows


def _restore(state: Mapping[str, Any], out: Path) -> tuple[int, list[dict[str, float]]]:
    """Load the checkpoint in ``out`` into ``state``: (steps taken, their rows), or (0, []) without one."""
    if not (out / CHECKPOINT).exists():
        return 0, []
    saved = torch.load(out / CHECKPOINT, weights_only=True, map_location="cpu")
    for name, thing in state.items():
        thing.load_state_dict(saved["state"][name])
    log = out / "log.jsonl"
    return saved["step"], [
        row for row in read_rows(log) if row["step"] <= saved["step"]
    ] if log.exists() else []
