"""Metrics equal scikit-learn's and scipy's; standard errors and p-values mean what they say."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score

from evaluation.metrics import (
    Paired,
    accuracy,
    holm,
    macro_f1,
    p_different,
    p_worse,
    paired,
    smallest_visible_drop,
)

RNG = np.random.default_rng(11)


def draw(n, labels, share_right):
    truth = RNG.integers(0, labels, n)
    said = np.where(RNG.random(n) < share_right, truth, RNG.integers(0, labels, n))
    return truth, said


@pytest.mark.parametrize(("n", "labels", "share"), [(1, 2, 1.0), (30, 5, 0.2), (300, 15, 0.7), (50, 2, 0.0)])
def test_values_equal_scikit_learn(n, labels, share):
    truth, said = draw(n, labels, share)
    assert accuracy(truth == said).value == pytest.approx(accuracy_score(truth, said))
    expected = f1_score(truth, said, labels=np.unique(truth), average="macro", zero_division=0)
    assert macro_f1(truth, said).value == pytest.approx(expected)


def test_labels_of_other_slices_are_not_averaged_in():
    truth, said = np.array([0, 0, 1, 1]), np.array([0, 7, 1, 1])
    assert macro_f1(truth, said).value == pytest.approx((2 / 3 + 1) / 2)


def test_the_jackknife_equals_leaving_out_each_record():
    truth, said = draw(60, 6, 0.6)
    labels = np.unique(truth)
    left_out = [
        f1_score(np.delete(truth, i), np.delete(said, i), labels=labels, average="macro", zero_division=0)
        for i in range(60)
    ]
    expected = math.sqrt(59 / 60 * np.sum((left_out - np.mean(left_out)) ** 2))
    assert macro_f1(truth, said).se == pytest.approx(expected)


def test_standard_errors_match_the_spread_over_repetitions():
    flags, f1s, gains = [], [], []
    for _ in range(300):
        truth, said = draw(200, 4, 0.6)
        other = np.where(RNG.random(200) < 0.3, said, RNG.integers(0, 4, 200))
        flags.append(accuracy(truth == said))
        f1s.append(macro_f1(truth, said))
        gains.append(paired(truth == said, truth == other).gain)
    for scores in (flags, f1s, gains):
        spread = np.std([score.value for score in scores])
        assert np.mean([score.se for score in scores]) == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (3, 9), (40, 20), (7, 7)])
def test_mcnemar_equals_scipy_on_the_discordant_pairs(wins, losses):
    first = np.array([True] * wins + [False] * losses + [True] * 10 + [False] * 4)
    second = np.array([False] * wins + [True] * losses + [True] * 10 + [False] * 4)
    pair = paired(first, second)
    assert pair == Paired(wins, losses, wins + losses + 14)
    of = wins + losses
    assert p_different(pair) == pytest.approx(binomtest(wins, of).pvalue if of else 1.0)
    assert p_worse(pair) == pytest.approx(binomtest(losses, of, alternative="greater").pvalue if of else 1.0)
    assert pair.gain.value == pytest.approx(first.mean() - second.mean())


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.9, 0.8]) == (1.0, 1.0)
    assert holm([]) == ()


def test_the_smallest_visible_drop_is_just_significant():
    n, tests, p_max = 40, 3, 0.05
    losses = round(smallest_visible_drop(n, tests, p_max) * n)
    assert tests * p_worse(Paired(0, losses, n)) <= p_max < tests * p_worse(Paired(0, losses - 1, n))
