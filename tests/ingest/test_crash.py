"""SIGKILL at every step of sealing a block, again and again: each message still lands exactly once."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from ingest.broker import KafkaSettings
from ingest.steps import Step
from tests.ingest.world import STREAM, World, line, put
from tests.kafka_servers import ApacheKafka

# DVC's own trie library announces a change of its own.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")

# Children are forked from a server that has imported Great Expectations once, instead of four seconds each.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ingest.ingester", "great_expectations", "dvc.repo", "tests.ingest.world"])


def _ingest_and_die(world: World, step: str | None, nth: int, tell: Connection) -> None:
    """The child: ingest, and at the nth time of a step stop as a power cut would."""
    seen = 0

    def listen(name: str, _: Mapping[str, Any]) -> None:
        nonlocal seen
        tell.send(name)
        seen += name == step
        if seen == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    world.ingester(listen).run(threading.Event(), until_idle_s=0.3)


def _child(world: World, step: str | None = None, nth: int = 1, kill_after: int | None = None) -> int | None:
    """Run one child to its end; its exit code. `kill_after`: SIGKILL from outside after so many steps."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=_ingest_and_die, args=(world, step, nth, theirs))
    child.start()
    theirs.close()
    heard = 0
    try:
        while True:
            ours.recv()
            heard += 1
            if heard == kill_after:
                child.kill()
    except EOFError:
        pass
    child.join(60)
    return child.exitcode


def _messages() -> list[bytes | None]:
    good = [line(i) for i in range(400)]
    return [*good[:200], *[b"broken"] * 20, *good[150:], *good[:30], line(7, prompt="conflicting"), None]


def test_killed_at_every_step(tmp_path: Path, broker: KafkaSettings, topic: str) -> None:
    world = World(tmp_path, broker, topic, block_offsets=60).make()
    put(world.settings, world.topic, _messages(), partitions=3)
    for nth, step in enumerate(Step):
        assert _child(world, step, nth=1 + nth % 2) == -signal.SIGKILL
    # Between two steps, from outside.
    assert _child(world, kill_after=3) == -signal.SIGKILL
    assert _child(world) == 0
    assert world.check_history() == {"block": 400, "dead": 22, "duplicate": 80}
    assert len(world.repo.manifests(STREAM)) >= 502 // 60
    # Nothing is left over that git does not know.
    known = {manifest.block_id for manifest in world.repo.manifests(STREAM)}
    assert {folder.name for folder in (tmp_path / "lanes" / "desk-0").glob("0*/blocks/*")} <= known


def test_apache_kafka_killed_too(tmp_path: Path, apache_kafka: ApacheKafka, topic: str) -> None:
    world = World(tmp_path, apache_kafka.settings, topic, block_offsets=60).make()
    put(world.settings, world.topic, _messages())
    assert _child(world, "dead_lettered", nth=2) == -signal.SIGKILL
    apache_kafka.kill()
    apache_kafka.start()
    put(world.settings, world.topic, [line(i) for i in range(400, 450)])
    assert _child(world) == 0
    assert world.check_history() == {"block": 450, "dead": 22, "duplicate": 80}
