"""Shadow: a share of the questions is asked of the waiting candidate too, when the engine has nothing else to do.

Live has answered before the candidate is asked. A question is dropped, not queued, while anybody is being answered, and
a shadow that runs is cancelled by the next request: at most one step of the engine is lost to it. What the candidate
says is compared with what live said, counted, and forgotten; it is seen by nobody, and logged nowhere.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import structlog

from serving.candidates import Candidates
from serving.engine import Answer, Engine, Piece
from serving.errors import ServingError
from serving.swap import Served
from serving.trip import Tapped, Trip

log = structlog.get_logger()


class Idle:
    """Whether an engine has nothing to do for people; shared by all streams on it. Used on one event loop.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._people = 0
        self._shadow: asyncio.Task[None] | None = None

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Held while somebody is being answered; whatever runs for nobody ends at once."""
        self._people += 1
        if self._shadow is not None:
            self._shadow.cancel()
        try:
            yield
        finally:
            self._people -= 1

    @property
    def free(self) -> bool:
        """Whether a shadow would delay nobody."""
        return not self._people and self._shadow is None and not self._engine.waiting

    def run(self, shadow: Coroutine[Any, Any, None]) -> None:
        """Run something that `busy` may cancel; one at a time."""
        self._shadow = asyncio.get_running_loop().create_task(shadow)
        self._shadow.add_done_callback(self._over)

    def _over(self, _task: asyncio.Task[None]) -> None:
        self._shadow = None


class Shadow:
    """Asks the candidate of one stream what people asked.

    Args:
        candidates: of the stream.
        idle: of the engine.
        share: of the questions live has answered.
    """

    def __init__(self, candidates: Candidates, idle: Idle, share: float) -> None:
        self.share = share
        self.idle = idle
        self.counts: Counter[tuple[str, str]] = Counter()  # (version, outcome)
        self.seconds: dict[tuple[str, str], float] = {}  # (version, side): of answers that can be compared
        self.resident: Served | None = None  # set by whoever keeps it resident
        self._candidates = candidates

    def offer(self, trip: Trip) -> None:
        """Maybe ask the candidate what live was asked; returns at once."""
        served = self.resident
        if served is None or not trip.finished or trip.failed or random.random() >= self.share:  # noqa: S311
            return
        if not self.idle.free:
            self.counts[served.name, "dropped"] += 1
            return
        self.idle.run(self._ask(served, trip.answers[0], trip.engine))

    def state(self) -> dict[str, Any]:
        """JSON: outcomes by version."""
        told: dict[str, dict[str, int]] = {}
        for (name, outcome), count in sorted(self.counts.items()):
            told.setdefault(name, {})[outcome] = count
        return {"share": self.share, "resident": self.resident.name if self.resident else None, "outcomes": told}

    async def _ask(self, served: Served, live: Tapped, engine: Engine) -> None:
        began, outcome = time.monotonic(), "failed"
        try:
            with suppress(ServingError), self._candidates.lease(served, used=False):
                answer = await engine.submit(served.adapter, live.prompt_ids, live.sampling)
                try:
                    outcome = await _compared(answer, live)
                finally:
                    answer.cancel()
        except asyncio.CancelledError:  # by somebody who asks; the task ends here anyway
            outcome = "dropped"
        if outcome in {"same", "other"}:
            times = {"candidate": time.monotonic() - began, "live": live.ended_s - live.began_s}
            for side, seconds in times.items():
                self.seconds[served.name, side] = self.seconds.get((served.name, side), 0.0) + seconds
        self.counts[served.name, outcome] += 1


async def _compared(answer: Answer, live: Tapped) -> str:
    """Whether a whole answer says the same as live's. Drawn ones differ by chance: only greedy ones can agree."""
    text = ""
    async for event in answer:
        if isinstance(event, Piece):
            text += event.text
    if live.sampling.temperature:
        return "drawn"
    return "same" if text == live.text else "other"
