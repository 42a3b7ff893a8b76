"""The explorer's model, on tiny networks: it shows its recipe, whatever is changed in whatever order."""

import gc
import io
import json
import logging
import re
import resource
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from panels import PROMPTS, TRAINING, domain_folder, started, write_mapper
from PIL import Image
from safetensors.torch import save_file

from cfclip.baselines.library import committed, scan
from cfclip.checkpoints.mappers import load_mapper
from cfclip.domains import DOMAINS, load_domain
from cfclip.evaluation.confidence import predicted_success
from cfclip.explorer import choices, frames, model, photos
from cfclip.explorer.frames import SHOWS, edit_label, strip
from cfclip.explorer.model import HISTORY_LENGTH, MERGE_SECONDS, Explorer
from cfclip.explorer.recipe import MAX_SEED, Recipe, draw_faces, render
from cfclip.explorer.view import View
from cfclip.explorer.workers import CHECK_STEPS, LONGEST_LINE, PATIENCE, LatestJobThread
from cfclip.images import to_uint8
from cfclip.method import train_mapper
from cfclip.method.config import CFCLIPConfig
from cfclip.models.mapper import Mapper, MapperConfig


@pytest.fixture
def folder(domain, tmp_path):
    return domain_folder(domain, tmp_path)


@pytest.fixture
def explorer(domain, folder):
    explorer = started(domain, folder)
    explorer.set_mapper(str(folder / "runs" / "0" / "mapper.safetensors"))
    assert explorer.wait()
    yield explorer
    explorer.close()


def check(explorer: Explorer) -> None:
    """The picture is the recipe's, unless the message says why there is none."""
    assert explorer.wait()
    assert not explorer.busy and explorer.history[explorer.at] == explorer.recipe
    if explorer.message:
        return
    frame = explorer.frame
    assert (frame.recipe, frame.show) == (explorer.recipe, explorer.show)
    expected = to_uint8(render(explorer.domain, explorer.recipe))
    if explorer.show == "edit":
        assert np.array_equal(frame.rows[edit_label(explorer.recipe)], expected)
    assert all(len(row) == len(frame.headers) for row in frame.rows.values())


def test_the_frame_shows_the_recipe(explorer):
    check(explorer)
    assert list(explorer.suggestions) == ["green lipstick", "blue hair"] and explorer.message == ""
    assert {"clip_before", "clip_after", "identity", "leakage"} <= explorer.frame.scores.keys()
    before = explorer.frame.edited
    explorer.change(strength=0.25)
    check(explorer)
    assert not torch.equal(explorer.frame.edited, before)


@pytest.mark.parametrize("show", SHOWS)
def test_each_way_to_show_has_its_rows(explorer, show):
    explorer.set_show(show)
    check(explorer)
    expected = {
        "edit": ["source", "green lipstick"],
        "difference": ["source", "green lipstick", "difference"],
        "methods": ["source", "green lipstick"],
        "strengths": ["× -1", "× 0", "× 0.5", "× 1", "× 1.5", "× 2"],
        "prompts × strengths": ["green lipstick", "blue hair"],
    }
    assert list(explorer.frame.rows) == expected[show]
    assert explorer.frame.sheet.shape == (16 * len(explorer.frame.rows), 16 * len(explorer.frame.headers), 3)


def test_of_many_jobs_behind_a_slow_one_the_latest_is_done_and_no_other():
    worker, go, done = LatestJobThread(), threading.Event(), []
    worker.ask(lambda stale: (go.wait(5), done.append(("first", stale()))))
    time.sleep(0.05)
    for i in range(10):
        worker.ask(lambda stale, i=i: done.append((i, stale())))
    go.set()
    assert worker.wait(5)
    assert done == [("first", True), (9, False)]
    worker.close()


def test_a_word_that_is_being_typed_is_one_entry_of_the_history(explorer):
    time.sleep(MERGE_SECONDS)  # what the fixture typed is an entry of its own
    entries = len(explorer.history)
    for n in range(1, 11):
        explorer.set_prompt("green lipstick and so on"[: n + 14])
    check(explorer)
    assert len(explorer.history) == entries + 1
    explorer.undo()
    check(explorer)
    assert explorer.recipe.prompt == "green lipstick" and explorer.recipe.mapper


def test_undo_and_redo_move_in_the_history(explorer):
    first = explorer.recipe
    explorer.change(strength=0.5)
    explorer.set_levels(coarse=False)
    assert explorer.recipe.layers == (0.0,) * 4 + (1.0,) * 2
    explorer.undo()
    explorer.undo()
    assert explorer.recipe == first
    explorer.redo()
    assert explorer.recipe == replace(first, strength=0.5)
    explorer.change(strength=0.75)
    assert explorer.at == len(explorer.history) - 1, "a change after an undo drops what was undone"
    explorer.redo()
    check(explorer)


def test_locked_faces_stay(explorer):
    explorer.lock(1)
    explorer.new_faces()
    assert explorer.recipe.faces[1] == 1 and not {0, 2} & set(explorer.recipe.faces)
    explorer.lock(1, False)
    explorer.new_faces()
    assert 1 not in explorer.recipe.faces
    explorer.set_seeds("3, 14 15,9")
    check(explorer)
    assert explorer.recipe.faces == (3, 14, 15, 9) and explorer.frame.headers == ("3", "14", "15", "9")
    explorer.set_seeds("-1")
    assert "whole numbers" in explorer.message and explorer.recipe.faces == (3, 14, 15, 9)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"prompt": "word " * 40}, "shorten it"),
        ({"strength": 7.0}, "from -1.5 to 2"),
        ({"region": "nose"}, "the parts of domain tiny"),
        ({"mapper": "/no/where"}, "does not exist"),
        ({"colour": "red"}, "colour"),
        ({"layers": (1.0,)}, "but this generator has 6"),
    ],
)
def test_an_error_is_shown_and_the_explorer_works_on(explorer, change, match):
    shown, at = explorer.frame.edited, explorer.at
    explorer.change(**change)
    explorer.wait()
    assert match in explorer.message and "Traceback" not in explorer.message
    assert explorer.frame.edited is shown, "the last picture is kept"
    explorer.go(at)
    explorer.change(strength=0.3)
    check(explorer)
    assert explorer.message == ""


def test_the_traceback_of_an_error_is_logged(explorer, caplog):
    with caplog.at_level(logging.DEBUG, "cfclip"):
        explorer.change(region="nose")
        explorer.wait()
    assert "the parts of domain tiny" in explorer.message
    assert "region_mask" in caplog.text and "Traceback" in caplog.text


def test_a_damaged_file_among_the_runs_is_skipped(explorer, folder):
    (folder / "runs" / "2").mkdir()
    (folder / "runs" / "2" / "mapper.safetensors").write_bytes(b"half a file")
    explorer.find_mappers()
    assert list(explorer.mappers) == [str(one.path) for one in scan(folder / "runs", skip_damaged=True)]
    assert [prompt for _, prompt in explorer.mappers.values()] == list(PROMPTS)


def header(**changed):
    """The header of a mapper's file; a key of the card, of the training, or of the file is changed."""
    training = {"prompt": "green lipstick", "seed": 0} | changed.pop("training", {})
    card = {"method": "cfclip", "domain": "tiny", "training": training} | changed.pop("card", {})
    return json.dumps({"kind": "mapper", "config": {}, "card": card} | changed)


HOSTILE = {
    "deep": "[" * 100_000,
    "deep inside": header()[:-1] + ', "x": ' + "[" * 100_000,
    "huge number": '{"kind": "mapper", "card": ' + "9" * 5000 + "}",
    "no table": "[1]",
    "not json": "{",
    **{f"kind {value}": header(kind=value) for value in ([], {}, None, 5)},
    **{f"card {value}": f'{{"kind": "mapper", "card": {value}}}' for value in ("[]", "null", "5", '"x"')},
    **{f"training {value}": header(card={"training": value}) for value in ([1], None, "prompt", 5)},
    **{
        f"prompt {value}": header(training={"prompt": value})
        for value in (5, ["a"], {}, None, True, "x" * 9999)
    },
    "half a character": header(training={"prompt": "\ud800"}),
    **{f"domain {value}": header(card={"domain": value}) for value in ([], {}, None, 5)},
    **{f"method {value}": header(card={"method": value}) for value in ([], {}, None, 5)},
}


def test_a_hostile_file_in_the_folder_is_skipped(domain, folder):
    out = folder / "out"
    for i, content in enumerate(HOSTILE.values()):
        (out / str(i)).mkdir(parents=True)
        file = out / str(i) / "mapper.safetensors"
        save_file({"a": torch.zeros(1)}, file, metadata={"cfclip": content})
    write_mapper(domain, out / "good" / "mapper.safetensors", "red lipstick")
    (out / "folder.safetensors").mkdir()
    (out / "empty.safetensors").touch()
    explorer = started(domain, folder)
    check(explorer)
    assert explorer.message == ""
    assert [prompt for _, prompt in explorer.mappers.values()] == ["red lipstick", *PROMPTS]
    explorer.close()


def test_a_domain_without_its_files_is_not_chosen(explorer):
    explorer.choose_domain("ffhq")
    explorer.wait()
    assert explorer.recipe.domain == "tiny" and "cfclip fetch" in explorer.message


def test_a_photo_takes_the_place_of_an_unlocked_face(explorer):
    file = io.BytesIO()
    Image.effect_noise((40, 40), 60).convert("RGB").save(file, "PNG")
    explorer.lock(0)
    explorer.add_photo(file.getvalue())
    check(explorer)
    assert explorer.message == "" and "dB" in explorer.note
    path = explorer.recipe.faces[0]
    assert Path(path).exists() and path in explorer.locked and explorer.recipe.faces[1:] == (0, 1)
    explorer.add_photo(b"not a picture")
    explorer.wait()
    assert explorer.message


def test_an_exported_recipe_opens_again(explorer, tmp_path):
    explorer.set_show("difference")
    explorer.wait()
    explorer.export()
    explorer.wait()
    png, gif, *_, recipe, code = explorer.exported
    assert explorer.note.startswith("exported: " + ", ".join(file.name for file in explorer.exported))
    assert np.array_equal(np.asarray(Image.open(png)), explorer.frame.sheet)
    assert Image.open(gif).n_frames >= 9 and Image.open(gif).size == (48, 16)
    assert code.read_text(encoding="utf-8") == explorer.recipe.code()
    before = explorer.recipe
    explorer.change(strength=-1.0)
    explorer.open(recipe.read_bytes())
    check(explorer)
    assert explorer.recipe == before
    seen = []
    explorer.observe(lambda change: seen.append(change.name), ["recipe", "history", "at", "mappers", "frame"])
    history, good = explorer.history, json.loads(recipe.read_text(encoding="utf-8"))
    for wrong in (
        "{}x",
        b"\xff\xfe",
        json.dumps({"domain": "atlantis"}),
        *(json.dumps(good | {name: value}) for name in good for value in (None, 5.5, {}, [[]], [None])),
        json.dumps(good | {"layers": [1.0]}),  # of another generator
        json.dumps(good | {"region": "nose"}),
        json.dumps(good | {"mapper": "/no/where"}),
        json.dumps(good | {"faces": ["/no/where.pt"]}),
        json.dumps(good | {"faces": [*good["faces"], str(png)]}),
        json.dumps(good | {"prompt": "word " * 40}),
        json.dumps(good | {"prompt": "x" * 100_000}),
    ):
        explorer.message = ""
        explorer.open(wrong)
        assert explorer.wait() and explorer.message and len(explorer.message) < 1200
        assert explorer.recipe == before and explorer.history is history and not seen
    explorer.change(strength=0.5)
    check(explorer)
    assert explorer.message == ""


def test_a_film_shows_what_the_gif_shows(explorer):
    av = pytest.importorskip("av", reason="needs pip install -e '.[film]'")
    explorer.change(faces=(3, 1, 4, 1, 5))
    explorer.export()
    assert explorer.wait() and explorer.message == ""
    _, gif, mp4, *_ = explorer.exported
    gif = Image.open(gif)
    with av.open(str(mp4)) as film:
        shown = [np.asarray(frame.to_image(), int) for frame in film.decode(video=0)]
    assert len(shown) == 3 * sum(gif.seek(i) or gif.info["duration"] // 70 for i in range(gif.n_frames))
    for images, at in ((explorer.frame.source, 0), (explorer.frame.edited, 9)):
        expected = Image.fromarray(strip(to_uint8(images))).resize((5 * 256, 256))
        assert np.abs(shown[at] - np.asarray(expected)).mean() < 4
    assert np.abs(shown[9] - shown[0]).mean() > 8


def test_where_nothing_writes_a_film_the_note_says_what_to_install(explorer, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    explorer.export()
    assert explorer.wait() and explorer.message == ""
    assert [file.suffix for file in explorer.exported] == [".png", ".gif", ".json", ".py"]
    assert explorer.note.endswith("; for an MP4 too: pip install av")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        *((lambda x, bad=bad: x.set_prompt(bad), "prompt must be") for bad in (5, None, ["a"], {})),
        *((lambda x, bad=bad: x.set_mapper(bad), "mapper must be") for bad in (5, None, [5], {})),
        *(
            (lambda x, bad=bad: x.set_seeds(bad), "seeds are whole numbers")
            for bad in (None, "x", "1.5", "9" * 30)
        ),
        *((lambda x, bad=bad: x.set_show(bad), "what can be shown is") for bad in (5, None, ["a"], "edits")),
        (lambda x: x.set_levels(corse=False), "the levels are coarse, medium, fine, not corse"),
        (lambda x: x.change(domain="ffhq"), "not loaded"),
        (lambda x: x.change(faces=(10**30,)), "faces must be"),
        (lambda x: x.change(strength="1"), "strength must be"),
        (lambda x: x.change(strength=10**400), "strength must be"),
        (lambda x: x.change(layers=torch.ones(6)), "layers must be"),
        (lambda x: x.change(region=("a", "b", "c", "d")), "region must be"),
        (lambda x: x.refine(["cfclip"]), "'refine' trains"),
        (lambda x: x.add_photo(b""), "the photo is empty"),
        (lambda x: x.add_photo(b"x", None), "points must be five"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_changes(explorer, call, match):
    recipe, history, show, frame = explorer.recipe, explorer.history, explorer.show, explorer.frame
    call(explorer)
    explorer.wait()
    assert match in explorer.message
    assert explorer.recipe == recipe and explorer.history is history
    assert explorer.show == show and explorer.frame is frame
    explorer.change(strength=0.5)
    check(explorer)
    assert explorer.message == ""


def test_whoever_looks_sees_a_complete_state(explorer, domain, folder, monkeypatch):
    """With another domain its mappers come; an entry of the history comes with its place."""
    other = replace(domain, name="other")
    write_mapper(other, folder / "runs" / "9" / "mapper.safetensors", "pink hair")
    monkeypatch.setitem(DOMAINS, "other", lambda: other)
    seen = []

    def look(change):
        prompts = [prompt for _, prompt in explorer.mappers.values()]
        of = "tiny" if set(prompts) == set(PROMPTS) else "other" if prompts == ["pink hair"] else prompts
        assert explorer.history[explorer.at] == explorer.recipe and explorer.recipe.domain == of
        seen.append((change.name, of))

    explorer.observe(look, ["recipe", "history", "at", "mappers"])
    explorer.choose_domain("other")
    explorer.wait()
    explorer.undo()
    explorer.redo()
    assert explorer.wait() and explorer.recipe.domain == "other"
    assert [of for name, of in seen if name == "mappers"] == ["other", "tiny", "other"]


@pytest.fixture
def toons(tmp_path):
    explorer = Explorer("toonfaces", "green lipstick", 1, tmp_path)
    yield explorer
    explorer.close()


def test_a_sketch_is_seen_first_where_half_precision_is_faster_and_the_exact_picture_stays(
    toons, monkeypatch
):
    assert toons.wait()
    monkeypatch.setattr(model, "fast_dtype", lambda device: torch.bfloat16)
    seen = []
    toons.observe(lambda change: seen.append(change.new), "frame")
    toons.change(strength=0.7)
    assert toons.wait()
    sketch, exact = seen[0].edited, toons.frame.edited
    assert torch.equal(exact, render(toons.domain, toons.recipe)) and not torch.equal(sketch, exact)
    assert (sketch - exact).abs().max() < 6 / 127.5 and not seen[0].scores and toons.frame.scores


def test_a_sketch_stays_if_the_exact_picture_cannot_be_drawn(toons, monkeypatch):
    assert toons.wait()
    monkeypatch.setattr(model, "fast_dtype", lambda device: torch.bfloat16)

    def draw(domain, recipe, show, faces, others, stale, dtype=None):
        if dtype is None:
            raise MemoryError("no room")
        return frames.draw(domain, recipe, show, faces, others, stale, dtype)

    monkeypatch.setattr(model, "draw", draw)
    toons.change(strength=0.7)
    assert toons.wait() and "no room" in toons.message and toons.frame.recipe.strength == 0.7
    monkeypatch.setattr(model, "draw", frames.draw)
    toons.change(strength=0.6)
    assert toons.wait() and toons.message == "" and toons.frame.recipe.strength == 0.6, "the thread lives"


def test_refine_refuses_a_shape_and_a_colour_at_once_because_their_layers_are_others(toons):
    toons.change(prompt="smiling with green lipstick", mapper="")
    assert toons.wait()
    toons.refine()
    assert "a colour or a shape, not both at once" in toons.message and toons.training is None


def test_a_prompt_that_is_the_name_of_another_row_has_a_row_of_its_own(toons):
    toons.set_show("difference")
    toons.change(prompt="source", mapper="")
    assert toons.wait() and [*toons.frame.rows] == ["source", "“source”", "difference"]


@pytest.mark.filterwarnings("ignore:this CLIP does not know")
def test_a_prompt_of_unknown_words_says_so_and_names_prompts_near_it(toons):
    assert toons.wait() and toons.message == ""
    for prompt, words, near in (
        ("zebra lipstick", ("'zebra'",), " lipstick"),
        ("green lipstik", ("'lipstik'", "lipstick"), "green lipstick"),
        ("tiny beard + blue hair", ("'tiny'",), "hair"),
        ("plaid hat", ("'plaid', 'hat'",), "green lipstick"),
    ):
        toons.set_prompt(prompt)
        assert toons.wait() and toons.frame.recipe.prompt == prompt, "it is drawn all the same"
        assert all(word in toons.message for word in ("does not know", *words))
        assert near in toons.message.split("prompts that work")[1]
    toons.set_prompt("blue hair")
    assert toons.wait() and toons.message == ""
    toons.change(source_text="a gentleman")
    assert toons.wait() and "'gentleman'" in toons.message


def test_a_prompt_that_is_the_source_text_says_that_nothing_can_move(toons):
    for prompt, source in (
        ("face", ""),
        (" Face ", ""),
        ("blue hair", "Blue  hair"),
        ("green lipstick + face", ""),
    ):
        toons.change(prompt=prompt, source_text=source, mapper="")
        assert toons.wait() and "nothing can move" in toons.message
    toons.change(prompt="blue hair", source_text="")
    assert toons.wait() and toons.message == ""


def refined(explorer: Explorer, prompt: str = "red lipstick") -> Path:
    """The file of a mapper that 'refine' trained."""
    explorer.change(prompt=prompt, mapper="")
    assert explorer.wait()
    explorer.refine()
    explorer.training.thread.join(60)
    check(explorer)
    assert explorer.training is None and explorer.message == ""
    return Path(explorer.recipe.mapper)


def test_refine_trains_a_mapper_and_edits_with_it(explorer):
    looks, steps = [], []
    explorer.observe(lambda change: looks.append(change.new), "preview")
    explorer.observe(lambda change: steps.append(change.new), "progress")
    file = refined(explorer)
    assert file.name == "mapper.safetensors" and file.parent.parent == explorer.out
    assert re.fullmatch(r"red-lipstick-\w{8}-cfclip", file.parent.name)
    assert looks[-1].keys() == {"source", "refined"} and max(steps) == 1.0
    assert {rows.shape for rows in looks[-1].values()} == {(3, 16, 16, 3)}
    assert np.array_equal(looks[-1]["source"], to_uint8(explorer.frame.source))
    assert "red lipstick (cfclip)" in [label for label, _ in explorer.mappers.values()]


def test_prompts_that_differ_little_are_refined_in_folders_of_their_own(explorer):
    explorer.settings = {"cfclip": TRAINING | {"steps": 1}}
    prompts = ["green hat", "Green hat!", "green-hat", "grün", "緑", "🙂", "blackandwhitephotography " * 13]
    files = [refined(explorer, prompt) for prompt in prompts]
    assert len(set(files)) == len(prompts) and all(file.exists() for file in files)
    assert [explorer.mappers[str(file)][1] for file in files] == [prompt.strip() for prompt in prompts]
    assert refined(explorer, "green hat") == files[0], "the same prompt is trained anew in its folder"


def test_a_long_prompt_can_be_exported(explorer):
    explorer.change(prompt=" + ".join(["green lipstick"] * 50))
    check(explorer)
    explorer.export()
    assert explorer.wait()
    assert len(explorer.exported) >= 4 and all(file.exists() for file in explorer.exported)
    assert len(explorer.note) < 600


def test_refine_trains_what_train_mapper_trains(explorer, folder):
    explorer.settings = {"cfclip": TRAINING | {"steps": 10}}  # fewer than between two checks
    config = CFCLIPConfig("red lipstick", steps=10, batch=1, train_latents=2, num_views=0)
    config = replace(config, objective=replace(config.objective, negative_templates=1))
    mapper, _ = train_mapper(explorer.domain, config, progress=False)
    path = refined(explorer)
    trained = load_mapper(path).state_dict()
    for name, tensor in mapper.half().float().state_dict().items():
        assert torch.equal(trained[name], tensor), name


def test_refine_leaves_the_global_random_numbers_of_the_kernel_alone(explorer):
    """It trains in a thread beside the user's cells: their random numbers must not depend on it."""
    explorer.wait()
    torch.manual_seed(7)
    before, during = torch.get_rng_state(), []
    explorer.observe(lambda change: during.append(torch.get_rng_state()), "progress")
    refined(explorer)
    assert len(during) >= TRAINING["steps"]
    assert all(torch.equal(state, before) for state in (*during, torch.get_rng_state()))


def test_a_second_training_is_refused_while_one_is_running(explorer):
    explorer.settings = {"cfclip": TRAINING | {"steps": 1_000_000}}
    explorer.refine()
    thread = explorer.training.thread
    explorer.refine()
    assert "a training is running" in explorer.message
    explorer.cancel()
    thread.join(60)
    assert explorer.training is None


def test_a_cancelled_training_leaves_no_file_and_an_impossible_one_says_why(explorer):
    explorer.settings = {"cfclip": TRAINING | {"steps": 1_000_000}}
    explorer.change(prompt="red lipstick", mapper="")
    explorer.refine()
    thread = explorer.training.thread
    explorer.cancel()
    thread.join(60)
    assert explorer.training is None and not list(explorer.out.glob("*/mapper.safetensors"))
    for method, prompt, match in (
        ("nothing", "a", "'refine' trains"),
        ("cfclip", "a + b", "one prompt at a time"),
        ("cfclip", "", "one prompt"),
    ):
        explorer.change(prompt=prompt)
        explorer.wait()
        explorer.refine(method)
        assert match in explorer.message and explorer.training is None


def resident() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize() / 1e6


HOSTILE_VALUES = (
    None,
    -1,
    10**30,
    1e308,
    float("nan"),
    "",
    "x" * 5000,
    "\ud800\0",
    "../..",
    b"\xff",
    [],
    {},
    [[1]],
    {"a": {}},
)
HOSTILE_EVENTS = ("ping", "lock", "remove", "key", "photo", "recipe", "refused", "", None, 5)


def test_any_five_hundred_interactions(domain, folder):
    """With hostile values, from the browser too: the panel works on, and keeps neither memory nor threads."""
    sizes, threads = [], threading.active_count()
    hostile = st.sampled_from(HOSTILE_VALUES)

    class Interactions(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.explorer, self.count = started(domain, folder), 0
            self.view = View(self.explorer)

        @rule(prompt=st.sampled_from((*PROMPTS, "", "green lipstick + blue hair", "word " * 40, "é🙂")))
        def prompt(self, prompt):
            self.view.prompt.value = prompt

        @rule(strength=st.floats(-3, 3))
        def strength(self, strength):
            self.explorer.change(strength=strength)

        @rule(by=st.floats(-9, 9))
        def stronger(self, by):
            self.explorer.stronger(by)

        @rule(level=st.sampled_from(("coarse", "medium", "fine")), on=st.booleans())
        def level(self, level, on):
            self.explorer.set_levels(**{level: on})

        @rule(layers=st.lists(st.floats(0, 2), max_size=6).map(tuple))
        def layers(self, layers):
            self.explorer.change(layers=layers)

        @rule(region=st.sampled_from(("", "hair", "nose", (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5))))
        def region(self, region):
            self.explorer.change(region=region)

        @rule(show=st.sampled_from(SHOWS))
        def show(self, show):
            self.explorer.set_show(show)

        @rule(which=st.integers(0, 2))
        def mapper(self, which):
            self.explorer.set_mapper(["", *self.explorer.mappers][which])

        @rule(to=st.integers(-1, 300))
        def go(self, to):
            self.explorer.go(to)

        @rule(name=st.sampled_from([one.name for one in fields(Recipe)]), value=hostile)
        def wrong_field(self, name, value):
            self.explorer.change(**{name: value})

        @rule(
            call=st.sampled_from((
                "set_prompt",
                "set_mapper",
                "set_seeds",
                "set_show",
                "go",
                "open",
                "refine",
                "remove",
            )),
            value=hostile,
        )
        def wrong_call(self, call, value):
            getattr(self.explorer, call)(value)

        @rule(event=st.sampled_from(HOSTILE_EVENTS), face=hostile | st.integers(-1, 4), value=hostile)
        def from_the_browser(self, event, face, value):
            content = {
                "event": event,
                "face": face,
                "points": value,
                "name": value,
                "text": value,
                "why": value,
            }
            self.view._heard(content, [b"not a picture"])

        @rule(key=st.sampled_from(("ArrowUp", "ArrowDown", "z", "y", "n")))
        def key(self, key):
            self.view._heard({"event": "key", "key": key}, [])

        @rule()
        def train_a_little(self):
            self.explorer.refine()
            self.explorer.cancel()

        @rule()
        def look(self):
            check(self.explorer)

        @invariant()
        def history_holds_the_recipe(self):
            self.count += 1
            if self.count in (80, 240):
                self.explorer.wait()
                sizes.append(resident())
            history, at, recipe = self.explorer.history, self.explorer.at, self.explorer.recipe
            assert history[at] == recipe and len(history) <= HISTORY_LENGTH
            assert isinstance(recipe, Recipe)

        def teardown(self):
            self.explorer.set_prompt("green lipstick")
            self.explorer.change(strength=1.0, faces=(0, 1), layers=(), region="", source_text="")
            check(self.explorer)
            assert self.explorer.frame.recipe == self.explorer.recipe, "the panel still works"
            training = self.explorer.training
            self.explorer.close()
            if training is not None:
                training.thread.join(60)

    run_state_machine_as_test(
        Interactions,
        settings=settings(
            max_examples=2,
            stateful_step_count=250,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert len(sizes) >= 2 and sizes[-1] < 1.05 * sizes[0], (
        f"memory grew from {sizes[0]:.0f} to {sizes[-1]:.0f} MB"
    )
    end = time.monotonic() + 30
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.1)
    assert threading.active_count() <= threads, threading.enumerate()


def test_the_picture_comes_before_its_scores(explorer):
    """The scores of a picture that was replaced meanwhile are never shown."""
    seen = []
    explorer.observe(lambda change: seen.append(change.new), "frame")
    explorer.change(strength=0.5)
    explorer.wait()
    assert seen[0].scores == {} and seen[-1].scores and all(frame.recipe == explorer.recipe for frame in seen)
    assert torch.equal(seen[-1].source, draw_faces(explorer.domain, explorer.recipe.faces).images)


@pytest.fixture
def many(domain, folder):
    """A domain with a mapper of its own for all prompts."""
    return replace(domain, mapper=load_mapper(write_mapper(domain, folder / "own.safetensors", "any", 7)))


def test_a_mapper_trained_for_exactly_this_prompt_comes_before_the_domains_own(many, folder):
    """Also in a new kernel, in other letters, and in each term of a combination."""
    out = folder / "out"
    file = str(write_mapper(many, out / "red" / "mapper.safetensors", "red lipstick", 3))
    explorer = Explorer(many, "red lipstick", 2, out)
    assert explorer.recipe.mapper == file
    explorer.set_prompt("pink hair")
    assert explorer.recipe.mapper == ""
    explorer.set_prompt(" Red  lipstick")
    assert explorer.recipe.mapper == file
    explorer.set_prompt("red lipstick + pink hair")
    check(explorer)
    assert explorer.recipe.mapper == (file, "") and explorer.message == ""
    w, encode = draw_faces(many, (0, 1)).w, many.clip.encode_text
    once = load_mapper(file).edit(w, encode("red lipstick"))
    expected = many.generator.synthesis(many.mapper.edit(once, encode("pink hair")))
    assert torch.equal(explorer.frame.edited, expected)
    assert Recipe.from_json(explorer.recipe.to_json()) == explorer.recipe
    explorer.close()


def test_each_finished_picture_is_shown_and_never_an_older_one_after_a_newer(explorer):
    """A slider that moves faster than pictures are drawn still shows some."""
    seen = []
    explorer.observe(lambda change: seen.append(change.new.recipe.strength), "frame")
    for i in range(150):
        explorer.change(strength=round(i / 100, 2))
        time.sleep(0.004)
    while_moving = len(seen)
    check(explorer)
    assert while_moving >= 4 and seen == sorted(seen) and seen[-1] == 1.49


def test_the_success_shown_is_that_of_the_mapper_that_edits():
    domain = load_domain("toonfaces")
    for prompt, one in committed(domain).items():
        assert predicted_success(domain, prompt) is not None, "the domain's own mapper is known, too"
        assert choices.success_of(domain, [], prompt) == one.success
        assert choices.working(domain, [])[one.prompt] == one.success


def test_a_damaged_detector_leaves_the_points_to_the_user(domain, monkeypatch):
    def damaged():
        raise ValueError("not the documented file")

    monkeypatch.setattr(photos, "detector_file", damaged)
    assert photos.asks_for_points(replace(domain, truth=None)) and not photos.asks_for_points(domain)


def test_suggestions_are_the_prompts_that_work_with_their_measured_success(many, tmp_path):
    measured = {"green lipstick": 0.9, "blue hair": 0.2, "pink hair": 0.8}
    domain = replace(many, confidence={"measured": measured, "claims": {}})
    write_mapper(domain, tmp_path / "a" / "mapper.safetensors", "yellow hat", 3)
    explorer = Explorer(domain, "blue hair", 2, tmp_path / "none", tmp_path / "a")
    assert explorer.suggestions == {"green lipstick": 0.9, "yellow hat": None, "pink hair": 0.8}
    explorer.set_show("prompts × strengths")
    check(explorer)
    assert list(explorer.frame.rows) == ["blue hair", "green lipstick", "yellow hat", "pink hair"]
    assert "changes about 20% of faces, Refine takes about" in explorer.hint
    explorer.close()


def test_what_a_mapper_does_not_move_is_known_with_the_picture(domain, folder):
    sizes = MapperConfig(
        domain.generator.num_ws, domain.generator.w_dim, domain.clip.embed_dim, ("fine",), split=(2, 4)
    )
    mapper = Mapper.initialised(sizes, torch.Generator().manual_seed(0))
    domain = replace(domain, mapper=mapper, level_split=(2, 4))
    explorer = Explorer(domain, "pink hair", 1, folder / "out")
    check(explorer)
    assert explorer.frame.moved == (False,) * 4 + (True,) * 2
    explorer.close()


def test_nothing_to_compare_says_how_to_get_something(explorer):
    explorer.set_show("methods")
    check(explorer)
    assert "train it by another method under Refine" in explorer.hint


def test_several_claims_and_shapes_are_counted_face_by_face(toons):
    toons.change(faces=tuple(range(8)), prompt="green lips and blue hair")
    assert toons.wait()
    domain, frame = toons.domain, toons.frame
    before, after = (domain.truth.measure(images) for images in (frame.source, frame.edited))
    lips = [colour == "green" for colour in after.colour("lipstick")]
    hair = [
        has and colour == "blue" for has, colour in zip(before.has("hair"), after.colour("hair"), strict=True)
    ]
    for note, green, blue in zip(frame.notes, lips, hair, strict=True):
        missing = ["green lipstick"] * (not green) + ["blue hair"] * (not blue)
        assert note == (f"missing: {', '.join(sorted(missing))}" if missing else "✓")
    counts = f"blue hair on {sum(hair)} of 8 faces, green lipstick on {sum(lips)} of 8 faces"
    assert counts in toons.hint
    toons.change(prompt="long purple hair")
    assert toons.wait()
    assert re.search(r"purple hair on \d of \d faces, long hair on \d of \d faces", toons.hint)
    toons.change(prompt="glasses")
    assert toons.wait()
    with_glasses = domain.truth.measure(toons.frame.source).has("glasses")
    assert [note == "so before" for note in toons.frame.notes] == with_glasses.tolist()
    assert re.search(rf"glasses on \d of {8 - with_glasses.sum()} faces", toons.hint)
    toons.change(prompt="smiling")
    assert toons.wait() and "success is not measured" in toons.hint


def test_each_face_says_what_became_of_it(tmp_path):
    explorer = Explorer("toonfaces", "blue beard", 8, tmp_path)
    assert explorer.wait(600)
    truth = explorer.domain.truth
    has = truth.measure(explorer.frame.source).has("beard")
    done = [colour == "blue" for colour in truth.measure(explorer.frame.edited).colour("beard")]
    for note, hair, blue in zip(explorer.frame.notes, has, done, strict=True):
        assert note == ("no beard" if not hair else "✓" if blue else note)
    assert 0 < has.sum() < 8
    assert (
        f"blue beard on {sum(has & done)} of {has.sum()} faces that have beard; {8 - has.sum()} have none: "
        'try "beard and blue beard"' in explorer.hint
    )
    explorer.change(prompt="beard and blue beard")
    assert explorer.wait(600)
    now = truth.measure(explorer.frame.edited)
    blue = [colour == "blue" for colour in now.colour("beard")]
    counted = sum(blue & (has | now.has("beard")))
    assert has.sum() < counted and f"blue beard on {counted} of 8 faces" in explorer.hint
    explorer.close()


def test_photos_count_apart_and_can_be_removed(explorer, folder):
    file = io.BytesIO()
    Image.effect_noise((40, 40), 60).convert("RGB").save(file, "PNG")
    explorer.add_photo(file.getvalue(), name="<me>.png")
    check(explorer)
    assert (
        explorer.frame.headers == ("<me>.png", "0", "1")
        and "cannot draw such a picture" in explorer.frame.tips[0]
    )
    assert explorer.frame.rows["photo"].shape == explorer.frame.rows["source"].shape
    assert explorer.frame.photo_scores.keys() == explorer.frame.scores.keys() != set()
    assert explorer.frame.photo_scores != explorer.frame.scores
    explorer.new_faces()
    assert isinstance(explorer.recipe.faces[0], str), "a photo stays"
    again = started(explorer.domain, folder)
    again.change(faces=explorer.recipe.faces)
    assert again.wait() and again.frame.headers[0] == "<me>.png", "its name is kept beside its code"
    again.close()
    explorer.remove(explorer.recipe.faces[0])
    check(explorer)
    assert len(explorer.recipe.faces) == 2 and "photo" not in explorer.frame.rows and not explorer.locked


def test_seeds_end_where_they_begin_again(explorer):
    explorer.set_seeds(str(MAX_SEED))
    explorer.new_faces()
    check(explorer)
    assert explorer.recipe.faces == (0,) and explorer.message == ""
    for text in ("99999999999999999999", str(MAX_SEED + 1), "7" * 5000):
        explorer.set_seeds(text)
        assert f"from 0 to {MAX_SEED}" in explorer.message and len(explorer.message) < 200


def test_a_long_prompt_is_not_echoed_whole(explorer):
    for prompt in ("word " * 190, "x" * 900, "x" * 5000):
        explorer.set_prompt(prompt)
        explorer.wait()
        assert 0 < len(explorer.message) <= LONGEST_LINE + 3


@pytest.fixture
def slow(explorer):
    """An explorer that is training for a prompt, slowly enough to be stopped."""
    explorer.settings = {"cfclip": TRAINING | {"steps": 100_000}}
    explorer.change(prompt="red lipstick", mapper="")
    explorer.refine()
    thread = explorer.training.thread
    while "refined" not in explorer.preview or "loss" not in explorer.refining:
        time.sleep(0.01)
    yield explorer
    explorer.cancel()
    thread.join(60)


def test_a_training_says_how_far_it_is_and_how_it_ended(slow):
    thread = slow.training.thread
    assert re.search(r"step \d+ of 100000 · about .+ left at most · loss [\d.]+", slow.refining)
    slow.cancel()
    thread.join(60)
    assert "cancelled at step" in slow.refining and slow.preview, "the last preview stays"
    assert not list(slow.out.glob("*/mapper.safetensors"))


def test_the_mapper_of_the_preview_can_be_kept_at_any_moment(slow):
    thread = slow.training.thread
    slow.keep()
    thread.join(60)
    check(slow)
    assert "kept as it was at step" in slow.refining and slow.message == ""
    assert slow.recipe.mapper == str(next(slow.out.glob("*/mapper.safetensors")))
    difference = to_uint8(slow.frame.edited).astype(int) - slow.preview["refined"]
    assert np.abs(difference).max() <= 2, "the file has half floats"


def test_a_training_goes_on_with_the_slots_of_a_mapper_that_reads_words(domain, folder):
    g = domain.generator
    sizes = MapperConfig(g.num_ws, g.w_dim, domain.clip.word_dim, split=(2, 4), text="tokens")
    mapper = Mapper.initialised(sizes, torch.Generator().manual_seed(0)).requires_grad_(False)
    mapper.groups[0].move *= 0.01
    words = replace(domain, mapper=mapper, level_split=(2, 4))
    explorer = Explorer(words, "pink hair", 1, folder / "out", settings={"cfclip": TRAINING | {"lr": 15.0}})
    check(explorer)
    explorer.refine()
    training = explorer.training
    assert training.config.levels == ("fine",) and training.config.text == "tokens"
    assert training.config.lr < 0.1, "the preset's rate is of another optimiser"
    assert torch.equal(training.start_from.groups[0].move, mapper.groups[1].move)
    training.thread.join(120)
    check(explorer)
    assert load_mapper(training.path).config == training.start_from.config
    explorer.close()


def test_a_training_begins_with_the_instant_edit_and_ends_when_it_no_longer_gets_better(many, folder):
    """A rate at which nothing moves: what is kept is the instant edit, long before the last step."""
    explorer = Explorer(
        many, "pink hair", 2, folder / "none", settings={"cfclip": TRAINING | {"steps": 1000, "lr": 1e-9}}
    )
    explorer.wait()
    instant = to_uint8(explorer.frame.edited)
    explorer.refine()
    explorer.training.thread.join(120)
    check(explorer)
    assert np.array_equal(explorer.preview["before"], instant)
    assert explorer.progress == PATIENCE * CHECK_STEPS / 1000
    assert "finished because it no longer got better" in explorer.refining and "step 0" in explorer.refining
    (trained,) = scan(explorer.out)
    assert trained.success is not None and f"success on {trained.success:.0%} of" in explorer.refining
    assert explorer.suggestions.get("pink hair") == (trained.success if trained.success >= 0.5 else None)
    explorer.close()
