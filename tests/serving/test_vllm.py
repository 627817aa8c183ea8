"""The vLLM engine on a real vLLM, on this CPU (`make vllm`), against the in-process engine. Slow, and in order."""

import asyncio
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import httpx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from learner.adapter import WEIGHTS_FILE, write_adapter
from learner.base import EMBEDDED, prepare_base
from learner.plan import LoraSettings
from privacy.signing import SigningKey
from serving.engine import Finish, Sampling
from serving.errors import AdapterLost, AnswerTimeout, EngineDown, EngineError, QueueFull, UnknownAdapter
from serving.inprocess import InProcessEngine
from serving.server import running
from serving.swap import HotSwap
from serving.vllm import VllmEngine, _Resident
from tests.kafka_servers import missing
from tests.serving.adapters import drawn, random_adapter
from tests.serving.conftest import ALL, NARROW
from tests.serving.fleet import wait_until
from tests.serving.registry import MODEL, Registry, trusted
from tests.serving.test_delivery import World
from tests.serving.test_router import Clients, assert_one_text_each
from tests.serving.vllm_server import KEY, python, vllm_server
from tests.tiny import tiny_base

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TIE = 1e-3  # nats; two implementations in fp32 differ by less than a hundredth of it
TOKENS = 16
PROMPTS = ("where is my order", "hi", "¿Dónde está 我的 订单 🙂?", "My card was charged twice, can you look into that?")
SHAPES = {
    "upper": LoraSettings(r=4, layers=2, targets=("q_proj", "v_proj", "down_proj")),
    "all": LoraSettings(r=8, alpha=16, layers=3, targets=ALL),
    "stable": LoraSettings(r=8, alpha=8, rslora=True, layers=1, targets=ALL),
    "patterns": LoraSettings(r=3, layers=2, targets=ALL, rank_pattern={"layers.1.*": 5}, alpha_pattern={"q_proj": 3.0}),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """vLLM's CPU attention has no heads of 16."""
    return tiny_base(tmp_path_factory.mktemp("small"), hidden=64)


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm-adapters")
    for seed, (name, settings) in enumerate(SHAPES.items()):
        write_adapter(folder / name, settings, drawn(small, settings, seed).weights(), small)
    return {name: folder / name for name in SHAPES}


@pytest.fixture(scope="module")
def server(small, tmp_path_factory):
    if python() is None:
        missing(".venv-vllm; `make vllm` builds it")
    with vllm_server(small, tmp_path_factory.mktemp("vllm")) as started:
        yield started


@pytest.fixture(scope="module")
def engine(server, small, tmp_path_factory):
    with VllmEngine(
        small, server.url, tmp_path_factory.mktemp("nothing"), key=KEY, owner="tests", batch_max=8, queue_max=8
    ) as made:
        wait_until(lambda: made.healthy)
        yield made


async def said(engine, adapter, prompt, **options):
    """Tokens with their likelihoods, text, and the end of one answer."""
    ids = engine.render([{"role": "user", "content": prompt}])
    options = {"max_tokens": TOKENS, "logprobs": 5, **options}
    events = [event async for event in await engine.submit(adapter, ids, Sampling(**options))]
    tokens = [token for event in events[:-1] for token in event.tokens]
    return tokens, "".join(event.text for event in events[:-1]), events[-1]


def assert_same_but_for_ties(ours, theirs):
    for mine, other in zip_longest(ours, theirs):
        if mine is None or other is None or mine.raw != other.raw:
            top = {one.raw: one.logprob for one in mine.top} if mine else {}
            assert mine and other and abs(top[other.raw] - mine.logprob) < TIE, (mine, other)
            return
        assert mine.logprob == pytest.approx(other.logprob, abs=TIE)


def compare(ours, theirs, adapter, prompts=PROMPTS):
    async def all_at_once(engine):
        return await asyncio.gather(*(said(engine, adapter, prompt) for prompt in prompts))

    for (mine, my_text, my_end), (other, text, end) in zip(
        asyncio.run(all_at_once(ours)), asyncio.run(all_at_once(theirs)), strict=True
    ):
        assert_same_but_for_ties(mine, other)
        if [token.raw for token in mine] == [token.raw for token in other]:
            assert (text, end) == (my_text, my_end)


@pytest.mark.parametrize("name", [None, *SHAPES])
def test_greedy_answers_and_likelihoods_are_those_of_the_in_process_engine(engine, small, folders, name):
    with InProcessEngine(small) as ours:
        if name:
            ours.load(name, folders[name])
            engine.load(name, folders[name])
            engine.probe(name)
        compare(ours, engine, name)


def test_the_bare_base_is_itself_beside_adapters_in_one_batch(engine, small, folders):
    names = [None, *SHAPES]

    async def mixed(engine):
        return await asyncio.gather(*(said(engine, name, prompt) for prompt in PROMPTS for name in names))

    with InProcessEngine(small) as ours:
        for name, folder in folders.items():
            ours.load(name, folder)
        expected = asyncio.run(mixed(ours))
    wide = VllmEngine(small, engine.url, folders["all"].parent, key=KEY, owner="wide", batch_max=64)
    with wide:
        for name, folder in folders.items():
            wide.load(name, folder)
        for (mine, *_), (other, *_) in zip(expected, asyncio.run(mixed(wide)), strict=True):
            assert_same_but_for_ties(mine, other)
        for name in folders:
            wide.unload(name)


def test_stop_texts_seeds_and_time_are_kept(engine):
    whole, text, end = asyncio.run(said(engine, "all", PROMPTS[0]))
    assert end == Finish("length", len(engine.render([{"role": "user", "content": PROMPTS[0]}])), TOKENS)
    stop = text[len(text) // 2 :][:4]
    _, cut, end = asyncio.run(said(engine, "all", PROMPTS[0], stop=(stop,)))
    assert cut == text[: text.index(stop)]
    assert end.reason == "stop"
    drawn_ = [asyncio.run(said(engine, "all", PROMPTS[0], temperature=1.0, seed=seed))[1] for seed in (1, 1, 2)]
    assert drawn_[0] == drawn_[1] != drawn_[2]
    with pytest.raises(AnswerTimeout):
        asyncio.run(said(engine, "all", PROMPTS[0], max_tokens=400, timeout_s=0.05))
    assert all(token.top and len(token.top) <= 5 for token in whole)


def test_an_answer_nobody_waits_for_is_stopped(engine, server):
    async def leave():
        ids = engine.render([{"role": "user", "content": "hi"}])
        answer = await engine.submit("all", ids, Sampling(450))
        async for _ in answer:
            break
        assert server.running() == 1
        answer.cancel()

    asyncio.run(leave())
    wait_until(lambda: server.running() == 0, seconds=5)
    wait_until(lambda: engine.writing == 0, seconds=5)


def test_a_full_queue_says_when_to_come_back(engine):
    async def crowd():
        ids = engine.render([{"role": "user", "content": "hi"}])
        answers = [await engine.submit(None, ids, Sampling(64)) for _ in range(16)]
        with pytest.raises(QueueFull) as full:
            await engine.submit(None, ids, Sampling(64))
        assert full.value.retry_after_s >= 1
        for answer in answers:
            answer.cancel()

    asyncio.run(crowd())
    wait_until(lambda: engine.writing == 0, seconds=30)


def test_bad_adapters_are_refused_with_a_reason(engine, small, folders, tmp_path):
    write_adapter(tmp_path / "narrow", NARROW, drawn(small, NARROW, 1).weights(), small)
    random_adapter(tiny_base(tmp_path / "other", hidden=64, seed=8), tmp_path / "stranger", 1)
    wide = LoraSettings(r=32, layers=1, targets=("q_proj",))
    write_adapter(tmp_path / "wide", wide, drawn(small, wide, 1).weights(), small)
    before = engine.resident
    for name, reason in (("narrow", "bottleneck"), ("stranger", "base"), ("wide", "rank"), ("none", "adapter")):
        with pytest.raises(EngineError, match=reason):
            engine.load(name, tmp_path / name)
    assert engine.resident == before
    with pytest.raises(UnknownAdapter):
        engine.probe("wide")


def test_an_adapter_that_overflows_is_refused_and_would_not_pass_the_probe(engine, folders, tmp_path):
    shutil.copytree(folders["all"], tmp_path / "huge")
    file = tmp_path / "huge" / WEIGHTS_FILE
    with safe_open(file, "pt") as opened:
        told = opened.metadata()
    save_file({name: torch.full_like(weight, 3e37) for name, weight in load_file(file).items()}, file, told)
    with pytest.raises(EngineError, match="ran away"):
        engine.load("huge", tmp_path / "huge")
    # Past that check: what vLLM computes of it is not finite, and stays in its cache; nobody must get it.
    huge = _Resident(f"huge#{engine._owner}-0", tmp_path / "huge")
    engine._run(engine._load(huge))
    engine._residents = {**engine._residents, "huge": huge}
    with pytest.raises(EngineError, match="not finite"):
        engine.probe("huge")
    engine.unload("huge")
    for name in (None, "all", "upper"):
        assert all(token.logprob < 0 for token in asyncio.run(said(engine, name, "hi"))[0])


def test_a_used_name_is_never_used_again_and_what_is_left_is_unloaded(engine, server, folders):
    async def across():
        ids = engine.render([{"role": "user", "content": PROMPTS[0]}])
        answer = await engine.submit("again", ids, Sampling(200))
        await asyncio.to_thread(engine.load, "again", folders["upper"])
        lasting = {name for name in server.loras() if name.startswith("again#")}
        return lasting, [event async for event in answer][-1]

    engine.load("again", folders["all"])
    (first,) = (name for name in server.loras() if name.startswith("again#"))
    lasting, end = asyncio.run(across())
    assert end.completion_tokens == 200  # it finished on the one it began with
    assert first in lasting
    assert len(lasting) == 2
    wait_until(lambda: first not in server.loras(), seconds=10)
    engine.unload("again")
    wait_until(lambda: not any(name.startswith("again#") for name in server.loras()), seconds=10)


def test_swaps_under_load_lose_and_mix_no_answer_and_leave_nothing_behind(engine, server, folders, tmp_path):
    numbered = dict(enumerate(folders.values(), 1))
    registry = Registry(SigningKey.load_or_create(tmp_path / "approvals.pem"), numbered)
    swap = HotSwap(
        MODEL,
        engine,
        wanted=registry.wanted,
        fetch=registry.fetch,
        acknowledge=registry.acknowledge,
        trusted=trusted(registry.signer),
        cache=tmp_path / "cache",
        poll_seconds=0.05,
    )
    order = [0]
    with running([swap], answer_key=b"k" * 32) as url:
        wait_until(lambda: swap.current is not None)
        with Clients(url) as clients:
            clients.wait_more()
            for turn in range(8):
                version = turn % len(numbered) + 1
                registry.promote(version)
                wait_until(lambda version=version: swap.current.version == version)
                order.append(version)
                clients.wait_more()
        assert clients.failures == []
        assert_one_text_each(clients.answers)
        assert len(clients.answers) > 8 * 8
        named = {name.partition("#")[0] for name in server.loras() if name.startswith(MODEL)}
        assert named <= set(swap.state()["resident"])
    assert registry.acknowledged == order[1:]


def test_a_canary_gets_its_share_in_the_same_batches_and_becomes_live(engine, small, tmp_path):
    for version in (1, 2, 3):
        random_adapter(small, tmp_path / "originals" / str(version), version)
    world = World(engine, tmp_path / "originals", tmp_path / "world")
    asked = {"model": MODEL, "max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": "hi"}]}
    with running([world.swap], answer_key=b"k" * 32) as url, httpx.Client(base_url=url, timeout=60) as client:

        def ask(header):
            answer = client.post("/v1/chat/completions", json=asked, headers={"x-tidegate-canary": header})
            assert answer.status_code == 200, answer.text
            return answer.headers["x-tidegate-version"], answer.json()["choices"][0]["message"]["content"]

        wait_until(lambda: world.swap.current is not None)
        world.canary(0.5)
        wait_until(lambda: world.delivery.share)
        with ThreadPoolExecutor(8) as clients:
            seen = set(clients.map(ask, ("always", "never") * 12))
        said = dict(seen)
        assert seen == {("desk@1", said["desk@1"]), ("desk@2", said["desk@2"])}
        assert said["desk@1"] != said["desk@2"]
        world.registry.promote(2)
        wait_until(lambda: world.swap.current.name == "desk@2")
        assert ask("never") == ("desk@2", said["desk@2"])
        assert world.kinds == []


def test_killed_and_started_again_it_has_everything_before_anybody_is_answered(engine, server, folders):
    engine.load("kept", folders["all"])
    before = asyncio.run(said(engine, "kept", PROMPTS[0]))

    async def cut_off():
        ids = engine.render([{"role": "user", "content": PROMPTS[0]}])
        answer = await engine.submit("kept", ids, Sampling(450))
        async for _ in answer:
            await asyncio.to_thread(server.kill)
            break
        async for _ in answer:
            pass

    with pytest.raises(EngineDown):
        asyncio.run(cut_off())
    wait_until(lambda: not engine.healthy, seconds=10)
    with pytest.raises(EngineDown):
        asyncio.run(said(engine, "kept", PROMPTS[0]))
    server.start()
    wait_until(lambda: engine.healthy)
    after = asyncio.run(said(engine, "kept", PROMPTS[0]))
    assert after[1:] == before[1:]
    engine.unload("kept")


def test_an_adapter_whose_files_are_gone_takes_no_other_with_it(engine, server, folders, tmp_path):
    shutil.copytree(folders["all"], tmp_path / "gone")
    engine.load("gone", tmp_path / "gone")
    engine.load("kept", folders["upper"])
    shutil.rmtree(tmp_path / "gone")
    server.kill()
    wait_until(lambda: not engine.healthy, seconds=10)
    server.start()
    wait_until(lambda: engine.healthy)
    assert asyncio.run(said(engine, "kept", "hi"))[2].completion_tokens
    assert "kept" in engine.resident and "gone" not in engine.resident
    with pytest.raises(AdapterLost, match="has lost it"):
        asyncio.run(said(engine, "gone", "hi"))
    for name in ("gone", "kept"):
        engine.unload(name)


def test_a_connection_that_does_not_come_about_is_no_slow_answer(small, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.vllm.LOOK_TIMEOUT_S", 0.5)
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for waiting in (first, second):  # nobody accepts them, and no third is let in
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        with VllmEngine(small, f"http://127.0.0.1:{full.getsockname()[1]}", tmp_path) as engine:
            monkeypatch.setattr(VllmEngine, "healthy", True)
            with pytest.raises(EngineDown):
                asyncio.run(said(engine, None, "hi", timeout_s=30.0))


def test_what_an_earlier_process_left_is_unloaded(engine, server, small, folders, tmp_path):
    with VllmEngine(small, server.url, tmp_path, key=KEY, owner="gone") as gone:
        gone.load("orphan", folders["all"])
        assert any(name.startswith("orphan#") for name in server.loras())
    with VllmEngine(small, server.url, tmp_path, key=KEY, owner="gone") as again:
        wait_until(lambda: again.healthy)
        assert not any(name.startswith("orphan#") for name in server.loras())
    assert {name.partition("#")[0] for name in server.loras()} == {"base", *engine.resident}


def test_a_vllm_on_another_base_is_not_believed(server, tmp_path):
    other = tiny_base(tmp_path, hidden=64, seed=9)
    with VllmEngine(other, server.url, tmp_path, key=KEY) as engine:
        time.sleep(2)
        assert not engine.healthy
        with pytest.raises(EngineDown, match="must serve"):
            asyncio.run(said(engine, None, "hi"))


def test_the_embedded_base_answers_as_in_process(tmp_path_factory, tmp_path):
    if python() is None:
        missing(".venv-vllm; `make vllm` builds it")
    import os
    from pathlib import Path

    base = prepare_base(EMBEDDED, Path(os.environ.get("TIDEGATE_BASES", tmp_path / "bases")))
    random_adapter(base, tmp_path / "adapter", 1, layers=tuple(range(24, 30)), targets=ALL)
    with vllm_server(base, tmp_path) as server, VllmEngine(base, server.url, tmp_path, key=KEY) as engine:
        engine.load("a", tmp_path / "adapter")
        engine.probe("a")
        with InProcessEngine(base, threads=2) as ours:
            ours.load("a", tmp_path / "adapter")
            for name in (None, "a"):
                compare(ours, engine, name)
