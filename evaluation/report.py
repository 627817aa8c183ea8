"""What a person reads before approving, in a minute: markdown for the version's page, and one plot.

Everything else is on the page that `evaluation.page` makes. MLflow renders tables, images of the run's artifacts, and
links; plot and page are linked as `accuracy.png` and `report.html`, by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from evaluation.continual import Memory
from evaluation.metrics import Score
from evaluation.private import PrivateScores, PrivateSlice, slices_of
from evaluation.verdict import Evaluation, Gate, ModelScores

if TYPE_CHECKING:
    from learner.base import Base

PLOT_NAME = "accuracy.png"
PAGE_NAME = "report.html"
# Signs that every font has, unlike the coloured ones.
_SEEN = {"passed": "✓ passed", "failed": "✗ FAILED", "undecided": "? undecided"}
_ORDER = ("failed", "undecided", "passed")
# A page is for judging, not for archives: the plan, a tag of the version, lists every block.
_BLOCKS_SHOWN = 12
# Okabe and Ito's palette: told apart with every form of colour blindness; markers differ too.
_STYLE = (("candidate", "#0072B2", "o"), ("live", "#E69F00", "s"), ("base", "#000000", "^"))
# Half the width of a 95% interval, in standard errors.
_Z95 = 1.96


def version_markdown(
    evaluation: Evaluation,
    *,
    data_revision: str,
    blocks: Sequence[str],
    parent: str,
    base: Base,
    round_id: str = "",
    kept: Memory | None = None,
) -> str:
    """The evidence on one candidate: the verdict, what changed against live, the gates.

    Args:
        evaluation: what was found.
        data_revision: commit of the data repository the round read.
        blocks: ids of the blocks it trained on.
        parent: what it was trained from, in words.
        base: the base model.
        round_id: what made it; empty where no round did.
        kept: what its line of versions has kept; None when it could not be scored.
    """
    parts = (
        _verdict(evaluation),
        _domains(evaluation),
        _gates(evaluation),
        _spent(evaluation),
        _origin(data_revision, blocks, parent, base, round_id),
        *(() if kept is None else (_remembered(kept),)),
        *(() if evaluation.private is None else (_privately(evaluation.private),)),
        _not_measured(evaluation),
    )
    return "\n\n".join(parts) + "\n"


def plot_png(evaluation: Evaluation) -> bytes:
    """Accuracy of candidate, live and base on every slice, with 95% intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    slices = evaluation.slices
    figure = Figure(figsize=(6.6, 1.6 + 0.5 * len(slices)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for lane, (name, colour, marker) in enumerate(_STYLE):
        shown = [(row, part, scores) for row, part in enumerate(slices) if (scores := getattr(part, name))]
        axes.errorbar(
            [100 * scores.accuracy.value for _, _, scores in shown],
            [row + (lane - 1) * 0.22 for row, _, _ in shown],  # beside each other, so that none hides another
            xerr=[100 * _Z95 * scores.accuracy.se for _, _, scores in shown],
            fmt=marker,
            color=colour,
            markersize=6,
            capsize=3,
            label=name if shown else f"{name} (none)",
        )
    for row, part in enumerate(slices):
        ends = (row - 0.4, row + 0.4)
        axes.plot([100 * part.majority] * 2, ends, color="#999999", ls=":", label="" if row else "majority label")
    axes.axhline(0.5, color="#cccccc", linewidth=0.8)
    axes.set_yticks(range(len(slices)), [f"{part.domain or 'all records'}\nn = {part.n}" for part in slices])
    axes.set_ylim(len(slices) - 0.4, -0.6)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("accuracy, % (bars: 95% interval)")
    axes.set_title(f"{evaluation.gate_set['name']} (public): {evaluation.outcome}", loc="left")
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    out = BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _verdict(evaluation: Evaluation) -> str:
    head = {
        "passed": "✓ Passed: a person may approve it",
        "failed": "✗ Failed: it cannot be promoted",
        "undecided": "? Undecided: too little is known to promote it",
    }[evaluation.outcome]
    if evaluation.facts.unprotected:
        head += "; trained WITHOUT PRIVACY"
    why = "; ".join(_safe(reason) for reason in evaluation.reasons)
    # A heading by the line below it: MLflow's list of versions shows the first words of this, markup and all.
    return (
        f"{head}\n---\n\n{why[:1].upper()}{why[1:]}.\n\n{_in_short(evaluation)}"
        f"[The whole report: charts, examples, every number]({PAGE_NAME})\n\n"
        f"![Accuracy by domain]({PLOT_NAME})"
    )


def _in_short(evaluation: Evaluation) -> str:
    """The same for somebody who trains no models; nothing where the candidate's answers were not scored."""
    whole = next((part for part in evaluation.slices if not part.domain), None)
    if whole is None or whole.candidate is None:
        return ""
    told = [f"it answers **{_percent(whole.candidate)} as expected**"]
    told += [f"the live version {_percent(whole.live)}"] if whole.live else []
    told += [f"the bare base {_percent(whole.base)}"] if whole.base else []
    return f"In short: of {whole.n} public questions {', '.join(told)}.\n\n"


def _percent(scores: ModelScores) -> str:
    return f"{100 * scores.accuracy.value:.0f}%"


def _domains(evaluation: Evaluation) -> str:
    """What changed against live; against the base while nothing is live."""
    other = "live" if any(part.live for part in evaluation.slices) else "base"
    lines = [
        f"### Against {'live' if other == 'live' else 'the base'}",
        "",
        "Accuracy in % ± standard error, change in points.",
        "",
        f"| domain | records | {other} | candidate | change |",
        "|---|---:|---:|---:|---:|",
    ]
    for part in evaluation.slices:
        gain = part.gain_over_live if other == "live" else part.gain_over_base
        cells = (
            _safe(part.domain) if part.domain else "**all records**",
            str(part.n),
            _scores(part.live if other == "live" else part.base),
            _scores(part.candidate),
            f"{100 * gain.value:+.1f} ± {100 * gain.se:.1f}" if gain else "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gates(evaluation: Evaluation) -> str:
    """The gates that decide, what stopped it first; the others are counted."""
    decide = sorted((gate for gate in evaluation.gates if gate.hard), key=lambda gate: _ORDER.index(gate.outcome))
    shown = len(evaluation.gates) - len(decide)
    gate_set = evaluation.gate_set
    told = f"Gate set {_code(str(gate_set['name']))}: {gate_set['data']}, {gate_set['n']} records."
    if shown:
        told += f" {shown} more, only shown, are in the whole report."
    lines = ["### Gates", "", "| gate | result | value | must be |", "|---|---|---:|---|"]
    return "\n".join([*lines, *(_gate_row(gate) for gate in decide), "", told])


def _gate_row(gate: Gate) -> str:
    value = _number(gate.value) + ("" if gate.se is None else f" ± {gate.se:.2g}")
    cells = (gate.name.replace("_", " "), _SEEN[gate.outcome], value, gate.bound)
    return "| " + " | ".join(_safe(cell) for cell in cells) + " |"


def _remembered(kept: Memory) -> str:
    """Average accuracy, backward transfer and forgetting along the version's ancestry."""
    average = "-" if kept.average_accuracy is None else f"{100 * kept.average_accuracy:.1f}"
    head = f"### What its line of versions has kept\n\nAverage accuracy over the domains: {average}%."
    if kept.backward_transfer is None:
        return f"{head} It has no ancestor that was judged on this gate set: there is nothing to forget yet."
    lost = ", ".join(f"{_safe(domain)} {100 * value:+.1f}" for domain, value in kept.forgetting.items())
    return (
        f"{head} Backward transfer, since a domain was first judged: {100 * kept.backward_transfer:+.1f} points. "
        f"Forgetting, against the best of its ancestors (below zero: it is the best), in points: {lost}."
    )


def _spent(evaluation: Evaluation) -> str:
    facts = evaluation.facts
    if facts.unprotected:
        return (
            "### What was spent\n\n"
            "**WITHOUT PRIVACY: nothing was clipped, no noise was added, and nothing is promised to anybody "
            "(privacy.enabled=false).** It can be promoted only where nobody of the stream was ever promised any."
        )
    if not facts.private:
        return (
            "### What was spent\n\n"
            "**Test noise: this round guarantees no privacy at all (epsilon is infinite).** "
            "It can never be promoted."
        )
    return (
        "### What was spent\n\n"
        "| sealed guarantee | protects one | share of the fullest block's budget used |\n|---|---|---:|\n"
        f"| epsilon {facts.epsilon:g}, delta {facts.delta:g} | {_safe(facts.unit)} "
        f"| {100 * facts.share_used:.1f}% |\n\n"
        + (f"Promised: {_safe(facts.promise)}. " if facts.promise else "")
        + "It holds over every round that uses these blocks. **Rejecting the version gives nothing back**: "
        "its round is paid for."
    )


def _privately(scores: PrivateScores) -> str:
    """Scores on the holdout: the figures that the noisy counts give, and what is left of the account."""
    head = "### On the stream's own holdout"
    if scores.counts is None:
        return f"{head}\n\nNot released: {_safe(scores.refusal)}."
    told = (
        f"Noisy counts, sigma {scores.counts.sigma:g}, one vote a {scores.counts.unit}; each ± is one standard error, "
        f"of sampling and noise together. Charged to the holdouts of {len(scores.blocks)} blocks as "
        f"{_code(scores.charge_id or '')}; {scores.evaluations_left} more such evaluations can be paid."
    )
    lines = [
        head,
        "",
        "| slice | votes (noisy) | live | candidate | gain over live |",
        "|---|---:|---:|---:|---:|",
        *(_private_row(part) for part in slices_of(scores.counts, 1, 1)),
        "",
        told,
    ]
    return "\n".join(lines)


def _private_row(part: PrivateSlice) -> str:
    def cell(score: Score | None) -> str:
        return "-" if score is None else f"{100 * score.value:+.1f} ± {100 * score.se:.1f}"

    def share(score: Score | None) -> str:
        return cell(score).removeprefix("+")

    name = _safe(part.domain) if part.domain else "**all together**"
    votes = f"{part.n} ± {part.noise:.0f}"
    return "| " + " | ".join((name, votes, share(part.live), share(part.candidate), cell(part.gain))) + " |"


def _origin(revision: str, blocks: Sequence[str], parent: str, base: Base, round_id: str) -> str:
    shown = ", ".join(_code(block) for block in blocks[:_BLOCKS_SHOWN])
    more = f" and {len(blocks) - _BLOCKS_SHOWN} more" if len(blocks) > _BLOCKS_SHOWN else ""
    return "\n".join(
        (
            "### Where it comes from",
            "",
            "| | |",
            "|---|---|",
            *([f"| made by | round {_code(round_id)} |"] if round_id else []),
            f"| data revision | {_code(revision)} |",
            f"| blocks ({len(blocks)}) | {shown}{more} |",
            f"| trained from | {_safe(parent)} |",
            f"| base model | {_safe(base.name)}, licence {_safe(base.licence)} |",
        )
    )


def _not_measured(evaluation: Evaluation) -> str:
    return "### Not measured\n\n" + "\n".join(f"- {_safe(line)}" for line in evaluation.not_measured)


def _scores(scores: ModelScores | None) -> str:
    return "-" if scores is None else f"{100 * scores.accuracy.value:.1f} ± {100 * scores.accuracy.se:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _safe(text: str) -> str:
    """Text that came from outside, such as a block's id or an engine's message: it must not become markup.

    MLflow's renderer takes `<` for markup although it is escaped by a backslash, so that is an entity.
    """
    plain = " ".join(text.split()).replace("<=", "≤").replace(">=", "≥")
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", plain.replace("&", "&amp;").replace("<", "&lt;"))


def _code(text: str) -> str:
    """The same as a code span, in which backslashes are no escapes."""
    return f"`{re.sub(r'[`|]', '_', ' '.join(text.split()))}`"
