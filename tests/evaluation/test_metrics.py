"""Values equal scikit-learn's, tests equal statsmodels'; standard errors and p-values mean what they say."""

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test
from sklearn.metrics import accuracy_score, f1_score, recall_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from evaluation import labels as label_metrics
from evaluation.measurement import Measurement
from evaluation.metrics import (
    Paired,
    compare,
    holm,
    p_different,
    p_worse,
    paired,
    score,
    smallest_visible_drop,
    smallest_visible_gain,
)

RNG = np.random.default_rng(11)
STATISTICS = {
    "macro_f1": (label_metrics._macro_f1, lambda t, s: f1_score(t, s, labels=np.unique(t), average="macro")),
    "weighted_f1": (label_metrics._weighted_f1, lambda t, s: f1_score(t, s, average="weighted")),
    "recall": (label_metrics._macro_recall, lambda t, s: recall_score(t, s, labels=np.unique(t), average="macro")),
}
POINTS = {
    "macro_f1": label_metrics._by_scikit("f1_score", "macro"),
    "weighted_f1": label_metrics._by_scikit("f1_score", "weighted"),
    "recall": label_metrics._by_scikit("recall_score", "macro"),
}


def draw(n, labels, share_right, rng=RNG):
    truth = rng.integers(0, labels, n)
    said = np.where(rng.random(n) < share_right, truth, rng.integers(0, labels, n))
    return truth, said


def measured(name, truth, said):
    return Measurement(np.stack([truth, said], axis=1).astype(float), STATISTICS[name][0], point=POINTS[name])


@pytest.mark.parametrize(("n", "labels", "share"), [(1, 2, 1.0), (30, 5, 0.2), (300, 15, 0.7), (50, 2, 0.0)])
def test_accuracy_equals_scikit_learn_to_the_last_digit(n, labels, share):
    truth, said = draw(n, labels, share)
    assert score(Measurement.of(truth == said)).value == accuracy_score(truth, said)


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_f1_and_recall_equal_scikit_learn_to_the_last_digit_and_so_do_their_resamples(name):
    statistic, oracle = STATISTICS[name]
    for n, labels, share in [(1, 2, 1.0), (30, 5, 0.2), (300, 15, 0.7), (50, 2, 0.0), (480, 12, 0.9)] * 4:
        truth, said = draw(n, labels, share)
        one = measured(name, truth, said)
        assert score(one).value == oracle(truth, said)
        drawn = RNG.integers(0, n, n)
        weights = np.bincount(drawn, minlength=n)[None, :].astype(float)
        assert statistic(weights, one.rows)[0] == pytest.approx(oracle(truth[drawn], said[drawn]), abs=1e-12)


def test_by_label_recall_is_scikit_learns_of_each():
    truth, said = draw(400, 6, 0.6)
    each = recall_score(truth, said, average=None)
    one = measured("recall", truth, said)
    assert [score(one, truth == label).value for label in range(6)] == each.tolist()


def test_labels_of_other_slices_are_not_averaged_in():
    truth, said = np.array([0, 0, 1, 1]), np.array([0, 7, 1, 1])
    assert score(measured("macro_f1", truth, said)).value == pytest.approx((2 / 3 + 1) / 2)


def test_standard_errors_match_the_spread_over_repetitions():
    shares, f1s, gains, means = [], [], [], []
    for _ in range(200):
        truth, said = draw(200, 4, 0.6)
        other = np.where(RNG.random(200) < 0.3, said, RNG.integers(0, 4, 200))
        shares.append(score(Measurement.of(truth == said)))
        f1s.append(score(measured("macro_f1", truth, said)))
        gains.append(compare(Measurement.of(truth == said), Measurement.of(truth == other), "higher").gain)
        means.append(score(Measurement.of(RNG.exponential(size=200))))
    for scores in (shares, f1s, gains, means):
        spread = np.std([one.value for one in scores])
        assert np.mean([one.se for one in scores]) == pytest.approx(spread, rel=0.2)


def test_a_measurement_always_gets_the_same_error():
    truth, said = draw(90, 4, 0.6)
    assert score(measured("macro_f1", truth, said)) == score(measured("macro_f1", truth, said))


@pytest.mark.parametrize("losses", range(0, 41, 3))
def test_mcnemar_equals_statsmodels_to_the_last_digit(losses):
    for wins in range(41):
        table = [[7, wins], [losses, 5]]
        expected = float(mcnemar(table, exact=True).pvalue)
        assert p_different(Paired(wins, losses, wins + losses + 12)) == expected


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (3, 9), (40, 20), (7, 7)])
def test_one_sided_it_equals_scipys_test_of_the_discordant_pairs(wins, losses):
    first = np.array([True] * wins + [False] * losses + [True] * 10 + [False] * 4)
    second = np.array([False] * wins + [True] * losses + [True] * 10 + [False] * 4)
    pair = paired(first, second)
    assert pair == Paired(wins, losses, wins + losses + 14)
    of = wins + losses
    assert p_worse(pair) == pytest.approx(binomtest(losses, of, alternative="greater").pvalue if of else 1.0)
    assert pair.gain.value == pytest.approx(first.mean() - second.mean())


def test_shares_are_compared_by_mcnemar_also_where_less_is_better():
    first, second = np.array([1, 1, 1, 0, 0, 0, 0, 0]), np.array([1, 0, 0, 0, 0, 0, 0, 0])
    more = compare(Measurement.of(first), Measurement.of(second), "higher")
    less = compare(Measurement.of(first), Measurement.of(second), "lower")
    assert more.test == less.test == "mcnemar-exact/1"
    assert (more.gain.value, less.gain.value) == (0.25, -0.25)
    assert more.p_worse == p_worse(Paired(2, 0, 8)) == 1.0
    assert less.p_worse == p_worse(Paired(0, 2, 8)) == 0.25


def test_the_exchange_equals_scipys_exhaustive_one_on_means():
    first, second = RNG.normal(0.4, 1, 12), RNG.normal(0, 1, 12)
    found = compare(Measurement.of(first), Measurement.of(second), "higher")
    for p, alternative in ((found.p_worse, "less"), (found.p_different, "two-sided")):
        exact = permutation_test(
            (first, second),
            lambda a, b, axis: (a - b).mean(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=np.inf,
            alternative=alternative,
        ).pvalue
        assert p == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 1999) ** 0.5 + 1e-3)


def test_a_mean_is_compared_as_any_statistic_is():
    first, second = RNG.normal(0.1, 1, 60), RNG.normal(0, 1, 60)
    by_mean = compare(Measurement.of(first), Measurement.of(second), "higher")

    def own_mean(weights, rows):
        return weights @ rows[:, 0] / weights.sum(axis=1)

    pairs = [Measurement(values[:, None], own_mean) for values in (first, second)]
    general = compare(*pairs, "higher")
    assert general.p_worse == by_mean.p_worse
    assert general.p_different == by_mean.p_different
    assert general.gain.value == pytest.approx(by_mean.gain.value)
    assert general.gain.se == pytest.approx(by_mean.gain.se, rel=0.1)


def test_equal_models_are_not_different_at_all():
    same = Measurement.of(RNG.normal(size=40))
    found = compare(same, same, "higher")
    assert (found.gain.value, found.p_different, found.p_worse) == (0.0, 1.0, 1.0)


def test_holm_equals_statsmodels():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    for size in (1, 3, 9):
        ps = RNG.random(size).tolist()
        assert holm(ps) == pytest.approx(multipletests(ps, method="holm")[1])
    assert holm([]) == ()


def test_the_smallest_visible_drop_and_gain_are_just_significant():
    n, tests, p_max = 40, 3, 0.05
    losses = round(smallest_visible_drop(n, tests, p_max) * n)
    assert tests * p_worse(Paired(0, losses, n)) <= p_max < tests * p_worse(Paired(0, losses - 1, n))
    wins = round(smallest_visible_gain(n, p_max) * n)
    assert p_different(Paired(wins, 0, n)) <= p_max < p_different(Paired(wins - 1, 0, n))
