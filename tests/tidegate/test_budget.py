"""What is said to be left is what can really be reserved: simulated rounds against a real ledger."""

from dataclasses import replace
from statistics import median

import pytest

from learner.errors import PlanError
from learner.plan import BlockAccount
from privacy.errors import BudgetExceeded
from privacy.ledger import Charge, Ledger
from privacy.policy import Policy
from tidegate import budget
from tidegate.config import LearnerSettings
from tidegate.errors import RoundRefused, TidegateError
from tidegate.planning import Survey, plan_arguments

STREAM = "desk"
RECORD = Policy("record", 8.0, 1e-5, attempts=3, replay_share=0.25)
USER = replace(RECORD, unit="user")
ARGUMENTS = plan_arguments(LearnerSettings(expected_batch=150, steps=20))
PLAN, ADAPTER = "a" * 64, "b" * 64


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield made
    made.close()


def register(ledger, policy, *names, units=500):
    for name in names:
        ledger.register_block(STREAM, name, policy.frozen(units))


def account(ledger, name):
    return BlockAccount(name, ledger.policy(name).frozen(500), ledger.spent(name))


def surveyed(ledger, new=(), replay=(), tried=(), times=None):
    parts = [tuple(account(ledger, name) for name in names) for names in (new, replay, tried)]
    sha = "c" * 64 if replay else None
    return Survey(STREAM, "0" * 40, sha, 1 if replay else 0, *parts, times or {})


def reserve(ledger, number, charges):
    ledger.reserve(STREAM, f"{STREAM}-r{number:04d}", 1, PLAN, charges)


# -- rounds left -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spent", [0, 3, 9])
def test_a_block_can_be_replayed_in_exactly_so_many_rounds_as_is_said(ledger, spent):
    register(ledger, RECORD, "old")
    charge = Charge("old", 0.05, 1.1, 20)
    for number in range(1, spent + 1):
        reserve(ledger, number, [charge])
    left = budget.rounds_payable(account(ledger, "old"), charge.q, charge.sigma, charge.steps)
    assert 3 < left < 200
    for number in range(spent + 1, spent + left + 1):
        reserve(ledger, number, [charge])
    with pytest.raises(BudgetExceeded):
        reserve(ledger, spent + left + 1, [charge])
    assert budget.rounds_payable(account(ledger, "old"), charge.q, charge.sigma, charge.steps) == 0


@pytest.mark.parametrize("policy", [RECORD, USER, replace(RECORD, attempts=1), replace(RECORD, attempts=4)])
def test_so_many_rounds_can_be_reserved_if_none_is_approved_as_is_said(ledger, policy):
    register(ledger, policy, "n1", "n2")
    said = budget.attempts_left(surveyed(ledger, new=("n1", "n2")), ARGUMENTS)
    assert said == policy.attempts
    for number in range(1, said + 1):
        plan = budget.next_plan(surveyed(ledger, new=("n1", "n2")), ARGUMENTS)
        reserve(ledger, number, plan.charges())
    spent_up = surveyed(ledger, tried=("n1", "n2"), times={"n1": said, "n2": said})
    assert budget.attempts_left(spent_up, ARGUMENTS) == 0
    with pytest.raises(RoundRefused, match=rf"n1 \(new in {said} rounds\).*cannot pay.*privacy.attempts"):
        spent_up.require_new()


def test_a_worn_new_block_leaves_no_round(ledger):
    register(ledger, RECORD, "worn")
    while budget.rounds_payable(account(ledger, "worn"), 0.2, 0.9, 20):
        reserve(ledger, len(ledger.rows()) + 1, [Charge("worn", 0.2, 0.9, 20)])
    worn = surveyed(ledger, new=("worn",), times={"worn": 1})
    # What is left is less than any noise of a useful round can be paid with.
    tight = plan_arguments(LearnerSettings(expected_batch=225, steps=4000))
    assert budget.attempts_left(worn, tight) == 0
    with pytest.raises(PlanError, match=r"blocks worn \(used \d+\.\d%, asked .*over by .*cannot pay.*choose"):
        budget.next_plan(worn, tight)


@pytest.mark.parametrize("policy", [RECORD, USER], ids=["record", "user"])
def test_simulated_rounds_are_those_a_ledger_would_have(ledger, policy):
    """Every simulated figure is that of planning and reserving for real, with the same new blocks each time."""
    register(ledger, policy, "a", "b")
    coming = budget.stand_in_for(policy, 500)
    simulated = budget.simulate(surveyed(ledger, new=("a", "b")), ARGUMENTS, 5, (coming, coming))
    known, new = [], ["a", "b"]
    for number, said in enumerate(simulated, start=1):
        plan = budget.next_plan(surveyed(ledger, new=new, replay=known), ARGUMENTS)
        assert (said.sigma, said.q_new, said.left_out) == (plan.sigma, plan.blocks[0].q, plan.left_out)
        reserve(ledger, number, plan.charges())
        known += new
        shares = [ledger.share_used(name) for name in known]
        assert (said.share_median, said.share_max) == (median(shares), max(shares))
        new = [f"(round {number + 1}, block {i})" for i in (1, 2)]
        register(ledger, policy, *new)
    assert len(simulated) >= (5 if policy.unit == "record" else 1)


def test_blocks_that_cannot_pay_the_replay_say_what_is_missing(ledger):
    register(ledger, RECORD, "full", "old", "new")
    for charge in (Charge("full", 0.2, 0.9, 20), Charge("full", 0.02, 0.9, 20)):
        for _ in range(budget.rounds_payable(account(ledger, "full"), charge.q, charge.sigma, charge.steps)):
            reserve(ledger, len(ledger.rows()) + 1, [charge])
    found = surveyed(ledger, new=("new",), replay=("full", "old"))
    plan = budget.next_plan(found, ARGUMENTS)
    rows = {row.block: row for row in budget.blocks_of(found, plan, ARGUMENTS)}
    assert [rows[name].use for name in ("new", "old", "full")] == ["new", "replay", "left out"]
    assert rows["full"].missing > 0
    assert rows["full"].rounds_left == 0
    assert rows["old"].rounds_left > 2
    assert (rows["new"].times_left, rows["old"].times_left) == (3, None)
    reserve(ledger, 900, plan.charges())
    assert rows["new"].share_after == pytest.approx(ledger.share_used("new"))
    rate = budget.replay_rate(plan, ARGUMENTS)
    with pytest.raises(BudgetExceeded, match="full"):
        reserve(ledger, 901, [Charge("full", rate, plan.sigma, plan.steps)])


# -- calibration -------------------------------------------------------------------------------------------------------


def test_a_target_sigma_is_met_by_the_largest_whole_batch(ledger):
    register(ledger, RECORD, "n")
    found = surveyed(ledger, new=("n",))
    for target in (1.0, 1.7, 2.5):
        plan = budget.batch_for(found, ARGUMENTS, sigma=target)
        batch = round(plan.expected_batch)
        assert plan.sigma <= target
        assert plan.expected_batch == pytest.approx(batch)
        more = budget.next_plan(found, budget.replace_batch(ARGUMENTS, batch + 1))
        assert more.sigma > target or batch == 225
        # Rounded the safe way: the very charges fit the allowance.
        reserve(ledger, round(target * 10), plan.charges()) if target == 2.5 else None


def test_a_target_noise_is_met_by_the_smallest_batch(ledger):
    register(ledger, RECORD, "n")
    found = surveyed(ledger, new=("n",))
    weights = 10_000
    plan = budget.batch_for(found, ARGUMENTS, noise=0.5, weights=weights)
    assert budget.noise_to_signal(plan, weights)[1] <= 0.5
    fewer = budget.next_plan(found, budget.replace_batch(ARGUMENTS, round(plan.expected_batch) - 1))
    assert budget.noise_to_signal(fewer, weights)[1] > 0.5


@pytest.mark.parametrize("target", [{"sigma": 0.05}, {"noise": 1e-6, "weights": 10_000}])
def test_a_target_out_of_reach_names_the_nearest(ledger, target):
    register(ledger, RECORD, "n")
    with pytest.raises(TidegateError, match=r"target .*must be >= \d"):
        budget.batch_for(surveyed(ledger, new=("n",)), ARGUMENTS, **target)


def test_noise_to_signal_is_the_formula_in_the_docs(ledger):
    register(ledger, RECORD, "n")
    plan = budget.next_plan(surveyed(ledger, new=("n",)), ARGUMENTS)
    step, whole = budget.noise_to_signal(plan, 400)
    assert step == pytest.approx(plan.sigma * 20 / plan.expected_batch)
    assert whole == pytest.approx(step / 20**0.5)


# -- alarms ------------------------------------------------------------------------------------------------------------


def assessed(ledger, *names, holdouts=None, policy=RECORD):
    return budget.assess(
        surveyed(ledger, replay=names), ARGUMENTS, budget.stand_in_for(policy, 500), policy, holdouts or {}
    )


def test_a_fresh_stream_raises_no_alarm(ledger):
    register(ledger, RECORD, "a", "b")
    found = assessed(ledger, "a", "b")
    assert found.alarms == ()
    assert found.blocks_retired == ()
    assert found.rounds_left > 10
    assert found.promise == "epsilon 8, delta 1e-05 per record, for life"


def test_alarms_rise_at_four_fifths_and_below_two_rounds_of_the_median_block(ledger):
    register(ledger, RECORD, "a", "b", "c")
    plan = budget.next_plan(surveyed(ledger, replay=("a", "b", "c")), ARGUMENTS, budget.stand_in_for(RECORD, 500))
    charge = Charge("", budget.replay_rate(plan, ARGUMENTS), plan.sigma, plan.steps)
    number, seen = 0, []
    while not (found := assessed(ledger, "a", "b", "c")).blocks_retired:
        number += 1
        reserve(ledger, number, [replace(charge, block_id=name) for name in ("a", "b")])
        seen.append(found)
    # Two of three are as worn as each other, so the median is theirs and not the fresh one's.
    for one in seen:
        assert any("median block's filter" in alarm for alarm in one.alarms) is (one.share_used_median >= 0.8)
        assert any("more rounds at this pace" in alarm for alarm in one.alarms) is (one.rounds_left < 2)
    assert [one.share_used_median for one in seen] == sorted(one.share_used_median for one in seen)
    assert set(found.blocks_retired) == {"a", "b"}
    assert found.rounds_left == 0
    assert len(found.alarms) == 2


def test_a_horizon_of_windows_is_told_in_the_promise(ledger):
    window = replace(RECORD, horizon="30d")
    register(ledger, window, "a")
    assert "per window of 30 days" in assessed(ledger, "a", policy=window).promise


def test_evaluations_left_of_the_holdout(ledger):
    policy = replace(RECORD, holdout_evaluations=3)
    register(ledger, policy, "a")
    sigma = budget.evaluation_sigma(policy)
    for made in range(4):
        found = assessed(ledger, "a", holdouts={"a": ledger.spent("a", account="holdout")}, policy=policy)
        assert found.holdout_evaluations_left == 3 - made
        assert any("private evaluations" in alarm for alarm in found.alarms) is (made > 1)
        if made < 3:
            ledger.reserve(STREAM, f"e{made}", 1, PLAN, [Charge("a", 1.0, sigma, 1)], account="holdout")
    with pytest.raises(BudgetExceeded):
        ledger.reserve(STREAM, "e9", 1, PLAN, [Charge("a", 1.0, sigma, 1)], account="holdout")
