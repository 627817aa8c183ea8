"""Asking somebody who may never answer, without waiting longer than one wants to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Generic, TypeVar

T = TypeVar("T")


class NoAnswerYet(Exception):
    """The question goes on.

    Attributes:
        seconds: since it was asked.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"none for {seconds:.0f} s")
        self.seconds = seconds


class Question(Generic[T]):
    """Asked again and again, on threads of its own, once at a time.

    Args:
        ask: may take for ever; then its thread does, and ends with the process.
    """

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._asking: Future[T] | None = None
        self._asked_at = 0.0

    def answer(self, within_s: float) -> T:
        """What is said to it, asked anew unless it is under way.

        Raises:
            NoAnswerYet: nothing is said within that time; the next call waits for the same answer.
            Exception: whatever `ask` raises.
        """
        if self._asking is None:
            self._asking, self._asked_at = Future(), time.monotonic()
            threading.Thread(target=self._run, args=(self._asking,), name="question", daemon=True).start()
        try:
            self._asking.exception(within_s)
        except NotYet:
            raise NoAnswerYet(time.monotonic() - self._asked_at) from None
        answered, self._asking = self._asking, None
        return answered.result()

    def _run(self, future: Future[T]) -> None:
        try:
            future.set_result(self._ask())
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever asks
            future.set_exception(error)
