"""Labelled records from JSONL files onto a topic."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ingest.broker import KafkaSettings, TopicWriter, ensure_topic
from ingest.errors import MessageTooLarge, SettingError, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

# kafka-python buffers without bound: flushing keeps memory small, and tells early of a broker that is gone.
_FLUSH_EVERY: Final = 2000
# With a rate, progress is seen and errors are noticed once a second.
_FLUSH_SECONDS: Final = 1.0
# Above the length prefixes and the batch's own header.
_OVERHEAD_BYTES: Final = 1024


@dataclass(frozen=True)
class ProduceReport:
    """What was sent and acknowledged by all replicas asked for."""

    sent: int
    seconds: float


def _lines(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Lines that hold anything, each with its place."""
    for path in files:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if value := line.rstrip(b"\r\n"):
                    yield f"{path}:{number}", value


def _count(files: Sequence[Path]) -> int:
    """Lines to send, read once beforehand: so every file is known to be readable before the first line is sent."""
    try:
        return sum(1 for _ in _lines(files))
    except FileNotFoundError as error:
        raise SourceError(f"file={error.filename}: no such file") from None
    except OSError as error:
        raise SourceError(f"file={error.filename}: {(error.strerror or str(error)).lower()}; must be JSONL") from None


def _renamed(where: str, value: dict[str, Any], field_map: Mapping[str, str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        target = field_map.get(key, key)
        if target in result:
            raise SourceError(f"{where}: two fields become {target}; mend the field map")
        result[target] = item
    return result


def _message(where: str, line: bytes, field_map: Mapping[str, str]) -> tuple[bytes | None, bytes]:
    """Key and value of a line. What is no JSON object goes as it is: the topic's validation says why it is none."""
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return None, line
    if not isinstance(parsed, dict):
        return None, line
    if field_map.keys() & parsed.keys():
        parsed = _renamed(where, parsed, field_map)
        line = json.dumps(parsed).encode()
    user = parsed.get("user_id")
    # All of a user's records in one partition, so that one writer sees all of them.
    return (user.encode(errors="surrogatepass") if isinstance(user, str) else None), line


def produce(
    settings: KafkaSettings,
    topic: str,
    files: Sequence[Path],
    field_map: Mapping[str, str] | None = None,
    rate: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ProduceReport:
    """Send each line of the files as one message, keyed by `user_id`; return when all are acknowledged (acks=all).

    `field_map` renames fields of the source to the contract's; `rate` is in messages per second;
    `progress(sent, total)` is called as messages are acknowledged. The topic is made if it is missing.

    Raises:
        SourceError: a file is missing or unreadable (then nothing was sent), or two fields become one.
        MessageTooLarge: a line is beyond the topic's limit; the message says how many were sent before it.
        BrokerError: the broker refuses or breaks off.
    """
    if rate is not None and rate <= 0:
        raise SettingError(f"rate={rate:g}: must be above 0 records per second")
    total = _count(files)
    info = ensure_topic(settings, topic)
    began = flushed = time.monotonic()
    sent = 0
    with TopicWriter(settings) as writer:
        for where, line in _lines(files):
            key, value = _message(where, line, field_map or {})
            size = len(value) + len(key or b"") + _OVERHEAD_BYTES
            if size > info.message_bytes_max:
                writer.flush()
                raise MessageTooLarge(
                    f"{where}: {len(value)} bytes; topic={topic} takes {info.message_bytes_max}; {sent} were sent "
                    "before it (sending them again does no harm): shorten it or raise max.message.bytes"
                )
            if rate is not None and (early := began + sent / rate - time.monotonic()) > 0:
                time.sleep(early)
            writer.send(topic, key, value)
            sent += 1
            if sent % _FLUSH_EVERY == 0 or (rate is not None and time.monotonic() - flushed > _FLUSH_SECONDS):
                writer.flush()
                flushed = time.monotonic()
                if progress is not None:
                    progress(sent, total)
        writer.flush()
    if progress is not None:
        progress(sent, total)
    return ProduceReport(sent, time.monotonic() - began)
