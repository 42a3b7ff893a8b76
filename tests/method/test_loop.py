import json
import threading

import pytest
import torch

from cfclip.files import FolderInUse, atomic_write, locked
from cfclip.method.loop import Callback, run_loop, with_global_seed


class Toy:
    """A parameter that chases random targets: its path depends on each step's randomness."""

    def __init__(self):
        self.layer = torch.nn.Linear(2, 1)
        torch.nn.init.ones_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.optimizer = torch.optim.Adam(self.layer.parameters(), 0.1)
        self.state = {"layer": self.layer, "optimizer": self.optimizer}

    def step(self, i, generator):
        loss = (self.layer(torch.randn(4, 2, generator=generator)) - 1).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}


def run(steps, out=None, toy=None, **kw):
    toy = toy or Toy()
    kw = {"log_every": 2, "checkpoint_every": 3, "progress": False} | kw
    rows = run_loop(toy.step, steps, state=toy.state, out=out, **kw)
    return toy.layer.weight.detach().clone(), rows


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, rows = run(10)
    run(7, tmp_path)
    resumed, rows2 = run(10, tmp_path)
    assert torch.equal(whole, resumed)
    assert [r["step"] for r in rows2] == [2, 4, 6, 7, 8, 10]
    assert rows2[-1]["loss"] == rows[-1]["loss"]
    log = (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in log.splitlines()] == rows2


def test_a_crash_loses_only_what_came_after_the_checkpoint(tmp_path):
    whole, _ = run(10)
    toy = Toy()
    honest, toy.step = toy.step, lambda i, generator: honest(i, generator) if i < 8 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(10, tmp_path, toy)
    resumed, rows = run(10, tmp_path)
    assert torch.equal(whole, resumed)
    assert [r["step"] for r in rows] == [2, 4, 6, 8, 10]


def test_a_finished_run_is_not_repeated(tmp_path):
    first, rows = run(6, tmp_path)
    again, rows2 = run(6, tmp_path)
    assert torch.equal(first, again) and rows == rows2


def test_the_users_random_numbers_are_left_alone():
    """Also by a step that draws from torch's global ones, which then are the step's own."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    drawn, toy = [], Toy()
    torch.manual_seed(3)
    run(2, toy=toy)
    step = with_global_seed(lambda i: {"x": drawn.append(torch.rand(2)) or 0.0})
    run_loop(step, 2, state={}, progress=False)
    run_loop(step, 2, state={}, progress=False)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    started, leave = threading.Event(), threading.Event()

    def hold():
        with locked(tmp_path, "training"):
            started.set()
            leave.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    try:
        assert started.wait(60)
        with pytest.raises(FolderInUse, match="in use by another process"):
            run(2, tmp_path)
    finally:
        leave.set()
        other.join()
    run(2, tmp_path)


def test_callbacks_come_on_time_and_at_the_end():
    seen = []
    run(7, callbacks=[Callback(3, seen.append)])
    assert seen == [3, 6, 7]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    atomic_write(path, lambda part: part.write_text("old", encoding="utf-8"))

    def fail(part):
        part.write_text("n", encoding="utf-8")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [path]
