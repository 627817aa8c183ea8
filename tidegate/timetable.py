"""Whose turn it is: streams that are due wait for the machine, and the one that waits longest has the next round.

What is due, what runs and what became of it stands in a file, so that a restart forgets no turn and `tidegate status`
can tell. A round is due once, however often its time has come while it waited.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from threading import RLock
from typing import TYPE_CHECKING, Any

import structlog

from tidegate.workspace import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

log = structlog.get_logger()

# In the workspace's `run`: the timetable, and what the process that keeps it holds.
FILE = "schedule.json"
LOCK = "learn.lock"
# A round that begins within this of its time is on time: a start takes seconds, a look at the clock less.
LATE_SECONDS = 60.0
# Stuck so often in a row, a stream would only block the others.
STUCK_MAX = 3


@dataclass(frozen=True)
class Turn:
    """One stream on the schedule. Times are UTC, RFC 3339; empty: never, or not now.

    Attributes:
        next_due: when it is due again.
        waiting_since: when it became due; it has not begun yet.
        running_since: when its round began.
        last_began, last_ended, last_outcome: the round before.
        late: of the newest round, if it began late.
        overlap: of the newest round, if its time came while one still ran.
        stuck: how many rounds in a row had to be killed because nothing moved.
    """

    stream: str
    next_due: str = ""
    waiting_since: str = ""
    running_since: str = ""
    last_began: str = ""
    last_ended: str = ""
    last_outcome: str = ""
    late: str = ""
    overlap: str = ""
    stuck: int = 0


class Timetable:
    """The turns of a workspace's streams, kept in a file. Safe to use from several threads.

    Args:
        file: where they are kept.
        streams: those of the settings; what is known of others is forgotten.
        now: the time, in UTC.
    """

    def __init__(self, file: Path, streams: Sequence[str], now: Callable[[], datetime] | None = None) -> None:
        self._file = file
        self._now = now or (lambda: datetime.now(UTC))
        self._lock = RLock()
        known = {turn.stream: turn for turn in read(file)}
        self._turns = {name: _after_restart(known.get(name, Turn(name))) for name in streams}
        self._write()

    def turn(self, stream: str) -> Turn:
        """What is known of a stream."""
        return self._turns[stream]

    def planned(self, stream: str, when: datetime | None) -> None:
        """Note when a stream is due again."""
        self._change(stream, next_due=text_of(when) if when else "")

    def fall_due(self, stream: str) -> None:
        """Let a stream wait for its turn, since it was due; told when a round of it still runs."""
        with self._lock:
            turn = self._turns[stream]
            due = turn.next_due or text_of(self._now())
            if turn.running_since and turn.overlap:
                return  # once a round is enough
            if turn.running_since:
                overlap = f"a round was due at {due} while that of {turn.running_since} still ran; it was left out"
                log.warning("round overlaps", stream=stream, due=due, running_since=turn.running_since)
                self._change(stream, overlap=overlap)
            elif not turn.waiting_since:
                self._change(stream, waiting_since=due)

    def take(self, able: Callable[[str], bool]) -> str | None:
        """The stream that waits longest of those that are able to run; its round begins now. None: nobody waits."""
        with self._lock:
            waiting = sorted(
                (turn.waiting_since, name) for name, turn in self._turns.items() if turn.waiting_since and able(name)
            )
            if not waiting:
                return None
            due, stream = waiting[0]
            began = self._now()
            seconds = (began - time_of(due)).total_seconds()
            late = ""
            if seconds > LATE_SECONDS:
                late = f"a round that was due at {due} ran late by {_duration(seconds)}"
                log.warning("round late", stream=stream, due=due, late_seconds=round(seconds))
            self._change(stream, waiting_since="", running_since=text_of(began), late=late, overlap="")
            return stream

    def ended(self, stream: str, outcome: str, *, stuck: bool = False) -> int:
        """Note what a round came to; returns how many in a row got stuck."""
        with self._lock:
            turn = self._turns[stream]
            self._change(
                stream,
                running_since="",
                last_began=turn.running_since,
                last_ended=text_of(self._now()),
                last_outcome=outcome,
                stuck=turn.stuck + 1 if stuck else 0,
            )
            return self._turns[stream].stuck

    def put_back(self, stream: str) -> None:
        """Let a round that was stopped halfway be the first to go on."""
        with self._lock:
            turn = self._turns[stream]
            self._change(stream, running_since="", waiting_since=turn.running_since, last_outcome="stopped")

    def forget_stuck(self, stream: str) -> None:
        """Count from zero again: somebody looked after it."""
        self._change(stream, stuck=0)

    def _change(self, stream: str, **facts: Any) -> None:
        with self._lock:
            self._turns[stream] = replace(self._turns[stream], **facts)
            self._write()

    def _write(self) -> None:
        write_json(self._file, {"streams": [asdict(turn) for turn in self._turns.values()]})


def read(file: Path) -> list[Turn]:
    """The turns as they are kept; none when nothing was ever scheduled, or the file is not whole."""
    try:
        return [Turn(**turn) for turn in json.loads(file.read_text(encoding="utf-8"))["streams"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _after_restart(turn: Turn) -> Turn:
    """A round that ran when the schedule was killed waits since it began: it goes on before anybody newer."""
    if not turn.running_since:
        return turn
    return replace(turn, running_since="", waiting_since=turn.running_since, last_outcome="interrupted")


def is_late(due: str) -> bool:
    """Whether a round that was due then is late by now."""
    return (datetime.now(UTC) - time_of(due)).total_seconds() > LATE_SECONDS


def text_of(when: datetime) -> str:
    """UTC, RFC 3339, to the second."""
    return when.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def time_of(text: str) -> datetime:
    """What `text_of` wrote."""
    return datetime.fromisoformat(text)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{value} {unit}" for value, unit in parts if value) or "0 s"
