"""Every setting of every method has a range: beyond it an error names it, inside nothing raw is raised."""

import math
from dataclasses import fields

import pytest

from cfclip.baselines import METHODS, configure, fit, settings
from cfclip.inversion import InversionConfig
from cfclip.method.config import MultiPromptConfig
from cfclip.settings import LARGEST, LARGEST_COUNT

BEYOND = [1.1e30, 1e31, 4e38, 1e39, 1.7e308, 10**31, 10**400, math.inf]
QUICK = {"steps": 2, "batch": 1, "train_latents": 2, "num_views": 1, "samples": 2, "style_samples": 9}


def numbers(method: str) -> list[str]:
    return [name for name, value in settings(method).items() if type(value) in (int, float)]


EACH = [(method, name) for method in METHODS for name in numbers(method)]

ALIKE = ("styleclip-mapper", "nada")  # train as cfclip does
WORDS = ("smaller lr", "set beta lower", "no perceptual network")


@pytest.mark.parametrize(("method", "name"), EACH)
def test_a_number_beyond_its_range_is_named(method, name):
    for value in (*BEYOND, -1e31, -(10**400), -math.inf, math.nan):
        with pytest.raises(ValueError, match=f"{name} must be a (finite|whole) number"):
            configure(method, "x", **{name: value})


def test_the_message_has_the_end_of_the_range_that_was_passed():
    with pytest.raises(ValueError, match=r"lr must be a finite number above 0 to 1e\+30, not 1e\+38"):
        configure("cfclip", "x", lr=1e38)
    with pytest.raises(ValueError, match=f"steps must be a whole number from 1 to {LARGEST_COUNT}, not 9"):
        configure("cfclip", "x", steps=9 * 10**18)
    with pytest.raises(ValueError, match=r"lr must be a finite number above 0, not 0"):
        configure("cfclip", "x", lr=0)


@pytest.mark.parametrize("config", [InversionConfig, MultiPromptConfig])
def test_so_are_the_numbers_of_other_configurations(config):
    given = {"prompts": ("x",)} if config is MultiPromptConfig else {}
    for one in fields(config):
        if type(one.default) in (int, float):
            for value in BEYOND:
                with pytest.raises(ValueError, match=f"^{one.name} must be"):
                    config(**given, **{one.name: value})


@pytest.mark.parametrize(
    ("method", "name"), [(m, n) for m, n in EACH if isinstance(settings(m)[n], float) and m not in ALIKE]
)
@pytest.mark.parametrize("value", [LARGEST, 5e-324])
def test_a_number_at_the_end_of_its_range_trains_or_stops_with_a_sentence(method, name, value, domain):
    """The error is one of ours, never torch's."""
    known = settings(method)
    given = {key: small for key, small in QUICK.items() if key in known} | {name: value}
    try:
        editor = fit(method, domain, "green lipstick", progress=False, **given)
        editor.edit(domain.latents(1, "test"))
    except ValueError as error:
        assert any(word in str(error) for word in WORDS), error


def test_a_list_that_is_given_as_a_text_is_told_how_to_be_written():
    with pytest.raises(ValueError, match=r"levels must be a list of some of .* \(write it as \[fine\]\)"):
        configure("cfclip", "x", levels="fine")
