"""The gates: what a candidate must show before a person is asked to approve it.

Hard gates decide, advisory ones are shown. A hard gate that fails makes the outcome `failed`; else one that could not
be decided (too few records, a scorer that broke) makes it `undecided`; only when all hard gates passed is it `passed`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog

from evaluation.gateset import GateSet
from evaluation.metrics import (
    ACCURACY_VERSION,
    FORGETTING_VERSION,
    FORMAT_VERSION,
    MACRO_F1_VERSION,
    MCNEMAR_VERSION,
    Paired,
    Score,
    p_different,
    smallest_visible_drop,
)
from evaluation.private import PrivateScores, gates_of
from evaluation.private import not_measured as not_measured_privately
from evaluation.scorer import Predictions, Scorer, one_line, predict
from evaluation.slices import ALL, Cut, cut
from evaluation.verdict import Evaluation, Gate, Outcome, Slice

# Long enough for any declared label, short enough that a model that never stops costs little.
_FORMAT_TOKENS_MAX = 48

log = structlog.get_logger()


@dataclass(frozen=True)
class GatePolicy:
    """What a candidate must show.

    Attributes:
        samples_min: records a gate set needs before its overall figures decide anything.
        samples_per_domain_min: records a domain needs before forgetting in it is decided.
        accuracy_min: of all records, 0 to 1.
        better_than_base_p_max: of the two-sided exact McNemar test against the base.
        forgetting_points_max: percentage points a domain may lose against live, however sure the loss.
        forgetting_p_max: how often, at most, a candidate that forgot nothing is stopped by this gate.
        format_samples: greedy answers generated for the advisory format gate; 0 leaves it out.
    """

    samples_min: int = 100
    samples_per_domain_min: int = 20
    accuracy_min: float = 0.0
    better_than_base_p_max: float = 0.01
    forgetting_points_max: float = 3.0
    forgetting_p_max: float = 0.05
    format_samples: int = 32


@dataclass(frozen=True)
class CandidateFacts:
    """What is known of a candidate besides its scores.

    Attributes:
        parent_sha256: the live adapter it was trained from; None for the bare base.
        max_abs_delta: largest change of any weight against the parent.
        budget_kept: whether every block's filter holds after the round.
        share_used: of the fullest block's filter.
        epsilon, delta, unit: the sealed guarantee.
        private: False when the round's noise was test noise, which guarantees nothing.
        promise: the sealed guarantee in words, with its horizon (privacy.policy.Policy.promise).
    """

    adapter_sha256: str
    parent_sha256: str | None
    base_sha256: str
    max_abs_delta: float
    budget_kept: bool
    share_used: float
    epsilon: float
    delta: float
    unit: str
    private: bool
    promise: str = ""


@dataclass(frozen=True)
class _Seen:
    """Everything the gates look at."""

    policy: GatePolicy
    facts: CandidateFacts
    candidate: Predictions
    live: Predictions | None
    base: Predictions
    cuts: tuple[Cut, ...]
    private: PrivateScores | None

    @property
    def overall(self) -> Cut:
        """The slice of all records."""
        return self.cuts[0]


def evaluate(
    gate_set: GateSet,
    policy: GatePolicy,
    scorer: Scorer,
    *,
    candidate: str,
    live: str | None,
    facts: CandidateFacts,
    private: PrivateScores | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """Judge a candidate on a gate set.

    Never raises for what a candidate or a scorer does: that is an outcome with a reason.

    Args:
        gate_set: declared and public.
        policy: what must be shown.
        scorer: holds `candidate` and `live` under these names, and the base under None.
        candidate: name of the adapter that is judged.
        live: name of the adapter that answers now; None when nothing is live.
        facts: what is known of the candidate besides its scores.
        private: noisy scores on the stream's own holdout, charged before; None: only the gate set is asked.
        progress: told (done, total, what begins).
    """
    step = progress or (lambda _done, _total, _what: None)
    models = 4
    step(0, models, "scoring the candidate")
    of_candidate = predict(scorer, candidate, gate_set)
    step(1, models, "scoring the base")
    of_base = predict(scorer, None, gate_set)
    step(2, models, "scoring what is live")
    of_live = predict(scorer, live, gate_set) if live is not None else None
    step(3, models, "generating answers")
    wanted = policy.format_samples if of_candidate.predicted is not None else 0
    in_form, threw = _format_gate(scorer, candidate, gate_set, wanted)
    step(models, models, "done")
    domains = {record.domain: policy.samples_per_domain_min for record in gate_set.records}
    cuts = cut(gate_set, of_candidate, of_live, of_base, {**domains, ALL: policy.samples_min})
    seen = _Seen(policy, facts, of_candidate, of_live, of_base, cuts, private)
    gates = (
        _scores_finite(seen, threw),
        _accuracy(seen),
        _better_than_base(seen),
        *(() if of_live is None else (_forgetting(seen, of_live),)),
        _weights_changed(facts),
        _budget_kept(facts),
        _private_noise(facts),
        _macro_f1(seen),
        *(() if of_live is None else (_better_than_live(seen, of_live),)),
        *in_form,
        *(() if private is None else gates_of(private, policy, live=of_live is not None)),
    )
    outcome = _outcome(gates)
    log.info("candidate judged", outcome=outcome, gate_set=gate_set.name, records=len(gate_set.records))
    return Evaluation(
        outcome=outcome,
        reasons=_reasons(outcome, gates, seen),
        gates=gates,
        slices=tuple(one.shown for one in cuts),
        not_measured=_not_measured(seen),
        gate_set={
            "name": gate_set.name,
            "sha256": gate_set.sha256,
            "n": len(gate_set.records),
            "data": gate_set.data,
        },
        facts=facts,
        private=private,
    )


def _outcome(gates: tuple[Gate, ...]) -> Outcome:
    found = {gate.outcome for gate in gates if gate.hard}
    if "failed" in found:
        return "failed"
    return "undecided" if "undecided" in found else "passed"


def _reasons(outcome: Outcome, gates: tuple[Gate, ...], seen: _Seen) -> tuple[str, ...]:
    if outcome != "passed":
        return tuple(gate.sentence for gate in gates if gate.hard and gate.outcome == outcome)
    told = ("better_than_base", "forgetting")
    sentences = [gate.sentence for gate in gates if gate.name in told]
    return tuple(sentences if seen.live else [*sentences, "nothing is live yet that could be forgotten"])


def _scores_finite(seen: _Seen, threw: str) -> Gate:
    """A candidate with NaN scores has failed; an engine that broke leaves it undecided."""
    broken = seen.candidate.broken
    outcome: Outcome = "passed"
    sentence = "every score is a finite number"
    if broken:
        outcome, sentence = "failed", f"the candidate is broken: {seen.candidate.problem}"
    elif seen.candidate.problem or threw:
        outcome, sentence = "undecided", f"the candidate could not be scored ({seen.candidate.problem or threw})"
    value = float(broken) if broken or not seen.candidate.problem else None
    return Gate("scores_finite", "scores-finite/1", outcome, sentence, "0 scores NaN or infinite", value=value)


def _accuracy(seen: _Seen) -> Gate:
    bound = f">= {seen.policy.accuracy_min:.3f}"
    whole = seen.overall.shown
    if whole.candidate is None:
        return _unknown("accuracy", ACCURACY_VERSION, bound, "accuracy is unknown: there are no scores")
    score = whole.candidate.accuracy
    enough = score.n >= seen.policy.samples_min
    outcome: Outcome = ("passed" if score.value >= seen.policy.accuracy_min else "failed") if enough else "undecided"
    sentence = f"accuracy is {score.value:.3f} on {score.n} records"
    if not enough:
        sentence += f", {seen.policy.samples_min} are needed to decide"
    elif outcome == "failed":
        sentence += f", must be {bound}"
    return Gate("accuracy", ACCURACY_VERSION, outcome, sentence, bound, score.value, score.se, score.n)


def _better_than_base(seen: _Seen) -> Gate:
    return _better("better_than_base", "the base", seen.overall.against_base, seen.base.problem, seen, hard=True)


def _better_than_live(seen: _Seen, live: Predictions) -> Gate:
    return _better("better_than_live", "live", seen.overall.against_live, live.problem, seen, hard=False)


def _better(name: str, other: str, pair: Paired | None, problem: str, seen: _Seen, *, hard: bool) -> Gate:
    """A real gain by the two-sided exact McNemar test."""
    p_max = seen.policy.better_than_base_p_max
    bound = f"gain > 0, p <= {p_max:g}"
    if pair is None:
        why = f"{other} could not be scored ({problem})" if problem else "there are no scores"
        return _unknown(name, MCNEMAR_VERSION, bound, f"the gain over {other} is unknown: {why}", hard=hard)
    gain, p = pair.gain, p_different(pair)
    enough = gain.n >= seen.policy.samples_min
    outcome: Outcome = ("passed" if gain.value > 0 and p <= p_max else "failed") if enough else "undecided"
    sentence = f"{100 * gain.value:+.1f} points against {other} on {gain.n} records (p {_p(p)})"
    if not enough:
        sentence += f", {seen.policy.samples_min} are needed to decide"
    elif outcome == "failed":
        sentence += f", must be {bound}"
    return Gate(name, MCNEMAR_VERSION, outcome, sentence, bound, 100 * gain.value, 100 * gain.se, gain.n, p, hard)


def _forgetting(seen: _Seen, live: Predictions) -> Gate:
    """No domain, nor the whole, may be worse than live by more than the allowed points and beyond chance."""
    policy = seen.policy
    bound = f"drop <= {policy.forgetting_points_max:g} points, or p > {policy.forgetting_p_max:g} after Holm"
    parts = [(part, part.gain_over_live) for part in (one.shown for one in seen.cuts)]
    known = [(part, gain) for part, gain in parts if gain is not None]
    if not known:
        why = f"live could not be scored ({live.problem})" if live.problem else "there are no scores"
        return _unknown("forgetting", FORGETTING_VERSION, bound, f"forgetting is unknown: {why}")
    lost = [(part, gain) for part, gain in known if _is_lost(part, gain, policy)]
    small = [part for part, _ in known if part.p_worse_than_live is None]
    part, gain = min(lost or known, key=lambda pair: pair[1].value)
    outcome: Outcome = "failed" if lost else ("undecided" if small else "passed")
    if lost:
        names = ", ".join(f"{_name(p)} {100 * g.value:+.1f} points (p {_p(p.p_worse_than_live)})" for p, g in lost)
        sentence = f"it forgets against live: {names}"
    elif small:
        names = ", ".join(f"{_name(p)} has {p.n} records, needs {_needed(p, policy)}" for p in small)
        sentence = f"forgetting cannot be decided: {names}"
    else:
        sentence = f"nothing is forgotten against live (lowest: {_name(part)} {100 * gain.value:+.1f} points)"
    p = part.p_worse_than_live
    value, se = -100 * gain.value + 0.0, 100 * gain.se
    return Gate("forgetting", FORGETTING_VERSION, outcome, sentence, bound, value, se, part.n, p)


def _is_lost(part: Slice, gain: Score, policy: GatePolicy) -> bool:
    p = part.p_worse_than_live
    return p is not None and p <= policy.forgetting_p_max and -100 * gain.value > policy.forgetting_points_max


def _weights_changed(facts: CandidateFacts) -> Gate:
    delta = facts.max_abs_delta
    version, bound = "max-abs-delta/1", "> 0 and finite"
    if math.isfinite(delta) and delta > 0:
        return Gate("weights_changed", version, "passed", f"weights moved by up to {delta:.3g}", bound, delta)
    if delta == 0:
        return Gate("weights_changed", version, "failed", "the round changed no weight at all", bound, delta)
    return Gate("weights_changed", version, "failed", f"the largest change of a weight is {delta}", bound)


def _budget_kept(facts: CandidateFacts) -> Gate:
    share = facts.share_used
    kept = facts.budget_kept and math.isfinite(share)
    outcome: Outcome = "passed" if kept else "failed"
    sentence = f"{100 * share:.1f}% of the fullest block's filter is used" + ("" if kept else ", that is over its cap")
    return Gate(
        "budget_kept", "filter-share/1", outcome, sentence, "<= 1", value=share if math.isfinite(share) else None
    )


def _private_noise(facts: CandidateFacts) -> Gate:
    """Reproducible noise guarantees nothing, so such a candidate is for tests alone."""
    outcome: Outcome = "passed" if facts.private else "failed"
    sentence = "noise came from the operating system's generator, under a key that is destroyed"
    if not facts.private:
        sentence = "trained with test noise: epsilon is infinity, so it can never be promoted"
    return Gate("private_noise", "noise-source/1", outcome, sentence, "noise_source=system")


def _macro_f1(seen: _Seen) -> Gate:
    """Advisory: shown beside accuracy, which decides."""
    whole = seen.overall.shown
    if whole.candidate is None:
        return _unknown("macro_f1", MACRO_F1_VERSION, "shown only", "macro-F1 is unknown", hard=False)
    score = whole.candidate.macro_f1
    sentence = f"macro-F1 is {score.value:.3f}"
    enough: Outcome = "passed" if score.n >= seen.policy.samples_min else "undecided"
    return Gate(
        "macro_f1", MACRO_F1_VERSION, enough, sentence, "shown only", score.value, score.se, score.n, hard=False
    )


def _format_gate(scorer: Scorer, candidate: str, gate_set: GateSet, samples: int) -> tuple[tuple[Gate, ...], str]:
    """Advisory: does the candidate write the very answer when it speaks freely? Also, why its engine threw, if so."""
    count = min(samples, len(gate_set.records))
    if not count:
        return (), ""
    # Evenly over the file, the same records for every candidate.
    chosen = [gate_set.records[i * len(gate_set.records) // count] for i in range(count)]
    # A token is at least one byte, so this many always hold the longest answer and its end.
    tokens = min(_FORMAT_TOKENS_MAX, 1 + max(len(answer.encode()) for answer in gate_set.answers.values()))
    try:
        said = scorer.generate(candidate, [record.prompt for record in chosen], tokens)
        exact = sum(text.strip() == record.completion.strip() for text, record in zip(said, chosen, strict=True))
    except Exception as error:  # noqa: BLE001 - whatever an engine throws must end in `undecided`
        problem = one_line(error)
        sentence = f"no free answers: {problem}"
        return (_unknown("format", FORMAT_VERSION, "shown only", sentence, hard=False),), problem
    share = exact / count
    se = math.sqrt(share * (1 - share) / max(count - 1, 1))
    sentence = f"{exact} of {count} free answers are word for word the expected one"
    return (Gate("format", FORMAT_VERSION, "passed", sentence, "shown only", share, se, count, hard=False),), ""


def _unknown(name: str, version: str, bound: str, sentence: str, *, hard: bool = True) -> Gate:
    return Gate(name, version, "undecided", sentence, bound, hard=hard)


def _not_measured(seen: _Seen) -> tuple[str, ...]:
    """What a reader might believe was checked, and was not."""
    policy = seen.policy
    said = ["whether gate prompts also occur in the private training data: looking would read private data"]
    if seen.private is None:
        said.append("anything on private records: this gate set is public, the stream's own holdout is not released")
    else:
        said += not_measured_privately(seen.private, policy)
    if seen.live is None:
        said.append("forgetting and the gain over live: nothing is live yet")
    if policy.format_samples == 0:
        said.append("the form of free answers: evaluation.format_samples is 0")
    parts = [one.shown for one in seen.cuts]
    tests = sum(part.p_worse_than_live is not None for part in parts)
    blind = [
        f"{_name(part)} under {100 * visible:.1f}"
        for part in parts
        if part.p_worse_than_live is not None
        and (visible := smallest_visible_drop(part.n, tests, policy.forgetting_p_max))
        > policy.forgetting_points_max / 100
    ]
    if blind:
        said.append("small drops against live, for want of records (in points): " + ", ".join(blind))
    return tuple(said)


def _needed(part: Slice, policy: GatePolicy) -> int:
    needed: Mapping[bool, int] = {True: policy.samples_min, False: policy.samples_per_domain_min}
    return needed[part.domain == ALL]


def _name(part: Slice) -> str:
    return part.domain or "all records"


def _p(p: float | None) -> str:
    """A p-value as it is read: 3 digits, or its order of magnitude."""
    if p is None:
        return "unknown"
    least = 0.001
    return f"{p:.3f}" if p >= least else f"< 1e{math.ceil(math.log10(p)) if p else -300}"
