"""Logins and roles on a real server. What each role can do on each route: `test_routes.py`."""

import pytest
import requests

from registry.errors import PromotionRefused, RegistryError
from registry.mlflow_store import MlflowStore
from registry.server import Logins, MlflowServer
from tests.privacy import postgres
from tests.registry.conftest import PASSWORD

TRANSITION = "/api/2.0/mlflow/model-versions/transition-stage"


def live_sha(world, model):
    return next((v.adapter_sha256 for v in world.store.versions(model) if v.stage == "Production"), "")


def test_who_decided_is_the_login_and_nothing_a_client_claims(secured):
    version, _ = secured.candidate("counter")
    signed = secured.stores["approver"].promote("counter", version, why="fine", who="somebody else")
    assert signed["who"] == "approver"


def test_without_a_login_nothing_is_decided_and_nothing_is_told(secured):
    version, _ = secured.candidate("counter")
    url = f"{secured.server.url}{TRANSITION}"
    body = {"name": "counter", "version": str(version), "stage": "Production"}
    assert requests.post(url, json=body, timeout=10).status_code == 401
    wrong = requests.post(url, json=body, auth=("admin", "guess"), timeout=10)
    assert wrong.status_code == 401
    assert requests.get(f"{secured.server.url}/tidegate/approvals", timeout=10).status_code == 401
    with pytest.raises(RegistryError, match=r"wants a login.*tidegate users add"):
        MlflowStore(secured.server.url, ("approver", "guess")).versions("counter")
    assert secured.stages("counter")[version] == "Staging"


@pytest.mark.parametrize("role", ["viewer", "trainer", "server"])
def test_only_an_approver_may_approve(secured, role):
    version, _ = secured.candidate("counter")
    before = secured.stages("counter")
    with pytest.raises(PromotionRefused):
        secured.stores[role].promote("counter", version, why="please", who="me")
    assert secured.stages("counter") == before


def test_an_approver_of_one_stream_decides_nothing_of_another(secured):
    version, _ = secured.candidate("counter")
    with pytest.raises(PromotionRefused, match=r"elsewhere may not|may not do that"):
        secured.stores["elsewhere"].promote("counter", version, why="please", who="me")


def test_whoever_registered_a_version_may_not_approve_it(secured):
    secured.store, kept = secured.stores["both"], secured.store
    try:
        version, _ = secured.candidate("counter", parent=live_sha(secured, "counter"))
    finally:
        secured.store = kept
    with pytest.raises(PromotionRefused, match=r"registered by both: somebody else must approve it \(four eyes\)"):
        secured.stores["both"].promote("counter", version, why="mine", who="somebody else")
    (found,) = [v for v in secured.store.versions("counter") if v.version == version]
    assert found.tag("registered_by") == "both"
    assert secured.stores["approver"].promote("counter", version, why="looked at it", who="")["who"] == "approver"
    assert requests.get(
        f"{secured.server.url}/tidegate/approvals", params={"model": "counter"}, auth=("both", PASSWORD), timeout=10
    ).json()["approvals"]


def test_a_model_may_be_named_whose_trainer_approves_alone(secured):
    secured.store, kept = secured.stores["both"], secured.store
    try:
        version, _ = secured.candidate("solo")
    finally:
        secured.store = kept
    assert secured.stores["both"].promote("solo", version, why="alone", who="")["who"] == "both"


@pytest.mark.slow
def test_users_and_roles_stand_in_mlflow_s_own_database_where_that_is_postgresql(tmp_path):
    if postgres.binary("initdb") is None:
        pytest.skip("PostgreSQL is missing: install the server's programs (initdb, pg_ctl)")
    with postgres.server() as folder:
        url = postgres.new_database(folder, "logins")
        logins = Logins(PASSWORD, "not a secret here", ["desk"])
        with MlflowServer(tmp_path, port=0, backend_url=url, approvals_url=url, logins=logins) as server:
            admin, ada = MlflowStore(server.url, ("admin", PASSWORD)), MlflowStore(server.url, ("ada", PASSWORD))
            assert (admin.add_user("ada", PASSWORD), admin.add_user("ada", PASSWORD)) == (True, False)
            assert (admin.grant("ada", "approver", "desk"), admin.grant("ada", "approver", "desk")) == (True, False)
            with pytest.raises(PromotionRefused):
                ada.users()
            assert {"name": "ada", "admin": False, "service": False, "roles": {"desk": ["approver"]}} in admin.users()
            assert (admin.revoke("ada", "approver", "desk"), admin.revoke("ada", "approver", "desk")) == (True, False)
            for store in (admin, ada):
                store.close()
    assert not (tmp_path / "mlflow" / "logins.db").exists()
