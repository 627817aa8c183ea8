"""JSONL, CSV and Parquet as the same rows: what is absent, what stays wrong, and what cannot be read at all."""

import csv
import gzip
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.errors import SettingError, SourceError
from ingest.produce import _message
from ingest.record import Record, RecordLimits, parse
from ingest.sources import SourceRow, open_source

LIMITS = RecordLimits(frozenset({"billing"}), None, 2000, 400)
GOOD = {"schema_version": 1, "event_id": "e1", "user_id": "u1", "domain": "billing", "prompt": "p", "completion": "c"}


def rows(path: Path, **options: Any) -> list[SourceRow]:
    source = open_source(path, **options)
    found = list(source.rows())
    assert source.count() == len(found)
    return found


def values(path: Path, field_map: dict[str, str] | None = None, **options: Any) -> list[Any]:
    return [json.loads(_message(row, field_map or {})[1]) for row in rows(path, field_map=field_map or {}, **options)]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_rows_are_records(tmp_path: Path, encoding: str) -> None:
    text = (
        "schema_version,event_id,user_id,domain,prompt,completion,label,attributes.lang,attributes.tier\r\n"
        '1,e1,u1,billing,"two\nlines, and a ""quote""",ça,,de,\r\n'
        "\r\n"
        ",e2,u2,billing,p,c,refund,,\r\n"
    )
    path = write(tmp_path / "a.csv", text, encoding)
    first, second = values(path)
    assert first == {
        **GOOD,
        "prompt": 'two\nlines, and a "quote"',
        "completion": "ça",
        "attributes": {"lang": "de"},
    }
    assert second == {
        "event_id": "e2",
        "user_id": "u2",
        "domain": "billing",
        "prompt": "p",
        "completion": "c",
        "label": "refund",
    }
    assert [row.where for row in rows(path)] == [f"{path}:2", f"{path}:5"]
    assert all(isinstance(parse(json.dumps(v).encode(), LIMITS), Record) for v in (first, second))


@pytest.mark.parametrize(
    ("row", "code", "field"),
    [
        ("one,e,u,billing,p,c", "schema_version", "schema_version"),
        ("1,,u,billing,p,c", "missing", "event_id"),
        ("1,e,u,billing", "missing", "prompt"),
        ("1,e,u,billing,p,c,extra", "unknown_key", ""),
        ("1,e,u,astrology,p,c", "undeclared_domain", "domain"),
        ("1,e\udcff,u,billing,p,c", "bad_text", "event_id"),
    ],
)
def test_what_is_wrong_in_a_row_is_left_to_validation(tmp_path: Path, row: str, code: str, field: str) -> None:
    path = tmp_path / "a.csv"
    text = f"schema_version,event_id,user_id,domain,prompt,completion\n{row}\n1,e9,u,billing,p,c\n"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    bad, good = rows(path)
    reasons = parse(_message(bad, {})[1], LIMITS)
    assert isinstance(reasons, tuple)
    assert (code, field) in [(r.code, r.field) for r in reasons]
    assert isinstance(parse(_message(good, {})[1], LIMITS), Record)


def test_columns_are_mapped_and_other_delimiters_read(tmp_path: Path) -> None:
    mapping = {"v": "schema_version", "text": "prompt", "channel": "attributes.channel"}
    semicolons = write(tmp_path / "a.csv", "v;text;user_id;channel\n1;a, b;u;mail\n")
    wanted = [{"schema_version": 1, "prompt": "a, b", "user_id": "u", "attributes": {"channel": "mail"}}]
    assert values(semicolons, mapping, delimiter=";") == wanted
    assert values(write(tmp_path / "a.tsv", "v\ttext\tuser_id\tchannel\n1\ta, b\tu\tmail\n"), mapping) == wanted
    plain = write(tmp_path / "a.jsonl", '{"v": 1, "text": "a, b", "user_id": "u", "channel": "mail"}\n')
    assert values(plain, mapping) == wanted
    table = pa.table({"v": [1], "text": ["a, b"], "user_id": ["u"], "channel": ["mail"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet", mapping) == wanted


def test_gzip_is_read_whatever_its_name(tmp_path: Path) -> None:
    line = json.dumps(GOOD).encode() + b"\n"
    for name, data in (("a.jsonl.gz", line), ("a.csv.gz", b"prompt\nhello\n"), ("packed.jsonl", line)):
        (tmp_path / name).write_bytes(gzip.compress(data))
    assert values(tmp_path / "a.jsonl.gz") == values(tmp_path / "packed.jsonl") == [GOOD]
    assert values(tmp_path / "a.csv.gz") == [{"prompt": "hello"}]
    whole = gzip.compress(b"".join(b'{"prompt": "%d"}\n' % n for n in range(100_000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"cut\.jsonl\.gz: line \d+: gzip is cut off"):
        open_source(tmp_path / "cut.jsonl.gz").count()


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    moment = datetime(2026, 1, 31, 12, tzinfo=UTC)
    table = pa.table(
        {
            **{name: pa.array([value, value]) for name, value in GOOD.items()},
            "label": pa.array(["refund", None]),
            "occurred_at": pa.array([moment, None], pa.timestamp("ns", "UTC")),
            "attributes": pa.array([[("lang", "de"), ("tier", None)], None], pa.map_(pa.string(), pa.string())),
        }
    )
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    first, second = values(path)
    assert second == GOOD
    assert first == {
        **GOOD,
        "label": "refund",
        "occurred_at": "2026-01-31T12:00:00+00:00",
        "attributes": {"lang": "de"},
    }
    assert [row.where for row in rows(path)] == [f"{path}: row 1", f"{path}: row 2"]
    assert isinstance(parse(json.dumps(first).encode(), LIMITS), Record)
    struct = pa.array([{"lang": "de", "tier": None}], pa.struct([("lang", pa.string()), ("tier", pa.string())]))
    pq.write_table(pa.table({"prompt": [b"bytes"], "attributes": struct}), path)
    assert values(path) == [{"prompt": "bytes", "attributes": {"lang": "de"}}]


def test_wrong_types_of_parquet_stay_wrong(tmp_path: Path) -> None:
    twice = pa.array([[("a", "1"), ("a", "2")]], pa.map_(pa.string(), pa.string()))
    naive = pa.array([datetime(2026, 1, 31, 12)], pa.timestamp("us"))  # noqa: DTZ001 - what is wrong
    odd = {"event_id": [7], "completion": [None], "label": [""], "occurred_at": naive, "attributes": twice}
    path = tmp_path / "a.parquet"
    good = {k: [v] for k, v in GOOD.items() if k not in odd}
    pq.write_table(pa.table({**good, **odd, "surplus": [1.5]}), path)
    (row,) = rows(path)
    reasons = parse(_message(row, {})[1], LIMITS)
    assert isinstance(reasons, tuple)
    assert {(r.code, r.field) for r in reasons} == {
        ("wrong_type", "event_id"),
        ("missing", "completion"),
        ("empty", "label"),
        ("bad_time", "occurred_at"),
        ("wrong_type", "attributes"),
        ("unknown_key", ""),
    }


def test_parquet_goes_on_behind_a_row_without_reading_what_is_before(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"event_id": [str(n) for n in range(5000)]}), path, row_group_size=1500)
    source = open_source(path)
    for after in (0, 1, 999, 1000, 1499, 1500, 1501, 3000, 4999, 5000):
        found = list(source.rows(after))
        assert [row.number for row in found] == list(range(after + 1, 5001))
        assert [row.fields["event_id"] for row in found] == [str(n) for n in range(after, 5000)]
    # Broken bytes of the first row group are not met by who starts behind it.
    data = bytearray(path.read_bytes())
    data[4:2000] = b"\xff" * 1996
    path.write_bytes(bytes(data))
    assert len(list(source.rows(1500))) == 3500
    with pytest.raises(SourceError, match=r"a\.parquet: row 1: unreadable as Parquet .*; write the file again"):
        list(source.rows())


@pytest.mark.parametrize(
    ("name", "content", "options", "says"),
    [
        ("a.avro", b"", {}, "is Avro.*avro-tools.jar tojson"),
        ("a.jsonl", b"Obj\x01\x04", {}, "is Avro.*avro-tools.jar tojson"),
        ("a.jsonl", b"", {"form": "avro"}, "is Avro.*avro-tools.jar tojson"),
        ("a.proto", b"", {}, r"is Protobuf.*\.proto.*MessageToJson"),
        ("a.pb", b"", {}, "is Protobuf"),
        ("a.bin", b"", {}, "is Protobuf"),
        ("a.jsonl", b"", {"form": "protobuf"}, "is Protobuf"),
        ("a.jsonl", b"PAR1\x15", {}, "is Parquet; name it .parquet"),
        ("a.parquet", b"{}", {}, "a.parquet: row 1: unreadable as Parquet"),
        ("a.parquet", b"", {}, "a.parquet: row 1: unreadable as Parquet"),
        ("a.parquet.gz", b"", {}, "run gunzip first"),
        ("a.csv", b"", {}, "row 1 must name the columns.*nothing.*add a header row"),
        ("a.csv", b"e1,u1,billing\n", {}, r"row 1 must name the columns.*\(e1, u1, billing\)"),
        ("a.csv", b"event_id;prompt\n", {}, r"\(event_id;prompt\).*--delimiter"),
        ("a.csv", b"prompt,text\nx,y\n", {"field_map": {"text": "prompt"}}, "two columns become prompt"),
        ("a.csv", b"attributes,attributes.a\nx,y\n", {}, "two columns become attributes"),
        ("a.csv", b'prompt\nok\nfine\n"never closed\n\n', {}, "a.csv: line 4: no CSV .*close the quotes"),
        ("a.csv", "prompt\nx\n".encode("utf-16"), {}, "is UTF-16; save it as CSV UTF-8"),
        ("a.csv", b"Obj\x01", {}, "is Avro"),
    ],
)
def test_a_file_that_cannot_be_read_says_why_and_the_way_out(
    tmp_path: Path, name: str, content: bytes, options: dict[str, Any], says: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SourceError, match=says):
        open_source(path, **options).count()


def test_settings_out_of_bounds_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="format=xml: must be one of jsonl, csv, parquet"):
        open_source(tmp_path / "a.jsonl", "xml")
    for wrong in ("", ";;", '"', "\n"):
        with pytest.raises(SettingError, match="delimiter="):
            open_source(tmp_path / "a.csv", delimiter=wrong)


CELL = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@given(st.lists(st.tuples(CELL, CELL), max_size=20), st.integers(0, 25))
def test_any_csv_comes_back_as_it_was_written(tmp_path_factory: Any, cells: list[tuple[str, str]], after: int) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("prompt", "completion"))
        writer.writerows(cells)
    found = list(open_source(path).rows(after))
    wanted = [{k: v for k, v in (("prompt", a), ("completion", b)) if v} for a, b in cells]
    assert [dict(row.fields) for row in found] == wanted[after:]


def test_a_large_parquet_file_is_never_whole_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    schema = pa.schema([("event_id", pa.string()), ("prompt", pa.string())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for group in range(6):
            prompts = [f"{group}-{n}-" + "x" * 1000 for n in range(20_000)]
            writer.write_table(pa.table({"event_id": prompts, "prompt": prompts}, schema=schema))
    assert path.stat().st_size > 200_000_000
    code = (
        "import sys, resource\nfrom pathlib import Path\nfrom ingest.sources import open_source\n"
        "import pyarrow.parquet\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "n = sum(1 for _ in open_source(Path(sys.argv[1])).rows())\n"
        "print(n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    count, grown_mib = map(int, done.stdout.split())
    assert count == 120_000
    assert grown_mib < 120, f"{grown_mib} MiB for {path.stat().st_size >> 20} MiB"
