"""What becomes of each message of a block: sealed into a split, set aside, dropped as a duplicate, or rejected.

Every decision depends on the messages of one user alone (privacy unit `user`), or of one (user, event) (`record`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ingest.record import Reason, Record, parse
from ingest.seen import digest_of, identity_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ingest.broker import Message
    from ingest.expectations import Judged
    from ingest.parquet import Row
    from ingest.record import RecordLimits

SET_ASIDE: Final = "set_aside"
_CONFLICT: Final = Reason(
    "conflict", "event_id", "the user's event_id stands for other content already; must be unique per user"
)

Found = tuple[bytes, bytes, int, int]
"""Identity, digest, partition, offset of a record that would be accepted."""


@dataclass
class Outcome:
    """A block's messages, sorted. `rows` by split."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    rejected: list[tuple[Message, tuple[Reason, ...]]] = field(default_factory=list)
    duplicates: int = 0
    alarms: tuple[str, ...] = ()

    def count(self, *splits: str) -> int:
        """Rows in these splits."""
        return sum(len(self.rows.get(split, ())) for split in splits)

    def records(self) -> list[Record]:
        """All that was accepted, in no particular order of splits."""
        return [record for rows in self.rows.values() for _, _, record in rows]


@dataclass
class Judgement:
    """Messages that contract and suite have judged: `accepted` still holds duplicates."""

    accepted: list[tuple[Message, Record]]
    rejected: list[tuple[Message, tuple[Reason, ...]]]
    alarms: tuple[str, ...]


def judge(
    messages: Sequence[Message], limits: RecordLimits, validate: Callable[[Sequence[Record]], Judged]
) -> Judgement:
    """Parse and validate each message by itself; in the topic's order within each partition.

    Raises:
        ValidationStopped: the suite could not be evaluated.
    """
    parsed: list[tuple[Message, Record]] = []
    rejected: list[tuple[Message, tuple[Reason, ...]]] = []
    for message in sorted(messages, key=lambda m: (m.partition, m.offset)):
        result = parse(message.value, limits)
        if isinstance(result, Record):
            parsed.append((message, result))
        else:
            rejected.append((message, result))
    judged = validate([record for _, record in parsed])
    accepted = []
    for row, entry in enumerate(parsed):
        if reasons := judged.rejected.get(row):
            rejected.append((entry[0], reasons))
        else:
            accepted.append(entry)
    return Judgement(accepted, rejected, judged.alarms)


def sort_out(
    judgement: Judgement,
    *,
    claim: Callable[[Sequence[Found]], Mapping[int, bytes]],
    split: Callable[[str], str],
    per_user_max: int | None,
) -> Outcome:
    """Resolve duplicates, set aside, split.

    `claim` takes what would be accepted and answers, by its place, with the digests of those whose identity is another
    message's; `per_user_max` is the number of records a user may have in one block (None: no bound).
    """
    outcome = Outcome(rejected=list(judgement.rejected), alarms=judgement.alarms)
    found = [(identity_of(r), digest_of(r), m.partition, m.offset) for m, r in judgement.accepted]
    taken = claim(found)
    per_user: Counter[str] = Counter()
    for place, (message, record) in enumerate(judgement.accepted):
        if (before := taken.get(place)) is not None:
            if before == found[place][1]:
                outcome.duplicates += 1
            else:
                outcome.rejected.append((message, (_CONFLICT,)))
            continue
        user = record.user_id
        per_user[user] += 1
        beyond = per_user_max is not None and per_user[user] > per_user_max
        side = SET_ASIDE if beyond else split(user)
        outcome.rows.setdefault(side, []).append((message.partition, message.offset, record))
    return outcome
