"""POST /tidegate/compare: one question, answered by the live version and by the candidate that waits, side by side.

It is for whoever decides on a candidate. Nothing else lets a candidate answer: under /v1 a model is a stream, and its
versions are the approved ones.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Annotated, Any

from pydantic import Field

from serving import wire
from serving.engine import Engine, Piece, Sampling
from serving.errors import EngineError, PromptTooLong, QueueFull, RequestRefused, SwapError
from serving.swap import HotSwap, Served


class CompareRequest(wire._Strict):  # noqa: SLF001 - of the same wire
    """One question to two versions.

    Attributes:
        stream: whose versions.
        messages: as in chat.
        version: of the candidate; None: the one that waits.
        max_tokens: of each answer.
        temperature: 0 is greedy, which is the default here: two answers differ for the versions' sake alone.
        seed: of both answers.
    """

    stream: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[list[wire.Message], Field(min_length=1, max_length=wire.MESSAGES_MAX)]
    version: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None


async def compare(asked: CompareRequest, swap: HotSwap, tokens_max: int) -> dict[str, Any]:
    """Both answers, each with its version, time and usage; `same` says whether the texts are equal.

    A candidate that fails is told in its place, in `error`: that is what one asks for.

    Raises:
        RequestRefused: 404 when no candidate waits, 409 when it may not answer anybody.
        NotReady, QueueFull, PromptTooLong: as any request.
    """
    tokens = asked.max_tokens or tokens_max
    if tokens > tokens_max:
        raise RequestRefused(f"max_tokens={tokens}: must be <= {tokens_max}; ask for fewer tokens", param="max_tokens")
    sampling = Sampling(tokens, temperature=asked.temperature, seed=asked.seed)
    engine = swap.engine
    try:
        prompt = await asyncio.to_thread(engine.render, [message.plain() for message in asked.messages])
    except EngineError as error:
        raise RequestRefused(str(error), param="messages") from error
    candidate = await asyncio.to_thread(_held, swap, asked.version)
    async with AsyncExitStack() as held:
        live = held.enter_context(swap.lease())
        delivery = swap.delivery
        assert delivery is not None  # noqa: S101 - `_held` found a candidate in it
        if delivery.shadow is not None:
            held.enter_context(delivery.shadow.idle.busy())
        try:
            held.enter_context(delivery.candidates.lease(candidate))
        except SwapError as error:
            raise RequestRefused(str(error), status=409, code="candidate_refused") from error
        told = await asyncio.gather(
            _answer(engine, live, prompt, sampling, held.callback),
            _answer(engine, candidate, prompt, sampling, held.callback),
            return_exceptions=True,
        )
    return _comparison(swap.stream, live, candidate, *told)


def _held(swap: HotSwap, version: int | None) -> Served:
    """The candidate, resident."""
    delivery = swap.delivery
    found = delivery.candidates.waiting(version) if delivery else None
    if delivery is None or found is None:
        which = f"version {version} is no candidate that waits" if version else "no candidate waits for a person"
        raise RequestRefused(f"stream={swap.stream}: {which}; see `tidegate versions`", status=404, code="no_candidate")
    try:
        return delivery.candidates.hold(found)
    except (SwapError, EngineError) as error:
        raise RequestRefused(str(error), status=409, code="candidate_refused") from error


async def _answer(
    engine: Engine,
    served: Served,
    prompt: list[int],
    sampling: Sampling,
    at_end: Callable[[Callable[[], object]], object],
) -> dict[str, Any]:
    began = time.monotonic()
    answer = await engine.submit(served.adapter, prompt, sampling)
    at_end(answer.cancel)  # the asker may be gone before it is finished
    text = ""
    async for event in answer:
        if isinstance(event, Piece):
            text += event.text
        else:
            return {
                "text": text,
                "finish_reason": event.reason,
                "usage": wire.usage({0: event}, 1),
                "seconds": round(time.monotonic() - began, 3),
            }
    raise EngineError(f"{served.name}: its answer has no end; ask again")


def _comparison(stream: str, live: Served, candidate: Served, *told: dict[str, Any] | BaseException) -> dict[str, Any]:
    """What both said.

    Raises:
        EngineError: the live version failed, or neither could be asked.
    """
    for said in told:
        if isinstance(said, QueueFull | PromptTooLong) or (
            isinstance(said, BaseException) and (said is told[0] or not isinstance(said, EngineError))
        ):
            raise said
    sides = [
        {"version": served.name, "number": served.version, "error": str(said)}
        if isinstance(said, BaseException)
        else {"version": served.name, "number": served.version, "error": None, **said}
        for served, said in zip((live, candidate), told, strict=True)
    ]
    same = sides[0].get("text") == sides[1].get("text")
    return {"object": "tidegate.comparison", "stream": stream, "live": sides[0], "candidate": sides[1], "same": same}
