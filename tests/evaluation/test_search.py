"""How settings are chosen from trials, on numbers that were made up."""

import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from cfclip.evaluation import search


def searched(*tried):
    """The trials (method, settings, success of each seed) of one prompt, at an identity of 0.9."""
    same = {"prompt": "green lipstick", "strength": 1.0, "success_before": 0.0, "identity": 0.9, "index": 0}
    rows = [
        same
        | {"run": f"{k}-{seed}", "method": method, "settings": settings, "seed": seed, "success_after": share}
        for k, (method, settings, success) in enumerate(tried)
        for seed, share in enumerate(success if isinstance(success, list) else [success])
    ]
    return search.trials(pd.DataFrame(rows), lambda prompt: "counterfactual")


def chosen(*tried):
    (line,) = searched(*tried).query("chosen").itertuples()
    return line.trial.removeprefix("nada: "), line.edge


def test_the_best_trial_of_each_method_is_chosen():
    tried = [("nada", 4, 0.3), ("nada", 1, 0.2), ("cfclip", 1, 0.4), ("cfclip", 10, 0.2), ("cfclip", 3, 0.5)]
    result = searched(*((method, {"lr": lr, "steps": 9}, success) for method, lr, success in tried))
    names = ["cfclip: lr 1", "cfclip: lr 3", "cfclip: lr 10", "nada: lr 1", "nada: lr 4"]
    assert result.trial.tolist() == names and result[result.chosen].trial.tolist() == names[1::3]
    assert result["mean"].tolist() == pytest.approx([0.35, 0.4375, 0.175, 0.175, 0.2625])
    assert result["green lipstick"].tolist() == result["mean"].tolist()
    drawn = search.figure(result)
    means = [axis.collections[0] for axis in drawn.axes]
    values = [dots.get_offsets()[:, 0].tolist() for dots in means]
    assert values == [pytest.approx([0.175, 0.4375, 0.35]), pytest.approx([0.2625, 0.175])]
    red, grey = to_rgba("C3"), to_rgba("0.5")
    colours = [[*map(tuple, dots.get_facecolors())] for dots in means]
    assert colours == [[grey, red, grey], [red, grey]], "from below"


def test_of_trials_that_are_equally_good_the_one_in_their_middle_is_chosen():
    def of(*success, names=(1, 3, 10, 30, 100)):
        return chosen(*(("nada", {"lr": lr}, s) for lr, s in zip(names, success, strict=True)))[0]

    assert of(0.2, 0.8, 0.8, 0.804, 0.2) == "lr 10", "the best one is beside a cliff"
    assert of(0.2, 0.8, 0.8, 0.82, 0.2) == "lr 30", "more than a point better"
    assert of(0.8, 0.804, 0.2, 0.2, 0.2) == "lr 3", "of two the better one"
    assert of(0.8, 0.8, 0.8, 0.8, 0.8) == "lr 10"
    grid = [{"lr": lr, "l2": l2} for lr in (1, 3, 9) for l2 in (0, 0.1, 1)]
    good = [one["lr"] < 9 and one["l2"] > 0 for one in grid]
    found, _ = chosen(
        *(("nada", one, 0.805 if one == grid[1] else 0.8 * ok) for one, ok in zip(grid, good, strict=True))
    )
    assert found == "lr 1, l2 0.1", "all four are as near, and this is the best"


def test_a_trial_that_lacks_a_seed_is_not_compared():
    result = searched(
        *(("nada", {"lr": lr}, success) for lr, success in [(1, [0.2, 0.2]), (2, [0.9]), (3, [0.3, 0.3])])
    )
    assert result.chosen.tolist() == [False, False, True]
    assert result["mean"].isna().tolist() == [False, True, False]


def test_a_choice_at_an_edge_of_its_grid_is_told():
    grid = [(lr, l2) for lr in (1, 3, 9) for l2 in (0, 0.1, 0.2)]

    def edge_of(winner):
        settings = [{"lr": lr, "l2": l2, "levels": ["fine"]} for lr, l2 in grid]
        return chosen(
            *(("nada", one, 0.9 if k == grid.index(winner) else 0.1) for k, one in enumerate(settings))
        )[1]

    assert edge_of((3, 0.1)) == "" and edge_of((3, 0)) == "", "nothing is below 0"
    assert edge_of((9, 0.1)) == "lr 9 is the largest tried"
    assert edge_of((1, 0.2)) == "lr 1 is the smallest tried; l2 0.2 is the largest tried"
    assert chosen(*(("nada", {"beta": beta}, s) for beta, s in [(None, 0.5), (0.1, 0.2), (0.2, 0.2)])) == (
        "beta None",
        "",
    )


def test_trials_need_not_have_the_same_settings():
    tried = [{"lr": 1, "layers": 3, "choice_batch": 2}, {"lr": 1, "layers": None}, {}]
    assert chosen(*zip(["nada"] * 3, tried, [0.2, 0.9, 0.1], strict=True)) == (
        "lr 1, layers None",
        "lr 1 is the largest tried",
    )
    assert chosen(("nada", {"lr": 1}, 0.5)) == ("", ""), "one trial, and nothing varies"
