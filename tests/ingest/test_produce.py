"""Files onto a topic, as they are; and CLINC150, 15,100 real utterances, through Apache Kafka into blocks."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ingest.broker import KafkaSettings
from ingest.errors import BrokerUnreachable, MessageTooLarge, SettingError, SourceError
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
