"""Folders of the project, and files that are never seen half written. Imports neither torch nor pandas."""

import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_data_path

PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "data").is_dir()
"""True in a wheel, which has the embedded domain inside the package; a source tree has it beside it."""
ROOT = Path.cwd() if INSTALLED else PACKAGE.parent
"""Where notebooks and reports are: the source tree; of an installed package the folder it is used from."""
DATA = Path(os.environ.get("CFCLIP_DATA") or (PACKAGE if INSTALLED else ROOT) / "data")
"""Where weights are; the environment variable CFCLIP_DATA moves it."""
# not into an installed package: it may be read-only, and an update deletes what is in it
DOWNLOADS = (user_data_path("cfclip") if DATA == PACKAGE / "data" else DATA) / "downloads"
NOTEBOOKS = ROOT / "notebooks"


class FolderInUse(ValueError):
    """Another process is working in the folder."""


def atomic_write(path: str | os.PathLike, write: Callable[[Path], Any]) -> Path:
    """``write(part)``, then ``part`` becomes ``path``: neither a reader nor a crash leaves half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a random name, because threads share a process id and machines may share a folder
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_text(path: str | os.PathLike, text: str) -> Path:
    """UTF-8, atomically."""
    return atomic_write(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: str | os.PathLike, value: Any) -> Path:
    """Indented JSON, atomically."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_rows(path: str | os.PathLike, rows: Iterable[Mapping]) -> Path:
    """JSON lines, atomically."""
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: str | os.PathLike) -> list[dict]:
    """The rows that :func:`write_rows` wrote."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_csv(path: str | os.PathLike, table: Any) -> Path:
    """A pandas table as CSV with six significant digits, atomically."""
    return atomic_write(path, lambda part: table.to_csv(part, index=False, float_format="%.6g"))


def writable(folder: str | os.PathLike) -> Path:
    """``folder``, made if it is missing. PermissionError says how to mend one that cannot be written to."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"cannot write to {folder} ({error.strerror}): choose another folder or change its permissions"
        ) from None
    return folder


@contextmanager
def locked(folder: str | os.PathLike, name: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock ``name`` of ``folder``. A process that dies loses its locks, so none is ever stale.

    Raises FolderInUse if another process or thread holds it and ``wait`` is False.
    """
    folder = writable(folder)
    try:
        with FileLock(folder / f".{name}.lock", timeout=-1 if wait else 0):
            yield
    except Timeout:
        raise FolderInUse(
            f"{folder} is in use by another process: wait for it, or choose another folder"
        ) from None


def slug(text: str) -> str:
    """A prompt as a file name: "green lipstick" -> "green-lipstick"."""
    return re.sub(r"[^\w]+", "-", text.strip().lower()).strip("-") or "prompt"


def first_bytes(text: str, limit: int) -> str:
    """As much of ``text`` as ``limit`` bytes hold, which is what file systems count."""
    return text.encode()[:limit].decode(errors="ignore")
