"""A running server that asks for keys: who gets in where, how fast, and what it says to the others."""

import json
import threading
import time

import httpx
import openai
import pytest
from fastapi import FastAPI

from serving.access import SCOPES, Access, add_key, local_key, revoke_key
from serving.api import create_app
from serving.decoding import Slots
from serving.errors import ServingError
from serving.gate import check_classified, classified
from serving.inprocess import InProcessEngine
from serving.server import running
from tests.serving.desk import ANSWER_KEY, served
from tests.serving.registry import MODEL
from tidegate.console_routes import console_of, routes_of
from tidegate.wiring import open_service
from tidegate.workspace import lay_out

# What each scope is for. A new route fails the test of the table until somebody has decided, here too.
ROUTES = {
    ("POST", "/v1/chat/completions"): {"answer"},
    ("POST", "/v1/completions"): {"answer"},
    ("POST", "/tidegate/compare"): {"candidate"},
    ("GET", "/v1/models"): {"answer", "read"},
    ("GET", "/v1/models/{stream}"): {"answer", "read"},
    ("GET", "/openapi.json"): {"answer", "read"},
    ("GET", "/metrics"): {"read"},
    ("GET", "/tidegate/state"): {"read"},
    ("GET", "/"): {"read"},
    ("HEAD", "/"): {"read"},
    ("GET", "/tidegate/console/events"): {"read"},
    ("HEAD", "/tidegate/console/events"): {"read"},
    ("GET", "/tidegate/runbook/{kind}"): {"read"},
    ("HEAD", "/tidegate/runbook/{kind}"): {"read"},
    ("GET", "/tidegate/console.js"): {"read"},
    ("HEAD", "/tidegate/console.js"): {"read"},
    ("POST", "/tidegate/logout"): {"read"},
    ("GET", "/tidegate/console.css"): set(),
    ("HEAD", "/tidegate/console.css"): set(),
    ("GET", "/tidegate/console.svg"): set(),
    ("HEAD", "/tidegate/console.svg"): set(),
    ("GET", "/tidegate/login"): set(),
    ("HEAD", "/tidegate/login"): set(),
    ("POST", "/tidegate/login"): set(),
    ("GET", "/healthz"): set(),
    ("GET", "/readyz"): set(),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "api_keys.json"


@pytest.fixture(scope="module")
def keys(file):
    """A key for each scope alone."""
    return {scope: add_key(file, scope, scopes=[scope])[0] for scope in SCOPES}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The console of a fresh workspace."""
    folder = tmp_path_factory.mktemp("workspace")
    lay_out(folder)
    made = console_of(open_service(str(folder)), [])
    yield made
    made.end()


@pytest.fixture(scope="module")
def address(tiny, adapters, file, keys, desk, tmp_path_factory):
    access = Access(file, local_key(ANSWER_KEY))
    console = {"routes": routes_of(desk, [MODEL]), "on_end": desk.end}
    with (
        InProcessEngine(tiny, batch_max=4, queue_max=32, context_max=256) as engine,
        served(engine, adapters["upper"], tmp_path_factory.mktemp("api"), access=access, **console) as url,
    ):
        yield url


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def body(**more):
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **more}


def post(address, key, **more):
    return httpx.post(f"{address}/v1/chat/completions", json=body(**more), headers=bearer(key), timeout=60)


@pytest.fixture
def client(address):
    made = []

    def make(key, **more):
        made.append(openai.OpenAI(base_url=f"{address}/v1", api_key=key, **{"max_retries": 0, **more}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def call(method, url, headers):
    """Status, error code and challenge of an answer, without waiting for the end of a stream."""
    with httpx.stream(method, url, headers=headers, timeout=60) as reply:
        said = reply.headers.get("content-type", "") == "application/json" and reply.status_code >= 400
        code = json.loads(reply.read())["error"]["code"] if said and method != "HEAD" else None
        return reply.status_code, code, reply.headers.get("www-authenticate", reply.headers.get("location", ""))


def check_call(method, path, caller, scopes, told):
    status, code, challenge = told
    where = (method, path, caller, told)
    if not scopes:
        assert status < 400, where
    elif caller in {"no key", "wrong key"} and path == "/":  # for people: they are led to the form
        assert (status, challenge) == (303, "/tidegate/login"), where
    elif caller in {"no key", "wrong key"}:
        assert status == 401 and challenge.startswith("Bearer"), where
        assert code == "invalid_api_key" or method == "HEAD", where
    elif caller not in scopes:
        assert status == 403, where
        assert code == "insufficient_permissions" or method == "HEAD", where
    else:
        # Without a body an answer cannot be made: the request was let in, and then found wrong.
        assert status < 400 or (method, status) == ("POST", 400), where


def test_every_route_refuses_who_has_no_key_or_the_wrong_scope(address, keys, desk):
    app = create_app([], ANSWER_KEY, routes=routes_of(desk, [MODEL]))
    found = {(method, path): scopes for method, path, scopes in classified(app)}
    assert {
        route: set(scopes or ["nobody decided"]) if scopes != () else set() for route, scopes in found.items()
    } == ROUTES
    callers = {"no key": {}, "wrong key": bearer("tg-00000000-" + "x" * 43), **{s: bearer(keys[s]) for s in SCOPES}}
    lines = [f"{'route':<32}" + "".join(f"{caller:>11}" for caller in callers)]
    for (method, path), scopes in ROUTES.items():
        shown = []
        for caller, headers in callers.items():
            told = call(method, address + path.format(stream=MODEL, kind="registry"), headers)
            check_call(method, path, caller, scopes, told)
            shown.append(told[0])
        lines.append(f"{method + ' ' + path:<32}" + "".join(f"{status:>11}" for status in shown))
    print("\n" + "\n".join(lines))  # noqa: T201 - `pytest -s` shows the table


def test_paths_that_do_not_exist_are_not_told_to_strangers(address, keys):
    assert httpx.get(f"{address}/v1/secret").status_code == 401
    assert httpx.get(f"{address}/v1/secret", headers=bearer(keys["read"])).status_code == 404
    assert httpx.post(f"{address}/healthz/x").status_code == 401


def test_a_route_that_nobody_decided_on_is_not_served():
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/new")
    async def new() -> str:
        return "everything"

    with pytest.raises(ServingError, match="GET /new"):
        check_classified(app)


def test_a_key_is_refused_before_its_body_is_read(address, keys):
    big = b" " * (2 << 20)
    for headers, status in ((None, 401), (bearer(keys["read"]), 403), (bearer(keys["answer"]), 413)):
        assert httpx.post(f"{address}/v1/chat/completions", content=big, headers=headers).status_code == status


def test_openais_client_tells_missing_and_under_scoped_keys_apart(client, keys):
    with pytest.raises(openai.AuthenticationError) as refused:
        client("nothing").chat.completions.create(**body())
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError, match="must have the scope answer"):
        client(keys["read"]).chat.completions.create(**body())
    assert client(keys["answer"]).chat.completions.create(**body()).choices[0].message.content


def test_a_key_for_one_stream_sees_and_asks_no_other(address, client, file):
    key, _ = add_key(file, "one stream", scopes=["answer"], streams=["bare"])
    asking = client(key)
    assert [model.id for model in asking.models.list()] == ["bare"]
    assert asking.chat.completions.create(**body(model="bare")).model == "bare"
    with pytest.raises(openai.PermissionDeniedError, match="answer on stream desk"):
        asking.chat.completions.create(**body())
    with pytest.raises(openai.PermissionDeniedError):
        asking.models.retrieve(MODEL)
    with pytest.raises(openai.NotFoundError) as refused:
        asking.chat.completions.create(**body(model="nobody"))
    assert MODEL not in refused.value.body["message"]


def test_a_revoked_key_stops_within_a_second_without_a_restart(address, file):
    key, made = add_key(file, "leaver", scopes=["answer"])
    answers = []
    gone = threading.Event()

    def ask():
        while not gone.is_set():
            began = time.monotonic()
            answers.append((began, post(address, key, max_tokens=1).status_code))
            if answers[-1][1] == 401:
                return

    asking = threading.Thread(target=ask)
    asking.start()
    while len(answers) < 3:
        time.sleep(0.01)
    revoke_key(file, made.key_id)
    revoked = time.monotonic()
    asking.join(timeout=30)
    gone.set()
    assert answers[-1][1] == 401
    assert all(status == 200 for began, status in answers if began < revoked - 1)
    assert all(status == 401 for began, status in answers if began > revoked + 1)


def test_requests_over_the_limit_are_429_as_openai_says_it(address, client, file):
    key, _ = add_key(file, "slow", scopes=["answer", "read"], requests_per_minute=3)
    asking = client(key)
    for left in (2, 1, 0):
        raw = asking.models.with_raw_response.list()
        assert raw.headers["x-ratelimit-limit-requests"] == "3"
        assert raw.headers["x-ratelimit-remaining-requests"] == str(left)
    with pytest.raises(openai.RateLimitError) as refused:
        asking.chat.completions.create(**body())
    assert refused.value.code == "rate_limit_exceeded"
    assert refused.value.type == "requests"
    headers = refused.value.response.headers
    assert 1 <= int(headers["retry-after"]) <= 20
    assert int(headers["retry-after-ms"]) <= 20_000
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"].endswith("s")
    assert httpx.get(f"{address}/healthz", headers=bearer(key)).status_code == 200


def test_openais_client_waits_and_comes_back_by_itself(client, file):
    key, _ = add_key(file, "patient", scopes=["read"], requests_per_minute=60)
    asking = client(key, max_retries=5)
    began = time.monotonic()
    for _ in range(61):
        asking.models.list()
    assert time.monotonic() - began > 0.5  # the last had to wait for its token


def test_tokens_are_taken_when_asked_and_given_back_when_not_used(address, client, file):
    key, _ = add_key(file, "thrifty", scopes=["answer"], tokens_per_minute=120)
    raw = client(key).chat.completions.with_raw_response.create(**body(max_tokens=4))
    used = raw.parse().usage.total_tokens
    assert raw.headers["x-ratelimit-limit-tokens"] == "120"
    left = int(raw.headers["x-ratelimit-remaining-tokens"])
    assert left <= 120 - used + 4
    with pytest.raises(openai.RateLimitError, match="Limit 120, Requested") as refused:
        client(key, max_retries=3).chat.completions.create(**body(max_tokens=200))
    assert refused.value.type == "tokens"
    assert refused.value.response.headers["x-should-retry"] == "false"
    for _ in range(10):
        if post(address, key, max_tokens=30).status_code == 429:
            break
    else:
        pytest.fail("ten times thirty tokens fit into 120 a minute")


def test_an_answer_that_failed_costs_no_tokens(address, file, monkeypatch):
    key, _ = add_key(file, "failing", scopes=["answer"], tokens_per_minute=4000)
    with monkeypatch.context() as broken:
        broken.setattr(Slots, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("step")))
        for stream in (False, True):
            answer = post(address, key, max_tokens=100, n=8, stream=stream)
            assert answer.status_code == (200 if stream else 500)
    assert int(post(address, key, max_tokens=1).headers["x-ratelimit-remaining-tokens"]) > 3900


def test_what_was_refused_costs_no_tokens(address, file):
    key, _ = add_key(file, "unlucky", scopes=["answer"], tokens_per_minute=4000)
    for _ in range(5):
        # The engine refuses it after the tokens were taken: prompt and answer exceed its context.
        assert (
            post(address, key, messages=[{"role": "user", "content": "word " * 100}], max_tokens=250).status_code == 400
        )
    assert int(post(address, key, max_tokens=1).headers["x-ratelimit-remaining-tokens"]) > 3900


def test_request_ids_go_in_and_come_out(address, keys):
    head = bearer(keys["answer"])
    named = httpx.post(
        f"{address}/v1/chat/completions", json=body(), headers={**head, "x-request-id": "mine-1"}, timeout=60
    )
    assert named.headers["x-request-id"] == "mine-1"
    fresh = post(address, keys["answer"])
    assert fresh.headers["x-request-id"] == fresh.json()["id"]
    for reply in (
        httpx.get(f"{address}/healthz"),
        httpx.get(f"{address}/v1/models"),
        httpx.get(f"{address}/nothing", headers=head),
    ):
        assert reply.headers["x-request-id"].startswith("req_")
    forged = httpx.get(f"{address}/healthz", headers={"x-request-id": "a b" * 100})
    assert forged.headers["x-request-id"].startswith("req_")


def test_a_browser_is_asked_for_the_key_and_may_send_it_as_a_password(address, keys):
    asked = httpx.get(f"{address}/tidegate/state", headers={"accept": "text/html,*/*"})
    assert asked.status_code == 401
    assert asked.headers["www-authenticate"].startswith("Basic")
    assert httpx.get(f"{address}/tidegate/state", auth=("pat", keys["read"])).status_code == 200
    assert httpx.get(f"{address}/tidegate/state", auth=("pat", "wrong")).status_code == 401


def test_pages_of_other_places_change_nothing_here(address, keys):
    url = f"{address}/v1/chat/completions"
    for origin in ("https://evil.example", "null", "http://[", "http://127.0.0.1:1"):
        reply = httpx.post(url, json=body(), headers={**bearer(keys["answer"]), "origin": origin})
        assert reply.status_code == 403
        assert reply.json()["error"]["code"] == "origin_not_allowed"
    own = httpx.post(url, json=body(), headers={**bearer(keys["answer"]), "origin": address}, timeout=60)
    assert own.status_code == 200


def test_this_workspaces_own_commands_get_in(address):
    assert httpx.get(f"{address}/tidegate/state", headers=bearer(local_key(ANSWER_KEY))).status_code == 200


def test_where_other_machines_reach_it_a_server_does_not_start_without_keys(tmp_path):
    everywhere = "0.0.0.0"  # noqa: S104 - it is refused
    with (
        pytest.raises(ServingError, match="other machines reach it"),
        running([], answer_key=ANSWER_KEY, host=everywhere),
    ):
        pass
    asking = Access(tmp_path / "api_keys.json")
    with (
        pytest.raises(ServingError, match="`tidegate apikeys add NAME"),
        running([], answer_key=ANSWER_KEY, host=everywhere, access=asking),
    ):
        pass


def test_without_keys_only_names_of_this_machine_are_answered():
    with running([], answer_key=ANSWER_KEY) as url:
        port = url.rpartition(":")[2]
        for name in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost", f"[::1]:{port}"):
            assert httpx.get(f"{url}/v1/models", headers={"host": name}).status_code == 200, name
        for name in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost@evil.example"):
            reply = httpx.get(f"{url}/v1/models", headers={"host": name})
            assert reply.status_code == 403
            assert reply.json()["error"]["code"] == "host_not_allowed"
