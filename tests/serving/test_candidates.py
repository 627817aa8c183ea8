"""Live and candidate side by side, on a real server; and that a candidate answers nowhere else."""

import json
import shutil
import time

import httpx
import pytest

from privacy.signing import SigningKey
from serving.candidates import Candidates
from serving.delivery import Delivery
from serving.errors import SwapError
from serving.inprocess import InProcessEngine
from serving.server import running
from serving.swap import HotSwap
from tests.serving.adapters import random_adapter
from tests.serving.registry import MODEL, Registry, trusted
from tests.serving.waiting import Waiting

QUESTION = {"stream": MODEL, "messages": [{"role": "user", "content": "where is my order"}], "max_tokens": 8}


@pytest.fixture(scope="module")
def core(tiny):
    with InProcessEngine(tiny, batch_max=4, context_max=256) as engine:
        yield engine


@pytest.fixture(scope="module")
def originals(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("versions")
    for version in (1, 2, 3):
        random_adapter(tiny, folder / str(version), version)
    return folder


@pytest.fixture
def world(core, originals, tmp_path):
    """Version 1 is live; what waits is up to the test."""
    for name in core.resident:
        core.unload(name)
    shutil.copytree(originals, tmp_path / "versions")
    folders = {v: tmp_path / "versions" / str(v) for v in (1, 2, 3)}
    registry = Registry(SigningKey.load_or_create(tmp_path / "approvals.pem"), folders)
    registry.promote(1)
    waiting = Waiting(tmp_path / "keys", folders)
    waiting.keys.mkdir()
    swap = HotSwap(
        MODEL,
        core,
        wanted=registry.wanted,
        fetch=registry.fetch,
        acknowledge=registry.acknowledge,
        trusted=trusted(registry.signer),
        cache=tmp_path / "cache",
    )
    candidates = Candidates(
        MODEL, core, seen=waiting.seen, prove=waiting.prove, fetch=waiting.fetch, cache=tmp_path / "cache"
    )
    swap.delivery = Delivery(
        swap,
        candidates,
        trusted=trusted(registry.signer),
        cache=tmp_path / "cache",
        key=b"k" * 32,
        step_back=lambda *_: None,
        poll_seconds=0.05,
    )
    return swap, waiting


@pytest.fixture
def address(world):
    with running([world[0]], answer_key=b"k" * 32, max_tokens={MODEL: 16}) as url:
        while httpx.get(f"{url}/readyz").status_code != 200 or world[0].current.version != 1:
            time.sleep(0.02)
        yield url


def ask(address, **changes):
    return httpx.post(f"{address}/tidegate/compare", json={**QUESTION, **changes}, timeout=60)


def test_live_and_candidate_answer_side_by_side_and_the_candidate_nowhere_else(address, world, core):
    swap, waiting = world
    nobody = ask(address)
    assert (nobody.status_code, nobody.json()["error"]["code"]) == (404, "no_candidate")
    waiting.candidate(2)
    told = ask(address).json()
    resident = next(name for name in core.resident if name.startswith("desk@2"))
    prompt = [QUESTION["messages"][0]["content"]]
    assert told["live"]["version"] == "desk@1"
    assert told["candidate"]["version"] == "desk@2"
    assert told["live"]["text"] == core.generate("desk@1", prompt, 8)[0]
    assert told["candidate"]["text"] == core.generate(resident, prompt, 8)[0]
    assert told["candidate"]["text"] != told["live"]["text"]
    assert not told["same"]
    assert told["candidate"]["usage"]["completion_tokens"] == 8
    ask(address)
    assert waiting.fetched == [2], "it stays resident"
    for name in ("desk@2", resident, "2", "candidate"):
        asked = {"model": name, "messages": QUESTION["messages"]}
        assert httpx.post(f"{address}/v1/chat/completions", json=asked).status_code == 404
    answer = httpx.post(f"{address}/v1/chat/completions", json={**QUESTION, "stream": False, "model": MODEL}).json()
    assert answer["tidegate"]["version"] == "desk@1"
    state = httpx.get(f"{address}/tidegate/state").json()["streams"][MODEL]
    assert state["candidate"] == {"waiting": 2, "resident": ["desk@2"]}
    waiting.change(2, stage="Archived", state="rejected")
    end = time.monotonic() + 10
    while resident in core.resident:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert ask(address).status_code == 404
    assert swap.current.name == "desk@1"


def test_a_question_names_one_of_several_candidates_and_bounds_hold(address, world):
    _, waiting = world
    waiting.candidate(2)
    waiting.candidate(3)
    assert ask(address).json()["candidate"]["version"] == "desk@3"
    assert ask(address, version=2).json()["candidate"]["version"] == "desk@2"
    assert ask(address, version=1).status_code == 404, "the live one is no candidate"
    assert ask(address, max_tokens=17).json()["error"]["param"] == "max_tokens"
    assert ask(address, stream="other").status_code == 404
    assert ask(address, messages=[]).status_code == 400
    assert ask(address, secret=1).json()["error"]["param"] == "secret"


def unsigned(waiting):
    waiting.candidate(2, verdict="")


def failed(waiting):
    waiting.candidate(2, outcome="failed")


def test_noise(waiting):
    waiting.candidate(2, epsilon="infinity")


test_noise.__test__ = False


def forged(waiting):
    verdict = json.loads(waiting.candidate(2, outcome="failed").tag("verdict"))
    waiting.change(2, verdict=json.dumps({**verdict, "outcome": "passed"}))


def changed(waiting):
    waiting.candidate(2)
    shutil.rmtree(waiting.folders[2])
    shutil.copytree(waiting.folders[3], waiting.folders[2])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (unsigned, "no signed verdict"),
        (failed, "its signed verdict says failed"),
        (forged, "does not verify"),
        (test_noise, "no privacy guarantee"),
        (changed, "must be .* as approved"),
    ],
)
def test_a_candidate_that_cannot_prove_itself_answers_nobody(world, core, spoil, reason):
    swap, waiting = world
    spoil(waiting)
    found = swap.delivery.candidates.waiting()
    with pytest.raises(SwapError, match=reason):
        swap.delivery.candidates.hold(found)
    assert not [name for name in core.resident if name.startswith("desk@2")]


def test_a_candidate_that_nobody_asks_for_a_while_is_forgotten_but_not_under_an_answer(world, core, tmp_path):
    swap, waiting = world
    waiting.candidate(2)
    some = Candidates(
        MODEL, core, seen=waiting.seen, prove=waiting.prove, fetch=waiting.fetch, cache=tmp_path / "c", idle_seconds=0.0
    )
    served = some.hold(some.waiting())
    with some.lease(served):
        some.release()
        assert served.adapter in core.resident
    some.release(needed={served})
    assert served.adapter in core.resident
    some.release()
    assert served.adapter not in core.resident
    with pytest.raises(SwapError, match="no longer resident"), some.lease(served):
        pass
    assert swap.delivery.alarms == ()
