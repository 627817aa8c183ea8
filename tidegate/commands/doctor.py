"""`tidegate doctor`: what is wrong, and what to do."""

from __future__ import annotations

import sys

import click

from tidegate import output


@click.command()
@click.option("--json", "want_json", is_flag=True, help="JSON instead of lines.")
@click.pass_obj
def doctor(given: str | None, *, want_json: bool) -> None:
    """Look at the workspace and its surroundings, and say what is wrong and what to do. Changes nothing.

    Libraries, keys' modes, disk, clocks, ports, left-over locks; broker with lag, MLflow with its guard, server, DVC
    remote; chains of ledger and decisions, bases, switches, alarms. Exit 1 while something is bad; a note is not.
    """
    from tidegate import doctor as looking
    from tidegate.wiring import open_service

    found = looking.examine(open_service(given))
    if want_json:
        output.as_json(looking.report(found))
    else:
        output.say(looking.as_text(found))
    sys.exit(1 if any(finding.grade == "bad" for finding in found) else 0)
