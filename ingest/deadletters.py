"""Rejected messages: a topic beside the stream's, at least once, written before the block's offsets count as done.

They are read, mended and sent again, and deleted up to a time; what was sealed into git is history and stays.

key      topic/incarnation/partition/offset
headers  reasons (JSON list of {code, field, message}, bounded), schema_version,
         reference (only if the message is too large for this topic: the rejects file in the data repository)
value    the original bytes
"""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ingest.broker import (
    Headers,
    KafkaSettings,
    TopicReader,
    TopicWriter,
    delete_before,
    describe_topic,
    offsets_at,
)
from ingest.errors import BrokerAuthError, BrokerError, BrokerUnreachable
from ingest.record import SCHEMA_VERSION, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from ingest.broker import Message

SUFFIX: Final = ".dead-letters"
# Key and headers of a dead letter are bounded; this is above what they can come to.
OVERHEAD_BYTES_MAX: Final = 8192
# A quiet broker answers a fetch at once; three empty ones mean that control records end the topic.
_POLL_MS: Final = 1000
_EMPTY_POLLS_MAX: Final = 3
_POLL_MESSAGES: Final = 1000
# What a replay loses when it is killed is sent once more, and dropped as a duplicate.
_FLUSH_EVERY: Final = 1000

REPLAYED_FROM: Final = "replayed-from"
"""The header of a mended message: the key of the dead letter it was."""


def topic_of(topic: str) -> str:
    """Where a topic's rejected messages go."""
    return topic + SUFFIX


@dataclass(frozen=True)
class DeadLetter:
    """One rejected message as it stands on the dead-letter topic, there at `partition` and `offset`."""

    key: str
    codes: tuple[str, ...]
    reasons: tuple[str, ...]
    schema_version: int
    value: bytes | None
    reference: str | None
    rejected_at_ms: int
    partition: int
    offset: int

    @property
    def source(self) -> tuple[int, int] | None:
        """Partition and offset on the stream's topic; None if Tidegate did not write the letter."""
        found = re.search(r"/(\d+)/(\d+)$", self.key)
        return None if found is None else (int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Survey:
    """The newest letters asked for, oldest first; how many there are in all, and by each of their reasons' codes."""

    letters: tuple[DeadLetter, ...]
    total: int
    by_code: dict[str, int]


@dataclass(frozen=True)
class Expiry:
    """Letters below `offsets` of the dead-letter topic; `elsewhere` of them have their bytes in the data repository."""

    offsets: dict[int, int]
    letters: int
    elsewhere: int
    by_code: dict[str, int]


@dataclass(frozen=True)
class Mended:
    """A letter's new value, and the key it is sent under."""

    letter: str
    key: bytes | None
    value: bytes


def key_of(topic: str, incarnation: str, message: Message) -> bytes:
    """The message's only identity that does not come from its content."""
    return f"{topic}/{incarnation}/{message.partition}/{message.offset}".encode()


def headers_of(reasons: Sequence[Reason], reference: str | None) -> Headers:
    """Why it was rejected, and where its bytes are if not here."""
    listed = [{"code": reason.code, "field": reason.field, "message": reason.message} for reason in reasons]
    headers: Headers = (
        ("reasons", json.dumps(listed).encode()),
        ("schema_version", str(SCHEMA_VERSION).encode()),
    )
    return headers if reference is None else (*headers, ("reference", reference.encode()))


def _read(message: Message) -> DeadLetter:
    headers = dict(message.headers)
    try:
        reasons = [Reason(item["code"], item["field"], item["message"]) for item in json.loads(headers["reasons"])]
        version = int(headers["schema_version"])
    except (KeyError, TypeError, ValueError):
        reasons, version = [Reason("foreign", "", "not written by Tidegate")], 0
    reference = headers.get("reference")
    return DeadLetter(
        key=(message.key or b"").decode(errors="replace"),
        codes=tuple(reason.code for reason in reasons),
        reasons=tuple(str(reason) for reason in reasons),
        schema_version=version,
        value=message.value,
        reference=None if reference is None else reference.decode(errors="replace"),
        rejected_at_ms=message.timestamp_ms,
        partition=message.partition,
        offset=message.offset,
    )


def each_dead_letter(
    settings: KafkaSettings, topic: str, newest: int | None = None, below: Mapping[int, int] | None = None
) -> Iterator[DeadLetter]:
    """All rejected messages that are there now, in the order of each partition; some may come twice.

    `newest` starts so many before the end of each partition; `below` ends before these offsets, by partition.

    Raises:
        BrokerError: the broker cannot be asked.
    """
    info = describe_topic(settings, topic_of(topic))
    if info is None:
        return
    with TopicReader(settings, topic_of(topic)) as reader:
        bounds = reader.bounds(info.partitions)
        ends = {p: min(end, (below or {}).get(p, end)) for p, (_, end) in bounds.items()}
        reader.seek({p: first if newest is None else max(first, ends[p] - newest) for p, (first, _) in bounds.items()})
        empty = 0
        while empty < _EMPTY_POLLS_MAX and any(at < ends[p] for p, at in reader.positions().items()):
            batch = reader.poll(_POLL_MESSAGES, _POLL_MS)
            empty = 0 if batch else empty + 1
            for message in batch:
                if message.offset < ends[message.partition]:
                    yield _read(message)


def read_dead_letters(settings: KafkaSettings, topic: str, limit: int) -> list[DeadLetter]:
    """The newest `limit` rejected messages of a topic, oldest first, each once; none if nothing was ever rejected.

    Raises:
        BrokerError: the broker cannot be asked.
    """
    letters = {letter.key: letter for letter in each_dead_letter(settings, topic, newest=limit)}
    return sorted(letters.values(), key=lambda letter: letter.rejected_at_ms)[-limit:]


def survey(settings: KafkaSettings, topic: str, limit: int, code: str | None = None) -> Survey:
    """Count all rejected messages, each once, by the codes of their reasons; and give the newest `limit`.

    `code` restricts both to letters with that reason. Reads the whole topic; holds its keys and `limit` letters.

    Raises:
        BrokerError: the broker cannot be asked.
    """
    seen: set[str] = set()
    newest: deque[DeadLetter] = deque(maxlen=limit)
    by_code: Counter[str] = Counter()
    for letter in each_dead_letter(settings, topic):
        if letter.key in seen or (code is not None and code not in letter.codes):
            continue
        seen.add(letter.key)
        newest.append(letter)
        by_code.update(set(letter.codes))
    return Survey(tuple(sorted(newest, key=lambda one: one.rejected_at_ms)), len(seen), dict(by_code.most_common()))


def find_dead_letters(settings: KafkaSettings, topic: str, keys: Collection[str]) -> dict[str, DeadLetter]:
    """The letters of these keys that are there.

    Raises:
        BrokerError: the broker cannot be asked.
    """
    wanted = set(keys)
    return {letter.key: letter for letter in each_dead_letter(settings, topic) if letter.key in wanted}


def replay(
    settings: KafkaSettings, topic: str, mended: Iterable[Mended], acknowledged: Callable[[Sequence[str]], None]
) -> int:
    """Send mended values to the stream's topic; returns how many.

    `acknowledged(keys)` hears of letters whose mended values are written by all replicas asked for. Doing it twice does
    no harm: the stream drops what it has by (user_id, event_id). The letters stay where they are.

    Raises:
        BrokerError: the broker refuses or breaks off; what was told to `acknowledged` has arrived.
    """
    sent = 0
    waiting: list[str] = []
    with TopicWriter(settings) as writer:
        for one in mended:
            writer.send(topic, one.key, one.value, ((REPLAYED_FROM, one.letter.encode()),))
            waiting.append(one.letter)
            sent += 1
            if len(waiting) >= _FLUSH_EVERY:
                writer.flush()
                acknowledged(waiting)
                waiting = []
        writer.flush()
    if waiting:
        acknowledged(waiting)
    return sent


def plan_expiry(settings: KafkaSettings, topic: str, before_ms: int) -> Expiry:
    """Which letters were rejected before a time (ms since 1970), on the broker's clock of the dead-letter topic.

    A partition is cut at its first letter of that time or later. Deletes nothing.

    Raises:
        BrokerError: the broker cannot be asked.
    """
    info = describe_topic(settings, topic_of(topic))
    if info is None:
        return Expiry({}, 0, 0, {})
    offsets = offsets_at(settings, topic_of(topic), info.partitions, before_ms)
    letters = {letter.key: letter for letter in each_dead_letter(settings, topic, below=offsets)}
    by_code = Counter(code for letter in letters.values() for code in set(letter.codes))
    elsewhere = sum(letter.reference is not None for letter in letters.values())
    return Expiry(offsets, len(letters), elsewhere, dict(by_code.most_common()))


def expire(settings: KafkaSettings, topic: str, expiry: Expiry) -> None:
    """Delete the planned letters from the dead-letter topic. Their bytes in the data repository, if any, stay.

    Raises:
        BrokerError: the broker cannot or may not delete records; the message says what to do instead.
    """
    name = topic_of(topic)
    way_out = f"set retention.ms of topic {name}, and the broker drops what is older"
    try:
        reached = delete_before(settings, name, expiry.offsets)
    except (BrokerUnreachable, BrokerAuthError):
        raise
    except BrokerError as error:
        raise BrokerError(f"{error}; {way_out}") from None
    left = [partition for partition, offset in expiry.offsets.items() if reached.get(partition, -1) < offset]
    if left:
        raise BrokerError(f"topic={name}: the broker deleted nothing of partition {left[0]}; {way_out}")
