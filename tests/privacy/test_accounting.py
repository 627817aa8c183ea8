import math

import numpy as np
import pytest
from hypothesis import given, settings
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
def test_rdp_equals_dp_accounting(q, sigma, steps):
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(list(ORDERS))
    accountant.compose(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), steps)
    assert accounting.rdp(q, sigma, steps, ORDERS) == pytest.approx(list(accountant._rdp), rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("q", [1e-12, 1e-8, 1e-3, 0.25, 0.999, 1.0])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 2.2, 30.0, 1000.0])
def test_rdp_equals_the_sum_taken_in_eighty_digits(q, sigma):
    # Where q is tiny, double precision cannot hold the sum itself, only its distance from one.
    import mpmath as mp

    with mp.workdps(80):
        for order in ORDERS:
            p, s = mp.mpf(q), mp.mpf(sigma)
            terms = (
                mp.binomial(order, k) * (1 - p) ** (order - k) * p**k * mp.exp(mp.mpf(k * (k - 1)) / (2 * s * s))
                for k in range(order + 1)
            )
            exact = mp.log(mp.fsum(terms)) / (order - 1)
            assert accounting.rdp(q, sigma, 1, (order,))[0] == pytest.approx(float(exact), rel=1e-13)


def test_extreme_noise_is_a_number():
    assert accounting.rdp(0.0, 1.0, 5, ORDERS) == (0.0,) * len(ORDERS)
    assert accounting.rdp(0.5, 1e-200, 1, ORDERS) == (math.inf,) * len(ORDERS)
    assert accounting.rdp(0.5, 1e200, 1, ORDERS) == (0.0,) * len(ORDERS)


@pytest.mark.parametrize(("q", "sigma", "steps"), MECHANISMS)
def test_epsilon_equals_opacus(q, sigma, steps):
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

    theirs, order = get_privacy_spent(
        orders=list(ORDERS), rdp=compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=list(ORDERS)), delta=1e-5
    )
    assert accounting.epsilon_from_rdp(accounting.rdp(q, sigma, steps, ORDERS), ORDERS, 1e-5) == (
        pytest.approx(theirs, rel=1e-9),
        order,
    )


@pytest.mark.parametrize(("q", "sigma", "steps"), MECHANISMS)
def test_epsilon_equals_dp_accounting(q, sigma, steps):
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(list(ORDERS))
    step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
    accountant.compose(step, steps)
    epsilon, _ = accounting.epsilon_from_rdp(accounting.rdp(q, sigma, steps, ORDERS), ORDERS, 1e-5)
    assert epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)


def dp_event(q, sigma):
    import dp_accounting

    return dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))


def ours_over(rounds, delta):
    """Our epsilon of a fixed schedule of (q, sigma, steps)."""
    total = np.sum([accounting.rdp(q, sigma, steps, ORDERS) for q, sigma, steps in rounds], axis=0)
    return accounting.epsilon_from_rdp(total.tolist(), ORDERS, delta)[0]


# Schedules of a stream: new once, then replayed at another rate and noise; evaluations of a holdout.
SCHEDULES = [
    [(0.25, 1.0, 30)],
    [(0.01, 0.7, 1000)],
    [(1.0, 2.0, 5)],
    [(0.25, 2.2, 30), *[(0.0625, 2.2, 30)] * 8],
    [(0.5, 3.0, 20), (0.1, 1.3, 50), (0.02, 0.9, 200)],
    [(1.0, 12.0, 1)] * 20,
]


@pytest.mark.parametrize("delta", [1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("rounds", SCHEDULES)
def test_epsilon_is_never_below_dp_accounting_and_at_most_a_hundredth_above(rounds, delta):
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    reference, tight = RdpAccountant(list(ORDERS)), PLDAccountant(value_discretization_interval=1e-3)
    for q, sigma, steps in rounds:
        for accountant in (reference, tight):
            accountant.compose(dp_event(q, sigma), steps)
    ours, theirs = ours_over(rounds, delta), reference.get_epsilon(delta)
    assert theirs * (1 - 1e-9) <= ours <= theirs * 1.01
    # The privacy loss distribution says what is really lost: a bound below it would be wrong.
    assert ours >= tight.get_epsilon(delta)


@pytest.mark.parametrize("wrong", ["half the rate", "half the steps", "a tenth more noise"])
def test_an_accountant_that_charges_too_little_is_below_the_reference(wrong):
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    q, sigma, steps = 0.25, 2.2, 30
    charged = {
        "half the rate": (q / 2, sigma, steps),
        "half the steps": (q, sigma, steps // 2),
        "a tenth more noise": (q, sigma * 1.1, steps),
    }[wrong]
    reference, tight = RdpAccountant(list(ORDERS)), PLDAccountant(value_discretization_interval=1e-3)
    for accountant in (reference, tight):
        accountant.compose(dp_event(q, sigma), steps)
    assert ours_over([charged], 1e-5) < reference.get_epsilon(1e-5) * (1 - 1e-9)
    if wrong.startswith("half"):  # the room between the two is larger than a tenth of the noise
        assert ours_over([charged], 1e-5) < tight.get_epsilon(1e-5)


@pytest.mark.parametrize(("epsilon", "q", "sigma"), [(8.0, 0.25, 2.2), (2.0, 1.0, 15.0), (1.0, 0.05, 3.0)])
def test_a_filled_filter_has_lost_less_than_it_promised(epsilon, q, sigma):
    from dp_accounting.pld import PLDAccountant

    policy = Policy("record", epsilon, 1e-5)
    one = accounting.rdp(q, sigma, 10, ORDERS)
    spent, rounds = (0.0,) * len(ORDERS), 0
    while accounting.fits(spent, one, policy.caps):
        spent, rounds = tuple(s + r for s, r in zip(spent, one, strict=True)), rounds + 1
    tight = PLDAccountant(value_discretization_interval=1e-3)
    tight.compose(dp_event(q, sigma), 10 * rounds)
    assert tight.get_epsilon(1e-5) < epsilon
    assert tight.get_epsilon(1e-5) > 0.5 * epsilon, "and not absurdly less"


def test_prices_are_the_same_alone_and_in_a_crowd():
    """What a filter adds up one by one, an audit adds up from prices computed thousands at a time."""
    rng = np.random.default_rng(5)
    crowd = [(float(q), float(sigma), 7) for q, sigma in rng.uniform((0, 0.3), (1, 20), (2500, 2))]
    crowd += [(0.0, 1.0, 1), (1.0, 1.0, 1), (0.5, 1e-200, 1), (0.5, 1e200, 1), (1e-12, 0.05, 1)]
    grid = (2, 5, 33)  # used nowhere else: nothing is known yet
    together = accounting.vectors(crowd, grid)
    accounting._prices.clear()
    for mechanism, found in zip(crowd, together.tolist(), strict=True):
        assert accounting.rdp(*mechanism, grid) == tuple(found)
    assert accounting.vectors([], grid).shape == (0, 3)


def test_prices_that_are_kept_do_not_grow_for_ever(monkeypatch):
    monkeypatch.setattr(accounting, "PRICES_MAX", 10)
    grid = (2, 7)
    for sigma in range(1, 40):
        assert accounting.rdp(0.5, float(sigma), 1, grid) == accounting.rdp(0.5, float(sigma), 1, grid)
    assert len(accounting._prices[grid].index) <= 11


@given(
    entries=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=60),
    prices=st.lists(st.floats(0, 1e3), min_size=10, max_size=10),
)
def test_sums_over_columns_are_sums_one_after_another(entries, prices):
    table = np.array(prices).reshape(5, 2)
    owner, mechanism = (np.array([entry[n] for entry in entries], np.int64) for n in (0, 1))
    expected = [(0.0, 0.0)] * 4
    for who, what in entries:
        expected[who] = tuple(t + p for t, p in zip(expected[who], table[what].tolist(), strict=True))
    found = accounting.totals(owner, mechanism, table, 4)
    assert found.tolist() == [list(total) for total in expected]


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


ROUND = st.tuples(st.floats(0.0, 1.0), st.floats(0.2, 30.0), st.integers(1, 100))


@settings(max_examples=200, deadline=None)
@given(rounds=st.lists(ROUND, max_size=30), epsilon=st.floats(0.5, 20), delta=st.sampled_from([1e-9, 1e-5, 1e-3]))
def test_the_filter_never_lets_a_block_pass_its_cap(rounds, epsilon, delta):
    policy = Policy("record", epsilon, delta)
    spent, share = (0.0,) * len(policy.orders), 0.0
    for q, sigma, steps in rounds:
        rho = accounting.rdp(q, sigma, steps, policy.orders)
        if not accounting.fits(spent, rho, policy.caps):
            continue
        spent = tuple(s + r for s, r in zip(spent, rho, strict=True))
        # The order that fits has been within its cap in every round before: its own filter admitted the whole history.
        within = [a for a, s, c in zip(policy.orders, spent, policy.caps, strict=True) if c > 0 and s <= c]
        assert within
        at_best = [(s,) for a, s in zip(policy.orders, spent, strict=True) if a == within[0]]
        sealed, _ = accounting.epsilon_from_rdp(at_best[0], within[:1], delta / len(policy.orders))
        assert sealed <= epsilon * (1 + 1e-12)
        assert share <= accounting.share_used(spent, policy.caps) <= 1.0
        share = accounting.share_used(spent, policy.caps)


@pytest.mark.parametrize("steps", [1, 30, 400])
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_a_block_can_be_new_as_often_as_promised_and_is_then_replayed(epsilon, steps):
    policy = Policy("record", epsilon, 1e-5)
    spent = zeros = (0.0,) * len(policy.orders)
    sigma = accounting.calibrate([(0.25, zeros, policy.new_bounds, policy.orders)], steps)
    new, replay = (accounting.rdp(q, sigma, steps, policy.orders) for q in (0.25, 0.025))
    for rho in [new] * policy.attempts + [replay] * 4:
        assert accounting.fits(spent, rho, policy.caps)
        spent = tuple(s + r for s, r in zip(spent, rho, strict=True))


def test_replay_blocks_are_within_what_is_left():
    policy = Policy("record", 8.0, 1e-5)
    zeros = (0.0,) * len(policy.orders)
    spent = accounting.rdp(0.25, 1.6, 30, policy.orders)
    alone = accounting.calibrate([(0.25, zeros, policy.new_bounds, policy.orders)], 30)
    demands = [(0.25, zeros, policy.new_bounds, policy.orders), (0.2, spent, policy.caps, policy.orders)]
    sigma = accounting.calibrate(demands, 30)
    assert sigma >= alone
    assert accounting.fits(spent, accounting.rdp(0.2, sigma, 30, policy.orders), policy.caps)


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
        {"epsilon": "8"},
        {"epsilon": True},
        {"delta": None},
        {"holdout_share": "much"},
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


def test_a_policy_without_privacy_says_so_can_pay_for_nothing_and_the_others_are_written_as_before():
    written = Policy("record", 8.0, 1e-5).frozen(500)
    assert " ".join(written) == (
        "unit epsilon delta orders caps horizon attempts replay_share holdout_share holdout_epsilon "
        "holdout_evaluations nominal_units"
    )
    policy = Policy("record", 8.0, 1e-5, enabled=False)
    frozen = policy.frozen(500)
    assert (frozen["enabled"], set(frozen["caps"]), policy.promise()) == (False, {0.0}, "no privacy: enabled=false")
    assert Policy.from_frozen(frozen) == policy
    assert not accounting.fits((0.0,) * 16, (0.0,) * 16, policy.caps)
    for forged in ({**written, "enabled": True}, {**written, "enabled": False}, {**written, "enabled": 0}):
        with pytest.raises(PolicyError, match=r"enabled|caps"):
            Policy.from_frozen(forged)
    with pytest.raises(PolicyError, match="no account"):
        Policy("record", 8.0, 1e-5, holdout_evaluations=3, enabled=False)
