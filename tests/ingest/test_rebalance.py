"""Processes of one consumer group on Apache Kafka: they share, join, leave, sleep and wake, and nothing lands twice."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from ingest.broker import Message, TopicReader, TopicWriter, ensure_topic
from ingest.ingester import Batch
from ingest.manifest import Manifest
from ingest.steps import Step
from tests.ingest.blocks import manifest_of
from tests.ingest.world import STREAM, World, line
from tests.kafka_servers import ApacheKafka

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")

# Children are forked from a server that has imported Great Expectations once, instead of four seconds each.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ingest.ingester", "great_expectations", "dvc.repo", "tests.ingest.world"])
# Joins, sessions and rebalances take seconds; a loaded machine takes several times as many.
PATIENCE_SECONDS = 120.0


def _member(world: World, hold: Step | None, wire: Connection) -> None:
    """The child: tell every step, wait at `hold` the first time until told to go on, stop when told so."""
    stop, go = threading.Event(), threading.Event()

    def obey() -> None:
        while True:
            try:
                order = wire.recv()
            except EOFError:
                return
            (go if order == "go" else stop).set()

    threading.Thread(target=obey, daemon=True).start()

    def listen(name: str, facts: Mapping[str, Any]) -> None:
        plain = {key: value for key, value in facts.items() if isinstance(value, str | int | list | dict)}
        wire.send((name, plain))
        if name == hold:
            go.wait()

    try:
        world.ingester(listen).run(stop)
    except BaseException as error:
        wire.send(("crash", {"message": f"{type(error).__name__}: {error}"}))
        raise


class Member:
    """One process of the group, and all it has told."""

    def __init__(self, world: World, hold: Step | None = None) -> None:
        self.wire, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_member, args=(world, hold, theirs))
        self.process.start()
        theirs.close()
        self.told: list[tuple[str, dict[str, Any]]] = []

    def _hear(self) -> None:
        try:
            while self.wire.poll():
                self.told.append(self.wire.recv())
                assert self.told[-1][0] != "crash", self.told[-1]
        except (EOFError, OSError):
            pass

    def until(self, happened: Callable[["Member"], bool]) -> None:
        """Wait until something has been told."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not happened(self):
            assert time.monotonic() < end, [name for name, _ in self.told][-30:]
            self._hear()
            time.sleep(0.05)

    def facts(self, name: str) -> list[dict[str, Any]]:
        self._hear()
        return [facts for told, facts in self.told if told == name]

    @property
    def holds(self) -> set[int]:
        """Partitions it reads now, as far as told."""
        self._hear()
        held: set[int] = set()
        for name, facts in self.told:
            if name == "taken":
                held |= set(facts["offsets"])
            elif name == "lost":
                held -= set(facts["partitions"])
            elif name == "resumed":
                held = set()
        return held

    def go_on(self) -> None:
        self.wire.send("go")

    def stop(self) -> None:
        self.wire.send("stop")
        self.process.join(PATIENCE_SECONDS)
        assert self.process.exitcode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.join(PATIENCE_SECONDS)
        self.wire.close()


class Group:
    """Members of one stream; what a test leaves running is killed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.members: list[Member] = []

    def join(self, hold: Step | None = None) -> Member:
        self.members.append(Member(self.world, hold))
        return self.members[-1]

    def send(self, numbers: range, partition_of: Callable[[int], int] | None = None) -> None:
        """Good records; where they go is decided by their key, or by `partition_of`."""
        with TopicWriter(self.world.settings) as writer:
            for number in numbers:
                if partition_of is None:
                    writer.send(self.world.topic, str(number).encode(), line(number))
                else:
                    self.send_to(writer, partition_of(number), line(number))
            writer.flush()

    def send_to(self, writer: TopicWriter, partition: int, value: bytes) -> None:
        writer._pending.append(
            (self.world.topic, writer._producer.send(self.world.topic, value=value, partition=partition))
        )

    def all_read(self) -> bool:
        """Whether every offset of the topic is in a block."""
        reached = self.world.repo.frontier(STREAM)
        return sum(end for nexts in reached.values() for end in nexts.values()) >= len(self.world.messages())


@pytest.fixture
def group(tmp_path: Path, apache_kafka: ApacheKafka, topic: str) -> Iterator[Group]:
    world = World(tmp_path, apache_kafka.settings, topic, block_offsets=50, block_seconds=0.5).make()
    ensure_topic(world.settings, topic, 4)
    made = Group(world)
    yield made
    for member in made.members:
        member.kill()


def _blocks_of(manifests: list[Manifest], lane: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest.lane == lane]


def _share(*members: Member) -> bool:
    """Whether these have all four partitions among them, each some."""
    held = [member.holds for member in members]
    return all(held) and sum(map(len, held)) == 4 and set.union(*held) == {0, 1, 2, 3}


def test_members_share_join_and_leave_and_what_does_not_move_is_kept(group: Group) -> None:
    first = group.join()
    first.until(lambda m: m.holds == {0, 1, 2, 3})
    group.send(range(200))
    second = group.join()
    second.until(lambda _: _share(first, second))
    # What the first kept, it kept: it let go of two, and was given nothing anew.
    lost = {p for facts in first.facts("lost") for p in facts["partitions"]}
    assert lost == second.holds
    kept = first.holds
    group.send(range(200, 400))
    third = group.join()
    third.until(lambda _: _share(first, second, third))
    group.send(range(400, 600))
    third.until(lambda m: bool(m.facts("sealed")))
    third.stop()
    first.until(lambda _: _share(first, second))
    group.send(range(600, 800))
    first.until(lambda _: group.all_read())
    first.stop()
    second.stop()
    assert group.world.check_history() == {"block": 800}
    manifests = group.world.repo.manifests(STREAM)
    assert {manifest.lane for manifest in manifests} == {"desk-0", "desk-1", "desk-2"}
    # At least one partition never left the first.
    assert kept - {p for facts in first.facts("lost") for p in facts["partitions"]}
    assert not group.world.repo.ownership(STREAM).read().held_by("desk-0")


@pytest.mark.slow  # the small soak stops and wakes one too
def test_a_zombie_is_refused_and_starts_over(group: Group) -> None:
    """It holds a block that is written and added when it falls asleep; its successor reads the same messages."""
    zombie = group.join(hold=Step.ADDED)
    zombie.until(lambda m: m.holds == {0, 1, 2, 3})
    group.send(range(40))
    zombie.until(lambda m: bool(m.facts("added")))
    assert zombie.process.pid is not None
    os.kill(zombie.process.pid, signal.SIGSTOP)
    successor = group.join()
    successor.until(lambda m: m.holds == {0, 1, 2, 3})
    successor.until(lambda _: group.all_read())
    zombie.go_on()
    os.kill(zombie.process.pid, signal.SIGCONT)
    zombie.until(lambda m: any(facts["kind"] == "start_over" for facts in m.facts("alarm")))
    (told, *_) = [facts["message"] for facts in zombie.facts("alarm") if facts["kind"] == "start_over"]
    assert "by another writer" in told
    group.send(range(40, 80))
    successor.until(lambda _: group.all_read())
    zombie.stop()
    successor.stop()
    assert group.world.check_history() == {"block": 80}


@pytest.mark.parametrize("step", [Step.POLLED, Step.ADDED])
def test_a_zombie_at_any_step_is_refused_where_another_lane_took_its_partitions(
    tmp_path: Path, apache_kafka: ApacheKafka, topic: str, step: Step
) -> None:
    """The same without sleep: while it is at the step, another lane takes a partition and commits a block of it."""
    world = World(tmp_path, apache_kafka.settings, topic).make()
    ensure_topic(world.settings, topic, 2)
    group = Group(world)
    group.send(range(30), partition_of=lambda number: number % 2)
    alarms: list[str] = []

    def overtake(name: str, facts: Mapping[str, Any]) -> None:
        if name == "alarm":
            alarms.append(facts["kind"])
        repo = world.repo
        if name != step or "desk-1" in repo.lane_heads(STREAM):
            return
        with repo.lane(STREAM, "desk-1") as lane:
            owners = repo.ownership(STREAM).take("desk-1", {1})
            # All of them rejected, as far as this block says: what counts is whose they are.
            block = manifest_of(lane, lane.head(), 0, 10, topic=topic, incarnation=owners.incarnation)
            spans = (block.offsets[0].model_copy(update={"partition": 1}),)
            lane.commit(block.model_copy(update={"offsets": spans}), lane.head())

    sealed = world.ingest(on_event=overtake)
    assert alarms[:1] == ["start_over"]
    starts = {part.partition: part.start for part in sealed[0].offsets}
    assert starts == {0: 0, 1: 10}
    assert sum(manifest.counts.sealed for manifest in sealed) == 20
    World._check_offsets(world.repo.manifests(STREAM))


def test_a_record_that_reaches_two_lanes_at_once_lands_once(group: Group) -> None:
    """Both are held after their claims, so that neither has committed when the other asks."""
    ones = [group.join(hold=Step.CLAIMED), group.join(hold=Step.CLAIMED)]
    ones[0].until(lambda _: _share(*ones))
    with TopicWriter(group.world.settings) as writer:
        for number in range(20):
            # The same twenty on all four partitions, and for five of them something else in conflict.
            for partition in range(4):
                group.send_to(writer, partition, line(number))
        for number in range(5):
            group.send_to(writer, number % 4, line(number, prompt="something else"))
        writer.flush()
    for one in ones:
        one.until(lambda m: bool(m.facts("claimed")))
    for one in ones:
        one.go_on()
    ones[0].until(lambda _: group.all_read())
    for one in ones:
        one.stop()
    assert group.world.check_history() == {"block": 20, "duplicate": 60, "dead": 5}
    assert {m.lane for m in group.world.repo.manifests(STREAM)} == {"desk-0", "desk-1"}


def test_a_member_that_dies_with_a_claim_leaves_its_record_to_the_next(group: Group) -> None:
    """The other lane drops its copy as a duplicate of a block that never comes to be."""
    ones = [group.join(hold=Step.CLAIMED), group.join()]
    ones[0].until(lambda _: _share(*ones))
    mine, theirs = min(ones[0].holds), min(ones[1].holds)
    with TopicWriter(group.world.settings) as writer:
        # Kafka makes a rebalance wait for a member that is held: the other one must be through with it, and read.
        group.send_to(writer, theirs, line(0))
        writer.flush()
        ones[1].until(lambda m: bool(m.facts("sealed")))
        group.send_to(writer, mine, line(1))
        writer.flush()
        ones[0].until(lambda m: bool(m.facts("claimed")))
        group.send_to(writer, theirs, line(1))
        writer.flush()
    ones[1].until(lambda m: len(m.facts("sealed")) > 1)
    assert [facts["duplicate"] for facts in ones[1].facts("sealed")] == [0, 1]
    ones[0].kill()
    ones[1].until(lambda _: group.all_read())
    ones[1].stop()
    assert group.world.check_history() == {"block": 2, "duplicate": 1}
    (dead,) = {facts["lane"] for facts in ones[0].facts("resumed")}
    assert dead not in {manifest.lane for manifest in group.world.repo.manifests(STREAM)}


def test_partitions_given_before_it_is_asked_for_them_are_read_from_their_beginning(
    tmp_path: Path, apache_kafka: ApacheKafka, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rebalance ends between two looks at it: what the consumer has then is told as given once more."""
    world = World(tmp_path, apache_kafka.settings, topic).make()
    ensure_topic(world.settings, topic, 2)
    Group(world).send(range(150))
    real = TopicReader.assigned

    def assigned(reader: TopicReader) -> set[int]:
        end = time.monotonic() + PATIENCE_SECONDS
        while reader._moves is not None and len(real(reader)) < 2:
            assert time.monotonic() < end
            reader._consumer.poll(timeout_ms=100)
        return real(reader)

    patient = TopicReader.poll
    monkeypatch.setattr(TopicReader, "assigned", assigned)
    # So that the first poll brings messages, before the note is read.
    monkeypatch.setattr(TopicReader, "poll", lambda reader, most, _: patient(reader, most, 2000))
    world.ingest()
    assert world.check_history() == {"block": 150}


def test_messages_of_a_partition_that_was_just_taken_away_do_not_stay_without_their_span() -> None:
    batch = Batch()
    batch.gain({0: 0, 1: 0})
    messages = [Message(p, offset, None, b"", (), 0) for p in (0, 1) for offset in range(3)]
    # Partition 1 has no position any more: a rebalance took it between the poll and the question.
    assert batch.take(messages, {0: 3})
    assert [(m.partition, m.offset) for m in batch.messages] == [(0, 0), (0, 1), (0, 2)]
    assert [(part.start, part.end) for part in batch.ranges()] == [(0, 3), (0, 0)]
    batch.lose({0})
    assert (batch.span, batch.messages, batch.began) == (0, [], None)
