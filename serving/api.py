"""The OpenAI-compatible API. Prompts and answers are never logged; every answer names its version.

POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/models/{stream}
GET /healthz   GET /readyz   GET /metrics   GET /tidegate/state   POST /tidegate/compare
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute

from serving import wire
from serving.answer_id import make_answer_id
from serving.compare import CompareRequest, compare
from serving.engine import Answer, Engine
from serving.errors import EngineError, NotReady, PromptTooLong, QueueFull, RequestRefused, ServingError
from serving.metrics import Metrics
from serving.reply import EventStream, Reply
from serving.swap import HotSwap

# A thousand pages of text; anything longer cannot fit a context anyway.
BODY_BYTES_MAX = 1 << 20
MAX_TOKENS = 256
# Nobody is left to read it; nginx's number for the same thing.
CLIENT_GONE = 499
_INVALID = "invalid_request_error"

log = structlog.get_logger()


def create_app(
    swaps: Sequence[HotSwap],
    answer_key: bytes,
    *,
    max_tokens: Mapping[str, int] | None = None,
    routes: Sequence[BaseRoute] = (),
) -> FastAPI:
    """The application.

    Args:
        swaps: one a stream; started and stopped by the caller.
        answer_key: secret of the answer ids.
        max_tokens: by stream: most tokens of an answer, and what a request gets that names none. Default 256.
        routes: more of them, such as the console's; not in the OpenAPI description.
    """
    app = FastAPI(
        title="Tidegate",
        summary="OpenAI-compatible answers that name their version.",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
    )
    desk = _Desk({swap.stream: swap for swap in swaps}, answer_key, max_tokens or {})
    _add_answers(app, desk)
    _add_probes(app, desk)
    _add_errors(app)
    app.router.routes.extend(routes)
    return app


def _add_answers(app: FastAPI, desk: _Desk) -> None:
    kinds = (wire.ChatRequest, wire.CompletionRequest, CompareRequest)
    chat_schema, completion_schema, compare_schema, parts = _schemas(*kinds)

    @app.post("/v1/chat/completions", openapi_extra=chat_schema)
    async def chat(request: Request) -> Response:
        return await desk.answer(request, wire.ChatRequest)

    @app.post("/v1/completions", openapi_extra=completion_schema)
    async def completions(request: Request) -> Response:
        return await desk.answer(request, wire.CompletionRequest)

    @app.post("/tidegate/compare", openapi_extra=compare_schema)
    async def side_by_side(request: Request) -> Response:
        return await desk.compare(request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [desk.model(swap) for swap in desk.swaps.values()]}

    @app.get("/v1/models/{stream}")
    async def model(stream: str) -> dict[str, Any]:
        return desk.model(desk.swap(stream))

    described = app.openapi

    def openapi() -> dict[str, Any]:
        schema = described()
        schema.setdefault("components", {}).setdefault("schemas", {}).update(parts)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


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

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(desk.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/tidegate/state")
    async def state() -> dict[str, Any]:
        return desk.state()


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ServingError)
    async def refused(_request: Request, error: Exception) -> Response:
        return _error_response(error)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        message = f"{request.method} {request.url.path[:200]}: no such route; see /openapi.json"
        return JSONResponse(wire.error_body(message, kind=_INVALID, code="unknown_url"), status)

    @app.exception_handler(Exception)
    async def defect(_request: Request, _error: Exception) -> Response:
        return JSONResponse(wire.error_body("the server failed; its log says why", kind="server_error"), 500)


class _Desk:
    """What the routes share."""

    def __init__(self, swaps: Mapping[str, HotSwap], answer_key: bytes, max_tokens: Mapping[str, int]) -> None:
        self.metrics = Metrics(swaps)
        self.swaps = swaps
        self._answer_key = answer_key
        self._max_tokens = max_tokens
        self._started = datetime.now(UTC)

    def swap(self, stream: str) -> HotSwap:
        """The swap of a stream, by the name a client calls `model`."""
        try:
            return self.swaps[stream]
        except KeyError:
            known = ", ".join(self.swaps)
            raise RequestRefused(
                f"model={stream[:80]!r}: does not exist; the models are: {known}",
                status=404,
                param="model",
                code="model_not_found",
            ) from None

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
        with ExitStack() as held:  # keeps the version resident until the last byte
            try:
                asked = wire.parse(kind, await _body(request))
                swap = self.swap(asked.model)
                stream = swap.stream
                served = held.enter_context(swap.lease())
                version = served.name
                prompts = await asyncio.to_thread(_prompt_ids, swap.engine, asked)
                reply = Reply(
                    served=served,
                    answer_id=make_answer_id(stream, served.version, self._answer_key, _prefix(route)),
                    answers=await self._submit(swap.engine, served.adapter, prompts, asked, stream),
                    prompts=len(prompts),
                    chat=route == "chat",
                    with_usage=asked.usage_in_stream,
                    began_s=began,
                )
                held.callback(reply.release)
                if asked.stream:
                    ending = held.pop_all()
                    return EventStream(reply, lambda: self._ended(reply, route, ending, 200))
                body = await _unless_gone(request, reply.whole())
            except ServingError as error:
                response = _error_response(error)
                self.metrics.requests.labels(stream, version, route, response.status_code).inc()
                return response
            except ClientDisconnect:  # while its body was read
                return Response(status_code=CLIENT_GONE)
            status = CLIENT_GONE if body is None else 200
            self._ended(reply, route, held.pop_all(), status)
            return Response(status_code=status) if body is None else JSONResponse(body, headers=reply.headers)

    async def compare(self, request: Request) -> Response:
        """Live and the candidate that waits, side by side."""
        try:
            asked = wire.parse(CompareRequest, await _body(request))
            swap = self.swap(asked.stream)
            whole = compare(asked, swap, self._max_tokens.get(swap.stream, MAX_TOKENS))
            told = await _unless_gone(request, whole)
        except ClientDisconnect:
            told = None
        return Response(status_code=CLIENT_GONE) if told is None else JSONResponse(told)

    async def _submit(
        self, engine: Engine, adapter: str | None, prompts: Sequence[list[int]], asked: wire.Request, stream: str
    ) -> list[Answer]:
        """Queue every choice, or none."""
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
        answers: list[Answer] = []
        try:
            for prompt, choice in itertools.product(prompts, range(choices)):
                answer = await engine.submit(adapter, prompt, asked.sampling(tokens, choice))
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
        RequestRefused: it is larger than BODY_BYTES_MAX.
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


def _error_response(error: Exception) -> JSONResponse:
    """OpenAI's error object for anything serving raises on purpose."""
    text = str(error)
    if isinstance(error, RequestRefused):
        return JSONResponse(wire.error_body(text, kind=_INVALID, param=error.param, code=error.code), error.status)
    if isinstance(error, PromptTooLong):
        return JSONResponse(wire.error_body(text, kind=_INVALID, code="context_length_exceeded"), 400)
    if isinstance(error, QueueFull):
        body = wire.error_body(text, kind="rate_limit_error", code="rate_limit_exceeded")
        return JSONResponse(body, 429, {"retry-after": str(error.retry_after_s)})
    if isinstance(error, NotReady):
        body = wire.error_body(text, kind="server_error", code="not_ready")
        return JSONResponse(body, 503, {"retry-after": "1"})
    log.error("answer failed", reason=text)
    return JSONResponse(wire.error_body(text, kind="server_error"), 500)


def _schemas(*kinds: type[BaseModel]) -> tuple[dict[str, Any], ...]:
    """For each request its OpenAPI description, and last the parts they refer to."""
    parts: dict[str, Any] = {}
    described = []
    for kind in kinds:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        parts |= schema.pop("$defs", {})
        described.append({"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}})
    return (*described, parts)
