"""What was asked and answered, in a file, for a stream that says so (`serving.log_prompts`). Otherwise nothing is kept.

A line of JSON an answer, in a file that only its owner may read, written by a thread of its own: a slow disk makes no
answer slow. Nothing removes lines; whoever rotates or deletes the file needs no restart.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

# Lines that wait for a slow disk; more are lost and told, because memory is not a log.
WAITING_MAX = 1000

log = structlog.get_logger()


class Transcript:
    """The transcript of one stream.

    Args:
        file: is made when the first line is written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING_MAX)
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name=f"transcript {file.stem}", daemon=True)
        self._thread.start()

    def write(self, **facts: Any) -> None:
        """Keep one answer. Never raises, never waits."""
        try:
            self._lines.put_nowait({"when": datetime.now(UTC).isoformat(timespec="milliseconds"), **facts})
        except queue.Full:
            self._lost += 1

    def close(self) -> None:
        """Write what waits."""
        self._lines.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._append(line)
            except OSError as error:
                self._lost += 1
                reason = error.strerror
            else:
                reason = "the disk is slow"
            if self._lost:
                log.error("transcript lines lost", file=str(self._file), lines=self._lost, reason=reason)
                self._lost = 0

    def _append(self, line: dict[str, Any]) -> None:
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            text = json.dumps(line, ensure_ascii=False) + "\n"
            os.write(handle, text.encode("utf-8", "backslashreplace"))
        finally:
            os.close(handle)
