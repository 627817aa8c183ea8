"""The promotion guard: MLflow's own server, with a person's decision checked, signed and remembered.

`mlflow server --app-name tidegate` finds `create_app` through the entry point group `mlflow.app` (see
`server.py` for the whole command). The guard takes the place of MLflow's handler for
`model-versions/transition-stage` inside MLflow's Flask app, whatever prefix it is served under, so that the
UI, the REST API and every client meet it, and so that MLflow's own authentication and permissions (Flask
`before_request`) have been checked before.

    to Production            refused with a sentence, or signed, and the only one in Production
    out of Production        recorded
    candidate to Archived    a rejection, recorded; also where the box to archive others takes it out of Staging
    Staging with a share     `Promotions.canary`, `end_canary`: `tidegate_canary` in the body; no stage moves
    anything else            done, under the same lock

The header `X-Tidegate-Approval` of the answer holds the `seq` of the decision in the history, where it is one.

Before that, every request that would change anything is judged by `rules.py`, after MLflow has asked for the login
and for its own permissions: see `judging.py`.

Environment: TIDEGATE_WORKSPACE, TIDEGATE_KEYS (default `keys` in the workspace), TIDEGATE_APPROVALS_URL
    (default `approvals.db` there), TIDEGATE_OPEN_MODELS (a JSON list of names: models of streams that never
    promised privacy; a version without it is refused for any other), TIDEGATE_MLFLOW_AUTH=basic to add MLflow's
    basic authentication; with it TIDEGATE_MODELS (a JSON list: models that get roles), TIDEGATE_SOLO_MODELS (a JSON
    list: models whose versions may be promoted by whom registered them), and `mlflow_learner` and `mlflow_server`
    among the keys: passwords of the service's own users. Who decided: the authenticated user; without authentication
    the name a client gives in `X-Tidegate-User`, else `local:ADDRESS`. Why: `X-Tidegate-Why`, or `comment` in the
    JSON body. Both headers are percent-encoded UTF-8.
"""

import json
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import structlog
from flask import Flask, Response, jsonify, request
from mlflow.entities.model_registry.model_version_stages import get_canonical_stage
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.protos.model_registry_pb2 import TransitionModelVersionStage
from mlflow.server import app as mlflow_app
from mlflow.server import handlers

from ingest.child import die_with_parent
from privacy.errors import PrivacyError
from privacy.signing import KeyFile, SigningKey, TrustedKeys
from registry import judging, page
from registry.approvals import Approval, Approvals, Verifier
from registry.canary import parse
from registry.errors import RegistryError, UnknownVersion
from registry.fingerprints import Fingerprints
from registry.inside import InProcess, View, body, prefix, store, translated, who, why
from registry.promotion import Promotions, Trust
from registry.registrars import Registrars
from registry.rules import Rules

log = structlog.get_logger()

_TRANSITION = "/mlflow/model-versions/transition-stage"


def create_app(app: Flask = mlflow_app) -> Any:
    """MLflow's app with the guard in it; what `mlflow server --app-name tidegate` serves.

    Raises:
        RegistryError, PrivacyError: no workspace is named, its keys or its history cannot be opened, or this
        MLflow has
            no transition route where the guard expects it. The server then does not start: never unguarded.
    """
    if os.environ.get("TIDEGATE_MLFLOW_CHILD"):
        die_with_parent()  # uvicorn's parent is the `mlflow` command, which dies with whoever started it
    workspace = Path(_setting("TIDEGATE_WORKSPACE"))
    keys = Path(os.environ.get("TIDEGATE_KEYS") or workspace / "keys")
    SigningKey.load_or_create(keys / "approvals.pem")
    signer = KeyFile(keys / "approvals.pem")  # read at each decision: a rotation needs no restart
    url = os.environ.get("TIDEGATE_APPROVALS_URL") or f"sqlite:///{workspace / 'approvals.db'}"
    approvals = Approvals(url, signer)
    # Keys are read at each decision: the first verdict may be signed after this server started.
    open_models = _names("TIDEGATE_OPEN_MODELS")
    hashed = Fingerprints()

    def promotions() -> Promotions:
        return Promotions(InProcess(), approvals, Trust.from_dir(keys, open_models), hashed)

    guard(app, promotions, approvals)
    _settle(promotions, approvals)
    rules = Rules(InProcess(), approvals, Registrars(url), frozenset(_names("TIDEGATE_SOLO_MODELS")))
    _pages(app, promotions, TrustedKeys.from_dir(keys, "approvals"), rules)
    if os.environ.get("TIDEGATE_MLFLOW_AUTH") == "basic":
        return judging.with_logins(app, rules, keys, _names("TIDEGATE_MODELS"))
    return judging.without_logins(app, rules)


def guard(app: Flask, promotions: Callable[[], Promotions], approvals: Approvals) -> None:
    """Put the guard into MLflow's Flask app: transitions, the front page, and its own two routes."""
    guarded = {rule.endpoint for rule in app.url_map.iter_rules() if rule.rule.endswith(_TRANSITION)}
    if not guarded:
        raise RegistryError(
            f"mlflow route={_TRANSITION}: not found, so nothing would be guarded; "
            f"install the MLflow that constraints.txt names"
        )
    for endpoint in guarded:
        app.view_functions[endpoint] = _guarded(app.view_functions[endpoint], promotions)
    at = prefix()
    for rule in list(app.url_map.iter_rules()):
        if rule.rule == f"{at}/":
            app.view_functions[rule.endpoint] = _with_script(app.view_functions[rule.endpoint])

    def health() -> Response:
        return jsonify({"guard": "tidegate"})

    def history() -> Response:
        return jsonify({"approvals": approvals.history(request.args.get("model")), "head": approvals.head()})

    app.add_url_rule(f"{at}/tidegate/health", "tidegate_health", handlers.catch_mlflow_exception(health))
    app.add_url_rule(f"{at}/tidegate/approvals", "tidegate_approvals", translated(history))


def _settle(promotions: Callable[[], Promotions], approvals: Approvals) -> None:
    """Mend what a crash left, and make emergencies lasting: MLflow is back. Else each decision begins with the same."""
    for model in approvals.models():
        try:
            promotions().reconcile(model)
        except (RegistryError, PrivacyError, MlflowException) as error:
            log.warning("not settled", model=model, why=str(error))


def _pages(app: Flask, promotions: Callable[[], Promotions], keys: Verifier, rules: Rules) -> None:
    """Add what people read of decisions: the facts of the panel on a version's page, and the history of a model."""

    def standing() -> Response:
        model, number = request.args.get("model", ""), request.args.get("version", "")
        if not number.isdecimal():
            raise UnknownVersion(f"version={number}: must be the number of a version")
        desk = promotions()
        versions = desk.registry.versions(model)
        told = page.standing(
            model,
            int(number),
            versions=versions,
            approvals=desk.approvals,
            seal=page.seal_of(desk.approvals, keys, page.carried_by(versions)),
            objection=lambda version: desk.objection(model, version),
            hindrance=judging.hindrance(app, rules, model, int(number)),
        )
        return jsonify(told)

    def history_page() -> Response:
        model, desk = request.args.get("model", ""), promotions()
        seal = page.seal_of(desk.approvals, keys, page.carried_by(desk.registry.versions(model)))
        events = page.events_of(desk.approvals.history(model), desk.approvals.refusals(model))
        answer = Response(page.history_page(model, events, seal), mimetype="text/html")
        answer.headers["Cache-Control"] = "no-store"
        return answer

    at = prefix()
    app.add_url_rule(f"{at}/tidegate/standing", "tidegate_standing", translated(standing))
    app.add_url_rule(f"{at}/tidegate/history", "tidegate_history", translated(history_page))


def _guarded(mlflow_view: View, promotions: Callable[[], Promotions]) -> View:
    @wraps(mlflow_view)
    @translated
    def transition(*args: Any, **kwargs: Any) -> Any:
        # Parsed by MLflow's own parser, so that the guard judges exactly what MLflow would do.
        message = handlers._get_request_message(TransitionModelVersionStage())  # noqa: SLF001
        if not (message.name and message.version and message.stage):
            return mlflow_view(*args, **kwargs)  # it names what is missing
        approval = _decide(promotions(), message, body(), who=who(), why=why())
        entity = store().get_model_version(message.name, message.version)
        response = handlers._wrap_response(  # noqa: SLF001
            TransitionModelVersionStage.Response(model_version=entity.to_proto())
        )
        if approval:
            response.headers["X-Tidegate-Approval"] = str(approval["seq"])
        return response

    return transition


def _decide(promotions: Promotions, message: Any, body: dict[str, Any], *, who: str, why: str) -> Approval | None:
    number = _number(message.version)
    if "tidegate_canary" in body:
        return _decide_canary(promotions, message.name, number, body["tidegate_canary"], who=who, why=why)
    return promotions.transition(
        message.name,
        number,
        get_canonical_stage(message.stage),
        who=who,
        why=why,
        archive_existing=message.archive_existing_versions,
        told=str(body.get("tidegate_state") or ""),
    )


def _number(version: str) -> int:
    """The number of a version, spelt in digits: SQLite takes ` 7` and `+7` for 7 too, so that they must not go on."""
    if not (version.isascii() and version.isdecimal()):
        raise MlflowException(f"version={version!r}: must be a whole number", INVALID_PARAMETER_VALUE)
    return int(version)


def _decide_canary(promotions: Promotions, model: str, version: int, told: Any, *, who: str, why: str) -> Approval:
    """A share of the requests for a candidate, or the end of it: `share` 0, with the `seq` of what it is to end."""
    if isinstance(told, dict) and told.get("share") == 0:
        seq = told.get("seq")
        return promotions.end_canary(
            model,
            version,
            who=who,
            why=why,
            seq=seq if isinstance(seq, int) else None,
            automatic=told.get("automatic") is True,
        )
    return promotions.canary(model, version, parse(told), who=who, why=why)


def _with_script(front_page: View) -> View:
    @wraps(front_page)
    def shown(*args: Any, **kwargs: Any) -> Any:
        response = front_page(*args, **kwargs)
        if not isinstance(response, Response) or response.mimetype != "text/html":
            return response
        response.direct_passthrough = False
        plain = Response(page.with_script(response.get_data(as_text=True)), mimetype="text/html")
        plain.headers["Cache-Control"] = "no-store"  # a page cached from an unguarded server would hide the stages
        return plain

    return shown


def _setting(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise RegistryError(f"{name}: not set; start MLflow by `tidegate mlflow`, or set it to the workspace's folder")
    return value


def _names(variable: str) -> list[str]:
    return [str(name) for name in json.loads(os.environ.get(variable) or "[]")]
