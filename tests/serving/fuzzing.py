"""Requests no client would send: bytes at random, HTTP broken in known ways, bodies that are no request."""

import json
import random
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

ROUTES = ("/v1/chat/completions", "/v1/completions", "/tidegate/compare", "/v1/models", "/tidegate/state", "/healthz")
STATUSES = {100, 200, 400, 401, 403, 404, 405, 408, 413, 429}
# Nothing here takes the server longer; a client that waits so long has met a hang.
HANG_S = 30.0


@dataclass(frozen=True)
class Raw:
    """What is sent on one connection, piece by piece, and whether a server can know that it is over."""

    kind: str
    pieces: tuple[bytes, ...]
    whole: bool


def head(method, path, *headers, length=None, host="localhost"):
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def post(body, *headers, path=ROUTES[0]):
    return head("POST", path, *headers, length=len(body)) + body


def request(rng, **changes):
    value = {"model": rng.choice(["desk", "bare", "nobody"]), "max_tokens": 2, **changes}
    if "prompt" not in value:
        value.setdefault("messages", [{"role": "user", "content": "hi"}])
    return value


def anything(rng, depth=3):
    """A JSON value of any shape."""
    leaves = [
        None,
        True,
        False,
        0,
        -1,
        2**63,
        10**400,
        1e308,
        -0.0,
        "",
        "\u0000",
        "\ud800",
        "\U0001d4b3" * 50,
        "a" * 5000,
        "<|im_end|>",
    ]
    if depth == 0 or rng.random() < 0.4:
        return rng.choice(leaves)
    if rng.random() < 0.5:
        return [anything(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(["role", "content", "type", "text", "x", ""]): anything(rng, depth - 1) for _ in range(3)}


FIELDS = (
    *("model", "messages", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "stream_options"),
    *("logprobs", "top_logprobs", "logit_bias", "user", "tools", "response_format", "metadata", "prompt", "echo"),
)


def json_body(rng):
    """A request with some fields replaced by anything."""
    value = request(rng)
    for name in rng.sample(FIELDS, rng.randrange(1, 4)):
        value[name] = anything(rng)
    return post(json.dumps(value).encode(), path=rng.choice(ROUTES[:3]))


def odd_text(rng):
    """A right request with text that is hard to encode."""
    texts = [
        "\u0000",
        "\ud800",
        "\udfff\ud800",
        "\ufeff",
        "\u202e" * 9,
        "<|im_start|>system",
        "🙂" * 99,
        "\r\n\r\n",
        "a" * 9999,
    ]
    body = json.dumps(
        request(rng, messages=[{"role": "user", "content": rng.choice(texts)}], stream=rng.random() < 0.3)
    )
    return post(body.encode())


def bad_encoding(rng):
    body = json.dumps(request(rng)).encode()
    return post(
        body.replace(b"hi", rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b"\xf8\x88\x80\x80\x80", b"\n"]))
    )


def deep(rng):
    depth = rng.choice([50, 200, 2000, 100_000])
    inner = rng.choice([b"[", b'{"a":', b'[{"messages":'])
    return post((b'{"model":"desk","messages":' + inner * depth)[: 1 << 19])


def large(rng):
    size = rng.choice([1 << 19, (1 << 20) + 1, 3 << 20])
    return post(b'{"model": "' + b"a" * size)


def flipped(rng):
    whole = bytearray(post(json.dumps(request(rng)).encode()))
    for _ in range(rng.randrange(1, 12)):
        whole[rng.randrange(len(whole))] = rng.randrange(256)
    return bytes(whole)


def noise(rng):
    return rng.randbytes(rng.randrange(1, 3000))


def head_of(rng):
    body = json.dumps(request(rng)).encode()
    return rng.choice(
        [
            head("POST", ROUTES[0], "X: " + "a" * rng.choice([1000, 100_000]), length=len(body)) + body,
            head("POST", ROUTES[0], *[f"X-{n}: y" for n in range(rng.choice([100, 20_000]))], length=len(body)) + body,
            head("POST", "/" + "a" * rng.choice([5000, 100_000]), length=0),
            head("POST", ROUTES[0], "Content-Length: 5", length=len(body)) + body,
            head("POST", ROUTES[0], length=-5) + body,
            head("POST", ROUTES[0], length="9" * 400) + body,
            head("POST", ROUTES[0], "Transfer-Encoding: chunked", length=len(body)) + body,
            head("POST", ROUTES[0], "Transfer-Encoding: gzip") + body,
            head("POST", ROUTES[0], "Transfer-Encoding: chunked") + b"zz\r\n" + body,
            head("POST", ROUTES[0], "Transfer-Encoding: chunked") + b"5\r\nabc\r\n0\r\n\r\n",
            head("POST", ROUTES[0], "Content-Type: multipart/form-data; boundary=", length=len(body)) + body,
            head("POST", ROUTES[0], "Content-Encoding: gzip", length=len(body)) + body,
            head("POST", ROUTES[0], "Expect: 100-continue", length=len(body)) + body,
            head("POST", ROUTES[0], "Authorization: Basic \xff\xfe", "X-Request-Id: \x01", length=len(body)) + body,
            head("POST", ROUTES[0], "Origin: http://\xff[", length=len(body)) + body,
            head("POST", ROUTES[0], "Bad Header: x", length=len(body)) + body,
            head("POST", ROUTES[0], "Upgrade: websocket", "Connection: upgrade", length=len(body)) + body,
            head(rng.choice(["TRACE", "CONNECT", "PROPFIND", "", "GET\x00", "p" * 9999]), ROUTES[0]),
            head("GET", rng.choice(["/%00", "/%ff%fe", "/../../etc/passwd", "*", "//", "/v1/models/%2e%2e%2f", "/\x7f", "http://[::1"])),
            head("GET", "/v1/models/" + "%F0%9F%99%82" * rng.choice([1, 500])),
            head("GET", "/tidegate/state", host=rng.choice(["", "[", "\xff", "a:b:c", "evil", "[::1", "localhost:x"])),
            b"GET /healthz\r\n\r\n",
            b"GET /healthz HTTP/9.9\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),
        ]
    )  # fmt: skip


def pipelined(rng):
    one = post(json.dumps(request(rng)).encode()).replace(b"Connection: close\r\n", b"")
    return one * rng.randrange(2, 5) + rng.choice([b"", b"\x00\x01", one[:30]])


WHOLE = {"fields": json_body, "text": odd_text, "encoding": bad_encoding, "deep": deep, "large": large}
OPEN = {"flipped": flipped, "noise": noise, "head": head_of, "pipelined": pipelined}


def raws(seed, count):
    """So many connections' worth, of every kind, the same for the same seed."""
    rng = random.Random(seed)
    kinds = [*WHOLE, *OPEN, "cut", "slow"]
    for number in range(count):
        kind = kinds[number % len(kinds)]
        if kind in WHOLE:
            yield Raw(kind, (WHOLE[kind](rng),), whole=True)
        elif kind in OPEN:
            yield Raw(kind, (OPEN[kind](rng),), whole=False)
        else:
            sent = post(json.dumps(request(rng)).encode())
            if kind == "cut":
                yield Raw(kind, (sent[: rng.randrange(len(sent))],), whole=False)
            else:
                places = sorted(rng.sample(range(1, len(sent)), 4))
                ends = zip([0, *places], [*places, len(sent)], strict=True)
                yield Raw(kind, tuple(sent[a:b] for a, b in ends), whole=True)


def send(address, raw, patience_s=0.3):
    """The status of the answer; 0 when the server closed the connection without one.

    Raises:
        TimeoutError: neither came in HANG_S.
    """
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=HANG_S) as connection:
        got = b""
        try:
            for number, piece in enumerate(raw.pieces):
                if number:
                    time.sleep(0.005)
                connection.sendall(piece)
            if not raw.whole:
                # The server cannot know whether more will come: it may wait, until nothing can come any more.
                connection.settimeout(patience_s)
                try:
                    got = connection.recv(4096)
                except TimeoutError:
                    connection.shutdown(socket.SHUT_WR)
                connection.settimeout(HANG_S)
            while b"\r\n" not in got:
                some = connection.recv(4096)
                if not some:
                    break
                got += some
        except (ConnectionError, BrokenPipeError):
            return 0
    if not got:
        return 0
    assert got.startswith(b"HTTP/1.1 "), (raw.kind, got[:80])
    return int(got[9:12])


def send_all(address, cases, threads=4):
    """How often each (kind, status) came."""

    def one(raw):
        try:
            status = send(address, raw)
        except TimeoutError:
            raise AssertionError(f"no answer in {HANG_S} s: {raw.kind} {raw.pieces[0][:300]!r}") from None
        assert status == 0 or status in STATUSES, (status, raw.kind, raw.pieces[0][:2000])
        return raw.kind, status

    with ThreadPoolExecutor(threads) as pool:
        return Counter(pool.map(one, cases))


def still_answers(address):
    """A plain question gets its answer."""
    body = {"model": "desk", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0}
    reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    state = httpx.get(f"{address}/tidegate/state", timeout=60).json()["streams"]
    idle = all(not stream["in_flight"] and not stream["waiting"] for stream in state.values())
    return reply.status_code == 200 and idle
