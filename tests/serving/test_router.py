"""Two replicas behind a router, all processes of their own, killed and stopped while clients ask. In order."""

import json
import signal
import threading
import time

import httpx
import pytest

from privacy.signing import SigningKey
from serving.answer_id import resolve
from serving.killswitch import KillSwitch
from serving.replicas import PIN_HEADER, ROUTER_HEADER
from tests.serving.adapters import overflowing, random_adapter
from tests.serving.fleet import KEY, STREAM, Fleet, free_port, wait_until

VERSIONS = (1, 2, 3)
FAILING, TRIGGER = 4, "hello"
BODY = {"model": STREAM, "messages": [{"role": "user", "content": "where is it"}], "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def fleet(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    for version in VERSIONS:
        random_adapter(tiny, folder / "adapters" / str(version), version)
    overflowing(tiny, folder / "adapters" / str(FAILING), TRIGGER)
    signer = SigningKey.load_or_create(folder / "approvals.pem")
    running = Fleet(tiny.path, folder, signer, (free_port(), free_port()), free_port())
    try:
        for name in ("0", "1", "router"):
            running.start(name)
        wait_until(lambda: running.traffic() == 0 and running.up() == [0, 1], what="start")
        yield running
    finally:
        running.stop()


class Clients:
    """Threads that ask without a pause. Each notes its answers in order: (version, text, when asked)."""

    def __init__(self, url, number=4, *, patient=False):
        self.answers, self.failures = [], []
        self._url, self._patient, self._stop = url, patient, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n % 2 == 0,)) for n in range(number)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, stream):
        with httpx.Client(timeout=60) as client:
            while not self._stop.is_set():
                time.sleep(0.01)  # a core is shared by all of them
                begin = time.monotonic()
                try:
                    self.answers.append((begin, *ask(client, self._url, stream=stream)))
                except httpx.TransportError as error:
                    if not self._patient:
                        self.failures.append(repr(error))
                    time.sleep(0.02)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is what the test is about
                    self.failures.append(repr(error))

    def wait_more(self, count=8):
        seen = len(self.answers)
        wait_until(lambda: len(self.answers) >= seen + count, what="answers")


def ask(client, url, *, stream):
    """(version, text, when it was whole) of one answer, consistent in itself."""
    with client.stream("POST", f"{url}/v1/chat/completions", json={**BODY, "stream": stream}) as reply:
        raw = reply.read().decode()
        assert reply.status_code == 200, f"{reply.status_code} {raw}"
        name = reply.headers["x-tidegate-version"]
    if stream:
        *events, last = raw.strip().split("\n\n")
        assert last == "data: [DONE]", raw
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    else:
        chunks = [json.loads(raw)]
        text = chunks[0]["choices"][0]["message"]["content"]
    assert {chunk["tidegate"]["version"] for chunk in chunks} == {name}
    of, version = resolve(chunks[0]["id"], KEY)
    assert f"{of}@{version or 'base'}" == name
    return version, text, time.monotonic()


def assert_never_back(answers, order):
    """No answer that was asked for after another was whole is of an earlier decision."""
    place = {version: at for at, version in enumerate(order)}
    whole = sorted((end, place[version]) for _, version, _, end in answers)
    newest, done = -1, 0
    for begin, version, _, _ in sorted(answers):
        while done < len(whole) and whole[done][0] < begin:
            newest = max(newest, whole[done][1])
            done += 1
        assert place[version] >= newest, (version, order)


def assert_one_text_each(answers):
    said = {}
    for _, version, text, _ in answers:
        assert said.setdefault(version, text) == text
    assert len(set(said.values())) == len(said)


def metric(fleet, name, number):
    """Of one replica, in the router's metrics."""
    page = httpx.get(f"{fleet.url}/metrics").text
    begin = f'tidegate_router_{name}_total{{replica="{fleet.replica_url(number)}"'
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(begin))


def test_replicas_change_at_one_moment_and_only_then_the_registry_is_told(fleet):
    with Clients(fleet.url) as clients:
        clients.wait_more()
        for version in (1, 2):
            fleet.promote(version)
            wait_until(lambda version=version: fleet.traffic() == version)
            clients.wait_more()
    assert clients.failures == []
    assert_never_back(clients.answers, [0, 1, 2])
    assert_one_text_each(clients.answers)
    assert {version for _, version, *_ in clients.answers} == {0, 1, 2}
    wait_until(lambda: fleet.acknowledged() == [1, 2])
    assert all(metric(fleet, "requests", number) > 0 for number in (0, 1))
    assert f'tidegate_router_version{{stream="{STREAM}"}} 2.0' in httpx.get(f"{fleet.url}/metrics").text


def test_a_replica_that_lacks_a_version_gets_no_traffic_and_the_registry_is_not_told(fleet):
    blocked = fleet.folder / f"unfetchable-{fleet.ports[1]}"
    blocked.touch()
    with Clients(fleet.url) as clients:
        fleet.promote(3)
        clients.wait_more()
        assert {version for _, version, *_ in clients.answers} == {2}  # everybody waits for it, a while
        wait_until(lambda: fleet.traffic() == 3)
        before = metric(fleet, "requests", 1)
        clients.wait_more()
        assert metric(fleet, "requests", 1) <= before + 4  # no more than were on their way
        assert fleet.acknowledged() == [1, 2]
        assert "behind" in " ".join(fleet.state()["streams"][STREAM]["alarms"])
        blocked.unlink()
        wait_until(lambda: fleet.acknowledged() == [1, 2, 3])
    assert clients.failures == []
    assert_never_back(clients.answers, [2, 3])


def test_a_killed_replica_costs_no_answer_that_was_not_begun(fleet):
    with Clients(fleet.url, 6) as clients:
        clients.wait_more()
        fleet.kill("1")
        fleet.promote(1)
        wait_until(lambda: fleet.traffic() == 1)
        clients.wait_more()
        fleet.start("1")
        wait_until(lambda: fleet.up() == [0, 1], what="replica 1 is back")
        clients.wait_more()
    # A stream that had begun at the killed replica breaks off, and the client sees that.
    assert all("RemoteProtocolError" in failure for failure in clients.failures)
    assert len(clients.failures) <= 3
    assert_never_back(clients.answers, [3, 1])
    wait_until(lambda: fleet.acknowledged()[-1] == 1)
    metrics = httpx.get(f"{fleet.url}/metrics").text
    assert f'tidegate_router_replica_up{{replica="{fleet.replica_url(1)}"}} 1.0' in metrics


def test_a_killed_router_comes_back_to_no_earlier_version(fleet):
    with Clients(fleet.url, patient=True) as clients:
        clients.wait_more()
        fleet.promote(2)
        fleet.kill("router")
        fleet.start("router")
        wait_until(lambda: fleet.traffic() == 2)
        clients.wait_more()
    assert clients.failures == []
    assert_never_back(clients.answers, [1, 2])
    assert_one_text_each(clients.answers)


def test_what_a_stopped_replica_has_not_begun_is_asked_of_another(fleet):
    process = fleet.processes["0"]
    with Clients(fleet.url) as clients:
        clients.wait_more()
        process.send_signal(signal.SIGSTOP)
        try:
            wait_until(lambda: fleet.up() == [1], what="replica 0 is out")
            clients.wait_more()
        finally:
            process.send_signal(signal.SIGCONT)
        wait_until(lambda: fleet.up() == [0, 1], what="replica 0 is back")
    assert clients.failures == []


def test_a_client_that_hangs_up_stops_the_replica(fleet):
    def gone():
        pages = [httpx.get(f"{fleet.replica_url(number)}/metrics").text for number in (0, 1)]
        lines = [line for page in pages for line in page.splitlines() if 'status="499"' in line]
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("tidegate_requests_total"))

    before = gone()
    body = {**BODY, "stream": True, "max_tokens": 200, "n": 8}
    with httpx.stream("POST", f"{fleet.url}/v1/chat/completions", json=body, timeout=60) as reply:
        next(reply.iter_bytes())
    wait_until(lambda: gone() == before + 1, seconds=20)
    assert all(replica["in_flight"] == 0 for replica in fleet.state()["replicas"])


def test_a_client_cannot_choose_a_version(fleet):
    name = {PIN_HEADER: "0:", ROUTER_HEADER: "guess"}
    for url in (fleet.url, fleet.replica_url(0)):
        reply = httpx.post(f"{url}/v1/chat/completions", json=BODY, headers=name, timeout=60)
        assert reply.headers["x-tidegate-version"] == f"{STREAM}@2"


def test_what_a_replica_refuses_is_passed_on(fleet):
    for body, status in (({**BODY, "model": "nobody"}, 404), ({**BODY, "max_tokens": "many"}, 400)):
        reply = httpx.post(f"{fleet.url}/v1/chat/completions", json=body)
        straight = httpx.post(f"{fleet.replica_url(0)}/v1/chat/completions", json=body)
        assert (reply.status_code, reply.json()) == (status, straight.json())
    assert httpx.post(f"{fleet.url}/v1/chat/completions", content=b"x" * (1 << 21)).status_code == 413
    assert httpx.get(f"{fleet.url}/v1/models").json()["data"][0]["id"] == STREAM
    assert httpx.get(f"{fleet.url}/nothing").json()["error"]["code"] == "unknown_url"


def test_a_canary_is_on_every_replica_and_its_failures_take_none_out(fleet):
    wait_until(lambda: fleet.up() == [0, 1], what="both")
    live = fleet.traffic()
    seq = fleet.canary(FAILING, 0.5)

    def asked(number):
        return httpx.get(f"{fleet.replica_url(number)}/tidegate/state").json()["streams"][STREAM]["canary"]

    wait_until(lambda: asked(0) and asked(1), what="the canary on both")
    with httpx.Client(base_url=fleet.url, timeout=60) as client:

        def version(header=None, **more):
            headers = {"x-tidegate-canary": header} if header else {}
            reply = client.post("/v1/chat/completions", json={**BODY, "max_tokens": 2, **more}, headers=headers)
            return reply.status_code, reply.headers.get("x-tidegate-version")

        canary = (200, f"{STREAM}@{FAILING}")
        assert {version("always") for _ in range(6)} == {canary}
        assert {version("never") for _ in range(6)} == {(200, f"{STREAM}@{live}")}
        sides = {user: {version(user=user) for _ in range(4)} for user in map(str, range(8))}
        assert {len(side) for side in sides.values()} == {1}, "whichever replica answers"
        assert len(set.union(*sides.values())) == 2
        assert fleet.state()["streams"][STREAM]["canary"]["requests"] >= 10
        question = {"messages": [{"role": "user", "content": TRIGGER}]}
        failed = 0
        while asked(0) or asked(1):
            failed += version("always", **question)[0] == 500
            assert failed < 100
        assert fleet.up() == [0, 1]
        assert {version("always", **question) for _ in range(6)} == {(200, f"{STREAM}@{live}")}
    wait_until(lambda: len(fleet.stepped_back()) == 2, what="both told it")
    assert {tuple(told[:2]) for told in fleet.stepped_back()} == {(FAILING, seq)}


def test_the_kill_switch_reaches_all_at_once_and_its_end_too(fleet):
    switches = [KillSwitch(fleet.folder / f"cache-{port}", STREAM) for port in fleet.ports]
    with Clients(fleet.url) as clients:
        clients.wait_more()
        for switch in switches:
            switch.kill(who="pat", why="test", at="2026-11-24T12:00:00Z")
        done = time.monotonic()
        wait_until(lambda: fleet.traffic() == 0)
        clients.wait_more()
        killed = [version for begin, version, *_ in clients.answers if begin > done]
        for switch in switches:
            switch.end()
        wait_until(lambda: fleet.traffic() == 2)
        clients.wait_more()
    assert clients.failures == []
    assert set(killed) == {0}


def test_no_replica_no_answer_but_a_time_to_come_back(fleet):
    for name in ("0", "1"):
        fleet.kill(name)
    reply = httpx.post(f"{fleet.url}/v1/chat/completions", json=BODY, timeout=60)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert httpx.get(f"{fleet.url}/readyz").status_code == 503
    assert httpx.get(f"{fleet.url}/healthz").status_code == 200
