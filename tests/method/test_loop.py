import json
import math
import multiprocessing
import random
import time
import warnings
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from cfclip.checkpoints.weights import read_header
from cfclip.files import FolderInUse, atomic_write, locked, read_rows
from cfclip.method.config import CFCLIPConfig
from cfclip.method.loop import Callback, begin_run, load_checkpoint, run_loop
from cfclip.method.objectives import CLIPNCE, ClipDistance
from cfclip.method.trainer import train_mapper

CONFIG = CFCLIPConfig("green lipstick", steps=4, batch=1, train_latents=2, num_views=1)


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


def losses(rows):
    return [row["loss"] for row in rows]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, rows = run(10)
    run(7, tmp_path)
    resumed, rows2 = run(10, tmp_path)
    assert torch.equal(whole, resumed)
    assert [r["step"] for r in rows2] == [2, 4, 6, 7, 8, 10]
    assert losses(rows2)[-1] == losses(rows)[-1]
    log = (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in log.splitlines()] == rows2


def test_a_crash_loses_only_what_came_after_the_checkpoint(tmp_path):
    whole, rows = run(10)
    crash(8, tmp_path)
    resumed, rows2 = run(10, tmp_path)
    assert torch.equal(whole, resumed)
    assert [r["step"] for r in rows2] == [2, 4, 6, 8, 10]
    assert losses(rows2) == losses(rows), "also of the row that was begun before the checkpoint"


def crash(step, out):
    """A run of ten steps that ends after ``step`` of them."""
    toy = Toy()
    honest, toy.step = toy.step, lambda i, generator: honest(i, generator) if i < step else 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(10, out, toy)


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

    def step(i, generator):
        drawn.append(torch.rand(2, generator=generator))
        return {"x": 0.0}

    run_loop(step, 2, state={}, progress=False)
    run_loop(step, 2, state={}, progress=False)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    with locked(tmp_path, "training"):
        with pytest.raises(FolderInUse, match="in use by another process"):
            run(2, tmp_path)
        with pytest.raises(FolderInUse, match="in use by another process"):
            begin_run(CONFIG, "cpu", tmp_path)
        assert not (tmp_path / "settings.json").exists(), "nor does it write its settings there"
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


# ---- damaged files ----


def flip(position, bit):
    return lambda data: data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "cut": lambda data: data[:1000],
    "its last byte is missing": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\n",
    **{f"bit flipped at {i}": flip(i, i % 8) for i in (0, 30, 100, 500, 900, 1500, 2000, -60, -1)},
}


@pytest.fixture(scope="module")
def whole():
    return run(10)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(damage, whole, tmp_path):
    crash(8, tmp_path)
    last = tmp_path / "checkpoint.pt"
    last.write_bytes(damage(last.read_bytes()))
    with pytest.warns(UserWarning, match=r"checkpoint\.pt is damaged; the one before it is used, of step 3"):
        resumed, rows = run(10, tmp_path)
    assert torch.equal(resumed, whole[0]) and losses(rows) == losses(whole[1])


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_without_a_good_checkpoint_the_error_names_the_files_and_the_fix(damage, tmp_path):
    crash(8, tmp_path)
    files = sorted(tmp_path.glob("checkpoint*.pt"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"checkpoint\.pt and .*checkpoint-before\.pt: damaged.*delete"):
        run(10, tmp_path)
    assert sorted(tmp_path.glob("checkpoint*.pt")) == files, "nothing is deleted"


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path):
    torch.save({"step": 3, "state": Toy().layer.state_dict()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: damaged, or of an earlier version"):
        run(10, tmp_path)


def test_a_crash_between_two_checkpoints_loses_neither(whole, tmp_path):
    """The last is renamed before the new one takes its place; what a killed process began is removed."""
    crash(8, tmp_path)
    (tmp_path / "checkpoint.pt").rename(tmp_path / "checkpoint-before.pt")
    (tmp_path / "checkpoint.pt.0123456789ab.part").write_bytes(b"begun")
    with warnings.catch_warnings(action="error"):
        resumed, _ = run(10, tmp_path)
    assert torch.equal(resumed, whole[0])
    assert {path.name for path in tmp_path.glob("checkpoint*")} == {"checkpoint.pt", "checkpoint-before.pt"}


@pytest.mark.parametrize("log", [b"", b"{", b'{"step": 2, "sec', b"\0" * 9, b"[]\n{}\n", b"\xff\n", None])
def test_a_damaged_log_is_written_again(log, whole, tmp_path):
    crash(8, tmp_path)
    path = tmp_path / "log.jsonl"
    path.unlink() if log is None else path.write_bytes(log)
    resumed, rows = run(10, tmp_path)
    assert torch.equal(resumed, whole[0]) and losses(rows) == losses(whole[1])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows


def train_slowly(out, steps, started):
    started.set()
    run(steps, out, checkpoint_every=1)


def test_a_run_that_is_killed_again_and_again_is_the_uninterrupted_one(tmp_path):
    context, steps, kills, chance = multiprocessing.get_context("forkserver"), 400, 0, random.Random(0)
    context.set_forkserver_preload(["cfclip.method.loop"])
    reached = []
    while kills < 4:
        started = context.Event()
        process = context.Process(target=train_slowly, args=(tmp_path, steps, started))
        process.start()
        assert started.wait(60)
        time.sleep(chance.uniform(0.0, 0.3))
        process.kill()
        process.join()
        kills += process.exitcode == -9
        reached.append((load_checkpoint(tmp_path) or {"step": 0})["step"])
        if reached[-1] == steps:
            break
    assert kills >= 2 and any(0 < step < steps for step in reached), "it was killed while it was training"
    assert reached == sorted(reached)
    whole, rows = run(steps)
    resumed, rows2 = run(steps, tmp_path)
    assert torch.equal(whole, resumed) and losses(rows) == losses(rows2)
    assert not list(tmp_path.glob("*.part"))


# ---- numbers that are not finite ----


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("bad", "kept"), [(0, None), (4, 3), (9, 9)])
def test_a_training_stops_at_its_first_number_that_is_not_finite(value, bad, kept, tmp_path):
    toy, taken = Toy(), []
    honest = toy.step

    def step(i, generator):
        taken.append(i)
        return honest(i, generator) | ({"id": value} if i == bad else {})

    toy.step = step
    with pytest.raises(ValueError, match=rf"^train: id is {value} after step {bad + 1} of 10; .*smaller lr"):
        run(10, tmp_path, toy)
    assert taken[-1] == bad
    saved = load_checkpoint(tmp_path)
    assert saved is None if kept is None else saved["step"] == kept
    with pytest.raises(ValueError, match="id is"):
        run(10, toy=toy)


@pytest.mark.parametrize(("bad", "found"), [(0, 3), (2, 3), (5, 6), (9, 10)])
def test_no_checkpoint_has_a_weight_that_is_not_finite(bad, found, tmp_path):
    """The loss is computed before the step, so that it does not tell."""
    toy = Toy()
    honest = toy.step

    def step(i, generator):
        honest(i, generator)
        if i == bad:
            torch.nn.init.constant_(toy.layer.bias, math.inf)
        return {"loss": 1.0}

    toy.step = step
    with pytest.raises(ValueError, match=f"of layer is not finite after step {found} of 10"):
        run(10, tmp_path, toy)
    saved = load_checkpoint(tmp_path)
    assert (saved or {"step": 0})["step"] == found - (1 if found == 10 else 3)
    assert saved is None or saved["state"]["layer"]["bias"].isfinite().all()


@pytest.mark.parametrize("lr", [1e10, 1e15, 1e20])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_no_mapper_is_written_that_is_not_finite(lr, steps, domain, tmp_path):
    """Nor one that would be infinite in the half floats of its file."""
    with pytest.raises(ValueError, match=r"(is|are) (not finite|inf|nan).* smaller lr"):
        train(domain, tmp_path, lr=lr, steps=steps)
    assert not (tmp_path / "mapper.safetensors").exists()


# ---- a run's folder is that of one run ----


def train(domain, out, method="cfclip", **changes):
    loop = {"progress": False, "checkpoint_every": 2}
    return train_mapper(domain, replace(CONFIG, **changes), out, method, **loop)[0].state_dict()


OTHERS = [
    ("prompt", {"prompt": "blue hair"}),
    ("source_text", {"source_text": "person"}),
    ("seed", {"seed": 1}),
    ("steps", {"steps": 2}),
    ("steps", {"steps": 6}),
    ("objective, temperature, .*", {"objective": ClipDistance()}),
    ("temperature", {"objective": CLIPNCE(temperature=0.2)}),
    ("lr", {"lr": 0.25}),
    ("levels", {"levels": ("fine",)}),
    ("method", {"method": "nada"}),
    ("seed, prompt", {"prompt": "blue hair", "seed": 1}),
]


@pytest.mark.parametrize("left", ["all", "only the checkpoint", "damaged settings", "settings of the other"])
def test_another_run_in_the_same_folder_is_refused_by_name(left, domain, tmp_path):
    out, settings = tmp_path / "run", tmp_path / "run" / "settings.json"
    train(domain, out)
    if left == "only the checkpoint":
        settings.unlink()
    elif left == "damaged settings":
        settings.write_text("{", encoding="utf-8")
    for number, (names, changes) in enumerate(OTHERS):
        if left == "settings of the other":
            begin_run_of(domain, tmp_path / str(number), **changes)
            settings.write_bytes((tmp_path / str(number) / "settings.json").read_bytes())
        before = {path: path.read_bytes() for path in out.glob("*.*")}
        with pytest.raises(
            ValueError, match=rf"run.* holds a run with another {names};.*choose another folder"
        ):
            train(domain, out, **changes)
        assert {path: path.read_bytes() for path in out.glob("*.*")} == before, "nothing is changed"


def test_the_weights_of_a_run_are_never_filed_under_another_prompt(domain, tmp_path):
    small = {"steps": 2, "batch": 1, "train_latents": 2, "num_views": 1, "lr": 60.0}
    first, _ = train_mapper(domain, CFCLIPConfig("green lipstick", **small), out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds a run with another prompt"):
        train_mapper(domain, CFCLIPConfig("blue hair", **small), out=tmp_path, progress=False)
    assert read_header(tmp_path / "mapper.safetensors").card["training"]["prompt"] == "green lipstick"
    other = {"out": tmp_path / "other", "progress": False}
    second, _ = train_mapper(domain, CFCLIPConfig("blue hair", **small), **other)
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("every", [1, 500])
@pytest.mark.parametrize("damage", ["log", "checkpoint"])
def test_a_training_goes_on_from_files_that_a_kill_has_torn(damage, every, domain, tmp_path):
    config = CFCLIPConfig("green lipstick", steps=2, batch=1, train_latents=2, num_views=1)
    given = {"out": tmp_path, "progress": False, "checkpoint_every": every}
    first, rows = train_mapper(domain, config, **given)
    log, checkpoint = tmp_path / "log.jsonl", tmp_path / "checkpoint.pt"
    if damage == "log":
        log.write_bytes(log.read_bytes() + b'{"step": 2, "sec')
    else:
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    if damage == "checkpoint" and every == 500:
        with pytest.raises(ValueError, match=r"checkpoint\.pt: damaged.*delete .* to train anew"):
            train_mapper(domain, config, **given)
        return
    with warnings.catch_warnings(action="ignore"):
        again, rows2 = train_mapper(domain, config, **given)
    same = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same) and losses(rows) == losses(rows2)
    assert [row["step"] for row in read_rows(log)] == [2]


NETWORKS = ("generator", "clip", "identity")


@pytest.mark.parametrize("changed", [*NETWORKS, NETWORKS])
def test_a_run_is_refused_by_name_after_its_domains_networks_changed(changed, domain, tmp_path):
    """A weight that moves by the last digit is another network: the rest of the run would be another's."""
    out, changed = tmp_path / "run", [changed] if isinstance(changed, str) else changed
    first, other = train(domain, out), deepcopy(domain)
    for name in changed:
        with torch.no_grad():
            next(getattr(other, name).parameters()).view(-1)[0].mul_(1 + 1e-6)
    before = {path: path.read_bytes() for path in out.glob("*.*")}
    for left in ("all", "only the checkpoint"):
        if left == "only the checkpoint":
            (out / "settings.json").unlink()
        with pytest.raises(ValueError, match=f"holds a run with another {', '.join(changed)};.*delete this"):
            train(other, out)
    (out / "settings.json").write_bytes(before[out / "settings.json"])
    assert {path: path.read_bytes() for path in out.glob("*.*")} == before
    again = train(deepcopy(domain), out)
    assert all(torch.equal(first[name], again[name]) for name in first), "equal networks are the same"
    train(other, tmp_path / "another folder")


def begin_run_of(domain, out, method="cfclip", **changes):
    begin_run(replace(CONFIG, **changes), domain.device, out, method=method, **domain.described)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"prompt": "green lips', "\0\0", "\ufeff{}", "[" * 9999]
)
def test_damaged_settings_are_written_again_from_the_checkpoint(text, domain, tmp_path):
    first = train(domain, tmp_path)
    settings = tmp_path / "settings.json"
    good = settings.read_text(encoding="utf-8")
    settings.write_text(text, encoding="utf-8")
    again = train(domain, tmp_path)
    assert settings.read_text(encoding="utf-8") == good
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_run_with_fewer_steps_than_were_taken_is_refused(tmp_path):
    run(7, tmp_path)
    with pytest.raises(ValueError, match="holds a run of 7 steps, more than 6"):
        run(6, tmp_path)


def test_a_checkpoint_of_other_networks_is_refused(tmp_path):
    run(7, tmp_path)
    toy = Toy()
    toy.state = {"layer": torch.nn.Linear(3, 1)}
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of other networks"):
        run(10, tmp_path, toy)
