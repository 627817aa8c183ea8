"""Webhooks from a real history of approvals to a real receiver; the registry stands in memory."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from privacy.receipts import make_receipt
from registry.errors import PromotionRefused, RegistryUnavailable
from registry.promotion import Promotions
from registry.states import ModelVersion
from tests.tidegate.receivers import receiving
from tests.tidegate.streams import STREAM, workspace
from tidegate import hooks, status, webhook
from tidegate.cli import cli
from tidegate.errors import ConfigError
from tidegate.outbox import FORGET_SECONDS, GIVE_UP_SECONDS, Event, Outbox
from tidegate.wiring import open_service

ROOT = Path(__file__).resolve().parents[2]
SHA = "a" * 64


@pytest.fixture
def receiver():
    with receiving() as server:
        yield server


@pytest.fixture
def service(tmp_path, receiver, monkeypatch):
    made = workspace(tmp_path / "ws", hooks={"urls": [receiver.url]})
    monkeypatch.delenv("TIDEGATE_HOOK_SECRET", raising=False)
    monkeypatch.setattr(status, "look", lambda _service: {"alarms": [], "budget_low": [], "streams": []})
    return made


def watching(service):
    """A watcher that has seen the past."""
    watcher = hooks.Watcher(service, hooks.outbox_of(service))
    watcher.look(time.time())
    return watcher


def add_candidate(service, number=1, **tags):
    verdict = {"adapter_sha256": SHA, "parent_sha256": None, "outcome": "passed", "gates": [{"sentence": "0.8312"}]}
    receipt = make_receipt(plan_hash="0" * 64, adapter_sha256=SHA, ledger_head="0" * 64, unit="record", epsilon=8.0,
                           delta=1e-5, horizon="life", claim="dp", signer=service.signer("receipts"))  # fmt: skip
    told = {
        "state": "candidate",
        "round_id": f"{STREAM}-r{number}",
        "adapter_sha256": SHA,
        "parent_sha256": "",
        "verdict": json.dumps(service.signer("verdicts").sign(verdict)),
        "receipt": json.dumps(receipt),
    }
    row = ModelVersion(number, "Staging", {f"tidegate.{k}": v for k, v in (told | tags).items()},
                       "2026-01-01T00:00:00Z", "run", (), "accuracy 0.8312")  # fmt: skip
    service.made["versions"].append(row)
    return row


def decide(service, version, kind, start, end, why="it is better", **more):
    return service.approvals(signing=True).append(
        model=STREAM, version=version, adapter_sha256=SHA, from_stage=start, to_stage=end, who="ada", why=why,
        kind=kind, **more,
    )  # fmt: skip


def verified(service, headers, body):
    """What docs/operations.md tells a receiver to do, run as it stands there."""
    page = (ROOT / "docs" / "operations.md").read_text()
    scope = {}
    exec(page.partition("```python\n")[2].partition("```")[0], scope)  # noqa: S102 - our own page
    secret = (service.keys_dir / "hook_secret").read_text().strip()
    return scope["verified"](secret, {name.lower(): value for name, value in headers.items()}, body)


def test_a_candidate_is_told_once_signed_and_without_a_score(service, receiver):
    add_candidate(service)
    watcher = watching(service)
    watcher.look(time.time())
    watching(service)  # a restart
    ((headers, body),) = receiver.got
    assert verified(service, headers, body)
    assert not verified(service, headers, body + b" ")
    old = str(int(headers["webhook-timestamp"]) - 600)
    assert not verified(service, headers | {"webhook-timestamp": old}, body)
    ((kind, data),) = receiver.told()
    assert kind == "candidate"
    assert {"stream": STREAM, "version": 1, "verdict": "passed", "guarantee": "(8, 1e-05)-DP per record"}.items() <= (
        data.items()
    )
    assert b"0.8312" not in body


def test_decisions_after_the_first_look_are_told_in_order_and_the_past_is_not(service, receiver):
    decide(service, 1, "promote", "Staging", "Production")
    watcher = watching(service)
    assert receiver.got == []
    decide(service, 2, "promote", "Staging", "Production")
    decide(service, 3, "reject", "Staging", "Archived", why="too slow")
    decide(service, 1, "rollback", "Archived", "Production", why="2 was rude")
    decide(service, 1, "rollback", "Production", "Archived")
    watcher.look(time.time())
    told = [(kind, data["version"], data["who"]) for kind, data in receiver.told()]
    assert told == [
        ("promoted", 2, "ada"),
        ("rejected", 3, "ada"),
        ("rolled_back", 1, "ada"),
        ("rolled_back", 1, "ada"),
    ]
    assert receiver.told()[2][1]["why"] == "2 was rude"
    assert all(verified(service, *request) for request in receiver.got)


def test_a_canary_its_end_and_a_step_back_are_told_apart(service, receiver):
    watcher = watching(service)
    for told in ({"share": 0.1, "header": True, "sticky": True}, {"share": 0}, {"share": 0, "automatic": True}):
        decide(service, 2, "canary", "Staging", "Staging", canary=told)
    watcher.look(time.time())
    assert [(kind, data["version"], data["share"]) for kind, data in receiver.told()] == [
        ("canary", 2, 0.1),
        ("canary", 2, 0),
        ("stepped_back", 2, 0),
    ]
    assert "gets 10% of the requests" in receiver.told()[0][1]["sentence"]


def test_decisions_made_while_nobody_watched_are_told_later_but_not_after_a_week(service, receiver):
    watching(service)
    decide(service, 2, "promote", "Staging", "Production")
    hooks.Watcher(service, hooks.outbox_of(service)).look(time.time() + 3600)
    assert [kind for kind, _ in receiver.told()] == ["promoted"]
    decide(service, 3, "promote", "Staging", "Production")
    hooks.Watcher(service, hooks.outbox_of(service)).look(time.time() + 8 * 86_400)
    assert len(receiver.got) == 1


def test_a_refused_promotion_is_told_with_its_sentence_whoever_asked(service, receiver):
    watcher = watching(service)
    add_candidate(service, outcome="failed", verdict=json.dumps({"outcome": "passed"}))
    desk = Promotions(service, service.approvals(signing=True), service.trust)
    with pytest.raises(PromotionRefused, match="does not verify") as refused:
        desk.promote(STREAM, 1, who="eve", why="please")
    watcher.look(time.time())
    data = dict(receiver.told())["refused"]
    assert (data["who"], data["why"], data["version"]) == ("eve", "please", 1)
    assert data["sentence"] == str(refused.value)
    assert service.approvals().history() == []


def test_an_alarm_is_told_once_it_has_stood_and_again_only_after_it_was_gone(service, receiver, monkeypatch):
    said = {"alarms": [], "budget_low": [], "streams": [{"stream": STREAM, "filter_used_max": "83.0%"}]}
    monkeypatch.setattr(status, "look", lambda _service: said)
    start = time.time()
    watcher = hooks.Watcher(service, hooks.outbox_of(service))
    low, down = (
        f"{STREAM}: 83% of the median block's filter is used",
        "mlflow: nothing answers at http://127.0.0.1:5000",
    )
    said |= {"alarms": [low, down], "budget_low": [low]}
    watcher.look(start)
    assert receiver.got == []
    said |= {"alarms": [low.replace("83%", "84.5%"), down], "budget_low": [low.replace("83%", "84.5%")]}
    watcher.look(start + 61)
    hooks.Watcher(service, hooks.outbox_of(service)).look(start + 130)  # a restart
    told = dict(receiver.told())
    assert set(told) == {"budget_low", "alarm"} and len(receiver.got) == 2
    assert told["budget_low"]["filter_used_max"] == "83.0%"
    assert told["alarm"]["sentence"] == down
    said |= {"alarms": [], "budget_low": []}
    watcher.look(start + 200 + FORGET_SECONDS)
    said |= {"alarms": [down]}
    watcher.look(start + 270 + FORGET_SECONDS)
    watcher.look(start + 340 + FORGET_SECONDS)
    assert [kind for kind, _ in receiver.told()].count("alarm") == 2


def test_only_the_events_asked_for_are_sent(tmp_path, receiver, monkeypatch):
    made = workspace(tmp_path / "ws", hooks={"urls": [receiver.url], "events": ["rolled_back"]})
    monkeypatch.setattr(status, "look", lambda _service: {"alarms": [], "budget_low": [], "streams": []})
    watcher = watching(made)
    add_candidate(made)
    decide(made, 2, "promote", "Staging", "Production")
    decide(made, 1, "rollback", "Archived", "Production")
    watcher.look(time.time())
    assert [kind for kind, _ in receiver.told()] == ["rolled_back"]


def test_a_receiver_that_fails_gets_the_same_id_again_after_a_restart_and_a_growing_pause(service, receiver):
    receiver.answers = [500, 302, 200]
    add_candidate(service)
    now = time.time()
    for later in (0, 1, 6, 7, 20, 3000):  # the pauses are 5 and 10 seconds
        hooks.Watcher(service, hooks.outbox_of(service)).look(now + later + 0.5)
    ids = [{name.lower(): value for name, value in headers.items()}["webhook-id"] for headers, _ in receiver.got]
    assert len(ids) == 3 and len(set(ids)) == 1
    (row,) = hooks.outbox_of(service).log(STREAM)
    assert (row["state"], row["tries"]) == ("delivered", 3)
    assert [answer["status"] for answer in row["answers"]] == [500, 302, 200]


def test_a_dead_receiver_is_given_up_after_days_and_holds_up_no_other(tmp_path, receiver, monkeypatch):
    dead = "http://127.0.0.1:9/nobody"
    made = workspace(tmp_path / "ws", hooks={"urls": [dead, receiver.url]})
    monkeypatch.setattr(status, "look", lambda _service: {"alarms": [], "budget_low": [], "streams": []})
    add_candidate(made)
    add_candidate(made, 2)
    watching(made)
    assert len(receiver.got) == 2
    outbox, now = hooks.outbox_of(made), time.time()
    assert [row["tries"] for row in outbox.log() if row["url"] == dead] == [1, 0]
    (late,) = [d for d in outbox.due(now + 3600) if d.tries == 1]
    assert outbox.tried(late, webhook.Answer(None, "no"), now + GIVE_UP_SECONDS) == "given up"
    assert outbox.tried(replace(late, tries=2), webhook.Answer(410, "gone"), now) == "given up"


def test_a_registry_that_is_down_stops_neither_the_schedule_nor_other_news(service, receiver, monkeypatch):
    watcher = watching(service)
    decide(service, 2, "promote", "Staging", "Production")

    def down(_model, **_options):
        raise RegistryUnavailable("mlflow: cannot be reached")

    monkeypatch.setattr(service, "versions", down)
    watcher.look(time.time())
    assert [kind for kind, _ in receiver.told()] == ["promoted"]


def test_an_event_and_how_far_was_read_are_kept_together_or_not_at_all(tmp_path):
    outbox = Outbox(tmp_path / "hooks.db")
    event = Event("msg_1", STREAM, "test", "2026-01-01T00:00:00Z", {})

    def breaks_off():
        yield "https://one.example"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outbox.put([(event, breaks_off())], 0.0, marks={"a": 1})
    assert outbox.mark("a") is None and outbox.due(1.0) == []
    assert outbox.put([(event, ["https://one.example"])], 0.0, marks={"a": 1}) == [event]
    assert outbox.put([(event, ["https://one.example"])], 0.0) == []
    assert len(outbox.due(1.0)) == 1


def test_the_secret_is_private_made_once_and_can_be_changed_without_a_gap(tmp_path):
    file = webhook.make_secret(tmp_path)
    first = file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    webhook.make_secret(tmp_path)
    assert file.read_text() == first and [f.name for f in tmp_path.iterdir()] == ["hook_secret"]
    (old,) = webhook.keys_of(first)
    both = webhook.sign(webhook.keys_of("a-new-secret-of-30-characters! " + first), "msg_1", 7, b"{}").split()
    assert len(both) == 2 and both[1] == webhook.sign([old], "msg_1", 7, b"{}")
    for wrong in ("", "short", "whsec_%%%"):
        with pytest.raises(ConfigError, match="hook_secret") as said:
            webhook.keys_of(wrong)
        assert "%%%" not in str(said.value)


def test_the_signature_is_that_of_the_standard_webhooks_example():
    # The vector of https://github.com/standard-webhooks/standard-webhooks, spec and reference libraries.
    key = webhook.keys_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    assert webhook.sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body) == (
        "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )


@pytest.mark.parametrize("url", ["http://hooks.example.org/x", "ftp://127.0.0.1/x", "https://ada:pw@example.org", "x"])
def test_an_unsafe_address_is_refused_with_the_settings(tmp_path, url):
    with pytest.raises(ConfigError, match="hooks") as refused:
        workspace(tmp_path / "ws", hooks={"urls": [url]})
    assert "must" in str(refused.value)


def test_plain_http_to_another_machine_needs_to_be_asked_for(tmp_path):
    made = workspace(tmp_path / "ws", hooks={"urls": ["http://hooks.example.org/x"], "insecure": True})
    assert made.stream(STREAM).hooks.urls == ("http://hooks.example.org/x",)


def test_test_and_log_say_what_the_receiver_answered_and_never_the_secret(tmp_path, receiver):
    root = workspace(tmp_path / "ws", hooks={"urls": [receiver.url + "?token=hidden"]}).workspace.root
    run = CliRunner().invoke
    receiver.said = b"fine\x1b[31m by me"
    done = run(cli, ["-w", str(root), "hooks", "test", STREAM])
    assert done.exit_code == 0, done.output
    assert "taken" in done.output and "200" in done.output and "\x1b" not in done.output
    receiver.answers = [403]
    refused = run(cli, ["-w", str(root), "hooks", "test", STREAM])
    assert refused.exit_code == 1 and "NOT TAKEN" in refused.output and "403" in refused.output
    told = run(cli, ["-w", str(root), "hooks", "log"])
    assert "given up" in told.output and "delivered" in told.output and "hidden" not in told.output
    rows = json.loads(run(cli, ["-w", str(root), "hooks", "log", STREAM, "--json"]).output)
    assert [row["answers"][0]["status"] for row in rows] == [200, 403]
    secret = (open_service(str(root)).keys_dir / "hook_secret").read_text().strip()
    assert secret not in done.output + refused.output + told.output
    assert hooks.outbox_of(open_service(str(root))).due(time.time()) == []


def test_the_loop_beside_the_schedule_tells_and_ends_with_it(service, receiver, monkeypatch):
    monkeypatch.setattr(hooks, "Service", lambda *_parts: service)
    monkeypatch.setattr(hooks, "LOOK_SECONDS", 0.05)
    add_candidate(service)
    stop = threading.Event()
    thread = threading.Thread(target=hooks.watch, args=(service, stop))
    thread.start()
    end = time.monotonic() + 20
    while not receiver.got and time.monotonic() < end:
        time.sleep(0.02)
    stop.set()
    thread.join(20)
    assert not thread.is_alive() and [kind for kind, _ in receiver.told()] == ["candidate"]


def test_a_workspace_without_receivers_makes_no_outbox_and_no_secret(tmp_path):
    made = workspace(tmp_path / "ws")
    hooks.watch(made, threading.Event())
    assert not (made.workspace.root / "hooks.db").exists()
    assert not (made.keys_dir / "hook_secret").exists()
