"""The explorer as ipywidgets: each control calls a method of the model, each trait is shown in one place."""

import html
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import ipywidgets as ipw
from ipywidgets import Layout

from cfclip.explorer.frames import SHOWS, Frame, edit_label
from cfclip.explorer.model import Explorer
from cfclip.explorer.photos import asks_for_points
from cfclip.explorer.recipe import MAX_STRENGTH, MIN_STRENGTH, brief, describe, levels_on
from cfclip.explorer.stage import Stage
from cfclip.explorer.workers import REFINING
from cfclip.models.mapper import LEVELS, level_slices

MAX_CHIPS = 8
MAX_LABEL = 60
TYPES = {
    ".png": "image/png",
    ".gif": "image/gif",
    ".mp4": "video/mp4",
    ".json": "application/json",
    ".py": "text/x-python",
}
"""Suffix of an exported file -> its MIME type."""

SCORES = (
    ("CLIP", "clip_before", "clip_after", "{:.1f}"),
    ("held-out CLIP", "heldout_clip_before", "heldout_clip_after", "{:.1f}"),
    ("CLIP direction", None, "clip_direction", "{:.1f}"),
    ("identity", None, "identity", "{:.3f}"),
    ("LPIPS (AlexNet)", None, "lpips_alex", "{:.3f}"),
    ("LPIPS (readout)", None, "lpips_readout", "{:.3f}"),
    ("success", "success_before", "success_after", "{:.0%}"),
    ("progress", None, "progress", "{:.0%}"),
    ("leakage", None, "leakage", "{:.3f}"),
)
"""Title of a score, its metrics before and after the edit, and its format."""


def scores_html(scores: Mapping[str, float], of_photos: Mapping[str, float] | None = None) -> str:
    """Tiles with the means over generated faces, and below them the means over photos."""
    tiles, of_photos = [], of_photos or {}
    for title, before, after, form in SCORES:
        if after in scores or after in of_photos:
            each = (scores, of_photos)
            values = [[form.format(one[name]) for name in (before, after) if name in one] for one in each]
            faces, photos = (" → ".join(value) for value in values)
            photos = f"<i>photos: {photos}</i>" if photos else ""
            tiles.append(f"<div><span>{title}</span><b>{faces or '–'}</b>{photos}</div>")
    return f'<div class="cfx-scores">{"".join(tiles)}</div>'


def _wrapped(*children: ipw.Widget) -> ipw.Box:
    return ipw.HBox(children, layout=Layout(flex_flow="row wrap"))


def _button(text: str, icon: str, call: Callable[[], Any], tip: str = "") -> ipw.Button:
    button = ipw.Button(description=text, icon=icon, tooltip=tip, layout=Layout(width="auto"))
    button.on_click(lambda _: call())
    return button


def _offer(choice: ipw.Dropdown, options: Iterable[Any], chosen: Any) -> None:
    """Show ``chosen`` of ``options``. Equal options are not set again: that would move the choice."""
    if choice.options != (options := tuple(options)):
        choice.options = options
    choice.value = chosen


def _box(kind: str, text: str, role: str = "status") -> str:
    return f'<div class="{kind}" role="{role}">{html.escape(text)}</div>' if text else ""


class View(ipw.VBox):
    """The panel of one explorer."""

    def __init__(self, explorer: Explorer):
        self.explorer = explorer
        self._thread = threading.local()  # the user may act while a worker's thread updates controls
        self.stage = Stage(main=True)
        self.stage.on_msg(lambda _, content, buffers: self._heard(content, buffers))
        self.message, self.hint, self.note = ipw.HTML(), ipw.HTML(), ipw.HTML()
        self.scores = ipw.HTML(layout=Layout(margin="6px 0 0 0"))
        titles = ("Where", "Layers", "Faces", "History", "Refine", "Export")
        tabs = [self._where(), self._layers(), self._faces(), self._history(), self._refine(), self._export()]
        self.tab = ipw.Tab(tabs, titles=titles, layout=Layout(margin="8px 0 0 0"))
        top = self._top()
        super().__init__([top, self.message, self.hint, self.stage, self.scores, self.note, self.tab])
        self.add_class("cfx")
        for names, show in (
            (["recipe", "mappers"], self._show_recipe),
            (["frame"], self._show_frame),
            (["message", "hint", "note", "busy"], self._show_words),
            (["locked"], self._show_faces),
            (["history", "at"], self._show_history),
            (["training", "progress", "preview", "refining"], self._show_training),
            (["exported"], self._show_exported),
        ):
            explorer.observe(lambda change, show=show: show(), names)
            show()
        for widget in self._widgets(self):  # None would be shown as "null"
            if getattr(widget, "tooltip", "") is None:
                widget.tooltip = ""

    def _widgets(self, widget: ipw.Widget) -> Iterator[ipw.Widget]:
        yield widget
        for child in getattr(widget, "children", ()):
            yield from self._widgets(child)

    # ---- events of the pictures and the keys ----

    def _heard(self, content: Mapping[str, Any], buffers: Sequence[Any]) -> None:
        e, faces = self.explorer, self.explorer.frame.recipe.faces if self.explorer.frame else ()
        event, place = content.get("event"), content.get("face")
        face = faces[place] if isinstance(place, int) and 0 <= place < len(faces) else None
        if event == "ping":
            self.stage.send({"pong": True})
        elif event == "lock" and face is not None:
            e.lock(face, face not in e.locked)
        elif event == "remove" and face is not None:
            e.remove(face)
        elif event == "photo" and buffers:
            e.add_photo(bytes(buffers[0]), content.get("points", ()), content.get("name", "photo"))
        elif event == "recipe":
            e.open(content.get("text", ""))
        elif event == "refused":
            e.message = brief(str(content.get("why")), MAX_LABEL)
        elif event == "key" and content.get("key") in self.KEYS:
            self.KEYS[content["key"]](e)

    KEYS: ClassVar[dict[str, Callable[[Explorer], None]]] = {
        "ArrowUp": lambda e: e.stronger(0.1),
        "ArrowDown": lambda e: e.stronger(-0.1),
        "z": Explorer.undo,
        "y": Explorer.redo,
        "n": Explorer.new_faces,
    }

    # ---- the controls: the user's changes go to the model ----

    def _on_user(self, widget: ipw.Widget, call: Callable[[Any], Any]) -> ipw.Widget:
        """Make ``widget`` run ``call(value)`` when the user changes it, but not inside :meth:`_updating`."""

        def changed(change: Any) -> None:
            if not getattr(self._thread, "updating", False):
                call(change["new"])

        widget.observe(changed, "value")
        return widget

    @contextmanager
    def _updating(self) -> Iterator[None]:
        """A context in which this thread can change controls without calling the model."""
        self._thread.updating = True
        try:
            yield
        finally:
            self._thread.updating = False

    def _control(self, kind: type, text: str, flex: str, call: Callable, **options) -> Any:
        """A control of the top rows."""
        layout = Layout(flex=flex, width="auto")
        widget = kind(description=text, layout=layout, style={"description_width": "58px"}, **options)
        return self._on_user(widget, call)

    def _top(self) -> ipw.Widget:
        e, control = self.explorer, self._control
        free = {"placeholder": "green lipstick + blue hair", "ensure_option": False}
        self.prompt = control(ipw.Combobox, "prompt", "3 1 260px", e.set_prompt, **free)
        self.prompt.add_class("cfx-prompt")
        self.source_text = control(ipw.Text, "source", "1 1 150px", lambda text: e.change(source_text=text))
        self.chips = _wrapped()
        limits = {"min": MIN_STRENGTH, "max": MAX_STRENGTH, "step": 0.05, "readout_format": ".2f"}
        strength = control(ipw.FloatSlider, "strength", "3 1 300px", lambda s: e.change(strength=s), **limits)
        self.strength = strength.add_class("cfx-strength")
        self.levels = {}
        for name in LEVELS:
            level = ipw.ToggleButton(description=name).add_class("cfx-level")
            self.levels[name] = self._on_user(level, lambda on, name=name: e.set_levels(**{name: on}))
        self.show = control(ipw.Dropdown, "show", "1 1 200px", e.set_show, options=SHOWS)
        self.domain = control(ipw.Dropdown, "domain", "1 1 150px", e.choose_domain, options=e.domains)
        self.label = control(ipw.BoundedIntText, "class", "1 1 110px", lambda i: e.change(label=i), min=0)
        self.mapper = control(ipw.Dropdown, "mapper", "3 1 260px", e.set_mapper)
        self.undo, self.redo = _button("undo", "undo", e.undo, "z"), _button("redo", "repeat", e.redo, "y")
        new = _button("new faces", "random", e.new_faces, "n; faces that are kept stay")
        return ipw.VBox([
            _wrapped(self.prompt, self.source_text),
            self.chips,
            _wrapped(self.strength, *self.levels.values()),
            _wrapped(self.mapper, self.domain, self.label, self.show),
            _wrapped(self.undo, self.redo, new),
        ])

    def _where(self) -> ipw.Widget:
        self.region = self._on_user(ipw.Dropdown(description="edit only"), self._set_region)
        limits = {"value": (0.2, 0.8), "min": 0, "max": 1, "step": 0.02, "disabled": True}
        self.across, self.down = (
            self._on_user(ipw.FloatRangeSlider(description=text, **limits), self._set_region)
            for text in ("across", "down")
        )
        return _wrapped(self.region, self.across, self.down)

    def _set_region(self, _: Any) -> None:
        (left, right), (top, bottom) = self.across.value, self.down.value
        is_box = self.region.value == "box"
        self.explorer.change(region=(left, top, right, bottom) if is_box else self.region.value)

    def _layers(self) -> ipw.Widget:
        self.layer_box, self.layer_words = _wrapped(), ipw.HTML()
        return ipw.VBox([self.layer_words, self.layer_box])

    def _layer_slider(self, i: int) -> ipw.Widget:
        limits = {"value": 1, "min": 0, "max": 2, "step": 0.05, "readout_format": ".2g"}
        look = {"orientation": "vertical", "layout": Layout(width="56px", height="150px"), "tooltip": ""}
        slider = ipw.FloatSlider(description=str(i), **look, **limits)
        return self._on_user(slider.add_class("cfx-layer"), self._set_layers)

    def _set_layers(self, _: Any) -> None:
        self.explorer.change(layers=tuple(slider.value for slider in self.layer_box.children))

    def _faces(self) -> ipw.Widget:
        seeds = ipw.Text(description="seeds", continuous_update=False, layout=Layout(width="260px"))
        self.seeds = self._on_user(seeds, self.explorer.set_seeds)
        text = "Press the number above a face to keep that face. A photo is aligned, and inverted to a code."
        return ipw.VBox([self.seeds, ipw.HTML(text)])

    def _history(self) -> ipw.Widget:
        entries = ipw.Select(rows=5, layout=Layout(width="min(420px, 100%)"))
        self.entries = self._on_user(entries, self.explorer.go)
        return self.entries

    def _refine(self) -> ipw.Widget:
        e = self.explorer
        method = ipw.Dropdown(options=REFINING, description="method")
        self.start = _button("train for this prompt", "play", lambda: e.refine(method.value))
        self.cancel = _button("cancel", "stop", e.cancel, "end the training; keep nothing")
        self.keep = _button("keep this one", "check", e.keep, "end the training; keep what is seen")
        for button, name in (self.start, "refine"), (self.cancel, "cancel"), (self.keep, "keep"):
            button.add_class(f"cfx-{name}")
        self.progress = ipw.FloatProgress(min=0, max=1, layout=Layout(width="220px"))
        self.refining = ipw.HTML()
        self.preview = Stage(fixed=True, layout=Layout(max_width="560px"))
        buttons = _wrapped(method, self.start, self.keep, self.cancel, self.progress)
        return ipw.VBox([buttons, self.refining, self.preview])

    def _export(self) -> ipw.Widget:
        e = self.explorer
        write = _button("export PNG, GIF, MP4, recipe, cell", "save", e.export).add_class("cfx-export")
        look = {"description": "open a recipe", "tooltip": "", "layout": Layout(width="auto")}
        opened = ipw.FileUpload(accept=".json", **look)
        opened.observe(lambda change: [e.open(bytes(file["content"])) for file in change["new"]], "value")
        copy = _button("copy", "copy", lambda: self.stage.send({"copy": self.code.value}), "copy the cell")
        text = ipw.HTML("The cell below draws this picture again, identical to the bit:")
        self.downloads = _wrapped()
        self.code = ipw.Textarea(rows=12, disabled=True, layout=Layout(width="100%"))
        return ipw.VBox([_wrapped(write, opened), self.downloads, _wrapped(text, copy), self.code])

    def _download_button(self, file: Path) -> ipw.Button:
        def send() -> None:
            self.stage.send({"download": file.name, "type": TYPES[file.suffix]}, [file.read_bytes()])

        return _button(f"download {file.suffix[1:]}", "download", send, file.name).add_class("cfx-download")

    # ---- the model's traits are shown ----

    def _show_recipe(self) -> None:
        e, recipe = self.explorer, self.explorer.recipe
        num_ws, split = e.domain.generator.num_ws, e.domain.level_split
        with self._updating():
            self.prompt.options, self.prompt.value = tuple(e.suggestions), recipe.prompt
            self.source_text.placeholder, self.source_text.value = e.domain.source_text, recipe.source_text
            self.strength.value = recipe.strength
            self.seeds.value = ", ".join(str(face) for face in recipe.faces if isinstance(face, int))
            for name, on in levels_on(recipe.layers, num_ws, split).items():
                self.levels[name].value = on
            mappers = [("the domain's own", ""), *((label, path) for path, (label, _) in e.mappers.items())]
            if isinstance(recipe.mapper, tuple):
                mappers.append(("each prompt its own", recipe.mapper))
            elif recipe.mapper and recipe.mapper not in e.mappers:
                mappers.append((recipe.mapper, recipe.mapper))
            _offer(self.mapper, mappers, recipe.mapper)
            _offer(self.domain, e.domains, recipe.domain)
            self.stage.align = asks_for_points(e.domain)
            self.label.layout.display = "" if e.classes else "none"
            self.label.max = max(0, e.classes - 1)
            self.label.value = e.domain.label or 0
            is_box = isinstance(recipe.region, tuple)
            parts = ((part.replace("_", " "), part) for part in e.parts)
            region = "box" if is_box else recipe.region if recipe.region in e.parts else ""
            _offer(self.region, [("everything", ""), *parts, ("a box", "box")], region)
            self.across.disabled = self.down.disabled = not is_box
            if is_box:
                left, top, right, bottom = recipe.region
                self.across.value, self.down.value = (left, right), (top, bottom)
            if len(self.layer_box.children) != num_ws:
                self.layer_box.children = [self._layer_slider(i) for i in range(num_ws)]
            for slider, value in zip(self.layer_box.children, recipe.layers or (1.0,) * num_ws, strict=False):
                slider.value = value
            self.code.value = recipe.code()
        self._show_chips()
        self._show_age()

    def _show_chips(self) -> None:
        """Prompts that work, with the share of faces that they work on."""
        e, chips = self.explorer, list(self.explorer.suggestions.items())[:MAX_CHIPS]
        words = tuple(prompt if share is None else f"{prompt} {share:.0%}" for prompt, share in chips)
        if tuple(chip.description for chip in self.chips.children) != words:
            tip = "a prompt that works; the share of faces on which its success was measured"
            self.chips.children = [
                _button(text, "", lambda prompt=prompt: e.set_prompt(prompt), tip).add_class("cfx-chip")
                for text, (prompt, _) in zip(words, chips, strict=True)
            ]

    def _show_age(self) -> None:
        """Grey the scores unless they were measured for the current recipe."""
        frame = self.explorer.frame
        old = frame is None or frame.recipe != self.explorer.recipe or not frame.notes
        (self.scores.add_class if old else self.scores.remove_class)("cfx-scores-old")

    def _show_frame(self) -> None:
        if (frame := self.explorer.frame) is None:
            return
        rows = {brief(label, MAX_LABEL): row for label, row in frame.rows.items()}
        labels, edited = list(frame.rows), edit_label(frame.recipe)
        faces = frame.show != "prompts × strengths"
        zero = "× 0"
        if faces:
            before = {"row": labels.index("source" if "source" in labels else zero)}
        else:
            before = {"column": frame.headers.index(zero)}
        at = labels.index(edited) if faces and edited in labels else -1
        about = {"faces": self._heads(frame), "notes": list(frame.notes), "fixed": not faces}
        self.stage.show(rows, frame.sketch, note_row=at, before=before, **about)
        if frame.notes:
            self.scores.value = scores_html(frame.scores, frame.photo_scores)
        elif not frame.recipe.prompts:
            self.scores.value = ""
        self._show_age()
        self._show_moved(frame.moved)

    def _heads(self, frame: Frame) -> list[dict[str, Any]]:
        faces = frame.recipe.faces if frame.show != "prompts × strengths" else (None,) * len(frame.headers)
        each, locked = zip(faces, frame.headers, frame.tips, strict=True), self.explorer.locked
        return [
            {"title": title, "tip": tip, "locked": face in locked, "photo": isinstance(face, str)}
            for face, title, tip in each
        ]

    def _show_faces(self) -> None:
        if (frame := self.explorer.frame) is not None:
            self.stage.faces = self._heads(frame)

    def _show_moved(self, moved: Sequence[bool]) -> None:
        """Disable the levels and layers that the mapper does not move."""
        for name, layers in level_slices(self.explorer.domain.level_split).items():
            level, dead = self.levels[name], not any(moved[layers])
            level.disabled, level.tooltip = dead, "this mapper does not move these layers" if dead else ""
        for slider, moves in zip(self.layer_box.children, moved, strict=False):
            slider.disabled = not moves
        words = "Factor of the strength per layer of W+: shapes on the left, colours on the right."
        self.layer_words.value = words + ("" if all(moved) else " This mapper does not move the grey ones.")

    def _show_words(self) -> None:
        e = self.explorer
        self.message.value = _box("cfx-message", e.message, "alert")
        self.hint.value = _box("cfx-hint", "" if e.message else e.hint)
        self.stage.busy = e.busy
        state = "drawing …" if e.busy else f"{1000 * e.frame.seconds:.0f} ms" if e.frame else ""
        self.note.value = _box("cfx-note", " · ".join(part for part in (state, e.note) if part)) or "<br>"

    def _show_history(self) -> None:
        e = self.explorer
        with self._updating():
            self.entries.options = [(f"{i + 1}. {describe(recipe)}", i) for i, recipe in enumerate(e.history)]
            self.entries.value = e.at if e.at < len(e.history) else None
        self.undo.disabled, self.redo.disabled = e.at == 0, e.at >= len(e.history) - 1

    def _show_training(self) -> None:
        e, running = self.explorer, self.explorer.training is not None
        self.start.disabled, self.cancel.disabled, self.keep.disabled = running, not running, not running
        self.progress.value = e.progress
        self.refining.value = _box("cfx-hint", e.refining)
        self.preview.layout.display = "" if e.preview else "none"
        if e.preview:
            faces = [{"title": "", "tip": "", "locked": False, "photo": False} for _ in e.preview["source"]]
            self.preview.show(e.preview, faces=faces, before={"row": 0})

    def _show_exported(self) -> None:
        files = [file for file in self.explorer.exported if isinstance(file, Path)]
        self.downloads.children = [self._download_button(file) for file in files]
