"""The doctor on workspaces with one fault each, made on purpose."""

import json
import os
import time

import pytest
from click.testing import CliRunner

from tests.tidegate.streams import STREAM, workspace
from tidegate import doctor, runbook, switches
from tidegate.cli import cli
from tidegate.config import load
from tidegate.wiring import Service, complete_workspace
from tidegate.workspace import Workspace


@pytest.fixture
def service(tmp_path):
    made = workspace(tmp_path / "ws")
    complete_workspace(made.workspace)
    return Service(made.workspace, load(made.workspace.params, {}))


def of(service, check, grade="bad"):
    return [f for f in doctor.CHECKS[check](service) if f.grade == grade]


def test_a_fresh_workspace_is_well_but_for_what_is_not_started(service):
    found = doctor.examine(service)
    assert [f.said for f in found if f.grade == "bad" and f.kind not in {"down", "broker"}] == []
    by = {f.check for f in found if f.grade == "bad"}
    assert by == {"broker", "mlflow", "server"}
    assert {f.check for f in found} == set(doctor.CHECKS) - {"clock", "switches", "alarms"} | {"broker"}
    assert all(f.kind in runbook.sections() and f.todo for f in found if f.grade != "ok")


def test_the_command_says_what_to_do_and_exits_with_1_while_something_is_bad(service):
    done = CliRunner().invoke(cli, ["-w", str(service.workspace.root), "doctor", "--json"])
    assert done.exit_code == 1
    told = json.loads(done.output)
    assert told["well"] is False
    assert any(f["see"] == "docs/runbook.md#down" for f in told["findings"])
    text = CliRunner().invoke(cli, ["-w", str(service.workspace.root), "doctor"]).output
    assert text.splitlines()[-2].startswith("BAD")
    assert "-> tidegate up" in text


def test_a_key_that_others_may_read(service):
    (service.keys_dir / "approvals.pem").chmod(0o644)
    (finding,) = of(service, "keys")
    assert finding.todo == f"chmod 600 {service.keys_dir / 'approvals.pem'}"
    for half in ("pem", "pub"):
        (service.keys_dir / f"verdicts.{half}").unlink(missing_ok=True)
    assert "verdicts.pem: is missing" in of(service, "keys")[1].said
    service.api_keys.write_text("{")
    service.api_keys.chmod(0o600)
    assert "the API lets nobody in" in of(service, "keys")[-1].said


def test_a_chain_that_was_changed(service):
    import sqlite3

    switches.kill(service, STREAM, who="pat", why="x")
    assert of(service, "chains") == []
    with sqlite3.connect(service.workspace.root / "approvals.db") as database:
        database.execute("UPDATE approvals SET signed = replace(signed, 'pat', 'eve')")
    database.close()
    (finding,) = [f for f in doctor.examine(service) if f.check == "chains" and f.grade == "bad"]
    assert "does not match its hash" in finding.said
    assert finding.kind == "ledger"


def test_a_disk_that_is_nearly_full(service, monkeypatch):
    monkeypatch.setattr(doctor, "DISK_NOTE_BYTES", 1 << 60)
    assert of(service, "disk", "note")
    monkeypatch.setattr(doctor, "DISK_BAD_BYTES", 1 << 60)
    assert of(service, "disk")[0].kind == "disk"


def test_a_decision_of_the_future(service):
    service.approvals(signing=True).append(model=STREAM, version=0, adapter_sha256="", from_stage="", to_stage="",
                                           who="pat", why="", kind="kill", when="2199-01-01T00:00:00Z")  # fmt: skip
    assert "2199" in of(service, "clock")[0].said


def test_two_parts_on_one_port_and_a_stranger_on_the_servers(service, tmp_path, monkeypatch):
    import socket

    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = str(stranger.getsockname()[1])
        names = {"TIDEGATE__SERVICE__API__PORT": port, "TIDEGATE__SERVICE__LEARN_METRICS_PORT": port}
        again = Service(service.workspace, load(service.workspace.params, names))
        assert [f.kind for f in of(again, "ports")] == ["settings", "port"]


def test_a_lock_that_git_left(service):
    lock = service.workspace.data / ".git" / "index.lock"
    lock.touch()
    assert of(service, "locks") == []
    os.utime(lock, (time.time() - 3600,) * 2)
    assert "index.lock: 60 minutes old" in of(service, "locks")[0].said


def test_a_remote_that_cannot_be_written(service, tmp_path):
    assert of(service, "remote") == []
    service.workspace.remote.rmdir() if service.workspace.remote.is_dir() else None
    service.workspace.remote.write_text("a file where the folder should be")
    assert of(service, "remote")[0].kind == "remote"


def test_what_is_switched_is_noted_and_is_not_bad(service):
    switches.pause(service, STREAM, who="ada", why="audit")
    switches.kill(service, STREAM, who="pat", why="it swears")
    notes = of(service, "switches", "note")
    assert [note.kind for note in notes] == ["switches", "killed"]
    assert of(service, "switches") == []


def test_a_check_that_hangs_keeps_no_other_from_being_made(service, monkeypatch):
    def hangs(_service):
        time.sleep(3)
        yield doctor.Finding("disk", "ok", "at last")

    monkeypatch.setitem(doctor.CHECKS, "disk", hangs)
    began = time.monotonic()
    found = doctor.examine(service, seconds=2.0)
    assert time.monotonic() - began < 2.9
    assert [f.said for f in found if f.check == "disk"] == ["no answer within 2 s"]
    assert any(f.check == "chains" and f.grade == "ok" for f in found)


def test_a_workspace_of_another_place_is_not_needed(tmp_path):
    done = CliRunner().invoke(cli, ["-w", str(tmp_path), "doctor"])
    assert done.exit_code != 0
    assert Workspace(tmp_path).params.exists() is False
