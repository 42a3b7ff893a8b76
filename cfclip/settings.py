"""Settings of runs: frozen dataclasses in which each field has a comment, one check and usually a default.

@dataclass(frozen=True)
class Config(Settings):
    steps: int = setting(300, int_at_least(1))  # optimisation steps
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

LARGEST = 1e30
"""The largest number in a setting. torch multiplies it by others in float32, which ends at 3.4e38."""
LARGEST_COUNT = 10**9
"""The largest whole number, such as steps, where a check names no other maximum."""
LARGEST_BATCH = 2**16
"""The largest number of pictures or codes in memory at a time."""
Check = Callable[[Any], str | None]
"""Returns what a value must be, e.g. "a whole number from 1", or None if the value is fine."""


def setting(default: Any, check: Check) -> Any:
    """A dataclass field with its check; ``MISSING`` as the default makes it required."""
    return field(default=default, metadata={"check": check})


def int_at_least(minimum: int, optional: bool = False, maximum: int = LARGEST_COUNT) -> Check:
    """A whole number from ``minimum`` to ``maximum``; with ``optional`` also None."""

    def check(value: Any) -> str | None:
        fine = isinstance(value, int) and not isinstance(value, bool)
        if (optional and value is None) or (fine and minimum <= value <= maximum):
            return None
        return f"a whole number from {minimum}" + (f" to {maximum}" if fine and value > maximum else "")

    return check


def number(
    minimum: float = 0.0, maximum: float = LARGEST, above: bool = False, optional: bool = False
) -> Check:
    """A finite number from ``minimum`` to ``maximum``; ``above``: not ``minimum``; ``optional``: or None."""

    def check(value: Any) -> str | None:
        fine = isinstance(value, int | float) and not isinstance(value, bool)
        if optional and value is None:
            return None
        if fine and minimum <= value <= maximum and not (above and value == minimum):
            return None
        lower = f"{'above' if above else 'from'} {minimum:g}"
        upper = f" to {maximum:g}" if maximum < LARGEST or (fine and value > maximum) else ""
        return "a finite number" + (f" {lower}{upper}" if minimum > -LARGEST or upper else "")

    return check


finite = number(-LARGEST)
"""Any finite number."""
batch_size = int_at_least(1, maximum=LARGEST_BATCH)
"""A number of pictures or codes that are in memory at a time."""
seed_number = int_at_least(0, maximum=2**63 - 1)
"""A seed that both torch and numpy accept."""


def flag(value: Any) -> str | None:
    """True or False."""
    return None if isinstance(value, bool) else "True or False"


def text(value: Any) -> str | None:
    """A text that is not blank."""
    return None if isinstance(value, str) and value.strip() else "a text"


def optional_text(value: Any) -> str | None:
    """A text that is not blank, or None."""
    return None if value is None else text(value)


def in_a_list(value: Any) -> str:
    """A hint for error messages: how to write a single value as a list; "" for anything else."""
    return f" (write it as [{value}])" if isinstance(value, str | int | float) and str(value).strip() else ""


def one_of(known: Collection[str]) -> Check:
    """One of the names ``known``."""
    return lambda value: None if isinstance(value, str) and value in known else f"one of {', '.join(known)}"


def some_of(known: Collection[str]) -> Check:
    """A tuple of at least one of the names ``known``, none of them twice."""

    def check(value: Any) -> str | None:
        fine = isinstance(value, tuple | list) and value and len(set(map(str, value))) == len(value)
        if fine and set(map(str, value)) <= set(known):
            return None
        return f"a list of some of {', '.join(known)}" + in_a_list(value)

    return check


@dataclass(frozen=True)
class Settings:
    """Base of all configurations. Lists become tuples; ValueError names the first bad setting."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, list):
                object.__setattr__(self, one.name, value := tuple(value))
            if (check := one.metadata.get("check")) and (wanted := check(value)):
                raise ValueError(f"{one.name} must be {wanted}, not {value!r}")


def defaults(config: type | Settings) -> dict[str, Any]:
    """For a class: name -> default of each optional field. For an instance: name -> value of each field."""
    if isinstance(config, Settings):
        return {one.name: getattr(config, one.name) for one in fields(config)}
    return {one.name: one.default for one in fields(config) if one.default is not MISSING}


def check_known(given: Mapping[str, Any], known: Collection[str], what: str) -> None:
    """Raise ValueError that names the keys of ``given`` that ``what`` does not have, if there are any."""
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{what} has no setting {', '.join(map(repr, unknown))}; it has: {', '.join(known)}")
