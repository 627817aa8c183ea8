"""Planted candidates get the verdict they deserve."""

from dataclasses import replace

import numpy as np
import pytest

from evaluation.gates import evaluate
from evaluation.policy import GatePolicy
from tests.evaluation.planted import FACTS, Planted, changed, without, write_gate_set

POLICY = GatePolicy()
BASE = {"": 0.2}
LIVE = {"": 0.7}


@pytest.fixture(scope="module")
def gate_set(tmp_path_factory):
    return write_gate_set(tmp_path_factory.mktemp("gates") / "planted.jsonl")


def judge(gate_set, candidate, live=LIVE, *, policy=POLICY, facts=FACTS, scorer=Planted, base=BASE):
    skills = {"candidate": candidate, None: base} | ({"live": live} if live else {})
    made = scorer(gate_set, skills)
    return evaluate(gate_set, policy, made, candidate="candidate", live="live" if live else None, facts=facts)


def gate(evaluation, name):
    return next(gate for gate in evaluation.gates if gate.name == name)


def test_equal_to_live_passes_and_is_no_better(gate_set):
    evaluation = judge(gate_set, LIVE)
    assert evaluation.outcome == "passed"
    assert gate(evaluation, "better_than_live").outcome == "failed"
    assert not gate(evaluation, "better_than_live").hard
    assert gate(evaluation, "forgetting").value == 0


def test_truly_better_passes_with_its_gain(gate_set):
    evaluation = judge(gate_set, {"": 0.9})
    assert evaluation.outcome == "passed"
    better = gate(evaluation, "better_than_live")
    assert better.outcome == "passed"
    assert better.value == pytest.approx(20)
    assert gate(evaluation, "accuracy").value == pytest.approx(0.9)
    assert gate(evaluation, "format").value > 0.7
    assert "+70.0 points against the base on 300 records (p < 1e-" in evaluation.reasons[0]


def test_forgetting_one_domain_fails_and_names_it(gate_set):
    evaluation = judge(gate_set, {"": 0.95, "billing": 0.4})
    assert evaluation.outcome == "failed"
    assert len(evaluation.reasons) == 1
    assert "forgets against live: billing" in evaluation.reasons[0]
    assert "delivery" not in evaluation.reasons[0]
    assert gate(evaluation, "forgetting").value > 20


def test_a_little_worse_everywhere_fails_on_all_records(gate_set):
    evaluation = judge(gate_set, {"": 0.65})
    assert evaluation.outcome == "failed"
    assert "all records -5.0 points" in evaluation.reasons[0]


def test_a_sure_but_allowed_loss_passes(gate_set):
    allowing = changed(POLICY, "forgetting", bound=0.15)
    assert judge(gate_set, {"": 0.65}, policy=allowing).outcome == "passed"


def test_no_better_than_the_base_fails(gate_set):
    evaluation = judge(gate_set, BASE, live=None)
    assert evaluation.outcome == "failed"
    assert "against the base" in evaluation.reasons[0]


def test_under_the_least_accuracy_fails(gate_set):
    evaluation = judge(gate_set, {"": 0.75}, policy=changed(POLICY, "accuracy", bound=0.8))
    assert evaluation.outcome == "failed"
    assert "accuracy is 0.750 on 300 records, must be >= 0.800" in evaluation.reasons


def test_a_set_that_chose_among_the_weights_is_told(gate_set):
    facts = replace(FACTS, chosen_on="d" * 64)
    told = [line for line in judge(gate_set, {"": 0.9}, facts=facts).not_measured if "early stopping" in line]
    assert len(told) == 1
    assert "d" * 12 in told[0]
    assert not [line for line in judge(gate_set, {"": 0.9}).not_measured if "early stopping" in line]


def test_without_live_forgetting_is_not_measured_and_said_so(gate_set):
    evaluation = judge(gate_set, {"": 0.9}, live=None)
    assert evaluation.outcome == "passed"
    assert not [g for g in evaluation.gates if g.name in {"forgetting", "better_than_live"}]
    assert any("nothing is live yet" in line for line in evaluation.not_measured)


@pytest.mark.parametrize("skill", [0.2, 0.9])
def test_too_few_records_is_undecided_however_good_or_bad(tmp_path, skill):
    evaluation = judge(write_gate_set(tmp_path / "few.jsonl", per_domain=10), {"": skill})
    assert evaluation.outcome == "undecided"
    assert any("100 are needed" in reason for reason in evaluation.reasons)
    assert any("account has 10 records, needs 20" in reason for reason in evaluation.reasons)


def test_one_small_domain_is_undecided_unless_another_is_lost(tmp_path):
    small = write_gate_set(tmp_path / "small.jsonl", per_domain=60)
    policy = replace(POLICY, samples_per_domain_min=61)
    assert judge(small, {"": 0.9}, policy=policy).outcome == "undecided"
    assert judge(small, {"": 0.3}, policy=policy).outcome == "failed"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_fail(gate_set, value):
    class Broken(Planted):
        def score_labels(self, adapter, prompts, labels):
            scores = super().score_labels(adapter, prompts, labels)
            if adapter == "candidate":
                scores[7, 3] = value
            return scores

    evaluation = judge(gate_set, {"": 0.9}, scorer=Broken)
    assert evaluation.outcome == "failed"
    assert "the candidate is broken: 1 of 2700 scores are NaN or infinite" in evaluation.reasons
    assert gate(evaluation, "scores_finite").value == 1


@pytest.mark.parametrize("broken", ["candidate", "live", None])
@pytest.mark.parametrize("how", ["raises", "wrong shape", "NaN"])
def test_a_scorer_that_breaks_never_passes(gate_set, broken, how):
    class Breaking(Planted):
        def score_labels(self, adapter, prompts, labels):
            scores = super().score_labels(adapter, prompts, labels)
            if adapter != broken:
                return scores
            if how == "raises":
                raise RuntimeError("engine gone\nwith a long trace")
            return scores[1:] if how == "wrong shape" else scores * np.nan

    evaluation = judge(gate_set, {"": 0.9}, scorer=Breaking)
    failed = broken == "candidate" and how == "NaN"
    assert evaluation.outcome == ("failed" if failed else "undecided")
    words = {"raises": "RuntimeError: engine gone)", "wrong shape": "must be (300, 9)", "NaN": "NaN or infinite"}[how]
    assert any(words in reason for reason in evaluation.reasons)


@pytest.mark.parametrize("how", ["raises", "too few"])
def test_a_generator_that_breaks_never_passes(gate_set, how):
    class Mute(Planted):
        def generate(self, _adapter, _prompts, _max_tokens):
            if how == "raises":
                raise TimeoutError
            return []

    evaluation = judge(gate_set, {"": 0.9}, scorer=Mute)
    assert evaluation.outcome == "undecided"
    assert judge(gate_set, {"": 0.9}, scorer=Mute, policy=without(POLICY, "format")).outcome == "passed"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_abs_delta": 0.0}, "changed no weight"),
        ({"max_abs_delta": float("nan")}, "is nan"),
        ({"max_abs_delta": float("inf")}, "is inf"),
        ({"budget_kept": False, "share_used": 1.2}, "over its cap"),
    ],
)
def test_facts_can_fail_a_good_candidate_also_when_nothing_else_is_known(gate_set, change, reason):
    class Silent(Planted):
        def score_labels(self, _adapter, _prompts, _labels):
            raise RuntimeError("engine gone")

    for scorer in (Planted, Silent):
        evaluation = judge(gate_set, {"": 0.9}, facts=replace(FACTS, **change), scorer=scorer)
        assert evaluation.outcome == "failed"
        assert reason in evaluation.reasons[0]


def test_what_cannot_be_seen_is_said(gate_set):
    evaluation = judge(gate_set, {"": 0.9})
    blind = next(line for line in evaluation.not_measured if "small drops" in line)
    assert "account under 7.0" in blind
    assert "all records" not in blind


def test_progress_is_told(gate_set):
    told = []
    scorer = Planted(gate_set, {"candidate": LIVE, None: BASE})
    evaluate(
        gate_set, POLICY, scorer, candidate="candidate", live=None, facts=FACTS, progress=lambda *a: told.append(a)
    )
    assert [done for done, _, _ in told] == list(range(5))
    assert {total for _, total, _ in told} == {4}
    assert [what for _, _, what in told][:2] == ["accuracy of the candidate", "accuracy of the base"]
