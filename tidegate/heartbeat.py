"""A round's heartbeat: what it does, in step numbers only, in a file that whoever started the round watches.

When the file last changed says whether a round is stuck. The file stays in the workspace: how long a step takes depends
on how many people were drawn.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tidegate.locks import is_held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tidegate.workspace import Workspace


@dataclass(frozen=True)
class Beat:
    """The newest heartbeat: what is done, how far, since when; `ended` says what the round came to."""

    pid: int
    what: str = ""
    done: int = 0
    of: int = 0
    at: str = ""
    ended: str = ""


def beat_file(workspace: Workspace, stream: str) -> Path:
    """Where a stream's rounds leave their heartbeat."""
    return workspace.run / f"round-{stream}.json"


def lock_file(workspace: Workspace, stream: str) -> Path:
    """What a running round of the stream holds."""
    return workspace.run / f"round-{stream}.lock"


def hold_file(workspace: Workspace, stream: str) -> Path:
    """There while the schedule leaves the stream alone, with the reason."""
    return workspace.run / f"held-{stream}.json"


@contextmanager
def beating(file: Path, progress: Callable[[str, int, int], None]) -> Iterator[Callable[[str, int, int], None]]:
    """Leave a heartbeat at each progress, and what it came to at the end; `progress` is told all the same."""

    def tell(what: str, done: int, of: int) -> None:
        _write(file, Beat(os.getpid(), what, done, of, _now()))
        progress(what, done, of)

    _write(file, Beat(os.getpid(), "start", at=_now()))
    try:
        yield tell
    except Exception as error:
        _write(file, Beat(os.getpid(), at=_now(), ended=f"failed: {' '.join(str(error).split())}"))
        raise


def ended(file: Path, outcome: str) -> None:
    """Leave what a round came to."""
    _write(file, Beat(os.getpid(), at=_now(), ended=outcome))


def read(file: Path) -> Beat | None:
    """The newest heartbeat; None when there is none."""
    try:
        return Beat(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def running(workspace: Workspace, stream: str) -> Beat | None:
    """The heartbeat of the round that runs now; None when none does."""
    return read(beat_file(workspace, stream)) if is_held(lock_file(workspace, stream)) else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _write(file: Path, beat: Beat) -> None:
    """Whole old or whole new; not durable, because nothing is resumed from it."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(beat)), encoding="utf-8")
    partial.replace(file)
