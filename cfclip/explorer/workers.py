"""The explorer's threads: one that does the newest of its jobs, and one that trains a mapper, with previews and a way to stop it."""

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
from cfclip.files import slug, writable
from cfclip.images import to_uint8
from cfclip.method.loop import Callback, begin_run, run_loop
from cfclip.method.trainer import MapperTrainer

REFINING = tuple(name for name, method in METHODS.items() if method.editor is MapperEditor)

PREVIEW = 25
"""Steps between two previews."""


def in_words(error: BaseException) -> str:
    """What the panel says of ``error``: its own words where it is one of ours."""
    text = str(error).strip() or type(error).__name__
    return (
        text
        if isinstance(error, ValueError | OSError)
        else f"this did not work ({type(error).__name__}): {text.splitlines()[0]}"
    )


class LatestJobThread:
    """A thread that does the newest of the jobs it is given. A job gets ``stale``, which says whether it has been overtaken."""

    def __init__(self):
        self._changed, self._job, self._serial, self._running, self._closed = (
            threading.Condition(),
            None,
            0,
            False,
            False,
        )
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
        """Until there is nothing to do; False if that took longer."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._closed or (self._job is None and not self._running), timeout
            )

    def close(self) -> None:
        with self._changed:
            self._closed, self._serial = True, self._serial + 1
            self._changed.notify_all()


class Cancelled(Exception):
    """Raised inside the training to end it."""


class Training:
    """Trains at once; ``tell(self)`` after every step, in its thread. ValueError for what cannot be trained.

    w: codes [N, L, D] of the faces in the ``preview``, uint8 [N, R, R, 3].
    ``path``: the mapper's file once it is ``done``, None if it was cancelled or failed (then ``error`` says why).
    """

    def __init__(
        self,
        domain: Domain,
        recipe: Recipe,
        method: str,
        settings: Mapping[str, Any],
        out: Path,
        w: Tensor,
        tell: Callable[["Training"], None],
    ):
        if method not in REFINING:
            raise ValueError(f"'refine' trains {', '.join(REFINING)}, not {method!r}")
        if len(recipe.prompts) != 1:
            raise ValueError("'refine' trains one prompt at a time: leave one, and combine them afterwards")
        (prompt,) = recipe.prompts
        domain.clip.tokenize(prompt)
        known = dict(settings) | (
            {"source_text": recipe.source_text.strip()} if recipe.source_text.strip() else {}
        )
        self.config = begin_run(configure(method, prompt, **known), domain.device)
        self.domain, self.recipe, self.method, self.w, self._tell = domain, recipe, method, w, tell
        self.folder = writable(out) / f"{slug(prompt)}-{method}"
        self.step, self.done, self.error, self.path, self.preview = 0, False, "", None, None
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self.thread.start()

    @property
    def progress(self) -> float:
        return self.step / self.config.steps

    def cancel(self) -> None:
        """Stops at the next step and leaves nothing behind."""
        self._stop.set()

    def _run(self) -> None:
        try:
            run = MapperTrainer(self.domain, self.config)
            run_loop(
                run.step,
                self.config.steps,
                state={},
                seed=self.config.seed,
                progress=False,
                callbacks=[Callback(PREVIEW, lambda step: self._look(run)), Callback(1, self._after)],
            )
            mapper = run.mapper.eval().requires_grad_(False).half().float()  # as its file will have it
            MapperEditor(self.method, self.domain, self.config, mapper).save(self.folder)
            self.path = self.folder / f"{MapperEditor.KIND}.safetensors"
        except Cancelled:
            pass
        except Exception as error:  # whatever it is, the panel has to say it
            self.error = in_words(error)
        self.done = True
        self._tell(self)

    def _after(self, step: int) -> None:
        self.step = step
        self._tell(self)
        if self._stop.is_set() and step < self.config.steps:
            raise Cancelled

    @torch.no_grad()
    def _look(self, run: MapperTrainer) -> None:
        self.preview = to_uint8(
            self.domain.generator.synthesis(run.mapper.edit(self.w, run.text_feature, self.recipe.strength))
        )
