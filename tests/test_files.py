"""Files that are never half written, and one's own files that a crash has damaged."""

import json
import os
import re
import stat
import warnings

import pytest
import torch
from safetensors.torch import save_file

from cfclip.files import ROOT, append_row, atomic_write, read_object, read_rows, write_json, write_rows

ROWS = [
    {"prompt": "green lipstick", "score": 0.5},
    {"prompt": "口红 \u2028 \x85 \n", "score": None},
    {"i": 3},
]
NO_OBJECTS = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"1",
    b'"x"',
    b"\0" * 9,
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a": 1}{}',
    b"{'a': 1}",
]


def test_rows_are_read_as_they_were_written(tmp_path):
    """Also a text with characters that some take for the end of a line."""
    with warnings.catch_warnings(action="error"):
        for rows in (ROWS, []):
            assert read_rows(write_rows(tmp_path / "rows.jsonl", rows)) == rows


def test_a_last_row_that_is_cut_off_anywhere_is_left_out(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    third = whole.rindex(b"\n", 0, -1) + 1
    for end in range(second + 1, third - 1):
        path.write_bytes(whole[:end])
        with pytest.warns(UserWarning, match=r"last line of .*rows\.jsonl is cut off"):
            assert read_rows(path) == ROWS[:1]
    for end in (third - 1, third):
        path.write_bytes(whole[:end])
        assert read_rows(path) == ROWS[:2], "a row without its line end is whole"


def test_no_row_is_glued_to_one_that_is_cut_off(tmp_path):
    path, new = tmp_path / "rows.jsonl", {"prompt": "口红 \u2028", "new": 1}
    append_row(path, ROWS[0])
    append_row(path, ROWS[1])
    assert path.read_bytes() == write_rows(tmp_path / "as written.jsonl", ROWS[:2]).read_bytes()
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for end in (*range(1, second - 1), *range(second + 1, len(whole) - 1)):
        path.write_bytes(whole[:end])
        with pytest.warns(UserWarning, match=r"last line of .*rows\.jsonl is cut off, and is dropped"):
            append_row(path, new)
        assert read_rows(path) == [*ROWS[: end >= second], new]
    for end, kept in ((0, 0), (second - 1, 1), (second, 1), (len(whole) - 1, 2), (len(whole), 2)):
        path.write_bytes(whole[:end])
        with warnings.catch_warnings(action="error"):
            append_row(path, new)
            assert read_rows(path) == [*ROWS[:kept], new], "a row without its line end is whole"


@pytest.mark.parametrize("line", NO_OBJECTS)
def test_a_damaged_row_elsewhere_is_an_error_that_names_file_and_line(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"i": 1}\n' + line + b'\n{"i": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*rows\.jsonl is damaged"):
        read_rows(path)


def test_an_object_is_read_and_a_damaged_one_is_empty(tmp_path):
    path = tmp_path / "x.json"
    assert read_object(path) == {}
    assert read_object(write_json(path, {"a": ["ü"]})) == {"a": ["ü"]}
    for content in NO_OBJECTS:
        path.write_bytes(content)
        assert read_object(path) == {}


def test_every_test_that_data_readme_names_is_there():
    """By file and name; all else of the table is words."""
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", readme)
    assert len(named) > 40
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {name}"


def test_files_have_the_permissions_of_new_files(tmp_path):
    """Also those of safetensors, which lets nobody else read its own."""
    (tmp_path / "new").touch()
    write_json(tmp_path / "x.json", {})
    atomic_write(tmp_path / "x.safetensors", lambda part: save_file({"a": torch.ones(1)}, part))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1 and len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    path = write_json(tmp_path / "x.json", {"a": 1})

    def fill(part):
        with part.open("wb") as file:
            file.write(b"n")
            raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match=r"No space left on device: '.*x\.json'"):
        atomic_write(path, fill)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1} and list(tmp_path.iterdir()) == [path]
