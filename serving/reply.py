"""One request's answer: all its choices, on one version, whole or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from serving import wire
from serving.bounds import STALLED_S_MAX
from serving.engine import Answer, Finish, Piece, Token
from serving.errors import EngineError
from serving.swap import Served


@dataclass
class Reply:
    """The answers to one request, and what is said of them.

    Attributes:
        answers: one a choice, grouped by prompt.
        prompts: how many prompts there are.
        chat: chat form, else completion form.
        with_usage: whether a stream ends with a usage chunk.
        logprobs: how many likely tokens are told beside each; None: no probabilities.
        kept: the texts of the answers as they grow, where the stream keeps a transcript; else None.
    """

    served: Served
    answer_id: str
    answers: Sequence[Answer]
    prompts: int
    chat: bool
    with_usage: bool
    logprobs: int | None = None
    began_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    finishes: dict[int, Finish] = field(default_factory=dict)
    failed: bool = False
    kept: list[str] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Which version answers, for whoever does not read bodies."""
        return {"x-tidegate-version": self.served.name, "x-request-id": self.answer_id}

    def release(self) -> None:
        """Stop what is still being written. Idempotent."""
        for answer in self.answers:
            answer.cancel()

    def usage(self) -> dict[str, int]:
        """What the finished choices took; a prompt counts once, however many choices it has."""
        return wire.usage(self.finishes, len(self.answers) // self.prompts)

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed.

        Raises:
            EngineError: a choice could not be finished.
        """
        texts = [""] * len(self.answers)
        tokens: list[list[Token]] = [[] for _ in self.answers]
        try:
            async for index, event in self._events():
                if isinstance(event, Piece):
                    texts[index] += event.text
                    tokens[index] += event.tokens
        except EngineError:
            self.failed = True
            raise
        make = wire.chat_choice if self.chat else wire.text_choice
        choices = [
            make(index, text, self.finishes[index].reason, self._logprobs(tokens[index], 0))
            for index, text in enumerate(texts)
        ]
        body = self._frame("chat.completion" if self.chat else "text_completion", choices)
        return {**body, "usage": self.usage()}

    async def chunks(self) -> AsyncIterator[str]:
        """The server-sent events of a streamed answer, `[DONE]` last; an error object where it breaks off."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        try:
            if self.chat:
                for index in range(len(self.answers)):
                    opening = wire.chat_delta(index, {"role": "assistant", "content": "", "refusal": None})
                    yield self._chunk(kind, [opening])
            async for index, event in self._events():
                yield self._chunk(kind, [self._choice(index, event)])
        except EngineError as error:
            self.failed = True
            yield _event(wire.error_body(str(error), kind="server_error"))
        else:
            if self.with_usage:
                yield _event({**self._frame(kind, []), "usage": self.usage()})
            yield "data: [DONE]\n\n"

    def _choice(self, index: int, event: Piece | Finish) -> dict[str, Any]:
        if isinstance(event, Finish):
            return wire.chat_delta(index, {}, event.reason) if self.chat else wire.text_choice(index, "", event.reason)
        logprobs = self._logprobs(event.tokens, self._written[index])
        self._written[index] += len(event.text)
        if self.chat:
            return wire.chat_delta(index, {"content": event.text}, None, logprobs)
        return wire.text_choice(index, event.text, None, logprobs)

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        """Probabilities in the form of this route; None when nobody asked."""
        if self.logprobs is None:
            return None
        return wire.chat_logprobs(tokens) if self.chat else wire.text_logprobs(tokens, offset, self.logprobs)

    def _chunk(self, kind: str, choices: list[dict[str, Any]]) -> str:
        frame = self._frame(kind, choices)
        return _event({**frame, "usage": None} if self.with_usage else frame)

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        served = self.served
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self._created,
            "model": served.stream,
            "system_fingerprint": served.name,
            "choices": choices,
            "tidegate": {"stream": served.stream, "version": served.name, "answer_id": self.answer_id},
        }

    def __post_init__(self) -> None:
        self._created = int(time.time())
        self._written = [0] * len(self.answers)  # characters of each answer in the chunks so far

    async def _events(self) -> AsyncIterator[tuple[int, Piece | Finish]]:
        """Events of all choices as they come."""
        if len(self.answers) == 1:
            async for event in self.answers[0]:
                self._note(0, event)
                yield 0, event
            return
        merged: asyncio.Queue[tuple[int, Piece | Finish | EngineError]] = asyncio.Queue()

        async def forward(index: int, answer: Answer) -> None:
            try:
                async for event in answer:
                    merged.put_nowait((index, event))
            except EngineError as error:
                merged.put_nowait((index, error))

        tasks = [asyncio.create_task(forward(index, answer)) for index, answer in enumerate(self.answers)]
        try:
            while len(self.finishes) < len(self.answers):
                index, merged_event = await merged.get()
                if isinstance(merged_event, EngineError):
                    raise merged_event
                self._note(index, merged_event)
                yield index, merged_event
        finally:
            for task in tasks:
                task.cancel()

    def _note(self, index: int, event: Piece | Finish) -> None:
        if self.first_s is None:
            self.first_s = time.monotonic() - self.began_s
        if isinstance(event, Finish):
            self.finishes[index] = event
        elif self.kept is not None:
            self.kept[index] += event.text


class EventStream(StreamingResponse):
    """Server-sent events; whatever happens to the connection, `ended` is called once at its end."""

    media_type = "text/event-stream"

    def __init__(self, reply: Reply, ended: Callable[[], None]) -> None:
        # Proxies must not gather events.
        headers = {**reply.headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(reply.chunks(), headers=headers)
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; who reads nothing for long has hung up, and holds no version for ever."""

        async def bounded(message: Message) -> None:
            try:
                async with asyncio.timeout(STALLED_S_MAX):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        try:
            await super().__call__(scope, receive, bounded)
        finally:
            self._ended()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
