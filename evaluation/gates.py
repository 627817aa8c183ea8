"""The gates: what a candidate must show before a person is asked to approve it.

Hard gates decide, advisory ones are shown. A hard gate that fails makes the outcome `failed`; else one that could not
be decided (too few records, a metric that broke, a file that is missing) makes it `undecided`; only when all hard
gates passed is it `passed`.

What costs least is measured first, and when a hard gate has failed nothing that costs more is, unless everything is
asked for. Three gates are not in any policy, because nobody may switch them off: the weights changed and are numbers,
every block's budget was kept, the noise was private.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from evaluation.catalogue import COSTS, Metric, find
from evaluation.errors import NotMeasured, PolicyError
from evaluation.gateset import GateSet
from evaluation.judging import Judged, judge, slices_of, unknown
from evaluation.measurement import Measurement
from evaluation.metrics import score
from evaluation.policy import GatePolicy, Rule
from evaluation.private import PrivateScores, gates_of
from evaluation.private import not_measured as not_measured_privately
from evaluation.scorer import Predictions, Role, Scorer, Subject, Timer, one_line
from evaluation.slices import cut
from evaluation.suite import Shared
from evaluation.verdict import Evaluation, Figure, Gate, Outcome, Slice
from privacy.policy import WITHOUT_PRIVACY

log = structlog.get_logger()


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
        problem: why its files cannot be read as an adapter of this base, so that nothing can be asked of it; or empty.
        unprotected: trained without privacy: neither clip nor noise, and no guarantee whatever `epsilon` says.
        open_stream: nothing was ever promised to anybody in its stream.
        chosen_on: sha256 of the gate set by which early stopping chose among the round's weights; empty: none did.
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
    problem: str = ""
    unprotected: bool = False
    open_stream: bool = False
    chosen_on: str = ""


def check(policy: GatePolicy) -> tuple[tuple[Rule, Metric], ...]:
    """Every public rule with its metric, imported.

    Raises:
        PolicyError: a metric does not exist, has no such option, or two gates have one name.
    """
    titles = [rule.title for rule in policy.rules]
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        raise PolicyError(f"gates={', '.join(twice)}: two gates have this name; give one of them another by `name`")
    found = []
    for rule in policy.of("public"):
        metric = find(rule.metric)
        metric.settle(rule.options)
        found.append((rule, metric))
    return tuple(found)


@dataclass
class _Bench:
    """The models, and what was measured of them: each metric once a model."""

    subjects: Mapping[Role, Subject]
    progress: Callable[[int, int, str], None]
    total: int
    found: dict[tuple[str, str, Role], tuple[Metric, Measurement | NotMeasured]] = field(default_factory=dict)

    def measure(self, rule: Rule, metric: Metric, role: Role) -> Measurement:
        """The measurement of one model.

        Raises:
            NotMeasured: it cannot be had, whatever the metric threw.
        """
        key = (rule.metric, json.dumps(rule.options, sort_keys=True), role)
        if key not in self.found:
            self.progress(len(self.found), self.total, f"{metric.name} of {self.subjects[role].named}")
            self.found[key] = (metric, self._ask(rule, metric, self.subjects[role]))
        _, seen = self.found[key]
        if isinstance(seen, NotMeasured):
            raise seen
        return seen

    def _ask(self, rule: Rule, metric: Metric, subject: Subject) -> Measurement | NotMeasured:
        try:
            measured = metric(subject, rule.options)
        except NotMeasured as error:
            return error
        except Exception as error:  # noqa: BLE001 - whatever a metric throws must end in `undecided`
            return NotMeasured(f"the metric threw on {subject.named} ({one_line(error)})")
        if not isinstance(measured, Measurement):
            return NotMeasured(f"the metric gave a {type(measured).__name__} for {subject.named}, not a Measurement")
        return measured

    def known(self, rule: Rule, role: Role) -> bool:
        """Whether it was measured already."""
        return (rule.metric, json.dumps(rule.options, sort_keys=True), role) in self.found

    def figures(self) -> tuple[Figure, ...]:
        """Every measured metric of every model, over all records and by domain."""
        figures: list[Figure] = []
        for (_, options, role), (metric, seen) in self.found.items():
            if isinstance(seen, NotMeasured) or seen.broken or not seen.n:
                continue
            version = seen.version or metric.version
            parts = slices_of(seen, "domain" if "domain" in seen.groups else "whole")
            try:
                told = [(name, score(seen, chosen)) for name, chosen in parts]
            except Exception:  # noqa: BLE001, S112 - a statistic that throws: its gate says so
                continue
            shown = json.loads(options)
            figures += [
                Figure(metric.name, version, metric.unit, metric.better, role, name, value, shown)
                for name, value in told
            ]
        return tuple(figures)


def evaluate(
    gate_set: GateSet,
    policy: GatePolicy,
    scorer: Scorer,
    *,
    candidate: str,
    live: str | None,
    facts: CandidateFacts,
    private: Callable[[], PrivateScores] | None = None,
    everything: bool = False,
    folders: Mapping[str, Path] | None = None,
    root: Path | None = None,
    timer: Timer | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """Judge a candidate on a gate set.

    Never raises for what a candidate, an engine or a metric does: that is an outcome with a reason.

    Args:
        gate_set: declared and public.
        policy: what must be shown.
        scorer: holds `candidate` and `live` under these names, and the base under None.
        candidate: name of the adapter that is judged.
        live: name of the adapter that answers now; None when nothing is live.
        facts: what is known of the candidate besides its scores.
        private: charges for, and gives, noisy scores on the stream's own holdout; called last, when nothing has
            failed, and only if the policy has private gates. None: nobody may ask the holdout.
        everything: also measure what costs more than a hard gate that failed; never the holdout.
        folders: where the adapters' files are, by the engine's names.
        root: the workspace, for relative paths in options.
        timer: takes the time of answers of the engine that will serve.
        progress: told (done, total, what begins).

    Raises:
        PolicyError: the policy asks for what does not exist; `check` says so before a round is spent.
    """
    rules = check(policy)
    if live is None:
        rules = tuple((_held_by_base(rule, metric, rules), metric) for rule, metric in rules)
    named: dict[Role, str | None] = {"candidate": candidate, "live": live, "base": None}
    in_suites = {role for rule, metric in rules if metric.cost == "suite" for role in _roles(rule)}
    beside = tuple(name for role, name in named.items() if role in in_suites)
    suites: dict[Hashable, Shared] = {}

    def subject(role: Role, adapter: str | None) -> Subject:
        folder = (folders or {}).get(adapter or "")
        return Subject(role, adapter, scorer, gate_set, folder, root or Path(), timer, beside, suites)

    subjects: dict[Role, Subject] = {"candidate": subject("candidate", candidate), "base": subject("base", None)}
    if live is not None:
        subjects["live"] = subject("live", live)
    bench = _Bench(subjects, progress or (lambda _done, _total, _what: None), _total(rules, live=live is not None))
    run = _Run(policy, facts, bench, everything)
    run.public(rules)
    run.holdout(private, live=live is not None)
    bench.progress(bench.total, bench.total, "done")
    return run.evaluation(gate_set)


def _held_by_base(rule: Rule, metric: Metric, rules: Sequence[tuple[Rule, Metric]]) -> Rule:
    """While nothing is live, a suite must hold what the base can do: it is no less in need of protection then."""
    if metric.cost != "suite" or rule.against != "live" or rule.asks != "hold":
        return rule
    asked = [one for one, _ in rules if one.metric == rule.metric and one.options == rule.options]
    if any(one.against == "base" and one.asks == "hold" for one in asked):
        return rule  # it is asked already
    return rule.model_copy(update={"against": "base", "must": rule.asks})


def _total(rules: Sequence[tuple[Rule, Metric]], *, live: bool) -> int:
    """How many measurements the rules need, at most."""
    needed = {
        (rule.metric, json.dumps(rule.options, sort_keys=True), role) for rule, _ in rules for role in _roles(rule)
    }
    return sum(role != "live" or live for _, _, role in needed)


def _roles(rule: Rule) -> tuple[Role, ...]:
    """Which models a rule looks at, the candidate first."""
    return ("candidate",) if rule.against == "absolute" else ("candidate", rule.against)


@dataclass
class _Run:
    """One evaluation on its way."""

    policy: GatePolicy
    facts: CandidateFacts
    bench: _Bench
    everything: bool
    gates: list[Gate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    scores: PrivateScores | None = None

    @property
    def candidate(self) -> Subject:
        """The model that is judged."""
        return self.bench.subjects["candidate"]

    @property
    def failed(self) -> str:
        """The first hard gate that failed; empty while none has."""
        return next((gate.name for gate in self.gates if gate.hard and gate.outcome == "failed"), "")

    def public(self, rules: Sequence[tuple[Rule, Metric]]) -> None:
        """Run the gates on public data, by cost, in the policy's order within a cost."""
        self.gates += [_weights_changed(self.facts), _budget_kept(self.facts)]
        for cost in COSTS:
            stopped = self.failed
            for rule, metric in (one for one in rules if one[1].cost == cost):
                if rule.against == "live" and "live" not in self.bench.subjects:
                    continue
                # What must be generated costs so much that the rest of its kind is left out at once.
                stop = stopped or (self.failed if COSTS.index(cost) > COSTS.index("scores") else "")
                if stop and not self.everything and not all(self.bench.known(rule, role) for role in _roles(rule)):
                    self.left_out.append(rule.title)
                    continue
                self._add(self._judge(rule, metric))
            if cost == "scores":
                self._finite()
        self._told_by_engine()
        self.gates.append(_private_noise(self.facts))

    def _add(self, judged: Judged) -> None:
        self.gates.append(judged.gate)
        self.notes += judged.notes

    def _judge(self, rule: Rule, metric: Metric) -> Judged:
        """One rule; live and the base are not measured for a candidate that cannot be."""
        try:
            ours = self.bench.measure(rule, metric, "candidate")
            if ours.broken or rule.against == "absolute":
                return judge(rule, metric, self.policy, ours, None)
            return judge(rule, metric, self.policy, ours, self.bench.measure(rule, metric, rule.against))
        except NotMeasured as error:
            return Judged(unknown(rule, metric, str(error)))
        except Exception as error:  # noqa: BLE001 - a statistic is the metric's own code too
            return Judged(unknown(rule, metric, f"the metric's statistic threw ({one_line(error)})"))

    def _finite(self) -> None:
        """A candidate with NaN scores has failed; an engine that broke leaves it undecided. Nobody switches it off."""
        said = self.candidate.asked_for_labels
        self.gates.insert(0, _scores_finite(said if said is not None else self._first_record()))

    def _first_record(self) -> Predictions:
        """Where no gate asks for labels: one record's expected completion, scored."""
        if self.failed:
            return Predictions(None, problem="it was not scored, since a gate failed before")
        subject, record = self.candidate, self.candidate.gate_set.records[0]
        try:
            found = float(subject.scorer.score_labels(subject.adapter, [record.prompt], [record.completion])[0, 0])
        except Exception as error:  # noqa: BLE001 - whatever an engine throws must end in `undecided`
            return Predictions(None, problem=one_line(error))
        if not math.isfinite(found):
            return Predictions(None, 1, "1 of 1 scores are NaN or infinite")
        return Predictions(None)

    def _told_by_engine(self) -> None:
        """An engine that threw when it was asked to write leaves the candidate undecided."""
        if self.candidate.problem and self.gates[0].outcome == "passed":
            self.gates[0] = _scores_finite(Predictions(None, problem=self.candidate.problem))

    def holdout(self, private: Callable[[], PrivateScores] | None, *, live: bool) -> None:
        """Ask the holdout, last: what it tells is paid for."""
        rules = [rule for rule in self.policy.of("private") if live or rule.against != "live"]
        if not rules:
            return
        if self.failed:
            self.left_out += [rule.title for rule in rules]
            return
        self.scores = private() if private else PrivateScores(None, refusal="the holdout may not be asked here")
        self.gates += gates_of(self.scores, rules, self.policy)

    def evaluation(self, gate_set: GateSet) -> Evaluation:
        """All of it, put together."""
        outcome = _outcome(self.gates)
        slices = self._slices(gate_set)
        log.info("candidate judged", outcome=outcome, gate_set=gate_set.name, records=len(gate_set.records))
        return Evaluation(
            outcome=outcome,
            reasons=self._reasons(outcome),
            gates=tuple(self.gates),
            slices=slices,
            not_measured=self._not_measured(),
            gate_set={
                "name": gate_set.name,
                "sha256": gate_set.sha256,
                "n": len(gate_set.records),
                "data": gate_set.data,
            },
            facts=self.facts,
            private=self.scores,
            figures=self.bench.figures(),
            policy_sha256=self.policy.sha256,
        )

    def _slices(self, gate_set: GateSet) -> tuple[Slice, ...]:
        said = {role: subject.asked_for_labels for role, subject in self.bench.subjects.items()}
        needed = {record.domain: self.policy.samples_per_domain_min for record in gate_set.records}
        return cut(gate_set, said, {**needed, "": self.policy.samples_min})

    def _reasons(self, outcome: Outcome) -> tuple[str, ...]:
        if outcome != "passed":
            return tuple(gate.sentence for gate in self.gates if gate.hard and gate.outcome == outcome)
        unprotected = [gate.sentence for gate in self.gates if gate.name == "private_noise" and self.facts.unprotected]
        compared = {rule.title for rule in self.policy.rules if rule.hard and rule.asks != "reach"}
        sentences = [gate.sentence for gate in self.gates if gate.name in compared]
        if "live" not in self.bench.subjects:
            sentences.append("nothing is live yet that could be forgotten")
        return (*unprotected, *(sentences or ["every gate that decides passed"]))

    def _not_measured(self) -> tuple[str, ...]:
        """What a reader might believe was checked, and was not."""
        said = ["whether gate prompts also occur in the private training data: looking would read private data"]
        if self.scores is None:
            said.append(
                "anything on private records: this gate set is public, the stream's own holdout is not released"
            )
        else:
            said += not_measured_privately(self.scores, self.policy)
        if self.facts.chosen_on:
            said.append(
                "scores on records that nothing had looked at: early stopping chose among the round's weights by "
                f"gate set {self.facts.chosen_on[:12]}, so what is scored on it leans upwards"
            )
        if "live" not in self.bench.subjects:
            names = [rule.title for rule in self.policy.rules if rule.against == "live"]
            if names:
                said.append(f"forgetting and the gain over live ({', '.join(names)}): nothing is live yet")
        if self.left_out:
            said.append(f"{', '.join(self.left_out)}: {self.failed} failed before, and they cost more to measure")
        unknown_gates = (gate for gate in self.gates if gate.value is None and gate.outcome == "undecided")
        said += [f"{gate.name}: {gate.sentence}" for gate in unknown_gates]
        return tuple(said + self.notes)


def _outcome(gates: Sequence[Gate]) -> Outcome:
    found = {gate.outcome for gate in gates if gate.hard}
    if "failed" in found:
        return "failed"
    return "undecided" if "undecided" in found else "passed"


def _scores_finite(said: Predictions) -> Gate:
    """A candidate with NaN scores has failed; an engine that broke leaves it undecided."""
    outcome: Outcome = "passed"
    sentence = "every score is a finite number"
    if said.broken:
        outcome, sentence = "failed", f"the candidate is broken: {said.problem}"
    elif said.problem:
        outcome, sentence = "undecided", f"the candidate could not be scored ({said.problem})"
    value = float(said.broken) if said.broken or not said.problem else None
    return Gate("scores_finite", "scores-finite/1", outcome, sentence, "0 scores NaN or infinite", value=value)


def _weights_changed(facts: CandidateFacts) -> Gate:
    delta = facts.max_abs_delta
    version, bound = "max-abs-delta/1", "> 0 and finite"
    if facts.problem:
        return Gate("weights_changed", version, "failed", f"the adapter cannot be used: {facts.problem}", bound)
    if math.isfinite(delta) and delta > 0:
        return Gate("weights_changed", version, "passed", f"weights moved by up to {delta:.3g}", bound, delta)
    if delta == 0:
        return Gate("weights_changed", version, "failed", "the round changed no weight at all", bound, delta)
    return Gate("weights_changed", version, "failed", f"the largest change of a weight is {delta}", bound)


def _budget_kept(facts: CandidateFacts) -> Gate:
    if facts.unprotected:
        sentence = "nothing is charged: there is no budget without privacy"
        return Gate("budget_kept", "filter-share/1", "passed", sentence, "<= 1", value=0.0)
    share = facts.share_used
    kept = facts.budget_kept and math.isfinite(share)
    outcome: Outcome = "passed" if kept else "failed"
    sentence = f"{100 * share:.1f}% of the fullest block's filter is used" + ("" if kept else ", that is over its cap")
    return Gate(
        "budget_kept", "filter-share/1", outcome, sentence, "<= 1", value=share if math.isfinite(share) else None
    )


def _private_noise(facts: CandidateFacts) -> Gate:
    """Reproducible noise guarantees nothing, so such a candidate is for tests alone.

    No noise at all is for a stream that never promised anything to anybody, where a person may approve it knowingly.
    """
    if facts.unprotected:
        said: Outcome = "passed" if facts.open_stream else "failed"
        why = f"the candidate {WITHOUT_PRIVACY}"
        if facts.open_stream:
            why = "trained WITHOUT PRIVACY, in a stream that never promised anybody any"
        bound = "noise_source=system, or none on a stream without privacy"
        return Gate("private_noise", "noise-source/1", said, why, bound)
    outcome: Outcome = "passed" if facts.private else "failed"
    sentence = "noise came from the operating system's generator, under a key that is destroyed"
    if not facts.private:
        sentence = "trained with test noise: epsilon is infinity, so it can never be promoted"
    return Gate("private_noise", "noise-source/1", outcome, sentence, "noise_source=system")
