"""Canary and shadow on a real server with a real engine; the registry is a list of versions, signed as one signs."""

import asyncio
import json
import shutil
import time
from collections import Counter

import httpx
import pytest

from privacy.signing import SigningKey
from registry.errors import PromotionRefused
from serving.candidates import Candidates
from serving.comparing import FAILED_RUN, Rules
from serving.delivery import Delivery
from serving.engine import Sampling
from serving.errors import EngineDown, EngineError
from serving.inprocess import InProcessEngine
from serving.server import running
from serving.shadow import Idle, Shadow
from serving.swap import HotSwap
from tests.serving.adapters import random_adapter
from tests.serving.registry import MODEL, Registry, trusted
from tests.serving.waiting import Waiting

KEY = b"k" * 32
MESSAGES = [{"role": "user", "content": "where is my order"}]


class Engine(InProcessEngine):
    """The real one, with adapters that can be made to fail or to be slow."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.broken, self.slow_s = "", {}

    async def submit(self, adapter, prompt_ids, sampling):
        if self.broken and self.broken in str(adapter):
            raise EngineError("engine: is broken for the test; ask again")
        import asyncio

        await asyncio.sleep(next((s for name, s in self.slow_s.items() if name in str(adapter)), 0))
        return await super().submit(adapter, prompt_ids, sampling)


@pytest.fixture(scope="module")
def core(tiny):
    with Engine(tiny, batch_max=8, context_max=256) as engine:
        yield engine


@pytest.fixture(scope="module")
def originals(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("versions")
    for version in (1, 2, 3):
        random_adapter(tiny, folder / str(version), version)
    return folder


class World:
    """Version 1 is live, 2 waits; decisions are signed one after another."""

    def __init__(self, core, originals, tmp, *, shadow=0.0):
        for name in core.resident:
            core.unload(name)
        core.broken, core.slow_s = "", {}
        shutil.copytree(originals, tmp / "versions", dirs_exist_ok=True)
        folders = {v: tmp / "versions" / str(v) for v in (1, 2, 3)}
        self.core, self.tmp, self.share = core, tmp, shadow
        self.registry = Registry(SigningKey.load_or_create(tmp / "approvals.pem"), folders)
        self.waiting = Waiting(tmp / "keys", folders)
        self.waiting.keys.mkdir(exist_ok=True)
        self.told, self.away = [], False
        self.registry.promote(1)
        self.waiting.candidate(2)
        self.make()

    def make(self):
        """A server's parts, as a restart makes them anew."""
        registry, waiting, cache = self.registry, self.waiting, self.tmp / "cache"
        self.swap = HotSwap(
            MODEL,
            self.core,
            wanted=registry.wanted,
            fetch=registry.fetch,
            acknowledge=registry.acknowledge,
            trusted=trusted(registry.signer),
            cache=cache,
            poll_seconds=0.05,
        )
        candidates = Candidates(
            MODEL, self.core, seen=waiting.seen, prove=waiting.prove, fetch=waiting.fetch, cache=cache
        )
        self.delivery = self.swap.delivery = Delivery(
            self.swap,
            candidates,
            trusted=trusted(registry.signer),
            cache=cache,
            key=KEY,
            step_back=self.step_back,
            rules=Rules(requests_min=5),
            shadow=Shadow(candidates, Idle(self.core), self.share) if self.share else None,
            poll_seconds=0.05,
        )

    def step_back(self, version, seq, why):
        if self.away:
            raise ConnectionError("connection refused")
        self.told.append((version, seq, why))

    def canary(self, share, version=2, **terms):
        told = {"share": share, **({"header": True, "sticky": True, **terms} if share else terms)}
        row = self.registry.approval(version, kind="canary", to="Staging", canary=told)
        self.waiting.change(version, canary=json.dumps(row))
        return row

    def tick(self):
        self.swap.tick()
        self.delivery.tick()

    @property
    def kinds(self):
        return [alarm.kind for alarm in self.swap.alarms]


@pytest.fixture
def world(core, originals, tmp_path):
    made = World(core, originals, tmp_path)
    made.tick()
    return made


def version_of(world, header=None, user=None):
    with world.delivery.admit(header, user) as trip:
        return trip.served.name


def shares(world, requests=400, **how):
    return Counter(version_of(world, **how) for _ in range(requests))


def test_a_signed_share_is_what_the_canary_gets_until_a_later_decision(world):
    assert shares(world, 50) == {"desk@1": 50}
    world.canary(0.25)
    world.tick()
    seen = shares(world, 1000)
    assert 190 < seen["desk@2"] < 310
    assert world.swap.current.name == "desk@1"
    assert world.registry.acknowledged == [1], "the alias live is not the canary's"
    state = world.swap.state()["canary"]
    assert (state["version"], state["share"]) == ("desk@2", 0.25)
    world.canary(0.9)
    world.tick()
    assert shares(world, 100)["desk@2"] > 70
    world.canary(0)
    world.tick()
    assert shares(world, 50) == {"desk@1": 50}
    assert world.swap.state()["canary"] is None
    world.canary(0.5)
    world.tick()
    world.registry.promote(2)
    world.swap.tick()
    assert shares(world, 50) == {"desk@2": 50}, "promoted: over at the flip, before delivery looked"
    world.tick()
    assert world.kinds == []


def test_a_client_may_choose_and_a_user_stays_on_one_side(world):
    world.canary(0.5)
    world.tick()
    assert shares(world, 30, header="always") == {"desk@2": 30}
    assert shares(world, 30, header="never") == {"desk@1": 30}
    users = {f"user-{n}": version_of(world, user=f"user-{n}") for n in range(200)}
    assert 60 < Counter(users.values())["desk@2"] < 140
    assert all(version_of(world, user=user) == side for user, side in users.items())
    world.make()  # a restart
    world.tick()
    assert all(version_of(world, user=user) == side for user, side in users.items())
    world.canary(0.7)
    world.tick()
    more = {user: version_of(world, user=user) for user in users}
    assert all(more[user] == "desk@2" for user, side in users.items() if side == "desk@2"), "who had it keeps it"
    assert Counter(more.values())["desk@2"] > Counter(users.values())["desk@2"]
    world.canary(0.5, header=False, sticky=False)
    world.tick()
    assert set(shares(world, header="always")) == {"desk@1", "desk@2"}
    assert set(shares(world, user="one")) == {"desk@1", "desk@2"}


def test_a_later_decision_on_live_ends_a_canary_and_old_ones_bring_none_back(world):
    old = world.canary(0.5)
    world.tick()
    newer = world.canary(0.4)
    world.tick()
    world.waiting.change(2, canary=json.dumps(old))
    world.tick()
    assert (shares(world, 50), world.kinds) == ({"desk@1": 50}, ["canary"])
    assert f"seq={old['seq']} must be >= {newer['seq']}" in str(world.swap.alarms[0])
    world.make()
    world.tick()
    assert (shares(world, 50), world.kinds) == ({"desk@1": 50}, ["canary"]), "nor after a restart"
    world.waiting.change(2, canary=json.dumps(newer))
    world.tick()
    assert set(shares(world)) == {"desk@1", "desk@2"}
    world.registry.promote(3, kind="rollback")
    world.tick()
    assert shares(world, 50) == {"desk@3": 50}


def unsigned(_world, row):
    return {**row, "canary": {**row["canary"], "share": 0.9}}


def stranger(world, row):
    return SigningKey.load_or_create(world.tmp / "mallory.pem").sign(row)


def of_another_version(world, _row):
    return world.registry.approval(3, kind="canary", to="Staging", canary={"share": 0.5})


def of_another_model(world, _row):
    return world.registry.approval(2, kind="canary", model="other", to="Staging", canary={"share": 0.5})


def a_promotion(world, _row):
    return world.registry.approval(2)


def a_share_of_all(world, _row):
    return world.registry.approval(2, kind="canary", to="Staging", canary={"share": 1})


def without_privacy(world, _row):
    return world.registry.approval(2, kind="canary", to="Staging", canary={"share": 0.5}, guarantee="none")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (unsigned, "signature does not match"),
        (stranger, "not trusted"),
        (of_another_version, "is for version 3"),
        (of_another_model, "of model 'other'"),
        (a_promotion, "not valid"),
        (a_share_of_all, "below 1"),
        (without_privacy, "without privacy"),
        (lambda _world, _row: "nonsense", "not valid"),
    ],
)
def test_what_nobody_signed_for_answers_nobody_and_raises_one_alarm(world, core, spoil, reason):
    row = world.canary(0.5)
    world.waiting.change(2, canary=json.dumps(spoil(world, row)))
    for _ in range(3):
        world.tick()
    assert shares(world, 50, header="always") == {"desk@1": 50}
    assert not [name for name in core.resident if name.startswith("desk@2")]
    assert world.kinds == ["canary"]
    assert reason in str(world.swap.alarms[0])


def test_an_adapter_that_is_not_the_signed_one_answers_nobody(world):
    shutil.rmtree(world.waiting.folders[2])
    shutil.copytree(world.waiting.folders[3], world.waiting.folders[2])
    sha = next(v for v in world.waiting.versions if v.version == 2).adapter_sha256
    row = world.registry.approval(2, kind="canary", to="Staging", canary={"share": 0.5}, adapter_sha256=sha)
    world.waiting.change(2, canary=json.dumps(row))
    world.tick()
    assert (shares(world, 30), world.kinds) == ({"desk@1": 30}, ["canary"])
    assert "as approved" in str(world.swap.alarms[0])


def test_a_rejected_canary_is_over_and_leaves_the_engine(world, core):
    world.canary(0.5)
    world.tick()
    with world.delivery.admit("always") as trip:
        adapter = trip.served.adapter
        world.waiting.change(2, stage="Archived", state="rejected")
        world.tick()
        assert adapter in core.resident, "its last answer is not over"
        assert version_of(world, "always") == "desk@1"
    world.tick()
    assert adapter not in core.resident


@pytest.fixture
def served(core, originals, tmp_path):
    """A running server; ends with the test."""

    def start(**how):
        world = World(core, originals, tmp_path, **how)
        address = stack.enter_context(running([world.swap], answer_key=KEY, max_tokens={MODEL: 16}))
        until(lambda: httpx.get(f"{address}/readyz").status_code == 200 and world.swap.current.version == 1)
        return world, address

    from contextlib import ExitStack

    with ExitStack() as stack:
        yield start


def until(done, seconds=30):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def chat(client, header=None, **more):
    headers = {"x-tidegate-canary": header} if header else {}
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, "temperature": 0, **more}
    return client.post("/v1/chat/completions", json=body, headers=headers)


def test_on_the_wire_a_canary_is_one_version_from_header_to_answer_id(served, core):
    from serving.answer_id import resolve

    world, address = served()
    world.canary(0.5)
    until(lambda: world.delivery.share)
    with httpx.Client(base_url=address, timeout=60) as client:
        for header, name in (("always", "desk@2"), ("never", "desk@1")):
            answer = chat(client, header)
            told = answer.json()
            assert answer.headers["x-tidegate-version"] == told["tidegate"]["version"] == name
            assert resolve(told["id"], KEY) == (MODEL, int(name[-1]))
            events = chat(client, header, stream=True)
            assert events.headers["x-tidegate-version"] == name
            assert events.text.endswith("[DONE]\n\n")
        assert chat(client, "sometimes").json()["error"]["param"] == "x-tidegate-canary"
        for name in ("user", "safety_identifier"):
            assert len({chat(client, **{name: "ann"}).headers["x-tidegate-version"] for _ in range(6)}) == 1
        page = client.get("/metrics").text
        assert 'tidegate_canary_share{stream="desk",version="desk@2"} 0.5' in page
        assert 'tidegate_requests_total{route="chat",status="200",stream="desk",version="desk@2"}' in page
        state = client.get("/tidegate/state").json()["streams"][MODEL]["canary"]
        assert state["requests"] + state["live_requests"] == 16
        assert "ann" not in json.dumps(client.get("/tidegate/state").json())


def test_a_failing_canary_is_stepped_back_from_at_once_and_told_when_the_registry_is_back(served, core):
    world, address = served()
    world.away = True
    row = world.canary(0.5)
    until(lambda: world.delivery.share)
    with httpx.Client(base_url=address, timeout=60) as client:
        core.broken = "desk@2"
        answers = []
        while world.delivery.share:
            answers.append(chat(client).status_code)
        assert answers.count(500) >= FAILED_RUN
        assert {chat(client).headers["x-tidegate-version"] for _ in range(10)} == {"desk@1"}
        until(lambda: world.kinds == ["stepped_back"])
        alarm = str(world.swap.alarms[0])
        assert "version 2 stepped back from 0.5 of the requests" in alarm
        assert "has not taken it yet (connection refused)" in alarm
        assert 'tidegate_canaries_stepped_back_total{stream="desk"} 1.0' in client.get("/metrics").text
        assert world.told == []
        world.away = False
        until(lambda: "not taken it yet" not in str(world.swap.alarms))  # noted too: a restart tells it no more
        ((version, seq, why),) = world.told
        assert (version, seq) == (2, row["seq"])
        assert "fail" in why
    # A restart, with the registry still showing the old decision: it stays over.
    world.make()
    world.tick()
    assert (shares(world, 30, header="always"), world.kinds) == ({"desk@1": 30}, ["stepped_back"])
    assert len(world.told) == 1
    core.broken = ""
    world.canary(0.5)  # a person tries again
    world.tick()
    assert (version_of(world, "always"), world.kinds) == ("desk@2", [])


def test_a_step_back_that_another_server_took_is_over_here_and_stands_until_a_person_decides(world):
    world.canary(0.5)
    world.tick()
    world.canary(0, automatic=True)
    world.tick()
    assert (shares(world, 30, header="always"), world.kinds) == ({"desk@1": 30}, ["stepped_back"])
    world.canary(0)
    world.tick()
    assert world.kinds == []


def test_a_step_back_that_the_registry_refuses_is_over_there_already(world):
    world.canary(0.5)
    world.tick()
    tries = []

    def refuse(*told):
        tries.append(told)
        raise PromotionRefused("is no canary any more")

    world.delivery._tell = refuse
    for _ in range(FAILED_RUN):
        with world.delivery.admit("always") as trip:
            trip.failed = True
    world.tick()
    world.tick()
    assert len(tries) == 1


def test_an_engine_that_was_away_says_nothing_of_one_version(world, monkeypatch):
    world.canary(0.5)
    world.tick()

    async def away(*_):
        raise EngineDown("engine: is away")

    monkeypatch.setattr(world.core, "submit", away)
    for _ in range(3 * FAILED_RUN):
        with world.delivery.admit("always") as trip, pytest.raises(EngineDown):
            asyncio.run(trip.submit(trip.served.adapter, [1], Sampling(1)))
    world.tick()
    assert (world.told, world.kinds) == ([], [])
    assert world.delivery.share == ("desk@2", 0.5)


def test_a_canary_is_judged_whatever_another_version_s_tag_holds(world):
    world.canary(0.5)
    world.tick()
    world.waiting.candidate(3)
    world.waiting.change(3, canary="[" * 5000)
    for _ in range(FAILED_RUN):
        with world.delivery.admit("always") as trip:
            trip.fail(EngineError("engine: is broken"))
    world.tick()
    assert [version for version, *_ in world.told] == [2]
    assert set(world.kinds) == {"canary", "stepped_back"}


def test_a_slow_canary_is_stepped_back_from_by_the_statistics(served, core):
    world, address = served()
    world.canary(0.5)
    until(lambda: world.delivery.share)
    core.slow_s = {"desk@2": 0.15}
    with httpx.Client(base_url=address, timeout=60) as client:
        for _ in range(200):
            assert chat(client).status_code == 200
            if world.delivery.share is None:
                break
    until(lambda: world.told)
    assert "slower" in world.told[0][2]


def test_shadow_asks_the_candidate_after_live_and_shows_nobody(served, core):
    world, address = served(shadow=1.0)
    until(lambda: world.delivery.shadow.resident)
    with httpx.Client(base_url=address, timeout=60) as client:
        for _ in range(5):
            answer = chat(client, max_tokens=8)
            assert answer.headers["x-tidegate-version"] == "desk@1"
            time.sleep(0.3)
        chat(client, temperature=1.0)
        counts = world.delivery.shadow.counts
        until(lambda: counts["desk@2", "drawn"] == 1)
        assert counts["desk@2", "other"] == 5
        page = client.get("/metrics").text
        assert 'tidegate_shadow_answers_total{outcome="other",stream="desk",version="desk@2"} 5.0' in page
        assert "tidegate_shadow_seconds_total" in page
        assert "where is" not in page
        assert 'tidegate_requests_total{route="chat",status="200",stream="desk",version="desk@2"}' not in page
        world.canary(0.5)
        until(lambda: world.delivery.share)
        assert world.delivery.shadow.resident is None, "people's answers tell more"


def test_shadow_yields_to_whoever_asks(served, core):
    world, address = served(shadow=1.0)
    until(lambda: world.delivery.shadow.resident)
    shadow = world.delivery.shadow
    with httpx.Client(base_url=address, timeout=60) as client:
        core.slow_s = {"desk@2": 5.0}  # a candidate that would take seconds
        for _ in range(4):
            began = time.monotonic()
            assert chat(client).status_code == 200
            assert time.monotonic() - began < 4
        core.slow_s = {}
        assert shadow.counts["desk@2", "dropped"] >= 3
        assert not [key for key in shadow.counts if key[1] in {"same", "other", "failed"}]
        until(lambda: not core.waiting and not core.writing)


def test_no_canary_answers_while_the_kill_switch_is_on(world):
    world.canary(0.5)
    world.tick()
    assert version_of(world, header="always") == "desk@2"
    world.swap.kill_switch.kill(who="pat", why="", at="2026-11-28T01:00:00Z")
    assert shares(world, 50) == {"desk@base": 50}
    assert version_of(world, header="always") == "desk@base"
    world.swap.kill_switch.end()
    assert version_of(world, header="always") == "desk@2"
