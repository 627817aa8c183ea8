import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy import accounting
from privacy.accounting import ORDERS
from privacy.errors import PolicyError
from privacy.policy import Policy

# opacus imports torch's deprecated parts; the oracle's own warnings are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

MECHANISMS = [(0.25, 1.0, 30), (0.01, 0.7, 1000), (0.5, 3.0, 20), (1e-4, 0.5, 10), (1.0, 2.0, 5), (0.9, 12.0, 400)]


@pytest.mark.parametrize(("q", "sigma", "steps"), MECHANISMS)
def test_rdp_equals_opacus(q, sigma, steps):
    from opacus.accountants.analysis.rdp import compute_rdp

    theirs = compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=list(ORDERS))
    assert accounting.rdp(q, sigma, steps, ORDERS) == pytest.approx(list(theirs), rel=1e-9, abs=1e-13)


@pytest.mark.parametrize(("q", "sigma", "steps"), MECHANISMS)
def test_epsilon_equals_dp_accounting(q, sigma, steps):
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(list(ORDERS))
    step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
    accountant.compose(step, steps)
    epsilon, _ = accounting.epsilon_from_rdp(accounting.rdp(q, sigma, steps, ORDERS), ORDERS, 1e-5)
    assert epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)


def test_each_cap_converts_back_to_epsilon_at_its_share_of_delta():
    policy = Policy("record", 8.0, 1e-5)
    for order, cap in zip(policy.orders, policy.caps, strict=True):
        if cap > 0:
            epsilon, _ = accounting.epsilon_from_rdp((cap,), (order,), 1e-5 / len(policy.orders))
            assert epsilon == pytest.approx(8.0, rel=1e-12)


@given(q=st.floats(0.001, 1), sigma=st.floats(0.3, 20), steps=st.integers(1, 200))
def test_more_noise_never_costs_more(q, sigma, steps):
    less = accounting.rdp(q, sigma * 1.1, steps, ORDERS)
    more = accounting.rdp(q, sigma, steps, ORDERS)
    assert all(0 <= a <= b for a, b in zip(less, more, strict=True))


def test_calibrated_sigma_is_enough_and_a_thousandth_less_is_not():
    policy = Policy("record", 8.0, 1e-5)
    zeros = (0.0,) * len(policy.orders)
    sigma = accounting.calibrate([(0.25, zeros, policy.new_bounds, policy.orders)], 30)
    assert accounting.fits(zeros, accounting.rdp(0.25, sigma, 30, policy.orders), policy.new_bounds)
    assert not accounting.fits(zeros, accounting.rdp(0.25, sigma - 0.001, 30, policy.orders), policy.new_bounds)


def test_nothing_is_calibrated_for_a_full_block():
    policy = Policy("record", 1.0, 1e-5)
    assert accounting.calibrate([(0.25, policy.caps, policy.caps, policy.orders)], 30) is None


@pytest.mark.parametrize(
    ("q", "sigma", "steps"),
    [(-0.1, 1, 1), (1.1, 1, 1), (math.nan, 1, 1), (0.5, 0, 1), (0.5, math.inf, 1), (0.5, math.nan, 1), (0.5, 1, 0)],
)
def test_impossible_mechanisms_are_refused(q, sigma, steps):
    with pytest.raises(PolicyError, match="must be"):
        accounting.rdp(q, sigma, steps, ORDERS)


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.0},
        {"epsilon": math.inf},
        {"delta": 0.0},
        {"delta": 1.0},
        {"attempts": 0},
        {"replay_share": 1.0},
        {"orders": (3, 2)},
        {"orders": tuple(range(2, 30))},
        {"unit": "household"},
        {"epsilon": 0.01, "orders": (2,)},
    ],
)
def test_impossible_policies_are_refused(change):
    with pytest.raises(PolicyError):
        Policy(**{"unit": "record", "epsilon": 8.0, "delta": 1e-5, **change})


def test_a_frozen_policy_comes_back_and_forged_caps_are_refused():
    policy = Policy("user", 4.0, 1e-6, attempts=2)
    frozen = policy.frozen(500)
    assert Policy.from_frozen(frozen) == policy
    frozen["caps"][5] *= 2
    with pytest.raises(PolicyError, match="caps"):
        Policy.from_frozen(frozen)
