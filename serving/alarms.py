"""What is wrong with a stream's serving: one alarm a cause, told once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import structlog

log = structlog.get_logger()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Alarm:
    """One thing that is wrong.

    Attributes:
        kind: ambiguous, production, approval, adapter, registry, acknowledge, emergency or cache; canary,
            stepped_back or shadow beside the live version.
        about: what makes it another alarm of the same kind, such as the version concerned.
        message: name, value, bound, way out, in one line.
        since: UTC, RFC 3339; not compared.
    """

    kind: str
    about: str
    message: str = field(compare=False)
    since: str = field(default_factory=_now, compare=False)

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


class Alarms:
    """The alarms of one stream. Logs each when it begins and when it ends, not in between."""

    def __init__(self, stream: str) -> None:
        self._stream = stream
        self._standing: tuple[Alarm, ...] = ()

    @property
    def standing(self) -> tuple[Alarm, ...]:
        """What is wrong now."""
        return self._standing

    def settle(self, found: Iterable[Alarm]) -> None:
        """Replace what is wrong by what was found; an alarm that goes on keeps its time, and says what is so now."""
        before = {alarm: alarm.since for alarm in self._standing}
        now = {alarm: replace(alarm, since=before.get(alarm, alarm.since)) for alarm in found}
        for alarm in now:
            if alarm not in before:
                see = f"docs/runbook.md#{alarm.kind}"
                log.warning("alarm", stream=self._stream, kind=alarm.kind, reason=alarm.message, see=see)
        for alarm in before:
            if alarm not in now:
                log.info("alarm over", stream=self._stream, kind=alarm.kind, about=alarm.about)
        self._standing = tuple(now.values())
