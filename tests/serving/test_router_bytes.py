"""What a router does with each kind of answer, before replicas that say exactly what a test wants."""

import asyncio
import json
import socket
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest

from serving.replicas import ELSEWHERE_HEADER, PIN_HEADER, ROUTER_HEADER, router_token
from serving.router import Router
from serving.router_server import routing
from tests.serving.fleet import KEY, STREAM, free_port, wait_until

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    b"x-tidegate-version: desk@1\r\ntransfer-encoding: chunked\r\n\r\n"
)
# Chunks that are neither whole events nor whole characters.
CHUNKS = (b"da", b'ta: {"t": "\xf0\x9f', b'\x99\x82"}\n', b"\ndata: [DONE]\n\n")
BODY = {"model": STREAM, "messages": [], "stream": True}


def chunked(*parts):
    return b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts)


def plain(status, body, **headers):
    lines = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Scripted:
    """A replica: says that it is well, and answers each question with `answer`, bytes with pauses between."""

    def __init__(self):
        self.answer, self.well, self.asked = [plain(200, b"{}")], True, []
        self.port = free_port()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
                await reader.readexactly(int(headers.get("content-length", 0)))
                if head.startswith("GET /tidegate/state"):
                    told = {"pin": "1:", "version": "desk@1", "number": 1, "approval_seq": 1, "held": ["1:"]}
                    state = {"streams": {STREAM: {**told, "healthy": self.well}}}
                    writer.write(plain(200, json.dumps(state).encode()))
                    continue
                self.asked.append(headers)
                for part in self.answer:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.01)
                if self.answer[-1:] == [b""]:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    @contextmanager
    def running(self):
        self.thread.start()
        start = asyncio.start_server(self.serve, "127.0.0.1", self.port)
        server = asyncio.run_coroutine_threadsafe(start, self.loop).result()
        try:
            yield self
        finally:
            self.loop.call_soon_threadsafe(server.close)
            asyncio.run_coroutine_threadsafe(cancel_all(), self.loop).result()
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.close()


async def cancel_all():
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def two(tmp_path):
    """Two scripted replicas, and the address of a router before them."""
    with ExitStack() as parts:
        replicas = [parts.enter_context(Scripted().running()) for _ in range(2)]

        def make():
            urls = [replica.url for replica in replicas]
            return Router(urls, KEY, acknowledge=lambda *_: None, kept=tmp_path / "router.json", poll_s=0.02)

        url = parts.enter_context(routing(make))
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
        yield *replicas, url


def ask(url, **options):
    return httpx.post(f"{url}/v1/chat/completions", json=BODY, timeout=20, **options)


def test_a_stream_comes_through_byte_for_byte_and_asks_for_the_version_that_all_have(two):
    one, other, url = two
    one.answer = other.answer = [HEAD, *(chunked(part) for part in CHUNKS), b"0\r\n\r\n"]
    reply = ask(url, headers={"authorization": "Bearer key", PIN_HEADER: "9:", ROUTER_HEADER: "forged"})
    assert reply.content == b"".join(CHUNKS)
    assert reply.headers["x-tidegate-version"] == "desk@1"
    (asked,) = one.asked + other.asked
    assert (asked[PIN_HEADER], asked[ROUTER_HEADER]) == ("1:", router_token(KEY))
    assert asked["authorization"] == "bearer key"
    assert asked["host"] == url.removeprefix("http://")


@pytest.mark.parametrize(
    "broken",
    [
        [b""],
        [b"HTTP/1.1 200 OK\r\ncontent-le", b""],
        [HEAD, b""],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf", b""],
        [b"nonsense\r\n\r\n", b""],
    ],
)
def test_what_broke_before_the_first_byte_is_asked_of_another(two, broken):
    one, other, url = two
    one.answer, other.answer = broken, [HEAD, chunked(*CHUNKS), b"0\r\n\r\n"]
    for _ in range(4):
        assert ask(url).content == b"".join(CHUNKS)
    assert one.asked


def test_what_broke_later_is_not_asked_again_and_the_client_sees_it(two):
    one, other, url = two
    one.answer = other.answer = [HEAD, chunked(CHUNKS[0]), b""]
    with pytest.raises(httpx.RemoteProtocolError):
        ask(url)
    assert len(one.asked + other.asked) == 1


def test_of_full_replicas_the_sooner_one_is_told(two):
    one, other, url = two
    one.answer = [plain(429, b'{"error": 1}', retry_after=7, **{ELSEWHERE_HEADER: "full"})]
    other.answer = [plain(429, b'{"error": 2}', retry_after=3, **{ELSEWHERE_HEADER: "full"})]
    reply = ask(url)
    assert (reply.status_code, reply.headers["retry-after"], reply.json()) == (429, "3", {"error": 2})
    assert (len(one.asked), len(other.asked)) == (1, 1)


def test_a_limit_of_a_key_is_asked_of_nobody_else(two):
    one, other, url = two
    one.answer = other.answer = [plain(429, b"{}", retry_after=7)]
    assert ask(url).status_code == 429
    assert len(one.asked + other.asked) == 1


@pytest.mark.parametrize("why", ["version", "engine", "not-ready"])
def test_who_says_that_it_began_nothing_is_passed_over(two, why):
    one, other, url = two
    one.answer = [plain(503, b"{}", retry_after=1, **{ELSEWHERE_HEADER: why})]
    for _ in range(3):
        assert ask(url).status_code == 200
    assert len(other.asked) == 3


def test_a_replica_whose_answers_fail_is_taken_out_for_a_while(two):
    one, other, url = two
    one.answer = [plain(500, b"{}")]
    statuses = [ask(url).status_code for _ in range(12)]
    assert statuses.count(500) == 3
    assert len(one.asked) == 3
    states = {r["url"]: r["up"] for r in httpx.get(f"{url}/tidegate/state").json()["replicas"]}
    assert states == {one.url: False, other.url: True}


def test_a_replica_that_is_not_well_gets_nothing_until_it_is(two):
    one, _, url = two
    one.well = False
    wait_until(lambda: ask(url).status_code == 200 and "replica" in str(httpx.get(f"{url}/tidegate/state").json()))
    before = len(one.asked)
    for _ in range(4):
        ask(url)
    assert len(one.asked) == before
    one.well = True
    wait_until(lambda: ask(url) and len(one.asked) > before)


def said_to(url, sent, seconds=10):
    """Everything that comes back until the connection ends."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=seconds) as client:
        client.sendall(sent)
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_who_sends_no_whole_head_or_body_holds_no_connection(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.router_server.HEAD_S_MAX", 0.5)
    monkeypatch.setattr("serving.router.BODY_S_MAX", 0.5)
    make = lambda: Router([], KEY, acknowledge=lambda *_: None, kept=tmp_path / "router.json")  # noqa: E731
    with routing(make) as url:
        assert said_to(url, b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n") == b""
        late = said_to(url, b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{", 30)
        assert late.startswith(b"HTTP/1.1 408 ")
        assert b"must be there within" in late


def test_a_reader_that_reads_no_more_is_hung_up_on(two, monkeypatch):
    monkeypatch.setattr("serving.router.STALLED_S_MAX", 0.5)
    first, second, url = two
    head = b"HTTP/1.1 200 X\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    first.answer = second.answer = [head, *[chunked(b"data: " + b"x" * (1 << 20) + b"\n\n")] * 64, chunked(b"")]
    asked = json.dumps({**BODY, "stream": True}).encode()
    request = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(asked)}\r\n\r\n".encode() + asked
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as client:
        client.sendall(request)
        got = len(client.recv(16))
        time.sleep(3)
        with suppress(ConnectionError):
            while part := client.recv(1 << 20):
                got += len(part)
    assert got < 64 << 20
