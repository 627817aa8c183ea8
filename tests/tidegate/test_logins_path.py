"""The record's path with logins: every part by an identity of its own, the decision by a person's."""

import os

import pytest
import yaml

from registry.mlflow_store import MlflowStore
from tests.tidegate.desk import STREAM, make_desk, stream_rows, write_jsonl
from tidegate import identities

pytestmark = [
    pytest.mark.slow,
    # peft warns of what transformers 5 renamed.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny):
    made = make_desk(tmp_path_factory.mktemp("logins") / "ws", tiny)
    params = yaml.safe_load((made.root / "params.yaml").read_text())
    params["service"]["mlflow"]["auth"] = "basic"
    (made.root / "params.yaml").write_text(yaml.safe_dump(params))
    return made


@pytest.fixture(scope="module")
def running(desk):
    from tidegate.up import start_all

    said = []
    supervisor = start_all(desk.service(), said.append, learn=False)
    yield said
    supervisor.stop()


def by(name, password):
    return os.environ | {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password}


def test_a_round_registers_a_person_approves_and_the_server_answers_each_by_its_own_login(desk, running):
    user, password = identities.of_service(desk.service().keys_dir, identities.ADMIN)
    assert next(line for line in running if password in line).startswith(f"MLflow   user {user}, password ")
    assert not [
        file for file in (desk.root / "run").iterdir() if file.suffix == ".log" and password in file.read_text()
    ]
    rows = stream_rows()
    desk.json("produce", STREAM, str(write_jsonl(desk.root / "run" / "first.jsonl", rows)))
    desk.wait(lambda: desk.sealed() == len(rows), what="sealing")
    made = desk.json("round", STREAM)
    assert made["outcome"] == "passed"
    secret = desk.json("users", "add", "ada")["password"]
    desk.json("users", "grant", "ada", "approver", STREAM)
    refused = desk.run("approve", STREAM, str(made["version"]), "--why", "x", check=False, stdin=-3)
    assert "MLflow asks who decides" in refused.stderr
    desk.run("approve", STREAM, str(made["version"]), "--why", "reads well", env=by("ada", secret))
    desk.wait(lambda: desk.live() == f"{STREAM}@{made['version']}", what="the swap")
    store = MlflowStore(desk.service().mlflow_uri, ("ada", secret))
    desk.wait(lambda: [v for v in store.versions(STREAM) if "live" in v.aliases], what="the alias live")
    (found,) = store.versions(STREAM)
    store.close()
    assert (found.stage, found.tag("registered_by"), found.aliases) == ("Production", "tidegate-learner", ("live",))
    (row,) = [row for row in desk.json("history", STREAM) if row["kind"] == "promote"]
    assert (row["who"], row["why"]) == ("ada", "reads well")
