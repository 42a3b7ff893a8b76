"""The ways to train one mapper for many prompts."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from cfclip.toonfaces.train import multi, routes

SEEN, UNSEEN = ("green lipstick", "blue hair"), ("pink hair",)


@pytest.fixture
def domain(domain):
    """With layers that colour."""
    return replace(domain, level_split=(2, 4))


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
    assert read.norm(dim=1).tolist() == pytest.approx([mapper.gain] * 2)
    a, b = (torch.nn.functional.normalize(domain.clip.encode_text(t), dim=-1) for t in ("blue hair", "face"))
    torch.testing.assert_close(read[1:], mapper.gain * torch.nn.functional.normalize(a - b, dim=-1))


def test_teachers_that_fail_are_left_out(domain, few, tmp_path, monkeypatch):
    monkeypatch.setattr(routes, "TAUGHT", 0.5)
    monkeypatch.setattr(routes, "success_on_training_faces", lambda d, m, prompt: prompt == "blue hair")
    teachers, failed, _ = routes.teach(domain, SEEN, tmp_path, 0)
    assert list(teachers) == ["blue hair"] and failed == ["green lipstick"]
    fixed = teachers["blue hair"][: domain.level_split[1]]
    assert (fixed == 0).all() and (teachers["blue hair"] != 0).any()


def test_every_route_has_its_line_and_nothing_is_trained_twice(domain, few, tmp_path, monkeypatch):
    monkeypatch.setattr(routes, "load_toonfaces", lambda: domain)
    path = routes.write_routes(tmp_path / "routes.md", tmp_path / "runs", (0, 1), 2)
    page = path.read_text(encoding="utf-8")
    for route in ("alone", "words", "whole", "teachers", "teachers, then words", "pairs"):
        assert f"| {route} " in page
    monkeypatch.setattr(routes.CFCLIPConfig, "__post_init__", lambda self: None)
    again = routes.write_routes(tmp_path / "again.md", tmp_path / "runs", (0, 1), 2)
    assert len(again.read_text(encoding="utf-8")) == len(page)


def test_a_share_is_of_the_success_of_mappers_of_their_own_at_the_same_identity(monkeypatch):
    monkeypatch.setattr(routes, "own_prompts", lambda: ("a", "b"))
    rows = [
        ("alone", "a", 1.0, 0.9), ("alone", "a", 1.0, 0.2), ("alone", "b", 1.0, 0.9),
        ("alone", "b", np.nan, 0.2), ("words", "a", 0.0, 0.9), ("words", "a", 1.0, 0.9),
        ("words", "b", 1.0, 0.9), ("words", "c", 0.0, 0.9),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["route", "prompt", "success_after", "identity"])
    table["kept"] = routes.kept(table)
    table = table.assign(seed=0, seen="unseen", seconds=1.0, progress=0.5, leakage=0.1)
    line = routes.by_route(table).set_index("route")
    assert line["kept"].to_dict() == {"alone": 0.75, "words": 0.75}
    assert line["share_of_own"].to_dict() == {"alone": 1.0, "words": 1.0}
    assert line["prompts"].to_dict() == {"alone": 2, "words": 2}
