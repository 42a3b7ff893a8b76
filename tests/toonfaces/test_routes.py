"""The ways to train one mapper for many prompts."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from cfclip.method.trainer import MapperTrainer
from cfclip.toonfaces.train import multi, routes

SEEN, UNSEEN = ("green lipstick", "blue hair"), ("pink hair",)


@pytest.fixture
def domain(domain):
    """With layers that colour."""
    return replace(domain, level_split=(2, 4), perceptual=torch.nn.Identity())


@pytest.fixture
def few(monkeypatch):
    """Two seen prompts and an unseen one, and trainings of a few steps."""
    monkeypatch.setattr(multi, "split", lambda: (SEEN, UNSEEN))
    monkeypatch.setattr(routes, "own_prompts", lambda: (SEEN[0], *UNSEEN))
    short = {"steps": 2, "batch": 2, "train_latents": 3, "num_views": 1}
    for name in ("heldout_config", "pooled_config"):
        config = partial(getattr(multi, name), **short | {"prompts_at_once": 2, "prompts": SEEN})
        monkeypatch.setattr(multi, name, lambda config=config, **given: config(**given | {"steps": 2}))
    for name in ("ALONE", "TEACHER"):
        monkeypatch.setattr(routes, name, getattr(routes, name) | short)
    monkeypatch.setattr(routes, "PAIRS", 20)
    monkeypatch.setattr(routes, "learn", partial(routes.learn, steps=2))
    monkeypatch.setattr(routes, "learn_pairs", partial(routes.learn_pairs, steps=2))
    monkeypatch.setattr(routes, "TAUGHT", -1.0)  # nothing succeeds in the tiny domain


def test_a_mapper_that_reads_words_learns_what_teachers_do(domain, tmp_path):
    first = domain.level_split[1]
    torch.manual_seed(0)
    moves = {prompt: torch.zeros(domain.generator.num_ws, domain.generator.w_dim) for prompt in SEEN}
    for move in moves.values():
        move[first:].normal_()
    config = multi.heldout_config(prompts=SEEN, prompts_at_once=1)
    mapper, seconds = routes.learn(domain, moves, config, tmp_path, steps=200)
    w = domain.latents(4, "test")
    for prompt, move in moves.items():
        moved = mapper.edit(w, mapper.read(domain.clip, f"a face with {prompt}")) - w
        assert (moved - move).square().mean() < 0.1 * move.square().mean() and seconds > 0


def test_pairs_read_how_a_text_differs_from_the_source(domain, few, tmp_path):
    mapper, _ = routes.learn_pairs(domain, tmp_path, 0)
    read = mapper.read(domain.clip, ["green lipstick", "blue hair"])
    assert read.norm(dim=1).tolist() == pytest.approx([1, 1])
    a, b = (torch.nn.functional.normalize(domain.clip.encode_text(t), dim=-1) for t in ("blue hair", "face"))
    torch.testing.assert_close(read[1:], torch.nn.functional.normalize(a - b, dim=-1))
    w = domain.latents(2)
    once, twice = (mapper.edit(w, read, strength) - w for strength in (1.0, 2.0))
    torch.testing.assert_close(2 * once, twice)


def test_teachers_that_fail_are_left_out(domain, few, tmp_path, monkeypatch):
    monkeypatch.setattr(routes, "TAUGHT", 0.5)

    def compared(domain, offset, faces):
        return pd.DataFrame({"success_after": [float("blue hair" in faces), np.nan, 1.0]})

    monkeypatch.setattr(routes, "compare", compared)
    teachers, _ = routes.teach(domain, SEEN, tmp_path, 0)
    assert list(teachers) == ["blue hair"]
    fixed = teachers["blue hair"][: domain.level_split[1]]
    assert (fixed == 0).all() and (teachers["blue hair"] != 0).any()


def test_every_route_has_its_rows_and_nothing_is_trained_twice(domain, few, tmp_path, monkeypatch):
    table = routes.compared(domain, tmp_path, (0, 1), 2)
    every = ["alone", "words", "teachers", "teachers, then words", "pairs", "whole"]
    assert list(dict.fromkeys(table["route"])) == every
    counts = table.groupby("route")["prompt"].count().to_dict()
    assert counts == dict.fromkeys(every, 2) | {"words": 4}
    assert table.groupby("prompt")["seen"].first().to_dict() == {SEEN[0]: True, "pink hair": False}
    assert (table["failed"] == "").all()  # every teacher counts as good here
    lines = routes.by_route(table)
    assert len(lines) == 12 and set(lines["prompts"]) == {1}
    assert list(routes.by_part(table).columns) == ["part", *every]
    monkeypatch.setattr(MapperTrainer, "step", None)  # a second training would fail
    some = routes.compared(domain, tmp_path, (0, 1), 2, ["words", "teachers, then words"])
    assert list(dict.fromkeys(some["route"])) == ["words", "teachers, then words"]
    again = routes.compared(domain, tmp_path, (0, 1), 2)
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), again.drop(columns="seconds"))


def test_a_share_is_of_the_success_of_mappers_of_their_own():
    rows = [
        ("alone", "a", 0, 0.5), ("alone", "b", 0, 1.0), ("words", "a", 0, 0.25), ("words", "b", 0, 0.5),
        ("words", "a", 1, 1.0), ("words", "b", 1, 1.0),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["route", "prompt", "seed", "kept"])
    others = dict.fromkeys(("success_after", "progress", "leakage", "identity", "seconds"), 1.0)
    line = routes.by_route(table.assign(seen=False, part="hair", **others)).set_index("route")
    assert line["kept"].to_dict() == {"alone": 0.75, "words": 0.6875}
    assert line["share_of_own"].to_dict() == {"alone": 1.0, "words": 0.6875 / 0.75}
    assert line["prompts"].to_dict() == {"alone": 2, "words": 2} and line["seeds"].to_dict() == {
        "alone": 1,
        "words": 2,
    }


def test_a_success_on_somebody_else_is_not_kept(domain, few, tmp_path, monkeypatch):
    faces = {
        "prompt": "pink hair",
        "success_after": [1.0, 1.0, 0.0, np.nan],
        "identity": [0.9, 0.8, 0.9, 0.8],
    }
    faces |= dict.fromkeys(("progress", "leakage"), 0.0)
    monkeypatch.setattr(routes, "compare", lambda *given: pd.DataFrame(faces))
    monkeypatch.setattr(routes, "trained", lambda *given: [("alone", 0, None, 1.0, ["pink hair"])])
    monkeypatch.setattr(routes, "best_strength", lambda *given: 1.3)
    row = routes.compared(domain, tmp_path).iloc[0]
    assert row["kept"] == pytest.approx(1 / 3) and row["success_after"] == pytest.approx(2 / 3)
    assert row["n_judged"] == 3 and row["strength"] == 1.3


def test_a_route_gets_the_least_strength_that_is_as_good_as_any(domain, monkeypatch):
    success = dict(zip(routes.STRENGTHS, [0.2, 0.6, 0.595, 0.604, 0.1], strict=True))
    monkeypatch.setattr(
        routes,
        "compare",
        lambda domain, mapper, faces, strength: pd.DataFrame({
            "success_after": [success[strength]],
            "identity": [1.0],
        }),
    )
    assert routes.best_strength(domain, None, {}) == 1.2
