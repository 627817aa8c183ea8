"""What must hold after a race of approvers, judged from outside: what clients were answered, what was seen in the
database and through the API meanwhile, and the history and the registry as they stood at the end."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from registry.approvals import Approval, standing
from registry.promotion import SYSTEM
from registry.states import PRODUCTION, ModelVersion, State

# What a kill may leave to write down. Anything else was moved past the guard.
MENDED = {"approved, but MLflow never moved it", "withdrawn, but MLflow never moved it"}


@dataclass(frozen=True)
class Answer:
    """What a client asked for, and what it heard.

    Attributes:
        why: its reason, unlike any other client's.
        what: promote, reject, withdraw, put away.
        version: of which version.
        code: the HTTP status; 0 when the answer was lost.
        seq: the decision it was answered with; 0 for none.
        message: of a refusal or failure.
    """

    why: str
    what: str
    version: int
    code: int
    seq: int = 0
    message: str = ""


@dataclass
class Sightings:
    """What was seen to stand in Production, in the order it was seen.

    Attributes:
        samples: how often somebody looked.
        most: how many versions stood there at once, at the most.
        sequence: what stood there alone (0: nothing), each change once.
        unsigned: what stood there without an approval for exactly that.
    """

    samples: int = 0
    most: int = 0
    sequence: list[int] = field(default_factory=list)
    unsigned: list[str] = field(default_factory=list)

    def add(self, found: Sequence[int]) -> None:
        """One look."""
        self.samples += 1
        self.most = max(self.most, len(found))
        one = found[0] if found else 0
        if len(found) < 2 and (not self.sequence or self.sequence[-1] != one):
            self.sequence.append(one)


@dataclass(frozen=True)
class Evidence:
    """All there is to judge by. `history` has been verified, or `broken` says what was wrong."""

    answers: Sequence[Answer]
    database: Sightings
    api: Sightings
    history: Sequence[Approval]
    versions: Sequence[ModelVersion]
    broken: str = ""


def faults(evidence: Evidence) -> list[str]:
    """What does not hold, a sentence each; nothing when all does."""
    found = [f"history: {evidence.broken}"] if evidence.broken else []
    for name, seen in (("database", evidence.database), ("API", evidence.api)):
        if seen.most > 1:
            found.append(f"{name}: {seen.most} versions in Production at once")
        if not seen.samples:
            found.append(f"{name}: nobody looked")
        found += [f"{name}: {sentence}" for sentence in seen.unsigned[:3]]
    if not any(answer.code == 200 for answer in evidence.answers):
        found.append("clients: nothing was decided, so nothing was tried")
    found += _acknowledged(evidence) + _unexplained(evidence) + _disagreeing(evidence)
    return found


def _acknowledged(evidence: Evidence) -> list[str]:
    """Each decision that a client heard of is in the history, once, as it was asked for."""
    found = []
    rows = {row["seq"]: row for row in evidence.history}
    reasons = Counter(row["why"] for row in evidence.history if row["who"] != SYSTEM)
    known = {answer.why: answer for answer in evidence.answers}
    found += [f"history: why={why!r} stands there {n} times" for why, n in reasons.items() if n > 1]
    found += [f"history: nobody asked for why={why!r}" for why in reasons if why not in known]
    for answer in evidence.answers:
        if answer.code != 200 or answer.what == "put away":
            continue
        row = rows.get(answer.seq)
        if row is None or row["version"] != answer.version:
            # A version that was no longer what it was asked as: the move decided nothing, and the answer named nothing.
            if answer.seq or answer.what in {"promote", "reject"}:
                found.append(f"{answer.what} of {answer.version}: acknowledged, but seq={answer.seq} is not it")
        elif row["why"] != answer.why and not (answer.what == "promote" and row["to"] == PRODUCTION):
            found.append(f"{answer.what} of {answer.version}: answered with somebody else's decision {answer.seq}")
    return found


def _unexplained(evidence: Evidence) -> list[str]:
    """Each change of Production that was seen follows from a row, in their order; none went past the guard."""
    rows = [row for row in evidence.history if row["who"] == SYSTEM and row["why"] not in MENDED]
    found = [f"history: row {row['seq']} says: {row['why']}" for row in rows]
    states_in_turn = [0]
    for at in range(len(evidence.history)):
        live = standing(evidence.history[: at + 1]).live
        states_in_turn.append(int(live["version"]) if live else 0)
    for name, seen in (("database", evidence.database), ("API", evidence.api)):
        at = 0
        for one in seen.sequence:
            later = next((i for i in range(at, len(states_in_turn)) if states_in_turn[i] == one), None)
            if later is None:
                found.append(f"{name}: version {one or 'none'} was seen in Production, which no row explains")
                break
            at = later
    return found


def _disagreeing(evidence: Evidence) -> list[str]:
    """At the end, what the history says is what the registry shows."""
    found = []
    live = standing(evidence.history).live
    shown = [v for v in evidence.versions if v.stage == PRODUCTION]
    wanted = [int(live["version"])] if live else []
    if [v.version for v in shown] != wanted:
        found.append(f"registry: Production is {[v.version for v in shown]}, by the history it is {wanted}")
    elif live and json.loads(shown[0].tag("approval") or "{}") != live:
        found.append(f"registry: version {shown[0].version} does not carry the decision by which it is live")
    rejected = {r["version"] for r in evidence.history if r["kind"] == "reject" and r["from"] != PRODUCTION}
    once_live = standing(evidence.history).approved
    for version in evidence.versions:
        if (version.state is State.LIVE) != (version.version in wanted):
            found.append(f"registry: version {version.version} is shown as {version.state}, live is {wanted}")
        if (version.state is State.REJECTED) != (version.version in rejected):
            found.append(f"registry: version {version.version} is shown as {version.state}; rejected: {rejected}")
        if version.state is State.RETIRED and version.version not in once_live:
            found.append(f"registry: version {version.version} is shown as retired, and was never live")
    return found
