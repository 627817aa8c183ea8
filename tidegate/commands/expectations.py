"""`tidegate expectations`: try a suite on records before the stream does, and read Great Expectations' Data Docs."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from tidegate import output
from tidegate.errors import TidegateError, UnknownName

if TYPE_CHECKING:
    from ingest.expectations import Judged, Suite
    from ingest.record import Reason, Record, RecordLimits
    from tidegate.wiring import Service

# Enough to see what is wrong; a wrong rule fails every row.
_SHOWN: Final = 20
_CONTENT_CHARS: Final = 200


@click.group()
def expectations() -> None:
    """Work on a stream's suite of expectations, the file expectations/STREAM.yaml in the workspace.

    A data owner edits that file. `check` tries it on records of a file and needs no broker; `docs` builds Great
    Expectations' pages on the newest block. `tidegate ingest` takes a change up with the next block, without a restart.
    """


@expectations.command()
@click.argument("stream")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--suite", "suite_file", type=click.Path(path_type=Path), help="Another suite than expectations/STREAM.yaml."
)
@click.option("--limit", type=click.IntRange(min=1), help=f"Show so many reasons; default: {_SHOWN}, with --json all.")
@click.option("--content", is_flag=True, help="Show the failing lines too: they may be people's data.")
@click.option("--json", "want_json", is_flag=True, help="JSON instead of tables.")
@click.pass_obj
def check(
    given: str | None,
    stream: str,
    file: Path,
    *,
    suite_file: Path | None,
    limit: int | None,
    content: bool,
    want_json: bool,
) -> None:
    """Judge the records of a JSONL FILE as STREAM's ingest would: the contract first, then the suite.

    FILE is judged as if it were one block, which matters to alarms only. Duplicates are no matter of a suite and are
    not looked for. Nothing is sent and nothing is kept.

    Exit code: 0 when every row passes; 1 when a row would be rejected or an alarm raised, or the suite cannot be used.
    """
    from ingest.expectations import Suite
    from tidegate.wiring import open_service

    service = open_service(given)
    limits = service.limits(stream)
    lines = _lines(file)
    suite = Suite(suite_file or service.workspace.expectations(stream))
    report = _judge(lines, limits, suite)
    if content:
        for row in report["failing"]:
            row["content"] = lines[row["line"] - 1].decode("utf-8", "backslashreplace")
    if want_json:
        report["failing"] = report["failing"][:limit]
        output.as_json({"stream": stream, "file": str(file), "suite": str(suite.path), **report})
    else:
        _print(report, limit or _SHOWN, content=content)
    sys.exit(0 if report["passed"] else 1)


def _lines(file: Path) -> list[bytes]:
    try:
        return [line.rstrip(b"\r") for line in file.read_bytes().split(b"\n")]
    except OSError as error:
        raise TidegateError(f"{file}: {error.strerror}; must be a readable JSONL file") from None


def _judge(lines: list[bytes], limits: RecordLimits, suite: Suite) -> dict[str, Any]:
    """What becomes of each line; rows are named by line number, from 1."""
    from ingest.record import Record, parse

    failing: list[dict[str, Any]] = []
    parsed: list[tuple[int, Record]] = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        result = parse(line, limits)
        if isinstance(result, Record):
            parsed.append((number, result))
        else:
            failing += [_failure(number, reason, by="contract") for reason in result]
    judged = suite.validate([record for _, record in parsed])
    for row, reasons in judged.rejected.items():
        failing += [_failure(parsed[row][0], reason, by="suite") for reason in reasons]
    failing.sort(key=lambda row: row["line"])
    rejected = len({row["line"] for row in failing})
    rows = len(parsed) + len({row["line"] for row in failing if row["by"] == "contract"})
    return {
        "suite_sha256": suite.sha256,
        "passed": not failing and not judged.alarms,
        "rows": rows,
        "rejected": rejected,
        "alarms": list(judged.alarms),
        "expectations": _findings(judged, [number for number, _ in parsed]),
        "failing": failing,
    }


def _failure(line: int, reason: Reason, by: str) -> dict[str, Any]:
    return {"line": line, "by": by, "field": reason.field, "reason": reason.message, "code": reason.code}


def _findings(judged: Judged, numbers: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "number": finding.number,
            "type": finding.type,
            "column": finding.column,
            "decides": finding.decides or "alarm",
            "passed": finding.passed,
            "rows_failed": None if finding.rows is None else len(finding.rows),
            "lines_failed": None if finding.rows is None else [numbers[row] for row in finding.rows],
        }
        for finding in judged.findings
    ]


def _print(report: dict[str, Any], limit: int, *, content: bool) -> None:
    rows = [
        (
            found["number"],
            found["type"],
            found["column"],
            "decides" if found["decides"] is True else "alarm",
            # An expectation on the batch as a whole blames no row.
            "the batch" if found["rows_failed"] is None else found["rows_failed"],
        )
        for found in report["expectations"]
    ]
    output.table("expectations", ("number", "type", "column", "decides or alarm", "rows failed"), rows)
    failing = report["failing"][:limit]
    if failing:
        columns = ("line", "by", "field", "reason") + (("content",) if content else ())
        shown = [
            (r["line"], r["by"], r["field"], r["reason"], *([r["content"][:_CONTENT_CHARS]] if content else []))
            for r in failing
        ]
        output.table(f"failing rows, {len(failing)} of {len(report['failing'])} reasons", columns, shown)
    for alarm in report["alarms"]:
        output.say(f"alarm  {alarm}: an operator would be told; no row is rejected for it")
    output.say(f"rows {report['rows']}, would be rejected {report['rejected']}, alarms {len(report['alarms'])}")


@expectations.command()
@click.argument("stream")
@click.option("--json", "want_json", is_flag=True, help="JSON instead of a sentence.")
@click.pass_obj
def docs(given: str | None, stream: str, *, want_json: bool) -> None:
    """Build Great Expectations' Data Docs on STREAM's newest block now, as a static site in docs/STREAM/.

    The pages show values of people's records. They are for those who may read the workspace (mode 0700), load nothing
    from elsewhere, and are served to nobody. Ingest builds them by itself every `ingest.docs_seconds`.
    """
    from ingest.datadocs import DataDocs
    from ingest.expectations import Suite
    from tidegate.wiring import open_service

    service = open_service(given)
    service.stream(stream)
    block_id, records = _newest_block(service, stream)
    suite = Suite(service.workspace.expectations(stream))
    index = DataDocs(service.workspace.docs(stream), 0).build(suite, records, block_id=block_id)
    if want_json:
        output.as_json({"stream": stream, "block": block_id, "records": len(records), "index": str(index)})
    else:
        output.say(f"built Data Docs of block {block_id}, {len(records)} records: {index}")


def _newest_block(service: Service, stream: str) -> tuple[str, list[Record]]:
    """The records of the block sealed last that holds any, whatever their split."""
    repo = service.repository()
    with tempfile.TemporaryDirectory(prefix="docs-", dir=service.workspace.run) as scratch:
        revision = repo.pin(stream)
        manifests = repo.manifests(stream, revision=revision)
        filled = [m for m in manifests if m.counts.sealed or m.counts.set_aside]
        if not filled:
            raise UnknownName(f"stream={stream}: no block with records yet; run `tidegate ingest {stream}` first")
        newest = max(filled, key=lambda m: (m.sealed_at, m.seq))
        pinned = repo.checkout(revision, Path(scratch) / "data")
        try:
            splits = ("train", "holdout", "set_aside")
            return newest.block_id, [record for split in splits for record in pinned.records(newest, split=split)]
        finally:
            pinned.close()
