"""From a topic to sealed blocks: one process, one lane, the partitions the consumer group gives it.

    resume from what is committed → collect a span of offsets → judge → claim → write files → dead letters acknowledged
      → DVC add + git commit (the only commit point) → index → offsets to Kafka → push to the remote

`ingest.steps` names these. Killed anywhere before the commit, the span is read again, by this process or by whichever
is given the partition; anywhere after it, the span is done. See `ingest.ownership` for two that believe they have it.
"""

from __future__ import annotations

import gc
import secrets
import shutil
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from pydantic import ValidationError
from structlog import get_logger

from ingest import layout, metrics
from ingest.broker import TopicReader, TopicWriter, check, describe_topic, ensure_topic
from ingest.deadletters import OVERHEAD_BYTES_MAX, headers_of, key_of, topic_of
from ingest.drift import DriftWatch
from ingest.errors import BrokerError, LaneConflict, OffsetsGone, RepositoryError, SettingError
from ingest.expectations import Suite
from ingest.lane import take_free_lane
from ingest.manifest import Counts, DataFile, FrozenPolicy, Manifest, OffsetRange
from ingest.parquet import REJECTS, write_rejects, write_rows
from ingest.pusher import Pusher
from ingest.record import SCHEMA_VERSION
from ingest.resume import Start, incarnation_of, plan_start
from ingest.seen import Mark, SeenIndex, mark_of
from ingest.sorting import SET_ASIDE, Outcome, judge, sort_out
from ingest.split import check_split, split_of
from ingest.steps import Step

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from ingest.broker import KafkaSettings, Message, TopicInfo
    from ingest.datadocs import DataDocs
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
# A fetch that is under way when a topic seems silent, or a group that is still gathering, comes to an end within this.
_SLOW_SECONDS: Final = 10.0
# How often a topic made anew is looked for.
_TOPIC_SECONDS: Final = 30.0
# One message is asked for that is known to be there; only a broker in trouble takes longer.
_MARK_POLLS: Final = 10
_MARK_POLL_MS: Final = 500
# Shares of so many records are known to a percent or two; more of them would say the same.
_DRIFT_RECORDS: Final = 2500
# Lanes that name a topic at the same time agree at the second try.
_NAME_TRIES: Final = 20
# Most people come again: their side is an HMAC, asked for once. So many are remembered in some ten megabytes.
_USERS_REMEMBERED: Final = 65_536


def spare_collector() -> None:
    """Keep Python's cyclic collector from walking through the libraries again and again: a third of ingest's time.

    For a process that does nothing but ingest, once its libraries are loaded. Their objects (some hundred thousand)
    are set apart, and collections come after as many new objects as a block makes.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


class _StartOver(Exception):
    """The topic or the lane changed under us: resume from what is committed."""


@dataclass
class Batch:
    """Messages collected for one block, with the span they come from, by partition."""

    messages: list[Message] = field(default_factory=list)
    start: dict[int, int] = field(default_factory=dict)
    end: dict[int, int] = field(default_factory=dict)
    began: float | None = None

    @property
    def span(self) -> int:
        """Offsets covered, over all partitions."""
        return sum(self.end.values()) - sum(self.start.values())

    def gain(self, offsets: Mapping[int, int]) -> None:
        """Partitions that are read from these offsets on."""
        self.start |= offsets
        self.end |= offsets

    def lose(self, partitions: Collection[int]) -> None:
        """Partitions that somebody else reads now, from where this block would have begun."""
        for partition in partitions:
            self.start.pop(partition, None)
            self.end.pop(partition, None)
        self.messages = [m for m in self.messages if m.partition not in partitions]
        if not self.span:
            self.began = None

    def take(self, messages: Collection[Message], positions: Mapping[int, int]) -> bool:
        """Messages, and how far they reach; False if that is no further than before."""
        reached = {p: end for p, end in positions.items() if p in self.end and end > self.end[p]}
        self.end |= reached
        # A partition that a rebalance has just taken away has no position: what was read of it is read again.
        self.messages.extend(m for m in messages if m.offset < self.end.get(m.partition, 0))
        return bool(reached)

    def ranges(self) -> tuple[OffsetRange, ...]:
        """The span as a manifest names it."""
        return tuple(OffsetRange(partition=p, start=self.start[p], end=self.end[p]) for p in sorted(self.start))


class Ingester:
    """The consumer of one stream. Plain arguments in, blocks out; see :meth:`run`."""

    def __init__(
        self,
        *,
        stream: str,
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
        docs: DataDocs | None = None,
        on_event: Callable[[str, Mapping[str, Any]], None] | None = None,
    ) -> None:
        """Check the arguments; touches neither broker nor disk.

        `policy(nominal_units)` is frozen into each manifest; `k_per_user` bounds a user's records in one block
        where `unit` is `user`; `docs` are built of the newest block when they are due; `on_event(name, facts)`
        hears of every step, in the process's own thread but for pushes.

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
        self.stream, self.topic = stream, topic
        self.settings, self.repo, self.limits, self.suite_path = settings, repo, limits, suite_path
        self.per_user_max = k_per_user if unit == "user" else None
        self.split_key, self.holdout_share = split_key, holdout_share
        self._policy = policy
        self.block_offsets, self.block_seconds = block_offsets, block_seconds
        self.docs = docs
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
        see = f"docs/runbook.md#{kind}"
        log.warning("ingest alarm", stream=self.stream, kind=kind, message=message, see=see, **facts)
        self.event("alarm", kind=kind, message=message, **facts)

    def step(self, step: Step, block: str) -> None:
        """Tell the listener of a step, by its name."""
        self.event(step.value, block=block)

    def run(
        self, stop: threading.Event, max_blocks: int | None = None, until_idle_s: float | None = None
    ) -> list[Manifest]:
        """Seal blocks until stopped; returns their manifests.

        Several may run at once, each in a lane of its own: the consumer group divides the topic's partitions.
        Ends when `stop` is set (what is not sealed stays on the topic), after `max_blocks`, or when the topic has been
        silent for `until_idle_s` seconds (then what was collected is sealed first).

        Raises:
            BrokerError: the broker cannot be reached at the start, or refuses the dead letters.
            SuiteError, ValidationStopped: the expectation suite cannot be used.
            RepositoryError: a block could not be committed.
        """
        metrics.DEFAULT.begin(self.stream)
        large_bytes = ensure_topic(self.settings, topic_of(self.topic)).message_bytes_max - OVERHEAD_BYTES_MAX
        info = ensure_topic(self.settings, self.topic)
        group = f"tidegate-{self.stream}-{self.repo.identity}"
        with ExitStack() as stack:
            lane = stack.enter_context(take_free_lane(self.repo, self.stream))
            suite = Suite(self.suite_path)
            reader = stack.enter_context(TopicReader(self.settings, self.topic, group=group, member=lane.name))
            writer = stack.enter_context(TopicWriter(self.settings))
            pusher = stack.enter_context(Pusher(lane, lambda error: self.alarm("push", str(error))))
            session = stack.enter_context(_Session(self, info, large_bytes, lane, suite, reader, writer, pusher))
            return session.run(stop, max_blocks, until_idle_s)


class _Session:
    """One run: everything open, and where the lane stands. A context manager."""

    def __init__(
        self,
        ingester: Ingester,
        info: TopicInfo,
        large_bytes: int,
        lane: Lane,
        suite: Suite,
        reader: TopicReader,
        writer: TopicWriter,
        pusher: Pusher,
    ) -> None:
        self.of = ingester
        self.large_bytes = large_bytes
        self.info, self.lane, self.suite = info, lane, suite
        self.reader, self.writer, self.pusher = reader, writer, pusher
        self.ownership = lane.repo.ownership(ingester.stream)
        self.seen_path = lane.repo.lanes / f"{ingester.stream}.seen.sqlite3"
        self.seen = SeenIndex(self.seen_path)
        self.drift = DriftWatch(lane.root / "drift.json", labels=ingester.limits.labels)
        self.side_of = lru_cache(_USERS_REMEMBERED)(
            lambda user: split_of(user, ingester.split_key, ingester.holdout_share)
        )
        self.head = lane.head()
        self.incarnation = ""
        self.gaps: dict[int, int] = {}
        self.batch = Batch()
        self._asked_lag = self._asked_topic = time.monotonic()
        self._outage = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Nothing is under way any more: whoever is given these partitions need not fence this lane.
        with suppress(RepositoryError):
            self.ownership.release(self.lane.name, set(self.batch.start))
        self.seen.close()

    def run(self, stop: threading.Event, max_blocks: int | None, until_idle_s: float | None) -> list[Manifest]:
        sealed: list[Manifest] = []
        resumed = False
        while not stop.is_set() and (max_blocks is None or len(sealed) < max_blocks):
            try:
                if not resumed:
                    self._resume()
                    resumed = True
                if not self._collect(stop, until_idle_s):
                    break
                sealed.append(self._seal())
            except (_StartOver, OffsetsGone, LaneConflict) as error:
                self.of.alarm("start_over", str(error))
                self._refresh_topic()
                resumed = False
        return sealed

    def _refresh_topic(self) -> None:
        self._asked_topic = time.monotonic()
        self.info = ensure_topic(self.of.settings, self.of.topic)

    def _resume(self) -> None:
        """Take up where the blocks end."""
        self.lane.recover()
        # Before any partition is taken: a commit on top of it proves that none was taken away since.
        self.head = self.lane.head()
        self.batch, self.gaps = Batch(), {}
        # Another process may have made the index anew: then ours is a file that is no more.
        self.seen.close()
        self.seen = SeenIndex(self.seen_path)
        read = self._reconcile()
        self.incarnation = self._name_topic()
        if self.seen.has_others(self.incarnation):
            self._fence_others()
            # Some may be of blocks that were committed but a moment ago.
            read += self._reconcile()
            self.seen.forget_others(self.incarnation)
        log.info("ingest resumed", stream=self.of.stream, lane=self.lane.name, blocks_indexed=read)
        self.of.event("resumed", incarnation=self.incarnation, lane=self.lane.name)
        self._take(self.reader.assigned())

    def _reconcile(self) -> int:
        return self.seen.reconcile(self.lane.repo, self.of.stream, self._fence_others)

    def _fence_others(self) -> None:
        repo = self.lane.repo
        self.ownership.fence_others(self.lane.name, repo.lane_heads(self.of.stream))

    def _name_topic(self) -> str:
        """The incarnation all lanes agree on: the known one, unless the topic was made anew or lost messages."""
        for _ in range(_NAME_TRIES):
            owners = self.ownership.read()
            # Before the bounds, which may only grow after it.
            reached = self.lane.repo.frontier(self.of.stream).get(owners.incarnation, {})
            bounds = self.reader.bounds(self.info.partitions)
            agree = self._marks_agree(owners.incarnation, bounds)
            name = incarnation_of(self.info, owners, reached, bounds, marks_agree=agree)
            if name == owners.incarnation:
                return name
            if owners.incarnation:
                self.of.alarm(
                    "incarnation", f"topic={self.of.topic}: made anew or shorter than before; read from its beginning"
                )
                # What they claim for messages of the old topic, and do not commit, nobody would ever read again.
                self._fence_others()
            self.ownership.renew(owners, self.of.topic, name)
        raise LaneConflict(f"topic={self.of.topic}: renamed {_NAME_TRIES} times in a row; is it deleted in a loop?")

    def _marks_agree(self, incarnation: str, bounds: Mapping[int, tuple[int, int]]) -> bool:
        """Whether the last messages read are still at their offsets. Topic ids make the question needless."""
        marks = self.seen.marks(incarnation)
        if self.info.topic_id is not None or not marks:
            return True
        with TopicReader(self.of.settings, self.of.topic) as look:
            for partition, mark in marks.items():
                first, end = bounds.get(partition, (0, 0))
                if not first <= mark.offset < end:
                    continue
                look.seek({partition: mark.offset})
                for _ in range(_MARK_POLLS):
                    if found := look.poll(1, _MARK_POLL_MS):
                        if found[0].offset == mark.offset and mark_of(found[0]) != mark.digest:
                            return False
                        break
        return True

    def _take(self, partitions: Collection[int]) -> None:
        """Make partitions this lane's, and read them from where their blocks end."""
        if not partitions:
            return
        owners = self.ownership.take(self.lane.name, partitions)
        if owners.incarnation != self.incarnation:
            raise _StartOver(f"topic={self.of.topic}: another lane found it made anew")
        reached = self.lane.repo.frontier(self.of.stream).get(self.incarnation, {})
        start = plan_start(self.incarnation, reached, self.reader.bounds(partitions))
        for partition, missing in sorted(start.gaps.items()):
            self.of.alarm(
                "gap",
                f"topic={self.of.topic}: partition {partition} dropped {missing} offsets that were never read; "
                "raise the topic's retention",
                partition=partition,
                offsets_lost=missing,
            )
            self.seen.forget_dropped(self.incarnation, partition, reached[partition], start.offsets[partition])
        self.gaps |= start.gaps
        self.batch.gain(start.offsets)
        self.reader.seek(start.offsets)
        self._tell_taken(start)

    def _tell_taken(self, start: Start) -> None:
        log.info("partitions taken", stream=self.of.stream, lane=self.lane.name, offsets=dict(start.offsets))
        self.of.event("taken", lane=self.lane.name, offsets=dict(start.offsets))

    def _follow_moves(self) -> set[int]:
        """Do what a rebalance asks for: let go of what was lost, take what was given; returns what was given."""
        lost, gained = self.reader.moves()
        if lost:
            self.batch.lose(lost)
            self.ownership.release(self.lane.name, lost)
            log.info("partitions lost", stream=self.of.stream, lane=self.lane.name, partitions=sorted(lost))
            self.of.event("lost", lane=self.lane.name, partitions=sorted(lost))
        # What is here already was taken between the rebalance and this note of it: its position is not to be trusted.
        self.batch.lose(gained)
        self._take(gained)
        return gained

    def _collect(self, stop: threading.Event, until_idle_s: float | None) -> bool:
        """Read one block's span, ended by offset count or clock, never by what is in it; False: nothing more to do."""
        news = time.monotonic()
        while not stop.is_set():
            now = time.monotonic()
            batch = self.batch
            missing = self.of.block_offsets - batch.span
            if missing <= 0 or (batch.began is not None and now - batch.began >= self.of.block_seconds):
                return True
            if until_idle_s is not None and self._silent(now - news, until_idle_s):
                return bool(batch.span)
            found = self.reader.poll(min(missing, _POLL_MESSAGES), _POLL_MS)
            # What was read of a partition before it was given to us again is read once more.
            if gained := self._follow_moves():
                found = [m for m in found if m.partition not in gained]
            if batch.take(found, self.reader.positions()):
                news = time.monotonic()
                batch.began = news if batch.began is None else batch.began
                continue
            if self._watch():
                # An absent broker is no idle topic.
                news = time.monotonic()
            stop.wait(_IDLE_SECONDS)
        return False

    def _silent(self, idle_s: float, until_idle_s: float) -> bool:
        """Whether the topic has been silent for so long; a slow answer is no silence, unless it lasts."""
        if idle_s < until_idle_s:
            return False
        if idle_s >= until_idle_s + _SLOW_SECONDS:
            return True
        if not self.batch.start:
            return False
        try:
            return self._lag() <= 0
        except BrokerError:
            return False

    def _watch(self) -> bool:
        """While nothing arrives: lag, and whether the topic and the broker are still there. True: the broker is not."""
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
        """Offsets this process's partitions hold and it has not read."""
        bounds = self.reader.bounds(self.batch.end)
        return sum(end - self.batch.end[partition] for partition, (_, end) in bounds.items())

    def _seal(self) -> Manifest:
        of, batch, began = self.of, self.batch, time.monotonic()
        block = self.lane.block_id(self.head.seq_next)
        of.step(Step.POLLED, block)
        self.suite = self.suite.refreshed()
        judgement = judge(batch.messages, of.limits, self.suite.validate)
        of.step(Step.VALIDATED, block)
        ranges = batch.ranges()
        outcome = sort_out(
            judgement,
            claim=lambda found: self.seen.claim(
                self.incarnation, ranges, found, lambda: self.lane.check_unmoved(self.head)
            ),
            split=self.side_of,
            per_user_max=of.per_user_max,
        )
        of.step(Step.CLAIMED, block)
        files, large = self._write(outcome)
        of.step(Step.WRITTEN, block)
        self._send_dead_letters(outcome, large)
        of.step(Step.DEAD_LETTERED, block)
        manifest = self._manifest(block, ranges, outcome, files)
        self.head = self.lane.commit(manifest, self.head, gaps=self.gaps.keys(), tell=lambda s: of.step(s, block))
        of.step(Step.COMMITTED, block)
        last = {m.partition: m for m in sorted(batch.messages, key=lambda m: m.offset)}
        self.seen.settle(manifest, {p: Mark(m.offset, mark_of(m)) for p, m in last.items()})
        of.step(Step.INDEXED, block)
        self.gaps = {}
        self.batch = Batch()
        self.batch.gain(batch.end)
        read_bytes = sum(len(m.value or b"") for m in batch.messages)
        self._tell(manifest, outcome, read_bytes, time.monotonic() - began)
        return manifest

    def _write(self, outcome: Outcome) -> tuple[tuple[DataFile, ...], set[tuple[int, int]]]:
        """The block's files, and which rejected messages are among them for being too large elsewhere."""
        seq = self.head.seq_next
        folder = self.lane.folder(seq)
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
                {"path": layout.data_path(self.lane.name, seq, split), "sha256": sha, "split": split}
            )
            for split, sha in shas.items()
        )
        return files, {(partition, offset) for partition, offset, _ in large}

    def _send_dead_letters(self, outcome: Outcome, large: set[tuple[int, int]]) -> None:
        """At least once, acknowledged before the commit."""
        if not outcome.rejected:
            return
        target = topic_of(self.of.topic)
        reference = layout.data_path(self.lane.name, self.head.seq_next, REJECTS)
        for message, reasons in outcome.rejected:
            elsewhere = (message.partition, message.offset) in large
            headers = headers_of(reasons, reference if elsewhere else None)
            key = key_of(self.of.topic, self.incarnation, message)
            self.writer.send(target, key, None if elsewhere else message.value, headers)
        self.writer.flush()

    def _manifest(
        self, block: str, ranges: tuple[OffsetRange, ...], outcome: Outcome, files: tuple[DataFile, ...]
    ) -> Manifest:
        return Manifest(
            block_id=block,
            stream=self.of.stream,
            lane=self.lane.name,
            seq=self.head.seq_next,
            topic=self.of.topic,
            incarnation=self.incarnation,
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
            policy=self.of.frozen_policy(sum(part.span for part in ranges)),
            sealed_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        )

    def _tell(self, manifest: Manifest, outcome: Outcome, read_bytes: int, seconds: float) -> None:
        """Everybody who wants to know of a committed block; nothing here can undo it."""
        of, counts = self.of, manifest.counts
        try:
            self.reader.commit(manifest.next_offsets)
            of.step(Step.ACKNOWLEDGED, manifest.block_id)
            self._report_lag()
        except BrokerError as error:
            of.alarm("lag_monitor", str(error))
        self.pusher.notify()
        if outcome.alarms:
            of.alarm("expectation", "expectations on the batch failed", block=manifest.block_id, failed=outcome.alarms)
        self._watch_content(manifest.block_id, outcome)
        metrics.DEFAULT.count(of.stream, manifest, outcome, read_bytes, seconds)
        facts = {"block": manifest.block_id, "offsets": manifest.nominal_units, "accepted": counts.sealed}
        facts |= {"set_aside": counts.set_aside, "duplicate": counts.duplicate, "rejected": counts.rejected}
        log.info("block sealed", stream=of.stream, seconds=round(seconds, 3), **facts)
        of.event("sealed", manifest=manifest, **facts)

    def _watch_content(self, block: str, outcome: Outcome) -> None:
        """What operators look at beside the counts: drift, and the Data Docs. Never in ingest's way."""
        of, records = self.of, outcome.records()
        try:
            sample = records[:: 1 + len(records) // _DRIFT_RECORDS]
            for sentence in self.drift.observe(block, sample):
                of.alarm("drift", sentence, block=block)
            # One process of a stream builds them.
            if of.docs is not None and self.lane.name == f"{of.stream}-0" and of.docs.due(time.monotonic()):
                of.docs.build(self.suite, records, block_id=block)
        except Exception as error:  # noqa: BLE001 - the block is committed, whatever a report of it does
            # Its text may hold content.
            kind = type(error).__name__
            of.alarm("report", f"drift or Data Docs: {kind}; see `tidegate expectations docs {of.stream}`", block=block)
