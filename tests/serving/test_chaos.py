"""Swaps on a real MLflow that is killed, slow, flapping, and written to behind everybody's back.

Clients ask all the time. No answer may fail, none may come from a version that nobody approved, and each version that
answers must have been decided on later than the one before it.
"""

import os
import signal
import sqlite3
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from learner.adapter import adapter_sha256
from privacy.signing import TrustedKeys
from registry.approvals import Approvals
from registry.errors import RegistryUnavailable
from registry.mlflow_store import Candidate, MlflowStore
from registry.server import MlflowServer
from serving.inprocess import InProcessEngine
from serving.server import running
from serving.swap import HotSwap
from tests.registry.conftest import DATASETS, World
from tests.serving.adapters import random_adapter
from tests.serving.test_under_load import MODEL, Clients, wait_until
from tidegate.serve import wanted_of

KEY = b"k" * 32


class Desk:
    """An MLflow with the guard, and versions 1, 2 and 3: two were approved in turn, the third never was."""

    def __init__(self, root, base):
        (root / "keys").mkdir()
        self.root, self.base = root, base
        self.server = MlflowServer(root, port=0)
        self.server.start()
        self.store = MlflowStore(self.server.url)
        self.world = World(root, self.store)
        self.sha = {}
        self.approve(self.register(1))
        self.approve(self.register(2))
        self.register(3)

    def register(self, number):
        folder = self.root / "made" / str(number)
        random_adapter(self.base, folder, number)
        sha = self.sha[number] = adapter_sha256(folder)
        tags = self.world.documents(sha, parent=self.sha.get(min(number, 2) - 1 if number < 3 else 2, ""))
        tags |= {"tidegate.round_id": f"r{number}", "tidegate.attempt": "1"}
        made = Candidate(
            MODEL, f"r{number}", 1, folder, tags, "passed", {}, {"accuracy": 0.8}, {"sigma": "1"}, DATASETS
        )
        version = self.store.register(made)
        self.store.to_staging(MODEL, version)
        assert version == number
        return version

    def approve(self, version):
        self.store.promote(MODEL, version, who="pat", why="better")

    def kill(self):
        os.killpg(self.server.pid, signal.SIGKILL)

    def restart(self):
        self.server.stop()
        self.server.start()

    def sql(self, statement, *values):
        """Past MLflow, past the guard."""
        with sqlite3.connect(self.root / "mlflow" / "mlflow.db", timeout=30) as database:
            database.execute(statement, values)
        database.close()

    def set_stage(self, version, stage):
        where = "WHERE name = ? AND version = ?"
        self.sql(f"UPDATE model_versions SET current_stage = ? {where}", stage, MODEL, version)

    def history(self):
        rows = Approvals(f"sqlite:///{self.root / 'approvals.db'}")
        try:
            return {row["seq"]: row for row in rows.history(MODEL)}
        finally:
            rows.close()

    def swap(self, engine, cache, fetch=None, **changes):
        return HotSwap(
            MODEL,
            engine,
            wanted=wanted_of(SimpleNamespace(store=self.store, model=lambda stream: stream), MODEL),
            fetch=fetch or (lambda version, dest: self.store.fetch_adapter(MODEL, version, dest)),
            acknowledge=lambda version: self.store.set_alias(MODEL, "live", version),
            trusted=TrustedKeys([self.world.key("approvals").public]),
            cache=cache,
            poll_seconds=0.05,
            retry_seconds=0.5,
            **changes,
        )


class Watch:
    """Clients, and every version that answered with the decision that was followed then."""

    def __init__(self, url, swap):
        self.clients = Clients(url)
        self.followed = []
        self._swap = swap
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self):
        while not self._ended.is_set():
            now = self._now()
            time.sleep(0.002)
            # Read twice: what is followed and what answers do not change in one instruction.
            if now == self._now() and now not in self.followed[-1:]:
                self.followed.append(now)

    def _now(self):
        state = self._swap.state()
        return state["approval_seq"], state["number"]

    def __enter__(self):
        wait_until(lambda: self.clients.answers)
        return self

    def __exit__(self, *_):
        self.clients.stop()
        self._ended.set()
        self._thread.join()

    def versions(self):
        return {header for header, *_ in self.clients.answers}

    def judge(self, desk, allowed):
        """Nothing failed or was mixed; nothing went back without a row; the never approved never answered."""
        assert self.clients.failures == []
        assert all(versions == {header} for header, versions, *_ in self.clients.answers)
        assert self.versions() <= {f"{MODEL}@{number}" for number in allowed}
        history = desk.history()
        seqs = [seq for seq, _ in self.followed]
        assert seqs == sorted(seqs), self.followed
        for seq, number in self.followed:
            assert history[seq]["version"] == number, "an answer's version without its row in the history"


def until_live(swap, version):
    wait_until(lambda: swap.current and swap.current.version == version)


def kinds(swap):
    return {alarm.kind for alarm in swap.alarms}


@pytest.fixture(scope="module")
def desk(tiny, tmp_path_factory):
    made = Desk(tmp_path_factory.mktemp("chaos"), tiny)
    yield made
    made.store.close()
    made.server.stop()


@pytest.fixture(scope="module")
def core(tiny):
    with InProcessEngine(tiny, batch_max=8) as engine:
        yield engine


@pytest.fixture
def fresh(desk, core):
    """Version 2 live in the registry, nothing resident."""
    if {v.version: v.stage for v in desk.store.versions(MODEL)}[2] != "Production":
        desk.approve(2)
    for name in core.resident:
        core.unload(name)
    return core


def test_a_slow_disk_delays_the_swap_and_no_answer(desk, fresh, tmp_path):
    slow = threading.Event()

    def trickle(version, dest):
        got = desk.store.fetch_adapter(MODEL, version, dest.with_name("downloaded"))
        dest.mkdir()
        for file in got.iterdir():
            data = file.read_bytes()
            with (dest / file.name).open("wb") as out:
                for at in range(0, len(data), 1 + len(data) // 8):
                    out.write(data[at : at + 1 + len(data) // 8])
                    if slow.is_set():
                        time.sleep(0.1)
        return dest

    swap = desk.swap(fresh, tmp_path / "cache", trickle)
    with running([swap], answer_key=KEY) as url:
        until_live(swap, 2)
        with Watch(url, swap) as watch:
            slow.set()
            desk.approve(1)
            wait_until(lambda: swap.state()["loading"] == "desk@1")
            before = len(watch.clients.answers)
            until_live(swap, 1)
            assert len(watch.clients.answers) > before, "answers went on while the disk trickled"
            seen = len(watch.clients.answers)
            wait_until(lambda: len(watch.clients.answers) > seen + 6)
        watch.judge(desk, {1, 2})
    assert watch.versions() == {"desk@1", "desk@2"}


@pytest.mark.parametrize("flips", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_a_flapping_stage_is_followed_in_order_and_ends_where_it_ends(desk, fresh, tmp_path, flips):
    swap = desk.swap(fresh, tmp_path / "cache")
    with running([swap], answer_key=KEY) as url:
        until_live(swap, 2)
        rows = len(desk.history())
        began = time.monotonic()
        with Watch(url, swap) as watch:
            for flip in range(flips):
                desk.approve(1 + flip % 2)
                time.sleep(max(0.0, began + 60 / 100 * (flip + 1) - time.monotonic()))
            until_live(swap, 1 + (flips - 1) % 2)
            wait_until(lambda: swap.state()["approval_seq"] == max(desk.history()))
        watch.judge(desk, {1, 2})
    assert len(desk.history()) == rows + flips
    assert watch.versions() == {"desk@1", "desk@2"}
    assert not swap.alarms


def test_a_stage_written_into_the_database_brings_nothing_that_was_not_approved(desk, fresh, tmp_path):
    swap = desk.swap(fresh, tmp_path / "cache")
    with running([swap], answer_key=KEY) as url:
        until_live(swap, 2)
        with Watch(url, swap) as watch:
            desk.set_stage(3, "Production")
            wait_until(lambda: kinds(swap) == {"ambiguous"})
            desk.set_stage(2, "Archived")
            wait_until(lambda: kinds(swap) == {"approval"})
            assert "no signed approval" in swap.alarms[0].message
            approval = next(v for v in desk.store.versions(MODEL) if v.version == 2).tag("approval")
            tag = "INSERT INTO model_version_tags (name, version, key, value) VALUES (?, ?, ?, ?)"
            desk.sql(tag, MODEL, 3, "tidegate.approval", approval)  # somebody else's
            wait_until(lambda: "is for version 2" in "".join(map(str, swap.alarms)))
            desk.set_stage(3, "None")
            wait_until(lambda: kinds(swap) == {"production"})
            desk.set_stage(1, "Production")  # approved once, and overtaken
            wait_until(lambda: kinds(swap) == {"approval"})
            assert "an old approval brings no version back" in swap.alarms[0].message
            desk.set_stage(1, "Archived")
            desk.set_stage(2, "Production")
            wait_until(lambda: not swap.alarms)
        watch.judge(desk, {2})
    desk.sql("DELETE FROM model_version_tags WHERE version = 3 AND key = 'tidegate.approval'")


def test_mlflow_killed_during_a_swap_and_away_for_long_is_survived_and_caught_up_with(desk, fresh, tiny, tmp_path):
    killing = threading.Event()

    def fetch(version, dest):
        if killing.is_set():
            killing.clear()
            desk.kill()
        return desk.store.fetch_adapter(MODEL, version, dest)

    swap = desk.swap(fresh, tmp_path / "cache", fetch)
    with running([swap], answer_key=KEY) as url:
        until_live(swap, 2)
        with Watch(url, swap) as watch:
            killing.set()
            with suppress(RegistryUnavailable):  # decided on, and killed before it could say so
                desk.approve(1)
            wait_until(lambda: "registry" in kinds(swap))
            assert not killing.is_set()
            assert swap.current.version == 2
            # A server that starts meanwhile answers from its cache.
            with InProcessEngine(tiny) as another:
                second = desk.swap(another, tmp_path / "cache")
                with running([second], answer_key=KEY) as elsewhere, Watch(elsewhere, second) as alone:
                    seen = len(alone.clients.answers)
                    wait_until(lambda: len(alone.clients.answers) > seen + 3)
                alone.judge(desk, {2})
            desk.restart()
            until_live(swap, 1)
            wait_until(lambda: not swap.alarms)
            seen = len(watch.clients.answers)
            wait_until(lambda: len(watch.clients.answers) > seen + 6)
        watch.judge(desk, {1, 2})
    assert watch.versions() == {"desk@1", "desk@2"}
