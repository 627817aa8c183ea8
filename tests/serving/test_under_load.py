"""Swaps while clients ask, and the end of a server that is answering."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from privacy.signing import SigningKey
from serving.answer_id import resolve
from serving.inprocess import InProcessEngine
from serving.server import running
from serving.swap import HotSwap
from tests.serving.adapters import random_adapter
from tests.serving.registry import MODEL, Registry, trusted

KEY = b"k" * 32
PROMPT = "where is my order"
VERSIONS = 4
SWAPS = 12
TOKENS = 10


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    for version in range(1, VERSIONS + 1):
        random_adapter(tiny, folder / str(version), version)
    return {version: folder / str(version) for version in range(1, VERSIONS + 1)}


def ask(url, *, stream):
    """(version named by header, versions named in the body, text, answer ids) of one answer."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": stream,
    }
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
        raw = reply.read().decode()
        assert reply.status_code == 200, raw
        header = reply.headers["x-tidegate-version"]
    if not stream:
        whole = json.loads(raw)
        return header, {whole["tidegate"]["version"]}, whole["choices"][0]["message"]["content"], {whole["id"]}
    events = raw.strip().split("\n\n")
    assert events[-1] == "data: [DONE]", raw
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    return header, {chunk["tidegate"]["version"] for chunk in chunks}, text, {chunk["id"] for chunk in chunks}


class Clients:
    """Threads that ask without a pause until told to stop."""

    def __init__(self, url):
        self.answers, self.failures = [], []
        self._url, self._stop = url, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(6)]
        for thread in self._threads:
            thread.start()

    def _run(self, number):
        while not self._stop.is_set():
            try:
                self.answers.append(ask(self._url, stream=number % 2 == 0))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what the test is about
                self.failures.append(repr(error))

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()


def wait_until(true):
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def swap_again_and_again(swap, registry, clients):
    for turn in range(SWAPS):
        version = turn % VERSIONS + 1
        registry.promote(version)
        wait_until(lambda version=version: swap.current.version == version)
        seen = len(clients.answers)
        wait_until(lambda seen=seen: len(clients.answers) >= seen + 6)  # some answers begin on each version


def test_swaps_under_load_lose_and_mix_no_answer(tiny, folders, tmp_path):
    registry = Registry(SigningKey.load_or_create(tmp_path / "approvals.pem"), folders)
    with InProcessEngine(tiny, batch_max=8) as engine:
        swap = HotSwap(
            MODEL,
            engine,
            wanted=registry.wanted,
            fetch=registry.fetch,
            acknowledge=registry.acknowledge,
            trusted=trusted(registry.signer),
            cache=tmp_path / "cache",
            poll_seconds=0.02,
        )
        with running([swap], answer_key=KEY) as url:
            wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
            pid = httpx.get(f"{url}/tidegate/state").json()["pid"]
            clients = Clients(url)
            try:
                wait_until(lambda: clients.answers)
                swap_again_and_again(swap, registry, clients)
            finally:
                clients.stop()
            assert httpx.get(f"{url}/tidegate/state").json()["pid"] == pid == os.getpid()
            assert not swap.alarms
        said = {f"{MODEL}@base": engine.generate(None, [PROMPT], TOKENS)[0]}
        for version, folder in folders.items():
            engine.load("check", folder)
            said[f"{MODEL}@{version}"] = engine.generate("check", [PROMPT], TOKENS)[0]
    assert clients.failures == []
    assert len(set(said.values())) == VERSIONS + 1
    assert len(clients.answers) >= 6 * SWAPS
    for header, versions, text, (answer_id,) in clients.answers:
        assert versions == {header}
        assert text == said[header]
        stream, version = resolve(answer_id, KEY)
        assert f"{stream}@{version or 'base'}" == header
    assert {header for header, *_ in clients.answers} == set(said)
    assert registry.acknowledged == [turn % VERSIONS + 1 for turn in range(SWAPS)]
    assert sorted(registry.fetched) == [1, 2, 3, 4]


SERVE = """
import sys
from pathlib import Path
from learner.base import prepare_base
from privacy.signing import TrustedKeys
from serving.inprocess import InProcessEngine
from serving.server import serve
from serving.swap import HotSwap
base = prepare_base(sys.argv[1], Path(sys.argv[2]) / "bases")
engine = InProcessEngine(base)
none = lambda *_: None
plain = {"wanted": none, "fetch": none, "acknowledge": none, "trusted": TrustedKeys([])}
swap = HotSwap("desk", engine, cache=Path(sys.argv[2]), **plain)
serve([swap], host="127.0.0.1", port=int(sys.argv[3]), answer_key=b"k" * 32)
print("ended")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ready(url):
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_a_signal_ends_the_server_after_its_answers(tiny, tmp_path):
    port = free_port()
    command = [sys.executable, "-c", SERVE, str(tiny.path), str(tmp_path), str(port)]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: process.poll() is not None or ready(url))
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert "data: [DONE]" in list(lines)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert output.rstrip().endswith("ended")
    assert "Traceback" not in output
