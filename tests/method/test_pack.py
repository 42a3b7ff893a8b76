"""Many trainings in lock-step: each is the training alone, to rounding."""

import json
import math
from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from cfclip.baselines import METHODS, Job, configure, fit, fit_many
from cfclip.baselines.editor import Editor
from cfclip.files import locked
from cfclip.method import FrozenNetworks, MapperTrainer
from cfclip.method.config import CFCLIPConfig
from cfclip.method.loop import Request, generator_for, load_checkpoint
from cfclip.method.pack import Pack, Stack, run_together, stacked
from cfclip.method.trainer import mapper_loop, train_mapper

SMALL = {"steps": 7, "train_latents": 6, "num_views": 2, "lr": 0.5}
SETTINGS = {
    "red": ("cfclip", "red skin", {}),
    "blue": ("cfclip", "blue hair", {"seed": 3, "source_text": "person"}),
    "short": ("cfclip", "green lipstick", {"steps": 4, "train_latents": 5, "lambda_l2": 0.5}),
    "adam": ("cfclip", "green lipstick", {"optimizer": "adam", "lr": 0.01, "batch": 3}),
    "adam2": ("cfclip", "pink hair", {"optimizer": "adam", "lr": 0.01, "batch": 3, "seed": 1}),
    "per image": ("cfclip", "red skin", {"negatives": "per_image", "levels": ["fine"]}),
    "styleclip": ("styleclip-mapper", "red skin", {"num_views": 0, "steps": 5}),
    "styleclip2": ("styleclip-mapper", "blue hair", {"num_views": 0}),
    "nada": ("nada", "blue hair", {"num_views": 1, "lambda_id": 0.0}),
    "offset": ("offset", "blue hair", {}),
    "offset2": ("offset", "red skin", {"seed": 9}),
    "paler": ("cfclip", "blue hair", {"train_strength": 0.8}),
    "paler2": ("cfclip", "red skin", {"train_strength": 0.8, "seed": 2}),
    "alone": ("cfclip", "blue hair", {"micro_batch": 1}),  # cannot be one of a pack
}


def jobs_in(folder, names=SETTINGS, **more):
    given = {name: SETTINGS[name] for name in names}
    return [
        Job(method, prompt, folder / name, SMALL | settings | more)
        for name, (method, prompt, settings) in given.items()
    ]


def fit_alone(domain, job: Job, out=None) -> Editor:
    return fit(job.method, domain, job.prompt, out=out, progress=False, checkpoint_every=3, **job.settings)


def close(a: Editor, b: Editor) -> None:
    """The same weights and logs, to rounding: of float32, then of the half floats of a mapper's file."""
    for x, y in zip(a.module.state_dict().values(), b.module.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-4)
    assert [row["step"] for row in a.rows] == [row["step"] for row in b.rows]
    for one, other in zip(a.rows, b.rows, strict=True):
        assert one == pytest.approx(other | {"seconds": one["seconds"]}, rel=1e-4, abs=1e-5)


def contents(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_every_member_is_its_training_alone(domain, tmp_path):
    """Four methods, other prompts, seeds, lengths, batches, optimisers: results, logs and files."""
    jobs = jobs_in(tmp_path / "pack")
    together = fit_many(domain, jobs, progress=False, checkpoint_every=3)
    for job, editor in zip(jobs, together, strict=True):
        out = tmp_path / "alone" / job.out.name
        alone = fit_alone(domain, job, out)
        close(editor, alone)
        assert contents(job.out) == contents(out)
        settings = [json.loads((folder / "settings.json").read_text()) for folder in (job.out, out)]
        assert settings[0] == settings[1]
        saved, saved_alone = load_checkpoint(job.out), load_checkpoint(out)
        assert saved["step"] == saved_alone["step"] == job.settings["steps"]
        moved = [one["state"]["optimizer"]["param_groups"] for one in (saved, saved_alone)]
        assert moved[0] == moved[1], "the optimiser's settings and steps"
        states = [one["state"]["optimizer"]["state"] for one in (saved, saved_alone)]
        assert [list(state) for state in states[0].values()] == [list(state) for state in states[1].values()]
        again = fit_alone(domain, job, job.out)
        assert again.rows == editor.rows, "a finished training is found"


def test_a_finished_training_is_opened_without_its_sources(domain, tmp_path, monkeypatch):
    """And where they cannot be encoded, each job has the error."""
    jobs = jobs_in(tmp_path, ("red", "offset"))
    done = fit_many(domain, jobs, progress=False)

    def damaged(*_):
        raise ValueError("damaged codes")

    monkeypatch.setattr(FrozenNetworks, "sources", damaged)
    for job, editor in zip(jobs, done, strict=True):
        assert fit_alone(domain, job, job.out).rows == editor.rows
    errors = fit_many(domain, jobs_in(tmp_path / "new", ("red", "offset")), progress=False)
    assert [str(error) for error in errors] == ["damaged codes"] * 2


def test_a_result_depends_on_its_own_settings_alone(domain, tmp_path):
    """So that the comparison above could fail."""
    red, blue = fit_many(domain, jobs_in(tmp_path, ("red", "blue")), progress=False)
    other = fit_alone(domain, jobs_in(tmp_path, ("red",), seed=1)[0])
    for wrong in (blue, other):
        with pytest.raises(AssertionError):
            close(red, wrong)


def crashing(call, at: int):
    """``call`` until its ``at``-th call."""
    calls = iter(range(at))

    def called(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return call(*args)

    return called


@pytest.mark.parametrize("first", ["pack", "alone"])
def test_a_stopped_member_goes_on_alone_and_a_training_alone_in_a_pack(first, domain, tmp_path, monkeypatch):
    jobs = jobs_in(tmp_path, ("red", "blue", "offset", "offset2", "styleclip2"))
    with monkeypatch.context() as patch:
        if first == "pack":
            patch.setattr(Pack, "step", crashing(Pack.step, 5))
            with pytest.raises(KeyboardInterrupt):
                fit_many(domain, jobs, progress=False, checkpoint_every=3)
        else:
            for job in jobs[:-1]:  # the last one has not begun
                patch.setattr(MapperTrainer, "step", crashing(MapperTrainer.__dict__["step"], 5))
                with pytest.raises(KeyboardInterrupt):
                    fit_alone(domain, job, job.out)
                patch.undo()
    if first == "pack":
        assert {load_checkpoint(job.out)["step"] for job in jobs} == {3}
        resumed = [fit_alone(domain, job, job.out) for job in jobs]
    else:
        resumed = fit_many(domain, jobs, progress=False, checkpoint_every=3)
    for job, editor in zip(jobs, resumed, strict=True):
        close(editor, fit_alone(domain, job))


def test_a_failed_member_leaves_the_others_untouched(domain, tmp_path):
    jobs = jobs_in(tmp_path, ("red", "blue", "offset"))
    bad = [
        Job("cfclip", "pink hair", tmp_path / "bad", SMALL | {"lr": 1e20}),  # not finite, after a step
        Job("cfclip", "pink hair", tmp_path / "in use", SMALL),
        Job("cfclip", "", tmp_path / "unreadable", SMALL),
        Job("cfclip", "pink hair", tmp_path / "wrong", SMALL | {"steps": 0}),
        Job("cfclip", "pink hair", tmp_path / "red", SMALL),  # the folder of another job
    ]
    with locked(tmp_path / "in use", "training"):
        results = fit_many(domain, [*bad, *jobs], progress=False)
    for job, error in zip(bad[:4], results, strict=False):
        assert isinstance(error, ValueError), job
    with pytest.raises(ValueError, match=r"pink hair: .* smaller lr") as alone:
        fit_alone(domain, bad[0])
    assert str(results[0]).partition(" of ")[0] == str(alone.value).partition(" of ")[0]
    assert "in use" in str(results[1]) and "prompt must be" in str(results[2]) and "steps" in str(results[3])
    clash = [one for one in (results[4], results[5]) if isinstance(one, Exception)]
    assert len(clash) == 1, "one of the two jobs of a folder is done"
    for job, editor in zip(jobs[1:], results[6:], strict=True):
        close(editor, fit_alone(domain, job))


def test_numbers_that_are_not_finite_stay_in_their_member(domain, monkeypatch):
    """Inside one stack, whose members share every product of matrices."""

    def poisoned(loop):
        run = next(loop)
        with torch.no_grad():
            next(run.mapper.parameters()).fill_(math.nan)
        yield run
        return (yield from loop)

    networks, sizes = cache(partial(FrozenNetworks, domain)), []
    base = CFCLIPConfig("red skin", steps=3, train_latents=4)
    configs = [base, replace(base, prompt="blue hair", seed=2), replace(base, prompt="pink hair")]
    first, bad, last = (mapper_loop(domain, one, networks=networks, progress=False) for one in configs)
    init = Stack.__init__
    monkeypatch.setattr(Stack, "__init__", lambda self, some: sizes.append(len(some)) or init(self, some))
    *good, wrong = run_together([first, last, poisoned(bad)], progress=False)
    assert sizes == [3, 2], "the failed member leaves the stack"
    assert isinstance(wrong, ValueError) and "is nan after step 1 of 3" in str(wrong)
    for (run, _), config in zip(good, (configs[0], configs[2]), strict=True):
        alone, _ = train_mapper(domain, config, progress=False)
        for x, y in zip(run.mapper.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_trainings_that_are_alike_are_one_stack(domain):
    def asked(*jobs):
        runs = [
            METHODS[method].editor.TRAINER(
                domain, configure(method, prompt, **SMALL | given), networks=networks
            )
            for method, prompt, given in jobs
        ]
        return {run: Request(0, generator_for(0, 0), False) for run in runs}

    networks = cache(partial(FrozenNetworks, domain))
    units = stacked(asked(*(SETTINGS[name] for name in ("red", "blue", "offset", "offset2", "adam", "nada"))))
    sizes = [len(unit.members) if isinstance(unit, Stack) else 1 for unit in units]
    assert sizes == [2, 2, 1, 1]


def test_two_guides_and_a_dtype_of_their_own(two_guides, tmp_path):
    """Trainings that share no pass are two packs; each is as alone."""
    jobs = [
        *jobs_in(tmp_path, ("red", "blue", "nada"), guides=2),
        *jobs_in(tmp_path / "half", ("red", "blue"), dtype="bfloat16", steps=2),
    ]
    for job, editor in zip(jobs, fit_many(two_guides, jobs, progress=False), strict=True):
        if "dtype" in job.settings:
            assert editor.config.dtype == "bfloat16" and len(editor.rows) == 1
        else:
            close(editor, fit_alone(two_guides, job))
