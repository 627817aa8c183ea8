"""Private scores: what is said of the holdout is noisy, its errors cover, and no gate decides what noise hides."""

import itertools
import json

import numpy as np
import pytest

from evaluation.gates import evaluate
from evaluation.policy import DEFAULT, GatePolicy, Rule
from evaluation.private import (
    ALONE,
    PAIRED,
    Marked,
    NoisyCounts,
    PrivateScores,
    cells_of,
    gates_of,
    right,
    slices_of,
    votes,
)
from evaluation.report import version_markdown
from privacy.counts import CountsMechanism
from privacy.randomness import KeyedStream, TestKey
from tests.evaluation.planted import DOMAINS, FACTS, Planted, changed, write_gate_set
from tests.evaluation.test_report import BASE

RULES = tuple(
    Rule(metric="accuracy", data="private", **rest)
    for rest in (
        {"bound": 0.0},
        {"name": "private_forgetting", "slice": "domain", "against": "live", "bound": 0.03},
        {"name": "private_better_than_live", "against": "live", "must": "beat", "hard": False},
    )
)
POLICY = GatePolicy((*DEFAULT, *RULES))
# Chance that both, only the candidate, only live, neither is right.
EQUAL = (0.7, 0.1, 0.1, 0.1)
WORSE = (0.5, 0.0, 0.3, 0.2)
BETTER = (0.6, 0.3, 0.02, 0.08)


def noisy(cells_by_domain, sigma=4.0, seed=1, cells=PAIRED):
    """What a release of these exact counts looks like."""
    exact = np.concatenate(cells_by_domain).astype(float)
    values = exact + sigma * np.random.default_rng(seed).standard_normal(len(exact))
    return NoisyCounts(DOMAINS, cells, tuple(values.tolist()), sigma, "record")


def drawn(chances, n, seed=1, sigma=4.0):
    rng = np.random.default_rng(seed)
    return noisy([rng.multinomial(n, chance) for chance in chances], sigma, seed)


def scores(counts, **changes):
    return PrivateScores(counts, charge_id="desk-r0001-holdout.1", blocks=("b1",), evaluations_left=7, **changes)


def gate(gates, name):
    return next(one for one in gates if one.name == name)


def judged(chances, n=1000, policy=POLICY, sigma=4.0, **kwargs):
    return asked(scores(drawn(chances, n, sigma=sigma)), policy, **kwargs)


def asked(found, policy=POLICY, *, live=True):
    return gates_of(found, [rule for rule in policy.of("private") if live or rule.against == "absolute"], policy)


# -- votes ------------------------------------------------------------------------------------------------------------


def marks(unit):
    """Every kind of record a unit may have."""
    return [Marked(unit, d, c, v) for d in DOMAINS[:2] for c in (True, False) for v in (True, False)]


@pytest.mark.parametrize("paired", [True, False])
def test_each_unit_has_one_vote_whatever_it_sends(paired):
    kinds = marks("u")
    for size in (1, 2, 3):
        for records in itertools.combinations_with_replacement(kinds, size):
            (vote,) = votes(records, DOMAINS, paired=paired)
            assert sum(vote.values()) == pytest.approx(1.0)
            assert np.linalg.norm(list(vote.values())) <= 1 + 1e-12


def test_adding_any_record_or_user_moves_the_release_by_at_most_one():
    others = [Marked("a", DOMAINS[0], True, False), Marked("b", DOMAINS[1], False, False)]
    mechanism = CountsMechanism(len(DOMAINS) * len(PAIRED), 2.0)

    def release(records):
        stream = KeyedStream(TestKey(1), {}, 0)
        return mechanism.release(votes(records, DOMAINS, paired=True), stream)

    before, largest = release(others), 0.0
    for size in (1, 2, 3):
        for added in itertools.combinations_with_replacement(marks("u"), size):
            largest = max(largest, float(np.linalg.norm(release([*others, *added]) - before)))
    assert largest == pytest.approx(1.0)


def test_a_vote_per_record_would_break_the_bound():
    records = [Marked("u", DOMAINS[0], True, True)] * 5
    assert np.linalg.norm([5.0]) > 1
    (vote,) = votes(records, DOMAINS, paired=True)
    assert vote == {PAIRED.index("both"): pytest.approx(1.0)}


def test_a_record_falls_into_the_cell_of_who_was_right():
    for (candidate, live), cell in {
        (True, True): "both",
        (True, False): "candidate",
        (False, True): "live",
        (False, False): "neither",
    }.items():
        (vote,) = votes([Marked("u", DOMAINS[1], candidate, live)], DOMAINS, paired=True)
        assert vote == {len(PAIRED) + PAIRED.index(cell): 1.0}
    (vote,) = votes([Marked("u", DOMAINS[0], True, None)], DOMAINS, paired=False)
    assert vote == {ALONE.index("candidate"): 1.0}
    assert not list(votes([Marked("u", "astrology", True, True)], DOMAINS, paired=True))


def test_what_is_right_depends_on_the_record_alone():
    class Broken:
        def score_labels(self, _adapter, prompts, _labels):
            table = {"good": (1.0, 0.0), "bad": (0.0, 1.0), "nan": (float("nan"), 0.0)}
            return np.array([table[prompt] for prompt in prompts])

    asked = [("good", "yes"), ("bad", "yes"), ("nan", "yes"), ("good", "undeclared")]
    answers = {"yes": "yes", "no": "no"}
    assert right(Broken(), None, asked, answers) == [True, False, False, False]
    for order in itertools.permutations(range(4)):
        again = right(Broken(), None, [asked[i] for i in order], answers)
        assert [again[order.index(i)] for i in range(4)] == [True, False, False, False]
    assert right(Broken(), None, [], answers) == []


# -- errors that cover ------------------------------------------------------------------------------------------------

WORLDS = [
    (300, 4.0, EQUAL),  # noise and sampling alike
    (300, 0.01, EQUAL),  # hardly any noise
    (300, 8.0, WORSE),  # noise leads
    (400, 4.0, (0.96, 0.02, 0.02, 0.0)),  # near the edge
]


@pytest.mark.parametrize(("n", "sigma", "chance"), WORLDS)
def test_the_stated_error_covers_95_of_100(n, sigma, chance):
    """Fresh people and fresh noise each time; the truth is that of the population."""
    rng, trials = np.random.default_rng(11), 1500
    truth = {"candidate": chance[0] + chance[1], "live": chance[0] + chance[2], "gain": chance[1] - chance[2]}
    covered = dict.fromkeys(truth, 0)
    for _ in range(trials):
        exact = rng.multinomial(n, chance)
        values = exact + sigma * rng.standard_normal(4)
        counts = NoisyCounts(("d",), PAIRED, tuple(values.tolist()), sigma, "record")
        part = slices_of(counts, 1, 1)[1]
        for name, value in truth.items():
            score = getattr(part, name)
            covered[name] += abs(score.value - value) <= 1.96 * score.se
    for name, count in covered.items():
        # Three standard deviations of a share of 0.95 are 0.017; shares near an edge may be covered more often.
        assert 0.93 <= count / trials <= 0.985, (name, count / trials)


def test_an_error_without_the_noise_would_not_cover():
    """The test above can fail: leave the noise out of the error and too few are covered."""
    rng, trials, n, sigma = np.random.default_rng(11), 600, 300, 8.0
    covered = 0
    for _ in range(trials):
        values = rng.multinomial(n, WORSE) + sigma * rng.standard_normal(4)
        quiet = NoisyCounts(("d",), PAIRED, tuple(values.tolist()), 1e-6, "record")
        score = slices_of(quiet, 1, 1)[1].gain
        covered += abs(score.value + 0.3) <= 1.96 * score.se
    assert covered / trials < 0.93


def test_users_with_many_records_are_covered_too():
    """A user's records are alike, so a count of records would look surer than it is; a vote is not."""
    rng, trials, users, sigma = np.random.default_rng(3), 400, 300, 3.0
    truth, covered = 0.6, 0
    for _ in range(trials):
        marked = []
        for user in range(users):
            skill = rng.random() < truth
            marked += [Marked(f"u{user}", "d", bool(skill), None)] * int(rng.integers(1, 9))
        mechanism = CountsMechanism(len(ALONE), sigma)
        exact = sum(mechanism.clipped(vote) for vote in votes(marked, ("d",), paired=False))
        values = exact + sigma * rng.standard_normal(len(ALONE))
        score = slices_of(NoisyCounts(("d",), ALONE, tuple(values.tolist()), sigma, "user"), 1, 1)[1].candidate
        covered += abs(score.value - truth) <= 1.96 * score.se
    assert 0.92 <= covered / trials <= 0.985


# -- gates ------------------------------------------------------------------------------------------------------------


def test_a_candidate_like_live_passes_and_says_what_it_cost():
    gates = judged([EQUAL] * 3)
    assert [one.outcome for one in gates] == ["passed", "passed", "failed"]
    assert [one.hard for one in gates] == [True, True, False]
    assert {(one.data, one.charge_id) for one in gates} == {("private", "desk-r0001-holdout.1")}
    assert all(one.se > 0 and one.n for one in gates)


def test_forgetting_is_found_and_its_domain_named():
    found = gate(judged([EQUAL, WORSE, EQUAL]), "private_forgetting")
    assert found.outcome == "failed"
    assert f"{DOMAINS[1]} -28.4 ± 1.6 points" in found.sentence
    assert DOMAINS[0] not in found.sentence
    assert found.value > 20


def test_a_real_gain_is_found():
    assert gate(judged([BETTER] * 3), "private_better_than_live").outcome == "passed"


@pytest.mark.parametrize(("floor", "outcome"), [(0.0, "passed"), (0.7, "passed"), (0.8, "undecided"), (0.9, "failed")])
def test_a_floor_is_passed_or_missed_only_beyond_chance(floor, outcome):
    found = gate(judged([EQUAL] * 3, policy=changed(POLICY, "private_accuracy", bound=floor)), "private_accuracy")
    assert found.outcome == outcome


def test_more_noise_means_wider_errors_and_in_the_end_no_decision():
    errors = [gate(judged([EQUAL] * 3, sigma=sigma), "private_accuracy").se for sigma in (0.1, 10.0, 50.0)]
    assert errors == sorted(errors)
    hidden = judged([EQUAL] * 3, sigma=200.0)
    assert {one.outcome for one in hidden} == {"undecided"}
    assert all(one.value is None for one in hidden)
    assert "10 times the noise" in hidden[0].sentence


def test_a_small_domain_that_noise_hides_is_told_and_not_judged():
    rng = np.random.default_rng(2)
    counts = noisy([rng.multinomial(n, chance) for n, chance in ((2000, EQUAL), (2000, EQUAL), (30, WORSE))])
    found = gate(asked(scores(counts)), "private_forgetting")
    assert found.outcome == "passed"
    assert f"hidden by the noise: {DOMAINS[2]}" in found.sentence


def test_chance_alone_stops_few_candidates():
    stopped = sum(
        gate(asked(scores(drawn([EQUAL] * 3, 300, seed))), "private_forgetting").outcome == "failed"
        for seed in range(300)
    )
    assert stopped / 300 <= 0.05 + 0.03


def test_without_a_live_version_only_the_floor_is_asked():
    rng = np.random.default_rng(4)
    counts = noisy([rng.multinomial(500, (0.8, 0.2))] * 3, cells=cells_of(paired=False))
    (found,) = asked(scores(counts), live=False)
    assert found.name == "private_accuracy"
    assert found.value == pytest.approx(0.8, abs=4 * found.se)


# -- in the evaluation ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gate_set(tmp_path_factory):
    return write_gate_set(tmp_path_factory.mktemp("gates") / "planted.jsonl")


def whole(gate_set, private):
    scorer = Planted(gate_set, {"candidate": {"": 0.9}, "live": {"": 0.7}, None: {"": 0.2}})
    policy = POLICY if private else GatePolicy()
    ask = (lambda: private) if private else None
    return evaluate(gate_set, policy, scorer, candidate="candidate", live="live", facts=FACTS, private=ask)


def test_private_gates_stand_beside_the_public_ones_and_decide(gate_set):
    assert whole(gate_set, None).outcome == "passed"
    assert whole(gate_set, scores(drawn([BETTER] * 3, 1000))).outcome == "passed"
    forgetting = whole(gate_set, scores(drawn([EQUAL, WORSE, EQUAL], 1000)))
    assert forgetting.outcome == "failed"
    assert "on the holdout" in forgetting.reasons[0]
    assert {one.data for one in forgetting.gates} == {"public", "private"}


def test_a_candidate_that_failed_in_public_costs_the_holdout_nothing(gate_set):
    def ask():
        raise AssertionError("the holdout was asked")

    scorer = Planted(gate_set, {"candidate": {"": 0.2}, "live": {"": 0.7}, None: {"": 0.2}})
    evaluation = evaluate(gate_set, POLICY, scorer, candidate="candidate", live="live", facts=FACTS, private=ask)
    assert evaluation.outcome == "failed"
    assert any("private_forgetting" in line and "failed before" in line for line in evaluation.not_measured)


def test_private_gates_that_nobody_may_ask_leave_it_undecided(gate_set):
    scorer = Planted(gate_set, {"candidate": {"": 0.9}, "live": {"": 0.7}, None: {"": 0.2}})
    evaluation = evaluate(gate_set, POLICY, scorer, candidate="candidate", live="live", facts=FACTS)
    assert evaluation.outcome == "undecided"
    assert "may not be asked" in evaluation.reasons[0]


def test_an_account_that_cannot_pay_leaves_the_candidate_undecided(gate_set):
    refusal = "blocks b1 cannot pay: 10 evaluations were made, none is left"
    evaluation = whole(gate_set, PrivateScores(None, refusal))
    assert evaluation.outcome == "undecided"
    assert evaluation.reasons[0] == refusal
    told = version_markdown(evaluation, data_revision="d" * 40, blocks=("b1",), parent="version 3", base=BASE)
    assert f"Not released: {refusal}." in told


def test_no_exact_count_and_no_macro_f1_is_told(gate_set):
    exact = [731, 94, 106, 69]
    counts = noisy([np.array(exact)] * 3, seed=9)
    evaluation = whole(gate_set, scores(counts))
    told = version_markdown(evaluation, data_revision="d" * 40, blocks=("b1",), parent="version 3", base=BASE)
    told += json.dumps([one.as_json() for one in evaluation.gates]) + json.dumps(evaluation.metrics())
    for count in (*exact, 3 * sum(exact), exact[0] + exact[1]):
        assert f"| {count} " not in told
    part = slices_of(counts, 1, 1)[1]
    assert part.candidate.value != pytest.approx((731 + 94) / 1000, abs=1e-6)
    assert any("macro-F1 on the holdout" in line for line in evaluation.not_measured)
    assert "7 more such evaluations can be paid" in told


def test_counts_survive_being_kept():
    counts = drawn([EQUAL] * 3, 100)
    assert NoisyCounts.from_json(json.loads(json.dumps(counts.as_json()))) == counts
    with pytest.raises(ValueError, match="must be 3 x 4"):
        NoisyCounts.from_json({**counts.as_json(), "values": [1.0]})
