"""Rounds on a schedule: APScheduler says when each stream is due, and keeps that over restarts; one round at a time.

A round runs as a child process, so that a crash or a leak of one never takes the schedule with it. Due streams take
turns by who waits longest (`timetable.py`). A round that shows no progress is killed, and goes on from its checkpoint
the next time; a stream whose rounds get stuck again and again is held until somebody has looked.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import structlog

from ingest.child import die_with_parent
from tidegate.errors import ConfigError, TidegateError
from tidegate.heartbeat import beat_file, hold_file, read
from tidegate.locks import Held, alone
from tidegate.supervisor import tidegate_command
from tidegate.switches import paused
from tidegate.timetable import FILE, LOCK, STUCK_MAX, Timetable, text_of
from tidegate.workspace import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tidegate.wiring import Service
    from tidegate.workspace import Workspace

log = structlog.get_logger()

# A stream that was never scheduled has its first round soon: a block may have been waiting for hours.
FIRST_SECONDS = 2.0
# A round takes what others leave: at 10 a busy core gives it a tenth of what it gives to who is at 0.
ROUND_NICE = 10
# How often a running round and the stop event are looked at.
LOOK_SECONDS = 0.2
# A round ends at once when it is asked to; one that hangs where no signal reaches it is killed.
STOP_SECONDS = 10.0
CRON_FIELDS = 5

# Jobs are kept as a reference to `fall_due` and a stream's name, because what is kept on disk cannot hold an object:
# this is where a job finds the schedule of its own process.
_open: list[_Schedule] = []


@dataclass(frozen=True)
class Ran:
    """How a round's process ended."""

    outcome: str
    stuck: bool = False
    stopped: bool = False


@dataclass(frozen=True)
class RoundRunner:
    """Runs a stream's round in a process group of its own, and watches its heartbeat.

    Attributes:
        command: the command line of a stream's round.
        beats: where its heartbeat is left.
        stuck_seconds: how long nothing may move.
        stop: ends the round that runs; it resumes from its checkpoint.
    """

    command: Callable[[str], Sequence[str]]
    beats: Callable[[str], Path]
    stuck_seconds: Callable[[str], float]
    stop: threading.Event

    def __call__(self, stream: str) -> Ran:
        """Run one round to its end, until it is stuck, or until the stop event."""
        child = subprocess.Popen(
            self.command(stream),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            stderr=sys.stderr,
            preexec_fn=_in_the_background,  # noqa: PLW1509 - two system calls, no lock is taken
            start_new_session=True,
            env=os.environ.copy(),
        )
        seen, moved = self._mark(stream), time.monotonic()
        while child.poll() is None:
            if self.stop.wait(LOOK_SECONDS):
                _end(child)
                return Ran("stopped", stopped=True)
            if (mark := self._mark(stream)) != seen:
                seen, moved = mark, time.monotonic()
            elif time.monotonic() - moved > self.stuck_seconds(stream):
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                return Ran(self._stuck(stream), stuck=True)
        return Ran(self._outcome(stream, child.pid, child.returncode))

    def _mark(self, stream: str) -> int:
        """Changes with each heartbeat."""
        try:
            return self.beats(stream).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _stuck(self, stream: str) -> str:
        beat = read(self.beats(stream))
        where = f" at {beat.what} {beat.done} of {beat.of}" if beat and beat.what else ""
        log.error("round stuck", stream=stream, stuck_seconds=self.stuck_seconds(stream), where=where.strip())
        return f"stuck{where}: nothing moved for {self.stuck_seconds(stream):g} s, so it was killed"

    def _outcome(self, stream: str, pid: int, code: int) -> str:
        beat = read(self.beats(stream))
        said = beat.ended if beat and beat.pid == pid else ""
        if code == 0:
            return said or "ended"
        how = f"ended with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
        log.error("round failed", stream=stream, code=code, way_out=f"tidegate round {stream}")
        return said or f"failed: its process {how}"


def _in_the_background() -> None:
    """In the child: it ends with its parent, and whoever waits for an answer or a block on this machine comes first."""
    die_with_parent()
    os.nice(ROUND_NICE)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def fall_due(stream: str) -> None:
    """What a job does: the stream waits for its turn. Called by APScheduler, by this name."""
    for schedule in _open:
        schedule.fall_due(stream)


class _Schedule:
    """The jobs of a workspace's streams in APScheduler, and the timetable they fill."""

    def __init__(self, url: str, timetable: Timetable) -> None:
        from apscheduler.events import EVENT_JOB_SUBMITTED
        from apscheduler.executors.debug import DebugExecutor
        from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
        from apscheduler.schedulers.background import BackgroundScheduler

        self._timetable = timetable
        self._scheduler: Any = BackgroundScheduler(
            jobstores={"default": SQLAlchemyJobStore(url=url)},
            # A job takes a moment, and on the scheduler's own thread: none waits for a lock that a shutdown holds.
            executors={"default": DebugExecutor()},
            job_defaults={
                "max_instances": 1,
                "coalesce": True,  # however many times were missed: one round
                "misfire_grace_time": None,  # a late round is still wanted
            },
            timezone=UTC,
        )
        # Told when the jobs that were due have been moved to their next times.
        self._scheduler.add_listener(lambda event: self._note(event.job_id), EVENT_JOB_SUBMITTED)

    def fall_due(self, stream: str) -> None:
        """Let a stream wait for its turn."""
        self._timetable.fall_due(stream)

    def start(self, triggers: Mapping[str, Any]) -> None:
        """Take up the jobs that are kept: new streams are added, changed ones rescheduled, others removed."""
        self._scheduler.start(paused=True)
        for job in self._scheduler.get_jobs():
            if job.id not in triggers:
                self._scheduler.remove_job(job.id)
                log.info("unscheduled", stream=job.id)
        for stream, trigger in triggers.items():
            self._place(stream, trigger)
            self._note(stream)
            next_due = self._timetable.turn(stream).next_due
            log.info("scheduled", stream=stream, when=str(trigger), next_due=next_due)
        _open.append(self)
        self._scheduler.resume()

    def _place(self, stream: str, trigger: Any) -> None:
        job = self._scheduler.get_job(stream)
        if job is None:
            first = datetime.now(UTC) + timedelta(seconds=FIRST_SECONDS)
            self._scheduler.add_job(f"{__name__}:fall_due", trigger, args=[stream], id=stream, next_run_time=first)
        elif str(job.trigger) != str(trigger):
            self._scheduler.reschedule_job(stream, trigger=trigger)
            log.info("rescheduled", stream=stream, was=str(job.trigger), now=str(trigger))

    def _note(self, stream: str) -> None:
        job = self._scheduler.get_job(stream)
        self._timetable.planned(stream, job.next_run_time if job else None)

    def stop(self) -> None:
        """Stop falling due; what is kept stays."""
        _open.remove(self)
        self._scheduler.shutdown(wait=True)


def run_schedule(service: Service, stop: threading.Event) -> None:
    """Run every stream's rounds when they are due, until `stop` is set.

    Raises:
        TidegateError: another process runs the schedule of this workspace.
    """
    workspace = service.workspace
    streams = service.settings.streams
    runner = RoundRunner(
        command=lambda stream: tidegate_command(workspace.root, "round", stream, "--quiet"),
        beats=lambda stream: beat_file(workspace, stream),
        stuck_seconds=lambda stream: streams[stream].learner.stuck_seconds,
        stop=stop,
    )
    triggers = {name: trigger_of(s.learner.schedule, s.learner.schedule_seconds) for name, s in streams.items()}
    keep_schedule(workspace, triggers, runner, stop)


def keep_schedule(
    workspace: Workspace, triggers: Mapping[str, Any], run: Callable[[str], Ran], stop: threading.Event
) -> None:
    """Let streams fall due by their triggers, and run one round at a time, until `stop` is set.

    Raises:
        TidegateError: another process does that for this workspace.
    """
    try:
        with alone(workspace.run / LOCK):
            timetable = Timetable(workspace.run / FILE, list(triggers))
            schedule = _Schedule(workspace.sqlite("schedule.db"), timetable)
            schedule.start(triggers)
            try:
                while not stop.is_set():
                    stream = timetable.take(lambda name: _able(workspace, timetable, name))
                    if stream is None:
                        stop.wait(LOOK_SECONDS)
                    else:
                        _run_one(workspace, timetable, stream, run)
            finally:
                schedule.stop()
    except Held as held:
        raise TidegateError(
            f"workspace={workspace.root}: its schedule runs already (pid {held.pid}); stop that one first"
        ) from None


def _able(workspace: Workspace, timetable: Timetable, stream: str) -> bool:
    if hold_file(workspace, stream).exists() or paused(workspace, stream):
        return False
    if timetable.turn(stream).stuck >= STUCK_MAX:  # it was held, and no longer is
        timetable.forget_stuck(stream)
    return True


def _run_one(workspace: Workspace, timetable: Timetable, stream: str, run: Callable[[str], Ran]) -> None:
    ran = run(stream)
    if ran.stopped:
        timetable.put_back(stream)
        return
    if timetable.ended(stream, ran.outcome, stuck=ran.stuck) >= STUCK_MAX:
        reason = f"{STUCK_MAX} rounds in a row got stuck; the last: {ran.outcome}"
        write_json(hold_file(workspace, stream), {"reason": reason, "at": text_of(datetime.now(UTC))})
        log.error("stream held", stream=stream, reason=reason, way_out=f"tidegate round {stream}")


def trigger_of(cron: str, seconds: float) -> Any:
    """An APScheduler trigger: by cron where it is given, else every so many seconds.

    Raises:
        ConfigError: the cron expression says nothing that can be kept.
    """
    from apscheduler.triggers.cron import CronTrigger
    from apscheduler.triggers.interval import IntervalTrigger

    if not cron:
        return IntervalTrigger(seconds=seconds, timezone=UTC)
    fields = cron.split()
    if len(fields) != CRON_FIELDS:
        raise ConfigError(
            f"learner.schedule={cron!r}: must have {CRON_FIELDS} fields: minute hour day month weekday, in UTC"
        )
    if any(letter.isdigit() for letter in fields[-1].partition("/")[0]):
        # cron's 0 is Sunday, APScheduler's is Monday: neither would surprise nobody.
        raise ConfigError(f"learner.schedule={cron!r}: weekdays must be named, like mon-fri; their numbers differ")
    try:
        return CronTrigger.from_crontab(cron, timezone=UTC)
    except ValueError as error:
        raise ConfigError(
            f"learner.schedule={cron!r}: {error}; five fields as in crontab, like '0 3 * * mon'"
        ) from None
