"""Intervals, p-values and planned power, against simulated data and sums done by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from cfclip.evaluation import stats
from cfclip.evaluation.stats import Spread


def simulate(rng, spread, prompts, seeds, mean=0.0):
    """A table of the mixed model."""
    values = mean + spread.prompt * rng.normal(size=(prompts, 1)) + spread.seed * rng.normal(size=(1, seeds))
    return pd.DataFrame(values + spread.rest * rng.normal(size=(prompts, seeds)))


def test_the_model_by_hand():
    """Prompts differ by 2, seeds by 4, nothing is left: MS_P = 2 * (1 + 1), MS_S = 2 * (4 + 4)."""
    found = stats.crossed(pd.DataFrame([[1.0, 5.0], [3.0, 7.0]]))
    assert found.mean == 4 and found.spread == Spread(np.sqrt(2), np.sqrt(8), 0)
    assert found.error == pytest.approx(np.sqrt((4 + 16) / 4))
    assert found.df == pytest.approx((4 + 16) ** 2 / (4**2 + 16**2))
    assert found.half == pytest.approx(scipy_stats.t.ppf(0.975, found.df) * np.sqrt(5))
    assert found.p == pytest.approx(2 * scipy_stats.t.sf(4 / np.sqrt(5), found.df))


@pytest.mark.parametrize("spread", [Spread(0.2, 0.02, 0.1), Spread(0.05, 0.1, 0.05), Spread(0, 0, 0.2)])
def test_nineteen_of_twenty_intervals_have_the_truth(spread):
    rng = np.random.default_rng(0)
    found = [stats.crossed(simulate(rng, spread, 12, 6, 0.3)) for _ in range(400)]
    covered = np.mean([abs(one.mean - 0.3) <= one.half for one in found])
    assert 0.93 <= covered <= 0.99
    square = np.mean([one.spread.prompt**2 for one in found])
    assert square == pytest.approx(spread.prompt**2, abs=0.2 * spread.prompt**2 + 2e-3)


def test_an_interval_over_seeds_alone_would_miss_the_truth():
    """Prompts differ in earnest: their mean over seeds is sharp, and wrong about other prompts."""
    rng, spread = np.random.default_rng(1), Spread(0.2, 0.02, 0.05)
    tables = [simulate(rng, spread, 6, 6) for _ in range(200)]
    alone = np.mean([abs(t.to_numpy().mean()) <= stats.half_width(t.mean(0).to_numpy()) for t in tables])
    assert alone < 0.6 < 0.9 < np.mean([abs(t.to_numpy().mean()) <= stats.crossed(t).half for t in tables])


def test_gaps_cost_whole_prompts_or_whole_seeds_whichever_is_less():
    table = pd.DataFrame(np.arange(12.0).reshape(3, 4))
    table.iloc[0, 1] = np.nan
    assert (stats.crossed(table).prompts, stats.crossed(table).seeds) == (3, 3)
    table.iloc[0, 2] = np.nan
    assert (stats.crossed(table).prompts, stats.crossed(table).seeds) == (2, 4)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (0, 0)])
def test_one_prompt_or_one_seed_has_no_interval(shape):
    found = stats.crossed(pd.DataFrame(np.ones(shape)))
    assert np.isnan([found.error, found.half, found.p]).all()


def test_equal_numbers_have_no_error():
    assert stats.crossed(pd.DataFrame(np.full((3, 3), 0.5))).p == 0
    assert stats.crossed(pd.DataFrame(np.zeros((3, 3)))).p == 1


def test_holm_by_hand():
    adjusted = stats.holm([0.01, 0.04, np.nan, 0.03, 0.005])
    assert adjusted[[0, 1, 3, 4]] == pytest.approx([0.03, 0.06, 0.06, 0.02]) and np.isnan(adjusted[2])
    assert stats.holm([0.9, 0.8]).tolist() == [1, 1] and stats.holm([]).size == 0


def test_planned_power_is_what_simulations_find():
    rng, spread = np.random.default_rng(2), Spread(0.06, 0.03, 0.1)
    for prompts, seeds in ((6, 4), (12, 8)):
        found = [stats.crossed(simulate(rng, spread, prompts, seeds, 0.1)).p < 0.05 for _ in range(400)]
        assert stats.power(spread, prompts, seeds) == pytest.approx(np.mean(found), abs=0.05)


def test_a_plan_from_a_pilot_reaches_its_power_and_one_seed_less_does_not():
    rng, truth = np.random.default_rng(3), Spread(0.08, 0.02, 0.12)
    pilot = stats.crossed(simulate(rng, truth, 6, 6, 0.05)).spread
    planned = stats.plan([pilot, Spread(0.01, 0.01, 0.01)], claims=12)
    assert planned.prompts.is_monotonic_increasing and planned.seeds.is_monotonic_decreasing
    assert (planned.trainings == planned.prompts * planned.seeds).all()
    for row in planned.itertuples():
        assert stats.power(pilot, row.prompts, row.seeds, level=0.05 / 12) == row.power >= 0.9
        if row.seeds > 2:
            assert stats.power(pilot, row.prompts, row.seeds - 1, level=0.05 / 12) < 0.9


def test_a_plan_that_cannot_be_is_empty():
    assert stats.plan([Spread(2.0, 0.1, 0.1)], claims=1, most=(12, 8)).empty
