"""Pause and the kill switch, as an operator uses them: durable, recorded, shown."""

import json
import threading

import pytest
from click.testing import CliRunner

from registry.page import events_of
from registry.states import PRODUCTION
from tests.tidegate.streams import STREAM, seal, workspace
from tidegate import cycle, switches
from tidegate.cli import cli
from tidegate.errors import RoundRefused, UnknownName
from tidegate.hooks import decision
from tidegate.scheduler import Ran, keep_schedule, trigger_of
from tidegate.status import rounds_now


@pytest.fixture
def service(tmp_path):
    made = workspace(tmp_path / "ws")
    seal(made, 1)
    made.signer("approvals")
    return made


def tidegate(service, *words):
    done = CliRunner().invoke(cli, ["--workspace", str(service.workspace.root), *words])
    assert done.exit_code == 0, done.output
    return done.output


def test_no_round_of_a_paused_stream_begins_by_hand_or_by_schedule(service):
    told = tidegate(service, "pause", STREAM, "--why", "audit", "--who", "ada")
    assert "no round begins" in told
    with pytest.raises(RoundRefused, match="by ada: audit"):
        cycle.run(service, STREAM)
    assert not service.ledger.rows(STREAM)
    ran, stop = [], threading.Event()

    def run(stream):
        ran.append(stream)
        stop.set()
        return Ran("ended")

    def schedule(seconds):
        timer = threading.Timer(seconds, stop.set)
        timer.start()
        keep_schedule(service.workspace, {STREAM: trigger_of("", 0.2)}, run, stop)
        timer.cancel()
        stop.clear()

    schedule(3.5)
    assert ran == []
    alarms = []
    assert "by ada: audit" in rounds_now(service, STREAM, alarms)["paused"]
    tidegate(service, "resume", STREAM, "--why", "audit over", "--who", "ada")
    assert "paused" not in rounds_now(service, STREAM, alarms)
    schedule(20)
    assert ran == [STREAM], "it waited for its turn all the while"
    kept = [(e["what"], e["who"], e["why"]) for e in switches.entries(service.workspace)]
    assert kept == [("pause", "ada", "audit"), ("resume", "ada", "audit over")]


def test_a_pause_that_cannot_be_read_is_one(service):
    switches.pause(service, STREAM, who="ada", why="audit")
    switches.paused_file(service.workspace, STREAM).write_text("{")
    with pytest.raises(RoundRefused, match="cannot be read"):
        cycle.run(service, STREAM)


def test_only_streams_that_exist_are_switched(service):
    for switch in (switches.pause, switches.resume, switches.kill, switches.unkill):
        with pytest.raises(UnknownName):
            switch(service, "nobody", who="ada", why="")


def test_the_kill_switch_is_signed_into_the_history_at_once_and_moves_nothing(service):
    service.approvals(signing=True).append(
        model=STREAM, version=3, adapter_sha256="d" * 64, from_stage="Staging", to_stage=PRODUCTION, who="ada", why="",
        kind="promote",
    )  # fmt: skip
    assert "signed history" in tidegate(service, "kill", STREAM, "--why", "it swears", "--who", "pat")
    assert switches.kill_switch(service, STREAM).on
    assert "is on already" in switches.kill(service, STREAM, who="pat", why="again")
    assert "signed history" in tidegate(service, "unkill", STREAM, "--why", "false alarm", "--who", "pat")
    assert not switches.kill_switch(service, STREAM).on
    history = service.approvals().history(STREAM)
    assert [(r["kind"], r["who"], r["why"]) for r in history[1:]] == [
        ("kill", "pat", "it swears"),
        ("unkill", "pat", "false alarm"),
    ]
    assert service.approvals().verify(service.trusted("approvals")) == 3
    assert service.approvals().standing(STREAM).live["version"] == 3
    assert [e.what for e in events_of(history, [])][:2] == ["kill switch off", "kill switch on: the bare base answers"]
    assert decision(service, STREAM, history[0]).type == "promoted"


def test_what_could_not_be_signed_is_signed_when_it_can_be(service):
    key = service.keys_dir / "approvals.pem"
    away = key.rename(key.with_suffix(".away"))
    assert "as soon as it can be signed" in switches.kill(service, STREAM, who="pat", why="it swears")
    assert switches.kill_switch(service, STREAM).on, "a key elsewhere keeps nobody from killing"
    (entry,) = switches.entries(service.workspace)
    assert service.approvals().history(STREAM) == []
    away.rename(key)
    assert switches.settle(service) == 0
    assert switches.settle(service) == 0
    (row,) = service.approvals().history(STREAM)
    assert (row["kind"], row["when"], row["why"]) == ("kill", entry["when"], "it swears")


def test_a_damaged_line_of_the_log_hides_no_other(service):
    switches.kill(service, STREAM, who="pat", why="x")
    with (service.workspace.root / switches.LOG).open("a") as log:
        log.write('{"half\n[1]\n' + json.dumps({"what": "kill"}) + "\n")
    assert [e["what"] for e in switches.entries(service.workspace)] == ["kill", "signed"]
