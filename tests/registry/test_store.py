import json
import re
import socket
import subprocess
import sys
import time

import pytest
import requests

from registry.approvals import Approvals
from registry.canary import Terms
from registry.errors import PromotionRefused, RegistryError, RegistryUnavailable
from registry.mlflow_store import Candidate, MlflowStore
from registry.promotion import Promotions, Trust
from tests.evaluation.pages import dom_of


@pytest.fixture
def nowhere():
    """An address nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def silent():
    """An address that accepts and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "use",
    [
        lambda store, _: store.versions("desk"),
        lambda store, _: store.promote("desk", 1, why="", who="ada"),
        lambda store, _: store.reject("desk", 1, why="", who="ada"),
        lambda store, _: store.to_staging("desk", 1),
        lambda store, _: store.archive("desk", 1, state="failed"),
        lambda store, _: store.set_alias("desk", "live", 1),
        lambda store, tmp: store.fetch_adapter("desk", 1, tmp / "adapter"),
        lambda store, tmp: store.register(Candidate("desk", "r1", 1, tmp, {}, "")),
    ],
)
def test_without_mlflow_every_call_says_so_fast(nowhere, tmp_path, use):
    store = MlflowStore(nowhere)
    began = time.monotonic()
    with pytest.raises(RegistryUnavailable, match=f"mlflow={nowhere}: cannot be reached; start it by"):
        use(store, tmp_path)
    assert time.monotonic() - began < 3
    assert not (tmp_path / "adapter").exists()
    store.close()


def test_an_mlflow_that_hangs_is_given_up(silent, monkeypatch):
    monkeypatch.setattr("registry.mlflow_store.READ_TIMEOUT_S", 0.5)
    store = MlflowStore(silent)
    with pytest.raises(RegistryUnavailable, match="no answer in time"):
        store.versions("desk")
    store.close()


def test_polling_imports_no_mlflow():
    code = (
        "import sys, registry.mlflow_store, registry.server, registry.approvals, registry.promotion\n"
        "print([m for m in ('mlflow', 'torch', 'flask', 'transformers') if m in sys.modules])"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"


def test_a_version_comes_whole_with_its_evidence(unguarded, tmp_path):
    version, sha = unguarded.candidate("desk")
    (found,) = unguarded.store.versions("desk")
    assert found.version == version == 1
    assert found.tag("adapter_sha256") == found.adapter_sha256 == sha
    assert (
        f"![accuracy per domain](get-artifact?path=evidence/accuracy.png&run_uuid={found.run_id})" in found.description
    )
    assert found.created_at.endswith("Z")
    unguarded.store.set_alias("desk", "live", version)
    assert unguarded.store.versions("desk")[0].aliases == ("live",)
    fetched = unguarded.store.fetch_adapter("desk", version, tmp_path / "adapter")
    from learner.adapter import adapter_sha256

    assert adapter_sha256(fetched) == sha


def test_the_report_opens_from_the_version_s_page(unguarded):
    unguarded.candidate("linked")
    (found,) = unguarded.store.versions("linked")
    link = re.search(
        r"\[The whole report\]\((#/experiments/\d+/runs/(\w+)/artifacts/(evidence/report\.html))\)", found.description
    )
    assert link.group(2) == found.run_id
    # The server answers the page of the interface for whatever stands behind `#`, which then asks for the file.
    url = unguarded.store._uri
    opened = requests.get(f"{url}/{link.group(1)}", timeout=10)
    file = requests.get(f"{url}/get-artifact", params={"path": link.group(3), "run_uuid": found.run_id}, timeout=10)
    assert (opened.status_code, file.status_code) == (200, 200)
    assert "text/html" in opened.headers["content-type"]
    assert file.content == b"<!DOCTYPE html><title>passed</title>"


@pytest.mark.slow
def test_a_browser_finds_the_link_and_the_report_behind_it(unguarded):
    version, _ = unguarded.candidate("browsed")
    (found,) = unguarded.store.versions("browsed")
    url = unguarded.store._uri
    page = dom_of(f"{url}/#/models/browsed/versions/{version}")
    (link,) = re.findall(r'href="(#/experiments/[^"]+/evidence/report\.html)"', page)
    opened = dom_of(f"{url}/{link}")
    assert found.run_id in link
    assert re.search(r'<iframe src="blob:[^>]*class="mlflow-html-iframe"', opened), (
        "MLflow shows it, and downloads nothing"
    )


def test_what_a_run_read_is_listed_with_its_revision(unguarded):
    unguarded.candidate("read")
    unguarded.candidate("read")  # of the same data
    newest, oldest = unguarded.store.versions("read")
    for version in (newest, oldest):
        run = requests.get(
            f"{unguarded.store._uri}/api/2.0/mlflow/runs/get", params={"run_id": version.run_id}, timeout=10
        ).json()["run"]
        inputs = sorted(run["inputs"]["dataset_inputs"], key=lambda one: one["dataset"]["name"])
        assert [(one["dataset"]["name"], one["dataset"]["digest"]) for one in inputs] == [
            ("desk blocks", "d" * 36),
            ("desk gate set", "9" * 36),
        ]
        assert json.loads(inputs[0]["dataset"]["profile"]) == {"revision": "d" * 39 + "e"}
        assert json.loads(inputs[1]["dataset"]["source"]) == {"name": "desk"}
        tags = {tag["key"]: tag["value"] for tag in inputs[0]["tags"]}
        assert tags == {"mlflow.data.context": "training", "tidegate.blocks": "3"}


def test_registering_the_same_attempt_again_answers_its_version(unguarded, tmp_path):
    version, _ = unguarded.candidate("again")
    found = unguarded.store.versions("again")[0]
    same = Candidate("again", found.tag("round_id"), 1, tmp_path, {}, "")
    assert unguarded.store.register(same) == version
    assert len(unguarded.store.versions("again")) == 1


def test_an_adapter_with_a_file_missing_is_not_registered(unguarded, tmp_path):
    with pytest.raises(RegistryError, match="adapter_config\\.json is missing; nothing was registered"):
        unguarded.store.register(Candidate("half", "r1", 1, tmp_path, {}, ""))
    assert unguarded.store.versions("half") == []


def test_a_long_report_is_cut_at_a_line_and_says_where_the_rest_is(unguarded):
    from tests.registry.conftest import write_adapter

    folder = unguarded.root / "made" / "long"
    write_adapter(folder, 77)
    unguarded.store.register(Candidate("long", "r1", 1, folder, {}, "a line of the report\n" * 400))
    (found,) = unguarded.store.versions("long")
    assert len(found.description) <= 5000
    assert found.description.endswith("(Cut here; the whole report is in the run's artifacts, folder `evidence`.)")


def test_without_the_guard_the_same_checks_are_signed_locally(unguarded):
    url = f"sqlite:///{unguarded.root / 'approvals.db'}"
    approvals, trust = Approvals(url, unguarded.key("approvals")), Trust.from_dir(unguarded.root / "keys")
    good, sha = unguarded.candidate("managed")
    bad, _ = unguarded.candidate("managed", parent=sha, outcome="failed")
    trust = Trust.from_dir(unguarded.root / "keys")
    with pytest.raises(RegistryError, match="no guard runs there, so the decision must be signed here"):
        unguarded.store.promote("managed", good, why="", who="ada")
    signed = unguarded.store.promote("managed", good, why="ok", who="ada", approvals=approvals, trust=trust)
    assert (signed["version"], signed["kind"], signed["who"]) == (good, "promote", "ada")
    with pytest.raises(PromotionRefused, match="its signed verdict says failed"):
        unguarded.store.promote("managed", bad, why="", who="ada", approvals=approvals, trust=trust)
    assert unguarded.stages("managed") == {good: "Production", bad: "None"}
    assert approvals.standing("managed").live == signed


TENTH = Terms(0.1)


def canary_of(world, model, version):
    found = next(v for v in world.store.versions(model) if v.version == version)
    return found.stage, json.loads(found.tag("canary") or "null")


def test_without_a_guard_the_command_signs_and_a_step_back_is_signed_by_the_next_decision(unguarded):
    keys = unguarded.root / "keys"
    approvals = Approvals(f"sqlite:///{unguarded.root / 'approvals.db'}", unguarded.key("approvals"))
    one, sha = unguarded.candidate("tenth")
    trust = Trust.from_dir(keys)
    signed = {"approvals": approvals, "trust": trust}
    unguarded.store.promote("tenth", one, why="", who="ada", **signed)
    two, _ = unguarded.candidate("tenth", parent=sha)
    row = unguarded.store.canary("tenth", two, TENTH, why="try it", who="ada", **signed)
    assert canary_of(unguarded, "tenth", two) == ("Staging", row)
    unguarded.store.step_back("tenth", two, row["seq"], why="slow", who="tidegate serve")
    assert approvals.standing("tenth").canary == row
    Promotions(unguarded.store, approvals, trust).settle("tenth")
    end = approvals.history("tenth")[-1]
    assert (end["canary"], end["who"], end["why"]) == ({"share": 0, "automatic": True}, "tidegate", "slow")
    assert approvals.standing("tenth").canary is None
    assert canary_of(unguarded, "tenth", two)[1] == end
    Promotions(unguarded.store, approvals, trust).settle("tenth")
    assert approvals.history("tenth")[-1] == end, "once"


def test_a_canary_that_a_crash_kept_from_the_version_is_shown_by_the_next_decision(unguarded):
    approvals = Approvals(f"sqlite:///{unguarded.root / 'approvals.db'}", unguarded.key("approvals"))
    trust = Trust.from_dir(unguarded.root / "keys")
    two, _ = unguarded.candidate("unshown")
    row = unguarded.store.canary("unshown", two, TENTH, why="", who="ada", approvals=approvals, trust=trust)
    unguarded.store.set_tag("unshown", two, "tidegate.canary", "")
    Promotions(unguarded.store, approvals, trust).settle("unshown")
    assert canary_of(unguarded, "unshown", two)[1] == row
