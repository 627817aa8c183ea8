"""Real faults: torn files, locks of dead processes, a full disk, topics made anew, a broker that dies in mid-stream."""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from kafka import TopicPartition

from ingest import gitstore
from ingest.broker import _admin, describe_topic
from ingest.errors import BrokerError, DataCorrupt, DiskFull, RepositoryError
from ingest.layout import POINTER, lane_ref
from ingest.manifest import Manifest
from ingest.ownership import OWNER_REFS
from ingest.parquet import write_rejects, write_rows
from ingest.repository import DataRepository
from ingest.seen import SeenIndex
from tests.ingest.blocks import record, seal
from tests.ingest.world import LANE, STREAM, World, line, put
from tests.kafka_servers import ApacheKafka, missing

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")

PATIENCE_SECONDS = 120.0


@pytest.fixture
def world(tmp_path: Path, apache_kafka: ApacheKafka, topic: str) -> World:
    return World(tmp_path, apache_kafka.settings, topic).make()


def _cut(path: Path) -> None:
    """As after a power cut that a disk's cache did not survive."""
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _shelf(world: World) -> Path:
    return world.root / "lanes" / LANE / "000001"


# ── torn files


def test_a_torn_index_is_made_anew(world: World) -> None:
    put(world.settings, world.topic, [line(i) for i in range(200)])
    world.ingest()
    _cut(world.root / "lanes" / f"{STREAM}.seen.sqlite3")
    put(world.settings, world.topic, [line(i) for i in range(100, 300)])
    world.ingest()
    assert world.check_history() == {"block": 300, "duplicate": 100}


def test_what_a_crash_left_of_a_block_that_was_not_committed_is_of_no_account(world: World) -> None:
    put(world.settings, world.topic, [line(i) for i in range(150)])
    world.ingest()
    left = _shelf(world) / "blocks" / f"{LANE}-000000003"
    left.mkdir()
    whole = next((_shelf(world) / "blocks").glob("*/train.parquet")).read_bytes()
    (left / "train.parquet").write_bytes(whole[: len(whole) // 2])
    (left / "holdout.parquet").write_bytes(b"")
    _cut(_shelf(world) / POINTER)
    put(world.settings, world.topic, [line(i) for i in range(150, 200)])
    (third,) = world.ingest()
    assert third.block_id == left.name
    assert world.check_history() == {"block": 200}


def test_a_torn_block_is_named_when_it_is_needed(world: World) -> None:
    put(world.settings, world.topic, [line(i) for i in range(50)])
    world.ingest()
    _cut(next((_shelf(world) / "blocks").glob("*/train.parquet")))
    # It is read only to make the index anew.
    (world.root / "lanes" / f"{STREAM}.seen.sqlite3").unlink()
    put(world.settings, world.topic, [line(50)])
    with pytest.raises(DataCorrupt, match=r"train\.parquet: .*dvc pull") as caught:
        world.ingest()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ref", [lane_ref(LANE), OWNER_REFS + STREAM])
def test_a_ref_that_names_nothing_is_one_line(world: World, ref: str) -> None:
    put(world.settings, world.topic, [line(1)])
    world.ingest()
    (world.root / "data" / ".git" / ref).write_text("f" * 40 + "\n")
    with pytest.raises(RepositoryError, match="f" * 40) as caught:
        world.ingest()
    assert "\n" not in str(caught.value)


# ── locks of processes that are dead


def test_old_locks_of_refs_do_not_stop_ingest(world: World) -> None:
    put(world.settings, world.topic, [line(i) for i in range(20)])
    world.ingest()
    locks = [world.root / "data" / ".git" / f"{ref}.lock" for ref in (lane_ref(LANE), OWNER_REFS + STREAM)]
    for lock in locks:
        lock.touch()
        os.utime(lock, (time.time() - 3600,) * 2)
    put(world.settings, world.topic, [line(i) for i in range(20, 40)])
    world.ingest()
    assert not any(lock.exists() for lock in locks)
    assert world.check_history() == {"block": 40}


def test_a_young_lock_is_waited_for_then_told_with_the_way_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gitstore, "_LOCK_SECONDS_MAX", 0.5)
    put(world.settings, world.topic, [line(i) for i in range(20)])
    world.ingest()
    lock = world.root / "data" / ".git" / f"{lane_ref(LANE)}.lock"
    lock.touch()
    put(world.settings, world.topic, [line(i) for i in range(20, 40)])
    with pytest.raises(RepositoryError, match=r"remove .*lanes/desk-0\.lock") as caught:
        world.ingest()
    assert "\n" not in str(caught.value)
    # One that goes away in time is no error.
    monkeypatch.setattr(gitstore, "_LOCK_SECONDS_MAX", PATIENCE_SECONDS)
    threading.Timer(1.0, lock.unlink).start()
    world.ingest()
    assert world.check_history() == {"block": 40}


@pytest.mark.parametrize("content", ['{"blocks": {"write": {"pid": 999999, "cmd": "dvc add"}}}', '{"blo'])
def test_locks_of_a_killed_dvc_do_not_stop_ingest(world: World, content: str) -> None:
    put(world.settings, world.topic, [line(i) for i in range(20)])
    world.ingest()
    for folder in (_shelf(world), world.root / "lanes" / LANE / "push"):
        temporary = folder / ".dvc" / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        (temporary / "rwlock").write_text(content.replace("blocks", str(folder / "blocks")))
        (temporary / "lock").touch()
    put(world.settings, world.topic, [line(i) for i in range(20, 40)])
    alarms: list[str] = []
    world.ingest(on_event=lambda name, facts: alarms.append(str(facts)) if name == "alarm" else None)
    assert alarms == []
    assert world.check_history() == {"block": 40}


# ── a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        missing("the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(folder: Path, left_bytes: int) -> Path:
    filler = folder / "filler"
    room = os.statvfs(folder)
    with filler.open("wb") as file:
        file.write(bytes(max(room.f_bavail * room.f_frsize - left_bytes, 0)))
    return filler


def test_each_part_names_a_full_disk(small_disk: Path) -> None:
    repo = DataRepository.init(small_disk / "data", remote=str(small_disk / "remote"))
    # Content that does not compress, more than what is left.
    ones = [record(i, prompt=os.urandom(3000).hex()) for i in range(100)]
    rows = [(0, i, one) for i, one in enumerate(ones)]
    found = [(os.urandom(16), os.urandom(16), 0, i) for i in range(20_000)]
    with repo.lane("s", "s-0") as lane, SeenIndex(small_disk / "seen.sqlite3") as index:
        write_rows(lane.folder(1) / "train.parquet", rows)
        filler = _fill(small_disk, 64 << 10)
        parts: list[Callable[[], object]] = [
            lambda: write_rows(small_disk / "a" / "train.parquet", rows),
            lambda: write_rejects(small_disk / "b" / "rejects.parquet", [(0, 0, os.urandom(1 << 20))]),
            lambda: index.claim("i", [], found),
            lambda: repo.git.commit("refs/heads/x", None, "large", files={"x": os.urandom(1 << 20)}),
            lambda: repo.commit_files({"y": os.urandom(1 << 20)}, "large"),
        ]
        for part in parts:
            with pytest.raises(DiskFull, match="make room") as caught:
                part()
            assert "\n" not in str(caught.value)
        filler.unlink()
        filler = _fill(small_disk, 0)
        with pytest.raises(DiskFull, match="make room"):
            lane._shelf(1).add(lane.folder(1))
        with pytest.raises(DiskFull, match="make room"):
            repo.lane("s", "s-1")
        filler.unlink()
        # Nothing of it is held against them later.
        assert index.claim("i", [], found) == {}
        lane.recover()
        assert seal(lane, lane.head(), ones, 0).seq_next == 2


def test_a_full_disk_stops_ingest_with_one_line_and_loses_nothing(
    small_disk: Path, apache_kafka: ApacheKafka, topic: str
) -> None:
    world = World(small_disk, apache_kafka.settings, topic, block_offsets=1000).make()
    done = 0
    stopped = []
    # Each level is met by another step: the index, the files of the block, DVC's cache, git's objects and refs.
    for left_bytes in (0, 80 << 10, 320 << 10, 400 << 10, 560 << 10):
        put(world.settings, topic, [line(i, prompt=os.urandom(300).hex()) for i in range(done, done + 500)])
        done += 500
        filler = _fill(small_disk, left_bytes)
        try:
            world.ingest()
        except RepositoryError as error:
            stopped.append(error)
        finally:
            filler.unlink()
        world.ingest()
    assert len(stopped) >= 3
    assert all(isinstance(error, DiskFull) for error in stopped), [str(error) for error in stopped]
    assert not any("\n" in str(error) for error in stopped)
    assert all("make room" in str(error) and str(small_disk) in str(error) for error in stopped)
    assert world.check_history() == {"block": done}


# ── topics and brokers


def _run(world: World, on_event: Callable[[str, Mapping[str, Any]], None], stop: threading.Event) -> threading.Thread:
    """Ingest as the supervisor runs it: started again when it ends with an error of the broker's."""

    def serve() -> None:
        while not stop.is_set():
            try:
                world.ingester(on_event).run(stop)
            except BrokerError:
                stop.wait(0.5)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def _wait(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_topic_made_anew_while_ingest_runs_is_read_from_its_beginning(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest.ingester._LAG_SECONDS", 0.2)
    monkeypatch.setattr("ingest.ingester._TOPIC_SECONDS", 0.5)
    sealed: list[Manifest] = []
    stop = threading.Event()
    put(world.settings, world.topic, [line(i) for i in range(100)])
    worker = _run(world, lambda name, facts: sealed.append(facts["manifest"]) if name == "sealed" else None, stop)
    _wait(lambda: len(sealed) == 1)
    with _admin(world.settings, "test") as admin:
        admin.delete_topics([world.topic])
    put(world.settings, world.topic, [line(i) for i in range(50, 150)])
    _wait(lambda: sum(m.nominal_units for m in sealed if m.incarnation != sealed[0].incarnation) >= 100)
    stop.set()
    worker.join(PATIENCE_SECONDS)
    records = [record.event_id for block in world.rows().values() for _, (_, _, record) in block]
    assert sorted(records) == sorted(f"e{i}" for i in range(150))
    assert sum(m.counts.duplicate for m in sealed) == 50


def test_retention_that_passed_what_was_read_is_told_by_partition_and_count(world: World) -> None:
    put(world.settings, world.topic, [line(i, user=f"u{i}") for i in range(60)], partitions=2)
    world.ingest()
    before = world.repo.frontier(STREAM)
    (reached,) = before.values()
    put(world.settings, world.topic, [line(i, user=f"u{i}") for i in range(60, 120)])
    with _admin(world.settings, "test") as admin:
        admin.delete_records({TopicPartition(world.topic, p): end + 5 + p for p, end in reached.items()})
    alarms: list[Mapping[str, Any]] = []
    sealed = world.ingest(on_event=lambda name, facts: alarms.append(facts) if name == "alarm" else None)
    told = {facts["partition"]: facts["offsets_lost"] for facts in alarms if facts["kind"] == "gap"}
    assert told == {0: 5, 1: 6}
    assert sum(m.counts.sealed for m in sealed) == 60 - 5 - 6
    assert {part.partition: part.start for part in sealed[0].offsets} == {p: end + 5 + p for p, end in reached.items()}
    # It is told once, and what is kept goes on from there.
    alarms.clear()
    put(world.settings, world.topic, [line(200)])
    world.ingest(on_event=lambda name, facts: alarms.append(facts) if name == "alarm" else None)
    assert alarms == []


def test_a_broker_that_dies_in_mid_stream_costs_nothing(world: World, apache_kafka: ApacheKafka) -> None:
    sealed: list[int] = []
    stop = threading.Event()
    put(world.settings, world.topic, [*[line(i) for i in range(450)], b"broken"], partitions=2)
    worker = _run(world, lambda name, facts: sealed.append(facts["offsets"]) if name == "sealed" else None, stop)
    _wait(lambda: len(sealed) >= 2)
    apache_kafka.kill()
    time.sleep(1)
    apache_kafka.start()
    put(world.settings, world.topic, [line(i) for i in range(400, 700)])
    _wait(lambda: describe_topic(world.settings, world.topic) is not None and sum(sealed) >= 700)
    stop.set()
    worker.join(PATIENCE_SECONDS)
    world.ingest()
    assert world.check_history() == {"block": 700, "dead": 1, "duplicate": 50}
