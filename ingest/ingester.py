"""From a topic to sealed blocks: one process, one lane, all partitions of a stream's topic.

    resume from the manifests → collect a span of offsets → sort → write files → dead letters acknowledged
      → DVC add + git commit (the only commit point) → index → offsets to Kafka → push to the remote

Killed anywhere before the commit, the span is read again; anywhere after it, the span is done.
"""

from __future__ import annotations

import secrets
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import ValidationError
from structlog import get_logger

from ingest import metrics
from ingest.broker import TopicReader, TopicWriter, check, describe_topic, ensure_topic
from ingest.deadletters import OVERHEAD_BYTES_MAX, headers_of, key_of, topic_of
from ingest.errors import BrokerError, LaneConflict, OffsetsGone, SettingError
from ingest.expectations import Suite
from ingest.manifest import Counts, DataFile, FrozenPolicy, Manifest, OffsetRange
from ingest.parquet import REJECTS, write_rejects, write_rows
from ingest.pusher import Pusher
from ingest.record import SCHEMA_VERSION
from ingest.resume import Start, plan_start
from ingest.seen import SeenIndex, mark_of
from ingest.sorting import SET_ASIDE, Outcome, sort_messages
from ingest.split import check_split, split_of

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ingest.broker import KafkaSettings, Message, TopicInfo
    from ingest.lane import Lane
    from ingest.record import RecordLimits
    from ingest.repository import DataRepository

log = get_logger()

# A broker that does not hold an empty fetch back (the embedded one) makes kafka-python spin while a poll lasts:
# so a poll is short, and an empty one is followed by a real pause, in which a stop is heeded at once.
_POLL_MS: Final = 20
_IDLE_SECONDS: Final = 0.2
_POLL_MESSAGES: Final = 5000
# How often an idle consumer asks for the lag, which also notices a broker that is gone.
_LAG_SECONDS: Final = 5.0
# A fetch that is under way when a topic seems silent comes within this time, or not at all.
_SLOW_SECONDS: Final = 10.0
# How often new partitions and a topic made anew are looked for.
_TOPIC_SECONDS: Final = 30.0
# One message is asked for that is known to be there; only a broker in trouble takes longer.
_MARK_POLLS: Final = 10
_MARK_POLL_MS: Final = 500


class _StartOver(Exception):
    """The topic or the lane changed under us: resume from the manifests."""


@dataclass(frozen=True)
class Batch:
    """Messages collected for one block, with the span they come from."""

    messages: list[Message]
    start: dict[int, int]
    end: dict[int, int]

    @property
    def span(self) -> int:
        """Offsets covered, over all partitions."""
        return sum(self.end.values()) - sum(self.start.values())


class Ingester:
    """The consumer of one stream. Plain arguments in, blocks out; see :meth:`run`."""

    def __init__(
        self,
        *,
        stream: str,
        lane: str,
        topic: str,
        settings: KafkaSettings,
        repo: DataRepository,
        limits: RecordLimits,
        suite_path: Path,
        unit: Literal["record", "user"],
        k_per_user: int,
        split_key: bytes,
        holdout_share: float,
        policy: Callable[[int], Mapping[str, Any]],
        block_offsets: int,
        block_seconds: float,
        on_event: Callable[[str, Mapping[str, Any]], None] | None = None,
    ) -> None:
        """Check the arguments; touches neither broker nor disk.

        `policy(nominal_units)` is frozen into each manifest; `k_per_user` bounds a user's records in one block
        where `unit` is `user`; `on_event(name, facts)` hears of every step, in the process's own thread but for pushes.

        Raises:
            SettingError: an argument is out of its bounds, or contradicts the policy.
        """
        check_split(split_key, holdout_share)
        for name, value in (
            ("block_offsets", block_offsets),
            ("block_seconds", block_seconds),
            ("k_per_user", k_per_user),
        ):
            if value <= 0:
                raise SettingError(f"{name}={value}: must be above 0; see streams.{stream}.ingest")
        self.stream, self.lane, self.topic = stream, lane, topic
        self.settings, self.repo, self.limits, self.suite_path = settings, repo, limits, suite_path
        self.per_user_max = k_per_user if unit == "user" else None
        self.split_key, self.holdout_share = split_key, holdout_share
        self._policy = policy
        self.block_offsets, self.block_seconds = block_offsets, block_seconds
        self._on_event = on_event
        frozen = self.frozen_policy(block_offsets)
        for name, here in (("unit", unit), ("holdout_share", holdout_share)):
            if getattr(frozen, name) != here:
                raise SettingError(f"{name}={here}: the policy says {getattr(frozen, name)}; must be the same")

    def frozen_policy(self, nominal_units: int) -> FrozenPolicy:
        """The policy of a block of this size, as a checked value.

        Raises:
            SettingError: what the policy gave is none.
        """
        try:
            return FrozenPolicy.model_validate(dict(self._policy(nominal_units)))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise SettingError(f"policy.{where}: {first['msg']}; see streams.{self.stream}.privacy") from None

    def event(self, name: str, **facts: Any) -> None:
        """Tell the listener, if there is one."""
        if self._on_event is not None:
            self._on_event(name, facts)

    def alarm(self, kind: str, message: str, **facts: Any) -> None:
        """Something an operator should look at; nothing stops for it."""
        metrics.DEFAULT.alarms.labels(self.stream, kind).inc()
        log.warning("ingest alarm", stream=self.stream, kind=kind, message=message, **facts)
        self.event("alarm", kind=kind, message=message, **facts)

    def run(
        self, stop: threading.Event, max_blocks: int | None = None, until_idle_s: float | None = None
    ) -> list[Manifest]:
        """Seal blocks until stopped; returns their manifests.

        Ends when `stop` is set (what is not sealed stays on the topic), after `max_blocks`, or when the topic has been
        silent for `until_idle_s` seconds (then what was collected is sealed first).

        Raises:
            BrokerError: the broker cannot be reached at the start, or refuses the dead letters.
            SuiteError, ValidationStopped: the expectation suite cannot be used.
            LaneBusy: another process writes the lane.
            RepositoryError: a block could not be committed.
        """
        large_bytes = ensure_topic(self.settings, topic_of(self.topic)).message_bytes_max - OVERHEAD_BYTES_MAX
        info = ensure_topic(self.settings, self.topic)
        with ExitStack() as stack:
            lane = stack.enter_context(self.repo.lane(self.stream, self.lane))
            suite = Suite(self.suite_path)
            seen = stack.enter_context(SeenIndex(lane.root / "seen.sqlite3"))
            reader = stack.enter_context(TopicReader(self.settings, self.topic, group=f"tidegate-{self.stream}"))
            writer = stack.enter_context(TopicWriter(self.settings))
            pusher = stack.enter_context(Pusher(lane, lambda error: self.alarm("push", str(error))))
            session = _Session(self, info, large_bytes, lane, suite, seen, reader, writer, pusher)
            return session.run(stop, max_blocks, until_idle_s)


class _Session:
    """One run: everything open, and where the lane stands."""

    def __init__(
        self,
        ingester: Ingester,
        info: TopicInfo,
        large_bytes: int,
        lane: Lane,
        suite: Suite,
        seen: SeenIndex,
        reader: TopicReader,
        writer: TopicWriter,
        pusher: Pusher,
    ) -> None:
        self.of = ingester
        self.large_bytes = large_bytes
        self.info, self.lane, self.suite, self.seen = info, lane, suite, seen
        self.reader, self.writer, self.pusher = reader, writer, pusher
        self.head = lane.head()
        self.start = Start("", {}, frozenset(), renewed=False)
        self._asked_lag = self._asked_topic = time.monotonic()
        self._outage = False

    def run(self, stop: threading.Event, max_blocks: int | None, until_idle_s: float | None) -> list[Manifest]:
        sealed: list[Manifest] = []
        self._resume()
        while not stop.is_set() and (max_blocks is None or len(sealed) < max_blocks):
            try:
                batch = self._collect(stop, until_idle_s)
                if batch is None:
                    break
                sealed.append(self._seal(batch))
            except (_StartOver, OffsetsGone, LaneConflict) as error:
                self.of.alarm("start_over", str(error))
                self._refresh_topic()
                self._resume()
        return sealed

    def _refresh_topic(self) -> None:
        self._asked_topic = time.monotonic()
        self.info = ensure_topic(self.of.settings, self.of.topic)

    def _resume(self) -> None:
        """Take up where the manifests end."""
        self.lane.recover()
        self.head = self.lane.head()
        read = self.seen.reconcile(self.lane)
        bounds = self.reader.bounds(self.info.partitions)
        self.start = plan_start(self.info, self.head, bounds, marks_agree=self._marks_agree(bounds))
        if self.start.renewed:
            self.of.alarm(
                "incarnation", f"topic={self.of.topic}: made anew or shorter than before; read from its beginning"
            )
        for partition in sorted(self.start.gaps):
            self.of.alarm(
                "gap",
                f"topic={self.of.topic}: partition {partition} dropped messages that were never read; "
                "raise the topic's retention",
                partition=partition,
            )
        self.reader.seek(self.start.offsets)
        log.info("ingest resumed", stream=self.of.stream, offsets=self.start.offsets, blocks_indexed=read)
        self.of.event("resumed", incarnation=self.start.incarnation, offsets=self.start.offsets)

    def _marks_agree(self, bounds: Mapping[int, tuple[int, int]]) -> bool:
        """Whether the last messages read are still at their offsets. Topic ids make the question needless."""
        if self.info.topic_id is not None:
            return True
        for partition, (offset, digest) in self.seen.marks().items():
            first, end = bounds.get(partition, (0, 0))
            if not first <= offset < end:
                continue
            self.reader.seek({partition: offset})
            for _ in range(_MARK_POLLS):
                if found := self.reader.poll(1, _MARK_POLL_MS):
                    if found[0].offset == offset and mark_of(found[0]) != digest:
                        return False
                    break
        return True

    def _collect(self, stop: threading.Event, until_idle_s: float | None) -> Batch | None:
        """Read one block's span, ended by offset count or clock, never by what is in it; None: nothing more to do."""
        start = dict(self.start.offsets)
        batch = Batch([], start, dict(start))
        began: float | None = None
        news = time.monotonic()
        while not stop.is_set():
            now = time.monotonic()
            missing = self.of.block_offsets - batch.span
            if missing <= 0 or (began is not None and now - began >= self.of.block_seconds):
                return batch
            if until_idle_s is not None and self._silent(now - news, until_idle_s):
                return batch if batch.span else None
            found = self.reader.poll(min(missing, _POLL_MESSAGES), _POLL_MS)
            end = self.reader.positions()
            if end != batch.end:
                batch.messages.extend(found)
                batch = Batch(batch.messages, start, end)
                news = time.monotonic()
                began = news if began is None else began
                continue
            if self._watch():
                # An absent broker is no idle topic.
                news = time.monotonic()
            stop.wait(_IDLE_SECONDS)
        return None

    def _silent(self, idle_s: float, until_idle_s: float) -> bool:
        """Whether the topic has been silent for so long; a slow answer is no silence, unless it lasts."""
        if idle_s < until_idle_s:
            return False
        if idle_s >= until_idle_s + _SLOW_SECONDS:
            return True
        try:
            return self._lag() <= 0
        except BrokerError:
            return False

    def _watch(self) -> bool:
        """While nothing arrives: lag, new partitions, and whether the broker is there. True: it is not."""
        now = time.monotonic()
        if now - self._asked_lag < _LAG_SECONDS:
            return self._outage
        try:
            # The consumer itself waits in silence for a broker that is gone.
            check(self.of.settings)
            self._report_lag()
            if now - self._asked_topic >= _TOPIC_SECONDS:
                self._asked_topic = now
                if describe_topic(self.of.settings, self.of.topic) != self.info:
                    raise _StartOver(f"topic={self.of.topic}: changed; partitions and offsets are looked up again")
        except BrokerError as error:
            self._asked_lag = now
            if not self._outage:
                self.of.alarm("broker", str(error))
            self._outage = True
        else:
            if self._outage:
                log.info("broker is back", stream=self.of.stream)
            self._outage = False
        return self._outage

    def _report_lag(self) -> None:
        if time.monotonic() - self._asked_lag < _LAG_SECONDS:
            return
        self._asked_lag = time.monotonic()
        metrics.DEFAULT.lag.labels(self.of.stream).set(max(self._lag(), 0))

    def _lag(self) -> int:
        """Offsets the topic holds and we have not read."""
        bounds = self.reader.bounds(self.info.partitions)
        positions = self.reader.positions()
        return sum(end - positions.get(partition, first) for partition, (first, end) in bounds.items())

    def _seal(self, batch: Batch) -> Manifest:
        of = self.of
        outcome = sort_messages(
            batch.messages,
            limits=of.limits,
            validate=self.suite.validate,
            seen=self.seen.digests,
            split=lambda user: split_of(user, of.split_key, of.holdout_share),
            per_user_max=of.per_user_max,
        )
        block_id = self.lane.block_id(self.head.seq_next)
        files, large = self._write(block_id, outcome)
        of.event("written", block=block_id)
        self._send_dead_letters(outcome, large, block_id)
        of.event("dead_lettered", block=block_id)
        manifest = self._manifest(block_id, batch, outcome, files)
        self.head = self.lane.commit(manifest, self.head, gaps=self.start.gaps)
        of.event("committed", block=block_id)
        marks = {m.partition: (m.offset, mark_of(m)) for m in sorted(batch.messages, key=lambda m: m.offset)}
        self.seen.add(manifest, outcome.entries.items(), marks)
        of.event("indexed", block=block_id)
        self.start = Start(self.start.incarnation, batch.end, frozenset(), renewed=False)
        self._tell(manifest, outcome)
        return manifest

    def _write(self, block_id: str, outcome: Outcome) -> tuple[tuple[DataFile, ...], set[tuple[int, int]]]:
        """The block's files, durable; and which rejected messages are among them for being too large elsewhere."""
        folder = self.lane.folder(block_id)
        if folder.exists():
            shutil.rmtree(folder)
        shas = {split: write_rows(folder / f"{split}.parquet", rows) for split, rows in sorted(outcome.rows.items())}
        large = [
            (m.partition, m.offset, m.value)
            for m, _ in outcome.rejected
            if m.value is not None and len(m.value) > self.large_bytes
        ]
        if large:
            shas[REJECTS] = write_rejects(folder / f"{REJECTS}.parquet", large)
        files = tuple(
            DataFile.model_validate(
                {"path": self.lane.path_in_repository(block_id, split), "sha256": sha, "split": split}
            )
            for split, sha in shas.items()
        )
        return files, {(partition, offset) for partition, offset, _ in large}

    def _send_dead_letters(self, outcome: Outcome, large: set[tuple[int, int]], block_id: str) -> None:
        """At least once, acknowledged before the commit."""
        if not outcome.rejected:
            return
        target = topic_of(self.of.topic)
        reference = self.lane.path_in_repository(block_id, REJECTS)
        for message, reasons in outcome.rejected:
            elsewhere = (message.partition, message.offset) in large
            headers = headers_of(reasons, reference if elsewhere else None)
            key = key_of(self.of.topic, self.start.incarnation, message)
            self.writer.send(target, key, None if elsewhere else message.value, headers)
        self.writer.flush()

    def _manifest(self, block_id: str, batch: Batch, outcome: Outcome, files: tuple[DataFile, ...]) -> Manifest:
        ranges = tuple(OffsetRange(partition=p, start=batch.start[p], end=batch.end[p]) for p in sorted(batch.start))
        return Manifest(
            block_id=block_id,
            stream=self.of.stream,
            lane=self.of.lane,
            seq=self.head.seq_next,
            topic=self.of.topic,
            incarnation=self.start.incarnation,
            offsets=ranges,
            schema_version=SCHEMA_VERSION,
            suite_sha256=self.suite.sha256,
            counts=Counts(
                sealed=outcome.count("train", "holdout"),
                rejected=len(outcome.rejected),
                duplicate=outcome.duplicates,
                set_aside=outcome.count(SET_ASIDE),
            ),
            files=files,
            nonce=secrets.token_hex(16),
            policy=self.of.frozen_policy(batch.span),
            sealed_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        )

    def _tell(self, manifest: Manifest, outcome: Outcome) -> None:
        """Everybody who wants to know of a committed block; nothing here can undo it."""
        of, counts, count = self.of, manifest.counts, metrics.DEFAULT
        try:
            self.reader.commit(manifest.next_offsets)
            self._report_lag()
        except BrokerError as error:
            of.alarm("lag_monitor", str(error))
        self.pusher.notify()
        if outcome.alarms:
            of.alarm("expectation", "expectations on the batch failed", block=manifest.block_id, failed=outcome.alarms)
        count.blocks.labels(of.stream).inc()
        count.accepted.labels(of.stream).inc(counts.sealed + counts.set_aside)
        count.duplicates.labels(of.stream).inc(counts.duplicate)
        for _, reasons in outcome.rejected:
            count.rejected.labels(of.stream, reasons[0].code).inc()
        facts = {"block": manifest.block_id, "offsets": manifest.nominal_units, "accepted": counts.sealed}
        facts |= {"set_aside": counts.set_aside, "duplicate": counts.duplicate, "rejected": counts.rejected}
        log.info("block sealed", stream=of.stream, **facts)
        of.event("sealed", manifest=manifest, **facts)
