"""ipywidgets over :class:`cfclip.explorer.Explorer`: every control calls one of its methods, every trait has one place. No logic."""

import html
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as ipw
from ipywidgets import Layout

from cfclip.explorer.frames import SHOWS, Frame, encode
from cfclip.explorer.model import Explorer
from cfclip.explorer.recipe import MOST_FACES, STRENGTHS, describe, levels_on
from cfclip.explorer.workers import REFINING
from cfclip.models.mapper import LEVELS

ROWS = 12
"""The most rows of pictures."""

STYLE = """<style>
.cfx { padding: 14px 16px; border-radius: 10px; border: 1px solid var(--jp-border-color2, #ddd); max-width: 1180px; }
.cfx .widget-label, .cfx .cfx-label { color: var(--jp-ui-font-color1, #333); }
.cfx-label { text-align: right; padding-right: 10px; line-height: 1.25; overflow-wrap: anywhere; }
.cfx-row { overflow: hidden; align-items: center; }
.cfx-row img { display: block; width: 100%; height: auto; margin: 0; border-radius: 6px; }
.cfx .cfx-face { flex: 1 1 0; min-width: 0; margin: 0 2px; height: 22px; line-height: 22px; padding: 0; font-size: 11px;
  border-radius: 11px; box-shadow: none; background: transparent; color: var(--jp-ui-font-color2, #666); }
.cfx .cfx-face.mod-active { background: var(--jp-brand-color1, #1976d2); color: white; }
.cfx .cfx-face:disabled { opacity: 1; }
.cfx .cfx-level { width: 74px; border-radius: 14px; box-shadow: none; background: var(--jp-layout-color2, #eee); }
.cfx .cfx-level.mod-active { background: var(--jp-brand-color1, #1976d2); color: white; }
.cfx-scores { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 8px; }
.cfx-scores div { background: var(--jp-layout-color2, #f3f3f3); border-radius: 8px; padding: 5px 10px; line-height: 1.35; }
.cfx-scores span { display: block; font-size: 11px; color: var(--jp-ui-font-color2, #666); }
.cfx-scores b { font-size: 14px; font-weight: 600; color: var(--jp-ui-font-color1, #222); white-space: nowrap; }
.cfx-message { background: #fdecea; color: #8a1c12; border-left: 4px solid #d93025; border-radius: 6px; padding: 7px 12px; line-height: 1.4; }
.cfx-note { color: var(--jp-ui-font-color2, #666); font-size: 12px; min-height: 18px; line-height: 18px; overflow-wrap: anywhere; }
</style>"""

SCORES = (
    ("CLIP", "clip_before", "clip_after", "{:.1f}"),
    ("held-out CLIP", "heldout_clip_before", "heldout_clip_after", "{:.1f}"),
    ("CLIP direction", None, "clip_direction", "{:.1f}"),
    ("identity", None, "identity", "{:.3f}"),
    ("LPIPS (AlexNet)", None, "lpips_alex", "{:.3f}"),
    ("LPIPS (readout)", None, "lpips_readout", "{:.3f}"),
    ("success", "success_before", "success_after", "{:.0%}"),
    ("leakage", None, "leakage", "{:.3f}"),
)
"""What a score is called, its columns before and after, how it is written."""

LABEL = "92px"


def scores_html(scores: Mapping[str, float]) -> str:
    """Tiles, means over the faces on show."""
    tiles = [
        f"<div><span>{name}</span><b>{form.format(scores[before]) + ' → ' if before in scores else ''}{form.format(scores[after])}</b></div>"
        for name, before, after, form in SCORES
        if after in scores
    ]
    return f'<div class="cfx-scores">{"".join(tiles)}</div>'


def _box(kind: type[ipw.Box], *children: ipw.Widget, name: str = "", **layout: Any) -> ipw.Box:
    return _named(kind(children, layout=Layout(**layout)), name)


def _named(widget: ipw.Widget, name: str) -> ipw.Widget:
    for one in name.split():
        widget.add_class(one)
    return widget


def _button(text: str, icon: str, call: Callable[[], Any], **layout: Any) -> ipw.Button:
    button = ipw.Button(description=text, icon=icon, layout=Layout(width="auto", **layout))
    button.on_click(lambda _: call())
    return button


class View(ipw.VBox):
    """The panel of one explorer."""

    def __init__(self, explorer: Explorer):
        self.explorer, self._drawn, self._model = explorer, None, threading.local()
        self.message, self.note = _named(ipw.HTML(), "cfx-alert"), ipw.HTML()
        self.scores = ipw.HTML(layout=Layout(margin="6px 0 0 0"))
        tabs = ipw.Tab(
            [
                self._where(),
                self._layers(),
                self._faces_tab(),
                self._history(),
                self._refine(),
                self._export(),
            ],
            titles=("Where", "Layers", "Faces", "History", "Refine", "Export"),
            layout=Layout(margin="8px 0 0 0"),
        )
        style = ipw.HTML(STYLE, layout=Layout(height="0", margin="0"))
        super().__init__([style, self._top(), self.message, self._pictures(), self.scores, self.note, tabs])
        self.add_class("cfx")
        for names, call in (
            (["recipe", "mappers"], self._on_recipe),
            (["frame"], self._on_frame),
            (["message", "note", "busy"], self._on_words),
            (["locked"], self._on_locked),
            (["history", "at"], self._on_history),
            (["training", "progress", "preview"], self._on_training),
        ):
            explorer.observe(lambda change, call=call: call(), names)
            call()

    # ---- the controls ----

    def _ask(self, widget: ipw.Widget, call: Callable[[Any], Any]) -> ipw.Widget:
        """``call(value)`` when the user changes ``widget``; not when the model does."""

        def on(change: Any) -> None:
            if not getattr(
                self._model, "speaks", False
            ):  # per thread: the user may act while a worker shows something
                call(change["new"])

        widget.observe(on, "value")
        return widget

    def _top(self) -> ipw.Widget:
        e, label = self.explorer, {"style": {"description_width": "58px"}}
        self.prompt = _named(
            self._ask(
                ipw.Combobox(
                    description="prompt",
                    placeholder="green lipstick + blue hair",
                    ensure_option=False,
                    layout=Layout(flex="3 1 260px", width="auto"),
                    **label,
                ),
                e.set_prompt,
            ),
            "cfx-prompt",
        )
        self.source_text = self._ask(
            ipw.Text(description="source", layout=Layout(flex="1 1 150px", width="auto"), **label),
            lambda text: e.change(source_text=text),
        )
        self.strength = _named(
            self._ask(
                ipw.FloatSlider(
                    min=STRENGTHS[0],
                    max=STRENGTHS[1],
                    step=0.05,
                    description="strength",
                    readout_format=".2f",
                    layout=Layout(flex="3 1 300px", width="auto"),
                    **label,
                ),
                lambda value: e.change(strength=value),
            ),
            "cfx-strength",
        )
        self.levels = {
            name: self._ask(
                _named(ipw.ToggleButton(description=name), "cfx-level"),
                lambda on, name=name: e.set_levels(**{name: on}),
            )
            for name in LEVELS
        }
        self.show = self._ask(
            ipw.Dropdown(
                options=SHOWS, description="show", layout=Layout(flex="1 1 200px", width="auto"), **label
            ),
            e.set_show,
        )
        self.domain = self._ask(
            ipw.Dropdown(
                options=e.domains,
                description="domain",
                layout=Layout(flex="1 1 150px", width="auto"),
                **label,
            ),
            e.choose_domain,
        )
        self.mapper = self._ask(
            ipw.Dropdown(description="mapper", layout=Layout(flex="3 1 260px", width="auto"), **label),
            e.set_mapper,
        )
        return _box(
            ipw.VBox,
            _box(ipw.HBox, self.prompt, self.source_text, flex_flow="row wrap"),
            _box(ipw.HBox, self.strength, *self.levels.values(), flex_flow="row wrap"),
            _box(ipw.HBox, self.mapper, self.domain, self.show, flex_flow="row wrap"),
        )

    def _pictures(self) -> ipw.Widget:
        self.locks = [
            _named(
                ipw.ToggleButton(
                    layout=Layout(display="none"), tooltip="keep this face when new ones are drawn"
                ),
                "cfx-face",
            )
            for _ in range(MOST_FACES)
        ]
        for i, lock in enumerate(self.locks):
            self._ask(lock, lambda on, i=i: self.explorer.lock(self.explorer.recipe.faces[i], on))
        self.labels = [
            ipw.HTML(layout=Layout(width=LABEL, flex=f"0 0 {LABEL}", margin="0")) for _ in range(ROWS)
        ]
        self.images = [ipw.Image(format="png", layout=Layout(width="100%", margin="0")) for _ in range(ROWS)]
        self.rows = [
            _box(
                ipw.HBox,
                label,
                _box(ipw.Box, image, flex="1 1 auto", min_width="0"),
                name="cfx-row",
                display="none",
                margin="2px 0",
            )
            for label, image in zip(self.labels, self.images, strict=True)
        ]
        headers = _box(
            ipw.HBox,
            ipw.HTML(layout=Layout(width=LABEL, flex=f"0 0 {LABEL}", margin="0")),
            _box(ipw.HBox, *self.locks, flex="1 1 auto", min_width="0"),
            margin="8px 0 2px 0",
        )
        return _box(ipw.VBox, headers, *self.rows)

    def _where(self) -> ipw.Widget:
        e = self.explorer
        options = [
            ("everything", ""),
            *((part.replace("_", " "), part) for part in e.parts),
            ("a box", "box"),
        ]
        self.region = self._ask(
            ipw.Dropdown(description="edit only", options=options),
            lambda value: self._box_changed() if value == "box" else e.change(region=value),
        )
        self.across, self.down = (
            self._ask(
                ipw.FloatRangeSlider(
                    value=(0.2, 0.8), min=0, max=1, step=0.02, description=text, disabled=True
                ),
                lambda _: self._box_changed(),
            )
            for text in ("across", "down")
        )
        return _box(ipw.HBox, self.region, self.across, self.down, flex_flow="row wrap")

    def _box_changed(self) -> None:
        if self.region.value == "box":
            (left, right), (top, bottom) = self.across.value, self.down.value
            self.explorer.change(region=(left, top, right, bottom))

    def _layers(self) -> ipw.Widget:
        self.layer_box = _box(ipw.HBox, flex_flow="row wrap")
        return _box(
            ipw.VBox,
            ipw.HTML("Times the strength, per layer of W+: shapes on the left, colours on the right."),
            self.layer_box,
        )

    def _faces_tab(self) -> ipw.Widget:
        photo = ipw.FileUpload(accept="image/*", description="own photo", layout=Layout(width="auto"))
        photo.observe(
            lambda change: [self.explorer.add_photo(bytes(file["content"])) for file in change["new"]],
            "value",
        )
        self.seeds = self._ask(
            ipw.Text(description="seeds", continuous_update=False, layout=Layout(width="260px")),
            self.explorer.set_seeds,
        )
        return _box(
            ipw.VBox,
            _box(
                ipw.HBox,
                _button("new faces", "random", self.explorer.new_faces),
                self.seeds,
                photo,
                flex_flow="row wrap",
            ),
            ipw.HTML(
                "A face whose number is pressed above its picture stays. A photo is aligned, and inverted to a code."
            ),
        )

    def _history(self) -> ipw.Widget:
        e = self.explorer
        self.undo, self.redo = _button("undo", "undo", e.undo), _button("redo", "repeat", e.redo)
        self.entries = self._ask(ipw.Select(rows=5, layout=Layout(width="420px")), e.go)
        return _box(ipw.HBox, self.entries, _box(ipw.VBox, self.undo, self.redo))

    def _refine(self) -> ipw.Widget:
        e = self.explorer
        method = ipw.Dropdown(options=REFINING, description="method")
        self.start = _button("train for this prompt", "play", lambda: e.refine(method.value))
        self.cancel = _button("cancel", "stop", e.cancel)
        self.progress = ipw.FloatProgress(min=0, max=1, layout=Layout(width="220px"))
        self.preview = ipw.Image(format="png", layout=Layout(width="440px", display="none"))
        return _box(
            ipw.VBox,
            _box(ipw.HBox, method, self.start, self.cancel, self.progress, flex_flow="row wrap"),
            self.preview,
        )

    def _export(self) -> ipw.Widget:
        e = self.explorer
        recipe = ipw.FileUpload(accept=".json", description="open a recipe", layout=Layout(width="auto"))
        recipe.observe(lambda change: [e.open(bytes(file["content"])) for file in change["new"]], "value")
        self.code = ipw.Textarea(rows=12, disabled=True, layout=Layout(width="100%"))
        return _box(
            ipw.VBox,
            _box(
                ipw.HBox,
                _named(_button("export PNG, GIF, recipe", "download", e.export), "cfx-export"),
                recipe,
                ipw.HTML("The cell below draws this picture again, to the bit:"),
            ),
            self.code,
        )

    # ---- what the model says ----

    def _on_recipe(self) -> None:
        e, recipe = self.explorer, self.explorer.recipe
        layers = e.domain.generator.num_ws
        self._model.speaks = True
        try:
            self.prompt.options, self.prompt.value = e.suggestions, recipe.prompt
            self.source_text.placeholder, self.source_text.value = e.domain.source_text, recipe.source_text
            self.strength.value, self.seeds.value = (
                recipe.strength,
                ", ".join(str(face) for face in recipe.faces if isinstance(face, int)),
            )
            for name, on in levels_on(recipe.layers, layers).items():
                self.levels[name].value = on
            known = [("the domain's own", ""), *((label, path) for path, (label, _) in e.mappers.items())]
            if recipe.mapper and recipe.mapper not in e.mappers:
                known.append((recipe.mapper, recipe.mapper))
            if self.mapper.options != tuple(known):
                self.mapper.options = known
            self.domain.options, self.mapper.value, self.domain.value = (
                e.domains,
                recipe.mapper,
                recipe.domain,
            )
            is_box = isinstance(recipe.region, tuple)
            self.region.value = "box" if is_box else recipe.region if recipe.region in e.parts else ""
            self.across.disabled = self.down.disabled = not is_box
            if is_box:
                left, top, right, bottom = recipe.region
                self.across.value, self.down.value = (left, right), (top, bottom)
            if len(self.layer_box.children) != layers:
                self.layer_box.children = [
                    self._ask(
                        ipw.FloatSlider(
                            value=1,
                            min=0,
                            max=2,
                            step=0.05,
                            description=str(i),
                            orientation="vertical",
                            layout=Layout(width="52px", height="130px"),
                            readout_format=".2g",
                        ),
                        lambda _: e.change(layers=tuple(s.value for s in self.layer_box.children)),
                    )
                    for i in range(layers)
                ]
            for slider, value in zip(self.layer_box.children, recipe.layers or (1.0,) * layers, strict=False):
                slider.value = value
            self.code.value = recipe.code()
        finally:
            self._model.speaks = False
        self._on_locked()

    def _on_frame(self) -> None:
        frame: Frame | None = self.explorer.frame
        if frame is None:
            return
        shown = list(frame.rows.items())
        for i, (row, label, image) in enumerate(zip(self.rows, self.labels, self.images, strict=True)):
            if i < len(shown):
                label.value = f'<div class="cfx-label">{html.escape(shown[i][0])}</div>'
                if frame.rows is not self._drawn:  # else only the scores are new
                    image.value = encode(shown[i][1])
            row.layout.display = "" if i < len(shown) else "none"
        self._drawn = frame.rows
        if frame.scores or not frame.recipe.prompts:
            self.scores.value = scores_html(frame.scores)
        self._on_locked()

    def _on_locked(self) -> None:
        e, frame = self.explorer, self.explorer.frame
        headers = frame.headers if frame else ()
        faces = frame is not None and frame.show != "prompts × strengths"
        self._model.speaks = True
        for i, lock in enumerate(self.locks):
            lock.layout.display = "" if i < len(headers) else "none"
            lock.description, lock.disabled = headers[i] if i < len(headers) else "", not faces
            lock.value = bool(faces and i < len(frame.recipe.faces) and frame.recipe.faces[i] in e.locked)
            lock.icon = "lock" if lock.value else ""
        self._model.speaks = False

    def _on_words(self) -> None:
        e = self.explorer
        self.message.value = (
            f'<div class="cfx-message" role="alert">{html.escape(e.message)}</div>' if e.message else ""
        )
        seconds = (
            f"{1000 * e.frame.seconds:.0f} ms" if e.frame and not e.busy else "drawing …" if e.busy else ""
        )
        self.note.value = f'<div class="cfx-note">{html.escape(" · ".join(part for part in (seconds, e.note) if part))}</div>'

    def _on_history(self) -> None:
        e = self.explorer
        self._model.speaks = True
        self.entries.options = [(f"{i + 1}. {describe(recipe)}", i) for i, recipe in enumerate(e.history)]
        self.entries.value = e.at if e.at < len(e.history) else None
        self._model.speaks = False
        self.undo.disabled, self.redo.disabled = e.at == 0, e.at >= len(e.history) - 1

    def _on_training(self) -> None:
        e = self.explorer
        self.start.disabled, self.cancel.disabled, self.progress.value = (
            e.training is not None,
            e.training is None,
            e.progress,
        )
        self.preview.layout.display = "none" if e.preview is None else ""
        if e.preview is not None:
            self.preview.value = encode(e.preview)
