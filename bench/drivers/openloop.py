"""Asks a server in a process of its own: at the pace of a plan whatever the server does, or as fast as it answers.

Latency counts from the moment a request was due, not from when it was sent: a server that stalls is not asked less
(Tene: 'coordinated omission'). Clocks are CLOCK_MONOTONIC, which all processes of a machine share.

    python bench/drivers/openloop.py PLAN.json OUT.jsonl

PLAN.json: {"url": ..., "bodies": [...], "due_s": [[seconds of the clock, number of a body], ...]}, or instead of
"due_s" {"clients": N, "until_s": seconds of the clock} for N clients that ask without a pause.
OUT.jsonl: a line an answer: {"due_s", "first_s", "done_s", "body", "status", "version", "said"}; "first_s" is when its
first text came, that of the whole where a body asks for no stream; "version" is empty when the header and every part
of the body do not name the same one.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 120
# Servers hang up on idle connections after some seconds; older ones are not used again.
IDLE_S = 2.0


class Connections:
    """Kept-alive connections to one server; a client library costs the machine more than a small model's answer.

    Args:
        url: http://HOST:PORT.
        bodies: what may be asked.
    """

    def __init__(self, url: str, bodies: list[Any]) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), int(parts.port or 80)
        self._requests = []
        for body in bodies:
            text = json.dumps(body).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
            self._requests.append(f"{head}content-length: {len(text)}\r\n\r\n".encode() + text)
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, number: int) -> tuple[int, str, list[tuple[float, Any]]]:
        """Status, version by its header, and when each part of the body came, of the answer to one of the bodies.

        Raises:
            OSError, EOFError, ValueError: the connection broke, or what came is no answer.
        """
        while self._idle and time.monotonic() - self._idle[0][0] > IDLE_S:
            self._idle.pop(0)[2].close()
        if self._idle:
            _, reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(self._requests[number])
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            if "content-length" in headers:
                body = await reader.readexactly(int(headers["content-length"]))
                parts = [(time.monotonic(), json.loads(body))]
            else:
                parts = [part async for part in events(reader)]
        except BaseException:
            writer.close()
            raise
        self._idle.append((time.monotonic(), reader, writer))
        return int(head[0].split()[1]), headers.get("x-tidegate-version", ""), parts


async def events(reader: asyncio.StreamReader) -> AsyncIterator[tuple[float, Any]]:
    """Server-sent events out of a chunked body (RFC 9112, 7.1), each with the moment it came."""
    ended = False
    text = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        text += (await reader.readexactly(size + 2))[:-2]
        came_s = time.monotonic()
        while b"\n\n" in text:
            event, text = text.split(b"\n\n", 1)
            data = event.removeprefix(b"data: ")
            ended = data == b"[DONE]"
            if not ended:
                yield came_s, json.loads(data)
    await reader.readexactly(2)
    if not ended:
        raise EOFError("stream without its end")


async def ask(connections: Connections, due_s: float, number: int) -> dict[str, Any]:
    """One request, from when it is due."""
    await asyncio.sleep(due_s - time.monotonic())
    row: dict[str, Any] = {"due_s": due_s, "body": number, "status": 0, "version": "", "said": ""}
    try:
        row["status"], version, parts = await asyncio.wait_for(connections.post(number), TIMEOUT_S)
        row["done_s"] = time.monotonic()
        if row["status"] == 200:
            texts = [(came_s, text_of(choice)) for came_s, part in parts for choice in part["choices"]]
            row["said"] = "".join(text for _, text in texts)
            row["first_s"] = next((came_s for came_s, text in texts if text), row["done_s"])
            if all(part["tidegate"]["version"] == version for _, part in parts):
                row["version"] = version
    except (OSError, EOFError, TimeoutError, LookupError, ValueError) as error:
        row |= {"status": 0, "error": repr(error)}
    return {"done_s": time.monotonic(), **row}


def text_of(choice: dict[str, Any]) -> str:
    """What one choice says, in a whole answer or in a part of a streamed one."""
    said = choice.get("message") or choice["delta"]
    return said.get("content") or ""


async def without_pause(connections: Connections, first: int, count: int, until_s: float) -> list[dict[str, Any]]:
    """One client that asks until the end."""
    rows = []
    number = first
    while time.monotonic() < until_s:
        rows.append(await ask(connections, time.monotonic(), number % count))
        number += 1
    return rows


async def drive(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """All answers."""
    connections = Connections(plan["url"], plan["bodies"])
    if "due_s" in plan:
        return list(await asyncio.gather(*(ask(connections, *due) for due in plan["due_s"])))
    count, until_s = len(plan["bodies"]), plan["until_s"]
    clients = [without_pause(connections, number, count, until_s) for number in range(plan["clients"])]
    return [row for rows in await asyncio.gather(*clients) for row in rows]


def main() -> None:
    """Read the plan, ask, write the answers."""
    rows = asyncio.run(drive(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    Path(sys.argv[2]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
