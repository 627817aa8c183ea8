"""Every route of MLflow's server that changes something, and which rule it falls under.

A route that stands here nowhere is refused: an MLflow that learns a new way to change the registry must not open it
by an upgrade. `tests/registry/test_routes.py` fails until such a route is put in its place.
"""

import re
from collections.abc import Mapping
from enum import StrEnum

MUTATING = frozenset({"POST", "PUT", "PATCH", "DELETE"})


class Gate(StrEnum):
    """A rule of `rules.py`."""

    READS = "reads"  # a search with a body
    OWN = "own"  # about the caller alone
    WORK = "work"  # runs, traces, datasets and so on: nothing here trusts them
    RUN = "run"  # the same, unless the run is a registered version's evidence
    LOGGED_MODEL = "logged model"  # the same for what holds a version's files
    ARTIFACT = "artifact"  # files by their path in the store
    EXPERIMENT = "experiment"
    MODEL_CREATE = "model create"
    MODEL_DESCRIBE = "model describe"
    MODEL_REMOVE = "model remove"
    ALIAS = "alias"
    VERSION_CREATE = "version create"
    VERSION_DESCRIBE = "version describe"
    VERSION_TAG = "version tag"
    VERSION_REMOVE = "version remove"
    TRANSITION = "transition"
    ADMIN = "admin"  # users, roles, webhooks
    CLOSED = "closed"  # nobody here needs it, and it would go round the guard or run code on the server


# Paths behind /api/N.N and /ajax-api/N.N, or bare where MLflow has them bare.
GATES: Mapping[tuple[str, str], Gate] = {
    # The registry.
    ("POST", "/mlflow/registered-models/create"): Gate.MODEL_CREATE,
    ("PATCH", "/mlflow/registered-models/update"): Gate.MODEL_DESCRIBE,
    ("POST", "/mlflow/registered-models/set-tag"): Gate.MODEL_DESCRIBE,
    ("DELETE", "/mlflow/registered-models/delete-tag"): Gate.MODEL_DESCRIBE,
    ("POST", "/mlflow/registered-models/rename"): Gate.MODEL_REMOVE,
    ("DELETE", "/mlflow/registered-models/delete"): Gate.MODEL_REMOVE,
    ("POST", "/mlflow/registered-models/get-latest-versions"): Gate.READS,
    ("POST", "/mlflow/registered-models/alias"): Gate.ALIAS,
    ("DELETE", "/mlflow/registered-models/alias"): Gate.ALIAS,
    ("POST", "/mlflow/model-versions/create"): Gate.VERSION_CREATE,
    ("PATCH", "/mlflow/model-versions/update"): Gate.VERSION_DESCRIBE,
    ("POST", "/mlflow/model-versions/set-tag"): Gate.VERSION_TAG,
    ("DELETE", "/mlflow/model-versions/delete-tag"): Gate.VERSION_TAG,
    ("DELETE", "/mlflow/model-versions/delete"): Gate.VERSION_REMOVE,
    ("POST", "/mlflow/model-versions/transition-stage"): Gate.TRANSITION,
    # Files. Through the proxy, through a run's page, and by addresses that lead past this server.
    ("PUT", "/mlflow-artifacts/artifacts/<path:artifact_path>"): Gate.ARTIFACT,
    ("DELETE", "/mlflow-artifacts/artifacts/<path:artifact_path>"): Gate.ARTIFACT,
    ("POST", "/mlflow-artifacts/mpu/create/<path:artifact_path>"): Gate.ARTIFACT,
    ("POST", "/mlflow-artifacts/mpu/complete/<path:artifact_path>"): Gate.ARTIFACT,
    ("POST", "/mlflow-artifacts/mpu/abort/<path:artifact_path>"): Gate.ARTIFACT,
    ("POST", "/mlflow/upload-artifact"): Gate.RUN,
    ("POST", "/mlflow/artifacts/presigned-download-url"): Gate.READS,
    ("POST", "/mlflow/artifacts/presigned-upload-url"): Gate.CLOSED,
    # Experiments, runs, logged models.
    ("POST", "/mlflow/experiments/create"): Gate.WORK,
    ("POST", "/mlflow/experiments/delete"): Gate.EXPERIMENT,
    ("POST", "/mlflow/experiments/restore"): Gate.EXPERIMENT,
    ("POST", "/mlflow/experiments/update"): Gate.EXPERIMENT,
    ("POST", "/mlflow/experiments/set-experiment-tag"): Gate.WORK,
    ("POST", "/mlflow/experiments/delete-experiment-tag"): Gate.WORK,
    ("POST", "/mlflow/experiments/search"): Gate.READS,
    ("POST", "/mlflow/experiments/search-datasets"): Gate.READS,
    ("POST", "/mlflow/runs/create"): Gate.WORK,
    ("POST", "/mlflow/runs/create-promptlab-run"): Gate.CLOSED,
    ("POST", "/mlflow/runs/search"): Gate.READS,
    **{
        ("POST", f"/mlflow/runs/{name}"): Gate.RUN
        for name in (
            *("delete", "restore", "update", "set-tag", "delete-tag", "outputs"),
            *("log-batch", "log-inputs", "log-metric", "log-model", "log-parameter"),
        )
    },
    ("POST", "/mlflow/logged-models"): Gate.WORK,
    ("POST", "/mlflow/logged-models/search"): Gate.READS,
    ("DELETE", "/mlflow/logged-models/<model_id>"): Gate.LOGGED_MODEL,
    ("PATCH", "/mlflow/logged-models/<model_id>"): Gate.LOGGED_MODEL,
    ("POST", "/mlflow/logged-models/<model_id>/params"): Gate.LOGGED_MODEL,
    ("PATCH", "/mlflow/logged-models/<model_id>/tags"): Gate.LOGGED_MODEL,
    ("DELETE", "/mlflow/logged-models/<model_id>/tags/<tag_key>"): Gate.LOGGED_MODEL,
    # People, and what tells others of the registry.
    ("PATCH", "/mlflow/users/update-password"): Gate.OWN,
    ("POST", "/mlflow/ui-telemetry"): Gate.OWN,
    ("POST", "/mlflow/users/create"): Gate.ADMIN,
    ("POST", "/mlflow/users/create-ui"): Gate.ADMIN,
    ("DELETE", "/mlflow/users/delete"): Gate.ADMIN,
    ("PATCH", "/mlflow/users/update-admin"): Gate.ADMIN,
    ("POST", "/mlflow/users/permissions/grant"): Gate.ADMIN,
    ("POST", "/mlflow/users/permissions/revoke"): Gate.ADMIN,
    ("POST", "/mlflow/roles/create"): Gate.ADMIN,
    ("POST", "/mlflow/roles/assign"): Gate.ADMIN,
    ("DELETE", "/mlflow/roles/unassign"): Gate.ADMIN,
    ("PATCH", "/mlflow/roles/update"): Gate.ADMIN,
    ("DELETE", "/mlflow/roles/delete"): Gate.ADMIN,
    ("POST", "/mlflow/roles/permissions/add"): Gate.ADMIN,
    ("PATCH", "/mlflow/roles/permissions/update"): Gate.ADMIN,
    ("DELETE", "/mlflow/roles/permissions/remove"): Gate.ADMIN,
    ("POST", "/mlflow/webhooks"): Gate.ADMIN,
    ("PATCH", "/mlflow/webhooks/<webhook_id>"): Gate.ADMIN,
    ("DELETE", "/mlflow/webhooks/<webhook_id>"): Gate.ADMIN,
    ("POST", "/mlflow/webhooks/<webhook_id>/test"): Gate.ADMIN,
    ("POST", "/mlflow/workspaces"): Gate.ADMIN,
    ("PATCH", "/mlflow/workspaces/<workspace_name>"): Gate.ADMIN,
    ("DELETE", "/mlflow/workspaces/<workspace_name>"): Gate.ADMIN,
    ("POST", "/tidegate/users"): Gate.ADMIN,
    ("POST", "/tidegate/roles"): Gate.ADMIN,
    ("DELETE", "/tidegate/roles"): Gate.ADMIN,
    # MLflow's GraphQL has one mutation, an echo.
    ("POST", "/graphql"): Gate.READS,
    **{
        ("POST", path): Gate.READS
        for path in (
            *("/mlflow/traces/search", "/mlflow/traces/metrics", "/mlflow/traces/batchGetInfos"),
            *("/mlflow/traces/calculate-filter-correlation", "/mlflow/datasets/search", "/mlflow/issues/search"),
        )
    },
    # Whole families that have nothing to do with versions; the longest prefix that fits counts.
    ("*", "/mlflow/traces"): Gate.WORK,
    ("*", "/mlflow/datasets"): Gate.WORK,
    ("*", "/mlflow/issues"): Gate.WORK,
    ("*", "/mlflow/label-schemas"): Gate.WORK,
    ("*", "/mlflow/review-queues"): Gate.WORK,
    ("*", "/mlflow/scorers"): Gate.WORK,
    ("*", "/mlflow/gateway"): Gate.ADMIN,
    ("*", "/mlflow/mcp-servers"): Gate.WORK,
    ("*", "/v1/traces"): Gate.WORK,
    # These run code, or call other machines, from this one.
    ("*", "/gateway"): Gate.CLOSED,
    ("*", "/jobs"): Gate.CLOSED,
    ("*", "/mlflow/jobs"): Gate.CLOSED,
    ("*", "/mlflow/assistant"): Gate.CLOSED,
    ("*", "/mlflow/demo"): Gate.CLOSED,
    ("*", "/mlflow/gateway-proxy"): Gate.CLOSED,
    ("*", "/mlflow/genai"): Gate.CLOSED,
    ("*", "/mlflow/issues/invoke"): Gate.CLOSED,
    ("*", "/mlflow/prompt-optimization"): Gate.CLOSED,
    ("*", "/mlflow/scorer"): Gate.CLOSED,
}
_FASTAPI = re.compile(r"\{([^}]+)\}")
_API = re.compile(r"^/(?:ajax-)?api/\d+\.\d+/?(?=\S)")


def bare(rule: str, prefix: str = "") -> str:
    """A route without the server's static prefix and the API's version, in Flask's spelling, as the table above has it.

    >>> bare("/ajax-api/2.0/mlflow/runs/create")
    '/mlflow/runs/create'
    """
    path = rule[len(prefix) :] if prefix and rule.startswith(f"{prefix}/") else rule
    return _FASTAPI.sub(_as_flask, _API.sub("/", path))


def _as_flask(parameter: re.Match[str]) -> str:
    name, _, kind = parameter[1].partition(":")
    return f"<{kind}:{name}>" if kind else f"<{name}>"


def gate_of(method: str, path: str) -> Gate | None:
    """Under which rule a bare route falls; None: it is known to nobody here."""
    exact = GATES.get((method, path))
    if exact is not None:
        return exact
    families = [family for verb, family in GATES if verb == "*" and (path == family or path.startswith(f"{family}/"))]
    return GATES["*", max(families, key=len)] if families else None
