"""Noisy counts: their noise is what is stated, one unit moves them by at most one, and their price is what is paid."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import kstest

from privacy import accounting
from privacy.counts import CountsMechanism, affordable, calibrate_releases
from privacy.errors import PolicyError
from privacy.policy import Policy
from privacy.randomness import KeyedStream, TestKey

SIGMA = 3.0
MECHANISM = CountsMechanism(4, SIGMA)
RECORDS = ({0: 1.0}, {1: 1.0}, {2: 1.0}, {3: 1.0})


def released(units, seed, mechanism=MECHANISM):
    return mechanism.release(units, KeyedStream(TestKey(seed), {"evaluation": "e"}, 0))


@pytest.fixture(scope="module")
def noise():
    exact = np.array([2.0, 1.0, 0.0, 0.0])
    return np.concatenate([released([{0: 1.0}, {0: 1.0}, {1: 1.0}], seed) - exact for seed in range(1000)])


@pytest.mark.parametrize(("factor", "accepted"), [(1.0, True), (2 / 3, False), (3 / 2, False)])
def test_the_noise_is_gaussian_of_the_stated_sigma_and_of_no_other(noise, factor, accepted):
    p = kstest(noise / (factor * SIGMA), "norm").pvalue
    assert bool(p > 0.01) is accepted


def test_noise_of_different_entries_is_independent(noise):
    correlation = np.corrcoef(noise.reshape(-1, MECHANISM.size).T)
    assert np.abs(correlation - np.eye(MECHANISM.size)).max() < 4 / math.sqrt(1000)


def neighbours(universe, most):
    """Every data set of up to `most` units with every one of its neighbours that lacks one unit."""
    for size in range(1, most + 1):
        for units in itertools.combinations_with_replacement(universe, size):
            for gone in range(size):
                yield units, units[:gone] + units[gone + 1 :]


@pytest.mark.parametrize(
    "universe",
    [
        RECORDS,
        # Users: some far over the bound, some far under, some that try to break it.
        (
            {0: 7.0, 1: 3.0},
            {0: 0.5, 3: 0.5},
            {2: 1e300, 3: 1e300},
            {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0},
            {1: math.nan, 2: 1.0},
            {3: -math.inf},
            {0: -9.0},
        ),
    ],
    ids=["records", "users"],
)
def test_a_unit_more_or_less_moves_the_sum_by_at_most_one(universe):
    seen = 0.0
    for units, without in neighbours(universe, 3):
        # The same key for both: the noise is equal, and what is left is what the unit adds.
        moved = released(units, 1) - released(without, 1)
        seen = max(seen, float(np.linalg.norm(moved)))
    assert seen <= 1.0 + 1e-9
    assert seen > 0.99, "the bound is reached, so a smaller one would be wrong"


def test_without_the_clip_the_bound_would_break():
    heavy = {0: 7.0, 1: 3.0}
    assert np.linalg.norm([heavy[0], heavy[1]]) > 7
    assert np.linalg.norm(MECHANISM.clipped(heavy)) <= 1.0


def test_the_order_of_units_is_invisible():
    units = [{0: 1 / k, 1: 1 / (k + 2)} for k in range(1, 50)]
    assert np.array_equal(released(units, 3), released(units[::-1], 3))


def test_a_position_outside_the_vector_is_an_error():
    with pytest.raises(IndexError, match="position=4"):
        MECHANISM.clipped({4: 1.0})


@pytest.mark.parametrize("releases", [1, 7, 50])
@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
def test_so_many_releases_fit_and_one_more_does_not(epsilon, releases):
    policy = Policy("record", epsilon, 1e-6)
    sigma = calibrate_releases([(policy.orders, policy.caps)], releases)
    assert affordable(sigma, policy.orders, policy.caps, releases + 1) == releases
    assert affordable(round(sigma - 0.001, 3), policy.orders, policy.caps, releases) < releases, "no noise is wasted"


def test_the_price_is_that_of_one_gaussian_at_rate_one():
    (paid,) = MECHANISM.charges(["b1"])
    assert (paid.block_id, paid.q, paid.sigma, paid.steps) == ("b1", 1.0, SIGMA, 1)
    assert accounting.rdp(paid.q, paid.sigma, paid.steps, (2, 8)) == pytest.approx((2 / 18, 8 / 18))


def test_the_strictest_block_decides_the_noise():
    loose, strict = Policy("record", 8.0, 1e-6), Policy("record", 1.0, 1e-6)
    both = calibrate_releases([(p.orders, p.caps) for p in (loose, strict)], 5)
    assert both == calibrate_releases([(strict.orders, strict.caps)], 5)


@pytest.mark.parametrize(("grids", "releases"), [([], 1), ([((2,), (1.0,))], 0), ([((2,), (1e-12,))], 1000)])
def test_what_cannot_be_calibrated_is_refused(grids, releases):
    with pytest.raises(PolicyError):
        calibrate_releases(grids, releases)


@pytest.mark.parametrize(("size", "sigma"), [(0, 1.0), (True, 1.0), (3, 0.0), (3, math.inf)])
def test_a_mechanism_that_is_none_is_refused(size, sigma):
    with pytest.raises(PolicyError):
        CountsMechanism(size, sigma)
