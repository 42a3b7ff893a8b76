"""The explorer as ipywidgets: each control calls a method of the model, each trait is shown in one place."""

import html
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ipywidgets as ipw
from ipywidgets import Layout

from cfclip.explorer.frames import SHOWS, encode
from cfclip.explorer.model import Explorer
from cfclip.explorer.recipe import MAX_FACES, MAX_STRENGTH, MIN_STRENGTH, describe, levels_on
from cfclip.explorer.workers import REFINING
from cfclip.models.mapper import LEVELS

MAX_ROWS = 12
"""The most rows of pictures."""

STYLE = """<style>
.cfx { padding: 14px 16px; border-radius: 10px; border: 1px solid var(--jp-border-color2, #ddd);
  max-width: 1180px; }
.cfx .widget-label, .cfx .cfx-label { color: var(--jp-ui-font-color1, #333); }
.cfx-label { text-align: right; padding-right: 10px; line-height: 1.25; overflow-wrap: anywhere; }
.cfx-row { overflow: hidden; align-items: center; }
.cfx-row img { display: block; width: 100%; height: auto; margin: 0; border-radius: 6px; }
.cfx .cfx-face { flex: 1 1 0; min-width: 0; margin: 0 2px; height: 22px; line-height: 22px; padding: 0;
  font-size: 11px; border-radius: 11px; box-shadow: none; background: transparent;
  color: var(--jp-ui-font-color2, #666); }
.cfx .cfx-face.mod-active { background: var(--jp-brand-color1, #1976d2); color: white; }
.cfx .cfx-face:disabled { opacity: 1; }
.cfx .cfx-level { width: 74px; border-radius: 14px; box-shadow: none;
  background: var(--jp-layout-color2, #eee); }
.cfx .cfx-level.mod-active { background: var(--jp-brand-color1, #1976d2); color: white; }
.cfx-scores { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 8px; }
.cfx-scores div { background: var(--jp-layout-color2, #f3f3f3); border-radius: 8px; padding: 5px 10px;
  line-height: 1.35; }
.cfx-scores span { display: block; font-size: 11px; color: var(--jp-ui-font-color2, #666); }
.cfx-scores b { font-size: 14px; font-weight: 600; color: var(--jp-ui-font-color1, #222);
  white-space: nowrap; }
.cfx-message { background: #fdecea; color: #8a1c12; border-left: 4px solid #d93025; border-radius: 6px;
  padding: 7px 12px; line-height: 1.4; }
.cfx-note { color: var(--jp-ui-font-color2, #666); font-size: 12px; min-height: 18px; line-height: 18px;
  overflow-wrap: anywhere; }
</style>"""

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


def scores_html(scores: Mapping[str, float]) -> str:
    """Tiles with the means over the faces."""
    tiles = []
    for title, before, after, form in SCORES:
        if after in scores:
            values = [form.format(scores[name]) for name in (before, after) if name in scores]
            tiles.append(f"<div><span>{title}</span><b>{' → '.join(values)}</b></div>")
    return f'<div class="cfx-scores">{"".join(tiles)}</div>'


def _named(widget: ipw.Widget, css_class: str) -> ipw.Widget:
    return widget.add_class(css_class) if css_class else widget


def _row(*children: ipw.Widget, name: str = "", **layout: Any) -> ipw.Box:
    return _named(ipw.HBox(children, layout=Layout(**layout)), name)


def _wrapped(*children: ipw.Widget) -> ipw.Box:
    return _row(*children, flex_flow="row wrap")


def _button(text: str, icon: str, call: Callable[[], Any]) -> ipw.Button:
    button = ipw.Button(description=text, icon=icon, layout=Layout(width="auto"))
    button.on_click(lambda _: call())
    return button


def _upload(text: str, accept: str, call: Callable[[bytes], Any]) -> ipw.FileUpload:
    upload = ipw.FileUpload(accept=accept, description=text, layout=Layout(width="auto"))
    upload.observe(lambda change: [call(bytes(file["content"])) for file in change["new"]], "value")
    return upload


def _label() -> ipw.HTML:
    return ipw.HTML(layout=Layout(width="92px", flex="0 0 92px", margin="0"))


class View(ipw.VBox):
    """The panel of one explorer."""

    def __init__(self, explorer: Explorer):
        self.explorer = explorer
        self._shown_rows: Mapping | None = None  # of the frame that the images show
        self._thread = threading.local()  # the user may act while a worker's thread updates controls
        self.message, self.note = _named(ipw.HTML(), "cfx-alert"), ipw.HTML()
        self.scores = ipw.HTML(layout=Layout(margin="6px 0 0 0"))
        titles = ("Where", "Layers", "Faces", "History", "Refine", "Export")
        tabs = [self._where(), self._layers(), self._faces(), self._history(), self._refine(), self._export()]
        tab = ipw.Tab(tabs, titles=titles, layout=Layout(margin="8px 0 0 0"))
        style = ipw.HTML(STYLE, layout=Layout(height="0", margin="0"))
        super().__init__([style, self._top(), self.message, self._pictures(), self.scores, self.note, tab])
        self.add_class("cfx")
        for names, show in (
            (["recipe", "mappers"], self._show_recipe),
            (["frame"], self._show_frame),
            (["message", "note", "busy"], self._show_words),
            (["locked"], self._show_locks),
            (["history", "at"], self._show_history),
            (["training", "progress", "preview"], self._show_training),
        ):
            explorer.observe(lambda change, show=show: show(), names)
            show()

    # ---- the controls: the user's changes go to the model ----

    def _on_user(self, widget: ipw.Widget, call: Callable[[Any], Any]) -> ipw.Widget:
        """``call(value)`` when the user changes ``widget``, not when :meth:`_updating` does."""

        def changed(change: Any) -> None:
            if not getattr(self._thread, "updating", False):
                call(change["new"])

        widget.observe(changed, "value")
        return widget

    @contextmanager
    def _updating(self) -> Iterator[None]:
        """Controls that this thread changes inside do not call the model."""
        self._thread.updating = True
        try:
            yield
        finally:
            self._thread.updating = False

    def _control(self, kind: type, text: str, flex: str, call: Callable, name: str = "", **options) -> Any:
        """A control of the top rows."""
        layout = Layout(flex=flex, width="auto")
        widget = kind(description=text, layout=layout, style={"description_width": "58px"}, **options)
        return _named(self._on_user(widget, call), name)

    def _top(self) -> ipw.Widget:
        e, control = self.explorer, self._control
        free = {"placeholder": "green lipstick + blue hair", "ensure_option": False}
        self.prompt = control(ipw.Combobox, "prompt", "3 1 260px", e.set_prompt, "cfx-prompt", **free)
        self.source_text = control(ipw.Text, "source", "1 1 150px", lambda text: e.change(source_text=text))
        limits = {"min": MIN_STRENGTH, "max": MAX_STRENGTH, "step": 0.05, "readout_format": ".2f"}
        self.strength = control(
            ipw.FloatSlider, "strength", "3 1 300px", lambda s: e.change(strength=s), "cfx-strength", **limits
        )
        self.levels = {}
        for name in LEVELS:
            level = _named(ipw.ToggleButton(description=name), "cfx-level")
            self.levels[name] = self._on_user(level, lambda on, name=name: e.set_levels(**{name: on}))
        self.show = control(ipw.Dropdown, "show", "1 1 200px", e.set_show, options=SHOWS)
        self.domain = control(ipw.Dropdown, "domain", "1 1 150px", e.choose_domain, options=e.domains)
        self.label = control(ipw.BoundedIntText, "class", "1 1 110px", lambda i: e.change(label=i), min=0)
        self.mapper = control(ipw.Dropdown, "mapper", "3 1 260px", e.set_mapper)
        return ipw.VBox([
            _wrapped(self.prompt, self.source_text),
            _wrapped(self.strength, *self.levels.values()),
            _wrapped(self.mapper, self.domain, self.label, self.show),
        ])

    def _pictures(self) -> ipw.Widget:
        self.locks, tip = [], "keep this face when new ones are drawn"
        for i in range(MAX_FACES):
            lock = _named(ipw.ToggleButton(layout=Layout(display="none"), tooltip=tip), "cfx-face")
            self._on_user(lock, lambda on, i=i: self.explorer.lock(self.explorer.recipe.faces[i], on))
            self.locks.append(lock)
        self.labels = [_label() for _ in range(MAX_ROWS)]
        self.images, self.rows, fill = [], [], {"flex": "1 1 auto", "min_width": "0"}
        for label in self.labels:
            image = ipw.Image(format="png", layout=Layout(width="100%", margin="0"))
            picture = ipw.Box([image], layout=Layout(**fill))
            self.images.append(image)
            self.rows.append(_row(label, picture, name="cfx-row", display="none", margin="2px 0"))
        headers = _row(_label(), _row(*self.locks, **fill), margin="8px 0 2px 0")
        return ipw.VBox([headers, *self.rows])

    def _where(self) -> ipw.Widget:
        e = self.explorer
        parts = [(part.replace("_", " "), part) for part in e.parts]
        region = ipw.Dropdown(description="edit only", options=[("everything", ""), *parts, ("a box", "box")])
        self.region = self._on_user(region, self._set_region)
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
        self.layer_box = _wrapped()
        text = "Factor of the strength per layer of W+: shapes on the left, colours on the right."
        return ipw.VBox([ipw.HTML(text), self.layer_box])

    def _layer_slider(self, i: int) -> ipw.Widget:
        limits = {"value": 1, "min": 0, "max": 2, "step": 0.05, "readout_format": ".2g"}
        layout = Layout(width="52px", height="130px")
        slider = ipw.FloatSlider(description=str(i), orientation="vertical", layout=layout, **limits)
        return self._on_user(slider, self._set_layers)

    def _set_layers(self, _: Any) -> None:
        self.explorer.change(layers=tuple(slider.value for slider in self.layer_box.children))

    def _faces(self) -> ipw.Widget:
        e = self.explorer
        seeds = ipw.Text(description="seeds", continuous_update=False, layout=Layout(width="260px"))
        self.seeds = self._on_user(seeds, e.set_seeds)
        new, photo = _button("new faces", "random", e.new_faces), _upload("own photo", "image/*", e.add_photo)
        text = "Press the number above a face to keep that face. A photo is aligned, and inverted to a code."
        return ipw.VBox([_wrapped(new, self.seeds, photo), ipw.HTML(text)])

    def _history(self) -> ipw.Widget:
        e = self.explorer
        self.undo, self.redo = _button("undo", "undo", e.undo), _button("redo", "repeat", e.redo)
        self.entries = self._on_user(ipw.Select(rows=5, layout=Layout(width="420px")), e.go)
        return _row(self.entries, ipw.VBox([self.undo, self.redo]))

    def _refine(self) -> ipw.Widget:
        e = self.explorer
        method = ipw.Dropdown(options=REFINING, description="method")
        self.start = _button("train for this prompt", "play", lambda: e.refine(method.value))
        self.cancel = _button("cancel", "stop", e.cancel)
        self.progress = ipw.FloatProgress(min=0, max=1, layout=Layout(width="220px"))
        self.preview = ipw.Image(format="png", layout=Layout(width="440px", display="none"))
        return ipw.VBox([_wrapped(method, self.start, self.cancel, self.progress), self.preview])

    def _export(self) -> ipw.Widget:
        e = self.explorer
        write = _named(_button("export PNG, GIF, recipe", "download", e.export), "cfx-export")
        text = ipw.HTML("The cell below draws this picture again, identical to the bit:")
        self.code = ipw.Textarea(rows=12, disabled=True, layout=Layout(width="100%"))
        return ipw.VBox([_row(write, _upload("open a recipe", ".json", e.open), text), self.code])

    # ---- the model's traits are shown ----

    def _show_recipe(self) -> None:
        e, recipe = self.explorer, self.explorer.recipe
        num_ws, split = e.domain.generator.num_ws, e.domain.level_split
        with self._updating():
            self.prompt.options, self.prompt.value = e.suggestions, recipe.prompt
            self.source_text.placeholder, self.source_text.value = e.domain.source_text, recipe.source_text
            self.strength.value = recipe.strength
            self.seeds.value = ", ".join(str(face) for face in recipe.faces if isinstance(face, int))
            for name, on in levels_on(recipe.layers, num_ws, split).items():
                self.levels[name].value = on
            mappers = [("the domain's own", ""), *((label, path) for path, (label, _) in e.mappers.items())]
            if recipe.mapper and recipe.mapper not in e.mappers:
                mappers.append((recipe.mapper, recipe.mapper))
            if self.mapper.options != tuple(mappers):
                self.mapper.options = mappers
            self.mapper.value = recipe.mapper
            self.domain.options, self.domain.value = e.domains, recipe.domain
            self.label.layout.display = "" if e.classes else "none"
            self.label.max = max(0, e.classes - 1)
            self.label.value = e.domain.label or 0
            is_box = isinstance(recipe.region, tuple)
            self.region.value = "box" if is_box else recipe.region if recipe.region in e.parts else ""
            self.across.disabled = self.down.disabled = not is_box
            if is_box:
                left, top, right, bottom = recipe.region
                self.across.value, self.down.value = (left, right), (top, bottom)
            if len(self.layer_box.children) != num_ws:
                self.layer_box.children = [self._layer_slider(i) for i in range(num_ws)]
            for slider, value in zip(self.layer_box.children, recipe.layers or (1.0,) * num_ws, strict=False):
                slider.value = value
            self.code.value = recipe.code()
        self._show_locks()

    def _show_frame(self) -> None:
        if (frame := self.explorer.frame) is None:
            return
        shown = list(frame.rows.items())
        for i, (row, label, image) in enumerate(zip(self.rows, self.labels, self.images, strict=True)):
            if i < len(shown):
                label.value = f'<div class="cfx-label">{html.escape(shown[i][0])}</div>'
                if frame.rows is not self._shown_rows:  # else only the scores are new
                    image.value = encode(shown[i][1])
            row.layout.display = "" if i < len(shown) else "none"
        self._shown_rows = frame.rows
        if frame.scores or not frame.recipe.prompts:
            self.scores.value = scores_html(frame.scores)
        self._show_locks()

    def _show_locks(self) -> None:
        e, frame = self.explorer, self.explorer.frame
        headers = frame.headers if frame else ()
        columns_are_faces = frame is not None and frame.show != "prompts × strengths"
        faces = frame.recipe.faces if columns_are_faces else ()
        with self._updating():
            for i, lock in enumerate(self.locks):
                lock.layout.display = "" if i < len(headers) else "none"
                lock.description, lock.disabled = (
                    headers[i] if i < len(headers) else "",
                    not columns_are_faces,
                )
                lock.value = i < len(faces) and faces[i] in e.locked
                lock.icon = "lock" if lock.value else ""

    def _show_words(self) -> None:
        e, message = self.explorer, html.escape(self.explorer.message)
        self.message.value = f'<div class="cfx-message" role="alert">{message}</div>' if message else ""
        state = "drawing …" if e.busy else f"{1000 * e.frame.seconds:.0f} ms" if e.frame else ""
        note = html.escape(" · ".join(part for part in (state, e.note) if part))
        self.note.value = f'<div class="cfx-note">{note}</div>'

    def _show_history(self) -> None:
        e = self.explorer
        with self._updating():
            self.entries.options = [(f"{i + 1}. {describe(recipe)}", i) for i, recipe in enumerate(e.history)]
            self.entries.value = e.at if e.at < len(e.history) else None
        self.undo.disabled, self.redo.disabled = e.at == 0, e.at >= len(e.history) - 1

    def _show_training(self) -> None:
        e = self.explorer
        self.start.disabled, self.cancel.disabled = e.training is not None, e.training is None
        self.progress.value = e.progress
        self.preview.layout.display = "none" if e.preview is None else ""
        if e.preview is not None:
            self.preview.value = encode(e.preview)
