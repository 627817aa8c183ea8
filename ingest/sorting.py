"""What becomes of each message of a block: sealed into a split, set aside, dropped as a duplicate, or rejected.

Every decision depends on the messages of one user alone (privacy unit `user`), or of one (user, event) (`record`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ingest.record import Reason, Record, parse
from ingest.seen import Identity, digest_of, identity_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ingest.broker import Message
    from ingest.expectations import Judged
    from ingest.parquet import Row
    from ingest.record import RecordLimits

SET_ASIDE: Final = "set_aside"
_CONFLICT: Final = Reason(
    "conflict", "event_id", "the user's event_id stands for other content already; must be unique per user"
)


@dataclass
class Outcome:
    """A block's messages, sorted. `rows` by split; `entries` are the identities now known."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    rejected: list[tuple[Message, tuple[Reason, ...]]] = field(default_factory=list)
    duplicates: int = 0
    entries: dict[Identity, bytes] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()

    def count(self, *splits: str) -> int:
        """Rows in these splits."""
        return sum(len(self.rows.get(split, ())) for split in splits)


def sort_messages(
    messages: Sequence[Message],
    *,
    limits: RecordLimits,
    validate: Callable[[Sequence[Record]], Judged],
    seen: Callable[[Iterable[Identity]], dict[Identity, bytes]],
    split: Callable[[str], str],
    per_user_max: int | None,
) -> Outcome:
    """Parse, validate, resolve duplicates, set aside, split; in the topic's order within each partition.

    `seen` answers with the content digests of identities that are in earlier blocks;
    `per_user_max` is the number of records a user may have in one block (None: no bound).

    Raises:
        ValidationStopped: the suite could not be evaluated.
    """
    outcome = Outcome()
    parsed: list[tuple[Message, Record]] = []
    for message in sorted(messages, key=lambda m: (m.partition, m.offset)):
        result = parse(message.value, limits)
        if isinstance(result, Record):
            parsed.append((message, result))
        else:
            outcome.rejected.append((message, result))
    judged = validate([record for _, record in parsed])
    outcome.alarms = judged.alarms
    known = seen(identity_of(record) for _, record in parsed)
    per_user: Counter[str] = Counter()
    for row, (message, record) in enumerate(parsed):
        if reasons := judged.rejected.get(row):
            outcome.rejected.append((message, reasons))
            continue
        identity, digest = identity_of(record), digest_of(record)
        if (before := known.get(identity)) is not None:
            if before == digest:
                outcome.duplicates += 1
            else:
                outcome.rejected.append((message, (_CONFLICT,)))
            continue
        known[identity] = outcome.entries[identity] = digest
        per_user[record.user_id] += 1
        over = per_user_max is not None and per_user[record.user_id] > per_user_max
        side = SET_ASIDE if over else split(record.user_id)
        outcome.rows.setdefault(side, []).append((message.partition, message.offset, record))
    return outcome
