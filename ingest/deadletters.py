"""Rejected messages: a topic beside the stream's, at least once, written before the block's offsets count as done.

key      topic/incarnation/partition/offset
headers  reasons (JSON list of {code, field, message}, bounded), schema_version,
         reference (only if the message is too large for this topic: the rejects file in the data repository)
value    the original bytes
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ingest.broker import Headers, KafkaSettings, TopicReader, describe_topic
from ingest.record import SCHEMA_VERSION, Reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ingest.broker import Message

SUFFIX: Final = ".dead-letters"
# Key and headers of a dead letter are bounded; this is above what they can come to.
OVERHEAD_BYTES_MAX: Final = 8192
# A quiet broker answers a fetch at once; three empty ones mean that control records end the topic.
_POLL_MS: Final = 1000
_EMPTY_POLLS_MAX: Final = 3
_POLL_MESSAGES: Final = 1000


def topic_of(topic: str) -> str:
    """Where a topic's rejected messages go."""
    return topic + SUFFIX


@dataclass(frozen=True)
class DeadLetter:
    """One rejected message as it stands on the dead-letter topic."""

    key: str
    codes: tuple[str, ...]
    reasons: tuple[str, ...]
    schema_version: int
    value: bytes | None
    reference: str | None
    rejected_at_ms: int


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
    )


def read_dead_letters(settings: KafkaSettings, topic: str, limit: int) -> list[DeadLetter]:
    """The newest `limit` rejected messages of a topic, oldest first, each once; none if nothing was ever rejected.

    Raises:
        BrokerError: the broker cannot be asked.
    """
    info = describe_topic(settings, topic_of(topic))
    if info is None:
        return []
    letters: dict[str, DeadLetter] = {}
    with TopicReader(settings, topic_of(topic)) as reader:
        bounds = reader.bounds(info.partitions)
        reader.seek({p: max(first, end - limit) for p, (first, end) in bounds.items()})
        empty = 0
        while empty < _EMPTY_POLLS_MAX and any(reader.positions()[p] < end for p, (_, end) in bounds.items()):
            batch = reader.poll(_POLL_MESSAGES, _POLL_MS)
            empty = 0 if batch else empty + 1
            for message in batch:
                letter = _read(message)
                letters[letter.key] = letter
    return sorted(letters.values(), key=lambda letter: letter.rejected_at_ms)[-limit:]
