"""Replicas and a router as processes of their own, following a registry that is a folder.

`python -m tests.serving.fleet replica BASE FOLDER PORT` and `... route FOLDER PORT REPLICA...`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from learner.adapter import adapter_sha256
from privacy.signing import SigningKey, TrustedKeys
from registry.states import ModelVersion
from serving.approval import Wanted
from tests.serving.waiting import Waiting

ROOT = Path(__file__).resolve().parents[2]
STREAM = "desk"
KEY = b"k" * 32
SETTLE_S = 1.5


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(true, seconds=120, what=""):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what or true}"
        time.sleep(0.01)


def serve_replica(base, folder, port):
    from learner.base import prepare_base
    from serving.inprocess import InProcessEngine
    from serving.server import serve
    from serving.swap import HotSwap

    folder = Path(folder)

    def wanted():
        try:
            return Wanted(**json.loads((folder / "production.json").read_text()))
        except FileNotFoundError:
            return None

    def fetch(version, dest):
        if (folder / f"unfetchable-{port}").exists():
            raise OSError("this replica cannot reach the artifacts")
        return Path(shutil.copytree(folder / "adapters" / str(version), dest))

    def acknowledge(_version):
        """The router does."""

    swap = HotSwap(
        STREAM,
        InProcessEngine(prepare_base(base, folder / "bases"), queue_max=int(os.environ.get("QUEUE_MAX", "256"))),
        wanted=wanted,
        fetch=fetch,
        acknowledge=acknowledge,
        trusted=TrustedKeys([SigningKey.load_or_create(folder / "approvals.pem").public]),
        cache=folder / f"cache-{port}",
        poll_seconds=0.05,
        retry_seconds=0.5,
        replica=str(port),
    )
    swap.delivery = delivery_of(swap, folder, fetch, str(port))
    serve([swap], host="127.0.0.1", port=int(port), answer_key=KEY)


def delivery_of(swap, folder, fetch, replica):
    from serving.candidates import Candidates
    from serving.delivery import Delivery

    def seen():
        try:
            return [ModelVersion(**told) for told in json.loads((folder / "waiting.json").read_text())]
        except FileNotFoundError:
            return []

    def step_back(version, seq, why):
        with (folder / "stepped-back").open("a") as out:
            out.write(f"{json.dumps([version, seq, why])}\n")

    prove = Waiting(folder / "keys", {}).prove
    return Delivery(
        swap,
        Candidates(STREAM, swap.engine, seen=seen, prove=prove, fetch=fetch, cache=folder / f"cache-{replica}"),
        trusted=TrustedKeys([SigningKey.load_or_create(folder / "approvals.pem").public]),
        cache=folder / f"cache-{replica}",
        key=KEY,
        step_back=step_back,
        poll_seconds=0.05,
        replica=replica,
    )


def route(folder, port, *urls):
    from serving.router import Router
    from serving.router_server import route

    def acknowledge(stream, version):
        with (Path(folder) / "acknowledged").open("a") as out:
            out.write(f"{stream} {version}\n")

    def make():
        kept, poll_s = Path(folder) / "router.json", float(os.environ.get("POLL_S", "0.05"))
        return Router(urls, KEY, acknowledge=acknowledge, kept=kept, settle_s=SETTLE_S, poll_s=poll_s)

    route(make, host="127.0.0.1", port=int(port))


@dataclass
class Fleet:
    """What a test starts, kills and asks."""

    base: Path
    folder: Path
    signer: SigningKey
    ports: tuple[int, ...]
    port: int
    seq: int = 0
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def replica_url(self, number):
        return f"http://127.0.0.1:{self.ports[number]}"

    def start(self, name):
        """`router`, or the number of a replica."""
        if name == "router":
            words = ["route", self.folder, self.port, *(self.replica_url(n) for n in range(len(self.ports)))]
        else:
            words = ["replica", self.base, self.folder, self.ports[int(name)]]
        command = [sys.executable, "-m", "tests.serving.fleet", *map(str, words)]
        with (self.folder / f"{name}.log").open("ab") as out:
            self.processes[name] = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)

    def kill(self, name):
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def stop(self):
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def promote(self, version):
        sha = adapter_sha256(self.folder / "adapters" / str(version))
        self.seq += 1
        payload = {
            "seq": self.seq,
            "model": STREAM,
            "version": version,
            "adapter_sha256": sha,
            "from": "Staging",
            "to": "Production",
            "who": "pat",
            "when": "2026-11-24T12:00:00Z",
            "why": "better",
            "kind": "promote",
            "prev_hash": "0" * 64,
        }
        wanted = {
            "model": STREAM,
            "version": version,
            "stage": "Production",
            "adapter_sha256": sha,
            "approval": self.signer.sign(payload),
        }
        partial = self.folder / "production.partial"
        partial.write_text(json.dumps(wanted))
        partial.replace(self.folder / "production.json")
        return self.seq

    def canary(self, version, share):
        """A candidate with its documents, and a signed share of the requests."""
        self.seq += 1
        (self.folder / "keys").mkdir(exist_ok=True)
        waiting = Waiting(self.folder / "keys", {version: self.folder / "adapters" / str(version)})
        made = waiting.candidate(version)
        payload = {
            "seq": self.seq,
            "model": STREAM,
            "version": version,
            "adapter_sha256": made.adapter_sha256,
            "from": "Staging",
            "to": "Staging",
            "who": "pat",
            "when": "2026-11-24T12:00:00Z",
            "why": "try it",
            "kind": "canary",
            "prev_hash": "0" * 64,
            "canary": {"share": share, "header": True, "sticky": True},
        }
        waiting.change(version, canary=json.dumps(self.signer.sign(payload)))
        partial = self.folder / "waiting.partial"
        partial.write_text(json.dumps([asdict(one) for one in waiting.versions]))
        partial.replace(self.folder / "waiting.json")
        return self.seq

    def stepped_back(self):
        file = self.folder / "stepped-back"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def state(self):
        return httpx.get(f"{self.url}/tidegate/state", timeout=10).json()

    def traffic(self):
        """The version that answers, None when the router does not."""
        try:
            return self.state()["streams"].get(STREAM, {}).get("number")
        except (httpx.TransportError, ValueError):
            return None

    def up(self):
        """Numbers of the replicas that count."""
        return [number for number, replica in enumerate(self.state()["replicas"]) if replica["up"]]

    def acknowledged(self):
        file = self.folder / "acknowledged"
        return [int(line.split()[1]) for line in file.read_text().splitlines()] if file.exists() else []


if __name__ == "__main__":
    {"replica": serve_replica, "route": route}[sys.argv[1]](*sys.argv[2:])
