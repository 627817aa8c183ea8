"""Records of every kind through a real broker into blocks, and the whole history afterwards."""

import json
import queue
import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from ingest.broker import KafkaSettings
from ingest.embedded import EmbeddedBroker
from ingest.errors import SettingError, SuiteError, ValidationStopped
from ingest.split import split_of
from ingest.steps import Step
from tests.ingest.blocks import manifest_of
from tests.ingest.world import LANE, STREAM, World, line, put
from tests.kafka_servers import ApacheKafka

pytestmark = [
    # DVC's own trie library announces a change of its own.
    pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning"),
]


@pytest.fixture
def world(tmp_path: Path, broker: KafkaSettings, topic: str) -> World:
    return World(tmp_path, broker, topic).make()


def _metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"tidegate_ingest_{name}", {"stream": STREAM, **labels}) or 0.0


def test_every_kind_of_message_lands_where_it_belongs(world: World) -> None:
    bad: list[bytes | None] = [
        b"not json",
        None,
        b"[]",
        line(900, prompt="x" * 500_000),
        line(901, domain="unheard"),
        line(902, prompt="  "),
        line(903, surprise="x"),
        line(904, completion=7),
        line(5, prompt="other content under a known id"),
    ]
    good = [line(i) for i in range(150)]
    before = _metric("rejected_total", reason="tombstone"), _metric("duplicates_total")
    put(world.settings, world.topic, [*good, *good[:7], *bad, *good[:3], line(5, user="someone else")], partitions=2)
    events: list[str] = []
    sealed = world.ingest(on_event=lambda name, _: events.append(name))
    assert [m.nominal_units for m in sealed] == [100, 70]
    assert world.check_history() == {"block": 151, "dead": 9, "duplicate": 10}
    assert {code for letter in world.letters() for code in letter.codes} == {
        "not_json", "tombstone", "not_object", "too_long", "undeclared_domain",
        "expectation", "unknown_key", "wrong_type", "conflict",
    }  # fmt: skip
    assert all(letter.value == bad[3] for letter in world.letters() if "prompt: too long" in letter.reasons[0])
    assert [e for e in events if e not in {"resumed", "taken", "sealed"}] == [step.value for step in Step] * 2
    assert _metric("rejected_total", reason="tombstone") == before[0] + 1
    assert _metric("duplicates_total") == before[1] + 10
    # A record's side depends on its user alone.
    for split, (_, _, record) in [row for block in world.rows().values() for row in block]:
        assert split == split_of(record.user_id, b"k" * 32, 0.1)
    assert {split for block in world.rows().values() for split, _ in block} == {"train", "holdout"}


def test_it_goes_on_where_the_manifests_end(world: World) -> None:
    put(world.settings, world.topic, [line(i) for i in range(30)])
    first = world.ingest()
    put(world.settings, world.topic, [line(i) for i in range(20, 50)])
    second = world.ingest()
    assert [m.offsets[0].start for m in (*first, *second)] == [0, 30]
    assert second[0].counts.duplicate == 10
    assert second[0].nonce != first[0].nonce
    assert world.ingest() == []
    assert world.check_history() == {"block": 50, "duplicate": 10}


def test_a_lost_or_broken_index_is_made_anew(world: World) -> None:
    put(world.settings, world.topic, [line(i) for i in range(30)])
    world.ingest()
    index = world.root / "lanes" / f"{STREAM}.seen.sqlite3"
    for spoil in (index.unlink, lambda: index.write_bytes(b"no database" * 1000)):
        spoil()
        put(world.settings, world.topic, [line(i) for i in range(10)])
        assert world.ingest()[0].counts.duplicate == 10
    with sqlite3.connect(index) as db:
        assert db.execute("SELECT count(*) FROM seen").fetchone() == (30,)
    db.close()
    assert world.check_history() == {"block": 30, "duplicate": 20}


def test_a_block_in_which_all_was_rejected_has_a_manifest(world: World) -> None:
    put(world.settings, world.topic, [b"x"] * 12)
    (sealed,) = world.ingest()
    assert (sealed.counts.rejected, sealed.counts.total, sealed.files) == (12, 12, ())
    put(world.settings, world.topic, [line(1)])
    world.ingest()
    assert world.check_history() == {"block": 1, "dead": 12}


def test_blocks_end_by_offsets_or_clock_never_by_what_was_accepted(tmp_path: Path, broker: KafkaSettings) -> None:
    spans = []
    for name, values in (("good", [line(i) for i in range(25)]), ("null", [None] * 25)):
        world = World(tmp_path / name, broker, f"t-{tmp_path.name}-{name}", block_offsets=10).make()
        put(world.settings, world.topic, values)
        spans.append([m.nominal_units for m in world.ingest()])
    assert spans == [[10, 10, 5], [10, 10, 5]]
    world = World(tmp_path / "clock", broker, f"t-{tmp_path.name}-clock", block_seconds=0.5).make()
    put(world.settings, world.topic, [line(i) for i in range(25)])
    assert [m.nominal_units for m in world.ingest(idle_s=20, max_blocks=1)] == [25]


def test_at_most_k_records_per_user_the_rest_is_set_aside(tmp_path: Path, broker: KafkaSettings, topic: str) -> None:
    world = World(tmp_path, broker, topic, unit="user", per_user=3).make()
    put(world.settings, world.topic, [line(i, user="a" if i % 2 else f"u{i}") for i in range(20)])
    (sealed,) = world.ingest()
    assert sealed.counts.set_aside == 7
    aside = [row[2] for block in world.rows().values() for split, row in block if split == "set_aside"]
    assert {record.user_id for record in aside} == {"a"}
    assert world.check_history() == {"block": 20}
    assert sealed.policy.unit == "user"


def test_a_rejected_message_too_large_for_the_dead_letters_is_kept_in_the_block(
    tmp_path: Path, apache_kafka: ApacheKafka, topic: str
) -> None:
    world = World(tmp_path, apache_kafka.settings, topic).make()
    huge = line(1, prompt="x" * 1_045_000)
    put(world.settings, world.topic, [huge, line(2)])
    (sealed,) = world.ingest()
    (letter,) = world.letters()
    file = sealed.file("rejects")
    assert file is not None
    assert (letter.value, letter.reference) == (None, file.path)
    repo = world.repo
    pinned = repo.checkout(repo.pin(STREAM), tmp_path / "look")
    path = pinned.file(sealed, "rejects")
    pinned.close()
    import pyarrow.parquet as pq

    assert pq.read_table(path).column("value").to_pylist() == [huge]
    shutil.rmtree(tmp_path / "lanes" / LANE)
    assert world.check_history() == {"block": 1, "dead": 1}


def test_a_remote_that_is_gone_alarms_and_is_tried_again(tmp_path: Path, broker: KafkaSettings, topic: str) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    world = World(tmp_path, broker, topic, remote=str(blocked / "remote")).make()
    put(world.settings, world.topic, [line(1)])
    alarms: list[str] = []

    def listen(name: str, facts: Any) -> None:
        if name == "alarm":
            alarms.append(facts["kind"])

    world.ingest(on_event=listen)
    assert "push" in alarms
    blocked.unlink()
    world.ingest()
    assert list((blocked / "remote").rglob("*.dir"))
    assert world.check_history() == {"block": 1}


def test_a_topic_made_anew_is_read_from_its_beginning(tmp_path: Path, broker: KafkaSettings, topic: str) -> None:
    world = World(tmp_path, broker, topic).make()
    put(world.settings, world.topic, [line(i) for i in range(30)])
    (first,) = world.ingest()
    _delete_topic(world)
    put(world.settings, world.topic, [line(i) for i in range(25, 70)])
    alarms: list[str] = []
    (second,) = world.ingest(on_event=lambda name, facts: alarms.append(facts.get("kind", name)))
    assert "incarnation" in alarms
    assert second.incarnation != first.incarnation
    assert (second.offsets[0].start, second.offsets[0].end) == (0, 45)
    assert (second.counts.sealed, second.counts.duplicate) == (40, 5)


def _delete_topic(world: World) -> None:
    import time

    from ingest.broker import _admin, describe_topic

    with _admin(world.settings, "test") as admin:
        admin.delete_topics([world.topic])
    while describe_topic(world.settings, world.topic) is not None:
        time.sleep(0.1)


def test_messages_dropped_by_retention_are_told(tmp_path: Path, apache_kafka: ApacheKafka, topic: str) -> None:
    from kafka import TopicPartition

    from ingest.broker import _admin

    world = World(tmp_path, apache_kafka.settings, topic).make()
    put(world.settings, world.topic, [line(i) for i in range(10)])
    world.ingest()
    put(world.settings, world.topic, [line(i) for i in range(10, 30)])
    with _admin(world.settings, "test") as admin:
        admin.delete_records({TopicPartition(world.topic, 0): 20})
    alarms: list[str] = []
    (second,) = world.ingest(on_event=lambda name, facts: alarms.append(facts.get("kind", name)))
    assert "gap" in alarms
    assert (second.offsets[0].start, second.counts.sealed) == (20, 10)


def test_a_zombie_loses_and_starts_over(world: World) -> None:
    put(world.settings, world.topic, [line(i) for i in range(30)])

    def overtake(name: str, _: Any) -> None:
        repo = world.repo
        if name != "dead_lettered" or repo.git.head(f"refs/heads/lanes/{LANE}") is not None:
            return
        # Another machine, which our lock does not reach, commits the first ten offsets.
        (world.root / "lanes" / LANE).rename(world.root / "lanes" / "held")
        with repo.lane(STREAM, LANE) as lane:
            info = _incarnation_of(world)
            lane.commit(manifest_of(lane, lane.head(), 0, 10, topic=world.topic, incarnation=info), lane.head())
        shutil.rmtree(world.root / "lanes" / LANE)
        (world.root / "lanes" / "held").rename(world.root / "lanes" / LANE)

    sealed = world.ingest(on_event=overtake)
    assert [(p.start, p.end) for m in world.repo.manifests(STREAM) for p in m.offsets] == [(0, 10), (10, 30)]
    assert sealed[0].counts.sealed == 20


def _incarnation_of(world: World) -> str:
    from ingest.broker import describe_topic

    info = describe_topic(world.settings, world.topic)
    assert info is not None
    return info.topic_id or "local.1"


def test_a_suite_that_breaks_stops_before_anything_is_sealed(world: World) -> None:
    put(world.settings, world.topic, [line(1)])
    world.suite.write_text(
        "schema_version: 1\nexpectations:\n"
        "- {type: expect_column_values_to_match_regex, kwargs: {column: prompt, regex: '('}, decides: true}\n"
    )
    with pytest.raises(ValidationStopped):
        world.ingest()
    assert world.repo.manifests(STREAM) == []
    world.suite.unlink()
    with pytest.raises(SuiteError, match="tidegate init"):
        world.ingest()
    world.make()
    assert world.ingest()[0].counts.sealed == 1


def test_a_stop_seals_nothing_more_and_loses_nothing(world: World) -> None:
    put(world.settings, world.topic, [line(i) for i in range(250)])
    stop = threading.Event()
    sealed = world.ingester(lambda name, _: stop.set() if name == "sealed" else None).run(stop)
    assert len(sealed) == 1
    world.ingest()
    assert world.check_history() == {"block": 250}


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"block_offsets": 0}, "block_offsets=0"), ({"unit": "user", "per_user": 0}, "k_per_user=0")],
)
def test_impossible_arguments_are_named(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    World(tmp_path, KafkaSettings("a:1"), "t").make()
    with pytest.raises(SettingError, match=match):
        World(tmp_path, KafkaSettings("a:1"), "t", **changes).ingester()


def test_dead_letters_hold_no_content_but_the_original(world: World) -> None:
    secret = "zebra-4711"
    put(world.settings, world.topic, [json.dumps({secret: secret}).encode()])
    world.ingest()
    (letter,) = world.letters()
    assert secret not in letter.key + "".join(letter.reasons)
    assert secret.encode() in (letter.value or b"")


# kafka-python forgets the sockets of connections that failed.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_a_broker_that_goes_away_is_told_and_waited_for(
    tmp_path: Path, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest.ingester._LAG_SECONDS", 0.2)
    broker = EmbeddedBroker(tmp_path / "broker")
    world = World(tmp_path, KafkaSettings(broker.bootstrap), topic, block_offsets=10).make()
    heard: queue.Queue[str] = queue.Queue()
    with broker:
        put(world.settings, topic, [line(i) for i in range(10)])
        ingester = world.ingester(lambda name, facts: heard.put(facts.get("kind", name)))
        worker = threading.Thread(target=ingester.run, args=(threading.Event(), 2))
        worker.start()
        while heard.get(timeout=60) != "sealed":
            pass
    while heard.get(timeout=60) != "broker":
        pass
    with broker:
        put(world.settings, topic, [line(i) for i in range(10, 20)])
        worker.join(60)
        assert not worker.is_alive()
        assert world.check_history() == {"block": 20}
