"""Dead letters on both brokers: found, counted, sent again, deleted up to a time."""

import json
import time

from ingest.broker import KafkaSettings, Message, TopicReader, TopicWriter, describe_topic, ensure_topic
from ingest.deadletters import (
    REPLAYED_FROM,
    Mended,
    expire,
    find_dead_letters,
    headers_of,
    plan_expiry,
    read_dead_letters,
    replay,
    survey,
    topic_of,
)
from ingest.record import Reason


def put(settings: KafkaSettings, topic: str, numbers: range, code: str = "empty", reference: str | None = None) -> None:
    """Letters as the ingester writes them."""
    ensure_topic(settings, topic_of(topic))
    with TopicWriter(settings) as writer:
        for number in numbers:
            key = f"{topic}/local.1/0/{number}".encode()
            headers = headers_of([Reason(code, "prompt", "bad"), Reason(code, "completion", "bad")], reference)
            writer.send(topic_of(topic), key, None if reference else b"value %d" % number, headers)
        writer.flush()


def everything(settings: KafkaSettings, topic: str) -> list[Message]:
    info = describe_topic(settings, topic)
    assert info is not None
    found: list[Message] = []
    with TopicReader(settings, topic) as reader:
        bounds = reader.bounds(info.partitions)
        reader.seek({p: first for p, (first, _) in bounds.items()})
        while len(found) < sum(end - first for first, end in bounds.values()):
            batch = reader.poll(1000, 5000)
            assert batch
            found += batch
    return found


def test_all_are_counted_once_and_the_newest_given(broker: KafkaSettings, topic: str) -> None:
    assert survey(broker, topic, 5).total == 0
    put(broker, topic, range(30))
    put(broker, topic, range(25, 30))
    put(broker, topic, range(100, 103), "not_json")
    found = survey(broker, topic, 4)
    assert (found.total, found.by_code) == (33, {"empty": 30, "not_json": 3})
    assert [letter.source for letter in found.letters] == [(0, 29), (0, 100), (0, 101), (0, 102)]
    only = survey(broker, topic, 2, "empty")
    assert (only.total, only.by_code) == (30, {"empty": 30})
    assert {letter.codes for letter in only.letters} == {("empty", "empty")}
    assert len(read_dead_letters(broker, topic, 1000)) == 33


def test_a_key_leads_to_its_letter(broker: KafkaSettings, topic: str) -> None:
    put(broker, topic, range(5))
    put(broker, topic, range(5, 6), "too_long", "lanes/desk-0/blocks/desk-0-000000001/rejects.parquet")
    keys = [f"{topic}/local.1/0/{n}" for n in (3, 5, 77)]
    found = find_dead_letters(broker, topic, keys)
    assert {key: letter.value for key, letter in found.items()} == {keys[0]: b"value 3", keys[1]: None}
    assert (found[keys[1]].reference or "").endswith("rejects.parquet")


def test_what_is_sent_again_says_what_it_was(broker: KafkaSettings, topic: str) -> None:
    ensure_topic(broker, topic)
    told: list[str] = []
    letters = [Mended(f"{topic}/x/0/{n}", b"u1", json.dumps({"n": n}).encode()) for n in range(2500)]
    rounds: list[int] = []

    def hear(keys: object) -> None:
        assert isinstance(keys, list)
        rounds.append(len(keys))
        told.extend(keys)

    assert replay(broker, topic, letters, hear) == 2500
    assert rounds == [1000, 1000, 500]
    assert told == [one.letter for one in letters]
    found = everything(broker, topic)
    assert [(m.key, m.value, dict(m.headers)[REPLAYED_FROM].decode()) for m in found] == [
        (b"u1", one.value, one.letter) for one in letters
    ]


def test_letters_before_a_time_are_deleted_and_no_others(broker: KafkaSettings, topic: str) -> None:
    assert plan_expiry(broker, topic, 0).letters == 0
    put(broker, topic, range(7))
    put(broker, topic, range(7, 9), "too_long", "lanes/a/rejects.parquet")
    time.sleep(0.05)
    cut = int(time.time() * 1000)
    time.sleep(0.05)
    put(broker, topic, range(20, 24), "not_json")
    none = plan_expiry(broker, topic, 1000)
    assert (none.letters, none.offsets) == (0, {0: 0})
    planned = plan_expiry(broker, topic, cut)
    assert (planned.letters, planned.elsewhere, planned.by_code) == (9, 2, {"empty": 7, "too_long": 2})
    assert survey(broker, topic, 1).total == 13, "a plan deletes nothing"
    expire(broker, topic, planned)
    assert [letter.source for letter in read_dead_letters(broker, topic, 100)] == [(0, n) for n in range(20, 24)]
    expire(broker, topic, planned)
    everything_else = plan_expiry(broker, topic, cut + 3_600_000)
    expire(broker, topic, everything_else)
    assert read_dead_letters(broker, topic, 100) == []
