"""The code that is not hashed: a change of it leaves finished runs alone, so no number may depend on it."""

import ast
import re
from pathlib import Path

import grimp
import pytest

import cfclip
from cfclip.experiments.runs import NOT_HASHED
from cfclip.experiments.spec import code_of
from cfclip.files import NOTEBOOKS, PACKAGE

MEASURING = [NOTEBOOKS / f"{name}.ipynb" for name in ("02_training", "03_ablation_directions")]


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("cfclip", cache_dir=None)


def is_hashed(module: str) -> bool:
    path = PACKAGE.parent / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return not file.relative_to(PACKAGE).as_posix().startswith(NOT_HASHED)


def test_every_entry_is_a_file_or_folder_of_the_package():
    for name in NOT_HASHED:
        assert (PACKAGE / name).exists(), name


def names_in(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    """Variables that are read (ast.Load) or set (ast.Store) in ``node``."""
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, context)}


def modules_measured_with(notebook: Path) -> set[str]:
    """What is imported to compute the rows of ``metrics.jsonl``, found by reading the notebook backwards."""
    source = "\n".join(text for text, _ in code_of(notebook))
    needed: set[str] = set()
    modules = set()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            where = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            modules |= {where + one.name for one in node.names if (one.asname or one.name) in needed}
        elif "metrics.jsonl" in ast.unparse(node) or names_in(node, ast.Store) & needed:
            needed |= names_in(node, ast.Load)
    if "cfclip" in modules:  # names of the package itself are loaded lazily, by __getattr__
        modules |= {getattr(cfclip, name).__module__ for name in re.findall(r"\bcfclip\.(\w+)\(", source)}
    return {name for module in modules for name in (module, module.rpartition(".")[0]) if name}


@pytest.mark.parametrize("notebook", MEASURING, ids=lambda path: path.stem)
def test_all_code_that_a_number_depends_on_is_hashed(notebook, imports):
    direct = modules_measured_with(notebook) & imports.modules
    reached = direct.union(*map(imports.find_upstream_modules, direct))
    assert {"cfclip.files", "cfclip.method.losses", "cfclip.models.stylegan2", "cfclip.domains"} <= reached
    assert [module for module in sorted(reached) if not is_hashed(module)] == []
