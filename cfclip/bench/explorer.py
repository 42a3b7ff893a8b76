"""(d) The explorer as a browser drives it: messages to a kernel that runs notebooks/05_explorer."""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from queue import Empty
from typing import Any

import nbformat
from jupyter_client.manager import start_new_kernel

from cfclip.bench.measure import stats
from cfclip.files import NOTEBOOKS

DRAG_SECONDS = 0.06
"""Seconds between two values of a slider that is dragged."""
FIND_WIDGETS = """
import json
from cfclip.explorer.view import View
view = next(value for value in Out.values() if isinstance(value, View))
widgets = dict(strength=view.strength, prompt=view.prompt, picture=view.stage, note=view.note)
widgets |= dict(refine=view.start, cancel=view.cancel, preview=view.preview)
print(json.dumps({name: widget.model_id for name, widget in widgets.items()}))
"""


class Panel:
    """The browser's side of the explorer's widgets."""

    def __init__(self, faces: int, folder: str):
        self.manager, self.client = start_new_kernel(startup_timeout=300, cwd=str(NOTEBOOKS))
        for cell in nbformat.read(NOTEBOOKS / "05_explorer.ipynb", 4).cells:
            if cell.cell_type == "code":
                self.run(cell.source)
                if "parameters" in cell.metadata.get("tags", []):
                    self.run(f"n, out = {faces!r}, {folder!r}")
        self.ids = json.loads(self.run(FIND_WIDGETS))
        self.prompts = json.loads(self.run("print(json.dumps(list(explorer.suggestions)))"))

    def run(self, code: str) -> str:
        """What ``code`` prints in the kernel. RuntimeError with the kernel's message if it fails."""
        seen = []
        reply = self.client.execute_interactive(code, timeout=600, output_hook=seen.append)["content"]
        if reply["status"] == "error":
            raise RuntimeError(f"{reply['ename']}: {reply['evalue']}")
        return "".join(message["content"].get("text", "") for message in seen)

    def settle(self) -> None:
        """Wait until the kernel has finished, scores included, and all its messages are read."""
        self.run("explorer.wait(60)")
        with suppress(Empty):
            while True:
                self.client.get_iopub_msg(timeout=0.1)

    def _send(self, widget: str, **data: Any) -> None:
        message = self.client.session.msg("comm_msg", {"comm_id": self.ids[widget], "data": data})
        self.client.shell_channel.send(message)

    def _set(self, widget: str, value: Any) -> None:
        self._send(widget, method="update", state={"value": value}, buffer_paths=[])

    def _next(self, timeout: float) -> tuple[str, Mapping[str, Any], bool]:
        """(comm, state, whether it has pictures) of the next update of a widget; Empty after ``timeout``."""
        end = time.perf_counter() + timeout
        while True:
            message = self.client.get_iopub_msg(timeout=max(0.001, end - time.perf_counter()))
            content = message["content"]
            if message["msg_type"] == "comm_msg" and content["data"].get("method") == "update":
                return content["comm_id"], content["data"]["state"], bool(message["buffers"])

    def change(self, widget: str, value: Any, timeout: float = 60) -> float:
        """Seconds from a control's message until the new picture has come and the panel stops drawing."""
        has_picture, start = False, time.perf_counter()
        self._set(widget, value)
        while time.perf_counter() < start + timeout:
            comm, state, pictures = self._next(timeout)
            has_picture |= comm == self.ids["picture"] and pictures
            if has_picture and comm == self.ids["note"] and " ms" in state.get("value", ""):
                return time.perf_counter() - start
        raise TimeoutError(f"no new picture within {timeout:.0f} s after {widget} = {value!r}")

    def drag(self, widget: str, values: Sequence[Any]) -> list[float]:
        """Seconds from picture to picture while ``widget`` takes another value every :data:`DRAG_SECONDS`."""
        start = time.perf_counter()
        came = [start]
        for i, value in enumerate(values, 1):
            self._set(widget, value)
            while (left := start + i * DRAG_SECONDS - time.perf_counter()) > 0:
                with suppress(Empty):
                    comm, _, pictures = self._next(left)
                    if comm == self.ids["picture"] and pictures:
                        came.append(time.perf_counter())
        came = came if len(came) > 1 else [start, time.perf_counter()]  # none came: at least this long
        return [after - before for before, after in pairwise(came)]

    def first_preview(self) -> float:
        """Seconds from the press of the button to the first refined picture; then cancels the training."""
        start, pictures = time.perf_counter(), 0
        self._send("refine", method="custom", content={"event": "click"})
        while pictures < 2:  # the first has the instant edit only
            comm, _, has = self._next(300)
            pictures += comm == self.ids["preview"] and has
        seconds = time.perf_counter() - start
        self._send("cancel", method="custom", content={"event": "click"})
        self.run("training = explorer.training\nif training: training.thread.join(60)")
        return seconds

    def close(self) -> None:
        """Stop the kernel."""
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def explorer(device: str, faces: int, moves: int) -> Iterator[dict[str, Any]]:
    """Measure ``moves`` strengths, a drag over as many, ``moves`` prompts and a training's first preview.

    Except in the drag, each change waits until the previous picture has its scores.
    """
    with tempfile.TemporaryDirectory() as folder:
        panel = Panel(faces, folder)

        def at_rest(widget: str, values: Sequence[Any]) -> Iterator[float]:
            for value in values:
                panel.settle()
                yield panel.change(widget, value)

        try:
            panel.settle()
            strengths = [round(0.5 + 0.05 * (i % 20), 2) for i in range(moves)]
            prompts = [panel.prompts[(i + 1) % len(panel.prompts)] for i in range(moves)]
            for name, values, measured in (
                ("slider", strengths, at_rest("strength", strengths)),
                ("slider, dragged: from picture to picture", strengths, panel.drag("strength", strengths)),
                ("prompt", prompts, at_rest("prompt", prompts)),
                ("refine: first preview", prompts[-1:], [panel.first_preview()]),
            ):
                seconds = list(measured)
                panel.settle()
                p90 = sorted(seconds)[int(0.9 * (len(seconds) - 1))]
                row = {"name": name, "faces": faces, "different": len(set(values)), "p90": p90}
                yield row | stats(seconds)
        finally:
            panel.close()
