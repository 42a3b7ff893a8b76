"""What to run: sweep files and presets in YAML, and the notebooks' parameters."""

import ast
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cfclip.files import NOTEBOOKS, first_bytes, slug

TEXT = ("prompt", "prompts")  # keys under which YAML's `no` and `1e3` are words

KEYS = ("preset", "parameters", "grid", "then")


# ---- what to run: the YAML ----


class _Loader(yaml.SafeLoader):
    """YAML in which prompts stay text and a key cannot silently replace an earlier one."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands there twice", key.start_mark
                )
            seen.add(key.value)
            if key.value in TEXT:
                inside = {
                    "sequence": lambda v=value: v.value,
                    "mapping": lambda v=value: [k for k, _ in v.value],
                }.get(value.id, lambda v=value: [v])()
                for one in inside:
                    if one.id == "scalar":
                        one.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path, what: str) -> dict[str, Any]:
    if not path.exists():
        there = ", ".join(sorted(p.name for p in (NOTEBOOKS / "presets").glob("*.yaml")))
        raise ValueError(f"{what} {path} does not exist; there are: {there}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{what} {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{what} {path} must be a mapping of names to values")
    return values


def load_preset(path: str | os.PathLike) -> dict[str, Any]:
    """A flat YAML mapping of papermill parameters. ValueError if it is anything else."""
    return _read_yaml(Path(path), "preset")


@dataclass(frozen=True)
class Spec:
    """What a sweep file says."""

    name: str  # the file's, with "-quick" for its quick version
    folder: Path  # where its relative paths start
    grid: tuple[Mapping[str, Any], ...]  # blocks; each is the product of its axes, "notebook" being one
    then: tuple[Mapping[str, Any], ...] = ()  # notebooks that gather, one after the other
    preset: Mapping[str, Any] = field(default_factory=dict)  # every notebook takes what it has of these
    parameters: Mapping[str, Any] = field(default_factory=dict)  # … and of these, which win


def load_spec(path: str | os.PathLike, quick: bool = False) -> Spec:
    """Read a sweep file; ``quick``: the keys of its ``quick`` section replace the file's. ValueError names what is wrong."""
    path = Path(path)
    values = _read_yaml(path, "sweep")
    _known(values, (*KEYS, "quick"), f"{path.name}")
    if quick:
        if not isinstance(values.get("quick"), dict):
            raise ValueError(
                f"{path.name} has no section quick: run it without --quick, or write one with any of {', '.join(KEYS)}"
            )
        _known(values["quick"], KEYS, f"quick of {path.name}")
        values |= values["quick"]
    for name in ("grid", "then"):
        blocks = values.get(name) or []
        if not isinstance(blocks, list) or not all(
            isinstance(block, dict) and block.get("notebook") for block in blocks
        ):
            raise ValueError(f"{name} of {path.name} must be a list of blocks like `- notebook: 02_training`")
    if not values.get("grid"):
        raise ValueError(f"{path.name} has no grid: nothing to run")
    if not isinstance(values.get("parameters") or {}, dict):
        raise ValueError(f"parameters of {path.name} must be a mapping of names to values")
    preset = load_preset(path.parent / values["preset"]) if values.get("preset") else {}
    return Spec(
        path.stem + ("-quick" if quick else ""),
        path.parent.resolve(),
        tuple(values["grid"]),
        tuple(values.get("then") or ()),
        preset,
        values.get("parameters") or {},
    )


def _known(given: Mapping, known: Sequence[str], where: str) -> None:
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"{where}: unknown {', '.join(map(repr, unknown))}; known are: {', '.join(known)}")


def cells(block: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every combination of a block's axes -> (notebook and parameters, a file name that tells it from its neighbours)."""
    axes = {
        name: list(axis.items())
        if isinstance(axis, dict)
        else [(value, None) for value in (axis if isinstance(axis, list) else [axis])]
        for name, axis in block.items()
    }
    for name, axis in axes.items():
        if not axis or (name in TEXT and any(value == "" for value, _ in axis)):
            raise ValueError(f"grid: {name} has an empty value" if axis else f"grid: {name} lists nothing")
        for value, overrides in axis:
            if not isinstance(overrides or {}, dict) or (overrides or {}).keys() & axes.keys():
                raise ValueError(
                    f"grid: {name} {value!r} may change parameters that are no axis, as `{value}: {{steps: 9}}`, not {overrides!r}"
                )
    for choice in itertools.product(*axes.values()):
        cell = dict(zip(axes, (value for value, _ in choice), strict=True))
        for _, overrides in choice:
            cell |= overrides or {}
        told = [name for name in axes if name in ("notebook", "prompt") or len(axes[name]) > 1]
        parts = [slug(Path(cell[name]).stem if name == "notebook" else str(cell[name])) for name in told]
        yield cell, first_bytes("-".join(first_bytes(part, 40) for part in parts), 160)


def find_notebook(name: str | os.PathLike, folder: Path = Path()) -> Path:
    """``02_training`` -> the notebook of that name in ``notebooks/``; ``….ipynb`` is a path that starts in ``folder``."""
    path = folder / name if str(name).endswith(".ipynb") else NOTEBOOKS / f"{name}.ipynb"
    if not path.exists():
        raise ValueError(
            f"notebook {name} does not exist; there are: {', '.join(sorted(p.stem for p in NOTEBOOKS.glob('*.ipynb')))}"
        )
    return path.resolve()


def code_of(notebook: Path) -> list[tuple[str, list[str]]]:
    """(source, tags) of each code cell."""
    cells = [
        cell
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    return [("".join(cell["source"]), cell.get("metadata", {}).get("tags", [])) for cell in cells]


def parameters_of(notebook: str | os.PathLike) -> dict[str, Any]:
    """The notebook's ``parameters`` cell: name -> default."""
    sources = [source for source, tags in code_of(find_notebook(notebook)) if "parameters" in tags]
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for source in sources
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
    }
