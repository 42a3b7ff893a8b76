"""The panel without a browser: a control changes the recipe, and the recipe moves every control."""

import subprocess
import sys

import pytest
from panels import domain_folder, started

from cfclip.explorer.frames import STRENGTHS_SHOWN
from cfclip.explorer.view import View, scores_html


@pytest.fixture
def view(domain, tmp_path):
    explorer = started(domain, domain_folder(domain, tmp_path))
    explorer.wait()
    yield View(explorer)
    explorer.close()


def test_the_model_runs_without_widgets():
    code = (
        "import cfclip.explorer, sys; assert not {'ipywidgets', 'cfclip.explorer.view'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_controls_change_the_recipe(view):
    e = view.explorer
    view.strength.value = 0.5
    view.prompt.value = "blue hair"
    view.levels["coarse"].value = False
    view.layer_box.children[-1].value = 0.25
    view.region.value = "box"
    view.across.value = (0.0, 0.5)
    view._heard({"event": "lock", "face": 1}, [])
    e.wait()
    assert (e.recipe.strength, e.recipe.prompt) == (0.5, "blue hair")
    assert e.recipe.layers == (0.0,) * 4 + (1.0, 0.25) and e.recipe.region == (0.0, 0.2, 0.5, 0.8)
    assert e.locked == (1,) and e.recipe.mapper == str(e.runs[1] / "1" / "mapper.safetensors")
    assert view.mapper.label == "blue hair (cfclip)" and not view.levels["coarse"].value
    assert view.code.value == e.recipe.code() and e.message == ""


def test_undo_moves_the_controls_back(view):
    e, before = view.explorer, view.explorer.recipe
    view.strength.value = -1.0
    view.region.value = "hair"
    assert len(view.entries.options) == len(e.history)
    view.undo.click()
    view.undo.click()
    assert e.recipe == before and view.strength.value == before.strength and view.region.value == ""
    view.entries.value = len(e.history) - 1
    assert e.recipe.region == "hair" and view.region.value == "hair" and view.redo.disabled


def test_the_panel_shows_the_pictures_and_the_message(view):
    e = view.explorer
    view.show.value = "strengths"
    e.wait()
    assert [row["label"] for row in view.stage.rows] == [f"× {s:g}" for s in STRENGTHS_SHOWN]
    assert all(row["png"].startswith(b"\x89PNG") for row in view.stage.rows)
    picture = view.stage.rows[1]["png"]
    view.prompt.value = "word " * 40
    e.wait()
    assert "shorten it" in view.message.value and view.stage.rows[1]["png"] == picture
    view.prompt.value = "<b>"
    e.wait()
    assert "<b>" not in view.hint.value + view.message.value
    view.prompt.value = "green lipstick"
    e.wait()
    assert view.message.value == "" and "identity" in view.scores.value


def test_scores_are_shown_before_and_after_the_edit():
    clip, success = (
        {"clip_before": 20.04, "clip_after": 25.0},
        {"success_before": 0.0, "success_after": 0.875, "progress": 0.432},
    )
    text = scores_html(clip | success)
    assert "20.0 → 25.0" in text and "0% → 88%" in text and "43%" in text and "leakage" not in text
