"""A small file never costs much: every bomb is refused quickly, with little memory, in its own words."""

import re

import bombs
import limited
import pytest


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    return limited.run("bombs", tmp_path_factory.mktemp("bombs"), seconds=300, memory=1.5)


@pytest.mark.parametrize("name", bombs.BOMBS)
def test_a_bomb_is_refused_in_its_own_words(name, report):
    assert re.search(bombs.BOMBS[name][2], report["files"][name]), report["files"][name]


def test_bombs_cost_little(report):
    assert not report["wrong"] and report["loaded"] == 0
    seconds, slowest = report["slowest"]
    assert seconds < 8, slowest
    assert report["peak"] < 1  # GiB
