"""The contract, one bad input after another."""

import inspect
import json
import random
import re

import pytest

from ingest import record
from ingest import record as record_module
from ingest.errors import SettingError
from ingest.record import REASONS_MAX, Record, RecordLimits, parse

LIMITS = RecordLimits(frozenset({"billing", "travel"}), frozenset({"refund", "visa"}), 100, 20)
GOOD = {"event_id": "e1", "user_id": "u1", "domain": "billing", "prompt": "p", "completion": "c"}


def _bytes(**changes: object) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def _without(key: str) -> bytes:
    return json.dumps({k: v for k, v in GOOD.items() if k != key}).encode()


BAD: list[tuple[str, bytes | None, str, str]] = [
    ("tombstone", None, "tombstone", ""),
    ("empty", b"", "not_json", ""),
    ("not JSON", b"hello", "not_json", ""),
    ("half JSON", b'{"event_id": "e', "not_json", ""),
    ("not UTF-8", b"\xff\xfe{}", "not_utf8", ""),
    ("byte order mark", b"\xef\xbb\xbf{}", "not_json", ""),
    ("NaN", b'{"event_id": NaN}', "not_json", ""),
    ("endless number", b"[" + b"1" * 10_000 + b"]", "not_json", ""),
    ("endless nesting", b"[" * 200_000, "not_json", ""),
    ("Avro by a schema registry", b"\x00\x00\x00\x00\x07\x0eticket7\x04u1", "encoding", ""),
    ("Avro that is no UTF-8", b"\x00\x00\x00\x00\x07\x0e\xff\xfe", "encoding", ""),
    ("JSON by a schema registry", b"\x00\x00\x00\x00\x07" + _bytes(), "encoding", ""),
    ("Avro file", b"Obj\x01\x04\x14avro.codec", "encoding", ""),
    ("nothing but a magic byte", b"\x00", "not_json", ""),
    ("UTF-16", _bytes().decode().encode("utf-16-be"), "not_json", ""),
    ("list", b"[]", "not_object", ""),
    ("string", b'"text"', "not_object", ""),
    ("null", b"null", "not_object", ""),
    ("key twice", b'{"event_id": "a", "event_id": "b"}', "duplicate_key", ""),
    ("unknown key", _bytes(secret="x"), "unknown_key", ""),
    ("no event_id", _without("event_id"), "missing", "event_id"),
    ("no user_id", _without("user_id"), "missing", "user_id"),
    ("no domain", _without("domain"), "missing", "domain"),
    ("no prompt", _without("prompt"), "missing", "prompt"),
    ("no completion", _without("completion"), "missing", "completion"),
    ("number as id", _bytes(event_id=7), "wrong_type", "event_id"),
    ("null prompt", _bytes(prompt=None), "wrong_type", "prompt"),
    ("list as prompt", _bytes(prompt=["p"]), "wrong_type", "prompt"),
    ("empty prompt", _bytes(prompt=""), "empty", "prompt"),
    ("empty user", _bytes(user_id=""), "empty", "user_id"),
    ("huge prompt", _bytes(prompt="x" * 1_000_000), "too_long", "prompt"),
    ("long completion", _bytes(completion="x" * 21), "too_long", "completion"),
    ("id of 129 bytes", _bytes(event_id="x" * 129), "too_long", "event_id"),
    ("id of 65 two-byte letters", _bytes(user_id="ä" * 65), "too_long", "user_id"),
    ("undeclared domain", _bytes(domain="health"), "undeclared_domain", "domain"),
    ("undeclared label", _bytes(label="other"), "undeclared_label", "label"),
    ("lone surrogate", b'{"event_id": "\\ud800"}', "bad_text", "event_id"),
    ("version 2", _bytes(schema_version=2), "schema_version", "schema_version"),
    ("version as text", _bytes(schema_version="1"), "schema_version", "schema_version"),
    ("time without zone", _bytes(occurred_at="2026-01-01T00:00:00"), "bad_time", "occurred_at"),
    ("time of day 25", _bytes(occurred_at="2026-01-01T25:00:00Z"), "bad_time", "occurred_at"),
    ("time as number", _bytes(occurred_at=1), "wrong_type", "occurred_at"),
    ("year nought", _bytes(occurred_at="0001-01-01T00:00:00+23:59"), "bad_time", "occurred_at"),
    ("attribute as number", _bytes(attributes={"a": 1}), "wrong_type", "attributes"),
    ("attributes as list", _bytes(attributes=[]), "wrong_type", "attributes"),
    ("33 attributes", _bytes(attributes={str(i): "" for i in range(33)}), "too_many", "attributes"),
    ("long attribute", _bytes(attributes={"a": "x" * 513}), "too_long", "attributes"),
]


@pytest.mark.parametrize(("value", "code", "field"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_has_its_reason(value: bytes | None, code: str, field: str) -> None:
    reasons = parse(value, LIMITS)
    assert isinstance(reasons, tuple)
    assert (code, field) in [(reason.code, reason.field) for reason in reasons]
    assert len(reasons) <= REASONS_MAX


def test_every_kind_of_rejection_is_tried() -> None:
    source = inspect.getsource(record)
    codes = set(re.findall(r'Reason\(\s*"([a-z_0-9]+)"', source)) | {code for code, _ in record._RULES.values()}
    assert codes == {code for _, _, code, _ in BAD}


def test_reasons_never_hold_content() -> None:
    marker = "zebra-4711"
    bad = {
        "event_id": marker * 20,
        "user_id": [marker],
        "domain": marker,
        "prompt": marker * 99,
        "completion": {marker: marker},
        "label": marker,
        "occurred_at": marker,
        "attributes": {marker: 1},
        marker: marker,
    }
    for value in (json.dumps(bad), json.dumps({**GOOD, "domain": marker, "label": marker}), "{" + marker):
        reasons = parse(value.encode(), LIMITS)
        assert isinstance(reasons, tuple)
        assert marker not in repr(reasons)


def test_a_good_record_is_a_value() -> None:
    record = parse(_bytes(label="visa", occurred_at="2026-01-01t01:00:00.1234567+01:00"), LIMITS)
    assert isinstance(record, Record)
    assert record.occurred_at == "2026-01-01T00:00:00.123456Z"
    assert record.schema_version == 1
    assert Record.model_validate_json(record.model_dump_json()) == record


def test_null_in_an_optional_field_is_absence() -> None:
    assert parse(_bytes(label=None, attributes=None), LIMITS) == parse(_bytes(), LIMITS)


def test_any_label_without_declared_ones() -> None:
    free = RecordLimits(frozenset({"billing"}), None, 10, 10)
    assert isinstance(parse(_bytes(label="whatever"), free), Record)


def test_impossible_limits_are_named() -> None:
    with pytest.raises(SettingError, match="domains"):
        RecordLimits(frozenset(), None, 1, 1)
    with pytest.raises(SettingError, match="prompt_chars_max=0"):
        RecordLimits(frozenset({"a"}), None, 0, 1)


def _scrambled(rng: random.Random) -> bytes:
    """Nearly a record: keys twice, nulls, objects, quotes, other orders, a byte gone wrong."""
    keys = ["event_id", "user_id", "domain", "prompt", "completion", "label", "occurred_at", "schema_version"]
    odd = ["b c", "é", "", None, 1, 'q"', {}, {"a": "b"}, "2026-01-01T00:00:00Z", float("nan")]
    items: list[tuple[str, object]] = [(k, "a" if rng.random() > 0.05 else rng.choice(odd)) for k in keys[:5]]
    items += [(k, rng.choice(["a", *odd])) for k in rng.choices([*keys, "attributes", "x"], k=rng.randint(0, 3))]
    rng.shuffle(items)
    ascii_only = rng.random() < 0.5
    text = ",".join(f"{json.dumps(k)}:{json.dumps(v, ensure_ascii=ascii_only)}" for k, v in items)
    value = bytearray(b"{" + text.encode() + b"}")
    if rng.random() < 0.1:
        value[rng.randrange(len(value))] = rng.randrange(256)
    return bytes(value)


def test_the_short_way_through_parse_decides_like_the_thorough_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    limits = RecordLimits(frozenset({"a"}), None, 50, 50)
    values = [_scrambled(rng) for _ in range(30_000)]
    short = [parse(value, limits) for value in values]
    taken = sum(record_module._plain(value) is not None for value in values)
    monkeypatch.setattr(record_module, "_plain", lambda _: None)
    assert short == [parse(value, limits) for value in values]
    # Neither way is idle here.
    accepted = sum(isinstance(result, Record) for result in short)
    assert 1000 < taken < accepted - 300
