"""Every route of MLflow's that changes something, asked by everybody; `pytest -s` prints what each was told.

The routes are those that the running server names. One that `registry/routes.py` does not know fails the first test.
"""

import re
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import requests

from privacy.signing import TrustedKeys
from registry.errors import PromotionRefused
from registry.routes import Gate, bare, gate_of
from serving.approval import check_wanted
from serving.errors import Ambiguous, ApprovalRefused
from tests.registry.conftest import PASSWORD
from tidegate.serve import wanted_of

CALLERS = ("anonymous", "viewer", "trainer", "approver", "admin", "learner", "server")
NOBODY, ADMINS = frozenset(), frozenset({"admin"})
TRAINERS = frozenset({"trainer", "learner", "admin"})
DECIDERS = frozenset({"approver", "admin"})
# Gates whose routes change the registry, or what a version in it rests on: each is asked what would do harm.
REGISTRY = {gate for gate in Gate if gate.value.startswith(("model", "alias", "version", "transition", "artifact"))}
REGISTRY |= {Gate.RUN, Gate.LOGGED_MODEL, Gate.EXPERIMENT}
# Who gets past the guard on the others. What MLflow says then depends on what is asked for.
PASSED = {
    Gate.READS: frozenset(CALLERS[1:]),
    Gate.OWN: frozenset(CALLERS[1:]),
    Gate.WORK: TRAINERS,
    Gate.ADMIN: ADMINS,
    Gate.CLOSED: NOBODY,
}


@dataclass(frozen=True)
class Probe:
    """One request and who must get it done."""

    what: str
    allowed: frozenset[str]
    json: dict | None = None
    data: bytes | None = None
    params: dict | None = None
    path: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Stage:
    """The registry that the probes work on.

    Attributes:
        live: an approved version in Production. failed: one that no approval speaks of. sha: of the live adapter.
    """

    model: str
    live: int
    failed: int
    sha: str
    approval: str
    run_id: str
    logged_model: str
    experiment_id: str


@pytest.fixture(scope="module")
def stage(secured):
    return prepare(secured, "desk", secured.stores["approver"])


def prepare(world, model, approver):
    """A live version, and one that failed."""
    live, sha = world.candidate(model)
    approver.promote(model, live, why="good", who="")
    failed, _ = world.candidate(model, parent=sha, outcome="failed")
    found = {version.version: version for version in world.store.versions(model)}
    query = {"name": model, "version": live}
    version = ask(world, "learner", "GET", "/api/2.0/mlflow/model-versions/get", params=query).json()["model_version"]
    query = {"run_id": version["run_id"]}
    run = ask(world, "learner", "GET", "/api/2.0/mlflow/runs/get", params=query).json()["run"]
    return Stage(
        model=model,
        live=live,
        failed=failed,
        sha=sha,
        approval=found[live].tag("approval"),
        run_id=version["run_id"],
        logged_model=version["source"].rpartition("/")[2],
        experiment_id=run["info"]["experiment_id"],
    )


# Kept-alive connections: thousands of requests would use up the ports.
SESSION = requests.Session()
SESSION.trust_env = False


def ask(world, caller, method, path, **options):
    login = None if caller == "anonymous" else (world.users[caller], PASSWORD)
    return SESSION.request(method, world.server.url + path, auth=login, timeout=30, **options)


def probes_of(stage):
    """What would do harm, by method and bare path; where it is harmless, who may."""
    live = {"name": stage.model, "version": str(stage.live)}
    failed = {"name": stage.model, "version": str(stage.failed)}
    run, files = {"run_id": stage.run_id}, f"{stage.experiment_id}/models/{stage.logged_model}/artifacts/adapter"
    weights = (("artifact_path", f"{files}/adapter_model.safetensors"),)
    double = (("artifact_path", f"{stage.experiment_id}%252Fmodels%252F{stage.logged_model}/artifacts/adapter/x"),)
    model = (("model_id", stage.logged_model),)
    part = {"path": weights[0][1], "num_parts": 1, "upload_id": "u", "parts": []}
    return {
        ("POST", "/model-versions/transition-stage"): (
            Probe("failed to Production", NOBODY, failed | {"stage": "Production"}),
            Probe("failed a share", NOBODY, failed | {"stage": "Staging", "tidegate_canary": {"share": 0.5}}),
            Probe("failed to Staging", TRAINERS | DECIDERS, failed | {"stage": "Staging"}),
        ),
        ("POST", "/registered-models/alias"): (
            Probe("live to failed", NOBODY, failed | {"alias": "live"}),
            Probe("live to live", frozenset({"server", "admin"}), live | {"alias": "live"}),
            Probe("another to live", DECIDERS, live | {"alias": "best"}),
        ),
        ("DELETE", "/registered-models/alias"): (Probe("live", ADMINS, {"name": stage.model, "alias": "live"}),),
        ("POST", "/model-versions/set-tag"): (
            Probe("approval onto failed", NOBODY, failed | {"key": "tidegate.approval", "value": stage.approval}),
            Probe("canary onto failed", NOBODY, failed | {"key": "tidegate.canary", "value": stage.approval}),
            Probe("sha256 onto failed", NOBODY, failed | {"key": "tidegate.adapter_sha256", "value": stage.sha}),
            Probe("registrar onto failed", NOBODY, failed | {"key": "tidegate.registered_by", "value": "x"}),
            Probe("state live onto failed", TRAINERS, failed | {"key": "tidegate.state", "value": "live"}),
            Probe("prompt onto live", NOBODY, live | {"key": "mlflow.prompt.is_prompt", "value": "true"}),
            Probe("version ' 1'", NOBODY, live | {"version": f" {stage.live}", "key": "tidegate.approval"}),
            Probe("a note onto failed", TRAINERS | DECIDERS, failed | {"key": "note", "value": "seen"}),
        ),
        ("DELETE", "/model-versions/delete-tag"): (
            Probe("approval of live", NOBODY, live | {"key": "tidegate.approval"}),
            Probe("verdict of failed", NOBODY, failed | {"key": "tidegate.verdict"}),
        ),
        ("PATCH", "/model-versions/update"): (
            Probe("text of failed", NOBODY, failed | {"description": "passed"}),
            Probe("text of ' 1'", NOBODY, live | {"version": f" {stage.live}", "description": "passed"}),
        ),
        ("DELETE", "/model-versions/delete"): (
            Probe("live", NOBODY, live),
            Probe("' 1'", NOBODY, live | {"version": " 1"}),
        ),
        ("POST", "/model-versions/create"): (
            Probe("copy into other", NOBODY, {"name": "other", "source": f"models:/{stage.model}/{stage.failed}"}),
            Probe("copy into desk", NOBODY, {"name": stage.model, "source": f"models:/{stage.model}/{stage.live}"}),
            Probe(
                "with live's approval",
                NOBODY,
                {"name": stage.model, "source": f"models:/{stage.logged_model}", "tags": tags(approval=stage.approval)},
            ),
            Probe(
                "as a prompt",
                NOBODY,
                {"name": stage.model, "source": "x", "tags": [{"key": "mlflow.prompt.is_prompt", "value": "true"}]},
            ),
            Probe(
                "bare, of live's files",
                TRAINERS,
                {
                    "name": stage.model,
                    "source": f"models:/{stage.logged_model}",
                    "model_id": stage.logged_model,
                    "tags": tags(adapter_sha256=stage.sha),
                },
            ),
        ),
        ("POST", "/registered-models/create"): (
            Probe("of that name", frozenset({"admin", "learner"}), {"name": stage.model}),
        ),
        ("PATCH", "/registered-models/update"): (
            Probe("its text", TRAINERS | DECIDERS, {"name": stage.model, "description": "answers"}),
        ),
        ("POST", "/registered-models/set-tag"): (
            Probe("as a prompt", NOBODY, {"name": stage.model, "key": "mlflow.prompt.is_prompt", "value": "true"}),
            Probe("a tag of ours", NOBODY, {"name": stage.model, "key": "tidegate.x", "value": "y"}),
            Probe("a note", TRAINERS | DECIDERS, {"name": stage.model, "key": "note", "value": "seen"}),
        ),
        ("DELETE", "/registered-models/delete-tag"): (
            Probe("as no prompt", NOBODY, {"name": stage.model, "key": "mlflow.prompt.is_prompt"}),
        ),
        ("POST", "/registered-models/rename"): (Probe("to other", NOBODY, {"name": stage.model, "new_name": "gone"}),),
        ("DELETE", "/registered-models/delete"): (Probe("the model", NOBODY, {"name": stage.model}),),
        ("PUT", "/mlflow-artifacts/artifacts/<path:artifact_path>"): (
            Probe("over live's weights", NOBODY, data=b"other", path=weights),
            Probe("the same, encoded twice", NOBODY, data=b"other", path=double),
        ),
        ("DELETE", "/mlflow-artifacts/artifacts/<path:artifact_path>"): (
            Probe("live's weights", NOBODY, path=weights),
            Probe("all of the model", NOBODY, path=(("artifact_path", f"{stage.experiment_id}/models"),)),
            Probe("its evidence", NOBODY, path=(("artifact_path", f"{stage.experiment_id}/{stage.run_id}/artifacts"),)),
        ),
        **{
            ("POST", f"/mlflow-artifacts/mpu/{step}/<path:artifact_path>"): (
                Probe("over live's weights", NOBODY, part, path=weights),
            )
            for step in ("create", "complete", "abort")
        },
        ("POST", "/upload-artifact"): (
            Probe("live's evidence", NOBODY, data=b"x", params={"run_uuid": stage.run_id, "path": "evidence/x.html"}),
        ),
        **{
            ("POST", f"/runs/{name}"): (Probe("live's run", NOBODY, run | more),)
            for name, more in {
                "delete": {},
                "restore": {},
                "update": {"run_name": "other", "status": "FAILED"},
                "set-tag": {"key": "a", "value": "b"},
                "delete-tag": {"key": "a"},
                "log-metric": {"key": "accuracy", "value": 1.0, "timestamp": 1},
                "log-batch": {"metrics": [{"key": "accuracy", "value": 1.0, "timestamp": 1, "step": 0}]},
                "log-parameter": {"key": "a", "value": "b"},
                "log-inputs": {},
                "log-model": {"model_json": "{}"},
                "outputs": {},
            }.items()
        },
        ("DELETE", "/logged-models/<model_id>"): (Probe("live's", NOBODY, path=model),),
        ("PATCH", "/logged-models/<model_id>"): (
            Probe("live's", NOBODY, {"status": "LOGGED_MODEL_UPLOAD_FAILED"}, path=model),
        ),
        ("POST", "/logged-models/<model_id>/params"): (Probe("live's", NOBODY, {"params": []}, path=model),),
        ("PATCH", "/logged-models/<model_id>/tags"): (Probe("live's", NOBODY, {"tags": []}, path=model),),
        ("DELETE", "/logged-models/<model_id>/tags/<tag_key>"): (
            Probe("live's", NOBODY, path=(*model, ("tag_key", "a"))),
        ),
        **{
            ("POST", f"/experiments/{name}"): (
                Probe("the model's", NOBODY, {"experiment_id": stage.experiment_id} | more),
            )
            for name, more in {"delete": {}, "restore": {}, "update": {"new_name": "gone"}}.items()
        },
    }


def tags(**given):
    return [{"key": f"tidegate.{name}", "value": value} for name, value in given.items()]


def routes_of(world):
    answer = ask(world, "admin", "GET", "/tidegate/routes")
    assert answer.status_code == 200
    return answer.json()["routes"]


def address(route, probe):
    place = re.sub(r"\{(\w+):path\}|\{(\w+)\}", lambda found: f"<{found[1] or found[2]}>", route["path"])
    place = place.replace("<path:", "<")
    for name, value in probe.path:
        place = place.replace(f"<{name}>", value)
    return re.sub(r"<[^>]+>", "x", place)


def send(world, caller, route, probe):
    options = {"json": probe.json, "data": probe.data, "params": probe.params}
    return ask(world, caller, route["method"], address(route, probe), **options)


def seen_as(answer):
    return {401: "login", 403: "no"}.get(answer.status_code, "yes" if answer.status_code < 400 else "other")


def answers_now(world, model):
    """The version that serving would take, by what it trusts; None: it would take none, or stay with what it has."""
    store = world.stores["server"] if hasattr(world, "stores") else world.store
    try:
        wanted = wanted_of(SimpleNamespace(model=lambda name: name, store=store), model)()
        if wanted is None:
            return None
        return check_wanted(wanted, TrustedKeys.from_dir(world.root / "keys", "approvals"), model).version
    except (Ambiguous, ApprovalRefused):
        return None


def show(title, rows):
    lines = [f"\n{title}: expected/seen", f"{'route':<68}{'asks for':<26}{''.join(f'{name:<13}' for name in CALLERS)}"]
    lines += [f"{route:<68}{what:<26}{''.join(f'{cell:<13}' for cell in cells)}" for route, what, cells in rows]
    sys.stdout.write("\n".join(lines) + "\n")


def test_every_route_that_changes_something_has_its_gate(secured):
    found = routes_of(secured)
    assert len(found) > 250
    assert [route for route in found if route["gate"] is None] == []


def test_a_route_nobody_knows_is_closed():
    assert gate_of("POST", bare("/api/4.0/mlflow/model-versions/go-live")) is None
    assert gate_of("POST", bare("/api/2.0/mlflow/registered-models/merge")) is None
    assert gate_of("PUT", bare("/api/2.0/mlflow/model-versions/transition-stage")) is None


def test_no_route_of_the_registry_lets_anybody_make_an_unapproved_version_answer(secured, stage):
    probes, rows, wrong, asked = probes_of(stage), [], [], set()
    for route in routes_of(secured):
        if Gate(route["gate"]) not in REGISTRY:
            continue
        key = (route["method"], bare(route["path"]).removeprefix("/mlflow"))
        key = key if key in probes else (route["method"], bare(route["path"]))
        for probe in probes[key]:
            cells = []
            for caller in CALLERS:
                expected = "login" if caller == "anonymous" else "yes" if caller in probe.allowed else "no"
                answer = send(secured, caller, route, probe)
                seen = seen_as(answer)
                # A malformed request is no decision: what counts is that it did not get done.
                fits = seen == expected or (seen == "other" and (expected == "yes" or answer.status_code == 400))
                cells.append(f"{expected}/{seen}" if seen != "other" else f"{expected}/{answer.status_code}")
                if not fits:
                    wrong.append((*key, probe.what, caller, expected, seen, answer.text[:200]))
                if seen == "yes" or not fits:
                    assert answers_now(secured, "desk") == stage.live, (key, probe, caller)
                    assert answers_now(secured, "other") is None, (key, probe, caller)
            rows.append((f"{route['method']} {route['path']}", probe.what, cells))
            assert answers_now(secured, "desk") == stage.live
        asked.add(key)
    show("the registry", rows)
    assert wrong == []
    assert asked == set(probes)
    assert secured.stages("desk")[stage.live] == "Production"


def test_on_every_other_route_a_role_gets_no_further_than_it_must(secured, stage):
    rows, wrong, once = [], [], {}
    for route in routes_of(secured):
        once.setdefault((route["method"], bare(route["path"])), route)  # the spellings of one route have one rule
    for route in once.values():
        gate = Gate(route["gate"])
        if gate in REGISTRY:
            continue
        probe, cells = Probe("nothing", PASSED[gate], {}), []
        for caller in CALLERS:
            answer = send(secured, caller, route, probe)
            expected = "login" if caller == "anonymous" else "MLflow" if caller in probe.allowed else "no"
            # MLflow may find a body wanting before anybody is asked for their role: nothing was done then either.
            done = seen_as(answer) == "yes" or answer.status_code >= 500
            if (expected == "login" and answer.status_code != 401) or (expected == "no" and done):
                wrong.append((route, caller, expected, answer.status_code, answer.text[:200]))
            cells.append(f"{expected}/{answer.status_code}")
        rows.append((f"{route['method']} {route['path']}", gate.value, cells))
    show("everything else", rows)
    assert wrong == []
    assert answers_now(secured, "desk") == stage.live


def test_each_role_can_do_what_it_is_for(secured, stage, tmp_path):
    stores = secured.stores
    assert stores["viewer"].versions("desk")
    assert stores["viewer"].fetch_adapter("desk", stage.live, tmp_path / "seen").is_dir()
    secured.store = stores["trainer"]
    version, _ = secured.candidate("desk", parent=stage.sha)
    secured.store = stores["learner"]
    stores["learner"].archive("desk", stage.failed, state="failed")
    stores["approver"].promote("desk", version, why="better", who="")
    stores["server"].set_alias("desk", "live", version)
    assert answers_now(secured, "desk") == version
    stores["learner"].remove_weights("desk", stage.failed)
    with pytest.raises(PromotionRefused, match="is live"):
        stores["learner"].remove_weights("desk", version)
    stores["admin"].promote("desk", stage.live, why="back", who="")
    assert answers_now(secured, "desk") == stage.live
    with pytest.raises(PromotionRefused):
        stores["elsewhere"].fetch_adapter("desk", stage.live, tmp_path / "other")
    assert stores["elsewhere"].versions("desk") == []
