"""How sure an edit may be."""

import dataclasses

import pytest
import torch

from cfclip.evaluation.confidence import predicted_success

KNOWN = {
    "measured": {"blue hair": 0.25, "a moustache": 0.1},
    "claims": {"blue hair": 0.25, "green lipstick": 0.9, "no glasses": 0.6, "beard": 0.5},
}


@pytest.fixture
def sure(domain):
    return dataclasses.replace(domain, mapper=torch.nn.Identity(), confidence=KNOWN)


@pytest.mark.parametrize(
    ("prompt", "share"),
    [
        ("blue hair", 0.25),  # measured
        ("a moustache", 0.1),  # measured in these very words
        ("green lips", 0.9),  # its claim, in other words
        ("a man with a blue bob", None),  # nothing is known of a bob
        ("a woman with green lips and blue hair", 0.25),  # the less likely of two
        ("green lips and no glasses", 0.6),
        ("green lips and cyan eyes", None),
        ("smiling", None),  # no claim that can be measured
        ("face", None),
    ],
)
def test_what_was_measured_of_the_words_or_of_their_claims_is_said(sure, prompt, share):
    assert predicted_success(sure, prompt) == share


def test_without_a_mapper_or_a_calibration_or_a_judge_nothing_is_predicted(sure):
    assert predicted_success(dataclasses.replace(sure, confidence=None), "green lips") is None
    assert predicted_success(dataclasses.replace(sure, mapper=None), "green lips") is None
    judgeless = dataclasses.replace(sure, truth=None)
    assert predicted_success(judgeless, "green lips") is None
    assert predicted_success(judgeless, "blue hair") == 0.25
