"""The package as `pip install .` leaves it: used from another folder, without the source tree."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cfclip
from cfclip.checkpoints.sources import unmet
from cfclip.checkpoints.weights import WeightsError
from cfclip.files import DATA, ROOT
from cfclip.toonfaces.domain import CHECKSUMS, REQUIRED, check, load_toonfaces, record

EDIT = """
import cfclip, torch
from cfclip.cli import app
from typer.testing import CliRunner

domain = cfclip.load_domain("toonfaces")
edited = domain.mapper.edit(domain.latents(1, "test"), domain.mapper.read(domain.clip, "green lipstick"))
said = {"file": cfclip.__file__, "edited": edited, "image": domain.generator.synthesis(edited)}
for command in (["check", "toonfaces"], ["sweep", "nowhere.yaml"]):
    result = CliRunner().invoke(app, command)
    said[command[0]] = (result.exit_code, result.output)
torch.save(said, "said.pt")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which the built package is installed; its dependencies are those of this process."""
    pytest.importorskip("pip", reason="installs a wheel")
    folder = tmp_path_factory.mktemp("package")
    tree = folder / "tree"  # a build leaves files in its source tree
    for part in ("cfclip", "data/toonfaces"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", folder / "site", tree]
    subprocess.run(command, check=True)
    shutil.rmtree(tree)
    return folder / "site"


def run(installed: Path, folder: Path, *arguments: str, **given: str) -> subprocess.CompletedProcess:
    """``python …`` in ``folder`` with the installed package."""
    env = {name: value for name, value in os.environ.items() if name != "CFCLIP_DATA"}
    env |= {"PYTHONPATH": str(installed), "HOME": str(folder)} | given
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8")


def test_an_installed_package_edits_a_face_as_the_source_tree_does(installed, tmp_path):
    done = run(installed, tmp_path, "-c", EDIT)
    assert done.returncode == 0, done.stderr
    said = torch.load(tmp_path / "said.pt", weights_only=True)
    assert Path(said["file"]).is_relative_to(installed)
    domain = cfclip.load_domain("toonfaces")
    edited = domain.mapper.edit(domain.latents(1, "test"), domain.mapper.read(domain.clip, "green lipstick"))
    torch.testing.assert_close(said["edited"], edited)
    torch.testing.assert_close(said["image"], domain.generator.synthesis(edited))
    status, text = said["check"]
    assert status == 0 and str(installed / "cfclip" / "data" / "toonfaces" / "generator.safetensors") in text
    status, text = said["sweep"]
    assert status == 1 and f"there are none in {tmp_path}" in text
    assert not list(installed.rglob("downloads")), "nothing is written into the package"


def test_check_fails_where_the_embedded_files_are_missing(installed, tmp_path):
    done = run(installed, tmp_path, "-m", "cfclip.cli", "check", "toonfaces", CFCLIP_DATA=str(tmp_path))
    assert done.returncode == 1 and "no good file for: " + ", ".join(REQUIRED) in done.stderr
    assert str(tmp_path / "toonfaces" / "generator.safetensors") in done.stdout
    assert "CFCLIP_DATA" in done.stdout


@pytest.fixture
def links(tmp_path) -> Path:
    """A folder with the embedded files, in which they can be damaged."""
    for path in (DATA / "toonfaces").glob("*.safetensors"):
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_every_embedded_file_is_as_it_was_written():
    rows = check()
    changed = [row.path.name for row in rows if row.status != "valid"]
    assert not changed and unmet(rows) == [], "after a training or a copy: cfclip toonfaces measure"
    assert {row.path for row in rows} == set((DATA / "toonfaces").rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["generator", "multi"])
def test_an_embedded_file_with_one_other_bit_is_named(name, links):
    """It opens, and every number in it is finite."""
    path = links / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    path.unlink()
    content[-1001] ^= 1
    path.write_bytes(content)
    assert {row.status for row in check(links)} == {"unverified"}, "no checksums, and it says so"
    shutil.copy(DATA / "toonfaces" / CHECKSUMS, links)
    rows = check(links)
    assert [row.source.role for row in rows if row.status != "valid"] == [name]
    (row,) = (row for row in rows if not row.good)
    assert row.status == "corrupt" and CHECKSUMS in row.detail and "cfclip toonfaces measure" in row.detail
    record(links, name)
    assert {row.status for row in check(links)} == {"valid"}, "its owner says that it is meant"
    for text in ("", "{", "[]", "{}"):
        (links / CHECKSUMS).write_text(text, encoding="utf-8")
        assert {row.status for row in check(links)} == {"unverified"}


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("damage", ["missing", "cut", "another network"])
def test_a_bad_embedded_file_is_named_with_the_setting_that_helps(name, damage, links):
    path = links / f"{name}.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        other = (links / "multi.safetensors").read_bytes()
        path.write_bytes(content[:-1000] if damage == "cut" else other)
    rows = check(links)
    assert unmet(rows) == [name] and len(rows) == len([*(DATA / "toonfaces").glob("*.safetensors")])
    (row,) = (row for row in rows if not row.good)
    assert row.path == path and "CFCLIP_DATA" in row.detail
    assert row.status == ("missing" if damage == "missing" else "corrupt")
    with pytest.raises(WeightsError, match=name if damage == "missing" else path.name):
        load_toonfaces(links)
