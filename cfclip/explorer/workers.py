"""The explorer's threads: one kind runs the latest job it was given, the other trains a mapper."""

import copy
import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cfclip.baselines.mappers import MapperEditor
from cfclip.baselines.methods import METHODS, configure
from cfclip.checkpoints.mappers import save_mapper
from cfclip.domain import Domain
from cfclip.evaluation.metrics import Edit, Pictures, ground_truth, judged_direction
from cfclip.explorer.advice import in_words
from cfclip.explorer.recipe import Faces, Recipe, brief
from cfclip.files import first_bytes, slug, writable
from cfclip.images import to_uint8
from cfclip.method.config import card_of
from cfclip.method.loop import Callback, begin_run, run_loop
from cfclip.method.trainer import MapperTrainer, mapper_sizes
from cfclip.models.mapper import Mapper, WordMapper

logger = logging.getLogger(__name__)

REFINING = tuple(name for name, method in METHODS.items() if method.editor is MapperEditor)
"""The methods that :class:`Training` can train."""
PREVIEW_SECONDS = 1.5
"""The least time between two previews."""
CHECK_STEPS, PATIENCE, LEAST_RISE = 20, 4, 0.01
"""Steps between checks; checks without a rise that end a training; the least rise of the held-out measure."""
HELD_OUT, HELD_OUT_SEED = 16, 987_654_321
"""Number and seed of the faces that decide when a training ends. They are neither trained on nor shown."""
WORDS = {"text": "tokens", "optimizer": "adam", "lr": 0.01}
"""Settings for continuing the training of a mapper that reads words, which was first trained with lr 0.02."""
LONGEST_LINE = 300
"""Characters of a message."""


def one_line(error: BaseException) -> str:
    """``error`` in one line, for the panel. The traceback goes to the log, at level DEBUG."""
    logger.debug("shown in the panel as one line:", exc_info=error)
    text = str(error).strip() or type(error).__name__
    if not isinstance(error, ValueError | OSError):  # not from cfclip, and not written for users
        text = f"this did not work ({type(error).__name__}): {text.splitlines()[0]}"
    return brief(text, LONGEST_LINE)  # a message quotes the wrong value, which may be a whole file


class LatestJobThread:
    """A thread that runs the latest job it was given: a new job replaces one that has not begun.

    A job is called with ``stale``, a function that says whether a later job is waiting.
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._job: Callable | None = None
        self._serial = 0
        self._running = self._closed = False
        threading.Thread(target=self._run, daemon=True).start()

    def ask(self, job: Callable[[Callable[[], bool]], None]) -> None:
        with self._changed:
            self._job, self._serial = job, self._serial + 1
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._job is not None or self._closed)
                if self._closed:
                    return
                job, serial, self._job, self._running = self._job, self._serial, None, True
            job(lambda serial=serial: serial != self._serial)
            job = None  # it holds pictures

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to do; False if that takes longer than ``timeout`` seconds."""

        def idle() -> bool:
            return self._closed or (self._job is None and not self._running)

        with self._changed:
            return self._changed.wait_for(idle, timeout)

    def close(self) -> None:
        with self._changed:
            self._closed, self._serial = True, self._serial + 1
            self._changed.notify_all()


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A mapper after a step of its training, and its measurements on held-out faces."""

    step: int
    mapper: Mapper
    measure: float = math.nan
    success: float | None = None  # share of successes on ``faces``; None if it cannot be measured
    faces: int = 0  # number of held-out faces on which the edit can succeed, e.g. that have the part


class _Ended(Exception):
    """Raised inside the training to end it; its text says why."""


class Training:
    """A training in a thread, which calls ``on_change(self)`` at the start, after each step, and at the end.

    If the method trains mappers like ``start``, the mapper that edits now, training begins with its weights.
    Every :data:`CHECK_STEPS` steps the mapper is measured on faces that it is not trained on, by the first of
    these that the domain and the prompt allow: the progress of the colour that the prompt names
    (:func:`cfclip.evaluation.metrics.ground_truth`); the share of faces that show what the prompt says; the
    direction in the held-out CLIP; the direction in the CLIP. The training ends when this measure no longer
    rises, and keeps the best mapper.

    faces: those in :attr:`preview`, label -> uint8 [N, R, R, 3]. When the training is ``done``, ``path`` is
    the mapper's file; None after a cancellation or ``error``. Raises ValueError for what cannot be trained.
    """

    def __init__(
        self,
        domain: Domain,
        recipe: Recipe,
        method: str,
        settings: Mapping[str, Any],
        out: Path,
        faces: Faces,
        on_change: Callable[["Training"], None],
        start: Mapper | None = None,
    ):
        if method not in REFINING:
            raise ValueError(f"'refine' trains {', '.join(REFINING)}, not {method!r}")
        if len(recipe.prompts) != 1:
            raise ValueError("'refine' trains one prompt at a time: leave one, and combine them afterwards")
        (prompt,) = recipe.prompts
        domain.clip.tokenize(prompt)  # fails now if the prompt is too long
        given = dict(settings)
        if source_text := recipe.source_text.strip():
            given["source_text"] = source_text
        self.config = configure(method, prompt, **given)
        self.start_from = None
        if start is not None and self.config.text_mapper:
            if isinstance(start, WordMapper):
                clauses = domain.truth.clauses(prompt) if domain.truth else ()
                if any(one.colours for one in clauses) and any(one.shapes for one in clauses):
                    kinds = "'refine' trains a colour or a shape, not both at once"
                    raise ValueError(f"{kinds}: leave one, and combine them afterwards")
                start = start.busiest(faces.w, start.read(domain.clip, prompt))
                given |= WORDS | {"levels": start.config.levels}
            same = configure(method, prompt, **{"norm_axis": start.config.norm_axis} | given)
            if mapper_sizes(domain, same) == start.config:
                self.config, self.start_from = same, start
        self.config = begin_run(self.config, domain.device)
        self.domain, self.recipe, self.method, self.faces = domain, recipe, method, faces
        # the hash tells apart prompts with the same slug, such as "green hat" and "Green hat!"
        what = map(str, (*domain.described.values(), prompt, source_text))
        key = hashlib.sha256("\n".join(what).encode()).hexdigest()[:8]
        self.folder = writable(out) / f"{first_bytes(slug(prompt), 100)}-{key}-{method}"
        self.step, self.done, self.error, self.words = 0, False, "", "preparing …"
        self.path: Path | None = None
        self.preview: dict[str, np.ndarray] = {}
        self.seconds_a_step = 0.0
        self._losses: list[float] = []
        self._shown: Snapshot | None = None  # the one in the preview
        self._best: Snapshot | None = None
        self._on_change, self._stop, self._keep = on_change, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self.thread.start()

    @property
    def progress(self) -> float:
        """The share of the steps that are done, from 0 to 1."""
        return self.step / self.config.steps

    def cancel(self) -> None:
        """Stop after the current step; no file is written."""
        self._stop.set()

    def keep(self) -> None:
        """Stop after the current step, and keep the mapper of the last preview."""
        self._keep.set()

    def _run(self) -> None:
        try:
            self._train()
        except _Ended as ended:
            self.words = str(ended)
        except Exception as error:  # whatever it is, the panel has to show it
            self.error = self.words = one_line(error)
        self.done = True
        self._on_change(self)

    def _train(self) -> None:
        domain = self.domain
        self.preview = {"source": to_uint8(self.faces.images)}
        if self.start_from is not None:
            self.preview["before"] = self._draw(self.start_from)
        self._on_change(self)
        run = MapperTrainer(domain, self.config, self.start_from)
        with torch.no_grad():
            self._w = domain.latents(HELD_OUT, "test", HELD_OUT_SEED)
            self._source = Pictures(domain, domain.generator.synthesis(self._w))
        if self.start_from is not None:
            self._best = self._measure(Snapshot(0, copy.deepcopy(self.start_from)))
        self._begun = self._drawn = time.perf_counter()

        def step(i: int, generator: torch.Generator) -> Mapping[str, float]:
            numbers = run.step(i, generator)
            self._losses.append(float(numbers["loss"]))
            return numbers

        after = [Callback(1, lambda done: self._after_step(run.mapper, done))]
        c = self.config
        run_loop(step, c.steps, state={"mapper": run.mapper}, seed=c.seed, progress=False, callbacks=after)

    def _after_step(self, mapper: Mapper, step: int) -> None:
        self.step, now, last = step, time.perf_counter(), step == self.config.steps
        self.seconds_a_step = (now - self._begun) / step
        if step % CHECK_STEPS == 0 or last:
            found = self._measure(Snapshot(step, copy.deepcopy(mapper)))
            if self._best is None or not found.measure <= self._best.measure + LEAST_RISE:
                self._best = found
        if now - self._drawn > PREVIEW_SECONDS or self._shown is None or last:
            self._shown, self._drawn = Snapshot(step, copy.deepcopy(mapper)), now
            self.preview = self.preview | {"refined": self._draw(mapper)}
        self.words = self._running()
        self._on_change(self)
        if self._stop.is_set() and not last:
            raise _Ended(f"cancelled at step {step}: nothing was kept")
        if self._keep.is_set() and not last:
            self._save(self._measure(self._shown))
            raise _Ended(f"kept as it was at step {self._shown.step}" + self._unseen(self._shown))
        if last or (self._best and step - self._best.step >= PATIENCE * CHECK_STEPS):
            self._save(self._best)
            why = "after all steps" if last else "because it no longer got better"
            kept = f"kept: step {self._best.step}{self._unseen(self._best)}"
            raise _Ended(f"finished {why}, in {now - self._begun:.0f} s; {kept}")

    def _draw(self, mapper: Mapper) -> np.ndarray:
        return to_uint8(self.domain.edit(self.faces.w, self.recipe.prompts[0], mapper, self.recipe.strength))

    @torch.no_grad()
    def _measure(self, one: Snapshot) -> Snapshot:
        edited = self.domain.edit(self._w, self.recipe.prompts[0], one.mapper)
        edit = Edit(self.domain, self.recipe.prompts[0], self._source, edited)
        columns = ground_truth(edit)
        if not np.isnan(progress := columns.get("progress", np.array(np.nan))).all():
            after = columns["success_after"]
            success, faces = float(np.nanmean(after)), int((~np.isnan(after)).sum())
            return replace(one, measure=float(np.nanmean(progress)), success=success, faces=faces)
        truth = self.domain.truth
        done = truth.done(edit.prompt, edit.before.seen, edit.after.seen) if truth else {}
        hits = np.array([*done.values()])
        if not np.isnan(hits).all():
            share = float(np.nanmean(hits))
            return replace(one, measure=share, success=share, faces=int((~np.isnan(hits)).any(0).sum()))
        return replace(one, measure=float(judged_direction(edit).mean()))

    def _unseen(self, one: Snapshot | None) -> str:
        if one is None or one.success is None:
            return ""
        return f" · success on {one.success:.0%} of {one.faces} faces it has not seen"

    def _running(self) -> str:
        first, now = (sum(part) / len(part) for part in (self._losses[:5], self._losses[-10:]))
        left = in_words((self.config.steps - self.step) * self.seconds_a_step)
        loss = f"loss {now:.2f}, {first:.2f} at first{self._unseen(self._best)}"
        return f"step {self.step} of {self.config.steps} · {left} left at most · {loss}"

    def _save(self, one: Snapshot) -> None:
        card = card_of(self.method, self.domain.name, self.config, one.success) | {"step": one.step}
        mapper = one.mapper.eval().requires_grad_(False)
        self.path = save_mapper(mapper, self.folder / "mapper.safetensors", **card)
