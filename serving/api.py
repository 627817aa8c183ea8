"""The OpenAI-compatible API. Prompts and answers are never logged; every answer names its version.

POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/models/{stream}
GET /healthz   GET /readyz   GET /metrics   GET /tidegate/state   POST /tidegate/compare   GET /openapi.json
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import os
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypedDict

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute

from serving import wire
from serving.access import Access, Caller, Scope
from serving.answer_id import make_answer_id
from serving.compare import CompareRequest, compare
from serving.delivery import HEADER, admit
from serving.describe import described
from serving.engine import Answer, Engine
from serving.errors import EngineError, RequestRefused, ServingError
from serving.gate import Gate, caller_of, classified, needs
from serving.limits import Limits
from serving.metrics import Metrics
from serving.problems import INVALID, error_response
from serving.replicas import PIN_HEADER, ROUTER_HEADER, router_token
from serving.reply import EventStream, Reply
from serving.swap import HotSwap
from serving.traces import Traces
from serving.transcript import Transcript
from serving.trip import Trip

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig  # where FastAPI is new enough to trace by itself

# A thousand pages of text; anything longer cannot fit a context anyway.
BODY_BYTES_MAX = 1 << 20
MAX_TOKENS = 256
# Nobody is left to read it; nginx's number for the same thing.
CLIENT_GONE = 499
# FastAPI's own spans, metrics and logs hold paths and messages of exceptions; `serving.traces` knows what may leave.
_SILENT: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}


def create_app(
    swaps: Sequence[HotSwap],
    answer_key: bytes,
    *,
    max_tokens: Mapping[str, int] | None = None,
    routes: Sequence[BaseRoute] = (),
    access: Access | None = None,
    timeouts_s: Mapping[str, float] | None = None,
    transcripts: Mapping[str, Transcript] | None = None,
    traces: Traces | None = None,
) -> FastAPI:
    """The application.

    Args:
        swaps: one a stream; started and stopped by the caller.
        answer_key: secret of the answer ids.
        max_tokens: by stream: most tokens of an answer, and what a request gets that names none. Default 256.
        routes: more of them, such as the console's; not in the OpenAPI description.
        access: who may call; None lets in whoever reaches the address.
        timeouts_s: by stream: how long an answer may take; a stream that is not named waits for ever.
        transcripts: by stream: where what was asked and answered is kept; a stream that is not named keeps nothing.
        traces: where spans of requests go; None: nowhere.
    """
    app = FastAPI(
        title="Tidegate",
        summary="OpenAI-compatible answers that name their version.",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,  # a route of ours, with a scope
        redirect_slashes=False,  # to an address made of what the request says of itself
        telemetry=_SILENT,
    )
    access = access or Access()
    app.add_middleware(Gate, access=access, traces=traces)
    by_stream = {swap.stream: swap for swap in swaps}
    desk = _Desk(by_stream, answer_key, max_tokens or {}, timeouts_s or {}, transcripts or {})
    _add_answers(app, desk, with_keys=access.required)
    _add_probes(app, desk)
    _add_errors(app)
    app.router.routes.extend(routes)
    return app


def _add_answers(app: FastAPI, desk: _Desk, *, with_keys: bool) -> None:
    kinds = (wire.ChatRequest, wire.CompletionRequest, CompareRequest)
    chat_schema, completion_schema, compare_schema, parts = _schemas(*kinds)

    @app.post("/v1/chat/completions", openapi_extra=chat_schema, dependencies=[needs("answer")])
    async def chat(request: Request) -> Response:
        return await desk.answer(request, wire.ChatRequest)

    @app.post("/v1/completions", openapi_extra=completion_schema, dependencies=[needs("answer")])
    async def completions(request: Request) -> Response:
        return await desk.answer(request, wire.CompletionRequest)

    @app.post("/tidegate/compare", openapi_extra=compare_schema, dependencies=[needs("candidate")])
    async def side_by_side(request: Request) -> Response:
        return await desk.compare(request)

    @app.get("/v1/models", dependencies=[needs("read", "answer")])
    async def models(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [desk.model(swap) for swap in desk.seen_by(caller_of(request))]}

    @app.get("/v1/models/{stream}", dependencies=[needs("read", "answer")])
    async def model(stream: str, request: Request) -> dict[str, Any]:
        return desk.model(desk.swap(stream, caller_of(request), "read", "answer"))

    described_by_fastapi = app.openapi

    def openapi() -> dict[str, Any]:
        scopes = {(method, path): needed or () for method, path, needed in classified(app)}
        return described(described_by_fastapi(), parts, scopes, with_keys=with_keys)

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way

    @app.get("/openapi.json", include_in_schema=False, dependencies=[needs("read", "answer")])
    async def description() -> dict[str, Any]:
        return app.openapi()


def _add_probes(app: FastAPI, desk: _Desk) -> None:
    @app.get("/healthz")
    async def healthz() -> Response:
        well = all(swap.engine.healthy for swap in desk.swaps.values())
        return JSONResponse({"status": "ok" if well else "engine stopped"}, 200 if well else 503)

    @app.get("/readyz")
    async def readyz() -> Response:
        streams = {stream: swap.current.name if swap.current else None for stream, swap in desk.swaps.items()}
        ready = all(streams.values()) and all(swap.engine.healthy for swap in desk.swaps.values())
        return JSONResponse({"ready": ready, "streams": streams}, 200 if ready else 503)

    @app.get("/metrics", dependencies=[needs("read")])
    async def metrics() -> Response:
        return Response(desk.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/tidegate/state", dependencies=[needs("read")])
    async def state() -> dict[str, Any]:
        return desk.state()


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ServingError)
    async def refused(_request: Request, error: Exception) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        message = f"{request.method} {request.url.path[:200]}: no such route; see /openapi.json"
        body = wire.error_body(message, kind=INVALID, code="unknown_url")
        return JSONResponse(body, status, getattr(error, "headers", None))  # which methods a route allows


class Parts(TypedDict, total=False):
    """What `create_app` may be given, for those who pass it on."""

    max_tokens: Mapping[str, int] | None
    routes: Sequence[BaseRoute]
    access: Access | None
    timeouts_s: Mapping[str, float] | None
    transcripts: Mapping[str, Transcript] | None
    traces: Traces | None


class _Desk:
    """What the routes share."""

    def __init__(
        self,
        swaps: Mapping[str, HotSwap],
        answer_key: bytes,
        max_tokens: Mapping[str, int],
        timeouts_s: Mapping[str, float],
        transcripts: Mapping[str, Transcript],
    ) -> None:
        self.metrics = Metrics(swaps)
        self.swaps = swaps
        self._answer_key = answer_key
        self._router_token = router_token(answer_key).encode()
        self._max_tokens = max_tokens
        self._timeouts_s = timeouts_s
        self._transcripts = transcripts
        self._started = datetime.now(UTC)

    def seen_by(self, caller: Caller) -> list[HotSwap]:
        """The streams somebody may ask or look at."""
        return [swap for swap in self.swaps.values() if caller.may("read", "answer", stream=swap.stream)]

    def swap(self, stream: str, caller: Caller, *any_of: Scope) -> HotSwap:
        """The swap of a stream, by the name a client calls `model`, for whoever may.

        Raises:
            RequestRefused: 404; there is none. 403: the key is for other streams.
        """
        swap = self.swaps.get(stream)
        if swap is not None:
            caller.require(*any_of, stream=stream)
            return swap
        known = ", ".join(seen.stream for seen in self.seen_by(caller))
        raise RequestRefused(
            f"model={stream[:80]!r}: does not exist; the models are: {known}",
            status=404,
            param="model",
            code="model_not_found",
        )

    def model(self, swap: HotSwap) -> dict[str, Any]:
        """A stream as OpenAI's model object."""
        return {
            "id": swap.stream,
            "object": "model",
            "created": int(self._started.timestamp()),
            "owned_by": "tidegate",
            "tidegate": {"stream": swap.stream, "version": swap.current.name if swap.current else None},
        }

    def state(self) -> dict[str, Any]:
        """JSON for `tidegate status`."""
        return {
            "pid": os.getpid(),
            "started_at": self._started.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "streams": {stream: swap.state() for stream, swap in self.swaps.items()},
        }

    async def answer(self, request: Request, kind: type[wire.ChatRequest | wire.CompletionRequest]) -> Response:
        """Answer one request on exactly one version."""
        began = time.monotonic()
        route = "chat" if kind is wire.ChatRequest else "completions"
        stream = version = ""
        caller = caller_of(request)
        with ExitStack() as held:  # keeps the version resident until the last byte
            try:
                asked = wire.parse(kind, await _body(request))
                swap = self.swap(asked.model, caller, "answer")
                stream = swap.stream
                pin = self._pin(request)
                trip = held.enter_context(admit(swap, request.headers.get(HEADER), asked.person, pin))
                served = trip.served
                version = served.name
                prompts = await asyncio.to_thread(_prompt_ids, swap.engine, asked)
                charge = self._charge(caller.limits, prompts, asked, stream)
                held.callback(charge.settle)
                answers = await self._submit(trip, prompts, asked, charge.tokens)
                reply = Reply(
                    served=served,
                    answer_id=make_answer_id(stream, served.version, self._answer_key, _prefix(route)),
                    answers=answers,
                    prompts=len(prompts),
                    chat=route == "chat",
                    with_usage=asked.usage_in_stream,
                    logprobs=asked.logprobs_asked,
                    began_s=began,
                    kept=[""] * len(answers) if stream in self._transcripts else None,
                )
                charge.reply = request.state.reply = reply
                if stream in self._transcripts:
                    held.callback(self._keep, reply, asked)
                held.callback(reply.release)
                if asked.stream:
                    ending = held.pop_all()
                    return EventStream(reply, lambda: self._ended(reply, route, ending, 200))
                body = await _unless_gone(request, reply.whole())
            except ServingError as error:
                response = error_response(error)
                if version:  # so that a router does not take a canary's failures for the replica's
                    response.headers["x-tidegate-version"] = version
                self.metrics.requests.labels(stream, version, route, response.status_code).inc()
                return response
            except ClientDisconnect:  # while its body was read
                return Response(status_code=CLIENT_GONE)
            status = CLIENT_GONE if body is None else 200
            self._ended(reply, route, held.pop_all(), status)
            return Response(status_code=status) if body is None else JSONResponse(body, headers=reply.headers)

    def _keep(self, reply: Reply, asked: wire.ChatRequest | wire.CompletionRequest) -> None:
        """Write an answer into its stream's transcript, however it ended."""
        self._transcripts[reply.served.stream].write(
            id=reply.answer_id,
            version=reply.served.name,
            asked=asked.model_dump(mode="json", exclude_none=True),
            answers=reply.kept,
            finish_reasons=[f.reason if (f := reply.finishes.get(i)) else None for i in range(len(reply.answers))],
        )

    def _pin(self, request: Request) -> str:
        """The version a router names; nobody else may."""
        pin = request.headers.get(PIN_HEADER, "")
        shown = request.headers.get(ROUTER_HEADER, "")
        return pin if pin and hmac.compare_digest(shown.encode(), self._router_token) else ""

    async def compare(self, request: Request) -> Response:
        """Live and the candidate that waits, side by side."""
        limits = caller_of(request).limits
        try:
            asked = wire.parse(CompareRequest, await _body(request))
            swap = self.swap(asked.stream, caller_of(request), "candidate")
            limits.take("tokens", 0)  # not while in debt
            whole = compare(asked, swap, self._max_tokens.get(swap.stream, MAX_TOKENS))
            told = await _unless_gone(request, whole)
        except ClientDisconnect:
            told = None
        if told is not None:
            used = sum(told[side].get("usage", {}).get("total_tokens", 0) for side in ("live", "candidate"))
            limits.give_back("tokens", -used)
        return Response(status_code=CLIENT_GONE) if told is None else JSONResponse(told)

    def _charge(self, limits: Limits, prompts: Sequence[list[int]], asked: wire.Request, stream: str) -> _Charge:
        """Take from the key's limits what the answers may cost at most.

        Raises:
            RequestRefused: more tokens or choices than there may be.
            TooFast: the key has not so many left.
        """
        bound = self._max_tokens.get(stream, MAX_TOKENS)
        tokens = asked.tokens_asked or bound
        if tokens > bound:
            raise RequestRefused(f"max_tokens={tokens}: must be <= {bound}; ask for fewer tokens", param="max_tokens")
        choices = asked.n or 1
        if len(prompts) * choices > wire.CHOICES_MAX:
            raise RequestRefused(
                f"prompts={len(prompts)} x n={choices}: must be <= {wire.CHOICES_MAX} in all; send several requests",
                param="n",
            )
        charge = _Charge(limits, tokens, sum(map(len, prompts)) + tokens * len(prompts) * choices)
        limits.take("tokens", charge.taken)
        return charge

    async def _submit(self, trip: Trip, prompts: Sequence[list[int]], asked: wire.Request, tokens: int) -> list[Answer]:
        """Queue every choice, or none."""
        answers: list[Answer] = []
        try:
            for prompt, choice in itertools.product(prompts, range(asked.n or 1)):
                sampling = asked.sampling(tokens, choice, self._timeouts_s.get(trip.served.stream))
                answer = await trip.submit(trip.served.adapter, prompt, sampling)
                answers.append(answer)
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        return answers

    def _ended(self, reply: Reply, route: str, held: ExitStack, status: int) -> None:
        """Count a finished request, and let go of its version."""
        labels = (reply.served.stream, reply.served.name, route)
        if reply.failed:
            status = 500
        elif len(reply.finishes) < len(reply.answers):
            status = CLIENT_GONE
        self.metrics.requests.labels(*labels, status).inc()
        self.metrics.seconds.labels(*labels).observe(time.monotonic() - reply.began_s)
        if reply.first_s is not None:
            self.metrics.first_seconds.labels(*labels).observe(reply.first_s)
        used = reply.usage()
        self.metrics.tokens.labels(*labels[:2], "prompt").inc(used["prompt_tokens"])
        self.metrics.tokens.labels(*labels[:2], "completion").inc(used["completion_tokens"])
        held.close()


@dataclass
class _Charge:
    """Tokens taken from a key's limits for one request, until it is known what it used.

    Attributes:
        tokens: most of each answer.
        taken: most of all prompts and answers together.
        reply: the answers; None while none were queued, and then nothing was used.
    """

    limits: Limits
    tokens: int
    taken: int
    reply: Reply | None = None

    def settle(self) -> None:
        """Give back what was not used. An answer somebody hung up on counts as whole: how far it came is not told."""
        if self.reply is None or self.reply.failed:
            self.limits.give_back("tokens", self.taken)
            return
        unused = sum(self.tokens - finish.completion_tokens for finish in self.reply.finishes.values())
        self.limits.give_back("tokens", unused)


def _prefix(route: str) -> str:
    return "chatcmpl-" if route == "chat" else "cmpl-"


def _prompt_ids(engine: Engine, asked: wire.ChatRequest | wire.CompletionRequest) -> list[list[int]]:
    """Token ids of each prompt.

    Raises:
        RequestRefused: the chat template does not take these roles, or a prompt is empty.
    """
    if isinstance(asked, wire.CompletionRequest):
        if not all(asked.prompts):
            raise RequestRefused("prompt: is empty; send some text", param="prompt")
        return [engine.text_ids(prompt) for prompt in asked.prompts]
    try:
        return [engine.render([message.plain() for message in asked.messages])]
    except EngineError as error:
        raise RequestRefused(str(error), param="messages") from error


async def _body(request: Request) -> bytes:
    """The request's body.

    Raises:
        RequestRefused: it is larger than BODY_BYTES_MAX; or the gate's: it takes too long.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES_MAX:
            raise RequestRefused(f"body: must be <= {BODY_BYTES_MAX} bytes; shorten the prompt", status=413)
    return bytes(body)


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any] | None:
    """The whole answer; None when the client has hung up before it was ready."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    whole = asyncio.create_task(answer)
    gone = asyncio.create_task(hung_up())
    try:
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await whole if whole.done() else None
    finally:
        for task in (whole, gone):
            task.cancel()


def _schemas(*kinds: type[BaseModel]) -> tuple[dict[str, Any], ...]:
    """For each request its OpenAPI description, and last the parts they refer to."""
    parts: dict[str, Any] = {}
    described = []
    for kind in kinds:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        parts |= schema.pop("$defs", {})
        described.append({"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}})
    return (*described, parts)
