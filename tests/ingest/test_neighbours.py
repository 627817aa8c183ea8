"""PRIVACY's neighbours over the whole of ingest: one unit nulled out of the topic changes nobody else's fate.

Fate: the block a message is in and its split, or its reasons for rejection, or that it is a duplicate.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.broker import Message, TopicWriter, ensure_topic
from ingest.expectations import Judged
from ingest.manifest import OffsetRange
from ingest.record import Reason, Record
from ingest.seen import SeenIndex
from ingest.sorting import Outcome, judge, sort_out
from ingest.split import split_of
from tests.ingest.world import LIMITS, STREAM, World
from tests.kafka_servers import ApacheKafka

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")

USERS, EVENTS = ("ann", "bob", "cid"), ("1", "2", "3", "4", "5")
Where = tuple[int, int]
Fate = tuple[object, ...]


@dataclass(frozen=True)
class Sent:
    """One message, with the unit it belongs to whether or not it is a record."""

    user: str
    event: str
    kind: str

    @property
    def value(self) -> bytes:
        fields = {
            "event_id": self.event,
            "user_id": self.user,
            "domain": "billing",
            "prompt": "what of it?",
            "completion": "refund",
        }
        changed: dict[str, object] = {
            "good": {},
            "other": {"prompt": "something else"},
            "third": {"completion": "something else"},
            "undeclared": {"domain": "unheard"},
            "blank": {"prompt": "   "},
            "unknown": {"surprise": 1},
        }
        text = json.dumps({**fields, **changed.get(self.kind, {})})  # type: ignore[dict-item]
        return text[:-5].encode() if self.kind == "torn" else text.encode()

    def is_of(self, unit: "Unit") -> bool:
        return self.user == unit.user and (unit.event is None or self.event == unit.event)


@dataclass(frozen=True)
class Unit:
    """What the guarantee protects: a user, or one event of a user."""

    user: str
    event: str | None = None


KINDS = ("good", "good", "good", "other", "third", "undeclared", "blank", "unknown", "torn")
SENT = st.builds(Sent, st.sampled_from(USERS), st.sampled_from(EVENTS), st.sampled_from(KINDS))
TOPICS = st.lists(st.lists(SENT, max_size=16), min_size=1, max_size=3)
UNITS = st.builds(Unit, st.sampled_from(USERS), st.sampled_from(EVENTS) | st.none())


def _validate(records: Sequence[Record]) -> Judged:
    """One expectation on one row, as a suite may have."""
    reason = Reason("expectation", "prompt", "must not be blank")
    return Judged({row: (reason,) for row, record in enumerate(records) if not record.prompt.strip()}, ())


def _split(user: str) -> str:
    return split_of(user, b"k" * 32, 0.3)


def _nulled(topic: Sequence[Sequence[Sent]], unit: Unit | None) -> list[list[bytes | None]]:
    return [[None if unit is not None and one.is_of(unit) else one.value for one in part] for part in topic]


def _fates(block: object, outcome: Outcome, messages: Sequence[Message]) -> Iterator[tuple[Where, Fate]]:
    """What became of each message of a block."""
    found: dict[Where, Fate] = {}
    for split, rows in outcome.rows.items():
        found |= {(p, o): ("sealed", block, split, record) for p, o, record in rows}
    found |= {(m.partition, m.offset): ("rejected", block, reasons) for m, reasons in outcome.rejected}
    for message in messages:
        where = (message.partition, message.offset)
        yield where, found.get(where, ("duplicate", block))


@dataclass
class Lanes:
    """Two lanes that take turns, each with partitions of its own, on one index; a lane may die before its commit."""

    index: SeenIndex
    values: list[list[bytes | None]]
    per_user_max: int | None
    span: int
    nexts: dict[int, int] = field(default_factory=dict)
    fates: dict[Where, Fate] = field(default_factory=dict)

    def seal(self, lane: int, number: int, *, dies: bool) -> None:
        ranges, messages = [], []
        for partition in range(lane, len(self.values), 2):
            start = self.nexts.get(partition, 0)
            end = min(start + self.span, len(self.values[partition]))
            ranges.append(OffsetRange(partition=partition, start=start, end=end))
            messages += [Message(partition, o, None, self.values[partition][o], (), 0) for o in range(start, end)]
        outcome = sort_out(
            judge(messages, LIMITS, _validate),
            claim=lambda found: self.index.claim("i", ranges, found),
            split=_split,
            per_user_max=self.per_user_max,
        )
        if dies:
            return
        for part in ranges:
            self.nexts[part.partition] = part.end
        self.fates.update(_fates((lane, number), outcome, messages))
        self.index.settle(_Block(f"s-{lane}", number, "i", tuple(ranges)), {})  # type: ignore[arg-type]


@dataclass
class _Block:
    """As much of a manifest as the index asks for."""

    lane: str
    seq: int
    incarnation: str
    offsets: tuple[OffsetRange, ...]
    nonce: str = ""


def _run(values: list[list[bytes | None]], per_user_max: int | None, span: int, deaths: set[int]) -> dict[Where, Fate]:
    with tempfile.TemporaryDirectory() as folder, closing(SeenIndex(Path(folder) / "seen.sqlite3")) as index:
        lanes = Lanes(index, values, per_user_max, span)
        number = 0
        while any(lanes.nexts.get(p, 0) < len(part) for p, part in enumerate(values)):
            number += 1
            for lane in (0, 1):
                if 2 * number + lane in deaths:
                    lanes.seal(lane, number, dies=True)
                lanes.seal(lane, number, dies=False)
        return lanes.fates


def _others(topic: Sequence[Sequence[Sent]], unit: Unit) -> set[Where]:
    return {(p, o) for p, part in enumerate(topic) for o, one in enumerate(part) if not one.is_of(unit)}


@settings(max_examples=150)
@given(TOPICS, UNITS, st.integers(1, 16), st.integers(1, 3), st.sets(st.integers(2, 12), max_size=3))
def test_one_unit_more_or_less_changes_nobody_elses_fate(
    topic: list[list[Sent]], unit: Unit, span: int, per_user: int, deaths: set[int]
) -> None:
    # Under `record` nothing may depend on how many records a user has; under `user` it may, for that user.
    per_user_max = per_user if unit.event is None else None
    with_it = _run(_nulled(topic, None), per_user_max, span, deaths)
    without = _run(_nulled(topic, unit), per_user_max, span, deaths)
    assert with_it.keys() == without.keys()
    others = _others(topic, unit)
    assert {where: with_it[where] for where in others} == {where: without[where] for where in others}
    assert all(fate[0] == "rejected" for where, fate in without.items() if where not in others)


def test_a_bound_per_user_would_be_found_under_the_unit_record() -> None:
    """The property can fail: a cap on a user's records couples her events, which the unit `record` forbids."""
    topic = [[Sent("ann", "1", "good"), Sent("ann", "2", "good")]]
    fates = [_run(_nulled(topic, unit), 1, 5, set()) for unit in (None, Unit("ann", "1"))]
    assert fates[0][0, 1] != fates[1][0, 1]


# ── the same through a broker


def _put(world: World, values: list[list[bytes | None]]) -> None:
    ensure_topic(world.settings, world.topic, len(values))
    with TopicWriter(world.settings) as writer:
        for partition, part in enumerate(values):
            for value in part:
                sent = writer._producer.send(world.topic, key=b"k", value=value, partition=partition)
                writer._pending.append((world.topic, sent))
        writer.flush()


def _through_the_broker(world: World, values: list[list[bytes | None]]) -> tuple[list[object], dict[Where, Fate]]:
    """The public sizes of the blocks, and the fate of each message."""
    _put(world, values)
    spans = [manifest.offsets for manifest in world.ingest()]
    letters = {letter.source: letter.reasons for letter in world.letters()}
    fates: dict[Where, Fate] = {}
    for manifest in world.repo.manifests(STREAM):
        for part in manifest.offsets:
            for where in ((part.partition, offset) for offset in range(part.start, part.end)):
                fates[where] = ("rejected", letters[where]) if where in letters else ("duplicate",)
    for block, rows in world.rows().items():
        fates |= {(p, o): ("sealed", block, split, record) for split, (p, o, record) in rows}
    world.check_history()
    return [*spans], fates


def _cast(partitions: int) -> list[list[Sent]]:
    """Sixty messages of a few users, of all kinds, the same on each partition but for their order."""
    ones = [Sent(USERS[i % 3], str(i % 7), KINDS[(i * 5) % len(KINDS)]) for i in range(60)]
    ones += ones[:9]
    return [ones[p * 11 :] + ones[: p * 11] for p in range(partitions)]


@pytest.mark.parametrize(
    ("unit", "partitions", "block_offsets"),
    [(Unit("bob"), 1, 25), (Unit("cid", "1"), 2, 500)],
)
def test_neighbouring_topics_through_apache_kafka(
    tmp_path: Path, apache_kafka: ApacheKafka, topic: str, unit: Unit, partitions: int, block_offsets: int
) -> None:
    cast = _cast(partitions)
    found = []
    for name, nulled in (("with", None), ("without", unit)):
        world = World(
            tmp_path / name,
            apache_kafka.settings,
            f"{topic}-{name}",
            unit="user" if unit.event is None else "record",
            per_user=3 if unit.event is None else 1000,
            block_offsets=block_offsets,
        ).make()
        found.append(_through_the_broker(world, _nulled(cast, nulled)))
    (spans, with_it), (spans_without, without) = found
    assert spans == spans_without
    others = _others(cast, unit)
    assert {where: with_it[where] for where in others} == {where: without[where] for where in others}
    assert Counter(fate[0] for where, fate in without.items() if where not in others) == {
        "rejected": sum(map(len, cast)) - len(others)
    }
    assert len({fate[0] for fate in with_it.values()}) == 3
