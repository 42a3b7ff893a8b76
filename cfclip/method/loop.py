"""The only training loop. It does not depend on any network or loss.

The random numbers of each step are made from (seed, step). A resumed run therefore takes the same steps as
an uninterrupted run, and global random numbers are not re-seeded.
"""

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from cfclip.checkpoints.reading import read_plain
from cfclip.files import append_row, atomic_write, locked, read_object, write_json, write_rows
from cfclip.method.config import DTYPES, flat
from cfclip.models.ops import fast_dtype, name_of
from cfclip.settings import Settings

Step = Callable[[int, torch.Generator], Mapping[str, float | torch.Tensor]]
"""Takes a step and returns the numbers to log. Numbers on a GPU are read only to log or save them."""


class Request(NamedTuple):
    """A step that a loop asks for."""

    step: int  # i
    random: torch.Generator  # its random numbers
    shown: bool  # whether a checkpoint or a callback may read ``state`` after this step


Loop = Generator[Request, Mapping[str, float | torch.Tensor], Any]
"""A loop whose steps the caller takes, perhaps together with those of other loops: see :func:`drive`."""
CHECKPOINT = "checkpoint.pt"
CHECKPOINT_BEFORE = "checkpoint-before.pt"
"""The checkpoint before the last one, in case the last one is damaged."""
LOG = "log.jsonl"
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Callback:
    """``call(step)`` after every ``every`` steps and after the last one."""

    every: int
    call: Callable[[int], Any]


def learning_rate(t: float, ramp_up: float = 0.05, ramp_down: float = 0.25) -> float:
    """lr factor in [0, 1] at share t of the steps: linear up, cosine down, as in StyleCLIP and projector."""
    down = min(1.0, (1 - t) / ramp_down) if ramp_down else 1.0
    return (0.5 - 0.5 * math.cos(math.pi * down)) * (min(1.0, t / ramp_up) if ramp_up else 1.0)


def generator_for(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step of one run."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def resolve_dtype(name: str, device: str | torch.device) -> str:
    """``name``, or what "auto" means on ``device``."""
    return name_of(fast_dtype(torch.device(device))) if name == "auto" else name


def described(config: Settings, **what: Any) -> dict[str, Any]:
    """The settings of a run and ``what`` else distinguishes it, as in its settings.json and checkpoints."""
    # in the form that JSON reads back: a tuple in a tuple becomes a list
    return json.loads(json.dumps(what | flat(config)))


def begin_run(
    config: Settings, device: str | torch.device, out: str | os.PathLike | None = None, **what: Any
) -> Any:
    """``config`` with its dtype resolved. With ``out``, settings.json in that folder records the run.

    If dtype is "auto", a resumed run keeps the dtype it began with. ``what`` else distinguishes runs, e.g.
    the method. Raises ValueError if ``out`` has a checkpoint, log or weights of another run, FolderInUse if
    another process is running in it.
    """
    if out is None:
        return _with_dtype(config, device, "auto")
    with locked(out, "training"):
        path = Path(out) / SETTINGS
        before = read_object(path)
        if not before and (saved := load_checkpoint(out)):
            before = saved["run"]
        config = _with_dtype(config, device, before.get("dtype", "auto"))
        run = described(config, **what)
        if before and _has_begun(path.parent):
            _refuse_another(run, before, path.parent)
        write_json(path, run)
    return config


def _has_begun(folder: Path) -> bool:
    """Whether a run has left more than its settings in ``folder``; otherwise another run may begin there."""
    return any((folder / name).exists() for name in (CHECKPOINT, LOG)) or any(folder.glob("*.safetensors"))


def _with_dtype(config: Settings, device: str | torch.device, begun: Any) -> Settings:
    if not hasattr(config, "dtype"):
        return config
    name = begun if config.dtype == "auto" and begun in DTYPES else config.dtype
    return replace(config, dtype=resolve_dtype(name, device))


def _refuse_another(run: Mapping[str, Any], before: Mapping[str, Any], place: Path) -> None:
    if differ := [name for name in {**before, **run} if before.get(name) != run.get(name)]:
        raise ValueError(
            f"{place} holds a run with another {', '.join(differ)}; refusing to resume it with these "
            "settings: choose another folder, or delete this one"
        )


def run_loop(step: Step, steps: int, **options: Any) -> list[dict[str, float]]:
    """Run ``step(i, generator)`` for i = 0 … steps - 1; ``options`` are those of :func:`looped`.

    ``step`` takes its random numbers from ``generator`` and returns the numbers to log. Returns the logged
    rows: means over ``log_every`` steps, with ``step`` and ``seconds``.
    """
    return drive(looped(steps, **options), step)


def drive(loop: Loop, step: Step) -> Any:
    """Take all steps that ``loop`` asks for; returns the result of the loop."""
    numbers = None
    try:
        while True:
            asked = loop.send(numbers)
            numbers = step(asked.step, asked.random)
    except StopIteration as end:
        return end.value
    finally:
        loop.close()  # it unlocks its folder


def looped(
    steps: int,
    *,
    state: Mapping[str, Any],
    out: str | os.PathLike | None = None,
    run: Mapping[str, Any] | None = None,
    seed: int = 0,
    callbacks: Iterable[Callback] = (),
    log_every: int = 20,
    checkpoint_every: int = 1000,
    desc: str = "train",
    progress: bool = True,
) -> Loop:
    """:func:`run_loop` as a generator: it yields a :class:`Request` per step, and is sent the numbers to log.

    Args:
        state: name -> object with ``state_dict`` and ``load_state_dict``: the content of a checkpoint.
        out: folder for ``log.jsonl`` and the last two checkpoints; a run that was stopped is resumed. None
            writes nothing.
        run: all that distinguishes this run, see :func:`described`; saved in its checkpoints.

    Raises FolderInUse if another process is running in ``out``, and ValueError if ``out`` holds another run
    or a checkpoint that cannot be used, or when a number to log or a weight to save is not finite.
    """
    out, run, callbacks = None if out is None else Path(out), dict(run or {}), tuple(callbacks)
    with nullcontext() if out is None else locked(out, "training"):
        saved = {"run": run, "step": 0, "rows": [], "sums": {}, "count": 0}
        if out is not None:
            saved = _restore(state, out, run, steps) or saved
            write_rows(out / LOG, saved["rows"])
        first, rows, sums, count = (saved[name] for name in ("step", "rows", "sums", "count"))
        start, before = time.perf_counter(), rows[-1]["seconds"] if rows else 0.0
        look = {"initial": first, "total": steps, "desc": desc, "disable": not progress, "mininterval": 1.0}
        for i in (bar := tqdm(range(first, steps), **look)):
            done, last = i + 1, i + 1 == steps
            logs, due = done % log_every == 0 or last, out is not None and done % checkpoint_every == 0
            called = [callback for callback in callbacks if done % callback.every == 0 or last]
            numbers = yield Request(i, generator_for(seed, i), due or last or bool(called))
            for name, value in numbers.items():
                sums[name] = sums.get(name, 0.0) + value
            count += 1
            if logs or due or not any(map(_on_gpu, numbers.values())):  # otherwise do not wait for the GPU
                sums = _floats(sums)
                if wrong := [f"{name} is {x}" for name, x in sums.items() if not math.isfinite(x)]:
                    raise ValueError(_stopped(", ".join(wrong), done, steps, desc, out))
            if logs:
                means = {name: value / count for name, value in sums.items()}
                rows.append({"step": done, "seconds": round(before + time.perf_counter() - start, 2)} | means)
                bar.set_postfix({name: f"{value:.3g}" for name, value in means.items()}, refresh=False)
                if out is not None:
                    append_row(out / LOG, rows[-1])
                sums, count = {}, 0
            if (due or last) and (wrong := _not_finite(state)):
                raise ValueError(_stopped(f"{wrong} is not finite", done, steps, desc, out))
            if out is not None and (due or last):
                progressed = {"step": done, "rows": rows, "sums": sums, "count": count}
                states = {name: thing.state_dict() for name, thing in state.items()}
                _save({"run": run, **progressed, "state": states}, out)
            for callback in called:
                callback.call(done)
        return rows


def _floats(sums: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
    """The numbers as floats; those on a GPU are read all at once."""
    on_gpu = {name: value for name, value in sums.items() if _on_gpu(value)}
    seen = torch.stack(list(on_gpu.values())).tolist() if on_gpu else []
    return {name: float(value) for name, value in (sums | dict(zip(on_gpu, seen, strict=True))).items()}


def _on_gpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def _not_finite(state: Mapping[str, Any]) -> str | None:
    """The name of the first weight that is not finite; None if all are finite."""
    for name, thing in state.items():
        for key, value in thing.state_dict().items():
            numbers = isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel()
            if numbers and not math.isfinite(value.abs().max()):  # NaN if there is one
                return f"{key} of {name}"
    return None


def _stopped(why: str, step: int, steps: int, desc: str, out: Path | None) -> str:
    kept = f", and {out} keeps the checkpoint before it" if out and (out / CHECKPOINT).exists() else ""
    return (
        f"{desc}: {why} after step {step} of {steps}; the training stopped there{kept}: try a smaller lr or "
        f"smaller weights of the losses{'' if out is None else ', in another folder'}"
    )


# ---- checkpoints: the output of torch.save, followed by its sha256 ----


def _save(saved: Mapping[str, Any], out: Path) -> None:
    def write(part: Path) -> None:
        with part.open("w+b") as file:
            torch.save(saved, file)
            file.seek(0)
            file.write(hashlib.file_digest(file, "sha256").digest())
        if (out / CHECKPOINT).exists():
            os.replace(out / CHECKPOINT, out / CHECKPOINT_BEFORE)

    atomic_write(out / CHECKPOINT, write)


def load_checkpoint(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The last checkpoint in ``folder``: ``run``, ``step``, ``state``, …; None if there is none.

    If it is damaged, the one before replaces it, with a warning. Raises ValueError if neither is good.
    """
    last, before = Path(folder) / CHECKPOINT, Path(folder) / CHECKPOINT_BEFORE
    found = [path for path in (last, before) if path.exists()]
    if not found:
        return None
    if (good := next(filter(_is_good, found), None)) is None:
        raise ValueError(
            f"{' and '.join(map(str, found))}: damaged, or of an earlier version, with no good checkpoint "
            f"beside it: delete {folder} to train anew, or choose another folder"
        )
    saved = read_plain(good)
    if good == before:
        if last.exists():
            step = saved["step"]
            warnings.warn(f"{last} is damaged; the one before it is used, of step {step}", stacklevel=2)
        os.replace(before, last)
    return saved


def _is_good(checkpoint: Path) -> bool:
    content, size = memoryview(checkpoint.read_bytes()), hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _restore(state: Mapping[str, Any], out: Path, run: Mapping[str, Any], steps: int) -> dict | None:
    """Load the last checkpoint in ``out`` into ``state`` and return it; None if there is none."""
    for name in (CHECKPOINT, LOG, SETTINGS):  # partial files of killed processes
        for part in out.glob(f"{name}.*.part"):
            part.unlink()
    if (saved := load_checkpoint(out)) is None:
        return None
    _refuse_another(run, saved["run"], out / CHECKPOINT)
    if saved["step"] > steps:
        raise ValueError(
            f"{out} holds a run of {saved['step']} steps, more than {steps}: choose another folder, or "
            "delete this one"
        )
    try:
        for name, thing in state.items():
            thing.load_state_dict(saved["state"][name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{out / CHECKPOINT} is of other networks ({error}): choose another folder, or delete this one"
        ) from None
    return saved
