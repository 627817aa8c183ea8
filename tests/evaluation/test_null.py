"""Under the null, resampled a thousand times, gates block and promote at the rates the policy states.

The null is a candidate equal to live: on each record both are right with the same chance, and mostly together, as two
versions of one model are. Whole policies are judged, by the code that judges real candidates.
"""

import numpy as np
import pytest

from evaluation import labels as label_metrics
from evaluation.catalogue import find
from evaluation.judging import judge
from evaluation.measurement import Measurement
from evaluation.metrics import compare
from evaluation.policy import GatePolicy, Rule
from tests.evaluation.planted import asking

REPETITIONS = 1000
# Enough to see that a gate finds what it should: no rate is measured by these.
FEW = 150
DOMAINS = tuple(np.repeat(["account", "billing", "delivery", "returns"], 60))
N = len(DOMAINS)
# As by default, but with no loss allowed, so that only chance decides.
HOLD = {"name": "forgetting", "metric": "accuracy", "slice": "domain", "against": "live", "bound": 0.0, "p_max": 0.05}
BEAT = {"name": "better", "metric": "accuracy", "against": "live", "must": "beat", "p_max": 0.01}


def three_errors(rate):
    """Three standard errors of a share of so many repetitions."""
    return 3 * (rate * (1 - rate) / REPETITIONS) ** 0.5


def pairs(seed, candidate=0.7, live=0.7, anew=0.3, n=N, times=REPETITIONS):
    """Who is right, for candidate and live, so many times."""
    rng = np.random.default_rng(seed)
    for _ in range(times):
        theirs = rng.random(n) < live
        again = rng.random(n) < anew
        yield np.where(again, rng.random(n) < candidate, theirs), theirs


def outcome(policy, title, ours, theirs, metric=None):
    rule = next(rule for rule in policy.rules if rule.title == title)
    return judge(rule, metric or find(rule.metric), policy, ours, theirs).gate.outcome


def shares(policy, title, drawn, make=lambda flags: Measurement.of(flags, DOMAINS[: len(flags)])):
    """How often each outcome."""
    found = [outcome(policy, title, make(ours), make(theirs)) for ours, theirs in drawn]
    return {name: found.count(name) / len(found) for name in ("passed", "failed", "undecided")}


def test_a_candidate_equal_to_live_is_blocked_no_more_often_than_stated():
    policy = asking(HOLD)
    found = shares(policy, "forgetting", pairs(1))
    assert policy.stops_equal_at_most() == 0.05
    assert found["failed"] <= 0.05 + three_errors(0.05)
    assert found["undecided"] == 0


def test_without_holm_the_stated_rate_would_be_broken():
    """The same thousand candidates, each domain judged as if it were alone: this is what the correction is for."""
    blocked = 0
    groups = np.array(DOMAINS)
    for ours, theirs in pairs(1):
        parts = [groups == name for name in sorted(set(DOMAINS))] + [np.ones(N, dtype=bool)]
        ps = [compare(Measurement.of(ours), Measurement.of(theirs), "higher", part).p_worse for part in parts]
        blocked += min(ps) <= 0.05
    assert blocked / REPETITIONS > 0.05 + three_errors(0.05)


def test_a_candidate_that_forgot_a_domain_is_blocked_far_more_often():
    def forgetful():
        for ours, theirs in pairs(2, times=FEW):
            worse = ours.copy()
            worse[:60] &= np.arange(60) % 3 > 0
            yield worse, theirs

    assert shares(asking(HOLD), "forgetting", forgetful())["failed"] > 0.8


def test_a_candidate_equal_to_live_is_promoted_as_better_no_more_often_than_stated():
    policy = asking(BEAT)
    stated = policy.promotes_no_better_at_most()
    assert stated == 0.005
    assert shares(policy, "better", pairs(3))["passed"] <= stated + three_errors(stated)


def test_a_truly_better_candidate_is_promoted_far_more_often():
    assert shares(asking(BEAT), "better", pairs(4, candidate=0.95, anew=0.6, times=FEW))["passed"] > 0.8


def test_a_gain_that_is_seen_and_not_tested_would_be_promoted_half_the_time():
    seen = sum(ours.mean() > theirs.mean() for ours, theirs in pairs(3))
    assert seen / REPETITIONS > 0.3


def test_a_point_better_by_luck_on_fifty_samples_never_passes():
    """Not by the number of samples, and not by the test when the number of samples is set aside."""
    flags = np.zeros(50, dtype=bool)
    flags[:35] = True
    lucky = flags.copy()
    lucky[40] = True  # 36 of 50: two points better
    for samples, expected in ((100, "undecided"), (1, "failed")):
        policy = asking({**BEAT, "samples_min": samples})
        found = judge(policy.rules[0], find("accuracy"), policy, Measurement.of(lucky), Measurement.of(flags)).gate
        assert found.outcome == expected
        assert "+2.0 points against live on 50 records" in found.sentence
    drawn = list(pairs(5, n=50))
    assert shares(GatePolicy((Rule(**BEAT),)), "better", drawn) == {"passed": 0.0, "failed": 0.0, "undecided": 1.0}
    assert shares(asking({**BEAT, "samples_min": 1}), "better", drawn)["passed"] <= 0.005 + three_errors(0.005)


def noisy_scores(seed, shift=0.0, n=N, times=REPETITIONS):
    """Two models' marks between 0 and 1, skewed as overlaps of texts are, alike on most records."""
    rng = np.random.default_rng(seed)
    for _ in range(times):
        theirs = rng.beta(0.4, 0.2, n)
        again = rng.random(n) < 0.5
        yield np.where(again, np.clip(rng.beta(0.4, 0.2, n) - shift, 0, 1), theirs), theirs


@pytest.mark.parametrize("n", [24, 120], ids=["few records", "many records"])
def test_marks_that_are_no_shares_keep_the_rates_too(n):
    """By exchange, at any number of records: 20 in a domain are as exact as a thousand."""
    rule = {**HOLD, "metric": "rouge_l", "slice": "whole", "samples_min": 1}
    beat = {**BEAT, "metric": "rouge_l", "samples_min": 1, "p_max": 0.05}
    policy = asking(rule, beat)
    drawn = list(noisy_scores(6, n=n))
    assert shares(policy, "forgetting", drawn)["failed"] == pytest.approx(0.05, abs=three_errors(0.05))
    assert shares(policy, "better", drawn)["passed"] <= 0.025 + three_errors(0.025)


def test_worse_marks_are_blocked():
    rule = {**HOLD, "metric": "rouge_l"}
    assert shares(asking(rule), "forgetting", noisy_scores(7, shift=0.3, times=FEW))["failed"] > 0.8


def test_macro_f1_keeps_the_rates_too():
    """A statistic that is no mean over records: 200 candidates of it cost what a thousand of a mean do."""
    rng = np.random.default_rng(8)
    policy = asking({**HOLD, "metric": "macro_f1", "slice": "whole"})
    groups = {"domain": DOMAINS[:120]}
    blocked = 0
    for _ in range(REPETITIONS // 5):
        truth = rng.integers(0, 4, 120)
        theirs = np.where(rng.random(120) < 0.6, truth, rng.integers(0, 4, 120))
        redrawn = np.where(rng.random(120) < 0.6, truth, rng.integers(0, 4, 120))
        ours = np.where(rng.random(120) < 0.4, redrawn, theirs)
        made = [label_metrics.macro_f1_of(truth, said, groups) for said in (ours, theirs)]
        blocked += outcome(policy, "forgetting", *made) == "failed"
    assert blocked / 200 <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


def test_a_bound_that_allows_for_chance_errs_no_more_often_than_stated():
    policy = asking({"metric": "accuracy", "bound": 0.7, "p_max": 0.05})
    at_the_bound = shares(policy, "accuracy", pairs(9, candidate=0.7, anew=1.0))
    assert at_the_bound["passed"] <= 0.05 + three_errors(0.05)
    assert at_the_bound["failed"] <= 0.05 + three_errors(0.05)
    assert shares(policy, "accuracy", pairs(10, candidate=0.85, anew=1.0, times=FEW))["passed"] > 0.95
    assert shares(policy, "accuracy", pairs(11, candidate=0.5, anew=1.0, times=FEW))["failed"] > 0.95


def test_rates_of_several_gates_add_up():
    policy = asking(HOLD, {**HOLD, "name": "texts", "metric": "exact_match", "p_max": 0.02}, BEAT)
    assert policy.stops_equal_at_most() == pytest.approx(0.07)
    both = 0
    for (ours, theirs), (more, others) in zip(pairs(12), pairs(13), strict=True):
        found = [
            outcome(policy, title, *(Measurement.of(flags, DOMAINS) for flags in flagged))
            for title, flagged in (("forgetting", (ours, theirs)), ("texts", (more, others)))
        ]
        both += "failed" in found
    assert both / REPETITIONS <= 0.07 + three_errors(0.07)
