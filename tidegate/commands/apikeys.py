"""`tidegate apikeys`: who may call the API. Not the keys that sign: those are `tidegate keys`."""

from __future__ import annotations

import click

from tidegate import output


@click.group()
def apikeys() -> None:
    """Keys of the API: each with scopes, streams and limits. Kept hashed; a key is shown once, when it is made.

    \b
    tidegate apikeys add mobile-app --scope answer --stream support-desk --requests 600
    tidegate apikeys revoke mobile-app

    The server needs no restart: it looks before every request. Keys that sign are another thing: `tidegate keys`.
    """  # noqa: D301 - click takes the character itself for a mark


@apikeys.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    default=("answer",),
    show_default=True,
    type=click.Choice(("answer", "read", "candidate")),
    help="answer: ask. read: models, state, metrics, console. candidate: ask candidates.",
)
@click.option("--stream", "streams", multiple=True, help="Only these streams may be asked; default: all.")
@click.option("--requests", default=0, type=click.IntRange(min=0), help="Requests a minute; 0: no limit.")
@click.option("--tokens", default=0, type=click.IntRange(min=0), help="Tokens a minute, prompts too; 0: no limit.")
@click.option("--json", "want_json", is_flag=True, help="JSON instead of text.")
@click.pass_obj
def add(
    given: str | None,
    name: str,
    *,
    scopes: tuple[str, ...],
    streams: tuple[str, ...],
    requests: int,
    tokens: int,
    want_json: bool,
) -> None:
    """Make a key for NAME, and print it, this once."""
    from serving.access import add_key
    from tidegate.wiring import open_service

    service = open_service(given)
    for stream in streams:
        service.stream(stream)
    text, made = add_key(
        service.api_keys,
        name,
        scopes=scopes,  # type: ignore[arg-type]  # click has checked them
        streams=streams,
        requests_per_minute=requests,
        tokens_per_minute=tokens,
    )
    if want_json:
        output.as_json({"key": text, "id": made.key_id, "name": name, "scopes": made.scopes, "streams": made.streams})
        return
    output.say(text)
    click.echo(f"key {made.key_id} for {name}; it is shown this once: keep it where secrets are kept", err=True)
    if not service.api_keys_required:
        click.echo("the API asks nobody for a key now: it listens on this machine alone, require_keys is off", err=True)


@apikeys.command("list")
@click.option("--all", "want_all", is_flag=True, help="Revoked keys too.")
@click.option("--json", "want_json", is_flag=True, help="JSON instead of a table.")
@click.pass_obj
def list_(given: str | None, *, want_all: bool, want_json: bool) -> None:
    """List the keys that count: id, name, scopes, streams, limits a minute. None can be shown again."""
    from serving.access import read_keys
    from tidegate.wiring import open_service

    service = open_service(given)
    rows = [
        {
            "id": key.key_id,
            "name": key.name,
            "scopes": list(key.scopes),
            "streams": list(key.streams),
            "requests_per_minute": key.requests_per_minute,
            "tokens_per_minute": key.tokens_per_minute,
            "made_at": key.made_at,
            "revoked_at": key.revoked_at,
        }
        for key in read_keys(service.api_keys)
        if want_all or not key.revoked_at
    ]
    if want_json:
        output.as_json(rows)
        return
    cells = [
        [", ".join(cell) if isinstance(cell, list) else cell or "" for cell in {**row, "streams": reach}.values()]
        for row, reach in ((row, row["streams"] or "all") for row in rows)
    ]
    columns = ("id", "name", "scopes", "streams", "requests/min", "tokens/min", "made", "revoked")
    output.table("API keys", columns, cells)


@apikeys.command()
@click.argument("which", metavar="ID|NAME")
@click.pass_obj
def revoke(given: str | None, which: str) -> None:
    """Revoke a key by its id or name. The next request with it is refused; answers on their way finish."""
    from serving.access import revoke_key
    from tidegate.wiring import open_service

    gone = revoke_key(open_service(given).api_keys, which)
    output.say(f"key {gone.key_id} of {gone.name} is revoked since {gone.revoked_at}")
