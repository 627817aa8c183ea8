"""Requests to MLflow's server, put before the rules.

MLflow asks for the login and for its own permissions first (Flask `before_request`); then every request that would
change anything is read by MLflow's own parser and judged. MLflow serves some routes past Flask; those meet the same
rules in an ASGI layer that lies inside MLflow's authentication.
"""

import json
import os
from collections.abc import Callable, Iterable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import structlog
from anyio import to_thread
from fastapi.routing import iter_route_contexts
from flask import Flask, Response, jsonify, request
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE, PERMISSION_DENIED
from mlflow.server import handlers
from mlflow.utils.uri import validate_path_is_safe
from mlflow.version import VERSION as mlflow_version  # noqa: N811 - a value like any other here
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Match, Mount

from privacy.errors import PrivacyError
from registry.errors import PromotionRefused, RegistryError
from registry.inside import PLAIN_ID, InProcess, View, body, prefix, translated, who, why
from registry.registrars import Registrars
from registry.roles import SERVICES, Caller
from registry.routes import MUTATING, Gate, bare, gate_of
from registry.rules import Change, Rules, Share
from registry.states import PRODUCTION

log = structlog.get_logger()

# The guard's own pages: each about one model.
_OF_A_MODEL = ("/tidegate/approvals", "/tidegate/standing", "/tidegate/history")
# Under this name the app keeps who asks.
_CALLER = "tidegate_caller"
_PROXIED = "/mlflow-artifacts/artifacts/"
# What a handler reads its body as, by the handler's name, which is its route's endpoint.
_MESSAGES = {handler.__name__: kind for kind, handler in handlers.HANDLERS.items()}


def without_logins(app: Flask, rules: Rules) -> Any:
    """MLflow's app behind the rules; whoever reaches it is everybody."""
    from mlflow.server.fastapi_app import create_fastapi_app

    app.before_request(_judge(rules, _stranger))
    asgi = create_fastapi_app(app)
    _guard_native(asgi, rules, _stranger)
    _tell_routes(app, asgi)
    return asgi


def with_logins(app: Flask, rules: Rules, keys: Path, models: Iterable[str]) -> Any:
    """MLflow's basic authentication first, then the rules, told who asks."""
    from mlflow.server.auth import create_app as with_authentication

    from registry.logins import Logins, open_to_all_users

    logins, at = Logins(), prefix()
    asgi = with_authentication(app)
    passwords = {str(role): _password(keys, role) for role in SERVICES if _password(keys, role)}
    logins.provide(models, passwords)
    for page_path in ("/tidegate/health", *_OF_A_MODEL):
        open_to_all_users(f"{at}{page_path}")
    app.extensions[_CALLER] = logins.caller
    app.before_request(_judge(rules, logins.caller))
    app.before_request(_reading(logins))
    app.after_request(_noting(rules.registrars))

    def users() -> Any:
        given = body()
        if request.method == "GET":
            return jsonify({"users": logins.everybody()})
        return jsonify({"made": logins.add(str(given.get("name", "")), str(given.get("password", "")))})

    def roles() -> Any:
        change = logins.grant if request.method == "POST" else logins.revoke
        given = (str(body().get(name, "")) for name in ("name", "role", "model"))
        return jsonify({"changed": change(*given)})

    app.add_url_rule(f"{at}/tidegate/users", "tidegate_users", translated(users), methods=["GET", "POST"])
    app.add_url_rule(f"{at}/tidegate/roles", "tidegate_roles", translated(roles), methods=["POST", "DELETE"])
    _guard_native(asgi, rules, logins.caller)
    _tell_routes(app, asgi)
    return asgi


def _password(keys: Path, role: str) -> str:
    """Of one of the service's own users: from a variable, or from a file of the keys folder; empty when neither is."""
    file = keys / f"mlflow_{role}"
    kept = file.read_text("utf-8") if file.is_file() else ""
    return os.environ.get(f"TIDEGATE_MLFLOW_{role.upper()}", kept).strip()


def _tell_routes(app: Flask, asgi: Any) -> None:
    """Add a page that lists every route of this server that changes something, with its gate; null: it is closed."""

    def routes() -> Response:
        found = {(method, rule.rule) for rule in app.url_map.iter_rules() for method in rule.methods or ()}
        for context in iter_route_contexts(asgi.routes):
            found |= {(method, str(context.path)) for method in getattr(context, "methods", None) or ()}
        changing = sorted((path, method) for method, path in found if method in MUTATING)
        gates = {place: gate_of(place[1], bare(place[0], prefix())) for place in changing}
        return jsonify({"routes": [{"path": p, "method": m, "gate": gate} for (p, m), gate in gates.items()]})

    app.add_url_rule(f"{prefix()}/tidegate/routes", "tidegate_routes", translated(routes))


def hindrance(app: Flask, rules: Rules, model: str, version: int) -> str:
    """Why whoever asks may not approve a version, whatever its papers say; empty when they may, or without logins."""
    caller_of = app.extensions.get(_CALLER)
    if caller_of is None:
        return ""
    change = Change(Gate.TRANSITION, request.path, model=model, version=version, stage=PRODUCTION)
    try:
        rules.judge(change, caller_of(who()))
    except PromotionRefused as refusal:
        return str(refusal)
    return ""


def _judge(rules: Rules, caller_of: Callable[[str], Caller]) -> View:
    """A Flask `before_request` that lets through what the rules allow. It runs after MLflow's own."""

    @translated
    def judge() -> Any:
        if request.method not in MUTATING or request.url_rule is None:
            return None
        path = bare(request.url_rule.rule, prefix())
        change = _change(path)
        caller = caller_of(who())
        try:
            rules.judge(change, caller)
        except PromotionRefused as refusal:
            if change.gate is Gate.TRANSITION and (change.stage == PRODUCTION or change.share is Share.GIVE):
                rules.approvals.note_refusal(
                    model=change.model,
                    version=change.version,
                    who=caller.name,
                    why=why(),
                    sentence=str(refusal),
                )
            raise
        return None

    return judge


def _reading(logins: Any) -> View:
    """A Flask `before_request`: decisions are shown to those who may see their model."""

    @translated
    def reading() -> Any:
        if request.path not in {f"{prefix()}{path}" for path in _OF_A_MODEL}:
            return
        caller = logins.caller(who())
        if not caller.admin and not caller.roles.get(request.args.get("model", "")):
            raise PromotionRefused(
                f"{caller.name} may not read these decisions: name a model that you have a role on by ?model=NAME"
            )

    return reading


def _noting(registrars: Registrars) -> Callable[[Response], Response]:
    """A Flask `after_request` that writes down who registered a version."""

    def note(response: Response) -> Response:
        rule = request.url_rule
        made = rule is not None and gate_of(request.method, bare(rule.rule, prefix())) is Gate.VERSION_CREATE
        if made and response.status_code == HTTPStatus.OK:
            version = (response.get_json(silent=True) or {}).get("model_version", {})
            model, number, registrar = str(version["name"]), int(version["version"]), who()
            registrars.note(model, number, registrar)
            InProcess().set_tag(model, number, "tidegate.registered_by", registrar)  # for people to see
        return response

    return note


def _change(path: str) -> Change:
    """What a request would do, in the words of the rules.

    Raises:
        PromotionRefused: the route is unknown. MlflowException: MLflow's own parser does not take the body.
    """
    route, gate = f"{request.method} {path}", gate_of(request.method, path)
    if gate is None:
        raise PromotionRefused(_unknown(route))
    view = request.view_args or {}
    kind = _MESSAGES.get(request.endpoint or "")
    # Parsed by MLflow's own parser, so that the rules judge exactly what MLflow would do.
    message = handlers._get_request_message(kind()) if kind else None  # noqa: SLF001

    def told(name: str) -> str:
        return str(getattr(message, name, "") or "")

    runs = {told("run_id"), told("run_uuid"), request.args.get("run_uuid", ""), request.args.get("run_id", "")}
    experiment = told("experiment_id") if gate is Gate.EXPERIMENT else ""
    return Change(
        gate=gate,
        route=route,
        model=told("name"),
        version=_number(told("version")),
        stage=told("stage").capitalize(),
        key=told("key"),
        alias=told("alias"),
        source=told("source"),
        tags={tag.key: tag.value for tag in getattr(message, "tags", ())} if gate is Gate.VERSION_CREATE else {},
        run_ids=tuple(sorted(run for run in runs if PLAIN_ID.fullmatch(run))),
        logged_model=str(view.get("model_id", "")),
        path=_canonical(str(view.get("artifact_path", ""))),
        recursive=request.method == "DELETE",
        experiment=_experiment_name(experiment) if experiment else "",
        archives=bool(getattr(message, "archive_existing_versions", False)),
        told=str(body().get("tidegate_state") or ""),
        share=_share(body()),
    )


def _number(version: str) -> int:
    """The number of a version, 0 when none is named. SQLite takes ` 7` for 7 too, so that only digits may go on."""
    if version and not (version.isascii() and version.isdecimal()):
        raise MlflowException(f"version={version!r}: must be a whole number", INVALID_PARAMETER_VALUE)
    return int(version or 0)


def _share(given: dict[str, Any]) -> Share:
    """What a transition says of a canary."""
    told = given.get("tidegate_canary")
    if "tidegate_canary" not in given:
        return Share.NONE
    if not isinstance(told, dict) or told.get("share") != 0:
        return Share.GIVE
    return Share.STEP_BACK if told.get("automatic") is True else Share.END


def _guard_native(asgi: Any, rules: Rules, caller_of: Callable[[str], Caller]) -> None:
    """Judge the routes that MLflow serves past Flask, inside whatever authentication the app has.

    The last middleware is the innermost: MLflow's authentication has answered before.
    """
    native = [route for route in asgi.routes if not isinstance(route, Mount)]
    asgi.user_middleware.append(Middleware(_NativeRoutes, native=native, rules=rules, caller_of=caller_of))


class _NativeRoutes:
    """ASGI: a request for one of `native` that would change something is judged first."""

    def __init__(self, app: Any, *, native: list[Any], rules: Rules, caller_of: Callable[[str], Caller]) -> None:
        self._app, self._native, self._rules, self._caller_of = app, native, rules, caller_of

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._meets(scope):
            refusal = await to_thread.run_sync(self._judge, scope)
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _meets(self, scope: Any) -> bool:
        if scope["type"] != "http" or scope["method"] not in MUTATING:
            return False
        return any(route.matches(scope)[0] is Match.FULL for route in self._native)

    def _judge(self, scope: Any) -> JSONResponse | None:
        address = (scope.get("client") or ("unknown",))[0]
        asks = str(scope.get("state", {}).get("username") or f"local:{address}")
        try:
            self._rules.judge(_native_change(scope["method"], bare(scope["path"], prefix())), self._caller_of(asks))
        except PromotionRefused as refusal:
            log.info("request refused", reason=str(refusal))
            return _answer(MlflowException(str(refusal), PERMISSION_DENIED))
        except MlflowException as error:
            return _answer(error)
        except (RegistryError, PrivacyError) as error:
            log.exception("guard failed")
            return _answer(MlflowException(f"{error}; nothing was changed", INTERNAL_ERROR))
        return None


def _native_change(method: str, path: str) -> Change:
    """What a request past Flask would do. Its path is a real one, not a rule."""
    recursive = method == "DELETE"
    if path.startswith(_PROXIED):
        return Change(Gate.ARTIFACT, f"{method} {path}", path=_canonical(path[len(_PROXIED) :]), recursive=recursive)
    gate = gate_of(method, path)
    if gate is None:
        raise PromotionRefused(_unknown(f"{method} {path}"))
    return Change(gate, f"{method} {path}", recursive=recursive)


def _answer(error: MlflowException) -> JSONResponse:
    return JSONResponse(json.loads(error.serialize_as_json()), error.get_http_status_code())


def _unknown(route: str) -> str:
    return (
        f"{route}: a route that this guard does not know (MLflow {mlflow_version}), so it is closed; "
        f"install the MLflow that constraints.txt names"
    )


def _canonical(artifact_path: str) -> str:
    """The path as MLflow's handlers come to see it: they decode once more.

    Raises:
        MlflowException: it leads out of the store.
    """
    return str(validate_path_is_safe(artifact_path)) if artifact_path else ""


def _experiment_name(experiment_id: str) -> str:
    return str(handlers._get_tracking_store().get_experiment(experiment_id).name)  # noqa: SLF001


def _stranger(name: str) -> Caller:
    """Whoever asks where there are no logins."""
    return Caller(name, known=False)
