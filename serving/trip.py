"""One request's way through an engine, seen by whoever compares versions: did it fail, how long did it take."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Hashable, Sequence
from dataclasses import dataclass, field

from serving.engine import Answer, Engine, Finish, Piece, Sampling
from serving.errors import AdapterLost, EngineDown, EngineError, PromptTooLong, QueueFull
from serving.swap import Served


@dataclass
class Trip:
    """What becomes of one request.

    Attributes:
        served: the version that answers it.
        engine: of that version.
        canary: whether that is the canary.
        unit: what was drawn for: the user's pseudonym, or something of the request's own.
        drawn: whether a lot decided.
        seq: of the canary it may have gone to; 0 when none runs.
        watched: whether anybody wants to know; else answers are handed through as they are.
        away: the process that computes was away, which says nothing of one version.
    """

    served: Served
    engine: Engine
    canary: bool = False
    unit: Hashable = None
    drawn: bool = False
    seq: int = 0
    watched: bool = False
    failed: bool = False
    away: bool = False
    began_s: float = field(default_factory=time.monotonic)
    answers: list[Tapped] = field(default_factory=list)

    async def submit(self, adapter: str | None, prompt_ids: Sequence[int], sampling: Sampling) -> Answer:
        """Queue one answer, as `Engine.submit`."""
        if not self.watched:
            return await self.engine.submit(adapter, prompt_ids, sampling)
        try:
            answer = await self.engine.submit(adapter, prompt_ids, sampling)
        except (QueueFull, PromptTooLong):  # nothing that tells one version from another
            raise
        except EngineError as error:
            self.fail(error)
            raise
        self.answers.append(Tapped(answer, self, prompt_ids, sampling))
        return self.answers[-1]

    def fail(self, error: EngineError) -> None:
        """One of its answers cannot be finished."""
        self.failed = True
        self.away |= isinstance(error, EngineDown) and not isinstance(error, AdapterLost)

    @property
    def asked(self) -> bool:
        """Whether an engine was asked at all."""
        return self.failed or bool(self.answers)

    @property
    def finished(self) -> bool:
        """Whether every answer is whole."""
        return bool(self.answers) and all(answer.finish is not None for answer in self.answers)

    @property
    def seconds(self) -> float:
        """From the request to the end of its last answer; until now when somebody hung up before."""
        if not self.finished:
            return time.monotonic() - self.began_s
        return max(answer.ended_s for answer in self.answers) - self.began_s


class Tapped:
    """An answer that somebody reads along with whoever asked."""

    def __init__(self, answer: Answer, trip: Trip, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        self._answer = answer
        self._trip = trip
        self.prompt_ids, self.sampling = prompt_ids, sampling
        self.text = ""
        self.finish: Finish | None = None
        self.began_s, self.ended_s = time.monotonic(), 0.0

    async def __aiter__(self) -> AsyncIterator[Piece | Finish]:
        """The same pieces; EngineError as from the engine."""
        try:
            async for event in self._answer:
                if isinstance(event, Finish):
                    self.finish, self.ended_s = event, time.monotonic()
                else:
                    self.text += event.text
                yield event
        except EngineError as error:
            self._trip.fail(error)
            raise

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._answer.cancel()
