"""A policy is what its list says: what cannot be asked is refused, what cannot be measured is never a pass."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from evaluation.catalogue import BUILT_IN, COSTS, find
from evaluation.errors import PolicyError
from evaluation.explain import explain, summary
from evaluation.gates import check, evaluate
from evaluation.judging import judge
from evaluation.measurement import Measurement
from evaluation.policy import DEFAULT, GatePolicy, Rule
from tests.evaluation.planted import FACTS, Planted, asking, write_gate_set

OWN = "tests.evaluation.own_metrics"
FLOOR = {"metric": "accuracy", "bound": 0.5}


@pytest.fixture(scope="module")
def gate_set(tmp_path_factory):
    return write_gate_set(tmp_path_factory.mktemp("gates") / "planted.jsonl")


class Counting(Planted):
    def __init__(self, gate_set, skills):
        super().__init__(gate_set, skills)
        self.calls = []

    def score_labels(self, adapter, prompts, labels):
        self.calls.append(("scores", adapter, len(prompts)))
        return super().score_labels(adapter, prompts, labels)

    def generate(self, adapter, prompts, max_tokens):
        self.calls.append(("answers", adapter, len(prompts)))
        return super().generate(adapter, prompts, max_tokens)


def judged(gate_set, policy, candidate=0.9, live=0.7, scorer=Counting, facts=FACTS, **options):
    made = scorer(gate_set, {"candidate": {"": candidate}, "live": {"": live}, None: {"": 0.2}})
    found = evaluate(
        gate_set,
        policy,
        made,
        candidate="candidate",
        live="live" if live is not None else None,
        facts=facts,
        **options,
    )
    return found, made


def gate(evaluation, name):
    return next(one for one in evaluation.gates if one.name == name)


# -- what can be asked -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"metric": "accuracy"}, "needs a bound"),
        ({"metric": "accuracy", "must": "beat"}, "reach goes with absolute"),
        ({"metric": "accuracy", "against": "live", "must": "reach", "bound": 0.1}, "reach goes with absolute"),
        ({"metric": "accuracy", "against": "live", "bound": -0.1}, "must be >= 0"),
        ({"metric": "accuracy", "bound": float("nan")}, "finite"),
        ({"metric": "accuracy", "bound": 0.1, "p_max": 0.0}, "greater than 0"),
        ({"metric": "accuracy", "bound": 0.1, "samples_min": 0}, "greater than or equal to 1"),
        ({"metric": "accuracy", "bound": 0.1, "colour": "red"}, "Extra inputs"),
        ({"metric": "macro_f1", "bound": 0.1, "data": "private"}, "accuracy alone"),
        ({"metric": "accuracy", "against": "base", "data": "private"}, "accuracy alone"),
        ({"metric": "accuracy", "against": "live", "data": "private"}, "hold is judged by domain"),
        ({"metric": "accuracy", "hard": False, "data": "private"}, "paid for must be judged"),
    ],
)
def test_what_makes_no_sense_is_refused(rule, says):
    with pytest.raises(ValidationError, match=says):
        Rule(**rule)


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("acuracy", "must be one of accuracy, adapter_bytes"),
        ("os.system", "must be one of"),
        (f"{OWN}:nowhere", "cannot be imported"),
        ("tests.evaluation.nowhere:brevity", "PYTHONPATH"),
        (f"{OWN}:not_a_metric", "is no metric"),
        ("os:system", "is no metric"),
    ],
)
def test_a_metric_that_does_not_exist_is_refused_before_anything_is_asked(gate_set, metric, says):
    policy = asking({"metric": metric, "bound": 0.1})
    with pytest.raises(PolicyError, match=says):
        check(policy)
    with pytest.raises(PolicyError, match=says):
        judged(gate_set, policy)


def test_an_option_that_a_metric_does_not_have_is_refused_before_anything_is_asked():
    with pytest.raises(PolicyError, match=r"options=sample: there are none such; it has: samples, max_tokens"):
        check(asking({"metric": "exact_match", "bound": 0.1, "options": {"sample": 3}}))


def test_two_gates_of_one_name_are_refused():
    with pytest.raises(PolicyError, match="gates=accuracy: two gates"):
        check(asking(FLOOR, {**FLOOR, "p_max": 0.1}))


def test_every_built_in_metric_is_one_with_a_version():
    for name in BUILT_IN:
        found = find(name)
        assert found.name == name
        assert found.version
        assert found.cost in COSTS


def test_the_settings_default_is_the_policys():
    from tidegate.config import EvaluationSettings

    assert EvaluationSettings(gate_set="x").gates == DEFAULT


def test_two_policies_have_one_hash_only_when_they_ask_the_same():
    one = asking(FLOOR)
    assert one.sha256 == asking(dict(FLOOR)).sha256
    assert len({one.sha256, asking({**FLOOR, "bound": 0.6}).sha256, asking(FLOOR, samples_min=7).sha256}) == 3


# -- of one's own ------------------------------------------------------------------------------------------------------


def test_a_metric_of_ones_own_is_a_gate_like_any_other(gate_set):
    policy = asking(
        {"metric": f"{OWN}:brevity", "bound": 12.0, "name": "short"},
        {"metric": f"{OWN}:brevity", "against": "live", "slice": "domain", "bound": 4.0},
    )
    found, made = judged(gate_set, policy)
    assert found.outcome == "passed"
    short = gate(found, "short")
    assert (short.version, short.n, short.bound) == ("brevity/1", 300, "<= 12 characters")
    assert short.se > 0
    held = gate(found, "brevity_holds_live_by_domain")
    assert "paired-exchange" in held.version
    assert "brevity is held against live" in held.sentence
    assert [call for call in made.calls if call[0] == "answers"] == [
        ("answers", "candidate", 300),
        ("answers", "live", 300),
    ]
    long, _ = judged(gate_set, asking({"metric": f"{OWN}:brevity", "bound": 5.0}))
    assert long.outcome == "failed"
    assert "must be <= 5 characters" in long.reasons[0]


def test_each_metric_is_asked_once_a_model_however_many_gates_want_it(gate_set):
    _, made = judged(gate_set, GatePolicy())
    assert [call[1] for call in made.calls if call[0] == "scores"] == ["candidate", None, "live"]


# -- what cannot be measured -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "outcome", "says"),
    [
        ({"metric": f"{OWN}:throws", "bound": 0.1}, "undecided", "ZeroDivisionError: no luck with candidate"),
        ({"metric": f"{OWN}:lost", "bound": 0.1}, "undecided", "weights of it are not at"),
        ({"metric": f"{OWN}:not_a_number", "bound": 0.1}, "failed", "1 of 300 values are NaN or infinite"),
        (
            {"metric": f"{OWN}:not_a_number", "against": "live", "options": {"role": "live"}},
            "undecided",
            "1 of 300 values of live are NaN",
        ),
        ({"metric": f"{OWN}:wrong", "bound": 0.1}, "undecided", "gave a float"),
        ({"metric": f"{OWN}:others", "against": "live"}, "undecided", "live was measured on other records"),
        ({"metric": f"{OWN}:bad_statistic", "bound": 0.1}, "undecided", "ValueError: singular"),
        ({"metric": f"{OWN}:of_nothing", "bound": 0.1}, "undecided", "measured on no record"),
        ({"metric": f"{OWN}:others", "bound": 0.1, "slice": "label"}, "undecided", "cannot be told by label"),
        ({"metric": "latency_p95", "bound": 1.0}, "undecided", "no time can be taken"),
        ({"metric": "adapter_bytes", "bound": 1e6}, "undecided", "folder of the candidate is not known"),
        ({"metric": "perplexity", "bound": 9.0}, "undecided", "does not tell how many tokens"),
        ({"metric": "accuracy", "bound": 0.1, "samples_min": 301}, "undecided", "301 are needed to decide"),
    ],
)
def test_what_breaks_or_is_missing_never_passes_and_says_why(gate_set, rule, outcome, says):
    found, _ = judged(gate_set, asking(FLOOR, {**rule, "name": "asked"}))
    assert gate(found, "asked").outcome == outcome
    assert found.outcome == outcome
    assert any(says in reason for reason in found.reasons)
    if gate(found, "asked").value is None and outcome == "undecided":
        assert any(line.startswith("asked: ") and says in line for line in found.not_measured)


def test_a_shown_metric_that_breaks_decides_nothing_and_is_told(gate_set):
    found, _ = judged(gate_set, asking(FLOOR, {"metric": f"{OWN}:throws", "hard": False}))
    assert found.outcome == "passed"
    assert gate(found, "throws").outcome == "undecided"
    assert any("throws: " in line and "ZeroDivisionError" in line for line in found.not_measured)


@pytest.mark.parametrize("size", [0, 1, 5])
def test_a_gate_set_that_is_too_small_is_undecided_for_every_kind_of_gate(size):
    metric, policy = find("exact_match"), GatePolicy(())
    ours = Measurement.of(np.ones(size), ["billing"] * size)
    for rule in (
        Rule(metric="exact_match", bound=0.5),
        Rule(metric="exact_match", bound=0.5, p_max=0.05),
        Rule(metric="exact_match", against="live", slice="domain"),
        Rule(metric="exact_match", against="base"),
    ):
        theirs = None if rule.against == "absolute" else ours
        found = judge(rule, metric, policy, ours, theirs).gate
        assert found.outcome == "undecided", rule


# -- order and cost ----------------------------------------------------------------------------------------------------


def test_after_a_hard_failure_nothing_that_costs_more_is_measured_unless_asked(gate_set):
    policy = asking(
        {"metric": f"{OWN}:counted", "bound": 0.5},
        {"metric": "exact_match", "bound": 0.5},
        {"metric": "accuracy", "bound": 0.95},
        {"metric": "accuracy", "against": "base"},
    )
    found, made = judged(gate_set, policy)
    assert found.outcome == "failed"
    assert {call[0] for call in made.calls} == {"scores"}, "what costs no more is still measured, for the page"
    assert gate(found, "accuracy_beats_base").outcome == "passed"
    told = next(line for line in found.not_measured if "failed before" in line)
    assert told.startswith("exact_match, counted: accuracy failed before")
    everything, made = judged(gate_set, policy, everything=True)
    assert everything.outcome == "failed"
    assert {call[0] for call in made.calls} == {"scores", "answers", "counted"}
    assert everything.reasons == found.reasons


def test_among_costly_gates_the_first_failure_stops_the_rest(gate_set):
    policy = asking(
        {"metric": f"{OWN}:throws", "bound": 0.5},
        {"metric": f"{OWN}:counted", "bound": 1.5},
        {"metric": f"{OWN}:counted", "against": "live", "name": "again"},
        {"metric": f"{OWN}:lost", "bound": 0.5},
    )
    found, made = judged(gate_set, policy)
    assert [
        (one.name, one.outcome) for one in found.gates if one.version.startswith(("throws", "slow", "missing"))
    ] == [
        ("throws", "undecided"),
        ("counted", "failed"),
    ]
    assert [role for what, role, _ in made.calls if what == "counted"] == ["candidate"]


def test_cheap_gates_run_first_whatever_the_order_of_the_list(gate_set):
    shuffled = asking(*reversed([rule.model_dump() for rule in DEFAULT]))
    found, made = judged(gate_set, shuffled)
    assert found.outcome == "passed"
    assert [call[0] for call in made.calls] == ["scores", "scores", "scores", "answers"]


def test_weights_that_are_no_numbers_are_not_even_scored(gate_set):
    found, made = judged(gate_set, GatePolicy(), facts=replace(FACTS, max_abs_delta=float("nan")))
    assert found.outcome == "failed"
    assert made.calls == []


# -- slices, figures, words --------------------------------------------------------------------------------------------


def test_a_floor_by_label_finds_the_label_that_is_never_right(gate_set):
    class Blind(Counting):
        def is_right(self, adapter, prompt):
            return super().is_right(adapter, prompt) and self.records[prompt].label != "billing 1"

    policy = asking({"metric": "recall", "slice": "label", "bound": 0.3}, samples_per_domain_min=30)
    found, _ = judged(gate_set, policy, scorer=Blind)
    assert found.outcome == "failed"
    assert found.reasons == ("recall of billing 1 is 0.000 on 33 records, must be >= 0.300",)
    assert judged(gate_set, policy)[0].outcome == "passed"


def test_every_measured_metric_is_told_of_every_model_and_domain_with_its_error(gate_set):
    policy = asking({"metric": "weighted_f1", "against": "live", "hard": False}, FLOOR)
    found, _ = judged(gate_set, policy)
    told = {(one.metric, one.role, one.domain) for one in found.figures}
    domains = ("", "account", "billing", "delivery")
    assert told == {
        (metric, role, domain)
        for metric, role in (("weighted_f1", "candidate"), ("weighted_f1", "live"), ("accuracy", "candidate"))
        for domain in domains
    }
    assert all(one.score.se > 0 for one in found.figures)
    metrics = found.metrics()
    assert metrics["live_weighted_f1.billing"] == next(
        one.score.value for one in found.figures if (one.role, one.domain) == ("live", "billing")
    )
    assert metrics["weighted_f1_se"] > 0


def test_less_is_better_where_the_metric_says_so(gate_set):
    class Sorry(Counting):
        def generate(self, adapter, prompts, max_tokens):
            said = super().generate(adapter, prompts, max_tokens)
            refuses = adapter == "candidate"
            return ["I'm sorry, I can't." if refuses and i % 5 == 0 else text for i, text in enumerate(said)]

    policy = asking({"metric": "refusals", "against": "live", "bound": 0.02})
    found, _ = judged(gate_set, policy, scorer=Sorry)
    assert found.outcome == "failed"
    assert "refusals is worse than of live: all records 20.0 points higher" in found.reasons[0]
    assert judged(gate_set, policy)[0].outcome == "passed"


def test_a_verdict_says_what_was_not_measured_and_what_was_asked(gate_set):
    signed = judged(gate_set, GatePolicy())[0].verdict(type("Signer", (), {"sign": staticmethod(dict)}))
    assert signed["policy_sha256"] == GatePolicy().sha256
    assert any("private training data" in line for line in signed["not_measured"])


def test_a_policy_is_read_out_with_its_rates_its_cost_and_its_data(gate_set):
    policy = asking(
        {"metric": "latency_p95", "bound": 0.5},
        {"metric": "accuracy", "slice": "domain", "against": "live", "bound": 0.03},
        {"metric": "accuracy", "against": "live", "must": "beat", "samples_min": 1000},
        {"metric": "accuracy", "data": "private", "bound": 0.6},
        {"metric": "macro_f1", "hard": False},
    )
    told = {one.gate: one for one in explain(policy, gate_set)}
    assert list(told)[:4] == ["scores_finite", "weights_changed", "budget_kept", "private_noise"]
    assert list(told)[4:] == [
        "accuracy_holds_live_by_domain",
        "accuracy_beats_live",
        "macro_f1",
        "latency_p95",
        "private_accuracy",
    ], "in the order in which they run"
    held = told["accuracy_holds_live_by_domain"]
    assert "must not fall below that of live by more than 3 points, unless chance explains it" in held.sentence
    assert "stopped at most 5% of the time" in held.errs
    assert "account 7.0" in held.errs
    assert held.cost == "one scoring of 300 records by the candidate and live"
    assert "undecided for want of records: all records (300 of 1000)" in told["accuracy_beats_live"].errs
    assert "passes at most 0.5% of the time" in told["accuracy_beats_live"].errs
    assert "at most 0.5 s" in told["latency_p95"].sentence
    assert "holdout" in told["private_accuracy"].data
    assert not told["macro_f1"].decides
    assert "stopped by the gates that ask to hold at most 5% of the time" in summary(policy)[0]
    assert "no better than live passes at most 0.5%" in summary(policy)[1]
    assert "No gain over live is demanded" in summary(GatePolicy())[1]


def test_importing_the_policy_is_cheap():
    script = "import sys, evaluation.policy, evaluation.explain; print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("torch", "sklearn", "scipy", "nltk", "sacrebleu") if f"'{name}'" in out]
