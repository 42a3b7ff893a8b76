"""How sure an edit may be."""

import dataclasses

import numpy as np
import pytest
import torch

from cfclip.evaluation.confidence import agreement, calibrate, predicted_success
from cfclip.models.mapper import Mapper, MapperConfig


def test_calibration_finds_the_curve_that_made_the_data():
    x = np.linspace(-0.5, 0.9, 60)
    a, b = calibrate(x, 1 / (1 + np.exp(-(-1.5 + 6 * x))))
    assert a == pytest.approx(-1.5, abs=0.1) and b == pytest.approx(6, abs=0.3)
    a, b = calibrate([0.1, 0.2], [1, 1])
    assert np.isfinite([a, b]).all() and a > 0


@pytest.fixture
def edited(domain):
    g = domain.generator
    config = MapperConfig(g.num_ws, g.w_dim, domain.clip.word_dim, text="tokens")
    mapper = Mapper.initialised(config, torch.Generator().manual_seed(0)).requires_grad_(False)
    return dataclasses.replace(domain, mapper=mapper, heldout_clip=None)


def test_an_edit_and_its_reverse_agree_and_disagree_with_the_text(edited):
    """A picture that moves the other way has another cosine, and one that stays has none."""
    forwards = agreement(edited, edited.mapper, "green lipstick")
    still = Mapper.of(edited.mapper.config)  # all zeros
    assert agreement(edited, still, "green lipstick") == 0
    assert -1 <= forwards <= 1 and forwards != agreement(edited, edited.mapper, "blue hair")


def test_what_was_measured_is_said_and_the_rest_foretold(edited):
    known = {"intercept": 0.5, "slope": 5.0, "measured": {"blue hair": 0.25}}
    sure = dataclasses.replace(edited, confidence=known)
    x = agreement(edited, edited.mapper, "green lipstick")
    assert predicted_success(sure, "green lipstick") == pytest.approx(1 / (1 + np.exp(-0.5 - 5 * x)))
    assert predicted_success(sure, "blue hair") == 0.25


def test_without_a_mapper_or_a_calibration_nothing_is_predicted(edited):
    assert predicted_success(edited, "green lipstick") is None
    known = {"intercept": 0.0, "slope": 1.0, "measured": {}}
    assert predicted_success(dataclasses.replace(edited, mapper=None, confidence=known), "blue hair") is None
