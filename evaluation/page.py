"""The evidence on one candidate as one web page (`evaluation.markup` says what kind of page).

What decides comes first: the verdict with its reasons, then the change against live, then the gates; then what a person
asks next. Nothing is computed here: the page shows an `Evaluation`, which holds exact figures of public sets, noisy
counts of the private holdout that were paid for, and facts of the ledger. No private record and no private statistic
can reach it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from evaluation.charts import Axis, Mark, bars, dots
from evaluation.continual import Memory
from evaluation.history import Past, over_the_rounds
from evaluation.markup import Cell, document, figure, items, more, pairs, paragraph, section, table
from evaluation.metrics import Score
from evaluation.private import PrivateScores, slices_of
from evaluation.verdict import Evaluation, Figure, Gate, Slice

if TYPE_CHECKING:
    from evaluation.examples import Example
    from learner.base import Base

# Characters of a text that an example shows: enough to judge it by.
_TEXT_CHARS = 600
_HEAD = {
    "passed": ("✓", "Passed: a person may approve it"),
    "failed": ("✗", "Failed: it cannot be promoted"),
    "undecided": ("?", "Undecided: too little is known to promote it"),
}
# A gate's outcome in words, and how it stands out. A gate that is only shown decides nothing, and does not.
_RESULT = {"passed": ("passed", "good"), "failed": ("FAILED", "bad"), "undecided": ("undecided", "unsure")}
_SHOWN = {"passed": "yes", "failed": "no", "undecided": "unknown"}
_ROLES = ("candidate", "live", "base")
_NAMED = {"live": "live", "base": "the base"}
_LATENCIES = ("latency_p50", "latency_p95")
_NONE = "-"


@dataclass(frozen=True)
class Origin:
    """Where a candidate comes from.

    Attributes:
        round_id: of the round that made it.
        made_at: when it was judged, RFC 3339.
        data_revision: commit of the data repository that the round read.
        blocks: ids of those it trained on.
        parent: what it was trained from, in words.
        base: the base model.
        past: its line of versions, oldest first, itself left out.
        kept: what the line has kept; None when it could not be scored.
    """

    stream: str
    round_id: str
    made_at: str
    data_revision: str
    blocks: Sequence[str]
    parent: str
    base: Base
    past: Sequence[Past] = ()
    kept: Memory | None = None


def version_page(evaluation: Evaluation, origin: Origin) -> str:
    """The page, as HTML."""
    parts = (
        _verdict(evaluation, origin),
        _compared(evaluation),
        _gates(evaluation.gates),
        over_the_rounds(evaluation, origin.past, origin.kept),
        _latency(evaluation.figures),
        _metrics(evaluation.figures),
        *(() if evaluation.private is None else (_holdout(evaluation.private),)),
        _examples(evaluation.examples),
        _spent(evaluation),
        section("Not measured, and why", items(evaluation.not_measured)),
        _origin(evaluation, origin),
    )
    return document(f"{origin.stream}, {origin.round_id}: {evaluation.outcome}", parts)


# What decides


def _verdict(evaluation: Evaluation, origin: Origin) -> Markup:
    sign, head = _HEAD[evaluation.outcome]
    head += "; trained WITHOUT PRIVACY" if evaluation.facts.unprotected else ""
    return Markup(
        '<header class="{}"><p class="of">{} · {}</p><h1><span aria-hidden="true">{}</span> {}</h1>{}</header>'
    ).format(
        evaluation.outcome,
        origin.stream,
        origin.round_id,
        sign,
        head,
        items(reason[:1].upper() + reason[1:] for reason in evaluation.reasons),
    )


def _compared(evaluation: Evaluation) -> Markup:
    """Accuracy by domain with its change against live; against the base while nothing is live."""
    slices = evaluation.slices
    other = "live" if any(part.live for part in slices) else "base"
    named = _NAMED[other]
    if not any(part.candidate for part in slices):
        return section(f"Against {named}", paragraph("The candidate's answers were not scored."))
    present = [role for role in _ROLES if any(getattr(part, role) for part in slices)]
    marks = {
        _domain(part): [
            Mark(role, 100 * scores.accuracy.value, 100 * scores.accuracy.se)
            for role in present
            if (scores := getattr(part, role))
        ]
        for part in slices
    }
    gains = {_domain(part): part.gain_over_live if other == "live" else part.gain_over_base for part in slices}
    says = "; ".join(
        f"{_domain(part)}: {named} {_accuracy(part, other)}, candidate {_accuracy(part, 'candidate')}"
        for part in slices
    )
    numbers = [
        (_domain(part), str(part.n), *(_accuracy(part, role) for role in present), f"{100 * part.majority:.1f}")
        for part in slices
    ]
    return section(
        f"Against {named}",
        table(
            f"Accuracy in percent, and its change in points; ± one standard error. "
            f"Public gate set {evaluation.gate_set['name']}.",
            ("domain", named, "candidate", "change"),
            [
                (_domain(part), _accuracy(part, other), _accuracy(part, "candidate"), _change(gains[_domain(part)]))
                for part in slices
            ],
            numbers=(1, 2, 3),
        ),
        figure(
            dots("Accuracy by domain", says, marks, Axis(0, 100, "percent")),
            "Accuracy by domain with 95% intervals; the number is the candidate's.",
            table(
                "Accuracy in percent, ± one standard error; majority: what always saying the likeliest label gets.",
                ("domain", "records", *present, "majority"),
                numbers,
                numbers=range(1, len(present) + 3),
            ),
            present,
        ),
    )


def _gates(gates: Sequence[Gate]) -> Markup:
    def order(gate: Gate) -> tuple[bool, int]:
        return not gate.hard, ("failed", "undecided", "passed").index(gate.outcome)

    def result(gate: Gate) -> Cell:
        word, kind = _RESULT[gate.outcome]
        return Markup('<strong class="{}">{}</strong>').format(kind, word) if gate.hard else _SHOWN[gate.outcome]

    rows = [
        (_words(gate.name) + ("" if gate.hard else " (shown only)"), result(gate), gate.sentence)
        for gate in sorted(gates, key=order)
    ]
    count = [
        (
            _words(gate.name),
            gate.data,
            _number(gate.value),
            _number(gate.se),
            _NONE if gate.n is None else str(gate.n),
            _number(gate.p),
            gate.bound,
            gate.version,
        )
        for gate in gates
    ]
    return section(
        "Gates",
        table("What had to be shown; what stopped it comes first.", ("gate", "result", "what was found"), rows),
        more(
            "Every number of the gates",
            table(
                "Gains and drops of shares are in points.",
                ("gate", "data", "value", "± se", "n", "p", "must be", "metric"),
                count,
                numbers=(2, 3, 4, 5),
            ),
        ),
    )


# What else was measured


def _latency(figures: Sequence[Figure]) -> Markup:
    found = [one for one in figures if one.metric in _LATENCIES and not one.domain]
    if not found:
        return section("Latency", paragraph("Not measured: no gate that was reached asks for it."))
    seconds = {f"{one.role} {one.metric.removeprefix('latency_')}": (one.role, one.score.value) for one in found}
    rows = [(name, f"{value:.3g}") for name, (_, value) in seconds.items()]
    return section(
        "Latency",
        figure(
            bars(
                "Latency",
                "; ".join(f"{name}: {value} seconds" for name, value in rows),
                seconds,
                Axis(0, 1.1 * max(value for _, value in seconds.values()), "s"),
            ),
            "Seconds of an answer, asked one at a time: half of them took at most p50, 95% at most p95.",
            table("In seconds.", ("model", "latency"), rows, numbers=(1,)),
        ),
    )


def _metrics(figures: Sequence[Figure]) -> Markup:
    """Every metric over all records."""
    found: dict[tuple[str, str, str], dict[str, Figure]] = {}
    for one in figures:
        if not one.domain:
            about = [f"{name} {value}" for name, value in sorted(one.options.items())]
            about += [one.unit] if one.unit not in {"share", one.metric} else []
            about += ["less is better"] if one.better == "lower" else []
            called = _words(one.metric) + (f" ({', '.join(about)})" if about else "")
            found.setdefault((called, one.unit, one.version), {})[one.role] = one
    if not found:
        return section("Every metric", paragraph("None could be measured."))
    other = "live" if any("live" in roles for roles in found.values()) else "base"
    present = ("live", "candidate", "base") if other == "live" else ("base", "candidate")
    rows = []
    for (called, unit, _), roles in found.items():
        scores = (_score(roles[role].score if role in roles else None, unit) for role in present)
        rows.append((called, *scores, _difference(roles.get("candidate"), roles.get(other))))
    return section(
        "Every metric",
        table(
            f"Over all records, ± one standard error; shares in percent. The change against {_NAMED[other]} is a plain "
            "difference: whether it is more than chance, the gates say.",
            ("metric", *present, "change"),
            rows,
            numbers=range(1, len(present) + 2),
        ),
    )


def _difference(ours: Figure | None, theirs: Figure | None) -> str:
    if ours is None or theirs is None:
        return _NONE
    change = ours.score.value - theirs.score.value
    return f"{100 * change:+.1f}" if ours.unit == "share" else f"{change:+.3g}"


def _holdout(scores: PrivateScores) -> Markup:
    head = "On the stream's own holdout"
    if scores.counts is None:
        return section(head, paragraph(f"Not released: {scores.refusal}."))
    rows = [
        (
            part.domain or "all together",
            _score(part.live, "share"),
            _score(part.candidate, "share"),
            _change(part.gain),
            f"{part.n} ± {part.noise:.0f}",
        )
        for part in slices_of(scores.counts, 1, 1)
    ]
    return section(
        head,
        table(
            "Accuracy in percent, and votes, from noisy counts; ± one standard error, of sampling and noise together.",
            ("slice", "live", "candidate", "change", "votes"),
            rows,
            numbers=(1, 2, 3, 4),
        ),
        paragraph(
            f"Noise of standard deviation {scores.counts.sigma:g} on each count, one vote a {scores.counts.unit}, "
            f"charged as {scores.charge_id or ''}; {scores.evaluations_left} more such evaluations can be paid."
        ),
    )


def _examples(examples: Sequence[Example]) -> Markup:
    if not examples:
        return section("Examples", paragraph("None: there is nothing to set side by side."))
    parts = [paragraph("Of the public gate set; no private record is shown anywhere.")]
    for kind in dict.fromkeys(one.kind for one in examples):
        parts.append(Markup("<h3>{}</h3>").format(kind[:1].upper() + kind[1:]))
        parts += [_beside(one) for one in examples if one.kind == kind]
    return section("Examples", *parts)


def _beside(one: Example) -> Markup:
    cells = ((f"prompt ({one.domain})", _clipped(one.prompt)), ("expected", _clipped(one.expected)), *_said(one))
    said = Markup("").join(Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(*cell) for cell in cells)
    return Markup('<dl class="beside">{}</dl>').format(said)


def _said(one: Example) -> Iterator[tuple[str, str]]:
    """What each model writes, and its likeliest label where that is another."""
    for role, text in one.written.items():
        written, chosen = text.strip() or "(nothing)", one.chosen[role].strip()
        yield role, _clipped(written) + ("" if written == chosen else f"\nlikeliest label: {_clipped(chosen)}")


# Where it stands


def _spent(evaluation: Evaluation) -> Markup:
    facts = evaluation.facts
    if facts.unprotected:
        warning = Markup('<strong class="bad">{}</strong> It is only for streams that never promised any.').format(
            "WITHOUT PRIVACY: nothing was clipped, no noise was added, nothing is promised (privacy.enabled=false)."
        )
        return section("What was spent", paragraph(warning))
    if not facts.private:
        warning = Markup('<strong class="bad">{}</strong> It can never be promoted.').format(
            "Test noise: this round guarantees no privacy at all (epsilon is infinite)."
        )
        return section("What was spent", paragraph(warning))
    rows = [
        ("guarantee", f"epsilon {facts.epsilon:g}, delta {facts.delta:g}"),
        ("protects one", facts.unit),
        ("share of the fullest block's filter used", f"{100 * facts.share_used:.1f}%"),
        *([("promised", facts.promise)] if facts.promise else []),
    ]
    held = "It was sealed with the blocks and holds over every round that uses them; the signed receipt is a tag."
    return section("What was spent", pairs("The sealed guarantee.", rows), paragraph(held))


def _origin(evaluation: Evaluation, origin: Origin) -> Markup:
    gate_set, base = evaluation.gate_set, origin.base
    rows = [
        ("data revision", origin.data_revision),
        (f"blocks ({len(origin.blocks)})", ", ".join(origin.blocks)),
        ("trained from", origin.parent),
        ("base model", f"{base.name}, licence {base.licence}, from {base.provenance.get('source', 'unknown')}"),
        ("base sha256", base.sha256),
        ("adapter sha256", evaluation.facts.adapter_sha256),
        ("gate set", f"{gate_set['name']}: {gate_set['data']}, {gate_set['n']} records"),
        ("gate set sha256", str(gate_set["sha256"])),
        ("gate policy sha256", evaluation.policy_sha256),
        ("judged at", origin.made_at),
    ]
    note = "This page is for reading. What the registry trusts is the signed verdict, a tag of the version."
    return section("Where it comes from", pairs("What this version was made of.", rows), paragraph(note))


# Words and numbers


def _domain(part: Slice) -> str:
    return part.domain or "all records"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _clipped(text: str) -> str:
    return text if len(text) <= _TEXT_CHARS else text[:_TEXT_CHARS] + "…"


def _accuracy(part: Slice, role: str) -> str:
    scores = getattr(part, role)
    return _score(scores.accuracy if scores else None, "share")


def _score(score: Score | None, unit: str) -> str:
    if score is None:
        return _NONE
    if unit == "share":
        return f"{100 * score.value:.1f} ± {100 * score.se:.1f}"
    return f"{score.value:.4g} ± {score.se:.2g}"


def _change(gain: Score | None) -> str:
    return _NONE if gain is None else f"{100 * gain.value:+.1f} ± {100 * gain.se:.1f}"


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3g}"
