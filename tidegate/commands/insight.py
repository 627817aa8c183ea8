"""`tidegate status|lineage|ask`: what runs, where it came from, what it says."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from typing import Any

import click

from tidegate import output
from tidegate.errors import TidegateError

_JSON = click.option("--json", "want_json", is_flag=True, help="JSON instead of a table.")


@click.command()
@_JSON
@click.pass_obj
def status(given: str | None, *, want_json: bool) -> None:
    """Tell of every stream: live version, waiting candidates, blocks, budget, and what is wrong. Exit 1 on an alarm."""
    from tidegate.status import look
    from tidegate.wiring import open_service

    report = look(open_service(given))
    if want_json:
        output.as_json(report)
    else:
        for part, state in report["service"].items():
            output.say(f"{part:<8} {state}")
        for row in report["streams"]:
            output.say(f"\n{row['stream']}")
            shown = {**{k: v for k, v in row.items() if k not in {"stream", "rounds_now"}}, **row["rounds_now"]}
            output.facts({f"  {k.replace('_', ' ')}": v for k, v in shown.items()})
        for alarm in report["alarms"]:
            output.say(f"ALARM    {alarm}")
    sys.exit(1 if report["alarms"] else 0)


@click.command()
@click.argument("what", metavar="VERSION|ANSWER_ID")
@click.option("--stream", help="The stream of a VERSION; not needed when there is only one.")
@_JSON
@click.pass_obj
def lineage(given: str | None, what: str, *, stream: str | None, want_json: bool) -> None:
    """Trace a VERSION or an ANSWER_ID: version, round, data revision, blocks, the topic's offsets."""
    from tidegate.lineage import trace
    from tidegate.wiring import open_service

    found = trace(open_service(given), what, stream)
    if want_json:
        output.as_json(found)
        return
    output.facts({k.replace("_", " "): v for k, v in found.items() if k != "ancestry"})
    for step in found["ancestry"]:
        state = step["state"] + (f", pruned {step['pruned']}" if step["pruned"] else "")
        output.say(f"\nversion {step['version']} ({step['stage']}, {state}), round {step['round_id']}")
        mark = ", WITHOUT PRIVACY" if step["noise_source"] == "none" else ""
        output.say(f"  data revision {step['data_revision']}, plan {step['plan_hash'][:16]}{mark}")
        rows = [(b["id"], b["use"], f"{b['q']:.4g}", b["offsets"]) for b in step["blocks"]]
        output.table("", ("block", "use", "sampling rate", "topic/partition: offsets"), rows)


@click.command()
@click.argument("stream")
@click.argument("prompt", required=False)
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(min=1))
@_JSON
@click.pass_obj
def ask(given: str | None, stream: str, prompt: str | None, *, max_tokens: int, want_json: bool) -> None:
    """Ask STREAM's live version a question; without PROMPT it is read from standard input."""
    from tidegate.wiring import open_service

    service = open_service(given)
    service.stream(stream)
    text = prompt if prompt is not None else sys.stdin.read().strip()
    body = {
        "model": stream,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    reply = _post(f"{service.api_uri}/v1/chat/completions", body, service.api_headers)
    if want_json:
        output.as_json(reply)
        return
    output.say(reply["choices"][0]["message"]["content"])
    output.say(f"({reply['tidegate']['version']}; lineage: tidegate lineage {reply['id']})")


def _post(url: str, body: dict[str, object], headers: dict[str, str]) -> dict[str, Any]:
    request = urllib.request.Request(  # noqa: S310 - the service's own http address
        url, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:  # noqa: S310
            return dict(json.load(reply))
    except urllib.error.HTTPError as error:
        detail = json.loads(error.read() or b"{}").get("error", {}).get("message", error.reason)
        raise TidegateError(f"{url}: {error.code}: {detail}") from None
    except (urllib.error.URLError, OSError) as error:
        raise TidegateError(
            f"{url}: no server answers ({error}); start it by `tidegate serve` or `tidegate up`"
        ) from None
