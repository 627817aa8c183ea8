"""STATEMENT.md: what an export proves, in sentences a lawyer can quote. Generated, so that nobody words it by hand."""

from __future__ import annotations

from collections.abc import Mapping

from privacy.audit import AuditReport, BlockAudit
from privacy.export import Evidence
from privacy.policy import NONE
from privacy.receipts import ADJACENCY

_UNITS = {
    "record": "one record: all deliveries of one pair of user id and event id",
    "user": "one user: all records with one user id",
}
# docs/privacy.md, 'What is not protected', a clause each.
_NOT_PROTECTED = (
    "rounding of floating-point numbers, which the theorems do not know of",
    "settings that somebody chose after reading the private records",
    "whoever can watch the training machine, or read its disk and its keys",
    "facts about groups, which are learnt, and are meant to be",
    "a person behind several user ids, and the other records of a person where the unit is one record",
    "what was declared public: gate set, labels, domains, settings; and what the base model memorised before",
)


def statement(evidence: Evidence, streams: Mapping[str, AuditReport]) -> str:
    """The text; a function of the export's other files alone.

    Args:
        evidence: what has been verified.
        streams: what its rows add up to, by stream.
    """
    parts = ["# Statement of what was promised, and of what was spent", _preface(evidence)]
    parts += [_stream(report) for _, report in sorted(streams.items())] or ["No block is sealed: nothing was spent."]
    parts += [_released(evidence), _not_protected(), _heads(evidence), _keys(evidence)]
    return "\n\n".join(parts) + "\n"


def _preface(evidence: Evidence) -> str:
    return (
        f"This text was generated from the {len(evidence.rows)} rows of a privacy ledger, {len(evidence.rounds)} "
        f"signed receipts and {len(evidence.approvals)} signed approvals, after all of them had been verified. It is "
        f"worth as much as that verification: run `tidegate audit --verify` on this folder, with public keys that you "
        f"got by another way.\n\n"
        f"**Definition.** A released value is (epsilon, delta)-differentially private if, for any two inputs that are "
        f"equal except that everything of one unit is left out ({ADJACENCY}), and for any set of values, the chance to "
        f"see one of them differs by at most the factor exp(epsilon), plus delta."
    )


def _stream(report: AuditReport) -> str:
    lines = [f"## Stream {report.stream}", ""]
    for unit, span in sorted({(block.unit, block.span) for block in report.blocks}):
        mine = [block for block in report.blocks if (block.unit, block.span) == (unit, span)]
        lines += [_guarantee(report.stream, mine), ""]
    lines += [
        "| block | unit | epsilon | delta | over which rounds | filter used | rounds | people never trained on |",
        "|---|---|---:|---:|---|---:|---|---|",
        *(_row(block) for block in report.blocks),
    ]
    if report.rounds_without_privacy:
        names = ", ".join(report.rounds_without_privacy)
        lines += ["", f"Rounds WITHOUT PRIVACY, on blocks without a promise: {names}."]
    return "\n".join(lines)


def _guarantee(stream: str, blocks: list[BlockAudit]) -> str:
    unit, span = blocks[0].unit, blocks[0].span
    bounded = [block for block in blocks if block.epsilon is not None]
    unbounded = [block.block for block in blocks if block.epsilon is None]
    names = [block.block for block in blocks]
    parts = []
    if bounded:
        epsilon, delta = max(block.epsilon or 0.0 for block in bounded), max(block.delta for block in bounded)
        used = max(block.share_used for block in bounded)
        parts.append(
            f"Everything that the training of stream {stream} released is ({epsilon:g}, {delta:g})-differentially "
            f"private with respect to each single unit of any of {_number(bounded)}, {span}. A block's bound was "
            f"sealed when the block was made; {used:.1%} of the most used bound is used up. The bound holds whichever "
            f"rounds are still to come: one that would pass it is refused."
        )
    if not blocks[0].private:
        return (
            f"**For {_number(blocks)} of stream {stream} there is no privacy** ({', '.join(names)}): they were sealed "
            f"with enabled=false. Nothing is promised to anybody in them, and what was trained on them may tell all."
        )
    if unbounded:
        parts.append(
            f"**For {len(unbounded)} of {_number(blocks)} of stream {stream} nothing is promised** "
            f"({', '.join(unbounded)}): a round was trained on them with reproducible test noise, so that for them "
            f"epsilon is infinite. No model of such a round was approved."
        )
    return " ".join([*parts, f"The unit is {_UNITS[unit]}."])


def _number(blocks: list[BlockAudit]) -> str:
    return "1 block" if len(blocks) == 1 else f"{len(blocks)} blocks"


def _row(block: BlockAudit) -> str:
    epsilon = "infinite" if block.epsilon is None else f"{block.epsilon:g}"
    delta = f"{block.delta:g}"
    if not block.private:
        epsilon, delta = "none: no privacy", "none"
    reads = f"; {len(block.holdout_reads)} paid evaluations, {block.holdout_share_used:.1%} used"
    cells = (
        block.block,
        block.unit,
        epsilon,
        delta,
        block.span,
        f"{block.share_used:.1%}",
        ", ".join(block.rounds) or "none",
        block.holdout + (reads if block.holdout_reads else ""),
    )
    return "| " + " | ".join(cells) + " |"


def _released(evidence: Evidence) -> str:
    marks = {None: "", NONE: " (without privacy)"}
    approved = sorted(
        {
            (str(a["model"]), int(a["version"]), marks[a.get("guarantee")])
            for a in evidence.approvals
            if a["to"] == "Production"
        }
    )
    names = ", ".join(f"{model} version {version}{mark}" for model, version, mark in approved) or "none"
    return (
        f"## What was released\n\n{len(evidence.rounds)} rounds ended with an adapter; each has one signed receipt. "
        f"Approved to answer, each after a signed verdict that it passed its gates: {names}."
    )


def _not_protected() -> str:
    lines = "\n".join(f"- {clause};" for clause in _NOT_PROTECTED)
    return f"## What is not protected\n\nIn full in docs/privacy.md, 'What is not protected':\n\n{lines[:-1]}."


def _heads(evidence: Evidence) -> str:
    ledger = evidence.rows[-1].hash if evidence.rows else "none: no row yet"
    anchors = f"{len(evidence.anchors)} commits of the data repository name an earlier one"
    return (
        f"## What to note down\n\nHead of the ledger: `{ledger}`; {anchors}. A later export must hold this head: "
        f"`--expect-head` checks it, and so finds rows that were dropped since."
    )


def _keys(evidence: Evidence) -> str:
    lines = [
        f"- {key['purpose']}: `{key['fingerprint']}`{_validity(str(key['valid_from']), str(key['valid_until']))}"
        for key in evidence.keys
    ]
    return (
        "## Keys\n\nCompare these fingerprints (SHA-256 of the raw Ed25519 public keys) with ones you got by another "
        "way; that they stand here proves nothing.\n\n" + "\n".join(lines)
    )


def _validity(since: str, until: str) -> str:
    said = [f"from {since}"] * bool(since) + [f"until {until}"] * bool(until)
    return f" ({', '.join(said)})" if said else ""
