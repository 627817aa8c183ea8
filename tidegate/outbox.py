"""Events on their way to receivers, in an SQLite file of the workspace: what is in it survives a restart.

An event is put in once, by its id, together with how far the facts it came from were read; each of its deliveries is
due until the receiver took it or too long a time is over. What was tried and answered is kept as the delivery log.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidegate.errors import TidegateError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from tidegate.webhook import Answer

# Writers wait for each other: the service, and a person's `tidegate hooks test`.
LOCK_SECONDS = 30.0
# 5 s, 10 s, 20 s, ... one hour: a receiver that restarts is told soon, one that is broken is not hammered.
FIRST_PAUSE_SECONDS, PAUSE_SECONDS_MAX = 5.0, 3600.0
# Over a long weekend somebody has seen that a receiver is broken.
GIVE_UP_SECONDS = 3 * 86_400.0
# Of the log; events themselves stay, so that none is told twice.
LOG_SECONDS = 90 * 86_400.0
# An alarm that is gone for less is the same when it comes back.
FORGET_SECONDS = 600.0
# HTTP: the receiver is gone for good.
_GONE = 410

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    id TEXT PRIMARY KEY, stream TEXT NOT NULL, type TEXT NOT NULL, at TEXT NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS deliveries (
    event TEXT NOT NULL, url TEXT NOT NULL, state TEXT NOT NULL, tries INTEGER NOT NULL, next_at REAL NOT NULL,
    since REAL NOT NULL, PRIMARY KEY (event, url));
CREATE TABLE IF NOT EXISTS tries (
    number INTEGER PRIMARY KEY AUTOINCREMENT, event TEXT NOT NULL, url TEXT NOT NULL, at REAL NOT NULL,
    status INTEGER, said TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS marks (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS standing (
    key TEXT PRIMARY KEY, since REAL NOT NULL, seen REAL NOT NULL, told INTEGER NOT NULL);
"""


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        id: made from what happened, so that the same thing found twice is one event.
        type: candidate, canary, stepped_back, promoted, rejected, refused, rolled_back, budget_low, alarm or test.
        at: UTC, RFC 3339.
        data: what a receiver is told.
    """

    id: str
    stream: str
    type: str
    at: str
    data: Mapping[str, Any]

    def body(self) -> bytes:
        """What is sent and signed."""
        told = {"type": f"tidegate.{self.type}", "timestamp": self.at, "data": {"stream": self.stream, **self.data}}
        return json.dumps(told, ensure_ascii=False, sort_keys=True).encode()


@dataclass(frozen=True)
class Delivery:
    """One event for one receiver. `tries`: so far. `since`: POSIX seconds when it was put in."""

    event: str
    stream: str
    url: str
    body: bytes
    tries: int
    since: float


class Outbox:
    """The file. Each call opens it anew, so that threads and processes may share it.

    Raises:
        TidegateError: any call, when the file cannot be read or written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def put(
        self,
        events: Iterable[tuple[Event, Iterable[str]]],
        now: float,
        *,
        marks: Mapping[str, int] | None = None,
        told: Iterable[str] = (),
        state: str = "due",
    ) -> list[Event]:
        """Take events in with the addresses each goes to; all of it or nothing. Returns those that were new.

        Args:
            events: one that is known already is left out with its addresses.
            now: POSIX seconds.
            marks: how far the facts behind them were read.
            told: alarms (`settle`) that are told with this.
            state: `due`, or `test` for a delivery that is tried by whoever put it in.
        """
        fresh = []
        with self._open() as db:
            for event, urls in events:
                row = (event.id, event.stream, event.type, event.at, event.body().decode())
                if not db.execute("INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?)", row).rowcount:
                    continue
                fresh.append(event)
                rows = [(event.id, url, state, 0, now, now) for url in dict.fromkeys(urls)]
                db.executemany("INSERT INTO deliveries VALUES (?, ?, ?, ?, ?, ?)", rows)
            db.executemany("INSERT OR REPLACE INTO marks VALUES (?, ?)", list((marks or {}).items()))
            db.executemany("UPDATE standing SET told = 1 WHERE key = ?", [(key,) for key in told])
        return fresh

    def mark(self, name: str) -> int | None:
        """How far facts were read; None: never."""
        with self._open() as db:
            row = db.execute("SELECT value FROM marks WHERE name = ?", (name,)).fetchone()
        return None if row is None else int(row[0])

    def keep_marks(self, names: Iterable[str]) -> None:
        """Forget the others: who is told nothing today is not told the past when that changes."""
        kept = list(names)
        with self._open() as db:
            db.execute(f"DELETE FROM marks WHERE name NOT IN ({','.join('?' * len(kept))})", kept)  # noqa: S608

    def settle(self, found: Iterable[str], now: float, seconds: float) -> dict[str, float]:
        """Note which alarms stand; returns those that have stood for `seconds` and were not told, with their begin."""
        with self._open() as db:
            db.executemany(
                "INSERT INTO standing VALUES (?, ?, ?, 0) ON CONFLICT (key) DO UPDATE SET seen = excluded.seen",
                [(key, now, now) for key in found],
            )
            db.execute("DELETE FROM standing WHERE seen < ?", (now - FORGET_SECONDS,))
            rows = db.execute(
                "SELECT key, since FROM standing WHERE told = 0 AND seen = ? AND since <= ?", (now, now - seconds)
            ).fetchall()
        return {str(key): float(since) for key, since in rows}

    def due(self, now: float) -> list[Delivery]:
        """Deliveries to try now, the oldest first."""
        return self._deliveries("d.state = 'due' AND d.next_at <= ?", now)

    def of(self, event: str) -> list[Delivery]:
        """The deliveries of one event."""
        return self._deliveries("d.event = ?", event)

    def tried(self, delivery: Delivery, answer: Answer, now: float, *, final: bool = False) -> str:
        """Note what a try came to; returns the delivery's state: `delivered`, `due` again later, or `given up`.

        Args:
            delivery: as it was due.
            answer: of the receiver.
            now: POSIX seconds.
            final: there is no next try.
        """
        tries = delivery.tries + 1
        state, pause = "due", min(FIRST_PAUSE_SECONDS * 2 ** min(tries - 1, 30), PAUSE_SECONDS_MAX)
        if answer.taken:
            state = "delivered"
        elif final or answer.status == _GONE or now + pause > delivery.since + GIVE_UP_SECONDS:
            state = "given up"
        with self._open() as db:
            db.execute(
                "INSERT INTO tries (event, url, at, status, said) VALUES (?, ?, ?, ?, ?)",
                (delivery.event, delivery.url, now, answer.status, answer.said),
            )
            db.execute(
                "UPDATE deliveries SET state = ?, tries = ?, next_at = ? WHERE event = ? AND url = ?",
                (state, tries, now + pause, delivery.event, delivery.url),
            )
            db.execute("DELETE FROM tries WHERE at < ?", (now - LOG_SECONDS,))
        return state

    def log(self, stream: str | None = None, most: int = 100) -> list[dict[str, Any]]:
        """Deliveries with their tries, the newest event last."""
        with self._open() as db:
            rows = db.execute(
                "SELECT d.event, e.stream, e.type, e.at, d.url, d.state, d.tries, d.next_at FROM deliveries d "
                "JOIN events e ON e.id = d.event WHERE ? IS NULL OR e.stream = ? ORDER BY d.since DESC, d.rowid DESC "
                "LIMIT ?",
                (stream, stream, most),
            ).fetchall()
            told = []
            for event, name, kind, at, url, state, count, next_at in reversed(rows):
                tries = db.execute(
                    "SELECT at, status, said FROM tries WHERE event = ? AND url = ? ORDER BY number", (event, url)
                ).fetchall()
                told.append(
                    {
                        "id": event,
                        "stream": name,
                        "type": kind,
                        "at": at,
                        "url": url,
                        "state": state,
                        "tries": count,
                        "next_at": next_at if state == "due" else None,
                        "answers": [{"at": t, "status": status, "said": said} for t, status, said in tries],
                    }
                )
        return told

    def _deliveries(self, where: str, value: float | str) -> list[Delivery]:
        with self._open() as db:
            rows = db.execute(
                "SELECT d.event, e.stream, d.url, e.body, d.tries, d.since FROM deliveries d "  # noqa: S608 - ours
                f"JOIN events e ON e.id = d.event WHERE {where} ORDER BY d.since, d.rowid",
                (value,),
            ).fetchall()
        return [Delivery(r[0], r[1], r[2], str(r[3]).encode(), r[4], r[5]) for r in rows]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One transaction, the write lock taken at once; committed at the end, rolled back on an error."""
        try:
            db = sqlite3.connect(self._file, timeout=LOCK_SECONDS, isolation_level=None)
            try:
                if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'standing'").fetchone():
                    db.executescript(_SCHEMA)
                db.execute("BEGIN IMMEDIATE")
                with db:
                    yield db
            finally:
                db.close()
        except sqlite3.Error as error:
            raise TidegateError(f"{self._file}: {error}; check its rights and the free space") from error
