"""How long answers take on an engine, as whoever asks it alone would see it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from evaluation.scorer import Timed
from serving.engine import Engine, Finish, Piece, Sampling


def timed(engine: Engine, adapter: str | None, prompts: Sequence[str], max_tokens: int) -> list[Timed]:
    """Ask for greedy answers one after the other; the first prompt is asked once before, to warm up.

    Args:
        engine: any engine; it should have nothing else to do.
        adapter: a resident adapter, None for the bare base.
        prompts: user prompts.
        max_tokens: of an answer.

    Raises:
        EngineError: an answer could not be finished.
    """

    async def one(prompt: str) -> Timed:
        ids = engine.render([{"role": "user", "content": prompt}])
        text, tokens, began = "", 0, time.perf_counter()
        answer = await engine.submit(adapter, ids, Sampling(max_tokens))
        async for event in answer:
            if isinstance(event, Piece):
                text += event.text
            elif isinstance(event, Finish):
                tokens = event.completion_tokens
        return Timed(text, time.perf_counter() - began, tokens)

    async def everyone() -> list[Timed]:
        for prompt in prompts[:1]:
            await one(prompt)
        return [await one(prompt) for prompt in prompts]

    return asyncio.run(everyone())
