"""(d) The explorer as a browser drives it: messages to a kernel that runs notebooks/05_explorer, and the picture that comes back."""

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

EDITED = 1  # the row of the edited faces, under the sources

FIND = f"""
import json
from cfclip.explorer.view import View
view = next(value for value in Out.values() if isinstance(value, View))
print(json.dumps(dict(strength=view.strength.model_id, prompt=view.prompt.model_id, picture=view.images[{EDITED}].model_id,
                      note=view.note.model_id, prompts=explorer.suggestions)))
"""


class Panel:
    """The other end of the explorer's widgets."""

    def __init__(self, faces: int, folder: str):
        self.manager, self.client = start_new_kernel(
            kernel_name="python3", startup_timeout=300, cwd=str(NOTEBOOKS)
        )
        for cell in nbformat.read(NOTEBOOKS / "05_explorer.ipynb", 4).cells:
            if cell.cell_type == "code":
                self.run(cell.source)
                if "parameters" in cell.metadata.get("tags", []):
                    self.run(f"n, out = {faces!r}, {folder!r}")
        self.ids = json.loads(self.run(FIND))

    def run(self, code: str) -> str:
        """What ``code`` prints in the kernel. RuntimeError with its words if it fails."""
        printed = []
        reply = self.client.execute_interactive(
            code, timeout=600, output_hook=lambda message: printed.append(message["content"].get("text", ""))
        )
        if reply["content"]["status"] == "error":
            raise RuntimeError(f"{reply['content']['ename']}: {reply['content']['evalue']}")
        return "".join(printed)

    def settle(self) -> None:
        """Until the kernel has nothing to do, scores included, and nothing to say."""
        self.run("explorer.wait(60)")
        try:
            while True:
                self.client.get_iopub_msg(timeout=0.1)
        except Empty:
            pass

    def change(self, widget: str, value: Any, timeout: float = 60) -> float:
        """Seconds from the control's message until the new picture is here and the panel no longer says that it is drawing."""
        message = self.client.session.msg(
            "comm_msg",
            {
                "comm_id": self.ids[widget],
                "data": {"method": "update", "state": {"value": value}, "buffer_paths": []},
            },
        )
        picture, begun = False, time.perf_counter()
        self.client.shell_channel.send(message)
        while time.perf_counter() < begun + timeout:
            message = self.client.get_iopub_msg(timeout=timeout)
            if message["msg_type"] != "comm_msg" or message["content"]["data"].get("method") != "update":
                continue
            of, state = message["content"]["comm_id"], message["content"]["data"]["state"]
            picture |= of == self.ids["picture"] and bool(message["buffers"])
            if picture and of == self.ids["note"] and " ms" in state.get("value", ""):
                return time.perf_counter() - begun
        raise TimeoutError(f"no new picture in {timeout:.0f} s after {widget} = {value!r}")

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def explorer(device: str, faces: int, moves: int) -> Iterator[dict[str, Any]]:
    """The strength's slider and the prompt, ``moves`` times each: at rest, when the scores of the picture before are there; dragged, when not."""
    with tempfile.TemporaryDirectory() as folder:
        panel = Panel(faces, folder)
        try:
            panel.settle()
            prompts = panel.ids["prompts"]
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
                yield {
                    "name": name,
                    "faces": faces,
                    "different": len(set(values)),
                    "p90": sorted(seconds)[int(0.9 * (len(seconds) - 1))],
                } | stats(seconds)
        finally:
            panel.close()
