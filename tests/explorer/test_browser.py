"""The explorer as a person meets it: JupyterLab on this machine, a real browser, the mouse and the keyboard.

Skipped without Chromium and Playwright: pip install -e '.[browser]', and the system's package chromium.
``CFCLIP_SCREENSHOT=reports/explorer.png`` keeps a picture of the panel.
"""

import base64
import io
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install -e '.[browser]'")
    if BROWSER is None:
        pytest.skip("no Chromium: install the system's package chromium")
    folder = tmp_path_factory.mktemp("lab")
    book = nbformat.read(NOTEBOOKS / "05_explorer.ipynb", as_version=4)
    cell = next(c for c in book.cells if "parameters" in c.metadata.get("tags", []))
    cell.source += f"\nout = {str(folder / 'out')!r}"
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
        with playwright.sync_playwright() as p:
            browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1360, "height": 1500}, device_scale_factor=1.5)
            page.set_default_timeout(1000 * PATIENCE)
            page.folder = folder / "out"
            page.goto(f"http://127.0.0.1:{port}/lab/tree/explorer.ipynb?reset")
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
            page.wait_for_selector(".cfx-row img")
            yield page
            browser.close()
    finally:
        lab.terminate()
        lab.wait(30)


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


def row(page, i: int) -> np.ndarray:
    """The i-th row of pictures [H, W, 3] as the browser shows it, whatever the kernel says."""
    coded = page.evaluate(
        """async i => {
        const image = [...document.querySelectorAll('.cfx-row img')][i]
        await image.decode()
        const canvas = document.createElement('canvas')
        canvas.width = image.naturalWidth; canvas.height = image.naturalHeight
        canvas.getContext('2d').drawImage(image, 0, 0)
        return canvas.toDataURL('image/png').split(',')[1]
    }""",
        i,
    )
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(coded))).convert("RGB")).astype(int)


def changes(page, act: Callable[[], object]) -> np.ndarray:
    """Call ``act`` and wait until the edited row shows another picture, which is returned."""
    before = row(page, 1)
    act()
    until(lambda: not np.array_equal(row(page, 1), before))
    return row(page, 1)


def test_a_person_edits_exports_and_opens_a_recipe(page):
    prompt, handle = page.locator(".cfx-prompt input"), page.locator(".cfx-strength .noUi-handle")
    source, green = row(page, 0), row(page, 1)
    assert source.shape == (128, 8 * 128, 3) and np.abs(green - source).max() > 60

    purple = changes(page, lambda: prompt.fill("purple eyebrows"))
    assert np.array_equal(row(page, 0), source), "another prompt is of the same faces"
    page.wait_for_selector(".cfx-scores b")

    def drag():
        box = handle.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + 90, box["y"] + box["height"] / 2, steps=6)
        page.mouse.up()

    stronger = changes(page, drag)
    until(lambda: "drawing" not in page.locator(".cfx-note").inner_text())
    stronger = row(page, 1)
    assert np.abs(stronger - source).mean() > np.abs(purple - source).mean() > 0

    prompt.fill("word " * 40)
    page.wait_for_selector(".cfx-message >> text=shorten it")
    assert "Traceback" not in page.locator(".cfx").inner_text()
    assert np.array_equal(row(page, 1), stronger), "the last picture is kept"
    prompt.fill("purple eyebrows")
    page.wait_for_selector(".cfx-message", state="detached")

    page.locator(".cfx .jp-mod-selected, .cfx .lm-TabBar-tabLabel").filter(has_text="Export").first.click()
    page.locator("button.cfx-export").click()
    page.wait_for_selector(".cfx-note >> text=written")
    (file,) = page.folder.glob("*.json")
    exported = Recipe.from_json(file.read_text(encoding="utf-8"))
    assert exported.prompt == "purple eyebrows" and exported.strength > 1
    assert file.with_suffix(".py").read_text(encoding="utf-8") == exported.code()
    assert file.with_suffix(".gif").stat().st_size > 10_000

    weaker = changes(page, lambda: handle.press("Home"))
    until(lambda: "drawing" not in page.locator(".cfx-note").inner_text())
    assert not np.array_equal(weaker, stronger)
    with page.expect_file_chooser() as chooser:
        page.locator(".cfx button", has_text="open a recipe").click()
    chooser.value.set_files(file)
    until(lambda: np.array_equal(row(page, 1), stronger))


def test_each_way_to_show_has_its_rows_on_the_page(page):
    """The last one is the difference, of which a screenshot is kept."""
    choose = page.locator(".cfx select").filter(has=page.locator("option", has_text="prompts × strengths"))
    page.locator(".cfx-prompt input").fill("green lipstick")
    for show, rows in (("strengths", 6), ("prompts × strengths", 4), ("difference", 3)):
        choose.select_option(label=show)
        until(lambda rows=rows: page.locator(".cfx-row:visible").count() == rows)
    page.locator(".cfx .lm-TabBar-tabLabel").filter(has_text="Where").first.click()
    until(lambda: page.locator(".cfx-scores b").count() >= 5)
    until(lambda: "drawing" not in page.locator(".cfx-note").inner_text())
    if path := os.environ.get("CFCLIP_SCREENSHOT"):
        page.locator(".cfx").first.screenshot(path=Path(path))
