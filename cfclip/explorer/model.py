"""The explorer's state: a recipe, its history, and threads that draw the latest recipe. Knows no widgets.

Traits may change in any thread; :meth:`Explorer.wait` returns when all that was asked for is done.
"""

import hashlib
import io
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from traitlets import Bool, Dict, Enum, Float, HasTraits, Instance, Int, Tuple, Unicode

from cfclip.baselines.library import committed, scan
from cfclip.domain import Domain
from cfclip.domains import DOMAINS, load_domain
from cfclip.explorer.frames import SHOWS, Frame, draw, export, score
from cfclip.explorer.recipe import (
    MAX_SEED,
    Faces,
    Recipe,
    advice,
    any_text,
    codes,
    draw_faces,
    level_layers,
    levels_on,
    render,
)
from cfclip.explorer.workers import LatestJobThread, Training, one_line
from cfclip.files import ROOT, atomic_write
from cfclip.inversion import projector
from cfclip.inversion.align import detector_file, load_photo
from cfclip.models.mapper import LEVELS
from cfclip.models.stylegan2 import max_batch

MERGE_SECONDS = 0.7
"""Changes of one setting within this time, as when a slider is dragged, are one entry of the history."""
HISTORY_LENGTH = 100
OUT = Path("reports", "runs", "explorer")


def _first_class(domain: Domain, label: int | None = None) -> int | None:
    """The class that the explorer begins with."""
    if label is not None or domain.label is not None:
        return domain.label if label is None else label
    return 0 if domain.generator.c_dim else None


class Explorer(HasTraits):
    """One explorer: change it with its methods, read its traits.

    Args:
        n: faces to begin with.
        out: folder for exports, codes of photos and trained mappers; "": :data:`OUT` of the repository.
        runs: more folders (or one) whose editors can be chosen.
        settings: method -> settings of the trainings that :meth:`refine` starts.
        photo_steps: optimisation steps when a photo is inverted.
        label: the class to begin with, if the generator is class-conditional; None: the domain's, or 0.
    """

    recipe = Instance(Recipe)
    show = Enum(SHOWS, "edit")
    frame = Instance(Frame, allow_none=True)
    message = Unicode(help="what went wrong, in one line")
    note = Unicode(help="what was done")
    busy = Bool(help="a picture is being drawn")
    locked = Tuple(help="faces that stay when new ones are drawn")
    mappers = Dict(help="path -> (label, prompt)")
    history = Tuple(help="recipes")
    at = Int(help="index of the recipe in the history")
    training = Instance(Training, allow_none=True)
    progress = Float(help="of the training, from 0 to 1")
    preview = Instance(np.ndarray, allow_none=True, help="of the training, uint8 [N, R, R, 3]")

    def __init__(
        self,
        domain: str | Domain = "toonfaces",
        prompt: str = "",
        n: int = 8,
        out: str | Path = "",
        runs: str | Path | Sequence[str | Path] = (),
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        photo_steps: int = 100,
        label: int | None = None,
    ):
        super().__init__()
        domain = load_domain(domain) if isinstance(domain, str) else domain
        self.out, self.n, self.photo_steps = Path(out or ROOT / OUT).resolve(), n, photo_steps
        self.settings = dict(settings or {})
        runs = [runs] if isinstance(runs, str | Path) else runs
        self.runs = [self.out, *(Path(folder).resolve() for folder in runs)]
        self._domains, self._lock = {domain.name: domain}, threading.RLock()
        self._faces: tuple[tuple, Faces] | None = None  # of the last picture, with their key
        self._last_change: tuple[frozenset, float] = (frozenset(), 0.0)  # names of fields, time
        self._drawing, self._scoring = LatestJobThread(), LatestJobThread()
        self._tasks, self._jobs = ThreadPoolExecutor(1), set[Future]()
        first = {"faces": self._first_faces(domain), "label": _first_class(domain, label)}
        self.recipe = Recipe(domain.name, prompt or domain.prompts[0], **first)
        self.recipe.chosen(domain)  # fails now if there is no such class
        self.history = (self.recipe,)
        self.find_mappers()
        self.refresh()

    def _first_faces(self, domain: Domain) -> tuple[int, ...]:
        return tuple(range(min(self.n, max_batch(domain.generator))))

    # ---- what can be chosen ----

    @property
    def domain(self) -> Domain:
        """The recipe's domain, loaded, with the recipe's class."""
        return self.recipe.chosen(self._domains[self.recipe.domain])

    @property
    def classes(self) -> int:
        """How many classes can be chosen from; 0 if the generator is not class-conditional."""
        return self._domains[self.recipe.domain].generator.c_dim

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._domains, *DOMAINS)))

    @property
    def suggestions(self) -> tuple[str, ...]:
        """Prompts that there is a mapper for, the domain's examples first."""
        claims = self.domain.truth.prompts if self.domain.truth else ()
        trained = [*sorted(committed(self.domain)), *(prompt for _, prompt in self.mappers.values())]
        known = dict.fromkeys((*self.domain.prompts, *trained, *claims))
        return tuple(prompt for prompt in known if self.mapper_for(prompt) is not None)

    @property
    def parts(self) -> tuple[str, ...]:
        """What an edit can be restricted to."""
        return self.domain.truth.regions if self.domain.truth else ()

    def mapper_for(self, prompt: str) -> str | None:
        """What edits ``prompt``: "" (the domain's own mapper), one of :attr:`mappers`, or None."""
        if self.domain.mapper is not None or prompt in committed(self.domain):
            return ""
        return next((path for path, (_, trained_for) in self.mappers.items() if trained_for == prompt), None)

    def find_mappers(self) -> None:
        """Look again which editors the folders hold."""
        self.mappers = self._mappers_of(self.recipe.domain)

    def _mappers_of(self, domain: str) -> dict[str, tuple[str, str]]:
        mappers = {}
        for one in scan(*self.runs, skip_damaged=True):
            if one.domain == domain and any_text(one.prompt) is None:
                place = one.path if one.kind == "mapper" else one.path.parent
                mappers[str(place)] = f"{one.prompt} ({one.method})", one.prompt
        return mappers

    # ---- changing the recipe ----

    def change(self, **fields: Any) -> None:
        """Set fields of the recipe. If a value cannot work, :attr:`message` says so and nothing changes."""
        with self._lock:
            try:
                recipe = replace(self.recipe, **fields)
                if recipe.domain in self._domains:
                    recipe.chosen(self._domains[recipe.domain])
            except (ValueError, TypeError) as error:
                self.message = one_line(error)
                return
            if recipe == self.recipe:
                return
            if recipe.domain not in self._domains:
                self.message = f"domain {recipe.domain!r} is not loaded: use choose_domain"
                return
            (names, when), now = self._last_change, time.monotonic()
            merge = names == frozenset(fields) and now - when < MERGE_SECONDS and self.at > 0
            self._last_change = frozenset(fields), now
            history = (*self.history[: self.at + (not merge)], recipe)[-HISTORY_LENGTH:]
            self._show(recipe, history, len(history) - 1)

    def _show(self, recipe: Recipe, history: tuple[Recipe, ...], at: int) -> None:
        """Make ``recipe`` the present one. Nobody is told before all of the state belongs together."""
        mappers = self.mappers if recipe.domain == self.recipe.domain else self._mappers_of(recipe.domain)
        with self.hold_trait_notifications():
            self.mappers, self.history, self.at, self.recipe = mappers, history, at, recipe
        self.refresh()

    def set_prompt(self, prompt: str) -> None:
        """Set the prompt; a mapper that was trained for another prompt is replaced."""
        plain, mapper = str(prompt).strip(), self.recipe.mapper
        _, trained_for = self.mappers.get(mapper, ("", plain))
        keep = trained_for == plain and (mapper or self.mapper_for(plain) is None)
        self.change(prompt=prompt, mapper=mapper if keep else self.mapper_for(plain) or "")

    def set_mapper(self, path: str) -> None:
        """One of :attr:`mappers`, with its prompt; or another mapper's file; or "", the domain's own."""
        if isinstance(path, str) and path in self.mappers:
            layers = () if Path(path).is_dir() else self.recipe.layers  # other editors edit all layers
            self.change(mapper=path, prompt=self.mappers[path][1], layers=layers)
        else:
            self.change(mapper=path)

    def set_levels(self, **on: bool) -> None:
        """``coarse=False``, …: switch levels of W+ off or on."""
        if unknown := set(on) - set(LEVELS):
            self.message = f"the levels are {', '.join(LEVELS)}, not {', '.join(sorted(unknown))}"
            return
        num_ws, split = self.domain.generator.num_ws, self.domain.level_split
        now = levels_on(self.recipe.layers, num_ws, split) | on
        self.change(layers=level_layers(num_ws, [name for name in LEVELS if now[name]], split))

    def set_show(self, show: str) -> None:
        if show not in SHOWS:
            self.message = f"what can be shown is {', '.join(SHOWS)}, not {show!r}"
            return
        self.show = show
        self.refresh()

    def new_faces(self) -> None:
        """Replace all faces that are not locked by new ones."""
        seen = [face for recipe in self.history for face in recipe.faces if isinstance(face, int)]
        faces = enumerate(self.recipe.faces, 1 + max(seen, default=-1))
        self.change(faces=tuple(face if face in self.locked else seed for seed, face in faces))

    def set_seeds(self, text: str) -> None:
        """Choose the faces by their seeds, "3, 14, 15"; own photos stay."""
        words = str(text).replace(",", " ").split()
        if not all(word.isdecimal() and len(word) <= len(str(MAX_SEED)) for word in words):
            self.message = f"seeds are whole numbers from 0 to {MAX_SEED}, as in 3, 14, 15, not {text!r}"
            return
        self.change(faces=(*(face for face in self.recipe.faces if isinstance(face, str)), *map(int, words)))

    def lock(self, face: int | str, on: bool = True) -> None:
        self.locked = (*(f for f in self.locked if f != face), *([face] if on else []))

    def go(self, to: int) -> None:
        """Go to an entry of the history."""
        with self._lock:
            if not isinstance(to, int) or not 0 <= to < len(self.history) or to == self.at:
                return
            self._last_change = frozenset(), 0.0
            self._show(self.history[to], self.history, to)

    def undo(self) -> None:
        self.go(self.at - 1)

    def redo(self) -> None:
        self.go(self.at + 1)

    # ---- drawing ----

    def refresh(self) -> None:
        """Draw what the recipe says, instead of anything that was asked for before."""
        with self._lock:
            self.busy, self.message = True, ""
            recipe, show = self.recipe, self.show
            self._drawing.ask(lambda stale: self._draw(recipe, show, stale))

    def _draw(self, recipe: Recipe, show: str, stale: Callable[[], bool]) -> None:
        begun, frame, message = time.perf_counter(), None, ""
        try:
            domain = recipe.chosen(self._domains[recipe.domain])
            key = recipe.domain, domain.label, recipe.faces
            if self._faces is None or self._faces[0] != key:
                self._faces = key, draw_faces(domain, recipe.faces)
            frame = draw(domain, recipe, show, self._faces[1], self._others(recipe, show), stale)
            message = advice(domain, recipe, self.suggestions)
        except Exception as error:  # whatever it is: the panel shows it, and the thread lives on
            message = one_line(error)
        with self._lock:
            if stale():
                return
            self.message = message or self.message
            if frame is not None:
                self.frame = frame = replace(frame, seconds=time.perf_counter() - begun)
            self.busy = False
        if frame is not None:
            self._scoring.ask(lambda stale: self._score(frame, stale))

    def _others(self, recipe: Recipe, show: str) -> dict[str, Recipe]:
        """label -> recipe of the rows beside the edit."""
        others = {}
        if show == "methods":
            for path, (label, trained_for) in self.mappers.items():
                if trained_for == recipe.prompt.strip() and path != recipe.mapper:
                    layers = () if Path(path).is_dir() else recipe.layers
                    others[label] = replace(recipe, mapper=path, layers=layers)
        if show == "prompts × strengths":
            prompts = dict.fromkeys((*recipe.prompts, *self.suggestions))
            for prompt in list(prompts)[: max(4, len(recipe.prompts))]:
                mapper = recipe.mapper if [prompt] == recipe.prompts else self.mapper_for(prompt) or ""
                others[prompt] = replace(recipe, prompt=prompt, mapper=mapper)
        return others

    def _score(self, frame: Frame, stale: Callable[[], bool]) -> None:
        scores = {}
        try:
            domain = frame.recipe.chosen(self._domains[frame.recipe.domain])
            scores = score(domain, frame, lambda: stale() or self.frame is not frame)
        except Exception as error:  # as in _draw
            self.message = one_line(error)
        with self._lock:
            if self.frame is frame and scores:
                self.frame = replace(frame, scores=scores)

    # ---- slow tasks, one after the other ----

    def _task(self, what: str, job: Callable[[], str]) -> None:
        """Do ``job`` in the tasks' thread; :attr:`note` is ``what`` meanwhile, then what ``job`` returns."""

        def run() -> None:
            note = ""
            try:
                note = job()
            except Exception as error:  # as in _draw
                self.message = one_line(error)
            self.note = note

        self.note = what
        self._jobs = {one for one in self._jobs if not one.done()} | {self._tasks.submit(run)}

    def _load(self, name: str) -> Domain:
        if name not in self._domains:
            self._domains[name] = load_domain(name)
        return self._domains[name]

    def choose_domain(self, name: str) -> None:
        """Load the domain and begin with its first prompt; if that fails, the recipe stays as it is."""

        def job() -> str:
            domain = self._load(name)
            reset = {"source_text": "", "layers": (), "mapper": "", "region": ""}
            reset |= {"faces": self._first_faces(domain), "label": _first_class(domain)}
            self.change(domain=name, prompt=domain.prompts[0], **reset)
            return f"domain {name}"

        if name != self.recipe.domain:
            self._task(f"loading {name} …", job)

    def add_photo(self, content: bytes, points: Sequence[Sequence[float]] = ()) -> None:
        """Invert a photo and lock it in the place of the first face that is not locked.

        Its code is written to ``out``. It is aligned as :func:`cfclip.inversion.align.load_photo` says.
        """
        self._task("inverting the photo …", lambda: self._invert(content, points))

    def _invert(self, content: bytes, points: Sequence[Sequence[float]]) -> str:
        domain, size = self.domain, self.domain.generator.resolution
        detect = isinstance(points, Sized) and not len(points) and size >= 256 and detector_file() is not None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            photo = load_photo(io.BytesIO(content), size, points, detect=detect)
        photo = photo.to(domain.device)
        start = projector.encode(domain, photo) if domain.encoder is not None else None
        config = projector.InversionConfig(steps=self.photo_steps, noise_maps=False)
        inverted = projector.invert(domain, photo, config, start, progress=False)
        name = hashlib.sha256(content + repr((domain.name, points)).encode()).hexdigest()[:12]
        code = inverted.w_plus.cpu()
        path = str(atomic_write(self.out / "faces" / f"{name}.pt", lambda part: torch.save(code, part)))
        faces = list(self.recipe.faces)
        if path not in faces:
            faces[next((i for i, face in enumerate(faces) if face not in self.locked), 0)] = path
        self.lock(path)
        self.change(faces=tuple(faces))
        quality = f"photo inverted, {inverted.metrics[0]['psnr']:.1f} dB;"
        return " ".join([quality, *(str(warning.message) for warning in caught)])

    def export(self) -> None:
        """Write the picture on show, its animation, the recipe and its cell into ``out``."""

        def job() -> str:
            self._drawing.wait()
            if self.frame is None or self.frame.recipe != self.recipe:
                why = f": {self.message}" if self.message else ""
                raise ValueError(f"there is no picture of this recipe to export{why}")
            return "written: " + ", ".join(map(str, export(self.out, self.domain, self.frame)))

        self._task("exporting …", job)

    def open(self, text: str | bytes) -> None:
        """Open an exported recipe (.json). One that cannot be drawn is refused before anything changes."""

        def job() -> str:
            recipe = Recipe.from_json(text)
            domain = recipe.chosen(self._load(recipe.domain))
            w = codes(domain, recipe.faces)[:1]  # reads all files; one face shows whether the edit works
            with torch.no_grad():
                render(domain, recipe, Faces(w, domain.generator.synthesis(w)))
            self.change(**vars(recipe))
            self.find_mappers()  # there may be new ones
            return "recipe opened"

        self._task("opening the recipe …", job)

    # ---- refine: a training in the background ----

    def refine(self, method: str = "cfclip") -> None:
        """Train ``method`` for the current prompt; then edit with it if the prompt is still the same."""
        if self.training is not None:
            self.message = "a training is running: cancel it, or wait for it"
            return
        domain, recipe = self.domain, self.recipe
        try:
            settings = self.settings.get(str(method), {})
            w = codes(domain, recipe.faces[:4])
            training = Training(domain, recipe, method, settings, self.out, w, self._on_training)
        except Exception as error:  # as in _draw
            self.message = one_line(error)
            return
        self.training, self.progress, self.preview = training, 0.0, None
        training.start()

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
                self.refresh()  # even if the path is the same: the mapper in it is new

    def cancel(self) -> None:
        if (training := self.training) is not None:
            training.cancel()

    # ---- the end ----

    def wait(self, timeout: float = 60.0) -> bool:
        """Wait until all that was asked for is done, except a training; False after ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
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
