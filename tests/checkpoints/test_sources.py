"""External files: fetched from a server on this machine, checked and reported; never from the network."""

import hashlib
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import official
import pytest
from typer.testing import CliRunner

from cfclip.checkpoints import sources
from cfclip.checkpoints.sources import Source
from cfclip.checkpoints.weights import WeightsError
from cfclip.cli import app
from cfclip.files import ROOT, FolderInUse, locked

PAGE = b"<!DOCTYPE html><html>Google Drive - Quota exceeded</html>"


class Server(ThreadingHTTPServer):
    """Serves ``files``; an answer for a name in ``cut`` breaks off half way, unless it is resumed."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.hidden: set[str] = set()  # headers that are not sent
        self.other_range = False  # continue from another byte than the one asked for
        self.asked: list[tuple[str, str | None]] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        name, wanted = self.path.lstrip("/"), self.headers["Range"]
        self.server.asked.append((name, wanted))
        if name not in self.server.files:
            return self.send_error(404)
        content = self.server.files[name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        start = int(wanted[6:-1]) if wanted and self.headers["If-Range"] == etag else 0
        self.send_response(206 if start else 200)
        if start and self.server.other_range:
            start -= 1000
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for header, value in {"ETag": etag, "Content-Length": str(len(content) - start)}.items():
            if header not in self.server.hidden:
                self.send_header(header, value)
        self.end_headers()
        end = len(content) // 2 if name in self.server.cut and not start else None
        self.wfile.write(content[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def content(tmp_path) -> bytes:
    return official.tensorflow(official.random_generator(), tmp_path / "g.pkl").read_bytes()


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "downloads"


@pytest.fixture
def table(monkeypatch):
    """Replaces the sources: ``table(Source, …)``."""
    monkeypatch.setattr(sources, "elsewhere", lambda source: None)
    return lambda *rows: monkeypatch.setattr(sources, "SOURCES", rows)


def source(*urls, name="g.pkl", **kwargs) -> Source:
    return Source(name, "generator", "a test", ("test",), urls, **kwargs)


def fetch(folder: Path, **kwargs) -> list[sources.Row]:
    return sources.fetch("test", folder, progress=False, **kwargs)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_with_a_documented_checksum_is_fetched_once(server, content, folder, table):
    server.files["g.pkl"] = content
    table(source(server.url("g.pkl"), sha256=digest(content), sha256_from="the test"))
    (row,) = fetch(folder)
    assert row.status == "valid" and row.path.read_bytes() == content
    assert sources.unmet([row]) == []
    assert sources.recorded(folder) == {} and not list(folder.glob("g.pkl?*"))
    fetch(folder)
    assert len(server.asked) == 1  # not fetched again


def test_a_checksum_that_is_not_documented_is_recorded_and_must_stay(server, content, folder, table):
    server.files["g.pkl"] = content
    table(source(server.url("g.pkl")))
    (row,) = fetch(folder)
    assert row.status == "unverified" and sources.recorded(folder) == {"g.pkl": digest(content)}
    assert "unchanged" in sources.check("test", folder)[0].detail
    other = official.tensorflow(official.random_generator(seed=1), folder / "g.pkl").read_bytes()
    (row,) = sources.check("test", folder)
    assert row.status == "corrupt" and "changed since" in row.detail and sources.unmet([row]) == ["generator"]
    server.files["g.pkl"] = PAGE
    (row,) = fetch(folder)
    assert row.status == "corrupt" and "web page" in row.detail and (folder / "g.pkl").read_bytes() == other
    server.files["g.pkl"] = content
    (row,) = fetch(folder)
    assert row.status == "unverified" and (folder / "g.pkl.bad").read_bytes() == other
    (folder / "g.pkl").write_bytes(other[:100])
    (row,) = fetch(folder)
    assert row.status == "unverified" and (folder / "g.pkl.bad").read_bytes() == other
    assert (folder / "g.pkl.bad1").read_bytes() == other[:100], "no user's file is overwritten"
    (folder / "checksums.json").write_text("[", encoding="utf-8")
    with pytest.raises(WeightsError, match=r"checksums\.json is damaged"):
        sources.check("test", folder)


@pytest.mark.parametrize(("given", "words"), [(b"else", "sha256 differs"), (None, "404")])
def test_the_next_url_is_tried_and_failures_are_reported(given, words, server, content, folder, table):
    server.files |= {"good.pkl": content} | ({"bad.pkl": given} if given else {})
    table(source(server.url("bad.pkl"), server.url("good.pkl"), sha256=digest(content)))
    assert fetch(folder)[0].status == "valid"
    (folder / "g.pkl").unlink()
    table(source(server.url("bad.pkl"), sha256=digest(content), page="https://example.org/file"))
    (row,) = fetch(folder)
    assert row.status == "missing" and words in row.detail and "https://example.org/file" in row.detail
    assert not (folder / "g.pkl").exists()


@pytest.mark.parametrize("known", [True, False])
def test_a_web_page_instead_of_weights_is_refused(known, server, content, folder, table):
    server.files["g.pkl"] = PAGE
    table(source(server.url("g.pkl"), sha256=digest(content) if known else None))
    (row,) = fetch(folder)
    assert row.status == "missing" and ("sha256 differs" if known else "web page") in row.detail
    (folder / "g.pkl").write_bytes(PAGE)
    (row,) = sources.check("test", folder)
    assert row.status == "corrupt" and "web page" in row.detail
    assert "g.pkl" not in sources.recorded(folder)


def test_an_interrupted_download_is_resumed(server, folder, table):
    content = random.Random(0).randbytes(1_000_000)
    server.files["g.pkl"] = content
    server.cut.add("g.pkl")
    table(source(server.url("g.pkl"), sha256=digest(content)))
    (row,) = fetch(folder)
    got = (folder / "g.pkl.part").stat().st_size
    assert row.status == "missing" and 400_000 < got <= 500_000
    (row,) = fetch(folder)
    assert row.status == "valid" and row.path.read_bytes() == content
    assert server.asked[-1] == ("g.pkl", f"bytes={got}-")
    assert not list(folder.glob("*.part*"))


def test_the_download_of_a_changed_file_starts_again(server, content, folder, table):
    server.files["g.pkl"] = bytes(300_000)
    server.cut.add("g.pkl")
    table(source(server.url("g.pkl")))
    fetch(folder)
    assert (folder / "g.pkl.part").stat().st_size > 100_000
    server.files["g.pkl"], server.cut = content, set()
    assert fetch(folder)[0].path.read_bytes() == content


@pytest.mark.parametrize("before", [None, PAGE, b"", b"cut"])
def test_a_file_that_is_fetched_again_must_keep_its_recorded_checksum(
    before, server, content, folder, table, tmp_path
):
    other = official.tensorflow(official.random_generator(seed=1), tmp_path / "other.pkl").read_bytes()
    server.files["g.pkl"] = content
    table(source(server.url("g.pkl")))
    fetch(folder)
    path, known = folder / "g.pkl", sources.recorded(folder)
    path.unlink() if before is None else path.write_bytes(before)
    server.files["g.pkl"] = other
    (row,) = fetch(folder)
    assert not row.good and "checksums.json" in row.detail and sources.recorded(folder) == known
    assert not path.exists() if before is None else path.read_bytes() == before
    server.files["g.pkl"] = content
    (row,) = fetch(folder)
    assert row.good and path.read_bytes() == content and sources.recorded(folder) == known


@pytest.mark.parametrize("hidden", [set(), {"Content-Length"}])
def test_a_download_that_is_too_large_is_refused_and_leaves_nothing(hidden, server, folder, table):
    server.files["g.pkl"], server.hidden = bytes(200_001), hidden
    table(source(server.url("g.pkl"), limit=200_000))
    (row,) = fetch(folder)
    assert row.status == "missing" and "more than the 200,000" in row.detail
    assert not list(folder.glob("[!.]*"))


def test_bytes_that_cannot_be_continued_are_not_kept(server, folder, table):
    server.files["g.pkl"], server.hidden = bytes(500_000), {"ETag"}
    server.cut.add("g.pkl")
    table(source(server.url("g.pkl")))
    (row,) = fetch(folder)
    assert row.status == "missing" and not list(folder.glob("[!.]*"))


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"a\r\nb", b'"another"', "other range", "no mark"])
def test_a_download_with_damaged_marks_starts_again(damage, server, folder, table):
    content = random.Random(0).randbytes(300_000)
    server.files["g.pkl"] = content
    server.cut.add("g.pkl")
    table(source(server.url("g.pkl"), sha256=digest(content)))
    fetch(folder)
    mark = folder / "g.pkl.part.etag"
    assert mark.exists()
    if damage == "no mark":
        mark.unlink()
    elif damage == "other range":
        server.other_range = True
    else:
        mark.write_bytes(damage)
    server.cut.clear()
    (row,) = fetch(folder)
    assert row.status == "valid" and row.path.read_bytes() == content
    assert [path.name for path in folder.glob("[!.]*")] == ["g.pkl"]


def test_two_processes_do_not_fetch_into_one_folder(server, content, folder, table):
    server.files["g.pkl"] = content
    table(source(server.url("g.pkl")))
    with locked(folder, "fetch"), pytest.raises(FolderInUse, match="another process"):
        fetch(folder)
    assert fetch(folder)[0].good


def test_files_of_one_role_replace_each_other(server, content, folder, table):
    server.files["b.pkl"] = content
    table(source(server.url("a.pkl"), name="a.pkl"), source(server.url("b.pkl"), name="b.pkl"))
    rows = fetch(folder)
    assert [row.status for row in rows] == ["missing", "unverified"] and sources.unmet(rows) == []
    assert sources.require("test", folder) == {"generator": folder / "b.pkl"}


def test_optional_files_are_fetched_when_asked_for(server, content, folder, table):
    server.files["g.pkl"] = content
    table(source(server.url("g.pkl"), required=False))
    assert fetch(folder)[0].status == "missing" and not server.asked
    assert fetch(folder, optional=True)[0].good


def test_check_reports_the_state_of_every_file(content, folder, table):
    folder.mkdir()
    for name in ("valid.pkl", "unverified.pkl", "another.pkl", "corrupt.pkl"):
        (folder / name).write_bytes(content)
    (folder / "corrupt.pkl").write_bytes(content[:-50])
    (folder / "wrong.pkl").write_bytes(content + b"x")
    page = "https://example.org/file"
    table(
        source(name="valid.pkl", sha256=digest(content)),
        source(name="unverified.pkl"),
        source(name="another.pkl", sha256=digest(b""), exact=False),
        source(name="corrupt.pkl", page=page),
        source(name="wrong.pkl", sha256=digest(content)),
        source(name="missing.pkl", page=page),
    )
    rows = sources.check("test", folder)
    assert [row.status for row in rows[:3]] == ["valid", "unverified", "unverified"]
    assert [row.status for row in rows[3:]] == ["corrupt", "corrupt", "missing"]
    assert all(page in row.detail and str(row.path) in row.detail for row in (rows[3], rows[5]))
    with pytest.raises(ValueError, match="'atlantis'; there are: test"):
        sources.check("atlantis", folder)


def test_all_missing_files_are_named_with_their_urls(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "elsewhere", lambda source: None)
    for domain in sources.PAPER:
        with pytest.raises(WeightsError) as caught:
            sources.require(domain, tmp_path)
        for s in sources.sources_of(domain):
            words = (s.name, str(tmp_path / s.name), *s.urls[:1])
            assert not s.required or all(text in str(caught.value) for text in words)
        assert set(re.findall(r"cfclip fetch (\S+?),", str(caught.value))) == {domain}


def test_another_tools_copy_of_clip_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (openai,) = (s for s in sources.SOURCES if s.name == "ViT-B-32.pt")
    (heldout,) = (s for s in sources.SOURCES if s.role == "held-out clip")
    assert sources.locate(openai, tmp_path) is None and sources.locate(heldout, tmp_path) is None
    assert heldout.sha256 in heldout.urls[0] and not heldout.required
    cached = tmp_path / ".cache" / "clip" / "ViT-B-32.pt"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(PAGE)
    assert sources.locate(openai, tmp_path) == cached
    assert sources.locate(heldout, tmp_path) is None  # another model is not a copy of it
    row = sources.inspect(openai, tmp_path)
    assert row.status == "corrupt" and "web page" in row.detail


def test_the_table_is_complete_and_in_the_readme():
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert sources.table() in readme, "write sources.table() into data/README.md"
    for s in sources.SOURCES:
        assert f"`{s.name}`" in readme and s.role in sources.OPENERS and (s.urls or s.page)
        assert s.sha256 is None or (len(s.sha256) == 64 and s.sha256_from)
    assert len({s.name for s in sources.SOURCES}) == len(sources.SOURCES)


def test_fetch_and_check_work_from_the_command_line(server, content, folder, table):
    server.files["g.pkl"] = content
    photo = source(name="photo.pt", required=False, page="https://example.org/drive")
    table(source(server.url("g.pkl"), sha256=digest(content)), photo)

    def run(command):
        return CliRunner().invoke(app, [command, "test", "--folder", str(folder)])

    result = run("check")
    assert result.exit_code == 1 and "missing" in result.output
    result = run("fetch")
    assert result.exit_code == 0 and "valid" in result.output and "https://example.org/drive" in result.output
    assert run("check").exit_code == 0
    (folder / "g.pkl").write_bytes(PAGE)
    result = run("check")
    assert result.exit_code == 1 and "corrupt" in result.output and "web page" in result.output
    assert CliRunner().invoke(app, ["check", "atlantis"]).exit_code == 1
