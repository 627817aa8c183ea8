"""The console's routes on the API's server: the page, its files, and its events.

GET /   GET /tidegate/console/events   GET /tidegate/console.js   GET /tidegate/console.css   GET /tidegate/console.svg
GET /tidegate/runbook/KIND   GET and POST /tidegate/login   POST /tidegate/logout

Where keys are asked for, a person logs in with one that has the scope `read`; the browser keeps it in a cookie that no
script can read and that no other site's page makes it send.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

import structlog
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from serving.gate import KEY_COOKIE, LOGIN, caller_of, guarded
from tidegate import console_page, runbook
from tidegate.console import LOOK_SECONDS, Console

if TYPE_CHECKING:
    from serving.swap import HotSwap
    from tidegate.wiring import Service

log = structlog.get_logger()

# Proxies close a connection that says nothing; a comment keeps it.
KEEP_ALIVE_SECONDS = 15.0
# A stream of events ends after so long and the page asks for the next: with a key that was revoked it gets none.
STREAM_SECONDS = 300.0
# Each holds a connection; more than an office of people with a tab open.
VIEWERS_MAX = 100
# A form of one field; keys have 56 characters.
LOGIN_BYTES_MAX = 4096
KEY_TEXT = re.compile(r"[A-Za-z0-9_-]{1,256}\Z")
SCRIPT = Path(__file__).with_name("console.js")
HEADERS = {
    "content-security-policy": console_page.POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with none at all, a browser names no origin for its own forms either
    "cache-control": "no-store",
}


class Viewer:
    """One open page: woken on its own event loop when parts of it may have changed."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()

    def wake(self) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._news.set)

    async def news(self, seconds: float) -> bool:
        """Wait for a wake; False: there was none for so long."""
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
        except TimeoutError:
            return False
        self._news.clear()
        return True


class Desk:
    """Renders what the console gathers, once for all viewers, on a thread that lives while somebody looks."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._viewers: set[Viewer] = set()
        self._lock = threading.Lock()
        self._watching = False
        self._ended = threading.Event()
        self._parts: Mapping[str, Markup] = {}

    def parts(self) -> Mapping[str, Markup]:
        """The newest parts; may take a second the first time, so never on the event loop. Wakes viewers of new ones."""
        made = console_page.sections(self._console.snapshot())
        with self._lock:
            if made != self._parts:
                self._parts = made
                for viewer in self._viewers:
                    viewer.wake()
        return made

    @property
    def full(self) -> bool:
        """Whether as many look as may."""
        return len(self._viewers) >= VIEWERS_MAX

    def end(self) -> None:
        """Let every stream of events end; idempotent."""
        self._ended.set()
        with self._lock:
            for viewer in self._viewers:
                viewer.wake()

    async def events(self) -> AsyncIterator[str]:
        """All parts first, for whoever comes back after a restart; then each part that changes."""
        viewer = Viewer()
        self._enter(viewer)
        seen: dict[str, Markup] = {}
        end = time.monotonic() + STREAM_SECONDS
        try:
            yield "retry: 500\n\n"
            while not self._ended.is_set() and time.monotonic() < end:
                changed = {name: str(part) for name, part in self._parts.items() if seen.get(name) != part}
                if changed:
                    seen |= self._parts
                    yield f"event: parts\ndata: {json.dumps(changed)}\n\n"
                if not await viewer.news(min(KEEP_ALIVE_SECONDS, max(0.0, end - time.monotonic()))):
                    yield ": still here\n\n"
        finally:
            with self._lock:
                self._viewers.discard(viewer)

    def _enter(self, viewer: Viewer) -> None:
        with self._lock:
            self._viewers.add(viewer)
            if not self._watching:
                self._watching = True
                threading.Thread(target=self._watch, name="console", daemon=True).start()

    def _watch(self) -> None:
        while True:
            try:
                self.parts()
            except Exception:  # a defect here must not leave open pages without news for good
                log.exception("console not rendered")
            stopping = self._ended.wait(LOOK_SECONDS)
            with self._lock:
                if stopping or not self._viewers:
                    self._watching = False
                    return


def routes_of(desk: Desk, streams: Sequence[str]) -> list[BaseRoute]:
    """The console's routes."""

    async def page(request: Request) -> Response:
        parts = await asyncio.to_thread(desk.parts)
        caller = caller_of(request)
        text = console_page.document(parts, streams, compare=caller.may("candidate"), out=not caller.open)
        return _html(text)

    async def events(_request: Request) -> Response:
        if desk.full:
            return Response("too many pages are open", 503, headers={**HEADERS, "retry-after": "30"})
        return StreamingResponse(desk.events(), media_type="text/event-stream", headers=HEADERS)

    async def section(request: Request) -> Response:
        kind = request.path_params["kind"]
        text = (await asyncio.to_thread(runbook.sections)).get(kind)
        if text is None:
            return Response("the runbook has no such section; see docs/runbook.md", 404, headers=HEADERS)
        return _html(console_page.runbook_page(kind, text))

    async def script(_request: Request) -> Response:
        return _file(await asyncio.to_thread(SCRIPT.read_text, "utf-8"), "text/javascript")

    return [
        Route("/", guarded(page, "read")),
        Route("/tidegate/console/events", guarded(events, "read")),
        Route("/tidegate/runbook/{kind}", guarded(section, "read")),
        Route("/tidegate/console.js", guarded(script, "read")),
        Route("/tidegate/console.css", _style),
        Route("/tidegate/console.svg", _icon),
        Route(LOGIN, _login, methods=["GET", "POST"]),
        Route("/tidegate/logout", guarded(_logout, "read"), methods=["POST"]),
    ]


def _html(text: str) -> Response:
    return Response(text, media_type="text/html", headers=HEADERS)


def _file(content: str, kind: str) -> Response:
    return Response(content, media_type=kind, headers={**HEADERS, "cache-control": "no-cache"})


async def _style(_request: Request) -> Response:
    return _file(str(console_page.CSS), "text/css")


async def _icon(_request: Request) -> Response:
    return _file(console_page.ICON, "image/svg+xml")


async def _login(request: Request) -> Response:
    """A form for a key; what is sent with it is only kept: whether it is one shows where it leads."""
    if request.method == "GET":
        refused = "That key is not known, or was revoked." if "refused" in request.query_params else ""
        return _html(console_page.login_page(refused))
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LOGIN_BYTES_MAX:
            return Response("that is no key", 413, headers=HEADERS)
    key = parse_qs(body.decode("ascii", "replace")).get("key", [""])[0].strip()
    if not KEY_TEXT.match(key):
        return _to(f"{LOGIN}?refused")
    answer = _to("/")
    secure = request.url.scheme == "https" or request.headers.get("x-forwarded-proto") == "https"
    answer.set_cookie(KEY_COOKIE, key, httponly=True, samesite="strict", secure=secure, path="/")
    return answer


async def _logout(_request: Request) -> Response:
    answer = _to(LOGIN)
    answer.delete_cookie(KEY_COOKIE, httponly=True, samesite="strict", path="/")
    return answer


def _to(where: str) -> Response:
    return RedirectResponse(where, 303, headers=HEADERS)


def console_of(service: Service, swaps: Sequence[HotSwap]) -> Desk:
    """The console of a workspace's server."""
    return Desk(Console(service, swaps))
