"""`tidegate up`: the parts as child processes, a line per event, and a clean end.

Each part is the same command a user can run alone. A part that dies is started again after a pause that doubles;
all parts die with this process, whatever kills it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingest.child import die_with_parent
from tidegate.errors import TidegateError

PAUSE_SECONDS_FIRST = 1.0
PAUSE_SECONDS_MAX = 30.0
# A part that lived this long was healthy: its next death starts with the first pause again.
HEALTHY_SECONDS = 60.0
# A round checkpoints and a block is left unsealed within this; then SIGKILL, from which all parts recover.
STOP_SECONDS = 20.0


@dataclass
class Part:
    """One child process: its command, its log file, and how often it was started."""

    name: str
    command: Sequence[str]
    log: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None
    started_at: float = 0.0
    pause_seconds: float = PAUSE_SECONDS_FIRST

    @property
    def running(self) -> bool:
        """Whether the child is alive."""
        return self.process is not None and self.process.poll() is None


def tidegate_command(workspace: Path, *arguments: str) -> list[str]:
    """The command line of a part, by this very interpreter."""
    return [sys.executable, "-m", "tidegate", "--workspace", str(workspace), *arguments]


class Supervisor:
    """Starts parts in order, tells their events, restarts what dies, stops all in reverse order."""

    def __init__(self, parts: Sequence[Part], say: Callable[[str], None]) -> None:
        self.parts = list(parts)
        self._say = say
        self._stopping = threading.Event()

    def start(self, part: Part) -> None:
        """Start one part and a thread that reads what it says."""
        part.log.parent.mkdir(parents=True, exist_ok=True)
        part.process = subprocess.Popen(
            part.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **part.environ, "PYTHONUNBUFFERED": "1"},
            preexec_fn=die_with_parent,  # noqa: PLW1509 - only prctl is called, no lock is taken
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the parts in order
        )
        part.started_at = time.monotonic()
        threading.Thread(target=self._follow, args=(part, part.process), daemon=True).start()

    def _follow(self, part: Part, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None  # noqa: S101 - PIPE was asked for
        with process.stdout as lines, part.log.open("a", encoding="utf-8") as log:
            for line in lines:
                log.write(line)
                log.flush()
                if text := readable(line):
                    self._say(f"{time.strftime('%H:%M:%S')}  {part.name:<10} {text}")

    def watch(self, until: Callable[[], bool]) -> None:
        """Restart what dies until `until()` is true or :meth:`stop` was called."""
        while not self._stopping.is_set() and not until():
            for part in self.parts:
                if part.process is not None and not part.running:
                    self._restart(part)
            time.sleep(0.2)

    def _restart(self, part: Part) -> None:
        code = part.process.returncode if part.process else None
        if time.monotonic() - part.started_at > HEALTHY_SECONDS:
            part.pause_seconds = PAUSE_SECONDS_FIRST
        self._say(
            f"{time.strftime('%H:%M:%S')}  {part.name:<10} ended with code {code}; "
            f"again in {part.pause_seconds:.0f} s; its log: {part.log}"
        )
        if not self._stopping.wait(part.pause_seconds):
            part.pause_seconds = min(part.pause_seconds * 2, PAUSE_SECONDS_MAX)
            self.start(part)

    def wait_ready(self, part: Part, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until a part answers.

        Raises:
            TidegateError: it ended, or did not answer in time.
        """
        deadline = time.monotonic() + seconds
        while not ready():
            if not part.running:
                tail = " | ".join(part.log.read_text(encoding="utf-8").strip().splitlines()[-2:])
                raise TidegateError(f"{part.name}: ended before it was ready: {tail}")
            if time.monotonic() > deadline:
                raise TidegateError(f"{part.name}: not ready after {seconds:.0f} s; see {part.log}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End all parts, the last started first: SIGTERM, then SIGKILL for what does not end."""
        self._stopping.set()
        for part in reversed(self.parts):
            if part.running and part.process is not None:
                part.process.send_signal(signal.SIGTERM)
                try:
                    part.process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    part.process.kill()
                    part.process.wait()


def readable(line: str) -> str:
    """One line of a part's log for people: a JSON event as `event key=value`, other lines as they are."""
    text = line.rstrip()
    try:
        event: Any = json.loads(text)
    except ValueError:
        return text
    if not isinstance(event, dict) or "event" not in event:
        return text
    what = str(event.pop("event"))
    level = event.pop("level", "info")
    event.pop("timestamp", None)
    rest = " ".join(f"{key}={value}" for key, value in event.items())
    mark = "" if level == "info" else f"{str(level).upper()} "
    return f"{mark}{what} {rest}".rstrip()
