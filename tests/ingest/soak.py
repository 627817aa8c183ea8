"""`make soak`: kill ingest again and again under load, on Apache Kafka, then account for every message.

Two processes in one consumer group, each with a lane of its own, are killed (SIGKILL) at every named step and at random
times; some are stopped past their session and woken when others have their partitions; the broker is killed too.
The verdict comes from the whole history, as Jepsen's kafka workload has it: what was put on the topic against what
stands in the blocks and in the dead letters. It knows each message's fate from the way it was made, not from ingest.
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import structlog
from rich.console import Console
from rich.table import Table

from ingest.broker import Message, TopicWriter, ensure_topic
from ingest.errors import IngestError
from ingest.manifest import Manifest
from ingest.parquet import Row
from ingest.steps import Step
from tests.ingest.world import STREAM, World, line
from tests.kafka_servers import KAFKA_HOME, ApacheKafka

# Children are forked from a server that has imported Great Expectations once, instead of four seconds each.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["great_expectations", "dvc.repo", "tests.ingest.soak"])

TOPIC = "soak"
# A zombie is one that holds a block when it stops: after the commit there is nothing to refuse.
STOP_AT = (Step.POLLED, Step.CLAIMED, Step.WRITTEN, Step.ADDED)
# Session timeout, rebalance, and a successor that may be killed a few times before it has the partitions.
TAKEOVER_SECONDS_MAX = 120.0
# A child that is silent for so long hangs, which is a finding.
HANG_SECONDS = 180.0
# A child that ends and starts again is a rebalance, in which kafka-python gives nobody anything: so none ends soon.
PATIENT_SECONDS = 30.0
# What is always on the topic and not yet in a block.
BACKLOG_BLOCKS = 12
# After so many findings more of them say nothing new.
TROUBLE_MAX = 20
BAD = (b"broken", b"[]", b"\xff\xfe", b'{"event_id": 1}', line(1, domain="unheard"), line(2, surprise="x"), None)


@dataclass(frozen=True)
class Plan:
    """How one life of a child ends: at the nth time of a step, or so long after it has its partitions."""

    step: Step | None
    nth: int = 1
    seconds: float = 0.0
    stop: bool = False


@dataclass
class Figures:
    """What the soak found; `verdict` turns them into a sentence."""

    kills: int = 0
    stops: int = 0
    zombie_refused: int = 0
    broker_kills: int = 0
    refused_starts: int = 0
    records: int = 0
    in_blocks: int = 0
    duplicates: int = 0
    rejected: int = 0
    blocks: int = 0
    lanes: int = 0
    lost: int = 0
    twice: int = 0
    rejected_unaccounted: int = 0
    wrongly_rejected: int = 0
    offsets_wrong: int = 0
    counts_wrong: int = 0
    crashes: int = 0
    seconds: float = 0.0
    steps: dict[str, int] = field(default_factory=dict)

    @property
    def wrong(self) -> int:
        return (
            self.lost
            + self.twice
            + self.rejected_unaccounted
            + self.wrongly_rejected
            + self.offsets_wrong
            + self.counts_wrong
            + self.crashes
        )


def _child(world: World, plan: Plan | None, idle_s: float, tell: Connection) -> None:
    """Ingest until the topic is silent, or until the plan says to die."""
    heard = 0

    def listen(name: str, facts: Mapping[str, Any]) -> None:
        nonlocal heard
        plain = {key: value for key, value in facts.items() if isinstance(value, str | int | list | dict)}
        with suppress(BrokenPipeError):
            tell.send((name, plain))
        if plan is not None and name == plan.step:
            heard += 1
            if heard == plan.nth:
                os.kill(os.getpid(), signal.SIGSTOP if plan.stop else signal.SIGKILL)

    try:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        world.ingester(listen).run(threading.Event(), until_idle_s=idle_s)
    except IngestError as error:
        tell.send(("refused", {"message": str(error)}))
    except BaseException as error:  # noqa: BLE001 - anything else is a finding, and its text belongs in the report
        tell.send(("crash", {"message": f"{type(error).__name__}: {error}"}))
    finally:
        tell.close()
        # Not waiting for threads of libraries: a soak has many such ends.
        os._exit(0)


class _Life:
    """What becomes of one child, as its plan has it."""

    def __init__(self, plan: Plan | None, child: Any, taken_over: Callable[[float, set[int]], bool]) -> None:
        self.plan, self.child, self.taken_over = plan, child, taken_over
        self.refused = False
        self.holds: set[int] = set()
        self._kill_at: float | None = None
        self._stopped_at: float | None = None
        self._woken = False
        self._seen = 0
        self._heard_at = time.monotonic()

    def look(self) -> float:
        """Kill or wake it if it is time; returns for how many seconds it has been silent against its plan."""
        now = time.monotonic()
        if self._kill_at is not None and now >= self._kill_at:
            self.child.kill()
            self._kill_at = None
        if self._stopped_at is not None:
            self._heard_at = now
            if self.taken_over(self._stopped_at, self.holds):
                os.kill(self.child.pid, signal.SIGCONT)
                self._stopped_at, self._woken, self._kill_at = None, True, now + 30.0
        return now - self._heard_at

    def hear(self, name: str, facts: Mapping[str, Any]) -> None:
        self._heard_at = now = time.monotonic()
        if name == "taken":
            self.holds |= set(facts["offsets"])
        elif name in {"lost", "resumed"}:
            self.holds -= set(facts.get("partitions", self.holds))
        if self.plan is None:
            return
        self._seen += name == self.plan.step
        if self.plan.step is None and name == "taken" and self._kill_at is None:
            self._kill_at = now + self.plan.seconds
        elif self.plan.stop and not self._woken and name == self.plan.step and self._seen == self.plan.nth:
            self._stopped_at = now
        elif self._woken and not self.refused and name == "alarm" and facts["kind"] == "start_over":
            self.refused, self._kill_at = True, now + 1.0


class Soak:
    """One run: a topic that is fed, children that are killed, and what was heard of them."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.figures = Figures()
        self.lock = threading.Lock()
        self.one_zombie = threading.Lock()
        self.taken: list[tuple[float, set[int]]] = []
        self.made = 0
        self.written = 0
        self.sealed = 0
        self.trouble: list[str] = []
        self.plans: list[Plan] = []
        self.planned = 0  # children that are on their way to a planned end
        self.steps: Counter[str] = Counter()

    def _values(self, count: int) -> Iterator[tuple[bytes, bytes | None]]:
        """Messages with their keys: mostly good, some again under another key (elsewhere), conflicting, or broken."""
        for _ in range(count):
            dice = self.random.random()
            if dice < 0.05:
                yield os.urandom(8), self.random.choice(BAD)
                continue
            recent = self.random.randrange(max(self.made - 300, 0), self.made) if self.made and dice < 0.14 else None
            if recent is None:
                self.made += 1
                number = self.made - 1
                # The user alone would put all its records on one partition.
                yield f"u{number % 997}".encode(), line(number, f"u{number % 997}")
            elif dice < 0.12:
                yield os.urandom(8), line(recent, f"u{recent % 997}")
            else:
                yield os.urandom(8), line(recent, f"u{recent % 997}", prompt=f"other {dice}")

    def _feed(self, count: int) -> None:
        with self.lock, TopicWriter(self.world.settings) as writer:
            for done, (key, value) in enumerate(self._values(count), 1):
                writer.send(self.world.topic, key, value)
                if done % 5000 == 0:
                    writer.flush()
            writer.flush()
            self.written += count

    def plan(self, kills: int, stops: int) -> None:
        """Every step as often as every other, a third at random times, zombies at even distances among them."""
        timed = kills // 3
        named = [Plan(step, nth=1 + i % 2) for i, step in zip(range(kills - timed - stops), cycle(Step), strict=False)]
        plans = named + [Plan(None, seconds=self.random.uniform(0.05, 3.0)) for _ in range(timed)]
        self.random.shuffle(plans)
        for i in range(stops):
            plans.insert((i * len(plans)) // max(stops, 1) + 1, Plan(STOP_AT[i % len(STOP_AT)], nth=1, stop=True))
        self.plans = plans[::-1]

    def _spawn(self, plan: Plan | None, idle_s: float) -> tuple[Any, Connection]:
        ours, theirs = CONTEXT.Pipe(duplex=False)
        child = CONTEXT.Process(target=_child, args=(self.world, plan, idle_s, theirs))
        child.start()
        theirs.close()
        return child, ours

    def drive(self, end: float) -> None:
        """One slot: a child after the other, until all planned kills are done or time is up."""
        while time.monotonic() < end and len(self.trouble) < TROUBLE_MAX:
            with self.lock:
                plan = self.plans.pop() if self.plans else None
                self.planned += plan is not None
            if plan is None:
                if not self.one_zombie.locked():
                    return
                self._life(None, 3.0)  # somebody must take over what the stopped one holds
                continue
            if plan.stop:
                with self.one_zombie:
                    done = self._life(plan, PATIENT_SECONDS)
            else:
                done = self._life(plan, PATIENT_SECONDS)
            with self.lock:
                self.planned -= 1
                if not done:
                    self.plans.insert(0, plan)

    def feed(self, records: int, kills: int) -> None:
        """As much as the kills so far are of all kills, and so much that no partition is ever silent for long."""
        with self.lock:
            share = 0.05 + 0.95 * self.figures.kills / kills if kills else 1.0
            behind = max(int(records * share), self.sealed + BACKLOG_BLOCKS * self.world.block_offsets) - self.written
        if behind > 0:
            self._feed(min(behind, 10 * self.world.block_offsets))

    def _life(self, plan: Plan | None, idle_s: float) -> bool:
        """One child from start to end; True if it ended as planned."""
        child, ours = self._spawn(plan, idle_s)
        life = _Life(plan, child, self._taken_over)
        while True:
            if life.look() > HANG_SECONDS:
                self._note(f"child {child.pid} hangs with {plan}")
                child.kill()
            try:
                if not ours.poll(0.05):
                    continue
                name, facts = ours.recv()
            except (EOFError, ConnectionResetError):
                break
            self._hear(name, facts, child.pid)
            life.hear(name, facts)
        child.join(60)
        ours.close()
        return self._ended(plan, child.exitcode, refused=life.refused)

    def _ended(self, plan: Plan | None, code: int | None, *, refused: bool) -> bool:
        killed = code == -signal.SIGKILL
        with self.lock:
            self.figures.kills += killed
            if plan is not None and plan.stop and killed:
                self.figures.stops += 1
                self.figures.zombie_refused += refused
        return killed if plan is not None else code == 0

    def _taken_over(self, since: float, partitions: set[int]) -> bool:
        """Whether others have taken one of these partitions since; or whether waiting makes no more sense."""
        with self.lock:
            taken = any(at > since and partitions & others for at, others in self.taken)
        return taken or time.monotonic() > since + TAKEOVER_SECONDS_MAX

    def _hear(self, name: str, facts: Mapping[str, Any], pid: int) -> None:
        with self.lock:
            self.steps[name] += 1
            if name == "taken":
                self.taken.append((time.monotonic(), set(facts["offsets"])))
            elif name == "sealed":
                self.sealed += facts["offsets"]
            elif name == "refused":
                self.figures.refused_starts += 1
        if name == "crash":
            self._note(f"child {pid}: {facts['message']}")

    def _note(self, text: str) -> None:
        with self.lock:
            self.figures.crashes += 1
            self.trouble.append(text)

    def settle(self, processes: int) -> None:
        """Let ingest run undisturbed until it has read everything."""
        for _ in range(20):
            threads = [threading.Thread(target=self._life, args=(None, 3.0)) for _ in range(processes)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            reached = self.world.repo.frontier(STREAM)
            if sum(end for nexts in reached.values() for end in nexts.values()) >= self.written:
                return
        self._note("ingest did not come to the end of the topic, undisturbed")


def _fates(world: World, figures: Figures) -> tuple[list[Message], Mapping[tuple[int, int], Row], set[tuple[int, int]]]:
    """The topic, what stands in blocks by partition and offset, and where rejected messages come from."""
    rows = [row for block in world.rows().values() for _, row in block]
    at = {(partition, offset): (partition, offset, record) for partition, offset, record in rows}
    figures.twice += len(rows) - len(at)
    letters = {letter.source for letter in world.letters()}
    return world.messages(), at, {source for source in letters if source is not None}


def _good(value: bytes | None) -> dict[str, Any] | None:
    """The message as it was made, unless it was made to be rejected."""
    return None if value in BAD else json.loads(value or b"")


def account(world: World, figures: Figures) -> Figures:
    """Hold the whole history against what was put on the topic."""
    messages, at, dead = _fates(world, figures)
    manifests = world.repo.manifests(STREAM)
    figures.records, figures.in_blocks, figures.blocks = len(messages), len(at), len(manifests)
    figures.lanes = len({m.lane for m in manifests})
    landed: dict[tuple[str, str], list[str]] = defaultdict(list)
    for _, _, record in at.values():
        landed[record.user_id, record.event_id].append(record.prompt)
    figures.twice += sum(len(prompts) - 1 for prompts in landed.values())
    fate: dict[tuple[int, int], str] = {}
    for message in messages:
        where = (message.partition, message.offset)
        good = _good(message.value)
        prompts = [] if good is None else landed.get((good["user_id"], good["event_id"]), [])
        if where in at:
            fate[where] = "sealed"
            right = good is not None and prompts[:1] == [good["prompt"]]
            figures.wrongly_rejected += where in dead
            figures.rejected_unaccounted += not right
        elif where in dead:
            fate[where] = "rejected"
            # Rightly only if it is broken, or if its identity stands in a block for something else.
            figures.wrongly_rejected += good is not None and (not prompts or good["prompt"] in prompts)
            figures.rejected += 1
        elif good is None or (prompts and good["prompt"] not in prompts):
            figures.rejected_unaccounted += 1
        elif not prompts:
            figures.lost += 1
        else:
            fate[where] = "duplicate"
            figures.duplicates += 1
    _check_spans(manifests, messages, fate, figures)
    return figures


def _check_spans(
    manifests: Sequence[Manifest], messages: Sequence[Message], fate: Mapping[tuple[int, int], str], figures: Figures
) -> None:
    """Blocks of all lanes tile each partition; the counts of each are those of its messages."""
    spans: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for manifest in manifests:
        for part in manifest.offsets:
            if part.span:
                spans[manifest.incarnation, part.partition].append((part.start, part.end))
        found = Counter(fate.get((p.partition, o)) for p in manifest.offsets for o in range(p.start, p.end))
        counts = manifest.counts
        told = {"sealed": counts.sealed + counts.set_aside, "rejected": counts.rejected, "duplicate": counts.duplicate}
        figures.counts_wrong += counts.total != manifest.nominal_units or +Counter(told) != found
    ends = {m.partition: 0 for m in messages}
    for message in messages:
        ends[message.partition] = max(ends[message.partition], message.offset + 1)
    figures.offsets_wrong += len({name for name, _ in spans}) != 1
    for partition, end in ends.items():
        mine = sorted(span for (_, p), found_spans in spans.items() if p == partition for span in found_spans)
        starts, stops = [0, *(stop for _, stop in mine)], [*(start for start, _ in mine), end]
        figures.offsets_wrong += sum(a != b for a, b in zip(starts, stops, strict=True))


@contextmanager
def broker(folder: Path) -> Iterator[ApacheKafka]:
    """Apache Kafka of the soak's own."""
    kafka = ApacheKafka(folder / "broker")
    try:
        kafka.start()
        yield kafka
    finally:
        kafka.kill()


@dataclass(frozen=True)
class Size:
    """How large a soak is."""

    records: int = 200_000
    kills: int = 200
    stops: int = 6
    broker_kills: int = 3
    processes: int = 2
    partitions: int = 6
    block_offsets: int = 1000
    seconds_max: float = 1500.0
    seed: int = 1


def _kill_broker(soak: Soak, kafka: ApacheKafka, size: Size, over: threading.Event) -> None:
    """At even distances of the kills."""
    for nth in range(1, size.broker_kills + 1):
        while soak.figures.kills < nth * size.kills // (size.broker_kills + 1):
            if over.wait(0.2):
                return
        with soak.lock:  # nobody is feeding
            kafka.kill()
            time.sleep(1)
            kafka.start()
        soak.figures.broker_kills += 1


def run(folder: Path, kafka: ApacheKafka, size: Size, say: Callable[[str], None], topic: str = TOPIC) -> Figures:
    """One soak in a folder, on a broker that may be killed."""
    began = time.monotonic()
    world = World(folder, kafka.settings, topic, block_offsets=size.block_offsets, block_seconds=5.0).make()
    ensure_topic(world.settings, world.topic, size.partitions)
    soak = Soak(world, size.seed)
    soak.feed(size.records, size.kills)
    soak.plan(size.kills, size.stops)
    over = threading.Event()
    drivers = [threading.Thread(target=soak.drive, args=(began + size.seconds_max,)) for _ in range(size.processes)]
    breaker = threading.Thread(target=_kill_broker, args=(soak, kafka, size, over))
    for thread in (*drivers, breaker):
        thread.start()
    while any(thread.is_alive() for thread in drivers):
        drivers[0].join(1) if drivers[0].is_alive() else drivers[-1].join(1)
        # The last child, too, can only die at its step if it has something to read.
        if soak.plans or soak.planned:
            soak.feed(size.records, size.kills)
        say(_progress(soak, size, began))
    over.set()
    breaker.join()
    while soak.written < size.records:
        soak.feed(size.records, 0)
    soak.settle(size.processes)
    say(_progress(soak, size, began))
    figures = account(world, soak.figures)
    figures.steps = {step.value: soak.steps[step.value] for step in Step}
    figures.seconds = round(time.monotonic() - began, 1)
    for text in soak.trouble:
        say(f"\n{text}")
    return figures


def _progress(soak: Soak, size: Size, began: float) -> str:
    done = min(soak.figures.kills / max(size.kills, 1), 1.0)
    bar = "#" * int(30 * done)
    return (
        f"[{bar:<30}] {soak.figures.kills}/{size.kills} kills, {soak.sealed:,}/{soak.written:,} offsets in blocks, "
        f"{soak.figures.zombie_refused} zombies refused, {soak.figures.broker_kills} broker kills, "
        f"{time.monotonic() - began:.0f} s"
    )


def shortfall(figures: Figures, size: Size) -> list[str]:
    """What did not happen though it should have: a soak that did not kill proves nothing."""
    found = []
    for name, wanted in (("kills", size.kills), ("broker_kills", size.broker_kills), ("records", size.records)):
        if getattr(figures, name) < wanted:
            found.append(f"{name}={getattr(figures, name)}: {wanted} were wanted; raise --seconds-max")
    if figures.stops < size.stops or figures.zombie_refused < figures.stops:
        found.append(f"zombie_refused={figures.zombie_refused}: of {size.stops} stopped processes each must be refused")
    return found


def _arguments() -> Size:
    parser = argparse.ArgumentParser(prog="make soak", description=(__doc__ or "").splitlines()[0])
    for name, default in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return Size(**vars(parser.parse_args()))


def _liner() -> Callable[[str], None]:
    """One line that changes on a terminal, one in ten seconds elsewhere."""
    last = 0.0

    def say(text: str) -> None:
        nonlocal last
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}")
        elif text.startswith("\n") or time.monotonic() - last >= 10:
            last = time.monotonic()
            sys.stderr.write(f"{text.strip()}\n")
        sys.stderr.flush()

    return say


def main() -> int:
    size = _arguments()
    if not (KAFKA_HOME / "kafka").exists():
        sys.stderr.write(f"Apache Kafka is missing in {KAFKA_HOME}; say where it is by TIDEGATE_TEST_KAFKA\n")
        return 2
    with (
        tempfile.TemporaryDirectory(prefix="tidegate-soak-", ignore_cleanup_errors=True) as folder,
        broker(Path(folder)) as kafka,
    ):
        figures = run(Path(folder) / "world", kafka, size, _liner())
    sys.stderr.write("\n")
    missed = shortfall(figures, size)
    table = Table("what", "how many", title="soak")
    for name, value in asdict(figures).items():
        if name != "steps":
            table.add_row(name.replace("_", " "), f"{value:,}")
    for name, times in figures.steps.items():
        table.add_row(f"step {name}", f"{times:,}")
    Console(stderr=True).print(table)
    for sentence in missed:
        sys.stderr.write(f"{sentence}\n")
    sys.stdout.write(json.dumps(asdict(figures)) + "\n")
    return 1 if figures.wrong or missed else 0


if __name__ == "__main__":
    # Children must find the classes by the module's name.
    from tests.ingest import soak

    sys.exit(soak.main())
