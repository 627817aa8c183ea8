"""Gate sets: read exactly, refused with the line that is wrong."""

import hashlib
import json

import pytest

from evaluation.errors import GateSetError
from evaluation.gateset import GateSet

GOOD = {"event_id": "1", "domain": "cards", "prompt": "lost it", "completion": "Block it.", "label": "lost"}
OTHER = {"event_id": "2", "domain": "cards", "prompt": "found it", "completion": "found"}


def write(tmp_path, *records):
    path = tmp_path / "bank.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_it_is_read_in_order_with_its_hash(tmp_path):
    full = OTHER | {
        "schema_version": 1,
        "user_id": "u",
        "occurred_at": "2026-01-01T00:00:00Z",
        "attributes": {"a": "b"},
    }
    path = write(tmp_path, GOOD, "", full)
    gate_set = GateSet.load(path)
    assert gate_set.name == "bank"
    assert gate_set.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [record.event_id for record in gate_set.records] == ["1", "2"]
    assert dict(gate_set.answers) == {"found": "found", "lost": "Block it."}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", "line 2: line: Invalid JSON"),
        ("[1]", "line 2: line"),
        (GOOD, "line 2: event_id='1' as on line 1"),
        (OTHER | {"prompt": 5}, "line 2: prompt"),
        (OTHER | {"completion": ""}, "line 2: completion"),
        (OTHER | {"labl": "x"}, "line 2: labl"),
        ({"event_id": "2"}, "line 2: domain"),
        (OTHER | {"label": "lost"}, "label='lost' is said as 'Block it.' and as 'found'"),
        ("", "labels=1, must be >= 2"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, second, message):
    with pytest.raises(GateSetError, match=message) as caught:
        GateSet.load(write(tmp_path, GOOD, second))
    assert "\n" not in str(caught.value)


def test_no_file_is_named(tmp_path):
    with pytest.raises(GateSetError, match=r"none\.jsonl: cannot be read"):
        GateSet.load(tmp_path / "none.jsonl")
