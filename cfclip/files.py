"""Folders of the project, and files that are never seen half written. Imports neither torch nor pandas."""

import hashlib
import json
import os
import re
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_data_path

PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "data").is_dir()
"""True if installed from a wheel: the embedded domain is in the package. In a source tree it is beside it."""
ROOT = Path.cwd() if INSTALLED else PACKAGE.parent
"""Where notebooks and reports are: the source tree, or the current folder if the package is installed."""
DATA = Path(os.environ.get("CFCLIP_DATA") or (PACKAGE if INSTALLED else ROOT) / "data")
"""Where weights are; the environment variable CFCLIP_DATA names another folder."""
# not inside an installed package: it may be read-only, and an update deletes its files
DOWNLOADS = (user_data_path("cfclip") if DATA == PACKAGE / "data" else DATA) / "downloads"
NOTEBOOKS = ROOT / "notebooks"


class FolderInUse(ValueError):
    """Another process is working in the folder."""


def atomic_write(path: str | os.PathLike, write: Callable[[Path], Any]) -> Path:
    """``write(part)``, then rename ``part`` to ``path``: no reader, crash or power cut finds half a file.

    ``path`` gets the permissions of any new file. An OSError that names no file, e.g. because the disk is
    full, is made to name ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a random name, because threads share a process id and machines may share a folder
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        write(part)
        if part.stat().st_mode != mode:  # safetensors makes its files unreadable for other users
            part.chmod(mode)
        _sync(part, os.O_RDWR)
        os.replace(part, path)
        with suppress(OSError):  # not every system can sync a folder
            _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)
    return path


def _sync(path: Path, flags: int) -> None:
    """Return once ``path`` is on the disk."""
    file = os.open(path, flags)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write ``text`` as UTF-8, atomically."""
    return atomic_write(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: str | os.PathLike, value: Any) -> Path:
    """Write ``value`` as indented JSON, atomically."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_rows(path: str | os.PathLike, rows: Iterable[Mapping]) -> Path:
    """Write ``rows`` as JSON lines, atomically."""
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: str | os.PathLike) -> list[dict]:
    """The rows of a file of JSON lines. A last line that a crash cut off is left out, with a warning.

    Raises ValueError if any other line is damaged; the message has the line's number.
    """
    rows = []
    lines = Path(path).read_bytes().removesuffix(b"\n").split(b"\n")  # str.splitlines splits elsewhere, too
    for number, line in enumerate(lines, 1):
        if not line.strip() and number == len(lines):
            continue
        if (row := _object(line)) is not None:
            rows.append(row)
        elif number == len(lines):
            warnings.warn(f"the last line of {path} is cut off, and is left out", stacklevel=2)
        else:
            raise ValueError(f"line {number} of {path} is damaged: delete this line, or make the file again")
    return rows


def append_row(path: str | os.PathLike, row: Mapping) -> None:
    """Append ``row`` to a file of JSON lines. The line stays even if this process is killed right after.

    If a killed process has left a cut-off last line, that line is dropped first, with a warning.
    """
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    with Path(path).open("a+b") as file:
        file.seek(max(0, file.tell() - 1))
        if file.read() not in (b"", b"\n"):
            file.seek(0)
            whole, end, rest = file.read().rpartition(b"\n")
            if _object(rest) is None:
                warnings.warn(f"the last line of {path} is cut off, and is dropped", stacklevel=2)
                file.truncate(len(whole + end))
            else:
                line = b"\n" + line
        file.write(line)


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in ``path``; an empty one if the file is missing or damaged, as after a crash."""
    try:
        return _object(Path(path).read_bytes()) or {}
    except FileNotFoundError:
        return {}


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def sha256(path: Path) -> str:
    """The checksum of the file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_csv(path: str | os.PathLike, table: Any) -> Path:
    """Write a pandas table as CSV with six significant digits, atomically."""
    return atomic_write(path, lambda part: table.to_csv(part, index=False, float_format="%.6g"))


def writable(folder: str | os.PathLike) -> Path:
    """``folder``, created if it is missing. PermissionError, with advice, if nothing can be written to it."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        fix = "choose another folder or change its permissions"
        raise PermissionError(f"cannot write to {folder} ({error.strerror}): {fix}") from None
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
        message = f"{folder} is in use by another process: wait for it, or choose another folder"
        raise FolderInUse(message) from None


def slug(text: str) -> str:
    """A prompt as a file name: "green lipstick" -> "green-lipstick"."""
    return re.sub(r"[^\w]+", "-", text.strip().lower()).strip("-") or "prompt"


def first_bytes(text: str, limit: int) -> str:
    """The first characters of ``text`` that fit into ``limit`` bytes: file systems limit names in bytes."""
    return text.encode()[:limit].decode(errors="ignore")
