"""How a candidate's line of versions came along: accuracy and forgetting by domain, share of the filter used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from evaluation.charts import Axis, bars, lines
from evaluation.continual import Memory
from evaluation.markup import figure, paragraph, section, table
from evaluation.verdict import Evaluation

# Versions that are drawn: the newest; a phone has room for no more.
_PAST_SHOWN = 12
_MISSING = "-"


@dataclass(frozen=True)
class Past:
    """One version of the candidate's line, judged on the same gate set.

    Attributes:
        name: what it is called, such as "version 3".
        accuracy: by domain, shares.
        share_used: of the fullest block's filter when it was judged; None where that is not known.
    """

    name: str
    accuracy: Mapping[str, float]
    share_used: float | None


def over_the_rounds(evaluation: Evaluation, past: Sequence[Past], kept: Memory | None) -> Markup:
    """The section.

    Args:
        evaluation: of the candidate.
        past: its line of versions, oldest first, itself left out.
        kept: what the line has kept; None when it could not be scored.
    """
    now = {part.domain: part.candidate.accuracy.value for part in evaluation.slices if part.domain and part.candidate}
    used = evaluation.facts.share_used if evaluation.facts.private else None  # of nothing, with noise that hides nobody
    line = (*past[-_PAST_SHOWN:], Past("this one", now, used))
    if not past:
        first = paragraph("It is the first of its line on this gate set: there is nothing to forget yet.")
        return section("Over the rounds", first, _filter(line))
    return section("Over the rounds", _history(now, line), _forgetting(kept), _filter(line))


def _history(now: Mapping[str, float], line: Sequence[Past]) -> Markup:
    """Accuracy by domain, version by version."""
    series = {
        domain: [100 * past.accuracy[domain] if domain in past.accuracy else None for past in line] for domain in now
    }
    values = [value for row in series.values() for value in row if value is not None]
    if not values:
        return paragraph("The candidate's answers were not scored.")
    axis = Axis(max(0.0, min(values) - 2), min(100.0, max(values) + 2), "percent")
    rows = [
        (domain, *(_MISSING if value is None else f"{value:.1f}" for value in row)) for domain, row in series.items()
    ]
    return figure(
        lines(
            "Accuracy by domain over the rounds",
            "; ".join(f"{row[0]}: {', '.join(row[1:])}" for row in rows),
            series,
            axis,
        ),
        f"Accuracy over {len(line)} versions, oldest left; each row reaches from {axis.low:.0f} to {axis.high:.0f} "
        "percent. The number is the candidate's.",
        table(
            "Accuracy in percent.",
            ("domain", *(past.name for past in line)),
            rows,
            numbers=range(1, len(line) + 1),
        ),
    )


def _forgetting(kept: Memory | None) -> Markup:
    if kept is None or not kept.forgetting:
        return Markup("")
    points = {domain: 100 * value for domain, value in kept.forgetting.items()}
    drawn = {domain: ("worse" if value > 0 else "better", value) for domain, value in points.items()}
    rows = [(domain, f"{value:+.1f}") for domain, value in points.items()]
    says = "; ".join(": ".join(row) for row in rows)
    told = []
    if kept.average_accuracy is not None:
        told.append(f"Average accuracy over the domains: {100 * kept.average_accuracy:.1f}%.")
    if kept.backward_transfer is not None:
        told.append(
            f"Backward transfer, the change since it was first judged: {100 * kept.backward_transfer:+.1f} points."
        )
    return Markup("{}\n{}").format(
        figure(
            bars(
                "Forgetting by domain",
                says,
                drawn,
                Axis(min(0.0, *points.values()), max(5.0, *points.values()), "points"),
            ),
            "Forgetting: what the best of its ancestors did better. Below nought it is itself the best.",
            table("In points.", ("domain", "forgetting"), rows, numbers=(1,)),
        ),
        paragraph(" ".join(told)),
    )


def _filter(line: Sequence[Past]) -> Markup:
    """Share of the fullest block's filter, version by version."""
    known = {past.name: 100 * past.share_used for past in line if past.share_used is not None}
    if not known:
        return Markup("")
    rows = [(name, f"{value:.1f}") for name, value in known.items()]
    return figure(
        bars(
            "Share of the filter used",
            "; ".join(f"{name}: {value} percent" for name, value in rows),
            {name: ("used", value) for name, value in known.items()},
            Axis(0, 100, "percent"),
        ),
        "Share of the fullest block's privacy filter that was used when each version was judged.",
        table("In percent.", ("version", "used"), rows, numbers=(1,)),
    )
