"""Inside MLflow's server: its stores, who asks, and Tidegate's errors as MLflow answers them."""

import os
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import structlog
from flask import g, request
from mlflow.entities.model_registry import ModelVersionTag
from mlflow.entities.model_registry.model_version_stages import STAGE_DELETED_INTERNAL
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, PERMISSION_DENIED, RESOURCE_DOES_NOT_EXIST
from mlflow.server import handlers
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.model_registry.dbmodels.models import SqlModelVersion, SqlModelVersionTag
from sqlalchemy import or_

from privacy.errors import PrivacyError
from registry.errors import PromotionRefused, RegistryError, UnknownVersion
from registry.promotion import ADAPTER_FOLDER, Written
from registry.states import ARCHIVED, PRODUCTION, ModelVersion

log = structlog.get_logger()

# One page of MLflow's version search; its own maximum is 200,000.
_PAGE_ROWS = 10_000
PLAIN_ID = re.compile(r"[A-Za-z0-9_-]+")

View = Callable[..., Any]


class InProcess:
    """MLflow's stores, from inside its server: `promotion.Registry`."""

    def versions(self, model: str) -> list[ModelVersion]:
        """Every version of a model, by columns: MLflow's own search builds an object a tag, which takes longer."""
        version, tag = SqlModelVersion, SqlModelVersionTag
        columns = (version.version, version.current_stage, version.creation_time, version.run_id, version.description)
        with store().ManagedSessionMaker() as session:
            here = store()._get_active_workspace()  # noqa: SLF001 - as MLflow's own queries
            rows = session.query(*columns).filter(version.workspace == here, version.name == model).all()
            named = (
                session.query(tag.version, tag.key, tag.value).filter(tag.workspace == here, tag.name == model).all()
            )
        tags: dict[int, dict[str, str]] = {}
        for number, key, value in named:
            tags.setdefault(number, {})[key] = value
        return [
            ModelVersion(number, stage, tags.get(number, {}), _time(created_ms), run_id or "", (), description or "")
            for number, stage, created_ms, run_id, description in rows
            if stage != STAGE_DELETED_INTERNAL
        ]

    def write(self, model: str, rows: Sequence[Written]) -> None:
        """Stages and tags of several versions, all in one transaction. `promotion.AtOnce`."""
        version, now_ms = SqlModelVersion, int(time.time() * 1000)
        with store().ManagedSessionMaker(read_only=False) as session:
            here = store()._get_active_workspace()  # noqa: SLF001
            concerned = or_(version.version.in_([row.version for row in rows]), version.current_stage == PRODUCTION)
            of_model = session.query(version).filter(version.workspace == here, version.name == model, concerned)
            known = {row.version: row for row in of_model if row.current_stage != STAGE_DELETED_INTERNAL}
            for row in rows:
                if row.version not in known:
                    raise UnknownVersion(f"{model} version {row.version}: there is none; it was deleted meanwhile")
                found = known[row.version]
                if row.stage is not None:
                    if row.stage == PRODUCTION:
                        for other in known.values():
                            if other.current_stage == PRODUCTION and other.version != row.version:
                                other.current_stage, other.last_updated_time = ARCHIVED, now_ms
                    found.current_stage, found.last_updated_time = row.stage, now_ms
                    found.registered_model.last_updated_time = now_ms
                for key, value in row.tags.items():
                    tag = SqlModelVersionTag(workspace=here, name=model, version=row.version, key=key, value=value)
                    session.merge(tag)

    def move(self, model: str, version: int, stage: str, *, archive_existing: bool = False) -> None:
        """Set a stage, in one transaction with the archiving of those that stand there."""
        store().transition_model_version_stage(model, str(version), stage, archive_existing)

    def set_tag(self, model: str, version: int, key: str, value: str) -> None:
        """Set a tag of a version."""
        tag = ModelVersionTag(key, value)
        store().set_model_version_tag(model, str(version), tag)

    def fetch_adapter(self, model: str, version: int, dest: Path) -> Path:
        """Where the adapter's files lie, or a copy in `dest`, found the way MLflow's own download handler does."""
        root = store().get_model_version_download_uri(model, str(version))
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

    def holders(self, *, run_id: str = "", logged_model: str = "", sha256: str = "") -> list[tuple[str, ModelVersion]]:
        """Versions of any model by their run, by the logged model they point at, or by the adapter they name."""
        queries = []
        if PLAIN_ID.fullmatch(run_id):
            queries += [f"run_id='{run_id}'", f"source_path LIKE '%{run_id}%'"]
        if PLAIN_ID.fullmatch(logged_model):
            queries.append(f"source_path LIKE '%{logged_model}%'")
        if PLAIN_ID.fullmatch(sha256):
            queries.append(f"tags.`tidegate.adapter_sha256`='{sha256}'")
        found = {}
        for query in queries:
            for entity in store().search_model_versions(query, max_results=_PAGE_ROWS):
                found[entity.name, entity.version] = (str(entity.name), _version(entity))
        return list(found.values())

    def is_prompt(self, model: str) -> bool:
        """Whether a name is that of a prompt."""
        try:
            return bool(store().get_registered_model(model)._is_prompt())  # noqa: SLF001 - as MLflow's own
        except MlflowException:
            return False


def translated(view: View) -> View:
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


def store() -> Any:
    """MLflow's own model registry store, as its handlers get it."""
    return handlers._get_model_registry_store()  # noqa: SLF001 - there is no public way


def who() -> str:
    """The login; without one what the request claims, else its address."""
    authenticated = getattr(g, "mlflow_authenticated_user", None)
    if authenticated:
        return str(authenticated)
    return unquote(request.headers.get("X-Tidegate-User", "")).strip() or f"local:{request.remote_addr}"


def why() -> str:
    """The reason a request gives."""
    return unquote(request.headers.get("X-Tidegate-Why", "")).strip() or str(body().get("comment") or "").strip()


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _version(entity: Any) -> ModelVersion:
    return ModelVersion(
        version=int(entity.version),
        stage=entity.current_stage,
        tags=dict(entity.tags),
        created_at=_time(entity.creation_timestamp),
        run_id=entity.run_id or "",
        aliases=tuple(entity.aliases),
        description=entity.description or "",
    )


def body() -> dict[str, Any]:
    """The request's JSON object; empty when there is none."""
    found = request.get_json(force=True, silent=True)
    return found if isinstance(found, dict) else {}


def prefix() -> str:
    """What MLflow's paths begin with on this server (`--static-prefix`)."""
    return os.environ.get(handlers.STATIC_PREFIX_ENV_VAR, "").rstrip("/")
