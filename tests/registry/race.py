"""`make race-registry`: approvers who disagree, all at once, on a server that is killed under them.

Sixteen clients promote, reject, roll back, withdraw and put away versions of one model at random, some without waiting
for the answer. The whole server is killed (SIGKILL) in between and at the end, and started again: what it mends by
itself at a start is judged too. Meanwhile two look at what stands in Production: one straight into the database, one
through the API. The verdict is in `race_verdict.py`. `--unguarded` does the same to a plain MLflow, to show it fail.
"""

import argparse
import itertools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

import requests
import sqlalchemy
from rich.console import Console
from rich.table import Table

from privacy.signing import TrustedKeys
from registry.approvals import Approvals
from registry.errors import RegistryError, ServerFailed
from registry.mlflow_store import MlflowStore
from registry.server import MlflowServer
from registry.states import NO_STAGE, PRODUCTION, STAGING, ModelVersion, State
from serving.approval import Wanted, check_wanted
from serving.errors import ApprovalRefused
from tests.privacy import postgres
from tests.registry.conftest import PlainMlflow, World
from tests.registry.race_verdict import Answer, Evidence, Sightings, faults

MODEL = "race"
ADAPTERS = 6
# Candidates that wait at a time: enough for everybody to find one, few enough that they meet on the same.
WAITING = 6
LOOK_S = 0.003
# A request that takes longer has been lost with the server.
TIMEOUT_S = 20.0
WEIGHTS = {"promote": 8, "roll back": 5, "reject": 2, "withdraw": 1, "put away": 1, "feed": 4}


@dataclass
class Race:
    """One model on one server, and everybody's notes.

    Attributes:
        world: its workspace.
        server: killed and started again, always at the same address.
        over: for the clients. `closed`: for those who look.
        sources: of stored adapters: (sha256, the version's source, its run).
    """

    world: World
    server: MlflowServer
    database_url: str
    approvals_url: str
    guarded: bool
    sources: list[tuple[str, str, str]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    database: Sightings = field(default_factory=Sightings)
    api: Sightings = field(default_factory=Sightings)
    seen: Sequence[ModelVersion] = ()
    over: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def prepare(self) -> None:
        """Store the adapters, with versions of another model; what races are versions of their artifacts."""
        for _ in range(ADAPTERS):
            version, sha = self.world.candidate("stored")
            told = self._post(requests, "model-versions/get", {"name": "stored", "version": version}, get=True)
            entry = told.json()["model_version"]
            self.sources.append((sha, entry["source"], entry["run_id"]))
        self._post(requests, "registered-models/create", {"name": MODEL}).raise_for_status()
        for _ in range(WAITING):
            self.feed(requests, random.Random(1))
        self.seen = self.world.store.versions(MODEL)

    def feed(self, session, rng: random.Random) -> None:
        """One more candidate, trained from what is live as far as its maker knows."""
        live = next((v.adapter_sha256 for v in self.seen if v.stage == PRODUCTION), "")
        sha, source, run = rng.choice([entry for entry in self.sources if entry[0] != live])
        made_by = f"r{next(self.numbers)}"
        tags = {**self.world.documents(sha, live, round_id=made_by), "tidegate.round_id": made_by}
        body = {
            "name": MODEL,
            "source": source,
            "run_id": run,
            "model_id": source.removeprefix("models:/"),
            "tags": [{"key": key, "value": value} for key, value in tags.items()],
        }
        made = self._post(session, "model-versions/create", body)
        made.raise_for_status()
        self.move(
            session, "put forward", int(made.json()["model_version"]["version"]), STAGING, tidegate_state="candidate"
        )

    def move(self, session, what: str, version: int, stage: str, **more) -> None:
        """Ask for a change of stage, and note what came of it."""
        why = f"{what} {version}, ask {next(self.numbers)}"
        headers = {"X-Tidegate-User": "client", "X-Tidegate-Why": quote(why)}
        body = {"name": MODEL, "version": str(version), "stage": stage, **more}
        try:
            answer = self._post(session, "model-versions/transition-stage", body, headers=headers)
        except requests.RequestException:
            self.answers.append(Answer(why, what, version, 0))
            self.over.wait(0.3)
            return
        if what != "put forward":
            message = "" if answer.ok else answer.text
            seq = int(answer.headers.get("X-Tidegate-Approval", 0))
            self.answers.append(Answer(why, what, version, answer.status_code, seq, message))

    def ask_and_go(self, version: int, stage: str, model: str = MODEL, *, done: bool = False) -> None:
        """Ask for a change of stage by hand, and hang up before the answer comes, or, when it is `done`, is read."""
        why = f"promote {version}, ask {next(self.numbers)}"
        body = json.dumps({"name": model, "version": str(version), "stage": stage}).encode()
        at = urlsplit(self.server.url)
        head = (
            f"POST /api/2.0/mlflow/model-versions/transition-stage HTTP/1.1\r\nHost: {at.netloc}\r\n"
            f"X-Tidegate-User: client\r\nX-Tidegate-Why: {quote(why)}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        with suppress(OSError), socket.create_connection((at.hostname, at.port), timeout=2) as line:
            line.sendall(head.encode() + body)
            if done:
                line.settimeout(TIMEOUT_S)
                line.recv(1)
        self.answers.append(Answer(why, "promote", version, 0))

    def client(self, number: int) -> None:
        """One approver's minute."""
        rng = random.Random(number)
        with requests.Session() as session:
            session.trust_env = False
            while not self.over.is_set():
                what = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
                with suppress(requests.RequestException, IndexError):
                    self.act(session, rng, what)

    def act(self, session, rng: random.Random, what: str) -> None:
        """One thing a client does; IndexError when there is nothing to do it to."""
        seen = self.seen
        waiting = [v.version for v in seen if v.state is State.CANDIDATE]
        if what == "feed":
            if len(waiting) < WAITING:
                self.feed(session, rng)
        elif what == "promote":
            version = rng.choice(waiting or [v.version for v in seen])
            if rng.random() < 0.2:
                self.ask_and_go(version, PRODUCTION)
            else:
                box = rng.random() < 0.5
                self.move(session, what, version, PRODUCTION, archive_existing_versions=box)
        elif what == "roll back":
            self.move(session, "promote", rng.choice([v.version for v in seen if v.state is State.RETIRED]), PRODUCTION)
        elif what == "reject":
            told = {"tidegate_state": "rejected"}
            self.move(session, what, rng.choice(waiting), "Archived", **told)
        elif what == "withdraw":
            live = [v.version for v in seen if v.stage == PRODUCTION]
            self.move(session, what, rng.choice(live), rng.choice(("Archived", NO_STAGE, STAGING)))
        else:
            told = {"tidegate_state": rng.choice(("superseded", "stale"))}
            self.move(session, what, rng.choice(waiting), "Archived", **told)

    def look_into_the_database(self) -> None:
        """Count what stands in Production, hundreds of times a second."""
        engine = sqlalchemy.create_engine(self.database_url)
        query = sqlalchemy.text("SELECT version FROM model_versions WHERE name = :m AND current_stage = 'Production'")
        while not self.closed.is_set():
            with suppress(sqlalchemy.exc.OperationalError), engine.connect() as connection:
                self.database.add([int(row[0]) for row in connection.execute(query, {"m": MODEL})])
            time.sleep(LOOK_S)
        engine.dispose()

    def look_through_the_api(self) -> None:
        """The same as serving does it: the Production version, and whether its approval is for exactly that."""
        store = MlflowStore(self.server.url)
        trusted = TrustedKeys.from_dir(self.world.root / "keys", "approvals") if self.guarded else None
        while not self.closed.is_set():
            try:
                self.seen = store.versions(MODEL, aliases=False)
            except RegistryError:
                self.closed.wait(0.2)
                continue
            found = [v for v in self.seen if v.stage == PRODUCTION]
            self.api.add([v.version for v in found])
            if len(found) == 1 and trusted:
                with noting(self.api.unsigned):
                    (one,) = found
                    check_wanted(
                        Wanted(MODEL, one.version, one.stage, one.adapter_sha256, one.tag("approval")), trusted, MODEL
                    )
            self.closed.wait(0.02)
        store.close()

    def kill(self, *, last: bool) -> None:
        """The whole server, at once; then start it again, as soon as the kernel has let go of its port."""
        os.killpg(self.server.pid, signal.SIGKILL)
        if last:
            self.over.set()
        self.server.stop()
        for _ in range(100):
            with suppress(ServerFailed):
                self.server.start()
                return
            time.sleep(0.1)
        self.server.start()

    def run(self, seconds: float, clients: int, kills: int) -> Evidence:
        """Race for so long, starts of the server not counted, and gather what there is to judge by."""
        looking = [threading.Thread(target=one) for one in (self.look_into_the_database, self.look_through_the_api)]
        for thread in looking:
            thread.start()
        with ThreadPoolExecutor(clients) as crowd:
            running = [crowd.submit(self.client, number) for number in range(clients)]
            try:
                for nth in range(1, kills + 1):
                    time.sleep(seconds / kills)
                    self.kill(last=nth == kills)
                if not kills:
                    time.sleep(seconds)
            finally:
                self.over.set()
        time.sleep(0.5)
        self.closed.set()
        for thread in looking:
            thread.join()
        for one in running:
            one.result()
        return self.evidence()

    def evidence(self) -> Evidence:
        """The end: what is written, and what is shown."""
        versions = self.world.store.versions(MODEL)
        if not self.guarded:
            return Evidence(self.answers, self.database, self.api, (), versions)
        approvals, broken = Approvals(self.approvals_url), ""
        try:
            approvals.verify(TrustedKeys.from_dir(self.world.root / "keys", "approvals"))
        except RegistryError as error:
            broken = str(error)
        history = approvals.history(MODEL)
        approvals.close()
        return Evidence(self.answers, self.database, self.api, history, versions, broken)

    def _post(self, session, path: str, body: dict, *, headers=None, get: bool = False):
        url = f"{self.server.url}/api/2.0/mlflow/{path}"
        if get:
            return session.get(url, params=body, timeout=TIMEOUT_S)
        return session.post(url, json=body, headers=headers, timeout=TIMEOUT_S)


@contextmanager
def noting(sentences: list[str]) -> Iterator[None]:
    """Keep what serving would refuse."""
    try:
        yield
    except ApprovalRefused as error:
        sentences.append(str(error))


@contextmanager
def on(database: str, folder: Path | None = None, *, guarded: bool = True) -> Iterator[Race]:
    """A race about to begin, on `sqlite` or in the PostgreSQL whose socket is in `folder`."""
    with tempfile.TemporaryDirectory(prefix="race-", ignore_cleanup_errors=True) as made:
        yield from _on(Path(made), database, folder, guarded=guarded)


def _on(root: Path, database: str, folder: Path | None, *, guarded: bool) -> Iterator[Race]:
    (root / "keys").mkdir()
    urls = {"backend_url": f"sqlite:///{root / 'mlflow' / 'mlflow.db'}", "approvals_url": None}
    if database == "postgresql":
        url = postgres.new_database(folder, root.name)
        urls = {"backend_url": url, "approvals_url": url}
    kind = MlflowServer if guarded else PlainMlflow
    with kind(root, port=0, **urls) as server:
        store = MlflowStore(server.url)
        approvals_url = urls["approvals_url"] or f"sqlite:///{root / 'approvals.db'}"
        race = Race(World(root, store), server, urls["backend_url"], approvals_url, guarded)
        race.prepare()
        yield race
        store.close()


def figures(evidence: Evidence) -> dict[str, int]:
    """What happened, counted."""
    codes = Counter("no answer" if a.code == 0 else f"{a.code // 100}xx" for a in evidence.answers)
    kinds = Counter(row["kind"] for row in evidence.history)
    settled = sum(row["who"] == "tidegate" for row in evidence.history)
    return {
        "asked": len(evidence.answers),
        "acknowledged": codes["2xx"],
        "refused": codes["4xx"],
        "failed": codes["5xx"],
        "no answer": codes["no answer"],
        "promoted": kinds["promote"],
        "rolled back": kinds["rollback"],
        "rejected": kinds["reject"],
        "settled after a kill": settled,
        "looks into the database": evidence.database.samples,
        "looks through the API": evidence.api.samples,
        "changes seen": len(evidence.database.sequence),
        "most in Production at once": max(evidence.database.most, evidence.api.most),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Race on each database; 1 when something does not hold, or, unguarded, when everything does."""
    parser = argparse.ArgumentParser(prog="make race-registry RACE='...'")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--kills", type=int, default=3, help="spread over the time; the last one ends it")
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--unguarded", action="store_true", help="a plain MLflow, where this must find faults")
    told = parser.parse_args(arguments)
    console, wrong = Console(), False
    with postgres.server() as folder:
        for database in told.databases:
            with on(database, folder, guarded=not told.unguarded) as race:
                evidence = race.run(told.seconds, told.clients, told.kills)
            found = faults(evidence)
            table = Table(title=f"{database}: {told.clients} clients, {told.seconds:.0f} s, {told.kills} kills")
            for name, count in figures(evidence).items():
                table.add_row(name, str(count))
            console.print(table)
            for answer in {a.message[:300] for a in evidence.answers if a.code >= 500}:
                console.print(f"failed: {answer}", style="yellow", markup=False)
            for sentence in found:
                console.print(sentence, style="red", markup=False)
            console.print("found nothing wrong" if not found else f"{len(found)} faults")
            wrong |= bool(found) != told.unguarded
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
