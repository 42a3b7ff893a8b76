"""The goldens: the committed ones in ``tests/golden``, all of them in ``shared/golden`` beside the clone.

``tests/golden/README.md`` says what they are and what was cut from the committed ones.
"""

import importlib.util
import lzma
from pathlib import Path

import pytest
import torch

COMMITTED = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden"
SETS = {"committed": COMMITTED, "shared": SHARED}
_spec = importlib.util.spec_from_file_location("recipe", COMMITTED / "recipe.py")
recipe = importlib.util.module_from_spec(_spec)
"""How the weights of CLIP, IR-SE50 and VGG19 are made."""
_spec.loader.exec_module(recipe)


def golden_path(folder: Path, name: str, tmp: Path) -> Path:
    """The file ``name``, unpacked into ``tmp`` if it is compressed; skips the test if it is missing."""
    if (folder / name).exists():
        return folder / name
    packed = folder / f"{name}.xz"
    if not packed.exists():
        pytest.skip(f"{name} is not in {folder.name if folder == COMMITTED else 'shared'}/golden")
    out = tmp / name
    out.write_bytes(lzma.decompress(packed.read_bytes()))
    return out


def golden(name: str, folder: Path | None = None) -> dict:
    """A golden dict of tensors: from ``folder``, or the whole one if it is there, else the committed one."""
    for place in [folder] if folder else [SHARED, COMMITTED]:
        if (place / name).exists():
            return torch.load(place / name, weights_only=True)
    pytest.skip(f"{name} is not there")


def rel(a: torch.Tensor, b: torch.Tensor) -> float:
    """``max |a - b| / max |b|``."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()
