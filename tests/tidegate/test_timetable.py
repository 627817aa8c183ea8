"""Turns on one machine, in a simulated day: who is next, who was late, and what a restart must not forget."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from tidegate.timetable import STUCK_MAX, Timetable, read, text_of

BEGIN = datetime(2026, 1, 5, tzinfo=UTC)


class Day:
    """A clock, and streams that fall due by intervals and run for so many minutes."""

    def __init__(self, file, minutes):
        self.file, self.minutes, self.now = file, minutes, BEGIN
        self.due = {name: BEGIN + timedelta(minutes=every) for name, (every, _) in minutes.items()}
        self.table = self.open()
        self.log, self.waits = [], {}
        for name, when in self.due.items():
            self.table.planned(name, when)

    def open(self):
        return Timetable(self.file, list(self.minutes), now=lambda: self.now)

    def pass_until(self, then):
        """Let time pass; what falls due meanwhile is told the table, as APScheduler does."""
        while (name := min(self.due, key=self.due.get)) and self.due[name] <= then:
            self.now = self.due[name]
            self.table.fall_due(name)
            if self.table.turn(name).waiting_since:
                self.waits.setdefault(name, self.now)
            self.due[name] += timedelta(minutes=self.minutes[name][0])
            self.table.planned(name, self.due[name])
        self.now = then

    def run(self, hours):
        end = BEGIN + timedelta(hours=hours)
        while self.now < end:
            name = self.table.take(lambda _name: True)
            if name is None:
                self.pass_until(min(self.due.values()))
                continue
            self.log.append((name, self.waits.pop(name), self.now))
            self.pass_until(self.now + timedelta(minutes=self.minutes[name][1]))
            self.table.ended(name, "version 1")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "schedule.json"


def test_a_stream_of_hour_long_rounds_makes_another_wait_for_one_round_at_most(file):
    day = Day(file, {"a-long": (10, 60), "quick": (10, 1)})
    day.run(hours=12)
    names = [name for name, *_ in day.log]
    assert all(names[i : i + 2] != ["a-long", "a-long"] for i in range(len(names) - 1))
    assert min(Counter(names).values()) >= 10


def test_neither_names_nor_short_rounds_decide_who_is_next(file):
    day = Day(file, {"c": (30, 20), "a": (30, 5), "b": (30, 40), "d": (30, 20)})
    day.run(hours=12)
    assert require_turns(day.log) > 5


def require_turns(log):
    """While a stream waits, no other has a second round; answers how often somebody had to wait."""
    waited = 0
    for name, due, began in log:
        others = Counter(other for other, _, when in log if other != name and due < when < began)
        assert all(count == 1 for count in others.values()), (name, due, began, others)
        waited += bool(others)
    return waited


def test_by_name_another_would_starve(file, monkeypatch):
    """Negative control: the same day with the waiting streams taken in the order of their names."""

    def by_name(table, able):
        waiting = sorted(name for name, turn in table._turns.items() if turn.waiting_since and able(name))
        if waiting:
            table._change(waiting[0], waiting_since="", running_since=text_of(table._now()))
        return waiting[0] if waiting else None

    monkeypatch.setattr(Timetable, "take", by_name)
    day = Day(file, {"a": (10, 15), "b": (10, 15), "z": (10, 1)})
    day.run(hours=12)
    assert {name for name, *_ in day.log} == {"a", "b"}


def test_a_late_round_is_told_with_when_it_was_due(file):
    day = Day(file, {"long": (10, 45), "late": (12, 1)})
    day.run(hours=1)
    turn = day.table.turn("late")
    assert turn.late == f"a round that was due at {text_of(BEGIN + timedelta(minutes=12))} ran late by 43 min"


def test_a_time_that_comes_while_the_round_still_runs_is_left_out_and_told(file):
    day = Day(file, {"long": (10, 45)})
    day.pass_until(BEGIN + timedelta(minutes=10))
    assert day.table.take(lambda _name: True) == "long"
    day.pass_until(BEGIN + timedelta(minutes=35))
    assert "due at 2026-01-05T00:20:00Z while that of 2026-01-05T00:10:00Z still ran" in day.table.turn("long").overlap
    day.table.ended("long", "version 1")
    assert day.table.take(lambda _name: True) is None, "one time, one round"


def test_a_restart_forgets_no_turn_and_lets_an_interrupted_round_go_on_first(file):
    day = Day(file, {"a": (10, 60), "b": (20, 60), "c": (30, 60)})
    day.pass_until(BEGIN + timedelta(minutes=25))
    assert day.table.take(lambda _name: True) == "a"
    day.pass_until(BEGIN + timedelta(minutes=31))
    day.minutes.pop("c")
    day.now += timedelta(hours=5)
    day.table = day.open()
    assert [turn.stream for turn in read(file)] == ["a", "b"], "a stream that is gone from the settings is forgotten"
    assert day.table.turn("a").last_outcome == "interrupted"
    assert day.table.take(lambda _name: True) == "b", "it waits since minute 20, the other began at 25"
    assert day.table.turn("b").late.endswith("late by 5 h 11 min")


def test_stuck_rounds_are_counted_in_a_row(file):
    table = Timetable(file, ["a"])
    counts = [table.ended("a", "stuck", stuck=True) for _ in range(STUCK_MAX)]
    assert counts == [1, 2, 3]
    assert table.ended("a", "version 1") == 0


def test_a_file_that_is_not_whole_begins_anew(file):
    file.write_text('{"streams": [{"stream": "a", "next_')
    assert read(file) == []
    assert Timetable(file, ["a"]).turn("a").next_due == ""
