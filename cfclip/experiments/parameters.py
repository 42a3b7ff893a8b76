"""Checks of the notebooks' parameters, whether papermill, a preset or a person sets them."""

import ast
from collections.abc import Mapping
from typing import Any

from IPython import get_ipython

from cfclip import baselines
from cfclip.domains import DOMAINS
from cfclip.evaluation import ablation
from cfclip.inversion.projector import SPACES
from cfclip.settings import Check, finite, flag, in_a_list, int_at_least, number, one_of, seed_number, text


def any_text(value: Any) -> str | None:
    """A text, perhaps an empty one."""
    return None if isinstance(value, str) else "a text"


def mapping(value: Any) -> str | None:
    """A mapping whose keys are texts."""
    fine = isinstance(value, dict) and all(isinstance(name, str) for name in value)
    return None if fine else "a mapping of names to values, such as {steps: 9}"


def settings_of_methods(value: Any) -> str | None:
    """A mapping of method -> mapping of its settings."""
    fine = not mapping(value) and not any(map(mapping, value.values()))
    return None if fine else "a mapping of methods to their settings, such as {cfclip: {steps: 9}}"


def list_of(check: Check, what: str, minimum: int = 0) -> Check:
    """A list of at least ``minimum`` values that pass ``check``."""

    def checked(values: Any) -> str | None:
        fine = isinstance(values, list | tuple) and len(values) >= minimum
        return None if fine and not any(map(check, values)) else f"a list of {what}{in_a_list(values)}"

    return checked


def point(value: Any) -> str | None:
    """Two finite numbers [x, y]."""
    fine = isinstance(value, list | tuple) and len(value) == 2 and not any(map(finite, value))
    return None if fine else "[x, y]"


CHECKS: dict[str, Check] = {
    "domain": one_of(DOMAINS),
    "label": int_at_least(0, optional=True),
    "settings": mapping,
    "refine": settings_of_methods,
    "seed": seed_number,
    "seeds": list_of(seed_number, "whole numbers from 0, at least one", 1),
    "snapshots": list_of(int_at_least(0), "whole numbers from 0, at least one", 1),
    "ceiling": int_at_least(0),
    "strength": finite,
    "strengths": list_of(finite, "finite numbers, at least one", 1),
    "points": list_of(point, "five points [x, y]"),
    "detect": flag,
    "encoder": flag,
    "space": one_of(SPACES),
    "w_centre": number(),
    "curve_steps": list_of(int_at_least(1), "whole numbers from 1, at least one", 1),
    "curve_centres": list_of(number(), "finite numbers from 0, at least one", 1),
    **dict.fromkeys(("n", "preview", "faces", "inversion_steps", "photo_steps"), int_at_least(1)),
    **dict.fromkeys(("device", "method", "prompt", "page"), text),
    **dict.fromkeys(("prompts", "sentences", "compared", "rows", "pictures"), list_of(text, "texts")),
    **dict.fromkeys(("photo", "command", "out", "runs", "reports", "routes"), any_text),
}
"""Parameter -> its check, which holds in every notebook of cfclip that has this parameter."""


def check_parameters(**values: Any) -> None:
    """Check the parameters of a notebook, including ``settings``. ValueError names the first wrong one.

    On papermill's command line ``-p encoder false`` gives the text "false", and ``-p prompt 42`` a number. A
    name that no notebook has is an error too. A name of another notebook is allowed: presets serve many.
    """
    if unknown := [name for name in injected() if name not in CHECKS]:
        known = set().union(*map(baselines.settings, baselines.METHODS))
        hint = f": write it as -y 'settings: {{{unknown[0]}: …}}'" if unknown[0] in known else ""
        names = ", ".join(map(repr, unknown))
        raise ValueError(f"no notebook has a parameter {names}{hint}; this one has: {', '.join(values)}")
    for name, value in values.items():
        if wanted := CHECKS[name](value):
            raise ValueError(f"{name} must be {wanted}, not {value!r}{_papermill(name, value, wanted)}")
    check_settings(values)
    for method, given in values.get("refine", {}).items():
        check_settings({"method": method, "prompt": "a prompt", "settings": given}, f"refine of {method}")


def injected() -> list[str]:
    """The names of the parameters that papermill set in this kernel; empty outside papermill."""
    shell = get_ipython()
    executed = shell.user_ns.get("In", []) if shell else []
    cells = [cell for cell in executed if cell.startswith("# Parameters\n")]
    assigned = [node for cell in cells for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
    return [node.targets[0].id for node in assigned]


def _papermill(name: str, value: Any, wanted: str) -> str:
    """A hint on how to write the value on papermill's command line; "" if that is not the problem."""
    if wanted == flag(None) and str(value).lower() in ("true", "false"):
        return f" (papermill: -p {name} {str(value).capitalize()})"
    if wanted == text(None) and isinstance(value, int | float):
        return f" (papermill: -r {name} {value})"
    return f" (papermill: -y '{name}: [{value}]')" if in_a_list(value) and in_a_list(value) in wanted else ""


def check_settings(values: Mapping[str, Any], what: str = "settings") -> None:
    """Raise ValueError if a notebook with these parameters would train with settings that cannot work."""
    one, many = {"method", "prompt", "settings"}, {"rows", "prompts", "settings"}
    if not one <= values.keys() and not many <= values.keys():
        return
    given = {"seed": values.get("seed", 0)} | values["settings"]
    try:
        if twice := {"method", "prompt"} & given.keys():
            raise ValueError(f"{', '.join(sorted(twice))} is a parameter, not one of the settings")
        if "rows" in values:
            wanted = ablation.jobs(values["rows"], values["prompts"], [given["seed"]], given)
            trainings = [(job.method, job.prompt, job.settings) for job in wanted.values()]
        else:
            trainings = [(values["method"], values["prompt"], given)]
        for method, prompt, changed in trainings:
            baselines.configure(method, prompt, **changed)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{what}: {error}") from None
