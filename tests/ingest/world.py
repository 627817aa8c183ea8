"""A stream with its data repository, an ingester on it, and the whole history of what became of its messages."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingest.broker import KafkaSettings, Message, TopicReader, TopicWriter, describe_topic, ensure_topic
from ingest.deadletters import DeadLetter, read_dead_letters
from ingest.expectations import write_default_suite
from ingest.ingester import Ingester
from ingest.manifest import Manifest
from ingest.parquet import Row, read_rows
from ingest.record import RecordLimits
from ingest.repository import DataRepository
from tests.ingest.blocks import frozen

STREAM = "desk"
LANE = "desk-0"
LIMITS = RecordLimits(frozenset({"billing", "travel"}), frozenset({"refund", "visa"}), 2000, 100)


def line(number: int, user: str | None = None, **changes: object) -> bytes:
    """A good record as JSON."""
    fields: dict[str, object] = {
        "event_id": f"e{number}",
        "user_id": user or f"u{number % 17}",
        "domain": "billing",
        "prompt": f"question {number}",
        "completion": "refund",
        "label": "refund",
        **changes,
    }
    return json.dumps(fields).encode()


def put(settings: KafkaSettings, topic: str, values: Sequence[bytes | None], partitions: int = 1) -> None:
    """Put messages on a topic, in order, keyed by user where there is one."""
    ensure_topic(settings, topic, partitions)
    with TopicWriter(settings) as writer:
        for value in values:
            try:
                key = json.loads(value or b"")["user_id"].encode()
            except (ValueError, TypeError, KeyError, AttributeError):
                key = b"?"  # a tombstone without a key is none
            writer.send(topic, key, value)
        writer.flush()


@dataclass(frozen=True)
class World:
    """Where one stream lives. Its fields are plain, so that a child process can be given one."""

    root: Path
    settings: KafkaSettings
    topic: str
    limits: RecordLimits = LIMITS
    unit: str = "record"
    per_user: int = 1000
    block_offsets: int = 100
    block_seconds: float = 30.0
    remote: str = ""

    @property
    def suite(self) -> Path:
        return self.root / "expectations" / f"{STREAM}.yaml"

    def make(self) -> "World":
        DataRepository.init(self.root / "data", remote=self.remote or str(self.root / "remote"))
        write_default_suite(self.suite, self.limits)
        return self

    @property
    def repo(self) -> DataRepository:
        return DataRepository(self.root / "data")

    def ingester(self, on_event: Callable[[str, Mapping[str, Any]], None] | None = None) -> Ingester:
        unit: Any = self.unit
        return Ingester(
            stream=STREAM,
            topic=self.topic,
            settings=self.settings,
            repo=self.repo,
            limits=self.limits,
            suite_path=self.suite,
            unit=unit,
            k_per_user=self.per_user,
            split_key=b"k" * 32,
            holdout_share=0.1,
            policy=lambda n: {**frozen(n), "unit": self.unit},
            block_offsets=self.block_offsets,
            block_seconds=self.block_seconds,
            on_event=on_event,
        )

    def ingest(self, idle_s: float = 0.3, **options: Any) -> list[Manifest]:
        """Run until the topic is silent."""
        return self.ingester(options.pop("on_event", None)).run(threading.Event(), until_idle_s=idle_s, **options)

    def rows(self) -> dict[str, list[tuple[str, Row]]]:
        """Block to its rows, each with its split, from a pinned clone."""
        repo = self.repo
        pinned = repo.checkout(repo.pin(STREAM), self.root / "clone")
        try:
            return {
                manifest.block_id: [
                    (file.split, row)
                    for file in manifest.files
                    if file.split != "rejects" and (path := pinned.file(manifest, file.split)) is not None
                    for row in read_rows(path)
                ]
                for manifest in repo.manifests(STREAM)
            }
        finally:
            pinned.close()

    def letters(self) -> list[DeadLetter]:
        return read_dead_letters(self.settings, self.topic, 1_000_000)

    def messages(self) -> list[Message]:
        """Everything the topic holds."""
        info = describe_topic(self.settings, self.topic)
        assert info is not None
        found: list[Message] = []
        with TopicReader(self.settings, self.topic) as reader:
            bounds = reader.bounds(info.partitions)
            reader.seek({p: first for p, (first, _) in bounds.items()})
            while len(found) < sum(end - first for first, end in bounds.values()):
                batch = reader.poll(10_000, 5000)
                assert batch, "the broker lost messages"
                found += batch
        return found

    def check_history(self) -> Counter[str]:
        """Every message landed exactly once: in one block, in the dead letters, or as the duplicate of one that did.

        Returns how many landed where.
        """
        manifests = self.repo.manifests(STREAM)
        self._check_offsets(manifests)
        rows = [(split, row) for block in self.rows().values() for split, row in block]
        at = Counter((partition, offset) for _, (partition, offset, _) in rows)
        identities = Counter((record.user_id, record.event_id) for _, (_, _, record) in rows)
        assert set(at.values()) <= {1}, "an offset is in two blocks"
        assert set(identities.values()) <= {1}, "a record is in two blocks"
        dead = {tuple(int(part) for part in letter.key.split("/")[-2:]) for letter in self.letters()}
        assert not dead & set(at), "a message is in a block and in the dead letters"
        where: Counter[str] = Counter()
        for message in self.messages():
            if (message.partition, message.offset) in at:
                where["block"] += 1
            elif (message.partition, message.offset) in dead:
                where["dead"] += 1
            else:
                parsed = json.loads(message.value or b"")
                assert (parsed["user_id"], parsed["event_id"]) in identities, "a message was lost"
                where["duplicate"] += 1
        counted = [m.counts for m in manifests]
        assert where["block"] == sum(c.sealed + c.set_aside for c in counted)
        assert where["dead"] == sum(c.rejected for c in counted)
        assert where["duplicate"] == sum(c.duplicate for c in counted)
        return where

    @staticmethod
    def _check_offsets(manifests: Sequence[Manifest]) -> None:
        """Spans of all lanes together continue each other without hole or overlap, in each partition."""
        spans: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for manifest in manifests:
            assert manifest.counts.total <= manifest.nominal_units
            for part in manifest.offsets:
                if part.span:
                    spans.setdefault((manifest.incarnation, part.partition), []).append((part.start, part.end))
        for found in spans.values():
            reached = 0
            for start, end in sorted(found):
                assert start == reached, "spans leave a hole, or overlap"
                reached = end
