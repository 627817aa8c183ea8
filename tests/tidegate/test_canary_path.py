"""A canary from the command to the history: `tidegate mlflow`, `tidegate serve` and the commands, as processes.

Versions are registered as a round registers them, with documents signed by the workspace's own keys. The tests run in
order and share one service.
"""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress

import httpx
import pytest
from click.testing import CliRunner

from registry.errors import PromotionRefused, RegistryUnavailable
from registry.mlflow_store import Candidate
from tests.serving.adapters import overflowing, random_adapter
from tests.tidegate.desk import STREAM, make_desk
from tidegate.cli import cli
from tidegate.supervisor import tidegate_command

# Two servers of two programs, started twice: half a minute. What they are made of is tested by itself.
pytestmark = pytest.mark.slow
TRIGGER = "hello"
PROMPT = [{"role": "user", "content": "where is my order"}]


class Parts:
    """The registry and the server of a workspace."""

    def __init__(self, desk, folder):
        self.desk, self.folder = desk, folder
        self.processes = {}

    def start(self, name):
        with (self.folder / f"{name}.log").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                tidegate_command(self.desk.root, name), stdout=out, stderr=out, start_new_session=True
            )

    def run(self, *words, code=0):
        """A command, in this process; what it says."""
        done = CliRunner().invoke(cli, ["-w", str(self.desk.root), *words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == code, done.output
        return done.output

    def history(self):
        return json.loads(self.run("history", STREAM, "--json"))

    def kill(self, name):
        with suppress(ProcessLookupError):
            os.killpg(self.processes[name].pid, signal.SIGKILL)
        self.processes[name].wait()

    def wait(self, done, seconds=120, what=""):
        end = time.monotonic() + seconds
        while True:
            with suppress(httpx.TransportError, RegistryUnavailable):
                if done():
                    return
            assert time.monotonic() < end, f"{what}: not within {seconds} s"
            time.sleep(0.1)

    @property
    def api(self):
        return self.desk.service().api_uri

    def state(self):
        return httpx.get(f"{self.api}/tidegate/state", timeout=10).json()["streams"][STREAM]

    def chat(self, header=None, **more):
        headers = {"x-tidegate-canary": header} if header else {}
        body = {"model": STREAM, "messages": PROMPT, "max_tokens": 2, "temperature": 0, **more}
        return httpx.post(f"{self.api}/v1/chat/completions", json=body, headers=headers, timeout=60)

    def version(self, header=None, **more):
        return self.chat(header, **more).headers["x-tidegate-version"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("canary")
    desk = make_desk(folder / "ws", tiny)
    made = Parts(desk, folder)
    try:
        made.start("mlflow")
        made.wait(desk.service().store.guarded, what="mlflow")
        made.start("serve")
        made.wait(lambda: made.state()["version"] == f"{STREAM}@base", what="serve")
        yield made
    finally:
        for name in made.processes:
            made.kill(name)


def register(parts, number, sha, parent=""):
    """A candidate as a round leaves it, of an adapter that is there; its sha256."""
    service = parts.desk.service()
    verdict = {"adapter_sha256": sha, "parent_sha256": parent or None, "outcome": "passed", "gates": []}
    guarantee = {"unit": "record", "adjacency": "null", "epsilon": 8.0, "delta": 1e-5}
    receipt = {"plan_hash": "0" * 64, "adapter_sha256": sha, "ledger_head": "0" * 64, "guarantee": guarantee}
    tags = {
        "state": "candidate",
        "round_id": f"r{number}",
        "attempt": "1",
        "adapter_sha256": sha,
        "parent_sha256": parent,
        "verdict": json.dumps(service.signer("verdicts").sign(verdict)),
        "receipt": json.dumps(service.signer("receipts").sign(receipt)),
    }
    version = service.store.register(
        Candidate(
            model=STREAM,
            round_id=f"r{number}",
            attempt=1,
            adapter_dir=parts.folder / f"adapter-{number}",
            tags={f"tidegate.{name}": value for name, value in tags.items()},
            description_md="passed",
        )
    )
    service.store.to_staging(STREAM, version)
    assert version == number
    return sha


def made(parts, tiny, number):
    return random_adapter(tiny, parts.folder / f"adapter-{number}", number)


def test_a_command_gives_a_candidate_a_share_and_more_and_all(parts, tiny):
    desk = parts.desk
    sha = register(parts, 1, made(parts, tiny, 1))
    parts.run("approve", STREAM, "1", "--why", "first")
    parts.wait(lambda: parts.version() == f"{STREAM}@1", what="swap")
    register(parts, 2, made(parts, tiny, 2), parent=sha)
    said = parts.run("promote", STREAM, "2", "--canary", "30%", "--why", "try it")
    assert "version 2 of intents is a canary: 30% of the requests, by header, sticky" in said
    parts.wait(lambda: parts.state()["canary"], what="canary")
    assert parts.version("always") == f"{STREAM}@2"
    assert parts.version("never") == f"{STREAM}@1"
    assert {parts.version() for _ in range(60)} == {f"{STREAM}@1", f"{STREAM}@2"}
    assert len({parts.version(user="ann") for _ in range(10)}) == 1
    service = desk.service()
    assert {v.version: v.stage for v in service.store.versions(STREAM)} == {1: "Production", 2: "Staging"}
    assert next(v for v in service.store.versions(STREAM) if v.version == 1).aliases == ("live",)
    report = json.loads(parts.run("status", "--json", code=1))["streams"][0]
    assert report["canary"].startswith("intents@2 30%: 0 of ")
    answer = parts.chat("always").json()
    assert answer["tidegate"]["version"] == f"{STREAM}@2"
    parts.run("promote", STREAM, "2", "--canary", "0.6", "--no-header", "--why", "more")
    parts.wait(lambda: parts.state()["canary"]["share"] == 0.6, what="more")
    parts.run("promote", STREAM, "2", "--canary", "100%", "--why", "all")
    parts.wait(lambda: parts.state()["version"] == f"{STREAM}@2", what="promotion")
    assert {parts.version() for _ in range(10)} == {f"{STREAM}@2"}
    assert parts.state()["canary"] is None
    told = [(row["kind"], row["version"], row["why"]) for row in parts.history()]
    assert told == [
        ("promote", 1, "first"),
        ("canary", 2, "try it"),
        ("canary", 2, "more"),
        ("promote", 2, "all"),
    ]
    shown = parts.run("history", STREAM)
    assert "canary 30%" in shown
    assert "canary 60%" in shown
    with pytest.raises(PromotionRefused, match="stands in Production: a canary is a candidate that waits"):
        parts.run("promote", STREAM, "2", "--canary", "10%", "--why", "again")


def test_a_canary_that_fails_while_mlflow_is_dead_is_over_at_once_and_in_the_history_when_it_is_back(parts, tiny):
    live = next(v for v in parts.desk.service().store.versions(STREAM) if v.version == 2).adapter_sha256
    register(parts, 3, overflowing(tiny, parts.folder / "adapter-3", TRIGGER), parent=live)
    parts.run("promote", STREAM, "3", "--canary", "50%", "--why", "it did well on the gate set")
    parts.wait(lambda: parts.state()["canary"], what="canary")
    assert parts.chat("always").status_code == 200
    parts.kill("mlflow")
    question = {"messages": [{"role": "user", "content": TRIGGER}]}
    assert parts.chat("never", **question).status_code == 200
    failed = 0
    while parts.state()["canary"]:
        failed += parts.chat(**question).status_code == 500
        assert failed < 50
    assert failed >= 5
    assert {parts.chat(**question).status_code for _ in range(20)} == {200}
    assert {parts.version("always") for _ in range(5)} == {f"{STREAM}@2"}
    parts.wait(lambda: "has not taken it yet" in str(parts.state()["alarms"]), what="alarm")
    parts.kill("serve")
    parts.start("serve")
    parts.wait(lambda: parts.version("always") == f"{STREAM}@2", what="serve again, with MLflow away")
    parts.start("mlflow")
    parts.wait(lambda: parts.history()[-1]["who"] == "tidegate serve", what="the history")
    row = parts.history()[-1]
    assert (row["kind"], row["version"], row["canary"]) == ("canary", 3, {"share": 0, "automatic": True})
    assert "of its answers failed in a row, while live failed none" in row["why"]
    parts.wait(lambda: [a for a in parts.state()["alarms"] if a.startswith("stepped_back")], what="alarm")
    assert parts.version("always") == f"{STREAM}@2"
    assert "stepped back" in parts.run("history", STREAM)
    parts.run("reject", STREAM, "3", "--why", "it overflows")
    parts.wait(lambda: not parts.state()["alarms"], what="no alarm")
