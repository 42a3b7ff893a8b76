"""Success, progress and leakage by hand, of measurements that were made up."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cfclip.evaluation import metrics

GREEN = np.array([50.0, -40.0, 30.0])
RED = np.array([45.0, 60.0, 40.0])
GONE = np.full(3, np.nan)


class Seen(SimpleNamespace):
    """A measurement of lips and skin.

    lab: their CIELAB colours [N, 2, 3]; lips: whether there are any [N]; share: of the lips' mask [N].
    """

    masks = property(lambda self: np.stack([self.share, 1 - self.share], 1)[..., None, None])
    area = property(lambda self: np.full((len(self.lab), 2), 500.0))

    def has(self, part):
        assert part == "lips"
        return self.lips

    def distance(self, part, colour):
        return np.linalg.norm(self.lab[:, 0] - {"green": GREEN, "red": RED}[colour], axis=-1)

    def colour(self, part):
        near = np.stack([self.distance(part, name) for name in ("green", "red")], 1)
        return [None if np.isnan(row).any() else ("green", "red")[row.argmin()] for row in near]


class Truth:
    """Knows lips and skin. A picture's first pixel is its index in ``known``, ``spread`` are its renders."""

    parts = ("lips", "skin")

    def __init__(self, before, after, lips, spread=(0.0, 40.0), skin=20.0):
        n = len(before)
        self.skin = np.zeros((2 * n + 512, 3))
        self.skin[n : 2 * n, 0] = skin  # moved by the edit
        self.skin[2 * n :, 0] = np.repeat(spread, 256)
        nature = np.broadcast_to(RED, (512, 3))
        self.lab = np.stack([np.concatenate([before, after, nature]), self.skin], 1)
        self.lips = np.concatenate([lips, lips, np.ones(512, dtype=bool)])
        self.n = n

    def claim(self, prompt):
        return tuple(reversed(prompt.split())) if len(prompt.split()) == 2 else None

    def measure(self, images):
        index = images[:, 0, 0, 0].long().numpy()
        share = np.where(index < 2 * self.n + 256, 0.5, 0.75)  # half of the renders have larger lips
        return Seen(lab=self.lab[index], lips=self.lips[index], share=share)

    def renders(self, n, claim=None):
        return self.pictures(2 * self.n, 2 * self.n + n)

    def pictures(self, first, last):
        return torch.arange(first, last).float().reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def score(truth, prompt="green lips"):
    domain = SimpleNamespace(truth=truth, source_text="face")
    before, after = truth.pictures(0, truth.n), truth.pictures(truth.n, 2 * truth.n)
    return metrics.ground_truth(metrics.Edit(domain, prompt, before, after))


def test_a_face_without_the_part_neither_succeeds_nor_fails():
    has = np.array([True, True, False, False])
    scores = score(Truth([RED] * 4, [GREEN, RED, GREEN, RED], has))
    np.testing.assert_array_equal(scores["success_before"], [0, 0, np.nan, np.nan])
    np.testing.assert_array_equal(scores["success_after"], [1, 0, np.nan, np.nan])
    np.testing.assert_array_equal(scores["progress"], [1, 0, np.nan, np.nan])
    assert np.isfinite(scores["leakage"]).all(), "it may leak like any other"


def test_a_face_that_loses_the_part_by_the_edit_fails():
    scores = score(Truth([RED], [GONE], np.array([True])))
    assert [scores[name].tolist() for name in ("success_after", "progress")] == [[0], [0]]


def test_progress_is_the_share_of_the_way_in_cielab():
    way = GREEN - RED
    steps = np.array([0, 0.25, 0.9, 1, -0.5, -3])
    scores = score(Truth([RED] * 6, RED + steps[:, None] * way, np.ones(6, dtype=bool)))
    assert scores["progress"] == pytest.approx(steps.clip(-1))
    assert scores["success_after"].tolist() == [0, 0, 1, 1, 0, 0]
    beside = np.cross(way, [0, 0, 1])
    beside *= np.linalg.norm(way) / np.linalg.norm(beside) / 2
    assert score(Truth([RED], [GREEN + beside], np.array([True])))["progress"] == pytest.approx([0.5])


def test_a_part_that_has_the_colour_already_or_is_too_small_has_no_way_to_go():
    near = GREEN + np.array([3, 0, 0])
    scores = score(Truth([GREEN, near, GONE], [GREEN, GREEN, GREEN], np.ones(3, dtype=bool)))
    assert np.isnan(scores["progress"]).all()
    assert scores["success_before"].tolist() == [1, 1, 0] and scores["success_after"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(("apart", "unit"), [(40.0, 40.0), (3.0, 10.0), (0.0, 10.0)])
def test_leakage_is_in_units_of_natural_differences_of_at_least_ten(apart, unit):
    truth = Truth([RED], [GREEN], np.array([True]), spread=(0.0, apart), skin=20.0)
    colour, shape = metrics.natural_spread(truth)
    assert colour.tolist() == [10, unit] and shape == pytest.approx([0.2, 1 / 3])
    assert score(truth)["leakage"] == pytest.approx([20 / unit / 2]), "and no shape moved"


def test_a_null_edit_has_neither_success_nor_progress():
    truth = Truth([RED], [GREEN], np.array([True]))
    assert set(score(truth, "face")) == {"leakage"}
    assert score(truth, "happy") == {}


def test_clean_is_success_identity_and_leakage_on_the_same_face():
    """Faces 0 to 5: clean, fails, another person, leaks, at both bounds, without the part."""
    n = 6
    cosines = np.array([0.9, 0.9, 0.8, 0.9, metrics.CLEAN_IDENTITY, 0.9])
    has = np.array([True] * 5 + [False])
    # leakage is half of how far the skin's colour moved, in units of 40
    skin = 80 * np.array([0.1, 0.1, 0.1, 0.9, metrics.CLEAN_LEAKAGE, 0.1])
    truth = Truth([RED] * n, [GREEN, RED, GREEN, GREEN, GREEN, GREEN], has, skin=skin)

    def identity(images):
        index = images[:, 0, 0, 0].long()
        cosine = torch.cat([torch.ones(n, dtype=torch.float64), torch.tensor(cosines)])[index]
        return torch.stack([cosine, (1 - cosine.square()).sqrt()], 1)

    domain = SimpleNamespace(truth=truth, source_text="face", identity=identity)
    edit = metrics.Edit(domain, "green lips", truth.pictures(0, n), truth.pictures(n, 2 * n))
    np.testing.assert_array_equal(metrics.clean(edit)["clean"], [1, 0, 0, 0, 1, np.nan])
    domain.identity = None
    assert metrics.clean(edit) == {}, "it cannot be said without an identity network"
