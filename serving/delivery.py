"""What goes on beside the live version of a stream: the candidate that waits, on demand."""

from __future__ import annotations

import threading
from typing import Any

import structlog

from serving.alarms import Alarm, Alarms
from serving.candidates import Candidates

log = structlog.get_logger()


class Delivery:
    """Started and stopped with the stream's hot swap, on a thread of its own.

    Args:
        candidates: what waits for a person.
        poll_seconds: pause between two looks at what the registry said last.
    """

    def __init__(self, candidates: Candidates, *, poll_seconds: float = 0.5) -> None:
        self.candidates = candidates
        self._alarms = Alarms(candidates.stream)
        self._poll_seconds = poll_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"delivery {candidates.stream}", daemon=True)

    def start(self) -> None:
        """Follow the registry on a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """Stop following. Idempotent."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """What is wrong now."""
        return self._alarms.standing

    def state(self) -> dict[str, Any]:
        """JSON for `tidegate status`."""
        return {"candidate": self.candidates.state()}

    def tick(self) -> None:
        """One round of following. Never raises for what is wrong outside."""
        self.candidates.release()

    def _run(self) -> None:
        while not self._stopping.wait(self._poll_seconds):
            try:
                self.tick()
            except Exception:  # a defect here must not stop what goes on beside the live version for good
                log.exception("delivery failed", stream=self.candidates.stream)
