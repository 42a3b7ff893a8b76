"""Execute the committed notebooks in place, and remove everything that differs between runs and machines."""

import ast
import base64
import io
import re
import tempfile
from pathlib import Path

import nbformat
from PIL import Image

from cfclip.experiments.runs import notebook_hash, run_notebook
from cfclip.files import write_text

EXECUTED = "executed"
"""The key in a notebook's metadata for the hash of the code that made the outputs."""
WIDGET = "application/vnd.jupyter.widget-view+json"
LINK = re.compile(r"\[`(?P<name>[\w.]+)`\]\((?P<path>[\w./]+\.py)(?:#L\d+)?\)")
"""A Markdown link to a definition in a Python file: [`Class.method`](../file.py#L12)."""


def execute(path: Path) -> Path:
    """Execute a notebook with its default parameters, and replace the file by the executed notebook."""
    with tempfile.TemporaryDirectory() as folder:
        book = nbformat.read(run_notebook(path, folder, {}), as_version=4)
    clean(book)
    book.metadata[EXECUTED] = notebook_hash(path)
    return write_text(path, nbformat.writes(book) + "\n")


def clean(book: nbformat.NotebookNode) -> None:
    """Remove times, versions, stderr (progress bars) and widgets, and make the PNG pictures smaller."""
    spec = book.metadata.get("kernelspec", {})
    kernel = {name: spec[name] for name in ("display_name", "language", "name") if name in spec}
    book.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    for cell in book.cells:
        cell.metadata = nbformat.from_dict({"tags": tags} if (tags := cell.metadata.get("tags")) else {})
        if cell.cell_type != "code":
            continue
        shown = [one for one in cell.outputs if one.get("name") != "stderr"]
        cell.outputs = [one for one in shown if WIDGET not in one.get("data", {})]
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller(output.data["image/png"])
                output.metadata = nbformat.from_dict({})


def _smaller(picture: str) -> str:
    """A PNG in base64 with 64 levels a channel: half the size. The change, up to 2 of 255, is invisible."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    file, levels = io.BytesIO(), [round(round(value / 255 * 63) * 255 / 63) for value in range(256)]
    image.point(levels * 3).save(file, "PNG", optimize=True)
    return min(picture, base64.b64encode(file.getvalue()).decode(), key=len)


def renew_links(path: Path) -> None:
    """Renew the line of each :data:`LINK` of a notebook or a Markdown file, in place.

    Raises ValueError if a link names a file, or a name in it, that does not exist.
    """
    before = path.read_text(encoding="utf-8")
    after = linked(before, path.parent)
    if after != before:
        write_text(path, after)


def linked(text: str, folder: Path) -> str:
    """``text`` with the current line number in each :data:`LINK`; paths are relative to ``folder``."""

    def renewed(link: re.Match) -> str:
        line = line_of(folder / link["path"], link["name"])
        return f"[`{link['name']}`]({link['path']}#L{line})"

    return LINK.sub(renewed, text)


def line_of(path: Path, name: str) -> int:
    """Where ``name``, such as ``function`` or ``Class.method``, is defined in the Python file ``path``."""
    if not path.is_file():
        raise ValueError(f"a link names {path}, which does not exist")
    node = ast.parse(path.read_text(encoding="utf-8"))
    for part in name.split("."):
        found = [one for one in node.body if getattr(one, "name", None) == part]
        if not found:
            raise ValueError(f"a link names {name}, which is not in {path}")
        node = found[-1]
    return node.lineno
