"""Rounds on a schedule (APScheduler): one job a stream, one round at a time on this machine.

A round runs as a child process, so that a crash or a leak of one never takes the schedule with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import structlog

from ingest.child import die_with_parent
from tidegate.supervisor import tidegate_command
from tidegate.wiring import Service

log = structlog.get_logger()

# The first look comes soon after start: a block may have been waiting for hours.
FIRST_SECONDS = 2.0


class RoundRunner:
    """Runs `tidegate round STREAM --quiet` and ends it when asked to stop."""

    def __init__(self, service: Service, stop: threading.Event) -> None:
        self._service = service
        self._stop = stop

    def __call__(self, stream: str) -> None:
        """Run one round to its end, or until the stop event; a stopped round resumes from its checkpoint."""
        if self._stop.is_set():
            return
        child = subprocess.Popen(
            tidegate_command(self._service.workspace.root, "round", stream, "--quiet"),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            stderr=sys.stderr,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - only prctl is called, no lock is taken
            env=os.environ.copy(),
        )
        while child.poll() is None:
            if self._stop.wait(0.5):
                child.send_signal(signal.SIGTERM)
                child.wait()
                return
        if child.returncode:
            log.error("round failed", stream=stream, code=child.returncode, way_out=f"tidegate round {stream}")


def run_schedule(service: Service, stop: threading.Event) -> None:
    """Run every stream's rounds at its interval until `stop` is set."""
    from datetime import UTC, datetime, timedelta

    from apscheduler.executors.pool import ThreadPoolExecutor
    from apscheduler.schedulers.background import BackgroundScheduler

    # One thread: two rounds at once on one machine would each take more than twice as long.
    scheduler: Any = BackgroundScheduler(executors={"default": ThreadPoolExecutor(1)}, timezone=UTC)
    runner = RoundRunner(service, stop)
    for name, stream in service.settings.streams.items():
        scheduler.add_job(
            runner,
            "interval",
            args=[name],
            id=f"round-{name}",
            seconds=stream.learner.schedule_seconds,
            next_run_time=datetime.now(UTC) + timedelta(seconds=FIRST_SECONDS),
            max_instances=1,
            coalesce=True,
            misfire_grace_time=None,  # a late round is still wanted
        )
        log.info("scheduled", stream=name, every_seconds=stream.learner.schedule_seconds)
    scheduler.start()
    stop.wait()
    scheduler.shutdown(wait=True)
