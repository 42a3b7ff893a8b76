"""The panel without a browser: a control changes the recipe, and the recipe moves every control."""

import io
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from panels import PROMPTS, domain_folder, started
from PIL import Image

from cfclip.explorer.frames import STRENGTHS_SHOWN, strip
from cfclip.explorer.model import MERGE_SECONDS, Explorer
from cfclip.explorer.stage import Stage
from cfclip.explorer.view import View, scores_html
from cfclip.models.mapper import Mapper, MapperConfig


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
    assert all(row["image"].startswith(b"\x89PNG") for row in view.stage.rows)
    picture = view.stage.rows[1]["image"]
    view.prompt.value = "word " * 40
    e.wait()
    assert "shorten it" in view.message.value and view.stage.rows[1]["image"] == picture
    view.prompt.value = "<b>"
    e.wait()
    assert "<b>" not in view.hint.value + view.message.value
    view.prompt.value = "green lipstick"
    e.wait()
    assert view.message.value == "" and "identity" in view.scores.value


def test_a_sketch_comes_as_jpeg_and_what_is_exact_stays_exact():
    stage, row = Stage(), np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    smooth = np.repeat(row[:, :1, :1], 16, 1).repeat(16, 2)

    def shown(sketch: bool) -> tuple[str, np.ndarray]:
        stage.show({"green lips": smooth}, sketch)
        image = Image.open(io.BytesIO(stage.rows[0]["image"]))
        return image.format, np.asarray(image, int)

    (first, sketch), (second, exact), (third, again) = shown(True), shown(False), shown(True)
    assert (first, second, third) == ("JPEG", "PNG", "PNG")
    assert np.array_equal(exact, strip(smooth)) and np.array_equal(again, exact)
    assert 0 < np.abs(sketch - exact).max() < 12


def test_scores_are_shown_before_and_after_the_edit():
    clip = {"clip_before": 20.04, "clip_after": 25.0}
    success = {"success_before": 0.0, "success_after": 0.875, "progress": 0.432}
    text = scores_html(clip | success)
    assert "20.0 → 25.0" in text and "0% → 88%" in text and "43%" in text and "leakage" not in text
    both = scores_html({"identity": 0.9}, {"identity": 0.25})
    assert "<b>0.900</b>" in both and "photos: 0.250" in both, "photos count apart"


def is_old(view: View) -> bool:
    return "cfx-scores-old" in view.scores._dom_classes


def test_scores_that_are_not_of_the_picture_are_grey(view):
    e, seen = view.explorer, []
    assert not is_old(view)
    view.stage.observe(lambda change: seen.append(is_old(view)), "rows")
    view.strength.value = 0.3
    assert is_old(view) or e.frame.notes
    e.wait()
    assert seen[0] and not is_old(view), "grey with the picture, until they are measured"
    view.prompt.value = "word " * 40
    e.wait()
    assert is_old(view)


def test_what_the_mapper_does_not_move_is_grey_and_says_so(domain, tmp_path):
    g, split = domain.generator, (2, 4)
    sizes = MapperConfig(g.num_ws, g.w_dim, domain.clip.embed_dim, ("fine",), split=split)
    mapper = Mapper.initialised(sizes, torch.Generator().manual_seed(0))
    explorer = Explorer(replace(domain, mapper=mapper, level_split=split), "pink hair", 1, tmp_path)
    explorer.wait()
    view = View(explorer)
    assert [level.disabled for level in view.levels.values()] == [True, True, False]
    assert "does not move" in view.levels["coarse"].tooltip and view.levels["fine"].tooltip == ""
    assert [slider.disabled for slider in view.layer_box.children] == [i < 4 for i in range(sizes.num_ws)]
    assert "does not move the grey ones" in view.layer_words.value
    explorer.close()


def widgets(widget):
    return [widget, *(one for child in getattr(widget, "children", ()) for one in widgets(child))]


def test_no_tooltip_is_null(view):
    assert [one for one in widgets(view) if getattr(one, "tooltip", "") is None] == []


def test_files_go_to_the_browser_and_no_path_of_the_server_is_shown(view, monkeypatch):
    sent = []
    monkeypatch.setattr(view.stage, "send", lambda content, buffers=(): sent.append((content, buffers)))
    view.explorer.export()
    view.explorer.wait()
    assert str(view.explorer.out) not in view.note.value and len(view.downloads.children) >= 4
    for button, file in zip(view.downloads.children, view.explorer.exported, strict=True):
        button.click()
        content, (data,) = sent.pop()
        assert content["download"] == file.name and data == file.read_bytes()
    view._heard({"event": "ping"}, [])
    assert sent == [({"pong": True}, ())], "which tells the browser that the kernel listens"


def test_a_chip_is_a_prompt_that_works_and_a_press_chooses_it(view):
    chips = {chip.description: chip for chip in view.chips.children}
    assert list(chips) == list(view.explorer.suggestions) == list(PROMPTS)
    chips["blue hair"].click()
    assert view.prompt.value == view.explorer.recipe.prompt == "blue hair"


def test_keys_and_clicks_in_the_picture_change_the_recipe(view):
    e = view.explorer
    for key, strength in (("ArrowUp", 1.1), ("ArrowDown", 1.0), ("z", 1.1), ("y", 1.0)):
        view._heard({"event": "key", "key": key}, [])
        time.sleep(MERGE_SECONDS)
        assert e.recipe.strength == view.strength.value == strength
    view._heard({"event": "lock", "face": 2}, [])
    e.wait()
    assert [face["locked"] for face in view.stage.faces] == [False, False, True]
    view._heard({"event": "key", "key": "n"}, [])
    assert e.recipe.faces[2] == 2 and 0 not in e.recipe.faces
