"""Malformed messages by the hundred thousand: no crash, each is rejected with a reason, and what is valid is taken.

What is valid is decided here a second time, from the contract's text, with nothing of `ingest.record`.
"""

import json
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kafka.admin import NewTopic

from ingest.broker import Message, TopicWriter, _admin
from ingest.expectations import Suite, write_default_suite
from ingest.record import REASONS_MAX, Reason, Record, parse
from ingest.sorting import judge
from tests.ingest.world import LIMITS, World, line
from tests.kafka_servers import ApacheKafka

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")

# ── the oracle

TEXTS = ("event_id", "user_id", "domain", "prompt", "completion")
KEYS = {*TEXTS, "schema_version", "label", "occurred_at", "attributes"}
TIME = re.compile(r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.\d{1,9})?(?:[Zz]|([+-])(\d\d):(\d\d))", re.ASCII)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError
    return dict(pairs)


def _nothing(_: str) -> None:
    raise ValueError


def _is_text(value: object, bytes_max: int | None = None, chars_max: int | None = None) -> bool:
    if not isinstance(value, str) or value == "" or any("\ud800" <= c <= "\udfff" for c in value):
        return False
    fits = bytes_max is None or len(value.encode()) <= bytes_max
    return fits and (chars_max is None or len(value) <= chars_max)


def _is_time(value: object) -> bool:
    found = TIME.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return False
    year, month, day, hour, minute, second = (int(part) for part in found.groups()[:6])
    hours, minutes = int(found[8] or 0), int(found[9] or 0)
    try:
        zone = timezone((-1 if found[7] == "-" else 1) * timedelta(hours=hours, minutes=minutes))
        datetime(year, month, day, hour, minute, second, tzinfo=zone).astimezone(UTC)
    except (ValueError, OverflowError):
        return False
    return hours < 24 and minutes < 60


def _are_attributes(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= 32
        and all(isinstance(text, str) and (text == "" or _is_text(text, 512)) for text in value.values())
        and all(key == "" or _is_text(key, 128) for key in value)
    )


def is_valid(value: bytes | None) -> bool:
    """The contract in docs/records.md and the stream's limits, read by somebody else."""
    try:
        found = json.loads((value or b"").decode(), object_pairs_hook=_pairs, parse_constant=_nothing)
    except (ValueError, RecursionError):
        return False
    if not isinstance(found, dict) or not set(TEXTS) <= set(found) <= KEYS:
        return False
    version = found.get("schema_version", 1)
    label, occurred, attributes = (found.get(name) for name in ("label", "occurred_at", "attributes"))
    return (
        all(_is_text(found[name], 128) for name in ("event_id", "user_id", "domain"))
        and found["domain"] in {"billing", "travel"}
        and (label is None or (isinstance(label, str) and label in {"refund", "visa"}))
        and type(version) is int
        and version == 1
        and _is_text(found["prompt"], chars_max=2000)
        and _is_text(found["completion"], chars_max=100)
        and (occurred is None or _is_time(occurred))
        and (attributes is None or _are_attributes(attributes))
    )


def is_accepted(value: bytes | None) -> bool:
    """What the default suite asks on top: something to read in prompt and completion."""
    return is_valid(value) and all(json.loads(value or b"")[name].split() for name in ("prompt", "completion"))


# ── the fuzzers

ODD_TEXTS = (
    "",
    " ",
    "\u200b",
    "\u00a0",
    "x" * 129,
    "é" * 65,
    "é" * 64,
    "日本語" * 43,
    "👩‍👩‍👧‍👦",
    "\u202eevil",
    "شكرا",
    "a\u0300" * 20,
    "\x00",
    "\x1f",
    "\x7f",
    "\x85",
    "\ufeff",
    "\uffff",
    "\U0010ffff",
    "\ud800",
    "\udfff\ud800",
    "x" * 2001,
    "x" * 101,
    "'; --",
    "<b>",
    "null",
    "NaN",
    "\\",
    '"',
    "\r\n",
)
ODD_VALUES = (
    *ODD_TEXTS,
    None,
    True,
    False,
    0,
    1,
    2,
    1.0,
    -0.0,
    1e308,
    10**30,
    [],
    {},
    [[]],
    {"a": "b"},
    {"a": 1},
    {"a": None},
    {"": ""},
    {"k": "\ud800"},
    {"k" * 129: ""},
    {"k": "v" * 513},
    {str(i): "" for i in range(33)},
    ["refund"],
)
ODD_TIMES = (
    "2026-01-31T12:00:00Z",
    "2026-01-31t12:00:00z",
    "2026-01-31 12:00:00+05:30",
    "2026-02-30T00:00:00Z",
    "2024-02-29T23:59:59.123456789-23:59",
    "2026-01-31T24:00:00Z",
    "2026-01-31T12:00:60Z",
    "0001-01-01T00:00:00+01:00",
    "9999-12-31T23:59:59-01:00",
    "0000-01-01T00:00:00Z",
    "2026-01-31",
    "2026-01-31T12:00:00",
    "2026-01-31T12:00:00.Z",
    "2026-01-31T12:00:00.1234567890Z",
    "٢٠٢٦-01-31T12:00:00Z",
    "2026-01-31T12:00:00Z\n",
    "2026-01-31T12:00:00+24:00",
    "2026-01-31T12:00:00+01:60",
    "2026-W05-6T12:00:00Z",
)
FOREIGN = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "utf-8-sig", "cp037", "utf-7")
WHOLE = (
    None,
    b"",
    b" ",
    b"null",
    b"NaN",
    b"[]",
    b"{}",
    b"1",
    b'"x"',
    b"\x00" * 64,
    b"\xef\xbb\xbf{}",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"1" * 10_000,
    b"-1e400",
    b"Obj\x01avro",
    b"\x00\x00\x00\x00\x01proto",
    b"\xed\xa0\x80",
    b"\xc0\xaf",
    b"\xf5\x80\x80\x80",
    b"\xff" * 9,
)


def _fields(number: int, dice: random.Random) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(line(number))
    for name in dice.sample(sorted(KEYS), dice.choice((0, 1, 1, 2, 3))):
        fields[name] = dice.choice(ODD_TIMES if name == "occurred_at" and dice.random() < 0.7 else ODD_VALUES)
    if dice.random() < 0.1:
        fields.pop(dice.choice(sorted(fields)))
    if dice.random() < 0.1:
        fields[dice.choice(ODD_TEXTS)] = dice.choice(ODD_VALUES)
    return fields


def _written(fields: dict[str, Any], dice: random.Random) -> bytes:
    """As JSON of one style or another, perhaps with a key twice, perhaps in another encoding."""
    text = json.dumps(fields, ensure_ascii=dice.random() < 0.5, indent=dice.choice((None, None, 1)))
    if dice.random() < 0.1:
        twice = dice.choice(sorted(fields) or ["x"])
        text = text[:-1] + f", {json.dumps(twice)}: {json.dumps(fields.get(twice))}}}"
    if dice.random() < 0.1:
        text = text.replace(
            '"refund"', dice.choice(("NaN", "-Infinity", "1e999", "0x1", "'refund'", "refund", "01")), 1
        )
    encoding = dice.choice(FOREIGN) if dice.random() < 0.1 else "utf-8"
    return text.encode(encoding, errors=dice.choice(("surrogatepass", "replace")) if "utf" in encoding else "replace")


def _damaged(value: bytes, dice: random.Random) -> bytes:
    """Some bytes cut, put in, changed or doubled."""
    found = bytearray(value)
    for _ in range(dice.choice((1, 1, 2, 8))):
        at = dice.randrange(len(found) + 1)
        what = dice.randrange(5)
        if what == 0:
            del found[at:]
        elif what == 1:
            found[at:at] = dice.choice(
                (b"\x00", b"\xff", b"\n", b'"', b"\\", b"\xe2\x80\xae", b"\xed\xa0\x80", b"{", b"\x1b")
            )
        elif what == 2 and found:
            found[at % len(found)] = dice.randrange(256)
        elif what == 3:
            found[at:at] = found[: dice.randrange(40)]
        else:
            del found[at : at + dice.randrange(20)]
    return bytes(found)


def fuzzed(count: int, seed: int) -> Iterator[bytes | None]:
    """Messages nobody should send; a few of them are valid by luck."""
    dice = random.Random(seed)
    for number in range(count):
        kind = dice.random()
        if kind < 0.05:
            yield dice.choice(WHOLE)
        elif kind < 0.10:
            yield dice.randbytes(dice.choice((1, 8, 200)))
        elif kind < 0.55:
            yield _written(_fields(number, dice), dice)
        else:
            yield _damaged(_written(_fields(number, dice), dice), dice)


# ── what must hold


def _check_one(value: bytes | None) -> None:
    found = parse(value, LIMITS)
    assert isinstance(found, Record) == is_valid(value), value
    if isinstance(found, Record):
        return
    assert 1 <= len(found) <= REASONS_MAX
    for reason in found:
        assert isinstance(reason, Reason) and reason.code and reason.message and "\n" not in str(reason)
        assert reason.field in KEYS | {""}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(sorted(KEYS)) | st.text(), inner, max_size=9)
    ),
    max_leaves=12,
)
ALMOST = st.fixed_dictionaries(
    {name: st.sampled_from(["billing", "e1"]) | st.text(max_size=140) for name in TEXTS},
    optional={
        "schema_version": st.sampled_from([1, 1.0, True, "1", None, 2]),
        "label": st.sampled_from(["refund", "visa", "", None, 1]),
        "occurred_at": st.sampled_from(ODD_TIMES) | st.none(),
        "attributes": st.dictionaries(st.text(max_size=5), st.text(max_size=5) | st.integers(), max_size=3) | st.none(),
    },
)


@given(
    st.binary(max_size=300)
    | st.builds(lambda value: json.dumps(value).encode(), JSON)
    | st.builds(
        lambda value, ascii_: json.dumps(value, ensure_ascii=ascii_).encode(errors="surrogatepass"),
        ALMOST,
        st.booleans(),
    )
    | st.text().map(lambda text: text.encode(errors="surrogatepass"))
)
@example(line(1, schema_version=1.0))
@example(line(1, schema_version=True))
@example(b"\xef\xbb\xbf" + line(1))
@example(line(1)[:-1] + b', "label": "refund"}')
@example(line(1)[:-1] + b', "schema_version": 1, "schema_version": 1}')
def test_whatever_comes_is_taken_or_rejected_with_reasons(value: bytes) -> None:
    _check_one(value)


def _messages(values: Sequence[bytes | None]) -> list[Message]:
    return [Message(0, offset, None, value, (), 0) for offset, value in enumerate(values)]


def _judged(values: Sequence[bytes | None], suite: Suite) -> tuple[set[int], dict[int, tuple[Reason, ...]], float]:
    """Accepted offsets, rejected ones with their reasons, and records per CPU second; in blocks of ten thousand."""
    accepted: set[int] = set()
    rejected: dict[int, tuple[Reason, ...]] = {}
    messages = _messages(values)
    began = time.process_time()
    for start in range(0, len(messages), 10_000):
        found = judge(messages[start : start + 10_000], LIMITS, suite.validate)
        accepted |= {message.offset for message, _ in found.accepted}
        rejected |= {message.offset: reasons for message, reasons in found.rejected}
    return accepted, rejected, len(values) / (time.process_time() - began)


def test_a_hundred_thousand_malformed_messages_are_judged(tmp_path: Path) -> None:
    write_default_suite(tmp_path / "suite.yaml", LIMITS)
    suite = Suite(tmp_path / "suite.yaml")
    # The first batch pays for what the suite loads.
    suite.validate([])
    values = list(fuzzed(100_000, seed=7))
    accepted, rejected, bad_rate = _judged(values, suite)
    taken, _, good_rate = _judged([line(i) for i in range(100_000)], suite)
    sys.stdout.write(f"\njudged per CPU second: {bad_rate:,.0f} malformed, {good_rate:,.0f} good\n")
    assert accepted == {offset for offset, value in enumerate(values) if is_accepted(value)}
    assert accepted | set(rejected) == set(range(100_000))
    assert all(1 <= len(reasons) <= REASONS_MAX for reasons in rejected.values())
    # Luck and the oracle are both at work: some are valid, and many kinds of reasons are found.
    assert 2_000 < len(accepted) < 50_000
    assert len({reason.code for reasons in rejected.values() for reason in reasons}) >= 14
    assert len(taken) == 100_000


def _through_the_broker(world: World, count: int, large: int) -> None:
    """Fuzzed messages, large ones among them, and as many good ones for comparison."""
    with _admin(world.settings, "test") as admin:
        limit = {"max.message.bytes": str(12 << 20)}
        admin.create_topics([NewTopic(world.topic, num_partitions=2, replication_factor=1, topic_configs=limit)])
    huge = [b"[" * (10 << 20), b'"' + b"\\u0000" * (10 << 20) + b'"', line(0, prompt="x" * (10 << 20))][:large]
    huge = [value[: 10 << 20] for value in huge]
    values = [*fuzzed(count, seed=11), *huge]
    random.Random(3).shuffle(values)
    rates = []
    for name, batch in (("malformed", values), ("good", [line(10**6 + i) for i in range(count)])):
        with TopicWriter(world.settings) as writer:
            for number, value in enumerate(batch):
                writer.send(world.topic, str(number).encode(), value)
            writer.flush()
        began = time.process_time()
        world.ingest()
        rates.append(f"{len(batch) / (time.process_time() - began):,.0f} {name}")
    sys.stdout.write(f"\nthrough the broker per CPU second: {', '.join(rates)}\n")
    where = world.check_history()
    good = sum(is_accepted(value) for value in values)
    # Two fuzzed messages may have come to one identity: then the second is a duplicate, or in conflict.
    assert where["block"] + where["duplicate"] <= good + count
    assert where["dead"] >= len(values) - good
    letters = world.letters()
    assert all(letter.reasons and letter.codes for letter in letters)
    referred = [letter for letter in letters if letter.reference is not None]
    assert len(referred) == large
    assert all(letter.value is None for letter in referred)


def test_malformed_messages_through_apache_kafka(tmp_path: Path, apache_kafka: ApacheKafka, topic: str) -> None:
    _through_the_broker(World(tmp_path, apache_kafka.settings, topic, block_offsets=2500).make(), 5_000, large=3)


@pytest.mark.slow
def test_a_hundred_thousand_malformed_messages_through_apache_kafka(
    tmp_path: Path, apache_kafka: ApacheKafka, topic: str
) -> None:
    _through_the_broker(World(tmp_path, apache_kafka.settings, topic, block_offsets=10_000).make(), 100_000, large=3)
