"""One address for several replicas: requests go to whoever is least busy and runs the version that all are sent to.

The router holds no model. It asks each replica for its state several times a second; moves all traffic of a stream to a
later version at one moment, when every healthy replica holds it (`serving.replicas`); and then acknowledges it. A
request that failed before a byte of its answer was passed on is asked of another replica; after that never.

POST /v1/chat/completions   POST /v1/completions   to a replica, by version
GET /healthz   GET /readyz   GET /metrics   GET /tidegate/state   the router's own
everything else   to any replica
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import structlog
from aiohttp import web
from multidict import CIMultiDict

from serving import wire
from serving.alarms import Alarm, Alarms
from serving.bounds import BODY_S_MAX, STALLED_S_MAX
from serving.cache import read_json, write_json
from serving.errors import SwapError
from serving.replicas import (
    ELSEWHERE_HEADER,
    PIN_HEADER,
    ROUTER_HEADER,
    SETTLE_S,
    Agreement,
    Said,
    router_token,
    said_of,
)
from serving.router_metrics import RouterMetrics

# Between two questions to a replica; with two replicas one per cent of a core.
POLL_S = 0.2
# A replica that says nothing for so long is taken out. Busy cores delay an answer by a second at times.
STATE_TIMEOUT_S = 3.0
CONNECT_S = 2.0
# So long a request waits for a replica that may answer it, before it is refused.
HOLD_S = 5.0
# Below uvicorn's 5 s, so that a connection is not used in the moment it is closed.
KEEP_ALIVE_S = 4.0
# So many failed answers in a row take a replica out for so long, even if it says that it is well.
ERRORS_MAX = 3
EJECT_S = 5.0
BODY_BYTES_MAX = 1 << 20
_ANSWERS = ("/v1/chat/completions", "/v1/completions")
# Of a connection, not of a message (RFC 9110, 7.6.1); lengths are written anew. Clients cannot pin.
_HOP = ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade")
_OURS = frozenset((*_HOP, "content-length", "expect", PIN_HEADER, ROUTER_HEADER))

log = structlog.get_logger()


class _Lost(Exception):
    """The replica failed before a byte of the answer was passed on."""


class Replica:
    """One server behind the router.

    Attributes:
        url: its address.
        up: whether it said how it is when it was last asked.
        why: what is wrong when it is not.
        said: the streams it can answer for.
        in_flight: requests it has not finished.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.up = False
        self.why = "not asked yet"
        self.asked = False
        self.said: Mapping[str, Said] = {}
        self.in_flight = 0
        self.out_until_s = 0.0
        self.errors = 0
        self.look = asyncio.Event()  # set: ask it now
        self.unbegun: set[asyncio.Task[Any]] = set()

    def healthy(self, now_s: float) -> bool:
        """Whether it counts."""
        return self.up and now_s >= self.out_until_s

    def take(self, said: Mapping[str, Said]) -> None:
        """It answered."""
        if not self.up:
            log.info("replica is in", replica=self.url)
        self.up, self.why, self.said, self.asked = True, "", said, True

    def lose(self, why: str) -> None:
        """It does not answer: what it has not begun is asked of others."""
        if self.up or not self.asked:
            log.warning("replica is out", replica=self.url, reason=why)
        self.up, self.why, self.said, self.asked = False, why, {}, True
        for task in self.unbegun:
            task.cancel()


class Router:
    """Give it to `serving.router_server`, or use `handle` in an aiohttp server of your own.

    Args:
        urls: of the replicas.
        answer_key: the secret of the answer ids, which the replicas have too.
        headers: that a replica's state is asked with, such as a key.
        acknowledge: tells the registry which version of a stream every replica runs; called on a thread.
        kept: file of the latest decision that got traffic, by stream.
        settle_s: see `Agreement`.
        poll_s: pause between two questions to a replica.
    """

    def __init__(
        self,
        urls: Sequence[str],
        answer_key: bytes,
        *,
        acknowledge: Callable[[str, int], object],
        kept: Path,
        headers: Mapping[str, str] | None = None,
        settle_s: float = SETTLE_S,
        poll_s: float = POLL_S,
    ) -> None:
        self.replicas = [Replica(url) for url in urls]
        self.agreements: dict[str, Agreement] = {}
        self.metrics = RouterMetrics(self)
        self._token = router_token(answer_key)
        self._headers = {name.lower(): value for name, value in (headers or {}).items()}
        self._acknowledge = acknowledge
        self._kept = kept
        self._settle_s, self._poll_s = settle_s, poll_s
        self._floors = self._read_floors()
        self._acknowledged: dict[str, int] = {}
        self._acknowledging: dict[str, asyncio.Task[None]] = {}
        self._alarms: dict[str, Alarms] = {}
        self._troubles: dict[tuple[str, str], str] = {}  # of writing and acknowledging, until they succeed
        self._news = asyncio.Event()
        self._changed = asyncio.Event()
        self._turn = 0
        self._watching: set[asyncio.Transport] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._session: aiohttp.ClientSession | None = None
        self._started = datetime.now(UTC)

    async def start(self) -> None:
        """Ask every replica, then go on asking."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        await asyncio.gather(*(self._ask(replica) for replica in self.replicas))
        await self._govern()
        self._tasks = [asyncio.create_task(self._follow(replica)) for replica in self.replicas]
        self._tasks.append(asyncio.create_task(self._governing()))

    def end(self) -> None:
        """What never finishes by itself, such as the events of a page that is looked at, ends now."""
        for transport in self._watching:
            transport.close()

    async def stop(self) -> None:
        """Stop asking. Idempotent."""
        tasks = [*self._tasks, *self._acknowledging.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks = []
        if self._session:
            await self._session.close()

    # Following the replicas

    async def _follow(self, replica: Replica) -> None:
        while True:
            try:
                async with asyncio.timeout(self._poll_s):
                    await replica.look.wait()
            except TimeoutError:
                pass
            replica.look.clear()
            await self._ask(replica)
            self._news.set()

    async def _ask(self, replica: Replica) -> None:
        assert self._session  # noqa: S101 - started
        try:
            async with asyncio.timeout(STATE_TIMEOUT_S):
                async with self._session.get(f"{replica.url}/tidegate/state", headers=self._headers) as reply:
                    body = await reply.read()
            if reply.status != 200:  # noqa: PLR2004 - HTTP OK
                replica.lose(f"its state has status {reply.status}")
                return
            replica.take(said_of(json.loads(body)))
        except TimeoutError:
            replica.lose(f"says nothing for {STATE_TIMEOUT_S:g} s")
        except (aiohttp.ClientError, OSError) as error:
            replica.lose(str(error) or type(error).__name__)
        except (KeyError, TypeError, ValueError):
            replica.lose("its state is not one of a replica; service.replicas must name `tidegate serve` processes")

    async def _governing(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._govern()
            except Exception:  # a defect here must not freeze the version for good
                log.exception("router failed")

    async def _govern(self) -> None:
        """Move traffic where replicas agree; acknowledge what all run; tell what is wrong."""
        now_s = time.monotonic()
        healthy = [replica for replica in self.replicas if replica.healthy(now_s)]
        for stream in sorted({stream for replica in healthy for stream in replica.said} | set(self.agreements)):
            agreement = self.agreements.setdefault(
                stream, Agreement(stream, floor=self._floors.get(stream, 0), settle_s=self._settle_s)
            )
            said = {replica.url: replica.said[stream] for replica in healthy if stream in replica.said}
            to = agreement.next(said, now_s)
            if to:
                await self._keep(stream, max(to.seq, agreement.floor))
                was = agreement.traffic.name if agreement.traffic else "nothing"
                agreement.move(to)
                log.info("traffic moved", stream=stream, version=to.name, was=was, seq=to.seq)
            agreement.confirm(said)
            await self._keep(stream, agreement.floor)
            self._tell(stream, agreement, said)
            self._alarm(stream, agreement, said)
        self._changed.set()
        self._changed = asyncio.Event()

    def _read_floors(self) -> dict[str, int]:
        try:
            return {stream: int(seq) for stream, seq in (read_json(self._kept) or {}).items()}
        except (SwapError, ValueError) as error:
            log.warning("what was kept is ignored", file=str(self._kept), reason=str(error))
            return {}

    async def _keep(self, stream: str, seq: int) -> None:
        """Remember on disk before anybody is answered: a router that starts again brings no old version back."""
        if self._floors.get(stream, 0) >= seq:
            return
        self._floors[stream] = seq
        try:
            await asyncio.to_thread(write_json, self._kept, dict(self._floors))
            self._troubles.pop((stream, "cache"), None)
        except SwapError as error:  # answers go on
            self._troubles[stream, "cache"] = str(error)

    def _tell(self, stream: str, agreement: Agreement, said: Mapping[str, Said]) -> None:
        """Acknowledge the version that every healthy replica runs, until the registry has heard it."""
        traffic = agreement.traffic
        if not traffic or not traffic.version or not agreement.complete(said):
            if traffic and not traffic.version:
                self._acknowledged.pop(stream, None)  # whatever comes back is told anew
            return
        running = self._acknowledging.get(stream)
        if self._acknowledged.get(stream) == traffic.version or (running and not running.done()):
            return

        async def tell() -> None:
            try:
                await asyncio.to_thread(self._acknowledge, stream, traffic.version)
                self._acknowledged[stream] = traffic.version
                self._troubles.pop((stream, "acknowledge"), None)
            except Exception as error:  # noqa: BLE001 - the caller's function; it is asked again
                self._troubles[stream, "acknowledge"] = (
                    f"{traffic.name} answers but the registry did not take it ({error}); it is told again"
                )
                await asyncio.sleep(1.0)

        self._acknowledging[stream] = asyncio.create_task(tell())

    def _alarm(self, stream: str, agreement: Agreement, said: Mapping[str, Said]) -> None:
        found = [Alarm(kind, "", text) for (of, kind), text in self._troubles.items() if of == stream]
        found += [
            Alarm(
                "replica", replica.url, f"replica {replica.url}: is out ({replica.why or 'its answers fail'}); start it"
            )
            for replica in self.replicas
            if replica.url not in said
        ]
        if said and not agreement.traffic:
            text = (
                f"no replica runs decision {agreement.floor} or a later one, as was answered before; see {self._kept}"
            )
            found.append(Alarm("behind", "", text))
        elif agreement.traffic:
            found += [
                Alarm(
                    "behind",
                    url,
                    f"replica {url}: has no {agreement.traffic.name} and gets no traffic; its log says why",
                )
                for url in agreement.behind(said)
            ]
        self._alarms.setdefault(stream, Alarms(stream)).settle(found)

    # Answering

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request, from a client."""
        own: dict[str, Callable[[], Awaitable[web.Response] | web.Response]] = {
            "/healthz": lambda: web.json_response({"status": "ok"}),
            "/readyz": self._ready,
        }
        if request.method == "GET" and request.path in own:
            return own[request.path]()  # type: ignore[return-value]
        try:
            async with asyncio.timeout(BODY_S_MAX):
                body = await request.read()
        except TimeoutError:
            late = _refusal(
                408, f"body: must be there within {BODY_S_MAX:.0f} s; send it at once", "invalid_request_error"
            )
            late.force_close()
            return late
        except web.HTTPRequestEntityTooLarge:
            return _refusal(
                413, f"body: must be <= {BODY_BYTES_MAX} bytes; shorten the prompt", "invalid_request_error"
            )
        if request.method == "GET" and request.path in {"/metrics", "/tidegate/state"}:
            return await self._guarded(request, body)
        return await self._forward(request, body)

    def _ready(self) -> web.Response:
        streams = {stream: one.traffic.name if one.traffic else None for stream, one in self.agreements.items()}
        now_s = time.monotonic()
        able = [
            any(replica.healthy(now_s) and _holds(replica, stream, one) for replica in self.replicas)
            for stream, one in self.agreements.items()
        ]
        ready = bool(able) and all(able)
        return web.json_response({"ready": ready, "streams": streams}, status=200 if ready else 503)

    async def _guarded(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        """The router's own page, for whom a replica would show its own: it has the keys."""
        ours = self._headers.get("authorization")
        alive = any(replica.up for replica in self.replicas)
        if (alive or ours) and (ours is None or request.headers.get("authorization") != ours):
            shown = await self._forward(request, body)
            if shown.status != 200:  # noqa: PLR2004 - HTTP OK
                return shown
        if request.path == "/metrics":
            return web.Response(body=self.metrics.page(), headers={"content-type": self.metrics.content_type})
        return web.json_response(self.state())

    def state(self) -> dict[str, Any]:
        """JSON for `tidegate status`."""
        now_s = time.monotonic()
        streams = {}
        for stream, agreement in self.agreements.items():
            said = {r.url: r.said[stream] for r in self.replicas if r.healthy(now_s) and stream in r.said}
            traffic = agreement.traffic
            alarms = [str(alarm) for alarm in (self._alarms[stream].standing if stream in self._alarms else ())]
            alarms += sorted({str(alarm) for one in said.values() for alarm in one.state.get("alarms", ())})
            lead = next((one.state for one in said.values() if traffic and one.pin == traffic.pin), {})
            streams[stream] = {
                **lead,
                "canary": _canary_of([one.state for one in said.values()]),
                "version": traffic.name if traffic else "nothing",
                "number": traffic.version if traffic else None,
                "approval_seq": agreement.floor,
                "complete": agreement.complete(said),
                "waiting": sum(int(one.state.get("waiting", 0)) for one in said.values()),
                "alarms": alarms,
            }
        replicas = [
            {
                "url": replica.url,
                "up": replica.healthy(now_s),
                "why": replica.why,
                "in_flight": replica.in_flight,
                "streams": {stream: one.name for stream, one in replica.said.items()},
            }
            for replica in self.replicas
        ]
        started = self._started.strftime("%Y-%m-%dT%H:%M:%SZ")
        return {"pid": os.getpid(), "started_at": started, "streams": streams, "replicas": replicas}

    async def _forward(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        """Ask replicas until one answers; what comes from it is passed on as it comes."""
        stream = _model_of(request, body)
        headers = _passed(request)
        tried: set[Replica] = set()
        refused: web.Response | None = None
        end_s = time.monotonic() + HOLD_S
        while True:
            changed = self._changed
            replica = self._choose(stream, tried)
            if replica is None:
                left_s = end_s - time.monotonic()
                if (refused is not None and refused.status == 429) or left_s <= 0:  # noqa: PLR2004
                    return refused or _refusal(503, "no replica can answer now; come back later", "server_error")
                await _within(changed.wait(), left_s)
                tried.clear()
                continue
            tried.add(replica)
            agreement = self.agreements.get(stream)
            if agreement and agreement.traffic:
                headers[PIN_HEADER], headers[ROUTER_HEADER] = agreement.traffic.pin, self._token
            try:
                response = await self._attempt(replica, request, headers, body)
            except _Lost as error:
                self.metrics.retries.labels(replica.url, "lost").inc()
                replica.look.set()
                log.info("asked again", replica=replica.url, reason=str(error))
                continue
            where = response.headers.get(ELSEWHERE_HEADER)
            if where is None:
                return response
            self.metrics.retries.labels(replica.url, where).inc()
            if where != "full":
                replica.look.set()
            assert isinstance(response, web.Response)  # noqa: S101 - errors are whole
            refused = _sooner(refused, response)

    def _choose(self, stream: str, tried: set[Replica]) -> Replica | None:
        """The least busy of those that may be asked, in turns."""
        now_s = time.monotonic()
        agreement = self.agreements.get(stream)
        able = [
            replica
            for replica in self.replicas
            if replica not in tried
            and replica.healthy(now_s)
            and (agreement is None or _holds(replica, stream, agreement))
        ]
        self._turn += 1
        return min(
            able,
            key=lambda one: (one.in_flight, (self.replicas.index(one) + self._turn) % len(self.replicas)),
            default=None,
        )

    async def _attempt(
        self, replica: Replica, request: web.BaseRequest, headers: CIMultiDict[str], body: bytes
    ) -> web.StreamResponse:
        """One try of one replica.

        Raises:
            _Lost: it failed before the first byte.
        """
        replica.in_flight += 1
        upstream: aiohttp.ClientResponse | None = None
        try:
            begun = asyncio.create_task(self._begin(replica, request, headers, body))
            replica.unbegun.add(begun)
            try:
                upstream, first = await begun
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task and task.cancelling():  # the client has hung up
                    raise
                raise _Lost(replica.why) from None
            except (aiohttp.ClientError, OSError) as error:
                raise _Lost(str(error) or type(error).__name__) from error
            finally:
                replica.unbegun.discard(begun)
            self._count(replica, upstream)
            if upstream.content_type != "text/event-stream":
                return web.Response(status=upstream.status, headers=_kept(upstream.headers), body=first)
            return await self._stream(replica, request, upstream, first)
        finally:
            replica.in_flight -= 1
            if upstream is not None:
                upstream.release() if upstream.content.at_eof() else upstream.close()

    async def _begin(
        self, replica: Replica, request: web.BaseRequest, headers: CIMultiDict[str], body: bytes
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """The response with its whole body; of a stream of events with its first bytes."""
        assert self._session  # noqa: S101 - started
        upstream = await self._session.request(
            request.method,
            f"{replica.url}{request.raw_path}",
            headers=headers,
            data=body or None,
            allow_redirects=False,
        )
        try:
            if upstream.content_type == "text/event-stream":
                return upstream, await upstream.content.readany()
            return upstream, await upstream.read()
        except BaseException:
            upstream.close()
            raise

    async def _stream(
        self, replica: Replica, request: web.BaseRequest, upstream: aiohttp.ClientResponse, first: bytes
    ) -> web.StreamResponse:
        """Pass a stream on, byte for byte. Where it breaks off, the connection does: the client must see it."""
        response = web.StreamResponse(status=upstream.status, headers=_kept(upstream.headers))
        await response.prepare(request)
        watching = {request.transport} if request.method == "GET" and request.transport else set()
        self._watching |= watching
        try:
            await _written(response, first)
            async for chunk in upstream.content.iter_any():
                await _written(response, chunk)
        except TimeoutError:  # a reader that reads no more holds no version for ever
            if request.transport:
                request.transport.abort()
            raise ConnectionResetError from None
        except aiohttp.ClientError as error:
            self.metrics.broken.labels(replica.url).inc()
            replica.look.set()
            log.warning("an answer broke off", replica=replica.url, reason=str(error))
            if request.transport:
                request.transport.close()
            raise ConnectionResetError from error
        finally:
            self._watching -= watching
        await response.write_eof()
        return response

    def _count(self, replica: Replica, upstream: aiohttp.ClientResponse) -> None:
        self.metrics.requests.labels(replica.url, upstream.status).inc()
        failed = upstream.status >= 500 and ELSEWHERE_HEADER not in upstream.headers  # noqa: PLR2004 - HTTP server errors
        named = upstream.headers.get("x-tidegate-version")
        canary = named and not any(one.traffic and one.traffic.name == named for one in self.agreements.values())
        if failed and canary:
            return  # the replica steps back from it by itself
        if not failed:
            replica.errors = 0
            return
        replica.errors += 1
        now_s = time.monotonic()
        others = any(other is not replica and other.healthy(now_s) for other in self.replicas)
        if replica.errors >= ERRORS_MAX and others:
            replica.errors = 0
            replica.out_until_s = now_s + EJECT_S
            log.warning("replica is out", replica=replica.url, reason=f"{ERRORS_MAX} answers in a row failed")


async def _written(response: web.StreamResponse, chunk: bytes) -> None:
    """Hand a part of a stream on.

    Raises:
        TimeoutError: whoever asked has not read for long.
    """
    async with asyncio.timeout(STALLED_S_MAX):
        await response.write(chunk)


def _canary_of(states: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The canary of the newest decision that a replica runs, with the answers of all that run it."""
    running = [state["canary"] for state in states if state.get("canary")]
    newest = max(running, key=lambda canary: int(canary["seq"]), default=None)
    if newest is None:
        return None
    same = [canary for canary in running if canary["seq"] == newest["seq"]]
    counts = ("requests", "failed", "live_requests", "live_failed")
    return {**newest, **{name: sum(int(canary[name]) for canary in same) for name in counts}}


def _holds(replica: Replica, stream: str, agreement: Agreement) -> bool:
    said = replica.said.get(stream)
    return said is not None and agreement.traffic is not None and agreement.traffic.pin in said.held


def _model_of(request: web.BaseRequest, body: bytes) -> str:
    """The stream that is asked; empty when the request does not say, and any replica may refuse it."""
    if request.method != "POST" or request.path not in _ANSWERS:
        return ""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    model = asked.get("model") if isinstance(asked, dict) else None
    return model if isinstance(model, str) else ""


def _passed(request: web.BaseRequest) -> CIMultiDict[str]:
    headers = CIMultiDict((name, value) for name, value in request.headers.items() if name.lower() not in _OURS)
    if request.remote:
        headers["x-forwarded-for"] = request.remote
    return headers


def _kept(headers: Mapping[str, str]) -> CIMultiDict[str]:
    kept = CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in _OURS)
    kept.setdefault("server", "tidegate")  # else aiohttp writes its own name and version
    return kept


def _refusal(status: int, message: str, kind: str) -> web.Response:
    headers = {"retry-after": "1"} if status == 503 else None  # noqa: PLR2004 - HTTP service unavailable
    return web.json_response(wire.error_body(message, kind=kind), status=status, headers=headers)


def _sooner(one: web.Response | None, other: web.Response) -> web.Response:
    """Of two refusals the one to pass on: that of a full queue, and the earlier time to come back."""
    if one is None:
        return other

    def rank(response: web.Response) -> tuple[bool, int]:
        return response.status != 429, int(response.headers.get("retry-after", "1"))  # noqa: PLR2004

    return min(one, other, key=rank)


async def _within(what: Awaitable[object], seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await what
    except TimeoutError:
        pass
