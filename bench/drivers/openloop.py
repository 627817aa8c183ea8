"""Asks a server in a process of its own: at the pace of a plan whatever the server does, or as fast as it answers.

Latency counts from the moment a request was due, not from when it was sent: a server that stalls is not asked less
(Tene: 'coordinated omission'). Clocks are CLOCK_MONOTONIC, which all processes of a machine share.

    python bench/drivers/openloop.py PLAN.json OUT.jsonl

PLAN.json: {"url": ..., "bodies": [...], "due_s": [[seconds of the clock, number of a body], ...]}, or instead of
"due_s" {"clients": N, "until_s": seconds of the clock} for N clients that ask without a pause.
OUT.jsonl: a line an answer: {"due_s", "done_s", "body", "status", "version", "said"}; "version" is empty when the
header and the body do not name the same one.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx

TIMEOUT_S = 120


async def ask(client: httpx.AsyncClient, plan: dict[str, Any], due_s: float, number: int) -> dict[str, Any]:
    """One request, from when it is due."""
    await asyncio.sleep(due_s - time.monotonic())
    row: dict[str, Any] = {"due_s": due_s, "body": number, "status": 0, "version": "", "said": ""}
    try:
        reply = await client.post(f"{plan['url']}/v1/chat/completions", json=plan["bodies"][number])
        row["status"] = reply.status_code
        if reply.status_code == httpx.codes.OK:
            answer = reply.json()
            row["said"] = answer["choices"][0]["message"]["content"]
            if answer["tidegate"]["version"] == reply.headers["x-tidegate-version"]:
                row["version"] = answer["tidegate"]["version"]
    except httpx.HTTPError as error:
        row["error"] = repr(error)
    return {**row, "done_s": time.monotonic()}


async def without_pause(client: httpx.AsyncClient, plan: dict[str, Any], first: int) -> list[dict[str, Any]]:
    """One client that asks until the end."""
    rows = []
    number = first
    while time.monotonic() < plan["until_s"]:
        rows.append(await ask(client, plan, time.monotonic(), number % len(plan["bodies"])))
        number += 1
    return rows


async def drive(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """All answers."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:
        if "due_s" in plan:
            return list(await asyncio.gather(*(ask(client, plan, *due) for due in plan["due_s"])))
        clients = [without_pause(client, plan, number) for number in range(plan["clients"])]
        return [row for rows in await asyncio.gather(*clients) for row in rows]


def main() -> None:
    """Read the plan, ask, write the answers."""
    rows = asyncio.run(drive(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    Path(sys.argv[2]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
