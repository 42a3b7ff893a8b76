"""(d) The explorer as a browser drives it: messages to a kernel that runs notebooks/05_explorer."""

import json
import tempfile
import time
from collections.abc import Iterator
from queue import Empty
from typing import Any

import nbformat
from jupyter_client.manager import start_new_kernel

from cfclip.bench.measure import stats
from cfclip.files import NOTEBOOKS

# images[1] is the row of edited pictures, below the sources
FIND_WIDGETS = """
import json
from cfclip.explorer.view import View
view = next(value for value in Out.values() if isinstance(value, View))
widgets = dict(strength=view.strength, prompt=view.prompt, picture=view.images[1], note=view.note)
print(json.dumps({name: widget.model_id for name, widget in widgets.items()}))
"""


class Panel:
    """The browser's side of the explorer's widgets."""

    def __init__(self, faces: int, folder: str):
        self.manager, self.client = start_new_kernel(
            kernel_name="python3", startup_timeout=300, cwd=str(NOTEBOOKS)
        )
        for cell in nbformat.read(NOTEBOOKS / "05_explorer.ipynb", 4).cells:
            if cell.cell_type == "code":
                self.run(cell.source)
                if "parameters" in cell.metadata.get("tags", []):
                    self.run(f"n, out = {faces!r}, {folder!r}")
        self.ids = json.loads(self.run(FIND_WIDGETS))
        self.prompts = json.loads(self.run("print(json.dumps(explorer.suggestions))"))

    def run(self, code: str) -> str:
        """What ``code`` prints in the kernel. RuntimeError with the kernel's message if it fails."""
        printed = []
        reply = self.client.execute_interactive(
            code, timeout=600, output_hook=lambda message: printed.append(message["content"].get("text", ""))
        )["content"]
        if reply["status"] == "error":
            raise RuntimeError(f"{reply['ename']}: {reply['evalue']}")
        return "".join(printed)

    def settle(self) -> None:
        """Wait until the kernel has finished, scores included, and all its messages are read."""
        self.run("explorer.wait(60)")
        try:
            while True:
                self.client.get_iopub_msg(timeout=0.1)
        except Empty:
            pass

    def change(self, widget: str, value: Any, timeout: float = 60) -> float:
        """Seconds from a control's message until the new picture is here and the panel is not drawing."""
        update = {"method": "update", "state": {"value": value}, "buffer_paths": []}
        message = self.client.session.msg("comm_msg", {"comm_id": self.ids[widget], "data": update})
        has_picture, start = False, time.perf_counter()
        self.client.shell_channel.send(message)
        while time.perf_counter() < start + timeout:
            message = self.client.get_iopub_msg(timeout=timeout)
            content = message["content"]
            if message["msg_type"] != "comm_msg" or content["data"].get("method") != "update":
                continue
            has_picture |= content["comm_id"] == self.ids["picture"] and bool(message["buffers"])
            is_note = content["comm_id"] == self.ids["note"]
            if has_picture and is_note and " ms" in content["data"]["state"].get("value", ""):
                return time.perf_counter() - start
        raise TimeoutError(f"no new picture within {timeout:.0f} s after {widget} = {value!r}")

    def close(self) -> None:
        """Stop the kernel."""
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def explorer(device: str, faces: int, moves: int) -> Iterator[dict[str, Any]]:
    """``moves`` changes of the strength and of the prompt.

    At rest, each change waits for the scores of the picture before; "dragged", it does not.
    """
    with tempfile.TemporaryDirectory() as folder:
        panel = Panel(faces, folder)
        try:
            panel.settle()
            prompts = panel.prompts
            strengths = [round(0.5 + 0.05 * (i % 20), 2) for i in range(moves)]
            for name, widget, values, rest in (
                ("slider", "strength", strengths, True),
                ("slider, dragged", "strength", strengths, False),
                ("prompt", "prompt", [prompts[(i + 1) % len(prompts)] for i in range(moves)], True),
            ):
                seconds = []
                for value in values:
                    if rest:
                        panel.settle()
                    seconds.append(panel.change(widget, value))
                panel.settle()
                p90 = sorted(seconds)[int(0.9 * (len(seconds) - 1))]
                row = {"name": name, "faces": faces, "different": len(set(values)), "p90": p90}
                yield row | stats(seconds)
        finally:
            panel.close()
