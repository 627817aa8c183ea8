"""The demonstration: every step is a command a user would type, run for real and shown with what it printed.

Two things differ from `tidegate up`: rounds are started by hand instead of by schedule, so that the transcript has
one order; and the ports are free ones, so that nothing on the machine is disturbed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from typing import Any

from tidegate import output
from tidegate.errors import TidegateError
from tidegate.supervisor import Supervisor, tidegate_command
from tidegate.up import start_all
from tidegate.wiring import Service, complete_workspace, open_service
from tidegate.workspace import CHECKOUT, Workspace, lay_out

STREAM = "support-desk"
# Long enough for two ingest passes and a swap on a busy two-core machine; a hang is told instead of waited for.
WAIT_SECONDS = 180.0


@dataclass
class Script:
    """Runs commands of this checkout in one workspace, shows them, and remembers what the summary needs."""

    root: Path
    started: float = field(default_factory=time.monotonic)
    summary: list[tuple[str, str]] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Begin a chapter of the transcript."""
        output.say(f"\n=== {text}  [{time.monotonic() - self.started:.0f} s]")

    def show(self, *arguments: str) -> None:
        """Run a command as a user would, its output going to the transcript.

        Raises:
            TidegateError: it failed.
        """
        output.say(f"$ tidegate {shlex.join(arguments)}")
        code = subprocess.run(tidegate_command(self.root, *arguments), check=False).returncode
        if code:
            raise TidegateError(f"demo: `tidegate {shlex.join(arguments)}` ended with code {code}")

    def ask(self, *arguments: str) -> Any:
        """Run a command with --json and return what it printed.

        Raises:
            TidegateError: it failed.
        """
        done = subprocess.run(
            tidegate_command(self.root, *arguments, "--json"), check=False, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise TidegateError(f"demo: `tidegate {shlex.join(arguments)} --json` ended with code {done.returncode}")
        return json.loads(done.stdout)

    def wait(self, what: str, done: Callable[[], bool]) -> float:
        """Wait until something is true; returns the seconds it took.

        Raises:
            TidegateError: it did not become true in time.
        """
        begun = time.monotonic()
        while not done():
            if time.monotonic() - begun > WAIT_SECONDS:
                raise TidegateError(f"demo: {what}: not after {WAIT_SECONDS:.0f} s; logs are in {self.root}/run")
            time.sleep(0.2)
        return time.monotonic() - begun


def run(directory: Path, *, keep: bool) -> None:
    """Run the demonstration in a fresh workspace.

    Raises:
        TidegateError: a step did not do what it should.
    """
    script = Script(directory.resolve())
    service = _prepare(script)
    supervisor = start_all(service, output.say, learn=False)
    try:
        _story(script, service, supervisor)
        _summarise(script, service)
        if keep:
            output.say(
                f"\nleft running: MLflow {service.mlflow_uri}, API {service.api_uri}/v1; Ctrl-C stops everything"
            )
            supervisor.watch(lambda: False)
    except KeyboardInterrupt:
        output.say("stopping")
    finally:
        supervisor.stop()


def _prepare(script: Script) -> Service:
    script.heading("a workspace")
    shutil.rmtree(script.root, ignore_errors=True)
    # The base model is the same for every run: prepared once, beside the workspaces.
    os.environ.setdefault("TIDEGATE_BASES", str(script.root.parent / "bases"))
    for name, port in zip(("BROKER", "MLFLOW", "API"), _free_ports(3), strict=True):
        os.environ[f"TIDEGATE__SERVICE__{name}__PORT"] = str(port)
    output.say(f"$ tidegate init {script.root}")
    for made in [*lay_out(script.root), *complete_workspace(Workspace(script.root))]:
        output.say(f"made   {made}")
    service = open_service(str(script.root))
    script.heading("the base model, then broker, registry, ingest and server")
    base = service.base(STREAM, lambda done, of, what: output.say(f"base model: {what} ({done} of {of})"))
    output.say(f"base model {base.name}, licence {base.licence}, sha256 {base.sha256[:16]}")
    return service


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [int(sock.getsockname()[1]) for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def _example_parts(script: Script) -> tuple[Path, Path]:
    """The example stream in two files: its world changes at about 60%."""
    lines = (CHECKOUT / "examples" / "support-desk.jsonl").read_bytes().splitlines(keepends=True)
    cut = len(lines) * 6 // 10
    parts = (script.root / "run" / "first.jsonl", script.root / "run" / "second.jsonl")
    parts[0].write_bytes(b"".join(lines[:cut]))
    parts[1].write_bytes(b"".join(lines[cut:]))
    return parts


def _story(script: Script, service: Service, supervisor: Supervisor) -> None:
    first, second = _example_parts(script)
    server = next(part for part in supervisor.parts if part.name == "serve").process
    if server is None:
        raise TidegateError("demo: the server did not start")
    prompt = _probe_prompt()
    before = _answer(script, prompt, "before any training")

    script.heading("labelled records onto the topic")
    _stream_in(script, service, first)
    script.heading("a rejected record, with its reasons")
    script.show("dlq", "list", STREAM, "--limit", "6")

    script.heading("round 1: private training from the base model")
    one = _round(script)
    _approve(script, one, "clearly better than the base on the public gate set")
    after = _answer(script, prompt, "after approval")
    _same_process(script, server.pid)
    script.summary.append(("answer before, after", f"{before!r}, {after!r}; server pid {server.pid} throughout"))

    script.heading("the world changes: a second part of the stream")
    _stream_in(script, service, second)
    script.heading("round 2: from the live adapter, old blocks at a lower rate")
    two = _round(script)
    if two["state"] == "candidate":
        _approve(script, two, "knows the new domain, keeps the old ones")
        _answer(script, prompt, "from the second version")
        script.heading("a rollback, as the engineer on call would do it")
        script.show(
            "rollback",
            STREAM,
            "--to",
            str(one["version"]),
            "--why",
            "demonstration: back to the first version",
        )
        took = script.wait("rollback", lambda: _live_version(service) == f"{STREAM}@{one['version']}")
        output.say(f"the server answers with version {one['version']} again, {took:.1f} s later, same pid")
        script.summary.append(("rollback", f"to version {one['version']} in {took:.1f} s, pid {server.pid} unchanged"))
    _same_process(script, server.pid)
    _look_back(script)


def _look_back(script: Script) -> None:
    script.heading("versions, history, lineage of an answer, audit, status")
    script.show("versions", STREAM)
    script.show("history", STREAM)
    reply = script.ask("ask", STREAM, _probe_prompt())
    script.show("lineage", reply["id"])
    script.show("audit")
    script.show("status")
    audit = script.ask("audit")["streams"][STREAM]
    used = max(block["share_used"] for block in audit["blocks"])
    script.summary.append(("privacy", f"{audit['claim']}; at most {used:.1%} of a block's filter used"))


def _probe_prompt() -> str:
    """A question of the public gate set: it was never on the topic."""
    with (CHECKOUT / "examples" / "support-desk-gates.jsonl").open(encoding="utf-8") as lines:
        return str(json.loads(next(iter(lines)))["prompt"])


def _stream_in(script: Script, service: Service, file: Path) -> None:
    """Produce a file and wait until every offset of it lies in a sealed block."""
    count = len(file.read_bytes().splitlines())
    sealed = _sealed(service)
    script.show("produce", STREAM, str(file))
    script.wait("sealing", lambda: _sealed(service) >= sealed + count)
    script.show("blocks", STREAM)


def _sealed(service: Service) -> int:
    manifests = service.repository().manifests(STREAM)
    return sum(o.end - o.start for m in manifests for o in m.offsets)


def _round(script: Script) -> dict[str, Any]:
    output.say(f"$ tidegate round {STREAM}")
    begun = time.monotonic()
    end: dict[str, Any] = script.ask("round", STREAM)
    if "version" not in end:
        raise TidegateError(f"demo: no round ran: {end['reason']}")
    output.say(f"version {end['version']}: {end['outcome']}, now {end['state']}, in {time.monotonic() - begun:.0f} s")
    for reason in end["reasons"]:
        output.say(f"  {reason}")
    output.say(unescape((script.root / "rounds" / end["round_id"] / "report.md").read_text(encoding="utf-8")))
    script.summary.append((end["round_id"], f"version {end['version']} {end['outcome']}: {'; '.join(end['reasons'])}"))
    return end


def _approve(script: Script, end: dict[str, Any], why: str) -> None:
    if end["state"] != "candidate":
        raise TidegateError(f"demo: version {end['version']} did not pass: {'; '.join(end['reasons'])}")
    script.heading("a person approves (the same as Stage: Production in MLflow's UI)")
    script.show("approve", STREAM, str(end["version"]), "--why", why)
    service = open_service(str(script.root))
    took = script.wait("swap", lambda: _live_version(service) == f"{STREAM}@{end['version']}")
    output.say(f"the server answers with version {end['version']}, {took:.1f} s later")


def _live_version(service: Service) -> str:
    from tidegate.status import serving_state

    state = serving_state(service) or {}
    return str(state.get("streams", {}).get(STREAM, {}).get("version", ""))


def _answer(script: Script, prompt: str, when: str) -> str:
    reply = script.ask("ask", STREAM, prompt, "--max-tokens", "16")
    text = str(reply["choices"][0]["message"]["content"]).strip()
    output.say(f"{when}: {prompt!r}\n  -> {text!r}   ({reply['tidegate']['version']})")
    return text


def _same_process(script: Script, pid: int) -> None:
    from tidegate.status import serving_state

    state = serving_state(open_service(str(script.root))) or {}
    if state.get("pid") != pid:
        raise TidegateError(f"demo: the server's pid is {state.get('pid')}, was {pid}: it restarted")


def _summarise(script: Script, service: Service) -> None:
    script.heading("summary")
    output.facts(dict(script.summary))
    output.say(f"MLflow (while it runs): {service.mlflow_uri}/#/models/{service.model(STREAM)}")
    output.say(f"workspace: {script.root}; start it again by: tidegate -w {script.root} up")
    output.say(f"done in {time.monotonic() - script.started:.0f} s")
    sys.stdout.flush()
