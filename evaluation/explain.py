"""A gate policy read out: what each gate asks, how often chance decides, what it costs, on which data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evaluation.catalogue import COSTS, Metric
from evaluation.gates import check
from evaluation.gateset import GateSet
from evaluation.metrics import smallest_visible_drop, smallest_visible_gain
from evaluation.policy import GatePolicy, Rule

_STANDING = (
    ("scores_finite", "No score of the candidate may be NaN or infinite."),
    ("weights_changed", "The round must have moved a weight, and every weight must be a number."),
    ("budget_kept", "No block may have paid more than the privacy budget it was sealed with."),
    ("private_noise", "The noise must come from the operating system's generator, not from a test's seed."),
)


@dataclass(frozen=True)
class Explained:
    """One gate for a person.

    Attributes:
        sentence: what it asks.
        errs: how often chance decides, and what it cannot see.
        cost: what must be measured for it.
        data: what it is judged on.
    """

    gate: str
    decides: bool
    sentence: str
    errs: str
    cost: str
    data: str

    def as_json(self) -> dict[str, Any]:
        """JSON form, with every field."""
        return asdict(self)


def explain(policy: GatePolicy, gate_set: GateSet) -> tuple[Explained, ...]:
    """Every gate in the order in which they run, those nobody may switch off first.

    Raises:
        PolicyError: a gate asks for what does not exist.
    """
    standing = [
        Explained(name, True, sentence, "no chance in it", "nothing beside the others", "the round itself")
        for name, sentence in _STANDING
    ]
    found = sorted(check(policy), key=lambda one: COSTS.index(one[1].cost))
    public = [_public(rule, metric, policy, gate_set) for rule, metric in found]
    return (*standing, *public, *(_private(rule) for rule in policy.of("private")))


def summary(policy: GatePolicy) -> tuple[str, ...]:
    """What the policy as a whole promises about chance."""
    stops = policy.stops_equal_at_most()
    no_better = policy.promotes_no_better_at_most()
    held = f"at most {100 * stops:g}% of the time, all of them together"
    said = [f"A candidate that is no worse anywhere is stopped by the gates that ask to hold {held}."]
    if no_better is None:
        said.append("No gain over live is demanded: a candidate just as good passes, and is not called better.")
    else:
        said.append(f"A candidate no better than live passes at most {100 * no_better:g}% of the time.")
    said.append("Too few records, a missing file and a metric that throws are undecided, and undecided is not a pass.")
    return tuple(said)


def _public(rule: Rule, metric: Metric, policy: GatePolicy, gate_set: GateSet) -> Explained:
    options = metric.settle(rule.options)
    asked = min(int(options.get("samples") or len(gate_set.records)), len(gate_set.records))
    models = "the candidate" if rule.against == "absolute" else f"the candidate and {_other(rule)}"
    cost = {
        "free": "nothing of the model",
        "scores": f"one scoring of {len(gate_set.records)} records by {models}",
        "answers": f"{asked} written answers of {models}",
        "suite": f"a set of prompts of its own, asked of {models}",
    }[metric.cost]
    own_set = metric.cost in {"free", "suite"}
    data = "the metric's own set" if metric.cost == "suite" else "the adapter's files"
    if not own_set:
        data = f"public gate set {gate_set.name}, {asked} records"
    parts = [] if own_set else _sizes(rule, policy, gate_set, asked)
    return Explained(rule.title, _decides(rule), _sentence(rule, metric), _errs(rule, metric, parts), cost, data)


def _private(rule: Rule) -> Explained:
    return Explained(
        rule.title,
        rule.hard,
        _sentence(rule, None),
        f"{_rate(rule)}; noise is in the error, and what it hides is undecided or told",
        "one evaluation of the holdout's account, asked last and only if nothing failed",
        "the stream's own holdout, by noisy counts",
    )


def _decides(rule: Rule) -> bool:
    return rule.hard and not rule.shown_only


def _sizes(rule: Rule, policy: GatePolicy, gate_set: GateSet, asked: int) -> list[tuple[str, int, int]]:
    """(slice, records, records needed) of each slice of a rule; of a sample, as many as there are on average."""
    by = {"domain": lambda record: record.domain, "label": lambda record: record.truth}
    counts: Counter[str] = Counter()
    if rule.slice != "whole":
        counts.update(by[rule.slice](record) for record in gate_set.records)
    share = asked / len(gate_set.records)
    parts = [("all records", asked, policy.samples_of(rule, ""))]
    return parts + [(name, round(share * n), policy.samples_of(rule, name)) for name, n in sorted(counts.items())]


def _sentence(rule: Rule, metric: Metric | None) -> str:
    what = metric.what if metric else "share of holdout records whose likeliest label is the true one"
    where = {"whole": "", "domain": ", over all records and in each domain,", "label": ", over all and for each label,"}
    told = f"The {what}{where[rule.slice]}"
    lower = metric is not None and metric.better == "lower"
    if rule.shown_only:
        return f"{told} is shown and decides nothing."
    if rule.asks == "reach":
        return f"{told} must be at {'most' if lower else 'least'} {_amount(rule, metric, plain=True)}."
    other = _other(rule)
    if rule.asks == "beat":
        more = f"by more than {_amount(rule, metric)} and " if rule.limit else ""
        return f"{told} must be {'lower' if lower else 'higher'} than that of {other}, {more}beyond chance."
    verb = "exceed" if lower else "fall below"
    return f"{told} must not {verb} that of {other} by more than {_amount(rule, metric)}, unless chance explains it."


def _amount(rule: Rule, metric: Metric | None, *, plain: bool = False) -> str:
    unit = metric.unit if metric else "share"
    if unit != "share":
        return f"{rule.limit:g} {unit}"
    return f"{rule.limit:g}" if plain else f"{100 * rule.limit:g} points"


def _rate(rule: Rule) -> str:
    chance = rule.chance
    if rule.shown_only:
        return "decides nothing"
    if chance is None:
        return "none is allowed for: a candidate just at the bound passes half the time"
    if rule.asks == "reach":
        return f"under the bound passes, and over it is stopped, at most {100 * chance:g}% of the time each"
    if rule.asks == "beat":
        return f"one that is no better passes at most {50 * chance:g}% of the time"
    return f"one that is no worse is stopped at most {100 * chance:g}% of the time, all slices together"


def _errs(rule: Rule, metric: Metric, parts: Sequence[tuple[str, int, int]]) -> str:
    """The rates, and what the records at hand cannot show or decide."""
    told = [_rate(rule)]
    if rule.asks == "reach" and metric.unit == "share" and metric.better == "higher" and not rule.shown_only:
        told = ["every candidate reaches it"] if rule.limit <= 0 else told
    small = [f"{name} ({n} of {needed})" for name, n, needed in parts if n < needed]
    if small:
        told.append(f"undecided for want of records: {', '.join(small)}")
    able = [(name, n) for name, n, needed in parts if n >= needed]
    if rule.chance is not None and able and metric.unit == "share":
        if rule.asks == "hold":
            seen = [(name, smallest_visible_drop(n, len(able), rule.chance)) for name, n in able]
            told.append("the least loss it can see, in points: " + _points(seen))
        elif rule.asks == "beat":
            seen = [(name, smallest_visible_gain(n, rule.chance)) for name, n in able]
            told.append("the least gain it can see, in points: " + _points(seen))
    return "; ".join(told)


def _points(seen: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {100 * least:.1f}" for name, least in seen)


def _other(rule: Rule) -> str:
    return "the base" if rule.against == "base" else "live"
