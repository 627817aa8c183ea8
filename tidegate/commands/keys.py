"""`tidegate keys`: the keys that sign receipts, verdicts and approvals."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from tidegate import output

_PURPOSE = click.argument("purpose", type=click.Choice(("receipts", "verdicts", "approvals")))


@click.group()
def keys() -> None:
    """List, export and change the keys that sign receipts, verdicts and approvals.

    A retired key's public half stays trusted for what it signed before; its private half is overwritten and removed.
    """


@keys.command("list")
@click.option("--json", "want_json", is_flag=True, help="JSON instead of a table.")
@click.pass_obj
def list_(given: str | None, *, want_json: bool) -> None:
    """List every public key: purpose, fingerprint, and for what time it counts."""
    from privacy.export import key_entry
    from privacy.rotation import PURPOSES, known_keys
    from tidegate.wiring import open_service

    folder = open_service(given).keys_dir
    rows: list[dict[str, Any]] = [
        {**key_entry(key), "private_key_here": not key.valid_until and (folder / f"{purpose}.pem").exists()}
        for purpose in PURPOSES
        for key in known_keys(folder, purpose)
    ]
    if want_json:
        output.as_json(rows)
        return
    names = ("purpose", "fingerprint", "valid_from", "valid_until")
    columns = ("purpose", "fingerprint; the first 16 digits are the key id", "from", "until", "private")
    cells = [[*(row[name] for name in names), "here" if row["private_key_here"] else ""] for row in rows]
    output.table(f"keys in {folder}", columns, cells)


@keys.command()
@_PURPOSE
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the PEM to a file instead.")
@click.pass_obj
def export(given: str | None, purpose: str, *, out: Path | None) -> None:
    """Print the public keys of PURPOSE as PEM, oldest first, each under its fingerprint.

    An auditor needs the oldest, which vouches for the later ones: of a file with several, the first is read.
    """
    from privacy.rotation import known_keys
    from privacy.signing import write_whole
    from tidegate.errors import TidegateError
    from tidegate.wiring import open_service

    found = known_keys(open_service(given).keys_dir, purpose)
    if not found:
        raise TidegateError(f"purpose={purpose}: no key yet; it is made by `tidegate init`")
    text = "".join(
        f"# {purpose} {key.public.fingerprint}, {f'until {key.valid_until}' if key.valid_until else 'in use'}\n"
        f"{key.public.pem}"
        for key in found
    )
    if out is None:
        output.say(text.rstrip("\n"))
        return
    try:
        write_whole(out.absolute(), text.encode(), mode=0o644)
    except OSError as error:
        raise TidegateError(f"{out}: cannot be written: {error.strerror}") from None
    output.say(f"{out}: {found[0].public.fingerprint}" + (f" and {len(found) - 1} later" if found[1:] else ""))


@keys.command()
@_PURPOSE
@click.pass_obj
def rotate(given: str | None, purpose: str) -> None:
    """Give PURPOSE a new key, introduced by a statement that the old one signs; the old private key is removed.

    No round may run meanwhile, and approvals wait a moment. Nothing needs a restart.
    """
    from privacy.rotation import rotate as change
    from tidegate.cycle import only_round
    from tidegate.wiring import open_service

    service = open_service(given)
    approvals = service.approvals()
    with ExitStack() as held:
        for stream in service.settings.streams:
            held.enter_context(only_round(service, stream))
        held.enter_context(approvals.deciding())
        made = change(service.keys_dir, purpose, ledger_head=service.ledger.head(), approvals_head=approvals.head())
    output.say(
        f"{purpose}: {made.old_key_id} is retired since {made.at}, its private half removed; now "
        f"{made.new_public.fingerprint}"
    )
