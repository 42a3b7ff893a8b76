"""The explorer's threads: one that does the latest of its jobs, and one that trains a mapper."""

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfclip.baselines.mappers import MapperEditor
from cfclip.baselines.methods import METHODS, configure
from cfclip.domain import Domain
from cfclip.explorer.recipe import Recipe
from cfclip.files import first_bytes, slug, writable
from cfclip.images import to_uint8
from cfclip.method.loop import Callback, begin_run, run_loop
from cfclip.method.trainer import MapperTrainer

logger = logging.getLogger(__name__)

REFINING = tuple(name for name, method in METHODS.items() if method.editor is MapperEditor)
"""The methods that :class:`Training` can train."""
PREVIEW_STEPS = 25
"""Steps between two previews."""
LONGEST_LINE = 1000
"""Characters of a message."""


def one_line(error: BaseException) -> str:
    """``error`` in one line, for the panel. The traceback goes to the log, at level DEBUG."""
    logger.debug("shown in the panel as one line:", exc_info=error)
    text = str(error).strip() or type(error).__name__
    if len(text) > LONGEST_LINE:  # it quotes what is wrong, which may be a whole file
        text = text[:LONGEST_LINE] + " …"
    if isinstance(error, ValueError | OSError):  # ours, and written to be read
        return text
    return f"this did not work ({type(error).__name__}): {text.splitlines()[0]}"


class LatestJobThread:
    """A thread that does the latest of the jobs it is given; a job that has not begun is replaced.

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


class Cancelled(Exception):
    """Raised inside the training to end it."""


class Training:
    """A training in a thread of its own; ``on_change(self)`` is called in that thread after every step.

    w: codes [N, L, D] of the faces in :attr:`preview`, uint8 [N, R, R, 3].
    When it is ``done``, ``path`` is the mapper's file; it is None after a cancellation or an ``error``.
    Raises ValueError for what cannot be trained.
    """

    def __init__(
        self,
        domain: Domain,
        recipe: Recipe,
        method: str,
        settings: Mapping[str, Any],
        out: Path,
        w: Tensor,
        on_change: Callable[["Training"], None],
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
        self.config = begin_run(configure(method, prompt, **given), domain.device)
        self.domain, self.recipe, self.method, self.w = domain, recipe, method, w
        # the hash tells apart what has the same slug, such as "green hat" and "Green hat!"
        what = map(str, (*domain.described.values(), prompt, source_text))
        key = hashlib.sha256("\n".join(what).encode()).hexdigest()[:8]
        self.folder = writable(out) / f"{first_bytes(slug(prompt), 100)}-{key}-{method}"
        self.step, self.done, self.error = 0, False, ""
        self.path, self.preview = None, None
        self._on_change, self._stop = on_change, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self.thread.start()

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return self.step / self.config.steps

    def cancel(self) -> None:
        """Stop after the current step; no file is written."""
        self._stop.set()

    def _run(self) -> None:
        try:
            self._train()
        except Cancelled:
            pass
        except Exception as error:  # whatever it is, the panel has to show it
            self.error = one_line(error)
        self.done = True
        self._on_change(self)

    def _train(self) -> None:
        c, run = self.config, MapperTrainer(self.domain, self.config)
        callbacks = [Callback(PREVIEW_STEPS, lambda step: self._draw(run)), Callback(1, self._after_step)]
        run_loop(
            run.step, c.steps, state={"mapper": run.mapper}, seed=c.seed, progress=False, callbacks=callbacks
        )
        mapper = run.mapper.eval().requires_grad_(False)
        self.path = MapperEditor(self.method, self.domain, c, mapper).save(self.folder)

    def _after_step(self, step: int) -> None:
        self.step = step
        self._on_change(self)
        if self._stop.is_set() and step < self.config.steps:
            raise Cancelled

    @torch.no_grad()
    def _draw(self, run: MapperTrainer) -> None:
        edited = run.mapper.edit(self.w, run.text_feature, self.recipe.strength)
        self.preview = to_uint8(self.domain.generator.synthesis(edited))
