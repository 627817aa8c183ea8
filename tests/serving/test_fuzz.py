"""Whatever is sent, the server answers as it says it does, goes on, and does not grow."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi import checks as openapi_checks

from tests.serving.fuzzing import raws, send_all, still_answers
from tests.serving.registry import MODEL

ROOT = Path(__file__).parents[2]
# What is checked of every answer. Not that a right-looking request is accepted: bounds of tokens are the stream's own.
CHECKS = [
    not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
    openapi_checks.unsupported_method,
]


@pytest.fixture(scope="module")
def server(tiny, adapters, tmp_path_factory):
    """Address and process of a server of its own, so that its memory can be watched."""
    folder = tmp_path_factory.mktemp("fuzz")
    command = [sys.executable, "-m", "tests.serving.desk", str(tiny.path), str(adapters["upper"]), str(folder)]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http"), (folder / "log").read_text()
        yield address, process, folder / "log"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        log.close()


def memory_mb(process):
    return psutil.Process(process.pid).memory_info().rss / 2**20


def described(address):
    """The server's own description, with models and bounds of its streams, so that requests get as far as answers."""
    schema = httpx.get(f"{address}/openapi.json").json()
    for name in ("/v1/chat/completions", "/v1/completions"):
        body = schema["paths"][name]["post"]["requestBody"]["content"]["application/json"]["schema"]
        body["properties"]["model"] = {"enum": [MODEL, "bare", "nobody"]}
        for bound in ("max_tokens", "max_completion_tokens"):
            if bound in body["properties"]:
                body["properties"][bound] = {
                    "anyOf": [{"type": "integer", "minimum": 1, "maximum": 4}, {"type": "null"}]
                }
    schema["paths"]["/v1/models/{stream}"]["get"]["parameters"][0]["schema"] = {"enum": [MODEL, "nobody", "ü/?"]}
    # What is too large is refused before anybody looks whether it is right.
    refusals = {"negative_data_rejection": {"expected-statuses": [400, 404, 409, 413]}}
    return schemathesis.openapi.from_dict(schema, config=SchemathesisConfig.from_dict({"checks": refusals}))


def ask_as(operation, mode, address, examples, found, first):
    """Ask one operation by right or by wrong requests, and check each answer."""

    @seed(first)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode))
    def ask(case):
        reply = case.call(base_url=address, timeout=30)
        found[mode.value, case.method, case.path, reply.status_code] += 1
        case.validate_response(reply, checks=CHECKS)

    ask()


def by_description(address, examples, first=1):
    """Requests made from the description, right ones and wrong ones; how often each (operation, status) came."""
    found = Counter()
    for result in described(address).get_all_operations():
        operation = result.ok()
        ask_as(operation, GenerationMode.POSITIVE, address, examples, found, first)
        if operation.body:  # of a path alone every text is right
            ask_as(operation, GenerationMode.NEGATIVE, address, examples, found, first)
    return found


def told(found):
    return "\n".join(f"{count:>6}  {' '.join(map(str, key))}" for key, count in sorted(found.items(), key=str))


def test_requests_made_from_the_description_are_answered_as_described(server):
    address, _, log = server
    found = by_description(address, 25)
    print("\n" + told(found))  # noqa: T201 - `pytest -s` shows it
    assert found.total() > 130
    assert any(key[-1] == 200 and "chat" in key[2] for key in found)
    assert still_answers(address)
    assert "request failed" not in log.read_text()


def test_bytes_that_are_no_request_break_nothing(server):
    address, process, log = server
    found = send_all(address, raws(seed=1, count=330))
    print("\n" + told(found))  # noqa: T201 - `pytest -s` shows it
    assert process.poll() is None
    assert still_answers(address)
    assert "request failed" not in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_requests_break_nothing_and_leave_memory_flat(server):
    address, process, log = server
    send_all(address, raws(seed=2, count=1000))  # caches fill, pools grow
    before = memory_mb(process)
    files = psutil.Process(process.pid).num_fds()
    described_ones, raw, shown = Counter(), Counter(), [before]
    for turn in range(5):
        raw += send_all(address, raws(seed=10 + turn, count=1600))
        described_ones += by_description(address, 70, first=turn)
        shown.append(memory_mb(process))
    print(f"\n{told(described_ones)}\n{told(raw)}")  # noqa: T201 - `pytest -s` shows it
    print(f"{described_ones.total()} described, {raw.total()} raw; MB: {[round(mb) for mb in shown]}")  # noqa: T201
    assert described_ones.total() + raw.total() >= 10_000
    assert still_answers(address)
    assert "request failed" not in log.read_text()
    assert shown[-1] < shown[1] * 1.05 + 10
    assert psutil.Process(process.pid).num_fds() <= files + 5


def test_who_never_finishes_a_head_or_a_body_is_cut_off(tiny, adapters, monkeypatch, tmp_path):
    from serving import connection, gate
    from serving.inprocess import InProcessEngine
    from tests.serving.desk import served

    monkeypatch.setattr(connection, "HEAD_S_MAX", 0.5)
    monkeypatch.setattr(gate, "BODY_S_MAX", 0.5)
    with InProcessEngine(tiny) as engine, served(engine, adapters["upper"], tmp_path) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        began = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=30) as silent:
            assert silent.recv(100) == b""
        with socket.create_connection((host, int(port)), timeout=30) as drops, pytest.raises(ConnectionError):
            for _ in range(300):
                drops.sendall(b"G")
                time.sleep(0.1)
        with socket.create_connection((host, int(port)), timeout=30) as half:
            half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
            assert b"408" in half.recv(100)
        assert time.monotonic() - began < 30
        again = httpx.Client()
        for _ in range(3):  # a connection that is used again is not cut off in the middle
            assert again.get(f"{url}/healthz").status_code == 200
            time.sleep(0.3)
        again.close()
        assert still_answers(url)


def test_the_description_has_every_route_but_itself_and_its_errors(server):
    schema = httpx.get(f"{server[0]}/openapi.json").json()
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert "200" in operation["responses"] and "403" in operation["responses"], path
            assert "422" not in operation["responses"]
    assert os.fspath(ROOT) not in str(schema)
