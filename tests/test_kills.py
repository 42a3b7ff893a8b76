"""``kill -9`` at random moments: what is done again ends as if nothing had happened, to the bit.

Ten kills of a process that trains, sweeps, fetches and converts; the moments are drawn from a seed, so that
the share of the work that is done by then differs from machine to machine.
"""

import hashlib
import json
import multiprocessing
import os
import random
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import official
import pandas as pd
import psutil
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from cfclip.bench.networks import random_domain
from cfclip.checkpoints import sources
from cfclip.checkpoints.convert import convert
from cfclip.experiments import gather, load_spec, sweep
from cfclip.experiments.runs import KERNEL_ENVIRONMENT
from cfclip.method.config import CFCLIPConfig
from cfclip.method.loop import CHECKPOINT, CHECKPOINT_BEFORE, load_checkpoint
from cfclip.method.trainer import train_mapper

pytestmark = pytest.mark.long

KILLS = 10
PRELOADED = (
    "cfclip.bench.networks",
    "cfclip.experiments.sweep",
    "cfclip.method.trainer",
    "nbformat",
    "pytest",
)
CONTEXT = multiprocessing.get_context("forkserver")


def begin(started, work: Callable, *arguments) -> None:
    started.set()
    work(*arguments)


def killed(seconds: float, work: Callable, *arguments, all_of_it: bool = True) -> bool:
    """Whether ``work`` was still at it when it was killed. ``all_of_it``: with the processes it started."""
    CONTEXT.set_forkserver_preload([*PRELOADED])  # else each process imports torch again
    started = CONTEXT.Event()
    process = CONTEXT.Process(target=begin, args=(started, work, *arguments))
    process.start()
    assert started.wait(120)
    process.join(seconds)
    children = []
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in children if all_of_it else []:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.join()
    assert process.exitcode in (0, -9), "it failed before it was killed"
    return process.exitcode == -9


def content(folder: Path) -> dict[str, bytes]:
    """All files but locks and checkpoints, which have the seconds that were taken."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith((".", "checkpoint")) and path.name != "log.jsonl"
    }


# ---- training ----

EVERY, STEPS = 3, 240
CONFIG = CFCLIPConfig("green lipstick", steps=STEPS, batch=1, train_latents=2, num_views=1)


def train(out: Path) -> list[dict]:
    loop = {"progress": False, "checkpoint_every": EVERY, "log_every": 5}
    with warnings.catch_warnings(action="ignore"):
        return train_mapper(random_domain(16, tiny=True), CONFIG, out, **loop)[1]


def flipped(data: bytes, chance: random.Random) -> bytes:
    position = chance.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << chance.randrange(8)]) + data[position + 1 :]


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def test_a_training_that_is_killed_and_whose_checkpoints_are_damaged_is_the_uninterrupted_one(tmp_path):
    begun = time.perf_counter()
    rows = train(tmp_path / "whole")
    taken = time.perf_counter() - begun
    whole, chance, kills, damages, round_ = content(tmp_path / "whole"), random.Random(16), 0, 0, 0
    while kills < KILLS:
        out, reached = tmp_path / str(round_), 0
        while killed(chance.uniform(0, 0.6 * taken), train, out):
            kills += 1
            step = (load_checkpoint(out) or {"step": 0})["step"] if out.exists() else 0
            assert step >= reached and step % EVERY == 0, "what was kept stays kept"
            reached = step
            if (out / CHECKPOINT).exists() and (out / CHECKPOINT_BEFORE).exists() and chance.random() < 0.5:
                damage = chance.choice([flipped, cut])
                (out / CHECKPOINT).write_bytes(damage((out / CHECKPOINT).read_bytes(), chance))
                with pytest.warns(UserWarning, match="is damaged; the one before it is used"):
                    reached = load_checkpoint(out)["step"]
                assert reached >= step - EVERY, "it falls back by one checkpoint"
                damages += 1
            if kills == KILLS:
                break
        round_ += 1
        ended = train(out)
        assert content(out) == whole and not list(out.glob("*.part"))
        assert [row | {"seconds": 0} for row in ended] == [row | {"seconds": 0} for row in rows]
    assert damages


# ---- sweep ----

PARAMETERS = 'prompt = "a"\nsteps = 1\nout = ""'
BODY = """
import hashlib, pathlib, time
from cfclip.files import read_object, write_json, write_rows
state = pathlib.Path(out, "state.json")
now = read_object(state) or {"step": 0, "digest": prompt}
while now["step"] < steps:
    time.sleep(0.03)
    now = {"step": now["step"] + 1, "digest": hashlib.sha256(now["digest"].encode()).hexdigest()}
    write_json(state, now)
write_rows(pathlib.Path(out, "metrics.jsonl"), [{"index": k, "score": now["digest"][k:]} for k in range(9)])
"""
GATHER = """
from cfclip.experiments import gather
gather(runs).to_csv(reports + "/table.csv", index=False)
"""
SPEC = """
grid: [{notebook: work.ipynb, prompt: [a, b], steps: [10, 30]}]
then: [{notebook: gather.ipynb}]
"""


def sweep_all(spec: Path, out: Path) -> None:
    os.environ.update(KERNEL_ENVIRONMENT)  # which a sweep sets while a notebook runs, here in two threads
    with ThreadPoolExecutor(2) as executor:
        sweep(load_spec(spec), out / "runs", out / "reports", executor)


def measured(out: Path) -> dict[str, bytes]:
    """What the runs measured; run.json has seconds, and an executed notebook has times."""
    kept = ("metrics.jsonl", "table.csv", "state.json")
    return {name: data for name, data in content(out).items() if name.endswith(kept)}


def test_a_sweep_that_is_killed_has_the_table_of_the_uninterrupted_one(tmp_path, monkeypatch):
    for name in KERNEL_ENVIRONMENT:  # so that it is undone
        monkeypatch.setenv(name, "")
    for name, cells in {"work": (PARAMETERS, BODY), "gather": ('runs = ""\nreports = ""', GATHER)}.items():
        first = new_code_cell(cells[0], metadata={"tags": ["parameters"]})
        nbformat.write(new_notebook(cells=[first, new_code_cell(cells[1])]), tmp_path / f"{name}.ipynb")
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC, encoding="utf-8")
    begun = time.perf_counter()
    sweep_all(spec, tmp_path / "whole")
    taken = time.perf_counter() - begun
    whole, chance, kills, round_ = measured(tmp_path / "whole"), random.Random(17), 0, 0
    assert len(whole) == 2 * 2 * 2 + 1
    while kills < KILLS:
        out = tmp_path / str(round_)
        while killed(chance.uniform(0, 0.5 * taken), sweep_all, spec, out, all_of_it=chance.random() < 0.5):
            kills += 1
            if kills == KILLS:
                break
        round_ += 1
        sweep_all(spec, out)
        assert measured(out) == whole
        pd.testing.assert_frame_equal(gather(out / "runs"), gather(tmp_path / "whole" / "runs"))


# ---- fetch ----


class Slow(BaseHTTPRequestHandler):
    """Sends 3 MB a second, also from the middle of a file."""

    def do_GET(self):
        data, wanted = self.server.files[self.path.lstrip("/")], self.headers["Range"]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        start = int(wanted[6:-1]) if wanted and self.headers["If-Range"] == etag else 0
        self.server.resumed += start > 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        try:
            for position in range(start, len(data), 1 << 16):
                self.wfile.write(data[position : position + (1 << 16)])
                time.sleep(0.02)
        except OSError:  # its reader was killed
            pass

    def log_message(self, *args):
        pass


def fetch(folder: Path, known: tuple[sources.Source, ...]) -> None:
    sources.SOURCES, sources.elsewhere = known, lambda source: None
    rows = sources.fetch("test", folder, progress=False)
    assert all(row.good for row in rows), rows


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("SOURCES", "elsewhere"):  # so that they are what they were
        monkeypatch.setattr(sources, name, getattr(sources, name))
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        generator = official.tensorflow(official.random_generator(64, (32,) * 5), tmp_path / "g.pkl")
        server.files = {"a.pkl": random.Random(0).randbytes(2_000_000), "g.pkl": generator.read_bytes()}
        server.resumed = 0
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_fetch_that_is_killed_has_the_files_of_the_uninterrupted_one(server, tmp_path):
    address, digest = f"http://127.0.0.1:{server.server_port}/", hashlib.sha256(server.files["a.pkl"])
    known = (
        sources.Source("a.pkl", "clip", "", ("test",), (address + "a.pkl",), sha256=digest.hexdigest()),
        sources.Source("g.pkl", "generator", "", ("test",), (address + "g.pkl",)),
    )
    begun = time.perf_counter()
    fetch(tmp_path / "whole", known)
    taken = time.perf_counter() - begun
    whole, chance, kills, round_ = content(tmp_path / "whole"), random.Random(18), 0, 0
    assert {name: whole[name] for name in server.files} == server.files
    assert list(json.loads(whole[sources.RECORDED])) == ["g.pkl"] and len(whole) == 3
    while kills < KILLS:
        folder = tmp_path / str(round_)
        while killed(chance.uniform(0, 0.5 * taken), fetch, folder, known):
            kills += 1
            for name, data in server.files.items():
                assert not (folder / name).exists() or (folder / name).read_bytes() == data, "all or nothing"
            if kills == KILLS:
                break
        round_ += 1
        fetch(folder, known)
        assert content(folder) == whole
    assert server.resumed, "what had arrived was not fetched again"


# ---- conversion ----


def test_a_conversion_that_is_killed_leaves_the_old_file_or_the_whole_new_one(tmp_path):
    source, out = tmp_path / "g.pt", tmp_path / "out" / "g.safetensors"
    torch.save({"g_ema": official.rosinality(official.random_generator(256, (96,) * 7))}, source)
    small = tmp_path / "small.pt"
    torch.save({"g_ema": official.rosinality(official.random_generator())}, small)
    convert(small, out)
    old = out.read_bytes()
    begun = time.perf_counter()
    convert(source, tmp_path / "whole.safetensors")
    taken = time.perf_counter() - begun
    new, read = (tmp_path / "whole.safetensors").read_bytes(), source.read_bytes()
    chance, kills, seen = random.Random(19), 0, set()
    while kills < KILLS:
        if not killed(chance.uniform(0, 1.2 * taken), convert, source, out):
            assert out.read_bytes() == new
            out.write_bytes(old)
            continue
        kills += 1
        seen.add(out.read_bytes())
        assert seen <= {old, new}
    assert old in seen and source.read_bytes() == read
    assert convert(source, out) == "generator" and out.read_bytes() == new
