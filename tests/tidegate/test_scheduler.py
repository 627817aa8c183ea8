"""The schedule with real processes: it survives restarts, kills what is stuck, holds what stays stuck, and tells."""

import json
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from tests.tidegate.streams import STREAM, workspace
from tidegate import heartbeat, scheduler, timetable
from tidegate.errors import ConfigError, TidegateError
from tidegate.locks import Held, alone, is_held
from tidegate.scheduler import Ran, RoundRunner, keep_schedule, trigger_of
from tidegate.status import rounds_now
from tidegate.workspace import Workspace

# A round without training: beats a few times, then does as it is told.
ROUND = """
import json, os, pathlib, sys, time
beats, how = pathlib.Path(sys.argv[1]), sys.argv[2]
for step in range(3):
    beats.with_suffix(".partial").write_text(json.dumps({"pid": os.getpid(), "what": "train", "done": step, "of": 20}))
    beats.with_suffix(".partial").replace(beats)
    time.sleep(0.15)
if how == "hang":
    import subprocess
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    time.sleep(60)
if how == "fail":
    beats.write_text(json.dumps({"pid": os.getpid(), "ended": "failed: blocks b1 cannot pay"}))
    sys.exit(1)
if how == "die":
    os.kill(os.getpid(), 9)
beats.write_text(json.dumps({"pid": os.getpid(), "ended": "version 3: passed, now candidate"}))
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "run").mkdir()
    return Workspace(tmp_path)


def runner(place, how, stuck_seconds=30.0, stop=None):
    def command(stream):
        return [sys.executable, "-c", ROUND, str(heartbeat.beat_file(place, stream)), how]

    return RoundRunner(
        command, lambda stream: heartbeat.beat_file(place, stream), lambda _s: stuck_seconds, stop or threading.Event()
    )


@contextmanager
def scheduled(place, run, **triggers):
    """The schedule on a thread of its own."""
    stop, trouble = threading.Event(), []

    def keep():
        try:
            keep_schedule(place, triggers, run, stop)
        except BaseException as error:  # noqa: BLE001 - told by the test's own thread
            trouble.append(error)

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        wait(lambda: trouble or (is_held(place.run / timetable.LOCK) and scheduler._open))
        yield trouble
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def wait(done, seconds=30):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)


def jobs(place):
    with sqlite3.connect(place.root / "schedule.db") as db:
        return dict(db.execute("select id, next_run_time from apscheduler_jobs"))


def turn(place, stream):
    return next(t for t in timetable.read(place.run / timetable.FILE) if t.stream == stream)


def nothing(_stream):
    return Ran("nothing new")


def in_seconds(when):
    return when - datetime.now(UTC).timestamp()


def test_the_next_time_of_a_stream_survives_a_restart(place, monkeypatch):
    monkeypatch.setattr(scheduler, "FIRST_SECONDS", 1000.0)
    with scheduled(place, nothing, a=trigger_of("", 3600.0)):
        first = jobs(place)["a"]
        assert 990 < in_seconds(first) < 1001
    monkeypatch.setattr(scheduler, "FIRST_SECONDS", 2.0)
    with scheduled(place, nothing, a=trigger_of("", 3600.0)):
        assert jobs(place)["a"] == first
    assert turn(place, "a").next_due == timetable.text_of(datetime.fromtimestamp(first, UTC))
    assert turn(place, "a").last_outcome == "", "it did not run just because the process started"


def test_a_changed_interval_reschedules_and_a_removed_stream_is_forgotten(place, monkeypatch):
    monkeypatch.setattr(scheduler, "FIRST_SECONDS", 1000.0)
    with scheduled(place, nothing, a=trigger_of("", 3600.0), b=trigger_of("0 3 * * *", 1.0)):
        assert set(jobs(place)) == {"a", "b"}
    with scheduled(place, nothing, a=trigger_of("", 50.0)):
        assert set(jobs(place)) == {"a"}
        assert 45 < in_seconds(jobs(place)["a"]) < 51
    with pytest.raises(StopIteration):
        turn(place, "b")


def test_a_time_that_passed_while_nothing_ran_becomes_one_late_round(place, monkeypatch):
    monkeypatch.setattr(scheduler, "FIRST_SECONDS", 1000.0)
    with scheduled(place, nothing, a=trigger_of("", 600.0)):
        pass
    missed = (datetime.now(UTC) - timedelta(hours=2)).timestamp()
    with sqlite3.connect(place.root / "schedule.db") as db:
        state = pickle.loads(db.execute("select job_state from apscheduler_jobs").fetchone()[0])  # noqa: S301 - our own
        state["next_run_time"] = datetime.fromtimestamp(missed, UTC)
        db.execute("update apscheduler_jobs set next_run_time = ?, job_state = ?", (missed, pickle.dumps(state)))
    ran = []
    with scheduled(place, lambda stream: (ran.append(stream), Ran("version 1"))[1], a=trigger_of("", 600.0)):
        wait(lambda: turn(place, "a").last_outcome == "version 1")
        time.sleep(0.5)
    due = timetable.text_of(datetime.fromtimestamp(missed, UTC))
    assert ran == ["a"], "twelve times were missed, one round makes up for them"
    assert turn(place, "a").late.startswith(f"a round that was due at {due} ran late by 2 h")


def test_two_schedules_of_one_workspace_never_run_at_once(place):
    hourly = {"a": trigger_of("", 3600.0)}
    with scheduled(place, nothing, **hourly), scheduled(place, nothing, **hourly) as second:
        wait(lambda: second)
        assert isinstance(second[0], TidegateError)
        assert "its schedule runs already (pid" in str(second[0])


def test_a_round_that_moves_is_left_alone_and_one_that_does_not_is_killed_with_all_it_started(place):
    assert runner(place, "end", stuck_seconds=5.0)("a").outcome == "version 3: passed, now candidate"
    ran = runner(place, "hang", stuck_seconds=1.5)("a")
    assert ran.stuck
    assert ran.outcome == "stuck at train 2 of 20: nothing moved for 1.5 s, so it was killed"
    pid = heartbeat.read(heartbeat.beat_file(place, "a")).pid
    wait(lambda: not in_group(pid))


def in_group(pid):
    listed = subprocess.run(["ps", "-e", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.split()[0] == str(pid) and not line.split()[1].startswith("Z")]


@pytest.mark.parametrize(
    ("how", "told"),
    [("fail", "failed: blocks b1 cannot pay"), ("die", "failed: its process was killed by SIGKILL")],
)
def test_what_a_failed_round_said_is_what_is_told(place, how, told):
    assert runner(place, how)("a") == Ran(told)


def test_after_three_stuck_rounds_in_a_row_the_stream_is_held_until_one_ends_by_hand(tmp_path, monkeypatch):
    service = workspace(tmp_path / "ws")
    place = service.workspace
    monkeypatch.setattr(scheduler, "FIRST_SECONDS", 0.0)
    hung = runner(place, "hang", stuck_seconds=0.3)
    with scheduled(place, hung, **{STREAM: trigger_of("", 0.1)}):
        wait(lambda: turn(place, STREAM).stuck == 1)
        alarms = []
        rounds_now(service, STREAM, alarms)
        assert any("got stuck at train" in alarm and "goes on from its checkpoint" in alarm for alarm in alarms)
        wait(lambda: heartbeat.hold_file(place, STREAM).exists())
        began = turn(place, STREAM).last_began
        time.sleep(1.0)
        assert turn(place, STREAM).last_began == began, "a held stream has no rounds"
    alarms = []
    told = rounds_now(service, STREAM, alarms)
    assert told["held"].startswith("3 rounds in a row got stuck; the last: stuck at train 2 of 20")
    assert any(f"run `tidegate round {STREAM}` and watch it" in alarm for alarm in alarms)
    from tidegate import cycle

    assert cycle.run(service, STREAM).reason == "no block is sealed yet"
    assert not heartbeat.hold_file(place, STREAM).exists()
    with scheduled(place, runner(place, "end"), **{STREAM: trigger_of("", 0.1)}):
        wait(lambda: turn(place, STREAM).last_outcome.startswith("version 3"))
    assert turn(place, STREAM).stuck == 0
    alarms = []
    assert rounds_now(service, STREAM, alarms)["last_outcome"] == "version 3: passed, now candidate"


def test_a_stopped_schedule_ends_its_round_and_begins_with_it_the_next_time(place, monkeypatch):
    monkeypatch.setattr(scheduler, "FIRST_SECONDS", 0.0)
    stop = threading.Event()
    thread = threading.Thread(
        target=keep_schedule, args=(place, {"a": trigger_of("", 600.0)}, runner(place, "hang", stop=stop), stop)
    )
    thread.start()
    wait(lambda: heartbeat.read(heartbeat.beat_file(place, "a")))
    stop.set()
    thread.join(30)
    assert turn(place, "a").last_outcome == "stopped"
    assert turn(place, "a").waiting_since
    with scheduled(place, nothing, a=trigger_of("", 600.0)):
        wait(lambda: turn(place, "a").last_outcome == "nothing new")


def test_status_says_when_nothing_runs_the_schedule_though_a_round_is_due(tmp_path):
    service = workspace(tmp_path / "ws")
    table = timetable.Timetable(service.workspace.run / timetable.FILE, [STREAM])
    table.planned(STREAM, datetime(2026, 1, 5, tzinfo=UTC))
    alarms = []
    assert rounds_now(service, STREAM, alarms)["next_due"] == "2026-01-05T00:00:00Z"
    told = "a round was due at 2026-01-05T00:00:00Z, but nothing runs the schedule; start `tidegate learn`"
    assert alarms == [f"{STREAM}: {told} (docs/runbook.md#overdue)"]
    with alone(service.workspace.run / timetable.LOCK):
        alarms = []
        rounds_now(service, STREAM, alarms)
        assert alarms == []


def test_a_running_round_shows_its_step_and_a_failed_one_its_reason(tmp_path):
    service = workspace(tmp_path / "ws")
    place = service.workspace
    file = heartbeat.beat_file(place, STREAM)
    with alone(heartbeat.lock_file(place, STREAM)), heartbeat.beating(file, lambda *_: None) as tell:
        tell("train", 7, 20)
        assert rounds_now(service, STREAM, [])["runs"].startswith("train 7 of 20, since 20")
    assert "runs" not in rounds_now(service, STREAM, [])
    with pytest.raises(ValueError, match="no"), heartbeat.beating(file, lambda *_: None):
        raise ValueError("no\nroom")
    assert heartbeat.read(file).ended == "failed: no room"
    assert set(json.loads(file.read_text())) == {"pid", "what", "done", "of", "at", "ended"}


def test_a_lock_is_let_go_by_the_kernel(tmp_path):
    file = tmp_path / "run" / "x.lock"
    code = "import sys, time, pathlib, tidegate.locks as l\nwith l.alone(pathlib.Path(sys.argv[1])): time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(file)]) as child:
        wait(lambda: is_held(file))
        with pytest.raises(Held) as held, alone(file):
            pass
        assert held.value.pid == str(child.pid)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not is_held(file)
    with alone(file):
        assert is_held(file)


@pytest.mark.parametrize(
    ("cron", "match"),
    [
        ("0 3 * *", "must have 5 fields"),
        ("0 25 * * *", "25"),
        ("0 3 * * 0", "weekdays must be named"),
        ("x * * * *", "x"),
    ],
)
def test_a_cron_line_that_could_surprise_is_refused(cron, match):
    with pytest.raises(ConfigError, match=match):
        trigger_of(cron, 1.0)


def test_a_cron_line_names_times_in_utc():
    trigger = trigger_of("30 3 * * mon-fri", 1.0)
    friday = datetime(2026, 1, 9, 12, tzinfo=UTC)
    assert trigger.get_next_fire_time(None, friday) == datetime(2026, 1, 12, 3, 30, tzinfo=UTC)
