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

Environment: TIDEGATE_WORKSPACE, TIDEGATE_KEYS (default `keys` in the workspace), TIDEGATE_APPROVALS_URL
    (default `approvals.db` there), TIDEGATE_OPEN_MODELS (a JSON list of names: models of streams that never
    promised privacy; a version without it is refused for any other), TIDEGATE_MLFLOW_AUTH=basic to add MLflow's
    basic authentication. Who decided: the authenticated user; without authentication the name a client gives in
    `X-Tidegate-User`, else `local:ADDRESS`. Why: `X-Tidegate-Why`, or `comment` in the JSON body. Both headers are
    percent-encoded UTF-8.
"""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import structlog
from flask import Flask, Response, g, jsonify, request
from mlflow.entities.model_registry import ModelVersionTag
from mlflow.entities.model_registry.model_version_stages import get_canonical_stage
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    RESOURCE_DOES_NOT_EXIST,
)
from mlflow.protos.model_registry_pb2 import TransitionModelVersionStage
from mlflow.server import app as mlflow_app
from mlflow.server import handlers
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from ingest.child import die_with_parent
from privacy.errors import PrivacyError
from privacy.signing import KeyFile, SigningKey, TrustedKeys
from registry import page
from registry.approvals import Approval, Approvals, Verifier
from registry.canary import parse
from registry.errors import PromotionRefused, RegistryError, UnknownVersion
from registry.fingerprints import Fingerprints
from registry.promotion import ADAPTER_FOLDER, Promotions, Trust
from registry.states import ModelVersion

log = structlog.get_logger()

_TRANSITION = "/mlflow/model-versions/transition-stage"
# One page of MLflow's version search; its own maximum is 200,000.
_PAGE_ROWS = 10_000

View = Callable[..., Any]


class InProcess:
    """MLflow's stores, from inside its server: `promotion.Registry`."""

    def versions(self, model: str) -> list[ModelVersion]:
        """Every version of a model."""
        store, found, token = _store(), [], None
        while True:
            query = f"name='{model}'"
            page = store.search_model_versions(query, max_results=_PAGE_ROWS, page_token=token)
            found += [_version(entity) for entity in page]
            token = page.token
            if not token:
                return found

    def move(self, model: str, version: int, stage: str, *, archive_existing: bool = False) -> None:
        """Set a stage, in one transaction with the archiving of those that stand there."""
        _store().transition_model_version_stage(model, str(version), stage, archive_existing)

    def set_tag(self, model: str, version: int, key: str, value: str) -> None:
        """Set a tag of a version."""
        tag = ModelVersionTag(key, value)
        _store().set_model_version_tag(model, str(version), tag)

    def fetch_adapter(self, model: str, version: int, dest: Path) -> Path:
        """Where the adapter's files lie, or a copy in `dest`, found the way MLflow's own download handler does."""
        root = _store().get_model_version_download_uri(model, str(version))
        try:
            if handlers._is_servable_proxied_run_artifact_root(root):  # noqa: SLF001
                repository = handlers._get_artifact_repo_mlflow_artifacts()  # noqa: SLF001
                to_path = handlers._get_proxied_run_artifact_destination_path  # noqa: SLF001
                path = to_path(root, ADAPTER_FOLDER)
            else:
                repository = handlers._get_artifact_repository_for_uri(root)  # noqa: SLF001
                path = ADAPTER_FOLDER
            local = isinstance(repository, LocalArtifactRepository)
            return Path(repository.download_artifacts(path, None if local else str(dest)))
        except (MlflowException, OSError) as error:
            raise RegistryError(f"{root}/{ADAPTER_FOLDER}: {error}") from error


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
    approvals = Approvals(os.environ.get("TIDEGATE_APPROVALS_URL") or f"sqlite:///{workspace / 'approvals.db'}", signer)
    # Keys are read at each decision: the first verdict may be signed after this server started.
    open_models = json.loads(os.environ.get("TIDEGATE_OPEN_MODELS") or "[]")
    hashed = Fingerprints()

    def promotions() -> Promotions:
        return Promotions(InProcess(), approvals, Trust.from_dir(keys, open_models), hashed)

    guard(app, promotions, approvals)
    _pages(app, promotions, TrustedKeys.from_dir(keys, "approvals"))
    _settle(promotions, approvals)
    if os.environ.get("TIDEGATE_MLFLOW_AUTH") == "basic":
        from mlflow.server.auth import create_app as with_authentication

        return with_authentication(app)
    from mlflow.server.fastapi_app import create_fastapi_app

    return create_fastapi_app(app)


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
    prefix = os.environ.get(handlers.STATIC_PREFIX_ENV_VAR, "").rstrip("/")
    for rule in list(app.url_map.iter_rules()):
        if rule.rule == f"{prefix}/":
            app.view_functions[rule.endpoint] = _with_script(app.view_functions[rule.endpoint])

    def health() -> Response:
        return jsonify({"guard": "tidegate"})

    def history() -> Response:
        return jsonify({"approvals": approvals.history(request.args.get("model")), "head": approvals.head()})

    app.add_url_rule(f"{prefix}/tidegate/health", "tidegate_health", handlers.catch_mlflow_exception(health))
    app.add_url_rule(f"{prefix}/tidegate/approvals", "tidegate_approvals", _translated(history))


def _settle(promotions: Callable[[], Promotions], approvals: Approvals) -> None:
    """Mend what a crash left, and make emergencies lasting: MLflow is back. Else each decision begins with the same."""
    for model in approvals.models():
        try:
            promotions().reconcile(model)
        except (RegistryError, PrivacyError, MlflowException) as error:
            log.warning("not settled", model=model, why=str(error))


def _pages(app: Flask, promotions: Callable[[], Promotions], keys: Verifier) -> None:
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
        )
        return jsonify(told)

    def history_page() -> Response:
        model, desk = request.args.get("model", ""), promotions()
        seal = page.seal_of(desk.approvals, keys, page.carried_by(desk.registry.versions(model)))
        events = page.events_of(desk.approvals.history(model), desk.approvals.refusals(model))
        answer = Response(page.history_page(model, events, seal), mimetype="text/html")
        answer.headers["Cache-Control"] = "no-store"
        return answer

    prefix = os.environ.get(handlers.STATIC_PREFIX_ENV_VAR, "").rstrip("/")
    app.add_url_rule(f"{prefix}/tidegate/standing", "tidegate_standing", _translated(standing))
    app.add_url_rule(f"{prefix}/tidegate/history", "tidegate_history", _translated(history_page))


def _guarded(mlflow_view: View, promotions: Callable[[], Promotions]) -> View:
    @wraps(mlflow_view)
    @_translated
    def transition(*args: Any, **kwargs: Any) -> Any:
        # Parsed by MLflow's own parser, so that the guard judges exactly what MLflow would do.
        message = handlers._get_request_message(TransitionModelVersionStage())  # noqa: SLF001
        if not (message.name and message.version and message.stage):
            return mlflow_view(*args, **kwargs)  # it names what is missing
        body = request.get_json(force=True, silent=True)
        body = body if isinstance(body, dict) else {}
        approval = _decide(promotions(), message, body, who=_who(), why=_why(body))
        entity = _store().get_model_version(message.name, message.version)
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


def _translated(view: View) -> View:
    """Answer Tidegate's errors as MLflow's JSON errors: the UI shows `message`, clients raise it."""

    @wraps(view)
    def answering(*args: Any, **kwargs: Any) -> Any:
        try:
            return view(*args, **kwargs)
        except PromotionRefused as refusal:
            log.info("transition refused", reason=str(refusal))
            raise MlflowException(str(refusal), PERMISSION_DENIED) from refusal
        except UnknownVersion as error:
            raise MlflowException(str(error), RESOURCE_DOES_NOT_EXIST) from error
        except (RegistryError, PrivacyError) as error:
            log.exception("guard failed")
            raise MlflowException(f"{error}; the stage was not changed", INTERNAL_ERROR) from error

    return wraps(view)(handlers.catch_mlflow_exception(answering))


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


def _store() -> Any:
    """MLflow's own model registry store, as its handlers get it."""
    return handlers._get_model_registry_store()  # noqa: SLF001 - there is no public way


def _who() -> str:
    authenticated = getattr(g, "mlflow_authenticated_user", None)
    if authenticated:
        return str(authenticated)
    return unquote(request.headers.get("X-Tidegate-User", "")).strip() or f"local:{request.remote_addr}"


def _why(body: dict[str, Any]) -> str:
    return unquote(request.headers.get("X-Tidegate-Why", "")).strip() or str(body.get("comment") or "").strip()


def _version(entity: Any) -> ModelVersion:
    created = datetime.fromtimestamp(entity.creation_timestamp / 1000, UTC)
    return ModelVersion(
        version=int(entity.version),
        stage=entity.current_stage,
        tags=dict(entity.tags),
        created_at=created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        run_id=entity.run_id or "",
        aliases=tuple(entity.aliases),
        description=entity.description or "",
    )


def _setting(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise RegistryError(f"{name}: not set; start MLflow by `tidegate mlflow`, or set it to the workspace's folder")
    return value
