"""The explorer as a person meets it: JupyterLab and Voila on this machine, a browser, mouse and keyboard.

Skipped without Chromium and Playwright: pip install -e '.[browser]', and the system's package chromium.
``CFCLIP_SCREENSHOT=reports/explorer.png`` keeps pictures of the panel in JupyterLab: that one,
explorer-dark.png, explorer-wipe.png, and the film explorer.gif.
"""

import base64
import copy
import io
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import nbformat
import numpy as np
import pytest
from PIL import Image

from cfclip.explorer.recipe import Recipe
from cfclip.files import NOTEBOOKS

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PATIENCE = 300  # seconds that a busy machine may take for one step
WIDTH, HEIGHT = 1360, 1500
FILM_WIDTH, FILM_HEIGHT = 708, 500
BOOK = nbformat.read(NOTEBOOKS / "05_explorer.ipynb", as_version=4)
# quick trainings, and a domain whose photos have to be aligned, as the paper's faces have
SETTINGS = """
from dataclasses import replace
from cfclip.domains import DOMAINS, load_toonfaces
DOMAINS["photos"] = lambda: replace(load_toonfaces(), name="photos", truth=None)
photo_steps = 2
refine = {"cfclip": {"steps": 2000, "batch": 1, "num_views": 1, "train_latents": 4, "negative_templates": 1,
                     "lr": 15.0, "levels": ["fine"]}}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The address of a Jupyter server, and the folder that the explorer writes to."""
    if BROWSER is None:
        pytest.skip("no Chromium: install the system's package chromium")
    folder = tmp_path_factory.mktemp("lab")
    book = copy.deepcopy(BOOK)
    cell = next(c for c in book.cells if "parameters" in c.metadata.get("tags", []))
    cell.source += f"\nout = {str(folder / 'out')!r}\n{SETTINGS}"
    nbformat.write(book, folder / "explorer.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jupyter = [f"JUPYTER_{name}_DIR" for name in ("CONFIG", "DATA", "RUNTIME")]
    lab_names = [f"JUPYTERLAB_{name}_DIR" for name in ("WORKSPACES", "SETTINGS")]
    home = {name: str(folder / name) for name in (*jupyter, *lab_names)}
    path = os.pathsep.join([str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH", "")])
    options = f"""
        --no-browser --allow-root --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0
        --IdentityProvider.token= --LabApp.expose_app_in_browser=True
        --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate""".split()
    options.append(f"--ServerApp.root_dir={folder}")
    command, env = [sys.executable, "-m", "jupyterlab", *options], os.environ | home | {"PYTHONPATH": path}
    with (folder / "log").open("w", encoding="utf-8") as log:
        lab = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        until(lambda: lab.poll() is not None or answers(f"http://127.0.0.1:{port}/api"))
        assert lab.poll() is None, (folder / "log").read_text(encoding="utf-8")
        yield f"http://127.0.0.1:{port}", folder / "out"
    finally:
        lab.terminate()
        lab.wait(30)


@pytest.fixture(scope="module", params=["lab", "voila"])
def page(request, server) -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install -e '.[browser]'")
    if request.param == "voila" and find_spec("voila") is None:
        pytest.skip("needs pip install voila")
    address, out = server
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=1.5)
        page.set_default_timeout(1000 * PATIENCE)
        page.folder, page.place, page.errors = out, request.param, []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        if request.param == "voila":
            page.goto(f"{address}/voila/render/explorer.ipynb?theme=dark")
        else:
            page.goto(f"{address}/lab/tree/explorer.ipynb?reset")
            open_notebook(page)
        page.wait_for_selector(".cfx-cell")
        until(lambda: pixels(page, 1).max() > 0)
        yield page
        browser.close()


def open_notebook(page) -> None:
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.add_style_tag(content=".Toastify { display: none }")  # Jupyter's news would cover the panel
    page.evaluate("""async () => {
        const app = window.jupyterapp
        await app.restored
        const open = [...app.shell.widgets('main')]
        const panel = open.find(one => one.context?.path == 'explorer.ipynb')
        await panel.context.ready
        await panel.sessionContext.ready
        await panel.sessionContext.session.kernel.info
        app.shell.collapseLeft()
        app.shell.activateById(panel.id)
        app.commands.execute('notebook:run-all-cells')
    }""")


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def until(done: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)


def pixels(page, row: int, where: str = ".cfx-stage") -> np.ndarray:
    """The pictures [H, W, 3] of a row as the browser shows them, whatever the kernel says."""
    coded = page.evaluate(
        """([where, row]) => {
        const stage = document.querySelector(where)
        const faces = stage.querySelectorAll('.cfx-head').length
        const shown = [...stage.querySelectorAll('.cfx-cell')].slice(row * faces, (row + 1) * faces)
        if (!shown.length) return null
        const all = document.createElement('canvas')
        all.width = shown[0].width * shown.length; all.height = shown[0].height
        shown.forEach((one, i) => all.getContext('2d').drawImage(one, i * one.width, 0))
        return all.toDataURL('image/png')
    }""",
        [where, row],
    )
    return np.zeros((1, 1, 3), int) if coded is None else decoded(coded)


def decoded(url: str) -> np.ndarray:
    """The picture [H, W, 3] of a data URL."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"), int)


def first_of_film(page, film: bytes, width: int, height: int) -> np.ndarray:
    """The first picture of an MP4, as the browser plays it."""
    coded = page.evaluate(
        """([coded, width, height]) => new Promise((shown, failed) => {
        const film = document.createElement('video'), one = document.createElement('canvas')
        one.width = width; one.height = height
        film.onerror = () => failed(new Error(film.error.message))
        film.requestVideoFrameCallback(() => {
            one.getContext('2d').drawImage(film, 0, 0, width, height)
            shown(one.toDataURL('image/png'))
        })
        film.src = 'data:video/mp4;base64,' + coded
    })""",
        [base64.b64encode(film).decode(), width, height],
    )
    return decoded(coded)


def changes(page, act: Callable[[], object]) -> np.ndarray:
    """Call ``act``, wait until the edited row shows another picture, which is measured; return the row."""
    measured(page)
    before = pixels(page, 1)
    act()
    until(lambda: not np.array_equal(pixels(page, 1), before))
    measured(page)
    return pixels(page, 1)


def measured(page) -> None:
    """Wait until the picture is: a first sketch of it has been replaced by then."""
    until(lambda: "drawing" not in page.locator(".cfx-note").inner_text())
    page.wait_for_selector(".cfx-scores-old", state="detached")


def tab(page, name: str) -> None:
    page.locator(".cfx .lm-TabBar-tabLabel").filter(has_text=name).first.click()


def keep(page, name: str) -> None:
    """A screenshot of the panel in JupyterLab, if it is asked for."""
    if (path := os.environ.get("CFCLIP_SCREENSHOT")) and page.place == "lab":
        page.locator(".cfx").first.screenshot(path=Path(path).with_name(name))


def test_typing_dragging_and_wiping_make_a_film(page):
    """What the README shows."""
    prompt, handle = page.locator(".cfx-prompt input"), page.locator(".cfx-strength .noUi-handle")
    frames, wanted = [], bool(os.environ.get("CFCLIP_SCREENSHOT")) and page.place == "lab"

    def shoot(times: int = 1) -> None:
        if wanted:
            picture = Image.open(io.BytesIO(page.locator(".cfx").first.screenshot())).convert("RGB")
            size = FILM_WIDTH, round(FILM_WIDTH * picture.height / picture.width)
            frames.extend(times * [picture.resize(size, Image.Resampling.LANCZOS)])

    def type_in(text: str) -> None:
        for end in range(1, len(text)):
            if end % 3 == 0:
                prompt.fill(text[:end])
                shoot()
        changes(page, lambda: prompt.fill(text))
        shoot(8)

    seen = []
    shoot(4)
    for text in ("green lips", "a woman with long purple hair"):
        type_in(text)
        seen.append(pixels(page, 1).tobytes())
    for key in (*8 * ("ArrowRight",), *18 * ("ArrowLeft",), *10 * ("ArrowRight",)):
        seen.append(changes(page, lambda key=key: handle.press(key)).tobytes())
        shoot()
    assert len(set(seen)) > 15
    page.locator(".cfx-cell").nth(8 + 1).click()
    large = page.locator(".cfx-zoom canvas").first
    side = large.bounding_box()["width"]
    for share in (*np.linspace(0.9, 0.1, 9), *np.linspace(0.1, 0.5, 5)):
        large.hover(position={"x": share * side, "y": side / 2}, force=True)
        shoot()
    shoot(8)
    page.keyboard.press("Escape")
    assert not page.errors
    if wanted:
        alike = [Image.new("RGB", (FILM_WIDTH, FILM_HEIGHT), "white") for _ in frames]
        for whole, frame in zip(alike, frames, strict=True):
            whole.paste(frame)
        few = [frame.quantize(128, dither=Image.Dither.NONE) for frame in alike]
        path = Path(os.environ["CFCLIP_SCREENSHOT"]).with_suffix(".gif")
        few[0].save(path, save_all=True, append_images=few[1:], duration=120, loop=0, optimize=True)


def test_a_person_edits_exports_and_opens_a_recipe(page):
    prompt, handle = page.locator(".cfx-prompt input"), page.locator(".cfx-strength .noUi-handle")
    source, green = pixels(page, 0), pixels(page, 1)
    assert source.shape == (64, 8 * 64, 3) and np.abs(green - source).max() > 60
    assert page.locator(".cfx [title=null]").count() == 0

    purple = changes(page, lambda: prompt.fill("purple eyebrows"))
    assert np.array_equal(pixels(page, 0), source), "another prompt is of the same faces"
    page.wait_for_selector(".cfx-scores b")

    seen = []

    def drag():
        box = handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        for i in range(60):
            page.mouse.move(x + 1.5 * i, y)
            time.sleep(0.06)
            seen.append(pixels(page, 1).tobytes())
        page.mouse.up()

    stronger = changes(page, drag)
    assert len(set(seen)) >= 4, "pictures come while the slider moves"
    assert np.abs(stronger - source).mean() > np.abs(purple - source).mean() > 0

    prompt.fill("word " * 40)
    page.wait_for_selector(".cfx-message >> text=shorten it")
    assert "Traceback" not in page.locator(".cfx").inner_text()
    assert np.array_equal(pixels(page, 1), stronger), "the last picture is kept"
    assert page.locator(".cfx-scores-old").count() == 1, "its scores are greyed"
    prompt.fill("purple eyebrows")
    page.wait_for_selector(".cfx-message", state="detached")
    page.wait_for_selector(".cfx-scores-old", state="detached")

    tab(page, "Export")
    page.locator("button.cfx-export").click()
    downloads = page.locator("button.cfx-download")
    until(lambda: downloads.count() >= 4)
    assert str(page.folder) not in page.locator(".cfx").inner_text()
    with page.expect_download() as download:
        downloads.filter(has_text="json").click()
    content = Path(download.value.path()).read_text(encoding="utf-8")
    exported = Recipe.from_json(content)
    assert exported.prompt == "purple eyebrows" and exported.strength > 1
    (page.folder / download.value.suggested_filename).with_suffix(".gif").stat()
    if find_spec("av"):
        with page.expect_download() as download:
            downloads.filter(has_text="mp4").click()
        film = first_of_film(page, Path(download.value.path()).read_bytes(), 8 * 64, 64)
        assert np.abs(film - source).mean() < 4, "it begins with the faces as they are, in their colours"

    weaker = changes(page, lambda: handle.press("Home"))
    assert not np.array_equal(weaker, stronger)
    with page.expect_file_chooser() as chooser:
        page.locator(".cfx button", has_text="open a recipe").click()
    chooser.value.set_files({"name": "a.json", "mimeType": "application/json", "buffer": content.encode()})
    until(lambda: np.array_equal(pixels(page, 1), stronger))
    assert not page.errors


def test_keys_chips_a_large_face_and_a_wipe(page):
    for prompt in ("blue hair", "green lipstick"):
        changes(page, lambda prompt=prompt: page.locator(".cfx-prompt input").fill(prompt))
    page.locator(".cfx-cell").nth(8 + 2).click()
    title, large = page.locator(".cfx-zoom-title"), page.locator(".cfx-zoom canvas")
    assert title.inner_text().startswith("2 ·") and "source | green lipstick" in title.inner_text()
    page.keyboard.press("ArrowRight")
    assert title.inner_text().startswith("3 ·")
    box = large.first.bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
    assert "25" in large.nth(1).evaluate("canvas => canvas.style.clipPath")
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    keep(page, "explorer-wipe.png")
    page.keyboard.press("Escape")
    assert not page.locator(".cfx-zoom").first.is_visible()

    at = page.locator(".cfx-strength .widget-readout").inner_text
    strength, source = float(at()), pixels(page, 0)
    changes(page, lambda: page.keyboard.press("ArrowUp"))
    assert float(at()) == pytest.approx(strength + 0.1)
    changes(page, lambda: page.keyboard.press("z"))
    assert float(at()) == pytest.approx(strength)
    page.locator(".cfx-face").nth(1).click()
    page.wait_for_selector(".cfx-face.cfx-on")
    changes(page, lambda: page.keyboard.press("n"))
    now = pixels(page, 0)
    assert np.array_equal(now[:, 64:128], source[:, 64:128]) and not np.array_equal(
        now[:, :64], source[:, :64]
    )
    cells = page.evaluate("document.querySelectorAll('.jp-Cell').length")
    assert page.place == "voila" or cells == len(BOOK.cells), (
        "a key that the panel takes does nothing to the notebook"
    )
    changes(page, lambda: page.keyboard.press("z"))
    page.locator(".cfx-face").nth(1).click()
    chip = page.locator(".cfx-chip").filter(has_text="purple eyebrows")
    changes(page, chip.first.click)
    assert page.locator(".cfx-prompt input").input_value() == "purple eyebrows"
    assert not page.errors


def test_an_unknown_word_says_so_and_names_what_works(page):
    page.locator(".cfx-prompt input").fill("zebra hair")
    page.wait_for_selector(".cfx-message >> text=does not know 'zebra'")
    assert "prompts that work" in page.locator(".cfx-message").inner_text()
    page.locator(".cfx-prompt input").fill("purple eyebrows")
    page.wait_for_selector(".cfx-message", state="detached")


def test_each_way_to_show_has_its_rows_on_the_page(page):
    """The last one is the difference, of which a screenshot is kept, by day and by night. Voila is dark."""
    choose = page.locator(".cfx select").filter(has=page.locator("option", has_text="prompts × strengths"))
    page.locator(".cfx-prompt input").fill("green lipstick")
    for show, rows in (("strengths", 6), ("prompts × strengths", 4), ("difference", 3)):
        choose.select_option(label=show)
        until(
            lambda rows=rows: (
                page.locator(".cfx-stage >> nth=0 >> .cfx-label").count() in (rows + 1, rows + 2)
            )
        )
    tab(page, "Where")
    until(lambda: page.locator(".cfx-scores b").count() >= 5 and not page.locator(".cfx-scores-old").count())
    keep(page, "explorer.png")
    theme = "theme => window.jupyterapp.commands.execute('apputils:change-theme', { theme })"
    if page.place == "lab":
        page.evaluate(theme, "JupyterLab Dark")
    page.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
    time.sleep(1)
    panel = page.locator(".cfx")
    assert max(map(int, background(panel))) < 80 < min(map(int, background(panel, "color")))
    keep(page, "explorer-dark.png")
    if page.place == "lab":
        page.evaluate(theme, "JupyterLab Light")
    choose.select_option(label="edit")
    until(lambda: page.locator(".cfx-stage >> nth=0 >> .cfx-label").count() == 4)


def background(locator, name: str = "backgroundColor") -> list[str]:
    return locator.evaluate("(panel, name) => getComputedStyle(panel)[name].match(/\\d+/g).slice(0, 3)", name)


def test_a_narrow_pane_shows_four_faces_in_a_row(page):
    page.set_viewport_size({"width": 480, "height": HEIGHT})
    until(lambda: page.locator(".cfx-chunk").count() == 2)
    boxes = page.locator(".cfx-cell").evaluate_all("cells => cells.map(cell => cell.getBoundingClientRect())")
    assert len({round(box["y"]) for box in boxes[:4]}) == 1 and all(box["width"] > 70 for box in boxes)
    assert boxes[4]["y"] > boxes[0]["y"] + boxes[0]["height"]
    overflow = page.locator(".cfx").evaluate("panel => panel.scrollWidth - panel.clientWidth")
    assert overflow <= 1 and page.locator(".cfx-prompt input").bounding_box()["width"] > 200
    page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
    until(lambda: page.locator(".cfx-chunk").count() == 1)


def test_a_training_is_seen_cancelled_and_kept_and_its_prompt_finds_it_again(page):
    prompt, words = page.locator(".cfx-prompt input"), page.locator(".cfx .jupyter-widgets .cfx-hint")
    changes(page, lambda: prompt.fill("orange beard"))
    tab(page, "Refine")
    refining = page.locator(".cfx-stage").nth(1)
    page.locator(".cfx-refine").click()
    until(lambda: refining.locator(".cfx-chunk .cfx-cell").count() == 12)
    assert refining.locator(".cfx-label").all_inner_texts()[1:] == ["source", "before", "refined"]
    until(lambda: words.filter(has_text="left at most").count())
    page.locator(".cfx-cancel").click()
    until(lambda: words.filter(has_text="cancelled at step").count())
    page.locator(".cfx-refine").click()
    until(
        lambda: words.filter(has_text="left at most").count() and refining.locator(".cfx-cell").count() == 12
    )
    page.locator(".cfx-keep").click()
    until(lambda: words.filter(has_text="kept as it was at step").count())
    mapper = page.locator(".cfx select").filter(has=page.locator("option", has_text="the domain's own"))
    chosen = "select => select.selectedOptions[0].textContent.replaceAll('\\xa0', ' ')"
    until(lambda: mapper.evaluate(chosen) == "orange beard (cfclip)")
    changes(page, lambda: prompt.fill("green lipstick"))
    assert mapper.evaluate(chosen) == "the domain's own"
    changes(page, lambda: prompt.fill("orange beard"))
    assert mapper.evaluate(chosen) == "orange beard (cfclip)"
    assert not page.errors


def test_a_photo_is_aligned_by_clicks_inverted_and_removed(page):
    choose = page.locator(".cfx select").filter(has=page.locator("option", has_text="photos"))
    changes(page, lambda: choose.select_option(label="photos"))
    file = io.BytesIO()
    Image.fromarray(np.kron(pixels(page, 0)[:, :64], np.ones((4, 4, 1))).astype(np.uint8)).save(file, "PNG")
    page.locator(".cfx-file input").set_input_files({
        "name": "me.png",
        "mimeType": "image/png",
        "buffer": file.getvalue(),
    })
    title, picture = page.locator(".cfx-zoom-title"), page.locator(".cfx-photo")
    for i, (x, y) in enumerate(((0.38, 0.45), (0.62, 0.45), (0.5, 0.55), (0.42, 0.7), (0.58, 0.7))):
        until(lambda i=i: f"({i + 1} of 5)" in title.inner_text())
        until(lambda: picture.evaluate("image => image.naturalWidth"))
        box = picture.bounding_box()
        picture.click(position={"x": x * box["width"], "y": y * box["height"]})
    until(lambda: page.locator(".cfx-remove").count() == 1)
    assert "me.png" in page.locator(".cfx-head").first.inner_text()
    assert "dB" in page.locator(".cfx-note").inner_text()
    assert page.locator(".cfx-stage >> nth=0 >> .cfx-label").all_inner_texts()[1:3] == ["photo", "source"]
    page.locator(".cfx-remove").click()
    until(lambda: not page.locator(".cfx-remove").count())
    changes(page, lambda: choose.select_option(label="toonfaces"))
    assert not page.errors
