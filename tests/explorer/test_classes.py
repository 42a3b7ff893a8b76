"""The class of a class-conditional generator: part of the recipe, chosen in the panel, hidden elsewhere."""

import dataclasses

import official
import pytest
import torch
from panels import domain_folder, started

from cfclip.domains import DOMAINS
from cfclip.explorer.model import Explorer
from cfclip.explorer.recipe import Recipe, render
from cfclip.explorer.view import View


@pytest.fixture
def classes(domain):
    sizes = {"z_dim": 12, "w_dim": 16, "mapping_layers": 2, "c_dim": 5}
    return dataclasses.replace(domain, generator=official.random_generator(16, (8, 8, 8), **sizes))


@pytest.fixture
def explorer(classes, tmp_path):
    explorer = started(classes, domain_folder(classes, tmp_path))
    assert explorer.wait()
    yield explorer
    explorer.close()


def pictures(domain, label, n=3):
    """The unedited faces of a class."""
    d = dataclasses.replace(domain, label=label)
    with torch.no_grad():
        return d.generator.synthesis(torch.cat([d.latents(1, "test", seed) for seed in range(n)]))


def test_the_chosen_class_is_drawn(explorer, classes):
    assert explorer.classes == 5 and explorer.recipe.label == 0 and explorer.message == ""
    assert torch.equal(explorer.frame.source, pictures(classes, 0))
    for change in ({"label": 3, "strength": 0.3}, {"label": 4}):
        explorer.change(**change)
        assert explorer.wait() and explorer.message == ""
        assert torch.equal(explorer.frame.source, pictures(classes, change["label"]))
        assert torch.equal(explorer.frame.edited, render(classes, explorer.recipe))
        assert explorer.frame.scores["clip_before"] != 0
    explorer.undo()
    assert explorer.wait() and torch.equal(explorer.frame.source, pictures(classes, 3))


@pytest.mark.parametrize("label", [5, -1, "cat", 1.0])
def test_a_class_that_is_not_there_changes_nothing(explorer, label):
    before = explorer.recipe
    explorer.change(label=label)
    assert explorer.recipe == before and ("0 to 4" in explorer.message or "label must be" in explorer.message)
    assert explorer.wait()


def test_a_recipe_keeps_its_class(explorer, classes, monkeypatch):
    explorer.change(label=2)
    text, code = explorer.recipe.to_json(), explorer.recipe.code()
    assert Recipe.from_json(text) == explorer.recipe and "load_domain('tiny', label=2)" in code
    monkeypatch.setitem(DOMAINS, "tiny", lambda: classes)
    space = {}
    exec(code, space)
    assert torch.equal(space["images"], render(classes, explorer.recipe))
    explorer.change(label=4)
    explorer.open(text)
    assert explorer.wait() and explorer.recipe.label == 2
    explorer.open(text.replace('"label": 2', '"label": 7'))
    assert explorer.wait() and explorer.recipe.label == 2 and "one of 0 to 4, not 7" in explorer.message
    explorer.open(text.replace(', "label": 2', ""))
    assert explorer.wait() and explorer.recipe.label == 2 and "needs a class" in explorer.message


def test_the_panel_has_the_class_only_where_there_are_any(explorer, domain, tmp_path):
    view = View(explorer)
    assert (view.label.layout.display, view.label.max, view.label.value) == ("", 4, 0)
    view.label.value = 3
    assert explorer.wait() and explorer.recipe.label == 3 and explorer.message == ""
    view.undo.click()
    assert explorer.recipe.label == view.label.value == 0
    plain = started(domain, tmp_path)
    assert View(plain).label.layout.display == "none" and plain.recipe.label is None
    assert plain.wait() and plain.message == ""
    plain.change(label=0)
    assert "has no classes" in plain.message and plain.recipe.label is None
    plain.close()


def test_an_explorer_begins_with_the_class_that_is_asked_for(classes, tmp_path):
    for domain, label, right in ((classes, 2, 2), (dataclasses.replace(classes, label=1), None, 1)):
        explorer = Explorer(domain, n=1, out=tmp_path, label=label)
        assert explorer.recipe.label == explorer.domain.label == right
        explorer.close()
    with pytest.raises(ValueError, match="one of 0 to 4, not 9"):
        Explorer(classes, n=1, out=tmp_path, label=9)
