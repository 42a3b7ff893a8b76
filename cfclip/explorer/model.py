"""The explorer's state: a recipe, its history, and threads that draw the latest recipe. Knows no widgets.

Traits may change in any thread; :meth:`Explorer.wait` returns when everything requested is done.
"""

import reprlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from traitlets import Bool, Dict, Enum, Float, HasTraits, Instance, Int, Tuple, Unicode

from cfclip.baselines.library import Trained, plain
from cfclip.baselines.methods import configure
from cfclip.domain import Domain
from cfclip.domains import DOMAINS, load_domain
from cfclip.explorer import advice, choices, photos
from cfclip.explorer.frames import FILM_NEEDS, SHOWS, Frame, draw, export, score
from cfclip.explorer.recipe import (
    MAX_FACES,
    MAX_SEED,
    MAX_STRENGTH,
    MIN_STRENGTH,
    Faces,
    Recipe,
    brief,
    codes,
    draw_faces,
    level_layers,
    levels_on,
    render,
)
from cfclip.explorer.workers import LONGEST_LINE, LatestJobThread, Training, one_line
from cfclip.files import ROOT
from cfclip.models.mapper import LEVELS, Mapper
from cfclip.models.ops import fast_dtype
from cfclip.models.stylegan2 import max_batch

MERGE_SECONDS = 0.7
"""Changes of one setting within this time of each other, as by a dragged slider, are one history entry."""
HISTORY_LENGTH = 100
GIVE_UP_SECONDS = 1.0
"""A picture of many rows that takes longer is given up as soon as another picture is requested."""
SKETCHED = ("edit", "difference")
"""Shows that are drawn first in half precision, where that is faster, and then exactly."""
STEP_TO_DRAWING = 2.0
"""Time of a training step divided by the time of drawing the faces: a guess until a training has ended."""
OUT = Path("reports", "runs", "explorer")


def _first_class(domain: Domain, label: int | None = None) -> int | None:
    """The class that the explorer begins with."""
    label = domain.label if label is None else label
    return 0 if label is None and domain.generator.c_dim else label


class Explorer(HasTraits):
    """One explorer: change it with its methods, read its traits.

    Args:
        n: number of faces to begin with; a photo that is added to as many replaces one of them.
        out: folder for exports, codes of photos and trained mappers; "": :data:`OUT` in the repository.
        runs: another folder, or several, with trained editors to choose from.
        settings: method -> settings of the trainings that :meth:`refine` starts.
        photo_steps: optimisation steps of the inversion of a photo.
        label: the class to begin with, if the generator is class-conditional; None: the domain's, or 0.
    """

    recipe = Instance(Recipe)
    show = Enum(SHOWS, "edit")
    frame = Instance(Frame, allow_none=True)
    message = Unicode(help="what went wrong, in one line")
    hint = Unicode(help="what became of the faces, and what to do about it")
    note = Unicode(help="what was done")
    busy = Bool(help="a picture is being drawn")
    locked = Tuple(help="faces that stay when new ones are drawn")
    mappers = Dict(help="path -> (label, prompt)")
    history = Tuple(help="recipes")
    at = Int(help="index of the recipe in the history")
    exported = Tuple(help="files of the last export")
    training = Instance(Training, allow_none=True)
    progress = Float(help="of the training, from 0 to 1")
    refining = Unicode(help="how far the training is, or how it ended")
    preview = Dict(help="of the training: label -> uint8 [N, R, R, 3]")

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
        self._seconds_a_step = 0.0  # of the last training
        self._hinted: tuple = ()  # prompt and mapper of the hint
        self._suggested: tuple[tuple, dict[str, float | None]] = ((), {})  # key, suggestions
        self._faces: tuple[tuple, Faces] | None = None  # key, faces of the last picture
        self._last_change: tuple[frozenset, float] = (frozenset(), 0.0)  # names of fields, time
        self._drawing, self._scoring = LatestJobThread(), LatestJobThread()
        self._tasks, self._jobs = ThreadPoolExecutor(1), set[Future]()
        first = {"faces": self._first_faces(domain), "label": _first_class(domain, label)}
        self.recipe = Recipe(domain.name, prompt or domain.prompts[0], **first)
        self.recipe.chosen(domain)  # fails now if there is no such class
        self.find_mappers()
        mapper = choices.editors_for(self.domain, self._trained, self.recipe.prompts)
        self.recipe = replace(self.recipe, mapper=mapper)
        self.history = (self.recipe,)
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
        """The number of classes to choose from; 0 if the generator is not class-conditional."""
        return self._domains[self.recipe.domain].generator.c_dim

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._domains, *DOMAINS)))

    @property
    def suggestions(self) -> dict[str, float | None]:
        """See :func:`.choices.working`."""
        key = self.recipe.domain, tuple(self.mappers)
        if self._suggested[0] != key:
            self._suggested = key, choices.working(self.domain, self._trained)
        return self._suggested[1]

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a face that an edit can be restricted to."""
        return self.domain.truth.regions if self.domain.truth else ()

    def find_mappers(self) -> None:
        """Search the folders for trained editors again."""
        self._trained, self.mappers = self._mappers_of(self.recipe.domain)

    def _mappers_of(self, domain: str) -> tuple[list[Trained], dict[str, tuple[str, str]]]:
        found = choices.find(self.runs, domain)
        return found, {choices.place(one): (f"{one.prompt} ({one.method})", one.prompt) for one in found}

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
        """Make ``recipe`` the current one. Observers are notified only when all traits are consistent."""
        mappers = self.mappers
        if recipe.domain != self.recipe.domain:
            self._trained, mappers = self._mappers_of(recipe.domain)
        with self.hold_trait_notifications():
            self.mappers, self.history, self.at, self.recipe = mappers, history, at, recipe
            self.refresh()  # inside, so that drawing begins before observers are notified

    def set_prompt(self, prompt: str) -> None:
        """Set the prompt, and choose its mappers. A chosen file stays if its prompt is equal or unknown."""
        mapper = self.recipe.mapper
        try:
            recipe = replace(self.recipe, prompt=prompt)
        except ValueError as error:
            self.message = one_line(error)
            return
        known = self.mappers.get(mapper) if isinstance(mapper, str) else None
        if mapper == "" or not isinstance(mapper, str) or (known and plain(known[1]) != plain(recipe.prompt)):
            mapper = choices.editors_for(self.domain, self._trained, recipe.prompts)
        self.change(prompt=prompt, mapper=mapper)

    def set_mapper(self, path: str) -> None:
        """Choose one of :attr:`mappers`, with its prompt; another mapper's file; or "", the domain's own."""
        if isinstance(path, str) and path in self.mappers:
            layers = () if Path(path).is_dir() else self.recipe.layers  # other editors edit all layers
            self.change(mapper=path, prompt=self.mappers[path][1], layers=layers)
        else:
            self.change(mapper=path)

    def stronger(self, by: float) -> None:
        """Add ``by`` to the strength, within its limits."""
        strength = round(self.recipe.strength + by, 2)
        self.change(strength=min(MAX_STRENGTH, max(MIN_STRENGTH, strength)))

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
        """Replace all faces, except locked ones and photos, by new ones."""
        seen = [face for recipe in self.history for face in recipe.faces if isinstance(face, int)]
        faces = enumerate(self.recipe.faces, 1 + max(seen, default=-1))
        stay = {*self.locked, *(face for face in self.recipe.faces if isinstance(face, str))}
        self.change(faces=tuple(face if face in stay else seed % (MAX_SEED + 1) for seed, face in faces))

    def set_seeds(self, text: str) -> None:
        """Choose the faces by their seeds, "3, 14, 15"; own photos stay."""
        words = str(text).replace(",", " ").split()
        if not all(word.isdecimal() and len(word) <= 10 and int(word) <= MAX_SEED for word in words):
            not_this = reprlib.repr(text)
            self.message = f"seeds are whole numbers from 0 to {MAX_SEED}, as in 3, 14, 15, not {not_this}"
            return
        self.change(faces=(*(face for face in self.recipe.faces if isinstance(face, str)), *map(int, words)))

    def lock(self, face: int | str, on: bool = True) -> None:
        self.locked = (*(f for f in self.locked if f != face), *([face] if on else []))

    def remove(self, face: int | str) -> None:
        """Remove a face or a photo; if none is left, the explorer shows its first faces again."""
        left = tuple(one for one in self.recipe.faces if one != face)
        self.lock(face, False)
        self.change(faces=left or self._first_faces(self.domain))

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
        """Draw the current recipe, instead of anything that was requested before."""
        with self._lock:
            self.busy, self.message = True, ""
            recipe, show = self.recipe, self.show
            self._drawing.ask(lambda stale: self._draw(recipe, show, stale))

    def _draw(self, recipe: Recipe, show: str, stale: Callable[[], bool]) -> None:
        begun, frame, message, sketch = time.perf_counter(), None, "", None

        def give_up() -> bool:
            return stale() and time.perf_counter() - begun > GIVE_UP_SECONDS

        try:
            domain = recipe.chosen(self._domains[recipe.domain])
            key = recipe.domain, domain.label, recipe.faces
            if self._faces is None or self._faces[0] != key:
                self._faces = key, draw_faces(domain, recipe.faces)
            if show in SKETCHED and (quick := fast_dtype(domain.device)) != torch.float32:
                sketch = quick
            drawing = partial(draw, domain, recipe, show, self._faces[1], self._others(recipe, show), give_up)
            frame = drawing(sketch)
            message = advice.unclear(domain, recipe, self.suggestions)
        except Exception as error:  # whatever it is: the panel shows it, and the thread lives on
            message = one_line(error)
        with self._lock:
            if frame is not None:  # shown even if it is stale, so that pictures follow a slider being dragged
                self.frame = frame = replace(frame, seconds=time.perf_counter() - begun)
            if stale():
                return
            self.message = brief(message, LONGEST_LINE) or self.message
            self.busy = False
            if self._hinted != (recipe.prompt, recipe.mapper):  # otherwise kept until the next hint
                self.hint = ""
        if frame is None:
            return
        if sketch:
            exact = None
            try:
                exact = drawing()
            except Exception as error:  # then the sketch stays
                message = one_line(error)
            with self._lock:
                if stale():
                    return
                if exact is None:
                    self.message = brief(message, LONGEST_LINE)
                else:
                    self.frame = frame = replace(exact, seconds=frame.seconds)
        self._scoring.ask(lambda stale: self._score(frame, stale))

    def _hint(self, frame: Frame) -> str:
        """What became of the faces, what to expect of others, and what would help."""
        recipe, domain = frame.recipe, self._domains[frame.recipe.domain]
        if not recipe.prompts:
            return "type a prompt, such as one of those that work"
        if frame.show == "methods" and len(frame.rows) < 3:
            return (
                f"nothing else was trained for {brief(recipe.prompt, 40)!r}: train it by another method "
                "under Refine, or give a folder with runs of 02_training as 'runs'"
            )
        own = [one for one, file in zip(recipe.prompts, recipe.mappers, strict=True) if not file]
        success = [choices.success_of(domain, self._trained, prompt) for prompt in own]
        seconds = self._seconds_a_step or STEP_TO_DRAWING * frame.seconds
        steps = configure("cfclip", "x", **self.settings.get("cfclip", {})).steps
        found = [advice.outcome(domain, frame), advice.prospects(success, frame, steps * seconds)]
        return "; ".join(filter(None, found))

    def _others(self, recipe: Recipe, show: str) -> dict[str, Recipe]:
        """The ``others`` of :func:`.draw`: label -> recipe."""
        others = {}
        if show == "methods":
            for path, (label, trained_for) in self.mappers.items():
                if plain(trained_for) == plain(recipe.prompt) and path != recipe.mapper:
                    layers = () if Path(path).is_dir() else recipe.layers
                    others[label] = replace(recipe, mapper=path, layers=layers)
        if show == "prompts × strengths":
            given = dict(zip(recipe.prompts, recipe.mappers, strict=True))
            prompts = dict.fromkeys((*given, *self.suggestions))
            for prompt in list(prompts)[: max(4, len(given))]:
                if (mapper := given.get(prompt)) is None:
                    mapper = choices.editor_for(self.domain, self._trained, prompt) or ""
                others[prompt] = replace(recipe, prompt=prompt, mapper=mapper)
        return others

    def _score(self, frame: Frame, stale: Callable[[], bool]) -> None:
        """Measure ``frame``. A hint without measurements is shown first, because measuring takes longer."""
        try:
            self._say(self._hint(frame), frame)
            domain = frame.recipe.chosen(self._domains[frame.recipe.domain])
            scored = score(domain, frame, lambda: stale() or self.frame is not frame)
            if scored is not frame:
                self._say(self._hint(scored), frame, scored)
        except Exception as error:  # as in _draw
            self.message = one_line(error)

    def _say(self, hint: str, frame: Frame, scored: Frame | None = None) -> None:
        """Show the hint and the scores of ``frame``, if it is still the one on show."""
        with self._lock:
            if self.frame is frame:
                self.frame = scored or frame
                if frame.recipe == self.recipe:
                    self.hint, self._hinted = hint, (frame.recipe.prompt, frame.recipe.mapper)

    # ---- slow tasks, one after the other ----

    def _task(self, what: str, job: Callable[[], str]) -> None:
        """Run ``job`` in the tasks' thread. :attr:`note` is ``what`` meanwhile, then what ``job`` returns."""

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

    def add_photo(self, content: bytes, points: Sequence[Sequence[float]] = (), name: str = "photo") -> None:
        """Invert a photo, lock it, and put it before the other faces; the last unlocked face may make room.

        Its code is written to ``out``/faces. For its alignment see :func:`cfclip.inversion.align.load_photo`.
        """

        def job() -> str:
            folder, domain = self.out / "faces", self.domain
            path, warned = photos.invert(domain, content, points, str(name), self.photo_steps, folder)
            others = [face for face in self.recipe.faces if face != path]
            if len(others) >= min(self.n, MAX_FACES):
                others.remove(next((face for face in others[::-1] if face not in self.locked), others[-1]))
            self.lock(path)
            self.change(faces=(path, *others))
            photo = photos.find_photo(path, domain.generator.resolution)
            return "; ".join([f"{photo.name} was inverted: {photo.advice}", *warned])

        self._task("inverting the photo …", job)

    def export(self) -> None:
        """Write the picture on show, its animation, the recipe and its cell into ``out``."""

        def job() -> str:
            self._drawing.wait()
            if self.frame is None or self.frame.recipe != self.recipe:
                why = f": {self.message}" if self.message else ""
                raise ValueError(f"there is no picture of this recipe to export{why}")
            self.exported = export(self.out, self.domain, self.frame)
            names = ", ".join(path.name for path in self.exported)
            return f"exported: {names}" + ("" if ".mp4" in names else f"; for an MP4 too: {FILM_NEEDS}")

        self._task("exporting …", job)

    def open(self, text: str | bytes) -> None:
        """Open an exported recipe (.json). If it cannot be drawn, it is refused before anything changes."""

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
            faces = draw_faces(domain, recipe.faces[:4])
            where = self.out, faces, self._on_training, self._start(recipe)
            training = Training(domain, recipe, method, settings, *where)
        except Exception as error:  # as in _draw
            self.message = one_line(error)
            return
        self.training, self.progress, self.preview, self.refining = training, 0.0, {}, training.words
        training.start()

    def _start(self, recipe: Recipe) -> Mapper | None:
        """The mapper of the current edit, to start from; None if there is none, or another kind of editor."""
        if recipe.uses_editor or not recipe.prompts:
            return None
        try:
            return recipe.open_mappers(self.domain)[0]
        except ValueError:
            return None

    def _on_training(self, training: Training) -> None:
        self.progress, self.preview, self.refining = training.progress, training.preview, training.words
        if not training.done:
            return
        self.training, self._seconds_a_step = None, training.seconds_a_step
        self.message = training.error or self.message
        if training.path is not None:
            self.find_mappers()
            if (self.recipe.domain, self.recipe.prompts) == (training.recipe.domain, training.recipe.prompts):
                self.set_mapper(str(training.path))
                self.refresh()  # even if the path is the same: the file holds a new mapper

    def cancel(self) -> None:
        if (training := self.training) is not None:
            training.cancel()

    def keep(self) -> None:
        """End the training, and edit with the mapper of the last preview."""
        if (training := self.training) is not None:
            training.keep()

    # ---- the end ----

    def wait(self, timeout: float = 60.0) -> bool:
        """Wait until everything requested is done, except a training; False after ``timeout`` seconds."""
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
