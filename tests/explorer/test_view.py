"""The panel without a browser: a control changes the recipe, the recipe moves every control."""

import ast
from importlib import import_module

import pytest
from test_explorer import domain_folder, started

from cfclip.explorer.view import View, scores_html


@pytest.fixture
def view(domain, tmp_path):
    explorer = started(domain, domain_folder(domain, tmp_path))
    explorer.wait()
    yield View(explorer)
    explorer.close()


@pytest.mark.parametrize("name", ["recipes", "explorer_frames", "explorer_workers", "explorer"])
def test_the_model_knows_no_widgets(name):
    source = import_module(f"cfclip.{name}").__loader__.get_source(f"cfclip.{name}")
    names = [
        n.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for n in node.names
    ]
    names += [node.module or "" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert names and not any("ipywidgets" in one or "explorer_view" in one for one in names)


def test_controls_change_the_recipe(view):
    e = view.explorer
    view.strength.value = 0.5
    view.prompt.value = "blue hair"
    view.levels["coarse"].value = False
    view.layer_box.children[-1].value = 0.25
    view.region.value = "box"
    view.across.value = (0.0, 0.5)
    view.locks[1].value = True
    e.wait()
    assert (e.recipe.strength, e.recipe.prompt, e.recipe.layers) == (
        0.5,
        "blue hair",
        (0.0,) * 4 + (1.0, 0.25),
    )
    assert (
        e.recipe.region == (0.0, 0.2, 0.5, 0.8)
        and e.locked == (1,)
        and e.recipe.mapper.endswith("1/mapper.safetensors")
    )
    assert view.mapper.label == "blue hair (cfclip)" and not view.levels["coarse"].value
    assert view.code.value == e.recipe.code() and e.message == ""


def test_undo_moves_the_controls(view):
    e, before = view.explorer, view.explorer.recipe
    view.strength.value = -1.0
    view.region.value = "hair"
    assert len(view.entries.options) == len(e.history)
    view.undo.click()
    view.undo.click()
    assert e.recipe == before and view.strength.value == before.strength and view.region.value == ""
    view.entries.value = len(e.history) - 1
    assert e.recipe.region == "hair" and view.region.value == "hair" and view.redo.disabled


def test_rows_and_words(view):
    e = view.explorer
    view.show.value = "strengths"
    e.wait()
    assert [row.layout.display for row in view.rows].count("") == 6
    assert (
        all(bytes(image.value).startswith(b"\x89PNG") for image in view.images[:6])
        and "× 0.5" in view.labels[2].value
    )
    picture = bytes(view.images[1].value)
    view.prompt.value = "word " * 40
    e.wait()
    assert "shorten it" in view.message.value and bytes(view.images[1].value) == picture
    view.prompt.value = "<b>"
    e.wait()
    assert "<b>" not in view.labels[0].value + view.message.value
    view.prompt.value = "green lipstick"
    e.wait()
    assert view.message.value == "" and "identity" in view.scores.value


def test_scores():
    text = scores_html({
        "clip_before": 20.04,
        "clip_after": 25.0,
        "success_before": 0.0,
        "success_after": 0.875,
    })
    assert "20.0 → 25.0" in text and "0% → 88%" in text and "leakage" not in text
