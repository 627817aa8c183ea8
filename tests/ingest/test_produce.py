"""Files onto a topic, as they are; and CLINC150, 15,100 real utterances, through Apache Kafka into blocks."""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kafka.admin import KafkaAdminClient

from ingest.broker import KafkaSettings, describe_topic
from ingest.embedded import EmbeddedBroker
from ingest.errors import BrokerUnreachable, MessageTooLarge, SendingStopped, SettingError, SourceError
from ingest.produce import produce
from ingest.record import RecordLimits
from tests.ingest.world import STREAM, World
from tests.kafka_servers import ApacheKafka, missing

# DVC's own trie library announces a change of its own.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")

CLINC = Path(__file__).parents[3] / "shared" / "data" / "clinc150" / "train.jsonl"


def _file(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_lines_arrive_as_they_are_keyed_by_user(tmp_path: Path, broker: KafkaSettings, topic: str) -> None:
    lines = [
        b'{"user_id": "u1", "a": 1.50}',
        b"no json",
        b"[1]",
        '{"user_id": "ü"}'.encode(),
        b'{"user_id": 7}',
        b"\xff",
    ]
    first = _file(tmp_path / "a.jsonl", *lines[:3], b"", b"")
    second = _file(tmp_path / "b.jsonl", *lines[3:])
    told: list[tuple[int, int]] = []
    report = produce(broker, topic, [first, second], progress=lambda sent, total: told.append((sent, total)))
    assert report.sent == 6
    assert told[-1] == (6, 6)
    found = World(tmp_path, broker, topic).messages()
    assert [(m.value, m.key) for m in sorted(found, key=lambda m: m.offset)] == list(
        zip(lines, [b"u1", None, None, "ü".encode(), None, None], strict=True)
    )


def test_a_field_map_renames(tmp_path: Path, broker: KafkaSettings, topic: str) -> None:
    file = _file(tmp_path / "a.jsonl", b'{"text": "\\ud83d", "who": "u", "rest": [1]}', b'{"prompt": "p", "text": "t"}')
    with pytest.raises(SourceError, match=r"a\.jsonl:2: two fields become prompt"):
        produce(broker, topic, [file], {"text": "prompt", "who": "user_id"})
    (message,) = World(tmp_path, broker, topic).messages()[:1]
    assert json.loads(message.value or b"") == {"prompt": "\ud83d", "user_id": "u", "rest": [1]}
    assert message.key == b"u"


def test_a_rate_is_kept(tmp_path: Path, broker: KafkaSettings, topic: str) -> None:
    file = _file(tmp_path / "a.jsonl", *[b"{}"] * 20)
    began = time.monotonic()
    produce(broker, topic, [file], rate=20)
    assert 0.9 < time.monotonic() - began < 5


def test_wrong_sources_are_one_clear_line_and_nothing_is_sent(
    tmp_path: Path, broker: KafkaSettings, topic: str
) -> None:
    good = _file(tmp_path / "a.jsonl", b"{}")
    for bad, match in ((tmp_path / "none.jsonl", "no such file"), (tmp_path, "is a directory")):
        with pytest.raises(SourceError, match=match):
            produce(broker, topic, [good, bad])
    with pytest.raises(SettingError, match="rate=0"):
        produce(broker, topic, [good], rate=0)
    with pytest.raises(BrokerUnreachable, match="is the broker running"):
        produce(KafkaSettings("127.0.0.1:1"), topic, [good])
    with pytest.raises(MessageTooLarge, match=r"big\.jsonl:2: 2000000 bytes.*1 were sent"):
        produce(broker, topic, [_file(tmp_path / "big.jsonl", b"{}", b"x" * 2_000_000)])
    assert len(World(tmp_path, broker, topic).messages()) == 1


def test_csv_and_parquet_arrive_as_json_keyed_by_user(tmp_path: Path, broker: KafkaSettings, topic: str) -> None:
    table = _file(tmp_path / "a.csv", b"who,event_id,domain,prompt,completion", "ü,e1,billing,grüß,c".encode())
    columns = {"who": ["v", None], "event_id": ["e2", "e3"], "domain": ["billing", "billing"]}
    pq.write_table(pa.table({**columns, "prompt": ["p", "p"], "completion": ["c", "c"]}), tmp_path / "b.parquet")
    report = produce(broker, topic, [table, tmp_path / "b.parquet"], {"who": "user_id"})
    assert report.sent == 3
    rest = {"domain": "billing", "completion": "c"}
    found = sorted(World(tmp_path, broker, topic).messages(), key=lambda m: m.offset)
    assert [(m.key, json.loads(m.value or b"")) for m in found] == [
        ("ü".encode(), {"user_id": "ü", "event_id": "e1", "prompt": "grüß", **rest}),
        (b"v", {"user_id": "v", "event_id": "e2", "prompt": "p", **rest}),
        (None, {"event_id": "e3", "prompt": "p", **rest}),
    ]
    assert "grüß".encode() in (found[0].value or b""), "text is not blown up by escapes"


def _numbers(world: World) -> Counter[int]:
    return Counter(json.loads(m.value or b"")["n"] for m in world.messages())


def _numbered(path: Path, count: int) -> Path:
    return _file(path, *[b'{"n": %d}' % n for n in range(count)])


def test_what_was_stopped_goes_on_where_it_was_acknowledged(tmp_path: Path, broker: KafkaSettings, topic: str) -> None:
    world = World(tmp_path, broker, topic)
    second = _file(tmp_path / "b.jsonl", *[b'{"n": %d}' % n for n in range(3000, 7000)])
    files = [_numbered(tmp_path / "a.jsonl", 3000), second]
    journal = tmp_path / "journal"
    stop = threading.Event()

    def until(done: int, total: int) -> None:
        assert total == 7000
        if done >= 2000:
            stop.set()

    with pytest.raises(SendingStopped, match=r"stopped; 2000 of 7000 records are acknowledged$") as caught:
        produce(broker, topic, files, progress=until, journal=journal, stop=stop)
    assert (caught.value.acknowledged, caught.value.unknown, caught.value.interrupted) == (2000, 0, True)
    assert _numbers(world) == Counter(range(2000))
    stop.clear()

    def again(done: int, total: int) -> None:
        if done >= 4000:
            stop.set()

    with pytest.raises(SendingStopped, match="stopped; 4000 of 7000"):
        produce(broker, topic, files, progress=again, journal=journal, resume=True, stop=stop)
    report = produce(broker, topic, files, journal=journal, resume=True)
    assert (report.sent, report.resumed) == (3000, 4000)
    assert _numbers(world) == Counter(range(7000)), "nothing is lost, nothing is sent twice"
    report = produce(broker, topic, files, journal=journal, resume=True)
    assert (report.sent, report.resumed) == (0, 7000)
    assert produce(broker, topic, files, {"n": "m"}, journal=journal, resume=True).sent == 7000, "another field map"
    assert produce(broker, topic, files, journal=journal).sent == 7000, "without resume everything is sent"
    os.utime(files[0], ns=(1, 1))
    assert produce(broker, topic, files, journal=journal, resume=True).sent == 3000, "a file that changed"
    with pytest.raises(SettingError, match="resume=True"):
        produce(broker, topic, files, resume=True)


def test_a_broken_progress_file_is_no_progress(tmp_path: Path, broker: KafkaSettings, topic: str) -> None:
    file, journal = _numbered(tmp_path / "a.jsonl", 3), tmp_path / "journal"
    produce(broker, topic, [file], journal=journal)
    (kept,) = journal.iterdir()
    kept.write_text("{")
    with pytest.raises(SourceError, match=r"no progress .*without --resume"):
        produce(broker, topic, [file], journal=journal, resume=True)


def test_a_topic_made_anew_has_nothing_of_the_file(tmp_path: Path, apache_kafka: ApacheKafka, topic: str) -> None:
    file, journal = _numbered(tmp_path / "a.jsonl", 3), tmp_path / "journal"
    produce(apache_kafka.settings, topic, [file], journal=journal)
    admin = KafkaAdminClient(bootstrap_servers=apache_kafka.settings.bootstrap)
    try:
        admin.delete_topics([topic])
    finally:
        admin.close()
    end = time.monotonic() + 20
    while describe_topic(apache_kafka.settings, topic) is not None:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert produce(apache_kafka.settings, topic, [file], journal=journal, resume=True).sent == 3


def test_too_large_rows_are_left_out_when_asked_and_named(tmp_path: Path, broker: KafkaSettings, topic: str) -> None:
    big = b'"%s"' % (b"x" * 2_000_000)
    file = _file(tmp_path / "a.jsonl", b'{"n": 0}', big, b'{"n": 1}', big, b'{"n": 2}')
    journal = tmp_path / "journal"
    with pytest.raises(MessageTooLarge, match=r"a\.jsonl:2: .*--skip-large"):
        produce(broker, topic, [file], journal=journal)
    report = produce(broker, topic, [file], journal=journal, resume=True, skip_large=True)
    assert (report.sent, report.resumed) == (2, 1)
    assert report.too_large == (f"{file}:2", f"{file}:4")
    assert _numbers(World(tmp_path, broker, topic)) == Counter(range(3))


def test_a_broker_that_breaks_off_leaves_a_place_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingest.broker._FLUSH_SECONDS", 2.0)
    file, journal = _numbered(tmp_path / "a.jsonl", 9000), tmp_path / "journal"
    with EmbeddedBroker(tmp_path / "broker") as running:
        port = int(running.bootstrap.rpartition(":")[2])
        settings = KafkaSettings(running.bootstrap)

        def fail(done: int, total: int) -> None:
            if done == 4000:
                running.stop()

        began = time.monotonic()
        with pytest.raises(SendingStopped, match=r"is the broker running\?; 4000 of 9000 .* of \d+ more it is unknown"):
            produce(settings, "t", [file], progress=fail, journal=journal)
        assert time.monotonic() - began < 15
    with EmbeddedBroker(tmp_path / "broker", port):
        report = produce(settings, "t", [file], journal=journal, resume=True)
        assert (report.sent, report.resumed) == (5000, 4000)
        found = _numbers(World(tmp_path, settings, "t"))
        assert set(found) == set(range(9000))


def test_ctrl_c_at_once_says_what_is_unknown(tmp_path: Path, broker: KafkaSettings, topic: str) -> None:
    file = _numbered(tmp_path / "a.jsonl", 5000)

    def interrupt(done: int, total: int) -> None:
        if done == 4000:
            raise KeyboardInterrupt

    with pytest.raises(SendingStopped, match="stopped at once; 4000 of 5000") as caught:
        produce(broker, topic, [file], progress=interrupt, journal=tmp_path / "journal")
    assert caught.value.interrupted
    assert produce(broker, topic, [file], journal=tmp_path / "journal", resume=True).sent == 1000


def _clinc(rows: int | None) -> list[dict[str, Any]]:
    if not CLINC.exists():
        missing(f"CLINC150 in {CLINC.parent}")
    with CLINC.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file][:rows]


@pytest.fixture
def stream_clinc(tmp_path: Path, apache_kafka: ApacheKafka, topic: str) -> Callable[[int | None], None]:
    def run(rows: int | None) -> None:
        records = _clinc(rows)
        file = _file(tmp_path / "clinc.jsonl", *[json.dumps(record).encode() for record in records])
        limits = RecordLimits(
            frozenset(r["domain"] for r in records), frozenset(r["label"] for r in records), 2000, 400
        )
        world = World(tmp_path, apache_kafka.settings, topic, limits=limits, unit="user", block_offsets=1000).make()
        assert produce(world.settings, topic, [file]).sent == len(records)
        began = time.monotonic()
        manifests = world.ingest()
        print(f"{len(records)} records ingested at {len(records) / (time.monotonic() - began):.0f}/s")  # noqa: T201
        assert world.check_history() == {"block": len(records)}
        landed = [row[2].event_id for block in world.rows().values() for _, row in block]
        assert sorted(landed) == sorted(record["event_id"] for record in records)
        assert len(world.repo.manifests(STREAM)) == len(manifests) == -(-len(records) // 1000)

    return run


def test_clinc150_in_part(stream_clinc: Callable[[int | None], None]) -> None:
    stream_clinc(3000)


@pytest.mark.slow
def test_clinc150_whole(stream_clinc: Callable[[int | None], None]) -> None:
    assert len(_clinc(None)) == 15_100
    stream_clinc(None)
