"""API keys from the command line, and what the wiring makes of them."""

import json

import pytest
from click.testing import CliRunner

from serving.access import Access
from tidegate.cli import cli
from tidegate.serve import access_of
from tidegate.wiring import open_service
from tidegate.workspace import lay_out

STREAM = "support-desk"


@pytest.fixture
def workspace(tmp_path):
    lay_out(tmp_path)
    return tmp_path


def run(workspace, *arguments):
    return CliRunner().invoke(cli, ["-w", str(workspace), "apikeys", *arguments])


def test_a_key_is_shown_once_listed_without_its_secret_and_revoked(workspace):
    limits = ("--requests", "60", "--tokens", "9000")
    added = run(workspace, "add", "app", "--scope", "answer", "--scope", "read", "--stream", STREAM, *limits)
    assert added.exit_code == 0, added.output
    key = added.stdout.strip()
    listed = json.loads(run(workspace, "list", "--json").stdout)
    assert key not in str(listed)
    assert listed[0]["scopes"] == ["answer", "read"]
    assert listed[0]["streams"] == [STREAM]
    assert (listed[0]["requests_per_minute"], listed[0]["tokens_per_minute"]) == (60, 9000)
    access = Access(open_service(str(workspace)).api_keys)
    assert access.caller(f"Bearer {key}").may("answer", stream=STREAM)
    assert "is revoked" in run(workspace, "revoke", "app").stdout
    assert json.loads(run(workspace, "list", "--json").stdout) == []
    assert "app" in run(workspace, "list", "--all").stdout
    assert "no such key" in str(run(workspace, "revoke", "app").exception)


def test_a_key_for_a_stream_that_is_not_there_is_not_made(workspace):
    assert "not in params.yaml" in str(run(workspace, "add", "app", "--stream", "other").exception)
    assert json.loads(run(workspace, "list", "--all", "--json").stdout) == []


def test_keys_are_asked_for_elsewhere_than_on_loopback_and_where_settings_say_so(workspace, monkeypatch):
    service = open_service(str(workspace))
    assert not access_of(service).required
    assert service.api_headers == {}
    for name, value in (("HOST", "10.0.0.5"), ("REQUIRE_KEYS", "true")):
        with monkeypatch.context() as changed:
            changed.setenv(f"TIDEGATE__SERVICE__API__{name}", value)
            asking = open_service(str(workspace))
            access = access_of(asking)
            assert access.required
            assert access.caller(asking.api_headers["Authorization"]).may("candidate")
