"""`tidegate dlq list|show|replay|expire`: what was rejected, why, and how to mend it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from tidegate import output
from tidegate.commands.data import field_map

_JSON = click.option("--json", "want_json", is_flag=True, help="JSON instead of a table.")
_REASON = click.option(
    "--reason", "code", metavar="CODE", help="Only those with this reason, such as undeclared_label."
)
_KEY_FORM = "topic/incarnation/partition/offset"


@click.group()
def dlq() -> None:
    """Rejected records: list them, look into one, mend and send again, delete old ones.

    \b
    tidegate dlq list STREAM                          newest letters, and how many there are by reason
    tidegate dlq show STREAM KEY --content            one of them, with its bytes
    tidegate dlq replay STREAM --reason CODE ...      mend and send again what the contract then accepts
    tidegate dlq expire STREAM --older-than 30d       delete from the topic what is older
    """  # noqa: D301 - click takes the character itself for a mark


def _time(time_ms: int) -> str:
    moment = datetime.fromtimestamp(time_ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _by_code(counts: dict[str, int]) -> str:
    return ", ".join(f"{code} {count}" for code, count in counts.items()) or "none"


@dlq.command("list")
@click.argument("stream")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1), help="The newest so many.")
@_REASON
@_JSON
@click.pass_obj
def list_letters(given: str | None, stream: str, *, limit: int, code: str | None, want_json: bool) -> None:
    """List STREAM's rejected records: where each came from, every reason, when, and whether it was sent again.

    A record with two reasons counts under both.
    """
    from ingest.deadletters import survey
    from tidegate.mending import replayed
    from tidegate.wiring import open_service

    service = open_service(given)
    found = survey(service.kafka(), service.stream(stream).topic, limit, code)
    again = replayed(service, stream)
    letters: list[dict[str, Any]] = [
        {
            "key": letter.key,
            "rejected_at": _time(letter.rejected_at_ms),
            "codes": list(letter.codes),
            "reasons": list(letter.reasons),
            "replayed": again.get(letter.key),
        }
        for letter in found.letters
    ]
    if want_json:
        facts = {"stream": stream, "total": found.total, "by_code": found.by_code, "letters": letters}
        output.as_json(facts)
        return
    cells = [(r["key"], "; ".join(r["reasons"]), r["rejected_at"], r["replayed"]) for r in letters]
    output.table(f"rejected records of {stream}", (_KEY_FORM, "reasons", "rejected", "replayed"), cells)
    output.say(f"{len(letters)} of {found.total} shown; by reason: {_by_code(found.by_code)}")


@dlq.command()
@click.argument("stream")
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@click.option("--content", is_flag=True, help="Show the bytes too: people's data, and that you asked is recorded.")
@click.option("--json", "want_json", is_flag=True, help="One JSON object a line, as `replay --edit` takes it.")
@click.pass_obj
def show(given: str | None, stream: str, keys: tuple[str, ...], *, content: bool, want_json: bool) -> None:
    """Show everything about the rejected records KEY... of STREAM.

    With --content who asked, and when, is a line in the workspace's access.log. Bytes that were too large for the
    dead-letter topic are read from the data repository.
    """
    from ingest.deadletters import find_dead_letters, topic_of
    from tidegate.access import record_access
    from tidegate.blocks import Rejects, opened
    from tidegate.errors import UnknownName
    from tidegate.mending import as_value, replayed
    from tidegate.wiring import open_service

    service = open_service(given)
    topic = service.stream(stream).topic
    found = find_dead_letters(service.kafka(), topic, keys)
    if missing := [key for key in keys if key not in found]:
        raise UnknownName(
            f"dead letter={missing[0]}: not on topic {topic_of(topic)}; a key is {_KEY_FORM}, "
            f"as `tidegate dlq list {stream}` shows it"
        )
    again = replayed(service, stream)
    if content:
        record_access(service.workspace, "dead letter content", stream=stream, keys=list(keys))
    with ExitStack() as stack:
        rejects: Rejects | None = None
        for letter in (found[key] for key in dict.fromkeys(keys)):
            facts = _facts(letter, again.get(letter.key))
            if content:
                value = letter.value
                if letter.reference is not None:
                    rejects = rejects or Rejects(service, stack.enter_context(opened(service, stream)))
                    value = rejects.value(letter.reference, letter.source)
                facts["value"] = None if value is None else as_value(value)
            _tell(facts, want_json=want_json)


def _facts(letter: Any, again: str | None) -> dict[str, Any]:
    source = letter.source
    return {
        "key": letter.key,
        "partition": None if source is None else source[0],
        "offset": None if source is None else source[1],
        "rejected_at": _time(letter.rejected_at_ms),
        "codes": list(letter.codes),
        "reasons": list(letter.reasons),
        "schema_version": letter.schema_version,
        "bytes": None if letter.value is None else len(letter.value),
        "reference": letter.reference,
        "replayed": again,
    }


def _tell(facts: dict[str, Any], *, want_json: bool) -> None:
    if want_json:
        output.say(json.dumps(facts, ensure_ascii=False))
        return
    shown = {**facts, "codes": ", ".join(facts["codes"]), "reasons": "; ".join(facts["reasons"])}
    if not isinstance(facts.get("value", ""), str):
        shown["value"] = json.dumps(facts["value"], ensure_ascii=False)
    output.facts({name.replace("_", " "): value for name, value in shown.items() if value is not None})


@dlq.command()
@click.argument("stream")
@click.option("--key", "keys", multiple=True, metavar="KEY", help="This letter; repeat.")
@_REASON
@click.option("--field", "fields", multiple=True, metavar="SOURCE=FIELD", help="Rename a field; repeat.")
@click.option("--drop", "drops", multiple=True, metavar="FIELD", help="Leave a field out; repeat.")
@click.option("--set", "sets", multiple=True, metavar="FIELD=VALUE", help="Set a field of the contract; repeat.")
@click.option("--edit", type=click.Path(path_type=Path), metavar="FILE", help="Mended records, a JSON object a line.")
@click.option("--dry-run", is_flag=True, help="Judge only; send nothing.")
@_JSON
@click.pass_obj
def replay(
    given: str | None,
    /,
    stream: str,
    *,
    keys: tuple[str, ...],
    code: str | None,
    edit: Path | None,
    dry_run: bool,
    want_json: bool,
    **mends: Sequence[str],
) -> None:
    """Mend rejected records of STREAM and send them to its topic again.

    Choose them by --key, by --reason or by the keys in an --edit file; --reason alone leaves out what was sent again
    before. Fields are renamed, then dropped, then set. The contract judges each mended record: what it refuses is not
    sent, and listed with its reasons. The letters stay. Doing it twice does no harm: a stream drops the duplicates of
    a user's event. The stream's suite of expectations judges once more when it arrives.

    An --edit file holds lines of {"key": ..., "value": ...}, as `tidegate dlq show --content --json` prints them.
    """
    from tidegate.access import record_access
    from tidegate.mending import Mend, Replay, read_edits
    from tidegate.wiring import open_service

    if not keys and code is None and edit is None:
        raise click.UsageError("choose records by --key KEY, --reason CODE or --edit FILE")
    mend = Mend(
        renames=field_map(mends["fields"]),
        drops=frozenset(mends["drops"]),
        sets=_sets(mends["sets"]),
        edits={} if edit is None else read_edits(edit),
    )
    service = open_service(given)
    work = Replay(service, stream, mend)
    if not dry_run:
        record_access(service.workspace, "dead letters replayed", stream=stream, keys=list(keys), reason=code)
    done = work.run(keys, code, dry=dry_run)
    if want_json:
        refused = [{"key": key, "reasons": reasons} for key, reasons in done.refused.items()]
        facts = {"stream": stream, "dry_run": dry_run, "sent": done.sent, "refused": refused}
        output.as_json({**facts, "replayed_before": done.before})
        return
    if done.refused:
        rows = [(key, "; ".join(reasons)) for key, reasons in done.refused.items()]
        output.table("not sent: the contract still refuses them", (_KEY_FORM, "reasons"), rows)
    verb = "would send" if dry_run else "sent"
    output.say(
        f"{verb} {len(done.sent)} mended records to topic {work.topic}; "
        f"{len(done.refused)} refused, {len(done.before)} sent again before and left out"
    )


def _sets(pairs: Sequence[str]) -> dict[str, str]:
    from ingest.record import Record

    sets = field_map(pairs, "--set", "FIELD=VALUE")
    for name in sets:
        if name not in Record.model_fields and not name.startswith("attributes."):
            known = ", ".join(Record.model_fields)
            raise click.UsageError(f"--set {name}: not in the contract; must be one of {known}.NAME")
    return sets


@dlq.command()
@click.argument("stream")
@click.option("--before", metavar="DATE", help="What was rejected before this day or time (UTC).")
@click.option("--older-than", metavar="AGE", help="What was rejected longer ago: 30d, 12h, 90m.")
@click.option("--yes", is_flag=True, help="Delete; without it they are only counted.")
@_JSON
@click.pass_obj
def expire(
    given: str | None, stream: str, *, before: str | None, older_than: str | None, yes: bool, want_json: bool
) -> None:
    """Delete STREAM's rejected records from the dead-letter topic up to a time; count them without --yes.

    Bytes that were too large for that topic lie in the data repository. Its history is what blocks, rounds and answers
    are traced to, so it is never rewritten, and they stay there.
    """
    from ingest.deadletters import expire as delete
    from ingest.deadletters import plan_expiry, topic_of
    from tidegate.access import record_access
    from tidegate.wiring import open_service

    cut = _cut(before, older_than)
    service = open_service(given)
    topic, settings = service.stream(stream).topic, service.kafka()
    plan = plan_expiry(settings, topic, int(cut.timestamp() * 1000))
    until = cut.isoformat(timespec="seconds").replace("+00:00", "Z")
    if yes and plan.letters:
        record_access(service.workspace, "dead letters deleted", stream=stream, before=until, letters=plan.letters)
        delete(settings, topic, plan)
    if want_json:
        facts = {"stream": stream, "before": until, "deleted": yes, "letters": plan.letters, "by_code": plan.by_code}
        output.as_json({**facts, "kept_in_data_repository": plan.elsewhere})
        return
    verb = "deleted" if yes else "would delete"
    output.say(f"{verb} {plan.letters} letters from {topic_of(topic)}, rejected before {until}")
    output.say(f"by reason: {_by_code(plan.by_code)}")
    if plan.elsewhere:
        output.say(f"{plan.elsewhere} of them have their bytes in the data repository, whose history stays")
    if not yes and plan.letters:
        output.say("give --yes to delete them")


def _cut(before: str | None, older_than: str | None) -> datetime:
    """The time given, in UTC.

    Raises:
        click.UsageError: not exactly one of the two, or it is no time.
    """
    if (before is None) == (older_than is None):
        raise click.UsageError("give one of --before DATE and --older-than AGE")
    if before is not None:
        try:
            moment = datetime.fromisoformat(before)
        except ValueError:
            raise click.UsageError(
                f"--before {before}: must be a day or time, 2026-01-31 or 2026-01-31T12:00Z"
            ) from None
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    found = re.fullmatch(r"(\d{1,6})([dhm])", older_than or "")
    if found is None:
        raise click.UsageError(f"--older-than {older_than}: must be a number of d, h or m, such as 30d")
    unit = {"d": "days", "h": "hours", "m": "minutes"}[found[2]]
    try:
        return datetime.now(UTC) - timedelta(**{unit: int(found[1])})
    except OverflowError:
        raise click.UsageError(f"--older-than {older_than}: before the calendar begins") from None
