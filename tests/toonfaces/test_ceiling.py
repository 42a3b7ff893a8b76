"""The ceiling on tiny random networks; its numbers for the real ones are in reports/."""

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from cfclip.cli import app
from cfclip.images import to_tensor
from cfclip.toonfaces import ceiling
from cfclip.toonfaces.captions import claim_of
from cfclip.toonfaces.factors import NATURAL, PARTS, sample_face
from cfclip.toonfaces.render import render_image

PROMPTS = ("blue hair", "green beard")


def test_the_prompts_are_two_of_each_part_in_colours_that_it_does_not_have():
    claims = [claim_of(prompt) for prompt in ceiling.PROMPTS]
    assert [part for part, _ in claims] == [part for part in PARTS for _ in range(2)]
    assert len(set(claims)) == len(claims)
    assert all(colour not in NATURAL[part] for part, colour in claims if part not in ("glasses", "shirt"))


def test_an_edit_starts_at_faces_that_have_the_part_and_changes_late_layers_only(domain):
    for start in ceiling.starts(domain, PROMPTS, n=3, steps=4, seed=5, first_layer=4):
        part, colour = claim_of(start.prompt)
        faces = [face for face in (sample_face((5, k)) for k in range(40)) if face.has(part)][:3]
        edited = [face.with_colour(part, colour) for face in faces]
        for pictures, group in ((start.natural, faces), (start.wanted, edited)):
            assert torch.equal(pictures, to_tensor([render_image(face, 16) for face in group]))
        assert start.w.shape == start.w_edited.shape == (3, domain.generator.num_ws, domain.generator.w_dim)
        assert torch.equal(start.w[:, :4], start.w_edited[:, :4])
        assert not torch.equal(start.w[:, 4:], start.w_edited[:, 4:])


def test_the_codes_draw_what_they_are_fitted_to(domain):
    (start,) = ceiling.starts(domain, ["green skin"], n=2, steps=40, first_layer=0)
    centre = domain.generator.w_avg.expand_as(start.w)
    with torch.no_grad():
        source, edited, before = (domain.generator.synthesis(w) for w in (start.w, start.w_edited, centre))
    error = lambda a, b: (a - b).abs().mean()  # noqa: E731
    assert error(source, start.natural) < error(before, start.natural)
    assert error(edited, start.wanted) < error(source, start.wanted)


def test_faces_that_prompts_share_are_fitted_once(domain):
    first, second = ceiling.starts(domain, ["green skin", "blue lipstick"], n=2, steps=2)
    assert first.w is second.w and torch.equal(first.natural, second.natural)


def test_the_ceiling_is_measured_beside_the_truth(domain):
    rows = ceiling.ceiling(domain, PROMPTS, n=2, steps=2)
    assert [(row["prompt"], row["n"]) for row in rows] == [("blue hair", 2), ("green beard", 2)]
    scores = {"success_after", "progress", "leakage", "identity"}
    scores |= {"true_success_after", "true_leakage", "true_identity"}
    assert all(scores <= row.keys() for row in rows)
    assert all(0 <= row["success_after"] <= 1 and np.isfinite(row["identity"]) for row in rows)


def test_the_true_counterfactual_of_the_real_networks_is_right(toonfaces):
    (lips,) = ceiling.ceiling(toonfaces, ["green lipstick"], n=2, steps=2)
    assert lips["true_success_after"] == 1 and lips["true_leakage"] < 0.15 and lips["success_before"] == 0


def test_the_table_ends_with_the_mean_over_prompts():
    row = {"n": 4, "success_after": 1.0, "progress": 0.5, "leakage": 0.5, "identity": 0.75}
    row |= {"true_success_after": 1.0, "true_leakage": 0.125, "true_identity": 1.0, "clip_after": 3.0}
    other = row | {"success_after": 0.5, "leakage": 0.25}
    table = ceiling.ceiling_table([{"prompt": "a"} | row, {"prompt": "b"} | other])
    columns = [
        "success",
        "progress",
        "leakage",
        "true_leakage",
        "leakage_beyond",
        "identity",
        "true_identity",
    ]
    assert list(table) == ["prompt", "n", *columns]
    assert table.leakage_beyond.tolist() == [0.375, 0.125, 0.25]
    assert table.iloc[-1].tolist() == ["mean", 8, 0.75, 0.5, 0.375, 0.125, 0.25, 0.75, 1.0]
    assert pd.api.types.is_integer_dtype(table.n)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompts": ["green skin", "happy"]}, "'happy' does not name the colour of a part"),
        ({"prompts": ["green skin"], "first_layer": 99}, "first_layer must be from 0 to"),
    ],
)
def test_what_cannot_be_asked_for_is_named(given, words, domain):
    with pytest.raises(ValueError, match=words):
        ceiling.ceiling(domain, n=1, steps=1, **given)


def test_the_command_writes_a_table(domain, tmp_path, monkeypatch):
    monkeypatch.setattr(ceiling, "load_toonfaces", lambda folder: domain)
    out, sizes = tmp_path / "ceiling.md", ["--n", "1", "--steps", "1", "--first-layer", "3", "--seed", "9"]
    result = CliRunner().invoke(app, ["toonfaces", "ceiling", *PROMPTS, *sizes, "--out", str(out)])
    assert result.exit_code == 0 and str(out) in result.output
    text = out.read_text(encoding="utf-8")
    first = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert first[0] == "prompt" and first[2:] == [*PROMPTS, "mean"]
    for words in (
        "leakage beyond",
        "true identity",
        "1 steps of Adam",
        "layers from 3 on",
        "n = 1",
        "seed 9",
    ):
        assert words in text
