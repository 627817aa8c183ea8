"""`tidegate pause|resume|kill|unkill`: what an operator switches by hand."""

from __future__ import annotations

import time

import click

from tidegate import output, switches
from tidegate.access import who as login

_WHO = click.option("--who", default=login, help="Your name, for the record.", show_default="login")
_WHY = click.option("--why", required=True, help="The reason, kept.")
# A server looks at each request; this long for one that is starting.
_SEEN_SECONDS = 5.0


@click.command()
@click.argument("stream")
@_WHY
@_WHO
@click.pass_obj
def pause(given: str | None, stream: str, *, why: str, who: str) -> None:
    """Stop STREAM's spending: no round begins, by schedule or by hand. One that runs goes on to its end.

    Durable over restarts; ingest and serving go on. `tidegate status` and the console show it.
    """
    from tidegate.wiring import open_service

    output.say(switches.pause(open_service(given), stream, who=who, why=why))


@click.command()
@click.argument("stream")
@_WHY
@_WHO
@click.pass_obj
def resume(given: str | None, stream: str, *, why: str, who: str) -> None:
    """Let rounds of STREAM begin again."""
    from tidegate.wiring import open_service

    output.say(switches.resume(open_service(given), stream, who=who, why=why))


@click.command()
@click.argument("stream")
@_WHY
@_WHO
@click.pass_obj
def kill(given: str | None, stream: str, *, why: str, who: str) -> None:
    """Let the bare base answer for STREAM, at once, also with MLflow down. Nothing is unloaded or decided.

    Durable over restarts, with an alarm while it is on. Answers that were begun finish on the version they began with.
    """
    from tidegate.wiring import open_service

    service = open_service(given)
    output.say(switches.kill(service, stream, who=who, why=why))
    _watch(given, stream, base=True)


@click.command()
@click.argument("stream")
@_WHY
@_WHO
@click.pass_obj
def unkill(given: str | None, stream: str, *, why: str, who: str) -> None:
    """End the kill switch of STREAM: what was approved last answers again, also with MLflow down."""
    from tidegate.wiring import open_service

    service = open_service(given)
    output.say(switches.unkill(service, stream, who=who, why=why))
    _watch(given, stream, base=False)


def _watch(given: str | None, stream: str, *, base: bool) -> None:
    """Say when the server does it."""
    from tidegate.status import serving_state
    from tidegate.wiring import open_service

    service, began = open_service(given), time.monotonic()
    answers = ""
    while time.monotonic() < began + _SEEN_SECONDS:
        state = serving_state(service)
        if state is None:
            output.say("no server answers; one that starts will heed it")
            return
        answers = str(state.get("streams", {}).get(stream, {}).get("version", ""))
        if (answers == f"{stream}@base") == base:
            break
        time.sleep(0.1)
    output.say(f"the server answers with {answers}")
