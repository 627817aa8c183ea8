"""`tidegate produce`: records on their way in."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from tidegate import output
from tidegate.errors import TidegateError

EXIT_INTERRUPTED = 130


def field_map(pairs: Sequence[str], option: str = "--field", form: str = "SOURCE=FIELD") -> dict[str, str]:
    """`NAME=VALUE` options as a mapping.

    Raises:
        click.UsageError: one has another form.
    """
    mapped = {}
    for pair in pairs:
        source, separator, target = pair.partition("=")
        if not separator or not source or not target:
            raise click.UsageError(f"{option} {pair}: must be {form}, for example {option} text=prompt")
        mapped[source] = target
    return mapped


@contextmanager
def _heeding_ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second ends at once, as ever."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def heed(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        click.echo("stopping when what was sent is acknowledged; Ctrl-C again stops at once", err=True)
        stop.set()

    signal.signal(signal.SIGINT, heed)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@click.command()
@click.argument("stream")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--field", "fields", multiple=True, metavar="SOURCE=FIELD", help="Rename a field of the source; repeat.")
@click.option("--format", "form", metavar="jsonl|csv|parquet", help="How to read the FILEs; default: by their names.")
@click.option("--delimiter", metavar="CHARACTER", help="Between cells of CSV; default: a comma, a tab in .tsv.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="At most this many records per second.")
@click.option("--resume", is_flag=True, help="Go on behind the last record that was acknowledged.")
@click.option("--skip-large", is_flag=True, help="Leave out, count and name records the topic is too small for.")
@click.option("--json", "want_json", is_flag=True, help="JSON instead of a sentence; no progress bar.")
@click.pass_obj
def produce(
    given: str | None,
    /,
    stream: str,
    files: tuple[Path, ...],
    *,
    fields: tuple[str, ...],
    want_json: bool,
    **options: Any,
) -> None:
    """Put the records of JSONL, CSV or Parquet FILEs on STREAM's topic: keyed by user_id, acknowledged by all replicas.

    JSONL and CSV may be gzip's. CSV has a header row; an empty cell of CSV or a null of Parquet is an absent field, and
    a column attributes.NAME is the attribute NAME. Records are sent as they are: what is wrong with one is said by the
    stream's validation, in `tidegate dlq list STREAM`. Sending a file twice does no harm, duplicates are dropped.
    """
    from ingest.errors import MessageTooLarge, SendingStopped
    from ingest.produce import produce as send
    from tidegate.progress import bar
    from tidegate.wiring import open_service

    service = open_service(given)
    topic = service.stream(stream).topic
    mapped = field_map(fields)
    again = _again(given, stream, files, fields, options)
    try:
        with bar(quiet=want_json) as tell, _heeding_ctrl_c() as stop:
            report = send(
                service.kafka(),
                topic,
                files,
                mapped,
                options["rate"],
                lambda done, of: tell("produce", done, of),
                form=options["form"],
                delimiter=options["delimiter"],
                skip_large=options["skip_large"],
                journal=service.workspace.run / "produce",
                resume=options["resume"],
                stop=stop,
            )
    except SendingStopped as error:
        failed = TidegateError(f"{error}; go on with: {again}")
        failed.exit_code = EXIT_INTERRUPTED if error.interrupted else failed.exit_code
        raise failed from None
    except MessageTooLarge as error:
        raise TidegateError(f"{error}; to leave it out: {again} --skip-large") from None
    facts = {"stream": stream, "topic": topic, "records_sent": report.sent, "seconds": report.seconds}
    facts |= {"records_sent_before": report.resumed, "too_large": list(report.too_large)}
    if want_json:
        output.as_json(facts)
        return
    if report.resumed and not report.sent and not report.too_large:
        output.say(f"nothing to send: all {report.resumed} records were acknowledged before")
        return
    before = f", behind {report.resumed} sent before" if report.resumed else ""
    output.say(f"sent {report.sent} records to topic {topic} in {report.seconds:.1f} s{before}")
    for place in report.too_large:
        output.say(f"left out, too large: {place}")


def _again(
    given: str | None, stream: str, files: Sequence[Path], fields: Sequence[str], options: dict[str, Any]
) -> str:
    """The command that goes on."""
    words = ["tidegate", *(["-w", given] if given else []), "produce", stream, *map(str, files)]
    words += [word for pair in fields for word in ("--field", pair)]
    for name, value in (("--format", options["form"]), ("--delimiter", options["delimiter"])):
        words += [name, value] if value is not None else []
    words += ["--rate", f"{options['rate']:g}"] if options["rate"] is not None else []
    words += ["--skip-large"] if options["skip_large"] else []
    return shlex.join([*words, "--resume"])
