"""What every request passes before and behind the routes: its id, where it comes from, its key, its limits.

Each route says by `needs(...)` what a key must be for; a server does not start with a route that says nothing and is
not in OPEN. What a defect raises is logged by its type and place alone: its message could repeat a prompt.
"""

from __future__ import annotations

import asyncio
import functools
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import structlog
from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, cookie_parser
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import access, wire
from serving.access import Access, Caller, is_loopback
from serving.bounds import BODY_S_MAX
from serving.errors import RequestRefused, ServingError, Unauthorised, places
from serving.problems import error_response
from serving.traces import Traces, end

# Where a person's browser gets its key from, and where it keeps it.
LOGIN = "/tidegate/login"
KEY_COOKIE = "tidegate_key"
# Probes hold no fact but whether the server lives; whoever restarts it has no key. Neither has who logs in yet.
OPEN = frozenset({"/healthz", "/readyz", LOGIN, "/tidegate/console.css", "/tidegate/console.svg"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}\Z")
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})

log = structlog.get_logger()


def needs(*any_of: access.Scope) -> Any:
    """A route's dependency: the caller must have one of the scopes, else 403 before its body is read."""

    async def check(request: Request) -> None:
        caller_of(request).require(*any_of)

    check.any_of = any_of  # type: ignore[attr-defined]
    return Depends(check)


def guarded(endpoint: Callable[[Request], Awaitable[Response]], *any_of: access.Scope) -> Callable[..., Any]:
    """The same as `needs` for an endpoint of a plain Starlette route."""

    @functools.wraps(endpoint)
    async def checked(request: Request) -> Response:
        caller_of(request).require(*any_of)
        return await endpoint(request)

    checked.any_of = any_of  # type: ignore[attr-defined]
    return checked


def caller_of(request: Request) -> Caller:
    """Who sent a request."""
    caller: Caller = request.state.caller
    return caller


def classified(app: FastAPI) -> Iterator[tuple[str, str, tuple[str, ...] | None]]:
    """Every route: method, path, scopes of which a key needs one; none for open routes, None for unclassified ones."""
    for route in app.routes:
        path = str(getattr(route, "path", route))
        scopes: tuple[str, ...] | None = () if path in OPEN else None
        scopes = getattr(getattr(route, "endpoint", None), "any_of", scopes)
        if isinstance(route, APIRoute):
            for dependency in route.dependant.dependencies:
                scopes = getattr(dependency.call, "any_of", scopes)
        for method in sorted(getattr(route, "methods", None) or {"ANY"}):
            yield method, path, scopes


def check_classified(app: FastAPI) -> None:
    """Refuse an application with a route that nobody has decided on.

    Raises:
        ServingError: names it.
    """
    for method, path, scopes in classified(app):
        if scopes is None:
            raise ServingError(f"route={method} {path}: needs no scope and is not open; give it needs(...)")


class Gate:
    """ASGI middleware around the application.

    Args:
        app: what is behind it.
        access: decides who a request is from.
        traces: where spans of requests go; None: nowhere.
    """

    def __init__(self, app: ASGIApp, access: Access, traces: Traces | None = None) -> None:
        self._app = app
        self._access = access
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] == "http" and self._traces is not None and scope["path"] not in OPEN:
            await self._traced(self._traces, scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})

    async def _traced(self, traces: Traces, scope: Scope, receive: Receive, send: Send) -> None:
        began_s = time.monotonic()
        span = traces.begin(scope["method"], Headers(scope=scope))
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._http(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            method = scope["method"] if scope.get("route") else "HTTP"  # else it is a word of the client's
            reply = scope["state"].get("reply")
            end(span, method=method, route=route, status=status, began_s=began_s, reply=reply)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        state = scope.setdefault("state", {})
        state["request_id"] = given if _REQUEST_ID.match(given) else ""
        state["caller"] = None
        started = False

        async def marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                _mark(message, state["request_id"], state["caller"])
            await send(message)

        ends_s = time.monotonic() + BODY_S_MAX
        whole = False

        async def timely() -> Message:
            """The body's next part; behind it nothing is awaited but the end of the connection, for ever."""
            nonlocal whole
            try:
                async with asyncio.timeout(None if whole else max(0.0, ends_s - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                if started:
                    return {"type": "http.disconnect"}
                raise RequestRefused(
                    f"body: must be there within {BODY_S_MAX:.0f} s; send it at once", status=408
                ) from None
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        try:
            self._admit(scope, headers)
            await self._app(scope, timely, marked)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer and the log no content
            response = _answer_to(error, scope["path"], headers)
            if not started:
                await response(scope, receive, marked)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        """Put the caller into the request's state.

        Raises:
            RequestRefused, Unauthorised, KeysUnreadable, TooFast: nobody who may come in.
        """
        _check_place(scope, headers, with_keys=self._access.required)
        if scope["path"] not in OPEN:
            caller = self._access.caller(headers.get("authorization") or _cookie(headers))
            scope["state"]["caller"] = caller
            caller.limits.take("requests", 1)


def _cookie(headers: Headers) -> str | None:
    """The key a browser keeps from the login form, as an Authorization header would carry it."""
    key = cookie_parser(headers.get("cookie", "")).get(KEY_COOKIE)
    return f"Bearer {key}" if key else None


def _answer_to(error: Exception, path: str, headers: Headers) -> Response:
    if isinstance(error, Unauthorised) and path == "/":  # a page, for people
        return RedirectResponse(f"{LOGIN}?refused" if _cookie(headers) else LOGIN, 303)
    if isinstance(error, ServingError):
        return error_response(error, browser="text/html" in headers.get("accept", ""))
    log.error("request failed", path=path[:200], error=type(error).__name__, at=places(error))
    return JSONResponse(wire.error_body("the server failed; its log says why", kind="server_error"), 500)


def _mark(message: Message, request_id: str, caller: Caller | None) -> None:
    """Headers every response has: its id, and what is left of the limits."""
    headers = MutableHeaders(scope=message)
    if request_id:
        headers["x-request-id"] = request_id
    elif "x-request-id" not in headers:
        headers["x-request-id"] = f"req_{uuid.uuid4().hex}"
    headers.setdefault("x-content-type-options", "nosniff")
    if caller is not None:
        for name, value in caller.limits.headers().items():
            headers[name] = value


def _check_place(scope: Scope, headers: Headers, *, with_keys: bool) -> None:
    """Refuse what a web page of somebody else makes a browser send.

    Where no key is asked for, only names of this machine are answered: else any page could bind its own name to
    127.0.0.1 and read answers (DNS rebinding). What changes anything comes from no other origin, key or not: a browser
    sends the key it knows along.

    Raises:
        RequestRefused: 403.
    """
    host = headers.get("host")
    if not with_keys and host is not None and not is_loopback(_hostname(host)):
        raise RequestRefused(
            f"Host={host[:80]!r}: is no name of this machine, and no keys are asked for; use 127.0.0.1 or localhost, "
            "or set service.api.require_keys",
            status=403,
            code="host_not_allowed",
        )
    origin = headers.get("origin")
    if origin is not None and scope["method"] not in _SAFE and _netloc(origin) != (host or "").lower():
        raise RequestRefused(
            f"Origin={origin[:80]!r}: pages of other places may not ask; call the API from a program",
            status=403,
            code="origin_not_allowed",
        )


def _hostname(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0][1:]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
