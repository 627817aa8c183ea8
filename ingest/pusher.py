"""Pushes a lane's data to the DVC remote, in a thread, so that a slow or absent remote never holds ingest up."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, Self

from ingest.errors import RepositoryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ingest.lane import Lane

# What a stopping process waits for its last push; the next start pushes what is left.
_CLOSE_SECONDS: Final = 60.0


class Pusher:
    """One thread; a push covers all blocks committed before it. A failed one is tried again with the next block."""

    def __init__(self, lane: Lane, on_failure: Callable[[RepositoryError], None]) -> None:
        self._lane = lane
        self._on_failure = on_failure
        self._wanted = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"push {lane.name}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._wanted.set()
        self._thread.join(_CLOSE_SECONDS)

    def notify(self) -> None:
        """There is a new block."""
        self._wanted.set()

    def _run(self) -> None:
        pending = True  # what an earlier process could not push
        while not self._closing:
            if pending:
                self._push()
            self._wanted.wait()
            pending = True
            self._wanted.clear()
        self._push()

    def _push(self) -> None:
        try:
            self._lane.push()
        except RepositoryError as error:
            self._on_failure(error)
