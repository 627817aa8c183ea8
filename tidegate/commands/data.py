"""`tidegate produce`, `tidegate blocks`, `tidegate dlq`: records on their way in."""

from __future__ import annotations

from pathlib import Path

import click

from tidegate import output


def _field_map(pairs: tuple[str, ...]) -> dict[str, str]:
    mapped = {}
    for pair in pairs:
        source, separator, target = pair.partition("=")
        if not separator or not source or not target:
            raise click.UsageError(f"--field {pair}: must be SOURCE=FIELD, for example --field text=prompt")
        mapped[source] = target
    return mapped


@click.command()
@click.argument("stream")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--field", "fields", multiple=True, metavar="SOURCE=FIELD", help="Rename a field of the source; repeat.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="At most this many records per second.")
@click.option("--json", "want_json", is_flag=True, help="JSON instead of a sentence; no progress bar.")
@click.pass_obj
def produce(
    given: str | None,
    stream: str,
    files: tuple[Path, ...],
    *,
    fields: tuple[str, ...],
    rate: float | None,
    want_json: bool,
) -> None:
    """Put the records of JSONL FILEs on STREAM's topic: keyed by user_id, acknowledged by all replicas.

    Lines are sent as they are: what is wrong with one is said by the stream's validation, in `tidegate dlq STREAM`.
    """
    from ingest.produce import produce as send
    from tidegate.progress import bar
    from tidegate.wiring import open_service

    service = open_service(given)
    topic = service.stream(stream).topic
    with bar(quiet=want_json) as tell:
        report = send(
            service.kafka(),
            topic,
            files,
            field_map=_field_map(fields),
            rate=rate,
            progress=lambda done, of: tell("produce", done, of),
        )
    if want_json:
        output.as_json({"stream": stream, "topic": topic, "records_sent": report.sent, "seconds": report.seconds})
    else:
        output.say(f"sent {report.sent} records to topic {topic} in {report.seconds:.1f} s")


@click.command()
@click.argument("stream")
@click.option("--json", "want_json", is_flag=True, help="JSON instead of a table.")
@click.pass_obj
def blocks(given: str | None, stream: str, *, want_json: bool) -> None:
    """List STREAM's sealed blocks: which offsets each covers, and how many records were accepted and rejected.

    Exact counts are for people who may read the workspace; they never leave it by MLflow, metrics or exports.
    """
    from tidegate.wiring import open_service

    service = open_service(given)
    service.stream(stream)
    manifests = service.repository().manifests(stream)
    if want_json:
        output.as_json([m.model_dump(mode="json") for m in manifests])
        return
    rows = [
        (
            m.block_id,
            " ".join(f"{o.partition}:{o.start}-{o.end - 1}" for o in m.offsets),
            m.counts.sealed,
            m.counts.rejected,
            m.counts.duplicate,
            m.counts.set_aside,
            f"{service.ledger.share_used(m.block_id):.1%}" if service.ledger.knows(m.block_id) else "0.0%",
        )
        for m in manifests
    ]
    columns = ("block", "partition:offsets", "accepted", "rejected", "duplicate", "set aside", "filter used")
    output.table(f"blocks of {stream}", columns, rows)


@click.command()
@click.argument("stream")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1), help="The newest so many.")
@click.option("--content", is_flag=True, help="Show the rejected bytes too: they may be people's data.")
@click.option("--json", "want_json", is_flag=True, help="JSON instead of a table.")
@click.pass_obj
def dlq(given: str | None, stream: str, *, limit: int, content: bool, want_json: bool) -> None:
    """Show STREAM's rejected records: where each came from and every reason it was rejected for."""
    from ingest.deadletters import read_dead_letters
    from tidegate.wiring import open_service

    service = open_service(given)
    letters = read_dead_letters(service.kafka(), service.stream(stream).topic, limit)
    rows = []
    for letter in letters:
        row = {"key": letter.key, "reasons": list(letter.reasons)}
        if content:
            row["value"] = (letter.value or b"").decode("utf-8", "backslashreplace")
        rows.append(row)
    if want_json:
        output.as_json(rows)
        return
    columns = ("topic/incarnation/partition/offset", "reasons") + (("value",) if content else ())
    cells = [(r["key"], "; ".join(r["reasons"]), *([r["value"][:200]] if content else [])) for r in rows]
    output.table(f"rejected records of {stream}", columns, cells)
