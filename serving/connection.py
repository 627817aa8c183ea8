"""One connection's bounds, where uvicorn has none: a request's head that never ends, sent a byte at a time."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.bounds import HEAD_S_MAX

# Of a request line with its headers; uvicorn's own default, held here so that it cannot change unseen.
HEAD_BYTES_MAX = 64 * 1024


class Connection(H11Protocol):
    """uvicorn's connection, closed when a head is not whole in time."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Wait for the first head."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Read on."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._rest()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """A timer runs while a first head is awaited or one has begun; a further byte does not start it anew."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._rest()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_S_MAX, self.transport.close)

    def _rest(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
