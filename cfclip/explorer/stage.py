"""The pictures in the browser: a widget whose other half is stage.js."""

from pathlib import Path
from typing import Any

import anywidget
import numpy as np
from traitlets import Bool, Dict, Int, List, Unicode

from cfclip.explorer.frames import encode

HERE = Path(__file__).parent


class Stage(anywidget.AnyWidget):
    """Rows of faces; a click shows a face large, with a wipe. ``main``: it reacts to keys and takes files."""

    _esm = HERE / "stage.js"
    _css = HERE / "explorer.css"
    rows = List(help='{"label": text, "image": the pictures of a row side by side}').tag(sync=True)
    faces = List(help='{"title", "tip", "locked", "photo"} of each column').tag(sync=True)
    notes = List(Unicode(), help="a few words on each face").tag(sync=True)
    note_row = Int(-1, help="the row that the notes are below").tag(sync=True)
    before = Dict(help='what the wipe compares with: {"row": i} or {"column": i}').tag(sync=True)
    fixed = Bool(help="the columns are not faces and cannot be kept").tag(sync=True)
    busy = Bool().tag(sync=True)
    align = Bool(help="ask for the five points of a photo").tag(sync=True)
    main = Bool().tag(sync=True)

    def show(self, rows: dict[str, np.ndarray], sketch: bool = False, **state: Any) -> None:
        """Show ``rows``, label -> uint8 [N, R, R, 3]; an unchanged row is not encoded again."""
        before = getattr(self, "_shown", {})
        self._shown = {}
        for label, row in rows.items():
            old, image, lossy = before.get(label, (None, b"", False))
            if old is None or lossy > sketch or not np.array_equal(old, row):
                image, lossy = encode(row, sketch), sketch
            self._shown[label] = row, image, lossy
        with self.hold_sync():
            for name, value in state.items():
                setattr(self, name, value)
            self.rows = [{"label": label, "image": image} for label, (_, image, _) in self._shown.items()]
