"""Labelled records from files onto a topic; how far each file has come is kept, so that sending can go on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from ingest.broker import KafkaSettings, TopicWriter, abandon, ensure_topic
from ingest.errors import BrokerError, MessageTooLarge, SendingStopped, SettingError, SourceError
from ingest.sources import Source, SourceRow, open_source

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ingest.broker import TopicInfo

# kafka-python buffers without bound: flushing keeps memory small, and tells early of a broker that is gone.
_FLUSH_EVERY: Final = 2000
# With a rate, progress is seen and errors are noticed once a second.
_FLUSH_SECONDS: Final = 1.0
# Above the length prefixes and the batch's own header.
_OVERHEAD_BYTES: Final = 1024
_ATTRIBUTE: Final = "attributes."


@dataclass(frozen=True)
class ProduceReport:
    """What was sent and acknowledged by all replicas asked for, in this call.

    `resumed` rows were done by earlier calls; `too_large` are the places of rows the topic does not take.
    """

    sent: int
    seconds: float
    resumed: int = 0
    too_large: tuple[str, ...] = ()


def renamed(where: str, value: Mapping[str, Any], field_map: Mapping[str, str]) -> dict[str, Any]:
    """An object with its fields renamed; a target `attributes.NAME` is the attribute NAME.

    Raises:
        SourceError: two fields become one; `where` says of what.
    """
    result: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    for key, item in value.items():
        target = field_map.get(key, key)
        inside = key in field_map and target.startswith(_ATTRIBUTE)
        place, name = (attributes, target.removeprefix(_ATTRIBUTE)) if inside else (result, target)
        if name in place:
            raise SourceError(f"{where}: two fields become {target}; mend the field map")
        place[name] = item
    if attributes:
        if "attributes" in result:
            raise SourceError(f"{where}: two fields become attributes; mend the field map")
        result["attributes"] = attributes
    return result


def _as_json(value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # A lone surrogate has no UTF-8; escaped it reaches validation, which rejects it with its reason.
        return json.dumps(value).encode()


def _message(row: SourceRow, field_map: Mapping[str, str]) -> tuple[bytes | None, bytes]:
    """Key and value of a row. A line that is no JSON object goes as it is: the topic's validation says why."""
    if row.raw is None:
        parsed: Any = row.fields
        line = _as_json(row.fields)
    else:
        line = row.raw
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):
            return None, line
        if not isinstance(parsed, dict):
            return None, line
        if field_map.keys() & parsed.keys():
            parsed = renamed(row.where, parsed, field_map)
            line = json.dumps(parsed).encode()
    user = parsed.get("user_id")
    # All of a user's records in one partition, so that one writer sees all of them.
    return (user.encode(errors="surrogatepass") if isinstance(user, str) else None), line


@dataclass
class _Place:
    """How far a file has come: in memory as handed over, in `file` as acknowledged."""

    source: Source
    topic: str
    topic_id: str | None
    folder: Path | None
    row: int = 0
    done: int = 0
    finished: bool = False

    @property
    def file(self) -> Path | None:
        """Where it is kept. Another size, time, field map or way of reading is another file."""
        if self.folder is None:
            return None
        about, path = self.source.path.stat(), str(self.source.path.resolve())
        read = [self.source.form, self.source.delimiter, sorted(self.source.field_map.items())]
        name = json.dumps([self.topic, path, about.st_size, about.st_mtime_ns, read])
        return self.folder / f"{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()}.json"

    def load(self) -> None:
        """Go on where an earlier call was acknowledged; from the start if the topic was made anew since."""
        file = self.file
        try:
            kept = json.loads(file.read_bytes()) if file is not None else None
            if kept is not None and kept["topic_id"] == self.topic_id:
                self.row, self.done, self.finished = int(kept["row"]), int(kept["done"]), bool(kept["finished"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SourceError(
                f"file={file}: no progress ({type(error).__name__}); send without --resume, which does no harm"
            ) from None

    def save(self) -> None:
        """Keep it, whole or not at all; called when everything handed over is acknowledged."""
        file = self.file
        if file is None:
            return
        kept = {
            "topic": self.topic,
            "topic_id": self.topic_id,
            "file": str(self.source.path.resolve()),
            "row": self.row,
            "done": self.done,
            "finished": self.finished,
            "at": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        with part.open("w", encoding="utf-8") as out:
            json.dump(kept, out)
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)


@dataclass
class _Sending:
    """One call: what was handed over, and what of it is acknowledged."""

    writer: TopicWriter
    info: TopicInfo
    total: int
    rate: float | None
    skip_large: bool
    progress: Callable[[int, int], None] | None
    stop: threading.Event | None
    resumed: int
    sent: int = 0
    acknowledged: int = 0
    skipped: int = 0
    too_large: list[str] = field(default_factory=list)
    moved: list[_Place] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    flushed: float = field(default_factory=time.monotonic)

    def file(self, place: _Place) -> None:
        """Send what is left of one file."""
        self.moved.append(place)
        with closing(place.source.rows(place.row)) as rows:
            for row in rows:
                key, value = _message(row, place.source.field_map)
                self._pace()
                if self._fits(row, key, value):
                    self.writer.send(self.info.name, key, value)
                    self.sent += 1
                place.row, place.done = row.number, place.done + 1
                late = self.rate is not None and time.monotonic() - self.flushed > _FLUSH_SECONDS
                if self.sent - self.acknowledged >= _FLUSH_EVERY or late:
                    self.flush()
        place.finished = True

    def _pace(self) -> None:
        """Keep the rate; end here if somebody wants to."""
        early = 0.0 if self.rate is None else self.began + self.sent / self.rate - time.monotonic()
        if self.stop is not None and (self.stop.wait(early) if early > 0 else self.stop.is_set()):
            raise _StopWanted
        if self.stop is None and early > 0:
            time.sleep(early)

    def _fits(self, row: SourceRow, key: bytes | None, value: bytes) -> bool:
        bound = self.info.message_bytes_max
        if len(value) + len(key or b"") + _OVERHEAD_BYTES <= bound:
            return True
        if not self.skip_large:
            raise MessageTooLarge(
                f"{row.where}: {len(value)} bytes; topic={self.info.name} takes {bound}; {self.sent} were sent before "
                "it (sending them again does no harm): shorten it, skip it by --skip-large, or raise max.message.bytes"
            )
        self.too_large.append(row.where)
        return False

    def flush(self) -> None:
        """Wait for all acknowledgements, then keep how far each file has come."""
        self.writer.flush()
        self.flushed = time.monotonic()
        self.acknowledged = self.sent
        for place in self.moved:
            place.save()
        self.moved = self.moved[-1:]
        if self.progress is not None:
            self.progress(self.resumed + self.sent + len(self.too_large), self.total)

    def stopped(self, why: str, *, interrupted: bool) -> SendingStopped:
        """The error that says what is known and what is not."""
        unknown = self.sent - self.acknowledged
        sentence = f"{why}; {self.resumed + self.acknowledged} of {self.total} records are acknowledged"
        if unknown:
            sentence += f", of {unknown} more it is unknown (sending them again does no harm)"
        return SendingStopped(sentence, acknowledged=self.acknowledged, unknown=unknown, interrupted=interrupted)


class _StopWanted(Exception):
    """The caller's event was set."""


def _run(sending: _Sending, places: Sequence[_Place]) -> None:
    """Send all; whatever ends it early, what was handed over is acknowledged first if the broker still answers."""
    try:
        try:
            for place in places:
                if not place.finished:
                    sending.file(place)
        except (SourceError, MessageTooLarge):
            sending.flush()
            raise
        except _StopWanted:
            sending.flush()
            raise sending.stopped("stopped", interrupted=True) from None
        sending.flush()
    except MessageTooLarge:
        raise
    except BrokerError as error:
        abandon(sending.writer)
        raise sending.stopped(str(error), interrupted=False) from None
    except KeyboardInterrupt:
        abandon(sending.writer)
        raise sending.stopped("stopped at once", interrupted=True) from None


def produce(
    settings: KafkaSettings,
    topic: str,
    files: Sequence[Path],
    field_map: Mapping[str, str] | None = None,
    rate: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    form: str | None = None,
    delimiter: str | None = None,
    skip_large: bool = False,
    journal: Path | None = None,
    resume: bool = False,
    stop: threading.Event | None = None,
) -> ProduceReport:
    """Send each row of the files as one message, keyed by `user_id`; return when all are acknowledged (acks=all).

    `field_map` renames fields of the source to the contract's; `rate` is in messages per second;
    `progress(done, total)` is called as messages are acknowledged. The topic is made if it is missing.
    `form` is jsonl, csv or parquet, by default what each file's name says; `delimiter` is CSV's.
    `skip_large` leaves out what the topic does not take. `journal` is a folder in which the acknowledged progress of
    each file is kept; `resume` starts from there. When `stop` is set, sending ends after an acknowledged row.

    Raises:
        SourceError: a file is missing or unreadable or refused (then nothing was sent), or two fields become one.
        SettingError: rate, form or delimiter is out of its bounds.
        MessageTooLarge: a row is beyond the topic's limit; the message says how many were sent before it.
        SendingStopped: `stop` was set, Ctrl-C, or the broker broke off; it says how many were acknowledged.
        BrokerError: the broker refuses before the first message.
    """
    if rate is not None and rate <= 0:
        raise SettingError(f"rate={rate:g}: must be above 0 records per second")
    if resume and journal is None:
        raise SettingError("resume=True: must come with the journal's folder")
    sources = [open_source(path, form, field_map, delimiter) for path in files]
    # Every file is known to be readable before the first row is sent.
    total = sum(source.count() for source in sources)
    info = ensure_topic(settings, topic)
    places = [_Place(source, topic, info.topic_id, journal) for source in sources]
    if resume:
        for place in places:
            place.load()
    resumed = sum(place.done for place in places)
    began = time.monotonic()
    if all(place.finished for place in places):
        return ProduceReport(0, 0.0, resumed)
    with TopicWriter(settings) as writer:
        sending = _Sending(writer, info, total, rate, skip_large, progress, stop, resumed)
        _run(sending, places)
    return ProduceReport(sending.sent, time.monotonic() - began, resumed, tuple(sending.too_large))
