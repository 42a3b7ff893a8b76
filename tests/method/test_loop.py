import json

import pytest
import torch

# FIXME training.atomic_save
from cfclip.method.loop import Callback


class Toy:
    """A parameter that chases random targets: its path depends on every step's randomness."""

    def __init__(self):
        self.layer = torch.nn.Linear(2, 1)
        torch.nn.init.ones_(self.layer.weight)
        self.optimizer = torch.optim.Adam(self.layer.parameters(), 0.1)
        self.state = {"layer": self.layer, "optimizer": self.optimizer}

    def step(self, i):
        loss = (self.layer(torch.randn(4, 2)) - 1).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}


def run(steps, out=None, toy=None, **kw):
    torch.manual_seed(0)
    toy = toy or Toy()
    rows = fit(
        toy.step, steps, state=toy.state, out=out, log_every=2, checkpoint_every=3, progress=False, **kw
    )
    return toy.layer.weight.detach().clone(), rows


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, rows = run(10)
    run(7, tmp_path)
    resumed, rows2 = run(10, tmp_path)
    assert torch.equal(whole, resumed)
    assert [r["step"] for r in rows2] == [2, 4, 6, 7, 8, 10]
    assert rows2[-1]["loss"] == rows[-1]["loss"]
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == rows2


def test_a_crash_loses_only_what_came_after_the_checkpoint(tmp_path):
    whole, _ = run(10)
    torch.manual_seed(0)
    toy = Toy()
    honest, toy.step = toy.step, lambda i: honest(i) if i < 8 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(10, tmp_path, toy)
    resumed, rows = run(10, tmp_path)
    assert torch.equal(whole, resumed)
    assert [r["step"] for r in rows] == [2, 4, 6, 8, 10]


def test_a_finished_run_is_not_repeated(tmp_path):
    first, rows = run(6, tmp_path)
    again, rows2 = run(6, tmp_path)
    assert torch.equal(first, again) and rows == rows2


def test_callbacks_come_on_time_and_at_the_end():
    seen = []
    run(7, callbacks=[Callback(3, seen.append)])
    assert seen == [3, 6, 7]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    atomic_save("old", path, lambda text, part: part.write_text(text))

    def fail(text, part):
        part.write_text(text[:1])
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_save("new", path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
