"""The explorer's state: a recipe, its history, and workers that draw what the newest recipe says. No widgets: see explorer_view.py.

The traits may change in any thread; :meth:`Explorer.wait` returns when all that was asked for has been done.
"""

import hashlib
import io
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from traitlets import Bool, Dict, Enum, Float, HasTraits, Instance, Int, Tuple, Unicode

from cfclip.baselines.library import committed, scan
from cfclip.baselines.library import mapper_for as own_mapper
from cfclip.domain import Domain
from cfclip.domains import DOMAINS, load_domain
from cfclip.explorer.frames import SHOWS, Frame, draw, export, score
from cfclip.explorer.recipe import Faces, Recipe, codes, draw_faces, level_layers, levels_on
from cfclip.explorer.workers import LatestJobThread, Training, in_words
from cfclip.files import ROOT, atomic_write
from cfclip.inversion import projector
from cfclip.inversion.align import detector_file, load_photo
from cfclip.models.mapper import LEVELS
from cfclip.models.stylegan2 import max_batch

MERGE_SECONDS = 0.7
"""Seconds within which two changes of the same setting are one entry of the history: a slider on its way, a word being typed."""

OUT = Path("reports", "runs", "explorer")

HISTORY_LENGTH = 100
"""Entries of the history."""


class Explorer(HasTraits):
    """One explorer: change it by its methods, look at its traits.

    ``n``: faces to begin with; ``out``: folder for exports, codes of photos and trained mappers, default :data:`OUT` of the repository;
    ``runs``: more folders whose editors can be chosen; ``settings``: method -> settings of its trainings; ``photo_steps``: of the inversion.
    """

    recipe = Instance(Recipe)
    show = Enum(SHOWS, "edit")
    frame = Instance(Frame, allow_none=True)
    message = Unicode(help="what went wrong, in words")
    note = Unicode(help="what was done")
    busy = Bool()
    locked = Tuple(help="faces that stay when new ones are drawn")
    mappers = Dict(help="path -> (label, prompt)")
    history = Tuple(help="recipes")
    at = Int(help="where in the history")
    training = Instance(Training, allow_none=True)
    progress = Float(help="of the training, from 0 to 1")
    preview = Instance(np.ndarray, allow_none=True, help="what the training has come to, uint8 [N, R, R, 3]")

    def __init__(
        self,
        domain: str | Domain = "toonfaces",
        prompt: str = "",
        n: int = 8,
        out: str | Path = "",
        runs: Sequence[str | Path] = (),
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        photo_steps: int = 100,
    ):
        super().__init__()
        domain = load_domain(domain) if isinstance(domain, str) else domain
        self.out, self.settings, self.n, self.photo_steps = (
            Path(out or ROOT / OUT).resolve(),
            dict(settings or {}),
            n,
            photo_steps,
        )
        self.runs = [self.out, *(Path(folder).resolve() for folder in runs)]
        self._domains, self._lock = {domain.name: domain}, threading.RLock()
        self._faces: tuple[tuple, Faces] | None = None
        self._last_change: tuple[frozenset, float] = (frozenset(), 0.0)
        self._drawing, self._scoring, self._tasks, self._jobs = (
            LatestJobThread(),
            LatestJobThread(),
            ThreadPoolExecutor(1),
            set[Future](),
        )
        self.recipe = Recipe(domain.name, prompt or domain.prompts[0], faces=self._first_faces(domain))
        self.history = (self.recipe,)
        self.find_mappers()
        self.refresh()

    def _first_faces(self, domain: Domain) -> tuple[int, ...]:
        return tuple(range(min(self.n, max_batch(domain.generator))))

    # ---- what there is to choose from ----

    @property
    def domain(self) -> Domain:
        """The recipe's, loaded."""
        return self._domains[self.recipe.domain]

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._domains, *DOMAINS)))

    @property
    def suggestions(self) -> tuple[str, ...]:
        """Prompts that there is a mapper for, the domain's examples first."""
        own = sorted(committed(self.domain))
        claims = self.domain.truth.prompts if self.domain.truth else ()
        of_files = [prompt for _, prompt in self.mappers.values()]
        return tuple(
            p
            for p in dict.fromkeys((*self.domain.prompts, *own, *of_files, *claims))
            if self.mapper_for(p) is not None
        )

    @property
    def parts(self) -> tuple[str, ...]:
        """What an edit can be restricted to."""
        return self.domain.truth.regions if self.domain.truth else ()

    def mapper_for(self, prompt: str) -> str | None:
        """What to edit with: "" for the domain's own mapper, else the first of :attr:`mappers` for this prompt, else None."""
        try:
            own_mapper(self.domain, prompt)
        except ValueError:
            return next((path for path, (_, of) in self.mappers.items() if of == prompt), None)
        return ""

    def find_mappers(self) -> None:
        """Look again which editors the folders hold."""
        found = {}
        for one in scan(*self.runs, skip_damaged=True):
            if one.domain == self.recipe.domain and one.prompt is not None:
                where = one.path if one.kind == "mapper" else one.path.parent
                found[str(where)] = f"{one.prompt} ({one.method})", one.prompt
        self.mappers = found

    # ---- changing the recipe ----

    def change(self, **fields: Any) -> None:
        """Set fields of the recipe. What cannot be is said in :attr:`message`, and nothing changes."""
        with self._lock:
            try:
                recipe = replace(self.recipe, **fields)
            except (ValueError, TypeError) as error:
                self.message = in_words(error)
                return
            if recipe == self.recipe:
                return
            what, now = frozenset(fields), time.monotonic()
            together = (
                what == self._last_change[0] and now - self._last_change[1] < MERGE_SECONDS and self.at > 0
            )
            self._last_change = what, now
            self.history = (*self.history[: self.at + (not together)], recipe)[-HISTORY_LENGTH:]
            self.at = len(self.history) - 1
            self.recipe = recipe
        self.refresh()

    def set_prompt(self, prompt: str) -> None:
        """A mapper that was trained for another prompt is let go of."""
        plain, mapper = prompt.strip(), self.recipe.mapper
        keep = self.mappers.get(mapper, ("", plain))[1] == plain and (
            mapper or self.mapper_for(plain) is None
        )
        self.change(prompt=prompt, mapper=mapper if keep else self.mapper_for(plain) or "")

    def set_mapper(self, path: str) -> None:
        """One of :attr:`mappers`, with its prompt; a mapper's file; or "", the domain's own."""
        if path not in self.mappers:
            self.change(mapper=path)
        else:  # an editor that is no mapper edits all layers
            self.change(
                mapper=path,
                prompt=self.mappers[path][1],
                layers=() if Path(path).is_dir() else self.recipe.layers,
            )

    def set_levels(self, **on: bool) -> None:
        """``coarse=False``, …: switch levels of W+ off or on."""
        layers = self.domain.generator.num_ws
        now = levels_on(self.recipe.layers, layers) | on
        self.change(layers=level_layers(layers, [name for name in LEVELS if now[name]]))

    def set_show(self, show: str) -> None:
        self.show = show
        self.refresh()

    def new_faces(self) -> None:
        """Faces that have not been seen, but for the locked ones."""
        seed = 1 + max(
            (face for recipe in self.history for face in recipe.faces if isinstance(face, int)), default=-1
        )
        self.change(
            faces=tuple(face if face in self.locked else seed + i for i, face in enumerate(self.recipe.faces))
        )

    def set_seeds(self, text: str) -> None:
        """The faces by their seeds, "3, 14, 15"; own photos stay."""
        words = text.replace(",", " ").split()
        if not all(word.isdecimal() for word in words):
            self.message = f"seeds are whole numbers from 0, as in 3, 14, 15, not {text!r}"
            return
        self.change(faces=(*(face for face in self.recipe.faces if isinstance(face, str)), *map(int, words)))

    def lock(self, face: int | str, on: bool = True) -> None:
        self.locked = (*(f for f in self.locked if f != face), *([face] if on else []))

    def go(self, to: int) -> None:
        """To an entry of the history."""
        with self._lock:
            if not 0 <= to < len(self.history) or to == self.at:
                return
            moved = self.history[to].domain != self.recipe.domain
            self._last_change = frozenset(), 0.0
            self.at, self.recipe = to, self.history[to]
        if moved:
            self.find_mappers()
        self.refresh()

    def undo(self) -> None:
        self.go(self.at - 1)

    def redo(self) -> None:
        self.go(self.at + 1)

    # ---- drawing ----

    def refresh(self) -> None:
        """Draw what the recipe says, and forget what was asked for before."""
        with self._lock:
            self.busy, self.message = True, ""
            self._drawing.ask(
                lambda stale, recipe=self.recipe, show=self.show: self._draw(recipe, show, stale)
            )

    def _draw(self, recipe: Recipe, show: str, stale: Callable[[], bool]) -> None:
        begun, frame, message = time.perf_counter(), None, ""
        try:
            domain, key = self._domains[recipe.domain], (recipe.domain, recipe.faces)
            if self._faces is None or self._faces[0] != key:
                self._faces = key, draw_faces(domain, recipe.faces)
            frame = draw(domain, recipe, show, self._faces[1], *self._others(recipe, show), stale)
        except Exception as error:  # whatever it is: in words, and the thread goes on
            message = in_words(error)
        with self._lock:
            if stale():
                return
            self.message = message or self.message
            if frame is not None:
                self.frame = frame = replace(frame, seconds=time.perf_counter() - begun)
            self.busy = False
        if frame is not None:
            self._scoring.ask(lambda stale: self._score(frame, stale))

    def _others(self, recipe: Recipe, show: str) -> tuple[list[Recipe], list[str]]:
        """The recipes of the rows beside the edit, and what they are called."""
        if show == "methods":
            same = [
                (path, label)
                for path, (label, of) in self.mappers.items()
                if of == recipe.prompt.strip() and path != recipe.mapper
            ]
            return [
                replace(recipe, mapper=path, layers=() if Path(path).is_dir() else recipe.layers)
                for path, _ in same
            ], [label for _, label in same]
        if show == "prompts × strengths":
            prompts = list(dict.fromkeys((*recipe.prompts, *self.suggestions)))[: max(4, len(recipe.prompts))]
            return [
                replace(
                    recipe,
                    prompt=prompt,
                    mapper=recipe.mapper if [prompt] == recipe.prompts else self.mapper_for(prompt) or "",
                )
                for prompt in prompts
            ], prompts
        return [], []

    def _score(self, frame: Frame, stale: Callable[[], bool]) -> None:
        try:
            scores = score(
                self._domains[frame.recipe.domain], frame, lambda: stale() or self.frame is not frame
            )
        except Exception as error:
            scores, self.message = {}, in_words(error)
        with self._lock:
            if self.frame is frame and scores:
                self.frame = replace(frame, scores=scores)

    # ---- slow things, one after the other ----

    def _task(self, what: str, job: Callable[[], str]) -> None:
        """Do ``job`` in its thread; what it returns is the note."""

        def run() -> None:
            note = ""
            try:
                note = job()
            except Exception as error:
                self.message = in_words(error)
            self.note = note

        self.note = what
        self._jobs = {one for one in self._jobs if not one.done()} | {self._tasks.submit(run)}

    def _load(self, name: str) -> Domain:
        if name not in self._domains:
            self._domains[name] = load_domain(name)
        return self._domains[name]

    def choose_domain(self, name: str) -> None:
        """Load it, and begin there; where that fails the explorer stays where it is."""

        def job() -> str:
            domain = self._load(name)
            self.change(
                domain=name,
                prompt=domain.prompts[0],
                source_text="",
                layers=(),
                mapper="",
                region="",
                faces=self._first_faces(domain),
            )
            self.find_mappers()
            return f"domain {name}"

        if name != self.recipe.domain:
            self._task(f"loading {name} …", job)

    def add_photo(self, content: bytes, points: Sequence[Sequence[float]] = ()) -> None:
        """A photo file -> a code in ``out``, in the place of the first face that is not locked; aligned as :func:`cfclip.align.load_photo` says."""

        def job() -> str:
            domain, size = self.domain, self.domain.generator.resolution
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", UserWarning)
                photo = load_photo(
                    io.BytesIO(content),
                    size,
                    points,
                    detect=not len(points) and size >= 256 and detector_file() is not None,
                )
            photo = photo.to(domain.device)
            start = projector.encode(domain, photo) if domain.encoder is not None else None
            found = projector.invert(
                domain,
                photo,
                projector.InversionConfig(steps=self.photo_steps, noise_maps=False),
                start,
                progress=False,
            )
            name = hashlib.sha256(content + repr((domain.name, points)).encode()).hexdigest()[:12]
            code = found.w_plus.cpu()
            path = str(atomic_write(self.out / "faces" / f"{name}.pt", lambda part: torch.save(code, part)))
            faces = list(self.recipe.faces)
            if path not in faces:
                faces[next((i for i, face in enumerate(faces) if face not in self.locked), 0)] = path
            self.lock(path)
            self.change(faces=tuple(faces))
            return " ".join([
                f"photo inverted, {found.metrics[0]['psnr']:.1f} dB;",
                *(str(w.message) for w in said),
            ])

        self._task("inverting the photo …", job)

    def export(self) -> None:
        """Write the picture on show, its animation, the recipe and its cell into ``out``."""

        def job() -> str:
            self._drawing.wait()
            if self.frame is None or self.frame.recipe != self.recipe:
                raise ValueError(
                    "there is no picture of this recipe to export"
                    + (f": {self.message}" if self.message else "")
                )
            return "written: " + ", ".join(str(path) for path in export(self.out, self.domain, self.frame))

        self._task("exporting …", job)

    def open(self, text: str | bytes) -> None:
        """A recipe, as the export's .json has it."""

        def job() -> str:
            recipe = Recipe.from_json(text if isinstance(text, str) else text.decode())
            self._load(recipe.domain)
            self.change(**vars(recipe))
            self.find_mappers()
            return "recipe opened"

        self._task("opening the recipe …", job)

    # ---- refine: a training in the background ----

    def refine(self, method: str = "cfclip") -> None:
        """Train ``method`` for the prompt on show; if that is still the prompt at the end, the new mapper edits it."""
        if self.training is not None:
            self.message = "a training is running: cancel it, or wait for it"
            return
        try:
            w = codes(self.domain, self.recipe.faces[:4])
            self.training = Training(
                self.domain,
                self.recipe,
                method,
                self.settings.get(method, {}),
                self.out,
                w,
                self._on_training,
            )
        except Exception as error:
            self.message = in_words(error)
            return
        self.progress, self.preview = 0.0, None
        self.training.start()

    def _on_training(self, training: Training) -> None:
        self.progress, self.preview = training.progress, training.preview
        if not training.done:
            return
        self.training, self.preview = None, None
        self.message = training.error or self.message
        if training.path is not None:
            self.find_mappers()
            self.note = f"trained: {training.path}"
            if (self.recipe.domain, self.recipe.prompts) == (training.recipe.domain, training.recipe.prompts):
                self.set_mapper(str(training.path))
                self.refresh()  # the path may be the same, and the mapper another

    def cancel(self) -> None:
        if (training := self.training) is not None:
            training.cancel()

    # ---- the end ----

    def wait(self, timeout: float = 60.0) -> bool:
        """Until everything that was asked for is done, a training aside; False if that took longer."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            left = end - time.monotonic()
            jobs = self._jobs
            if wait_for(jobs, left).not_done or not self._drawing.wait(left) or not self._scoring.wait(left):
                return False
            if jobs is self._jobs and self._drawing.wait(0) and self._scoring.wait(0):
                return True
        return False

    def close(self) -> None:
        """End the threads."""
        self.cancel()
        self._drawing.close()
        self._scoring.close()
        self._tasks.shutdown(wait=False, cancel_futures=True)
