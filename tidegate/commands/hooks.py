"""`tidegate hooks`: webhooks, what was sent and what receivers said."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

import click

from tidegate import output

_JSON = click.option("--json", "want_json", is_flag=True, help="JSON instead of a table.")


@click.group()
def hooks() -> None:
    """Signed webhooks: see what was sent, send a test. Receivers stand in params.yaml, streams.NAME.hooks.

    \b
    tidegate hooks test STREAM       send a test event now, and say what each receiver answers
    tidegate hooks log               deliveries with their tries, the newest last
    """  # noqa: D301 - click takes the character itself for a mark


@hooks.command()
@click.argument("stream")
@_JSON
@click.pass_obj
def test(given: str | None, stream: str, *, want_json: bool) -> None:
    """Send a signed test event to every receiver of STREAM, and say what each answered. Exit 1 if one did not take it.

    Works while the service runs and while it does not. The secret is TIDEGATE_HOOK_SECRET or keys/hook_secret, which is
    made when there is none; it is never printed.
    """
    from tidegate import hooks as telling
    from tidegate.wiring import open_service

    told = telling.test(open_service(given), stream)
    if want_json:
        output.as_json(told)
    else:
        for row in told:
            answered = row["status"] if row["status"] is not None else "no answer"
            output.say(f"{'taken' if row['taken'] else 'NOT TAKEN'}  {row['url']}  {answered}  {row['said']}".rstrip())
    sys.exit(0 if all(row["taken"] for row in told) else 1)


@hooks.command(name="log")
@click.argument("stream", required=False)
@click.option("--last", default=50, show_default=True, type=click.IntRange(min=1), help="So many deliveries.")
@_JSON
@click.pass_obj
def show_log(given: str | None, stream: str | None, *, last: int, want_json: bool) -> None:
    """List deliveries of STREAM, or of all: event, receiver, state, tries, the newest answer. --json has every try."""
    from tidegate import hooks as telling
    from tidegate import webhook
    from tidegate.wiring import open_service

    service = open_service(given)
    if stream is not None:
        service.stream(stream)
    rows = telling.outbox_of(service).log(stream, last)
    if want_json:
        output.as_json(rows)
        return
    cells = []
    for row in rows:
        answer = row["answers"][-1] if row["answers"] else {"status": "", "said": ""}
        state = row["state"]
        if row["next_at"] is not None and row["tries"]:
            state += f", again at {datetime.fromtimestamp(row['next_at'], UTC):%H:%M:%S}"
        newest = f"{answer['status'] or ''} {answer['said']}".strip()
        cells.append((row["at"], row["stream"], row["type"], webhook.shown(row["url"]), state, row["tries"], newest))
    output.table("webhooks", ("at", "stream", "event", "receiver", "state", "tries", "newest answer"), cells)
