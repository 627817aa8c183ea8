"""One gate: from measurements of the candidate, and of what it is compared with, to an outcome with its sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from evaluation.catalogue import Metric
from evaluation.measurement import Measurement
from evaluation.metrics import (
    MCNEMAR,
    Comparison,
    Flags,
    Score,
    compare,
    holm,
    p_reached,
    score,
    smallest_visible_drop,
)
from evaluation.policy import GatePolicy, Rule
from evaluation.verdict import Gate, Outcome

ALL = ""
"""The slice of all records."""
SHOWN = "shown only"
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Judged:
    """A gate, and what it cannot say."""

    gate: Gate
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """One slice of a gate that compares or bounds."""

    name: str
    n: int
    needed: int
    score: Score
    comparison: Comparison | None = None

    @property
    def enough(self) -> bool:
        """Whether it may decide."""
        return self.n >= self.needed

    @property
    def shown(self) -> str:
        """Its name in a sentence."""
        return self.name or "all records"


def slices_of(measured: Measurement, by: str) -> list[tuple[str, Flags]]:
    """All records, and each group in alphabetical order."""
    whole = (ALL, np.ones(measured.n, dtype=bool))
    if by == "whole":
        return [whole]
    group = np.array(measured.groups[by])
    return [whole, *((name, group == name) for name in sorted(set(group.tolist())))]


def unknown(rule: Rule, metric: Metric, why: str, *, failed: bool = False) -> Gate:
    """A gate without a measurement: undecided, or failed where it is the candidate that is broken."""
    sentence = f"{phrase(rule, metric)} is unknown: {why}" if not failed else why
    return Gate(
        rule.title,
        version_of(rule, metric),
        "failed" if failed else "undecided",
        sentence,
        bound_of(rule, metric),
        hard=rule.hard,
        data=rule.data,
    )


def judge(rule: Rule, metric: Metric, policy: GatePolicy, ours: Measurement, theirs: Measurement | None) -> Judged:
    """Judge a rule.

    Args:
        rule: what is asked.
        metric: its metric.
        policy: whose the least numbers of samples are.
        ours: of the candidate.
        theirs: of live or the base, where the rule compares.
    """
    problem = _problem(rule, metric, ours, theirs)
    if problem:
        return problem
    parts = _parts(rule, metric, policy, ours, theirs)
    nowhere = [part.shown for part in parts if not math.isfinite(part.score.value)]
    if nowhere:
        why = f"{metric.name} of the candidate is no finite number for {', '.join(nowhere)}"
        return Judged(unknown(rule, metric, why, failed=True))
    gate = {"reach": _reach, "beat": _beat, "hold": _hold}[rule.asks](rule, metric, ours, parts)
    notes = [ours.missing, theirs.missing if theirs else ""]
    said = [f"{rule.title}: {note}" for note in dict.fromkeys(notes) if note]
    if rule.asks == "hold":
        said += _blind(rule, metric, parts)
    return Judged(gate, tuple(said))


def _problem(rule: Rule, metric: Metric, ours: Measurement, theirs: Measurement | None) -> Judged | None:
    """What keeps a rule from being judged at all."""
    if ours.broken:
        why = f"{metric.name} of the candidate is broken: {ours.broken} of {ours.rows.size} values are NaN or infinite"
        return Judged(unknown(rule, metric, why, failed=True))
    why = ""
    if not ours.n:
        why = "it was measured on no record"
    elif rule.slice != "whole" and rule.slice not in ours.groups:
        why = f"{metric.name} cannot be told by {rule.slice}"
    elif theirs is not None and theirs.broken:
        why = f"{theirs.broken} of {theirs.rows.size} values of {_other(rule)} are NaN or infinite"
    elif theirs is not None and _shape(ours) != _shape(theirs):
        why = f"{_other(rule)} was measured on other records"
    return Judged(unknown(rule, metric, why)) if why else None


def _shape(measured: Measurement) -> tuple[object, ...]:
    """What two measurements must share to be paired."""
    return measured.rows.shape, {by: tuple(names) for by, names in measured.groups.items()}


def _parts(
    rule: Rule, metric: Metric, policy: GatePolicy, ours: Measurement, theirs: Measurement | None
) -> list[_Part]:
    parts = []
    for name, chosen in slices_of(ours, rule.slice):
        needed = 0 if ours.certain else policy.samples_of(rule, name)
        found = compare(ours, theirs, metric.better, chosen) if theirs is not None else None
        parts.append(_Part(name, int(chosen.sum()), needed, score(ours, chosen), found))
    return parts


# -- reach -------------------------------------------------------------------------------------------------------------


def _reach(rule: Rule, metric: Metric, ours: Measurement, parts: Sequence[_Part]) -> Gate:
    """Every slice must reach the bound; where chance is allowed for, surely."""
    small = [part for part in parts if not part.enough]
    outcomes = _reached(rule, metric, ours, parts)
    missed = [part for part, outcome in zip(parts, outcomes, strict=True) if outcome == "failed"]
    unsure = [part for part, outcome in zip(parts, outcomes, strict=True) if outcome == "undecided"]
    part = _worst(missed or unsure, metric) if missed or unsure else parts[0]
    value = part.score
    sentence = f"{metric.name} is {_value(value.value, metric)} on {_records(part)}"
    if rule.slice != "whole" and (missed or unsure):
        sentence = f"{metric.name} of {part.shown} is {_value(value.value, metric)} on {_records(part)}"
    if missed:
        sentence += f", must be {bound_of(rule, metric, certain=ours.certain)}"
    elif small:
        sentence += ", " + ", ".join(f"{one.needed} are needed to decide" for one in small[:1])
        if rule.slice != "whole":
            sentence += f"; too few: {', '.join(one.shown for one in small)}"
    elif unsure:
        sentence += f", which is neither surely above nor surely below {_value(rule.limit, metric)}"
    outcome: Outcome = "failed" if missed else "undecided" if unsure or small else "passed"
    se = None if ours.certain else value.se
    return _gate(rule, metric, ours, outcome, sentence, Score(value.value, se or 0.0, part.n), se=se)


def _reached(rule: Rule, metric: Metric, ours: Measurement, parts: Sequence[_Part]) -> list[Outcome]:
    """For each slice whether it reaches the bound; a slice with too few records never decides."""
    if rule.shown_only:
        return ["passed" if part.enough else "undecided" for part in parts]
    sign = 1.0 if metric.better == "higher" else -1.0
    if rule.chance is None or ours.certain:
        return [
            ("passed" if sign * (part.score.value - rule.limit) >= 0 else "failed") if part.enough else "undecided"
            for part in parts
        ]
    able = [part for part in parts if part.enough]
    surely = [_tail(part, rule.limit, sign, binary=ours.binary) for part in able]
    # To pass, every slice must: each may be tested at the full rate (Berger 1982). To fail, one is enough: Holm.
    missed = dict(zip((part.name for part in able), holm([under for _, under in surely]), strict=True))
    passed = {part.name: over for part, (over, _) in zip(able, surely, strict=True)}
    outcomes: list[Outcome] = []
    for part in parts:
        if not part.enough:
            outcomes.append("undecided")
        elif passed[part.name] <= rule.chance:
            outcomes.append("passed")
        else:
            outcomes.append("failed" if missed[part.name] <= rule.chance else "undecided")
    return outcomes


def _tail(part: _Part, bound: float, sign: float, *, binary: bool) -> tuple[float, float]:
    """How likely a value so good, and so bad, if the true one were just the bound."""
    if binary:
        high, low = p_reached(round(part.score.value * part.n), part.n, min(max(bound, 0.0), 1.0))
        return (high, low) if sign > 0 else (low, high)
    distance = sign * (part.score.value - bound)
    if part.score.se == 0:
        return (0.0, 1.0) if distance >= 0 else (1.0, 0.0)
    return _NORMAL.cdf(-distance / part.score.se), _NORMAL.cdf(distance / part.score.se)


# -- beat --------------------------------------------------------------------------------------------------------------


def _beat(rule: Rule, metric: Metric, ours: Measurement, parts: Sequence[_Part]) -> Gate:
    """A real gain in every slice."""
    small = [part for part in parts if not part.enough]
    missed = [part for part in parts if part.enough and not _gains(rule, part, certain=ours.certain)]
    told = _worst_gain(missed or parts)
    gain, p = _comparison(told).gain, _comparison(told).p_different
    where = "" if told.name == ALL else f" in {told.name}"
    sentence = f"{_prefix(metric)}{_change(gain.value, metric)} against {_other(rule)} on {_records(told)}{where}"
    if not ours.certain:
        sentence += f" (p {p_text(p)})"
    if missed:
        sentence += f", must be {bound_of(rule, metric, certain=ours.certain)}"
    elif small:
        sentence += f", {small[0].needed} are needed to decide"
    outcome: Outcome = "failed" if missed else "undecided" if small else "passed"
    return _gate(rule, metric, ours, outcome, sentence, gain, p=p, test=_comparison(told).test)


def _gains(rule: Rule, part: _Part, *, certain: bool) -> bool:
    found = _comparison(part)
    return found.gain.value > rule.limit and (certain or found.p_different <= (rule.chance or 0.0))


# -- hold --------------------------------------------------------------------------------------------------------------


def _hold(rule: Rule, metric: Metric, ours: Measurement, parts: Sequence[_Part]) -> Gate:
    """No slice may be worse by more than the bound and beyond chance; chance is shared by all slices (Holm)."""
    able = [part for part in parts if part.enough]
    small = [part for part in parts if not part.enough]
    p_of = _adjusted(able)
    lost = [
        part
        for part in able
        if -_comparison(part).gain.value > rule.limit and (ours.certain or p_of[part.name] <= (rule.chance or 0.0))
    ]
    told = _worst_gain(lost or parts)
    gain, p = _comparison(told).gain, p_of.get(told.name)
    if lost:
        names = ", ".join(_loss(part, p_of[part.name], metric, certain=ours.certain) for part in lost)
        sentence = f"{_verb(rule, metric)}: {names}"
    elif small:
        names = ", ".join(f"{part.shown} has {part.n} records, needs {part.needed}" for part in small)
        sentence = f"{phrase(rule, metric)} cannot be decided: {names}"
    else:
        held, least = f"{metric.name} is held", "worst"
        if metric.name == "accuracy":
            held, least = "nothing is forgotten", "lowest"
        sentence = f"{held} against {_other(rule)} ({least}: {told.shown} {_change(gain.value, metric)})"
    outcome: Outcome = "failed" if lost else "undecided" if small else "passed"
    drop = Score(-gain.value + 0.0, gain.se, gain.n)
    return _gate(rule, metric, ours, outcome, sentence, drop, p=p, test=_comparison(told).test)


def _adjusted(able: Sequence[_Part]) -> dict[str, float]:
    adjusted = holm([_comparison(part).p_worse for part in able])
    return {part.name: p for part, p in zip(able, adjusted, strict=True)}


def _loss(part: _Part, p: float, metric: Metric, *, certain: bool) -> str:
    said = f"{part.shown} {_change(_comparison(part).gain.value, metric)}"
    return said if certain else f"{said} (p {p_text(p)})"


def _blind(rule: Rule, metric: Metric, parts: Sequence[_Part]) -> list[str]:
    """Losses that are not allowed and that so few records cannot show; known where the test is exact."""
    able = [part for part in parts if part.enough]
    if rule.chance is None or not able or any(_comparison(part).test != MCNEMAR for part in able):
        return []
    seen = [(part, smallest_visible_drop(part.n, len(able), rule.chance)) for part in able]
    blind = [f"{part.shown} under {100 * least:.1f}" for part, least in seen if least > rule.limit]
    what = "small drops" if metric.name == "accuracy" else f"small losses of {metric.name}"
    said = f"{what} against {_other(rule)}, for want of records (in points): {', '.join(blind)}"
    return [said] if blind else []


# -- words -------------------------------------------------------------------------------------------------------------


def _gate(
    rule: Rule,
    metric: Metric,
    ours: Measurement,
    outcome: Outcome,
    sentence: str,
    found: Score,
    *,
    p: float | None = None,
    se: float | None = None,
    test: str = "",
) -> Gate:
    """The gate of a rule; gains and losses of shares are told in percentage points."""
    compared = rule.asks != "reach"
    points = 100.0 if compared and metric.unit == "share" else 1.0
    shown_se = (None if ours.certain else points * found.se) if compared else se
    return Gate(
        rule.title,
        version_of(rule, metric, ours, test),
        outcome,
        sentence,
        bound_of(rule, metric, certain=ours.certain),
        points * found.value,
        shown_se,
        found.n,
        p if compared and not ours.certain else None,
        rule.hard,
        rule.data,
    )


def version_of(rule: Rule, metric: Metric, ours: Measurement | None = None, test: str = "") -> str:
    """The metric's version, and that of the test where there is one."""
    version = ours.version if ours is not None and ours.version else metric.version
    if not test or test == "none":
        return version
    return f"{version}, {test} " + ("two-sided" if rule.asks == "beat" else "one-sided holm")


def bound_of(rule: Rule, metric: Metric, *, certain: bool = False) -> str:
    """What passes, in words; a figure without sampling error leaves nothing to chance."""
    if rule.shown_only:
        return SHOWN
    if rule.asks == "reach":
        sign = ">=" if metric.better == "higher" else "<="
        surely = "" if rule.chance is None or certain else f" beyond chance, p <= {rule.chance:g}"
        return f"{sign} {_value(rule.limit, metric)}{surely}"
    amount = f"{100 * rule.limit:g} points" if metric.unit == "share" else f"{rule.limit:g} {metric.unit}"
    if rule.asks == "beat":
        gain = f"gain > {amount if rule.limit else '0'}"
        return gain if certain else f"{gain}, p <= {rule.chance:g}"
    return f"drop <= {amount}" if certain else f"drop <= {amount}, or p > {rule.chance:g} after Holm"


def phrase(rule: Rule, metric: Metric) -> str:
    """What a gate is about, as the subject of a sentence."""
    if rule.asks == "reach":
        return metric.name
    if metric.name == "accuracy":
        return "forgetting" if rule.asks == "hold" and rule.against == "live" else f"the gain over {_other(rule)}"
    return f"{metric.name} against {_other(rule)}"


def _verb(rule: Rule, metric: Metric) -> str:
    if metric.name == "accuracy":
        return f"it forgets against {_other(rule)}"
    return f"{metric.name} is worse than of {_other(rule)}"


def _other(rule: Rule) -> str:
    return "the base" if rule.against == "base" else "live"


def _prefix(metric: Metric) -> str:
    return "" if metric.name == "accuracy" else f"{metric.name} "


def _records(part: _Part) -> str:
    return f"{part.n} records"


def _value(value: float, metric: Metric) -> str:
    return f"{value:.3f}" if metric.unit == "share" else f"{value:.4g} {metric.unit}"


def _change(gain: float, metric: Metric) -> str:
    """A gain: signed where more is better, else as how much lower or higher the candidate is."""
    amount, unit = (100 * gain, "points") if metric.unit == "share" else (gain, metric.unit)
    digits = ".1f" if metric.unit == "share" else ".3g"
    if metric.better == "higher":
        return f"{amount:+{digits}} {unit}"
    if gain == 0:
        return "the same"
    return f"{abs(amount):{digits}} {unit} {'lower' if gain > 0 else 'higher'}"


def p_text(p: float | None) -> str:
    """A p-value as it is read: 3 digits, or its order of magnitude."""
    if p is None:
        return "unknown"
    least = 0.001
    return f"{p:.3f}" if p >= least else f"< 1e{math.ceil(math.log10(p)) if p else -300}"


def _comparison(part: _Part) -> Comparison:
    assert part.comparison is not None  # noqa: S101 - beat and hold always compare
    return part.comparison


def _worst_gain(parts: Iterable[_Part]) -> _Part:
    return min(parts, key=lambda part: _comparison(part).gain.value)


def _worst(parts: Iterable[_Part], metric: Metric) -> _Part:
    sign = 1.0 if metric.better == "higher" else -1.0
    return min(parts, key=lambda part: sign * part.score.value)
