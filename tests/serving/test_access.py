"""API keys and their limits, without a server."""

import base64
import json
import threading

import pytest

from serving.access import Access, add_key, is_loopback, local_key, read_keys, revoke_key
from serving.errors import AccessRefused, KeysUnreadable, ServingError, TooFast, Unauthorised
from serving.limits import Limits

EVERYWHERE = "0.0.0.0"  # noqa: S104 - a setting's value; nothing binds it


@pytest.fixture
def file(tmp_path):
    return tmp_path / "api_keys.json"


def bearer(text):
    return f"Bearer {text}"


def test_a_key_is_kept_hashed_for_its_owner_alone(file):
    text, made = add_key(file, "app", scopes=["answer"])
    assert text.startswith(f"tg-{made.key_id}-")
    assert len(text) > 50
    kept = file.read_text()
    assert text not in kept
    assert text.split("-", 2)[2] not in kept
    assert file.stat().st_mode & 0o777 == 0o600
    assert [key.name for key in read_keys(file)] == ["app"]


def test_the_holder_of_a_key_may_what_it_is_for(file):
    text, _ = add_key(file, "app", scopes=["answer"], streams=["desk"])
    caller = Access(file).caller(bearer(text))
    assert caller.name == "app"
    assert caller.may("answer", stream="desk")
    assert not caller.may("answer", stream="other")
    assert not caller.may("read")
    with pytest.raises(AccessRefused, match="must have the scope candidate"):
        caller.require("candidate")
    with pytest.raises(AccessRefused, match="answer on stream other"):
        caller.require("answer", stream="other")


def test_a_browser_may_send_the_key_as_a_password(file):
    text, _ = add_key(file, "pat", scopes=["read"])
    coded = base64.b64encode(f"pat:{text}".encode()).decode()
    assert Access(file).caller(f"Basic {coded}").name == "pat"


def wrong_keys(text):
    head, key_id, secret = text.split("-", 2)
    return [
        None,
        "",
        "Bearer",
        "Bearer ",
        text,
        bearer(text[:-1]),
        bearer(text + "a"),
        bearer(text.upper()),
        bearer(f"{head}-00000000-{secret}"),
        bearer(f"{head}-{key_id}-"),
        bearer(f"{head}-{key_id}"),
        bearer("none"),
        bearer("ü" * 40),
        bearer("tg-local-" + "0" * 64),
        "Basic !!!",
        "Basic " + base64.b64encode(b"\xff\xfe").decode(),
        "Basic " + base64.b64encode(text.encode()).decode(),
        f"Digest {text}",
        bearer("a" * 100_000),
    ]


def test_nothing_but_the_key_opens(file):
    text, _ = add_key(file, "app", scopes=["answer"])
    access = Access(file, local_key(b"secret"))
    for given in wrong_keys(text):
        with pytest.raises(Unauthorised):
            access.caller(given)
    access.caller(bearer(text))


def test_a_revoked_key_stops_at_once_and_a_new_one_counts_at_once(file):
    first, made = add_key(file, "app", scopes=["answer"])
    access = Access(file)
    access.caller(bearer(first))
    revoke_key(file, made.key_id)
    with pytest.raises(Unauthorised):
        access.caller(bearer(first))
    second, _ = add_key(file, "app", scopes=["answer"])
    assert access.caller(bearer(second)).name == "app"
    assert [bool(key.revoked_at) for key in read_keys(file)] == [True, False]


def test_no_key_comes_back_with_a_file_that_is_damaged_or_gone(file):
    text, _ = add_key(file, "app", scopes=["answer"])
    access = Access(file)
    access.caller(bearer(text))
    whole = file.read_text()
    entry = json.loads(whole)[0]
    for broken in (
        "{",
        "",
        "5",
        '[{"key_id": "1"}]',
        json.dumps([{**entry, "scopes": ["everything"]}]),
        json.dumps([{**entry, "sha256": "f"}]),
        json.dumps([{**entry, "requests_per_minute": "many"}]),
        json.dumps([{**entry, "more": 1}]),
    ):
        file.write_text(broken)
        with pytest.raises(KeysUnreadable):
            access.caller(bearer(text))
    file.write_text(whole)
    access.caller(bearer(text))
    file.chmod(0o644)
    for asked in (access, Access(file)):  # a running one sees it too
        with pytest.raises(KeysUnreadable, match="chmod 600"):
            asked.caller(bearer(text))
    file.unlink()
    with pytest.raises(Unauthorised):
        access.caller(bearer(text))


def test_this_workspace_has_a_key_of_its_own(file):
    access = Access(file, local_key(b"secret"))
    assert access.caller(bearer(local_key(b"secret"))).may("candidate")
    with pytest.raises(Unauthorised):
        access.caller(bearer(local_key(b"other")))


def test_without_a_file_anybody_may_everything():
    caller = Access().caller(None)
    assert caller.open
    assert caller.may("candidate") and caller.may("answer", stream="desk")


@pytest.mark.parametrize(
    ("change", "said"),
    [({"name": ""}, "name"), ({"name": "a\nb"}, "name"), ({"scopes": []}, "scopes"), ({"scopes": ["all"]}, "scopes"),
     ({"tokens_per_minute": -1}, ">= 0"), ({"name": "taken"}, "revoke it first")],
    ids=str,
)  # fmt: skip
def test_keys_that_are_not_made(file, change, said):
    add_key(file, "taken", scopes=["read"])
    with pytest.raises(ServingError, match=said):
        add_key(file, **{"name": "app", "scopes": ["answer"], **change})
    with pytest.raises(ServingError, match="no such key"):
        revoke_key(file, "nobody")
    assert len(read_keys(file)) == 1


def test_keys_made_at_once_are_all_kept(file):
    threads = [threading.Thread(target=add_key, args=(file, f"app {n}"), kwargs={"scopes": ["read"]}) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in read_keys(file)} == {f"app {n}" for n in range(8)}


def test_a_server_that_asks_for_keys_needs_one(file):
    access = Access(file)
    with pytest.raises(ServingError, match="tidegate apikeys add"):
        access.check_some(EVERYWHERE)
    add_key(file, "app", scopes=["answer"])
    access.check_some(EVERYWHERE)
    revoke_key(file, "app")
    with pytest.raises(ServingError, match="there is none"):
        access.check_some(EVERYWHERE)
    Access().check_some("127.0.0.1")


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("[::1]", True), ("localhost", True),
     ("a.LocalHost.", True), (EVERYWHERE, False), ("::", False), ("10.0.0.1", False),
     ("localhost.example.org", False), ("", False)],
)  # fmt: skip
def test_what_reaches_this_machine_alone(host, local):
    assert is_loopback(host) is local


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_a_bucket_allows_a_burst_and_holds_the_average():
    clock = Clock()
    limits = Limits(60, 0, clock)
    for _ in range(60):
        limits.take("requests", 1)
    with pytest.raises(TooFast) as refused:
        limits.take("requests", 1)
    assert refused.value.retry_after_s == pytest.approx(1.0)
    assert refused.value.headers["x-ratelimit-remaining-requests"] == "0"
    clock.now += 1.01
    limits.take("requests", 1)
    with pytest.raises(TooFast):
        limits.take("requests", 1)
    taken = 0
    for _ in range(6000):  # ten minutes
        clock.now += 0.1
        try:
            limits.take("requests", 1)
            taken += 1
        except TooFast:
            continue
    assert 598 <= taken <= 601


def test_tokens_that_were_not_used_come_back():
    clock = Clock()
    limits = Limits(0, 100, clock)
    limits.take("tokens", 80)
    with pytest.raises(TooFast, match="Limit 100, Requested 30"):
        limits.take("tokens", 30)
    limits.give_back("tokens", 70)
    limits.take("tokens", 30)
    limits.give_back("tokens", 1000)
    assert limits.headers()["x-ratelimit-remaining-tokens"] == "100"
    with pytest.raises(TooFast, match="more than a minute's") as refused:
        limits.take("tokens", 101)
    assert refused.value.retry_after_s is None
    limits.take("requests", 10**9)


def test_headers_are_written_as_openai_writes_them():
    clock = Clock()
    limits = Limits(60, 6000, clock)
    assert limits.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "60",
        "x-ratelimit-reset-requests": "0ms",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "6000",
        "x-ratelimit-reset-tokens": "0ms",
    }
    limits.take("requests", 5)
    limits.take("tokens", 10)
    assert limits.headers()["x-ratelimit-reset-requests"] == "5s"
    assert limits.headers()["x-ratelimit-reset-tokens"] == "100ms"
    limits.give_back("tokens", -6500)
    assert limits.headers()["x-ratelimit-reset-tokens"] == "1m6s"
    assert limits.headers()["x-ratelimit-remaining-tokens"] == "0"
    assert Limits().headers() == {}


def test_limits_hold_on_while_other_keys_come_and_go(file):
    text, _ = add_key(file, "app", scopes=["answer"], requests_per_minute=2)
    access = Access(file)
    access.caller(bearer(text)).limits.take("requests", 2)
    add_key(file, "other", scopes=["read"])
    with pytest.raises(TooFast):
        access.caller(bearer(text)).limits.take("requests", 1)
