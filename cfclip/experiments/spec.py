"""What to run: sweep files and presets in YAML, and the parameters of notebooks."""

import ast
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from cfclip.files import NOTEBOOKS, first_bytes, slug
from cfclip.settings import check_known

TEXT_KEYS = ("prompt", "prompts")  # keys whose values stay text, even `no` and `1e3`
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
SECTIONS = ("preset", "parameters", "grid", "then")
MAX_BYTES, MAX_VALUES, MAX_DIGITS = 1 << 18, 100_000, 40
"""Limits of a YAML file: its bytes, its values with all aliases written out, and the digits of a number."""


# ---- YAML ----


class _Loader(yaml.SafeLoader):
    """YAML in which prompts stay text and a key cannot silently replace an earlier one."""

    def get_single_node(self):
        node = super().get_single_node()
        _count(node, {})
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be a word or a number, not a list or a mapping"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen:
                problem = f"{key.value!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
            if key.value in TEXT_KEYS:
                for scalar in _scalars(value):
                    scalar.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node | None, known: dict[int, int]) -> int:
    """The number of values in ``node``, aliases written out. ``known``: node id -> number; 0: unfinished."""
    if node is None:
        return 0
    problem = ""
    if known.get(id(node)) == 0:
        problem = "a value contains itself"
    elif id(node) not in known:
        known[id(node)], parts = 0, []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif node.tag in NUMBERS and len(node.value) > MAX_DIGITS:
            problem = f"a number has more than {MAX_DIGITS} digits"
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    if known[id(node)] > MAX_VALUES:
        problem = f"with its aliases written out it has more than {MAX_VALUES:,} values"
    if problem:
        raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
    return known[id(node)]


def _scalars(node: yaml.Node) -> list[yaml.ScalarNode]:
    """The scalars that are prompts: the node itself, the items of a list, or the keys of a mapping."""
    if isinstance(node, yaml.MappingNode):
        nodes = [key for key, _ in node.value]
    else:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return [one for one in nodes if isinstance(one, yaml.ScalarNode)]


def _there_are(folder: Path, pattern: str) -> str:
    """The part of an error message that lists the files in ``folder`` that match ``pattern``."""
    if names := sorted(path.name.removesuffix(".ipynb") for path in folder.glob(pattern)):
        return f"there are: {', '.join(names)}"
    return f"there are none in {folder}: they are in cfclip's repository, so start in its folder"


def _read_yaml(path: Path, what: str) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{what} {path} does not exist; {_there_are(NOTEBOOKS / 'presets', '*.yaml')}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{what} {path} is larger than {MAX_BYTES:,} bytes: it is something else")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError:
        raise
    except RecursionError:
        raise ValueError(f"{what} {path} is nested too deeply") from None
    except Exception as error:  # for a value like `!!bool x` the parser has no error class
        raise ValueError(f"{what} {path} is not YAML: {error}") from None
    return named(values, f"{what} {path}")


def named(values: Any, what: str) -> dict[str, Any]:
    """``values``; ValueError unless it is a mapping whose keys are texts."""
    if not isinstance(values, dict):
        raise ValueError(f"{what} must be a mapping of names to values")
    if odd := [name for name in values if not isinstance(name, str)]:
        raise ValueError(f"{what} must have names as its keys, not {odd[0]!r}")
    return values


def load_preset(path: str | os.PathLike) -> dict[str, Any]:
    """A flat YAML mapping of papermill parameters. ValueError if it is anything else."""
    return _read_yaml(Path(path), "preset")


# ---- sweep files ----


@dataclass(frozen=True)
class Spec:
    """The content of a sweep file."""

    name: str  # the file's name, with "-quick" for its quick version
    folder: Path  # relative paths start here
    grid: tuple[Mapping[str, Any], ...]  # blocks; each is the product of its axes, one of which is "notebook"
    then: tuple[Mapping[str, Any], ...] = ()  # notebooks that gather, one after the other
    preset: Mapping[str, Any] = field(default_factory=dict)  # each notebook takes the parameters that it has
    parameters: Mapping[str, Any] = field(default_factory=dict)  # likewise; these override the preset
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)  # name -> values that a run may have

    def narrowed(self, only: Sequence[str], device: str | None = None) -> "Spec":
        """This spec, but only the runs with the values in ``only``, e.g. ("method=nada", "seed=0", "seed=1").

        ``device`` replaces the device of all runs. Raises ValueError if an item of ``only`` has another form.
        """
        values: dict[str, list[str]] = {}
        for one in only:
            name, is_one, value = one.partition("=")
            if not (name and is_one):
                raise ValueError(f"write a parameter and its value, as in method=nada, not {one!r}")
            values.setdefault(name, []).append(value)
        given = {"device": device} if device else {}
        grid = tuple({name: one for name, one in block.items() if name not in given} for block in self.grid)
        return replace(self, only=values, grid=grid, parameters={**self.parameters, **given})

    def keeps(self, parameters: Mapping[str, Any]) -> bool:
        """Whether ``only`` allows a run with these parameters."""
        return all(str(parameters.get(name)) in values for name, values in self.only.items())


def load_spec(path: str | os.PathLike, quick: bool = False) -> Spec:
    """Read a sweep file; with ``quick`` the keys of its ``quick`` section replace those of the file.

    ValueError names what is wrong.
    """
    path = Path(path)
    values = _read_yaml(path, "sweep")
    check_known(values, (*SECTIONS, "quick"), path.name)
    if quick:
        if not isinstance(values.get("quick"), dict):
            fix = f"run it without --quick, or write one with any of {', '.join(SECTIONS)}"
            raise ValueError(f"{path.name} has no section quick: {fix}")
        quick_values = named(values["quick"], f"quick of {path.name}")
        check_known(quick_values, SECTIONS, f"quick of {path.name}")
        values |= quick_values
    grid, then = (_blocks(values, name, path) for name in ("grid", "then"))
    parameters = named(values.get("parameters") or {}, f"parameters of {path.name}")
    if not grid:
        raise ValueError(f"{path.name} has no grid: nothing to run")
    if not isinstance(values.get("preset") or "", str):
        raise ValueError(f"preset of {path.name} must be the name of a file, not {values['preset']!r}")
    preset = load_preset(path.parent / values["preset"]) if values.get("preset") else {}
    name = path.stem + ("-quick" if quick else "")
    return Spec(name, path.parent.resolve(), grid, then, preset, parameters)


def _blocks(values: Mapping[str, Any], name: str, path: Path) -> tuple[Mapping[str, Any], ...]:
    blocks = values.get(name) or []
    if not isinstance(blocks, list) or not all(isinstance(b, dict) and b.get("notebook") for b in blocks):
        raise ValueError(f"{name} of {path.name} must be a list of blocks like `- notebook: 02_training`")
    for block in blocks:
        book = named(block, f"a block of {name} of {path.name}")["notebook"]
        books = book if name == "grid" and isinstance(book, list | dict) else [book]
        if odd := [one for one in books if not isinstance(one, str)]:
            raise ValueError(f"notebook in {name} of {path.name} must be a name, not {odd[0]!r}")
    return tuple(blocks)


def points(block: Mapping[str, Any]) -> int:
    """The number of combinations of a block's axes."""
    return math.prod(len(values) if isinstance(values, list | dict) else 1 for values in block.values())


def cells(block: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """For each combination of a block's axes: (notebook and parameters, a readable file name)."""
    axes = {name: _axis(name, values, block) for name, values in block.items()}
    for choice in itertools.product(*axes.values()):
        cell = dict(zip(axes, (value for value, _ in choice), strict=True))
        for _, overrides in choice:
            cell |= overrides
        named = [name for name in axes if name in ("notebook", "prompt") or len(axes[name]) > 1]
        parts = [slug(Path(cell[name]).stem if name == "notebook" else str(cell[name])) for name in named]
        yield cell, first_bytes("-".join(first_bytes(part, 40) for part in parts), 160)


def _axis(name: str, values: Any, block: Mapping[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """For each value of an axis: (the value, the parameters that are set only together with it)."""
    if isinstance(values, dict):
        axis = [(value, overrides or {}) for value, overrides in values.items()]
    else:
        axis = [(value, {}) for value in (values if isinstance(values, list) else [values])]
    if not axis:
        raise ValueError(f"grid: {name} lists nothing")
    for value, overrides in axis:
        if name in TEXT_KEYS and isinstance(value, str) and not value.strip():
            raise ValueError(f"grid: {name} has an empty value")
        if not isinstance(overrides, dict) or overrides.keys() & block.keys():
            form = f"parameters that are not axes, as in `{value}: {{steps: 9}}`"
            hint = f"a mapping as one value is written in a list: `{name}: [{{…}}]`"
            raise ValueError(f"grid: {name} {value!r} may change {form}; not {overrides!r} ({hint})")
        named(overrides, f"grid: what {name} {value!r} changes")
    return axis


# ---- notebooks ----


def find_notebook(name: str | os.PathLike, folder: Path = Path()) -> Path:
    """The path of the notebook ``name`` of ``notebooks/``; a path in .ipynb is relative to ``folder``."""
    path = folder / name if str(name).endswith(".ipynb") else NOTEBOOKS / f"{name}.ipynb"
    if not path.exists():
        raise ValueError(f"notebook {name} does not exist; {_there_are(NOTEBOOKS, '*.ipynb')}")
    return path.resolve()


def code_of(notebook: Path) -> list[tuple[str, list[str]]]:
    """(source, tags) of each code cell."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        return [("".join(cell["source"]), cell.get("metadata", {}).get("tags", [])) for cell in code]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{notebook} is not a notebook that Jupyter could open") from None


def parameters_of(notebook: str | os.PathLike) -> dict[str, Any]:
    """name -> default of each parameter in the cell that is tagged ``parameters``."""
    code = "\n".join(source for source, tags in code_of(find_notebook(notebook)) if "parameters" in tags)
    try:
        assigned = [node for node in ast.parse(code).body if isinstance(node, ast.Assign)]
        return {node.targets[0].id: ast.literal_eval(node.value) for node in assigned}
    except (SyntaxError, ValueError, AttributeError) as error:
        raise ValueError(f"the parameters of {notebook} must be literals, `name = value`: {error}") from None
