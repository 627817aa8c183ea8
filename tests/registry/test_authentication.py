import pytest
import requests

from registry.mlflow_store import MlflowStore
from registry.server import MlflowServer
from tests.registry.conftest import World

PASSWORD = "a-long-enough-secret"


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    """MLflow with its basic authentication under the guard."""
    root = tmp_path_factory.mktemp("secured")
    (root / "keys").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIDEGATE_MLFLOW_AUTH", "basic")
        patch.setenv("MLFLOW_FLASK_SERVER_SECRET_KEY", "not a secret here")
        patch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", PASSWORD)
        patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        with MlflowServer(root, port=0) as server:
            store = MlflowStore(server.url)
            world = World(root, store)
            world.server = server
            yield world
            store.close()


def test_who_decided_is_the_login_and_nothing_a_client_claims(secured):
    version, _ = secured.candidate("desk")
    signed = secured.store.promote("desk", version, why="fine", who="somebody else")
    assert signed["who"] == "admin"


def test_without_a_login_nothing_is_decided_and_nothing_is_told(secured):
    version, _ = secured.candidate("closed")
    url = f"{secured.server.url}/api/2.0/mlflow/model-versions/transition-stage"
    body = {"name": "closed", "version": str(version), "stage": "Production"}
    assert requests.post(url, json=body, timeout=10).status_code == 401
    wrong = requests.post(url, json=body, auth=("admin", "guess"), timeout=10)
    assert wrong.status_code == 401
    assert requests.get(f"{secured.server.url}/tidegate/approvals", timeout=10).status_code == 401
    assert secured.stages("closed") == {version: "Staging"}


def test_a_reader_may_not_approve(secured):
    version, _ = secured.candidate("readonly")
    admin = ("admin", PASSWORD)
    made = requests.post(
        f"{secured.server.url}/api/2.0/mlflow/users/create",
        json={"username": "reader", "password": "another-long-secret"},
        auth=admin,
        timeout=10,
    )
    assert made.status_code == 200
    answer = requests.post(
        f"{secured.server.url}/api/2.0/mlflow/model-versions/transition-stage",
        json={"name": "readonly", "version": str(version), "stage": "Production"},
        auth=("reader", "another-long-secret"),
        timeout=10,
    )
    assert answer.status_code == 403
    assert secured.stages("readonly") == {version: "Staging"}
