"""Some public records with what each model says to them, side by side: where the candidate differs from live first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.gateset import GateSet
from evaluation.metrics import Indices
from evaluation.scorer import Role, Scorer, answer_tokens, predict

# Of each kind: enough to see a pattern, few enough to be read.
EACH = 2


@dataclass(frozen=True)
class Example:
    """One record of a public gate set.

    Attributes:
        kind: what it is an example of.
        expected: the completion that is right.
        chosen: of each model, how its likeliest label is said.
        written: of each model, what it answers when it is asked freely.
    """

    kind: str
    domain: str
    prompt: str
    expected: str
    chosen: Mapping[Role, str]
    written: Mapping[Role, str]


def examples(gate_set: GateSet, scorer: Scorer, names: Mapping[Role, str | None]) -> tuple[Example, ...]:
    """Examples of each kind, the same for the same answers.

    Args:
        gate_set: a public one, since its records are shown.
        scorer: has been asked about the gate set, so that little is left to ask.
        names: the engine's names of the models there are.

    Raises:
        Exception: whatever an engine throws.
    """
    said = {role: predict(scorer, name, gate_set).predicted for role, name in names.items()}
    ours = said["candidate"]
    other: Role = "live" if "live" in names else "base"
    theirs = said.get(other)
    if ours is None or theirs is None:
        return ()
    column = {label: index for index, label in enumerate(gate_set.labels)}
    truth = [column[record.truth] for record in gate_set.records]
    rows = [(kind, row) for kind, found in _kinds(ours, theirs, truth, other).items() for row in _spread(found)]
    if not rows:
        return ()
    prompts = [gate_set.records[row].prompt for _, row in rows]
    shown: tuple[Role, ...] = ("candidate", other)
    written = {role: scorer.generate(names[role], prompts, answer_tokens(gate_set)) for role in shown}
    completions = list(gate_set.answers.values())
    return tuple(
        Example(
            kind,
            gate_set.records[row].domain,
            gate_set.records[row].prompt,
            gate_set.records[row].completion,
            {role: completions[int(said[role][row])] for role in shown},  # type: ignore[index]
            {role: written[role][at] for role in shown},
        )
        for at, (kind, row) in enumerate(rows)
    )


def _kinds(ours: Indices, theirs: Indices, truth: Sequence[int], other: str) -> dict[str, list[int]]:
    """Rows of each kind, the most telling kinds first."""
    named = "live" if other == "live" else "the base"
    found: dict[str, list[int]] = {
        f"gained: {named} was wrong": [],
        f"lost: {named} was right": [],
        "both wrong": [],
        "both right": [],
    }
    gained, lost, wrong, right = found
    for row, (a, b, true) in enumerate(zip(ours.tolist(), theirs.tolist(), truth, strict=True)):
        kind = (right if b == true else gained) if a == true else (lost if b == true else wrong)
        found[kind].append(row)
    return found


def _spread(rows: Sequence[int]) -> list[int]:
    """A few of them, evenly."""
    count = min(EACH, len(rows))
    return [rows[at * len(rows) // count] for at in range(count)]
