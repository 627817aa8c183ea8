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
# A push looks at a whole shelf, whatever is new of it: so it takes several blocks at once where they come fast.
_EVERY_SECONDS: Final = 10.0


class Pusher:
    """One thread; a push covers all blocks committed before it. A failed one is tried again with the next block."""

    def __init__(self, lane: Lane, on_failure: Callable[[RepositoryError], None]) -> None:
        self._lane = lane
        self._on_failure = on_failure
        # Guards the two flags: there is something to push, and there will be nothing more.
        self._changed = threading.Condition()
        self._pending = True  # what an earlier process could not push
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"push {lane.name}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_SECONDS)

    def notify(self) -> None:
        """There is a new block."""
        with self._changed:
            self._pending = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending:
                    return
                self._pending = False
            try:
                self._lane.push()
            except RepositoryError as error:
                self._on_failure(error)
            with self._changed:
                self._changed.wait_for(lambda: self._closing, _EVERY_SECONDS)
