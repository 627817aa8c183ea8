"""The model registry as the rest of Tidegate sees it: versions with their evidence, stages, adapters.

Everything but registering speaks MLflow's REST API by itself: serving polls `versions` once a second, and
`import mlflow` costs seconds. Registering uses MLflow's client, which knows every artifact store. Whoever is not
given a login uses MLflow's own: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import requests

from learner.adapter import BOTTLENECK_FILE, CONFIG_FILE, WEIGHTS_FILE, adapter_files
from registry.approvals import Approval, Approvals
from registry.canary import Terms
from registry.errors import PromotionRefused, RegistryError, RegistryUnavailable, UnknownVersion
from registry.promotion import ADAPTER_FOLDER, STEPPED_BACK, Promotions, Trust
from registry.states import ARCHIVED, PRODUCTION, STAGING, ModelVersion, State

# A registry that does not answer within this is down: serving goes on with what it has, a command says so.
CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 10.0
# Copying and hashing an adapter behind a transition takes longer than reading rows.
TRANSITION_TIMEOUT_S = 60.0
_API = "/api/2.0/mlflow"
# MLflow's own maximum is 200,000; one request for any stream's versions.
_PAGE_ROWS = 10_000
# Column width of MLflow's model_versions.description: PostgreSQL refuses more.
DESCRIPTION_CHARS_MAX = 5000
_EVIDENCE = "evidence"
# All that MLflow's own permissions say.
_PLAIN_NO = "Permission denied"
# The same of datasets.digest.
_DIGEST_CHARS_MAX = 36


@dataclass(frozen=True)
class Dataset:
    """What a run read, as MLflow lists it among the run's inputs.

    Attributes:
        context: what it was read for: training, gates.
        revision: whole; MLflow's digest is its beginning.
        kind: of its source: one word.
        source: where it is to be found; the same for every run that read this revision, since MLflow keeps one.
        tags: more about how this run read it.
    """

    name: str
    context: str
    revision: str
    kind: str
    source: Mapping[str, str]
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """What a round hands to the registry.

    Attributes:
        model: registered model; made when it does not exist.
        adapter_dir: folder with the adapter's files.
        tags: the version's tags, set in the same request that makes it.
        description_md: markdown; an image naming one of `artifacts` is pointed at it, a link at its page in MLflow.
        artifacts: evidence by file name, kept in the version's run.
        metrics: numbers of the run. `params`: settings of the run.
        datasets: inputs of the run.
    """

    model: str
    round_id: str
    attempt: int
    adapter_dir: Path
    tags: Mapping[str, str]
    description_md: str
    artifacts: Mapping[str, bytes] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    datasets: tuple[Dataset, ...] = ()


class MlflowStore:
    """One MLflow server.

    Args:
        tracking_uri: `http://…` or `https://…`; the guard may run there or not (a managed MLflow).
        login: user and password; None: what MLflow's own variables say, if anything.
    """

    def __init__(self, tracking_uri: str, login: tuple[str, str] | None = None) -> None:
        self._login = login
        self._uri = tracking_uri.rstrip("/")
        self._session = requests.Session()
        self._session.headers["Accept"] = "application/json"
        # Loopback must not go through a proxy that the environment names for the outside.
        self._session.trust_env = urlsplit(self._uri).hostname not in {"127.0.0.1", "localhost", "::1"}
        user, token = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_TOKEN")
        if login is not None:
            self._session.auth = login
        elif user:
            self._session.auth = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
        elif token:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def close(self) -> None:
        """Close its connections."""
        self._session.close()

    def versions(self, model: str, *, aliases: bool = True) -> list[ModelVersion]:
        """Every version of a model, newest first; empty when the model does not exist.

        Args:
            model: registered model.
            aliases: MLflow's search leaves them out, so they cost a second request; polling does without.
        """
        query = {"filter": f"name='{model}'", "max_results": _PAGE_ROWS, "order_by": "version_number DESC"}
        found = self._call("GET", f"{_API}/model-versions/search", params=query).get("model_versions", ())
        names: dict[str, list[str]] = {}
        if aliases and found:
            known = self._call("GET", f"{_API}/registered-models/get", params={"name": model})
            for entry in known["registered_model"].get("aliases", ()):
                names.setdefault(entry["version"], []).append(entry["alias"])
        return [_version(entry, names.get(entry["version"], ())) for entry in found]

    def register(self, candidate: Candidate) -> int:
        """Make a version with its adapter and evidence; a round and attempt that has one answers that.

        Returns:
            its number. Its stage is None until `to_staging` or `archive`.

        Raises:
            RegistryUnavailable: MLflow does not answer.
            RegistryError: it refuses, or the adapter's files are missing.
        """
        for version in self.versions(candidate.model):
            same_round = version.tag("round_id") == candidate.round_id
            if same_round and version.tag("attempt") == str(candidate.attempt):
                return version.version
        with _mlflow_errors(self._uri):
            return _register(self._uri, candidate, self._login)

    def to_staging(self, model: str, version: int) -> None:
        """Show a passed candidate where a person looks for it.

        With the guard, one that was approved or rejected meanwhile stays where it is.
        """
        self._transition(model, version, STAGING, {"tidegate_state": State.CANDIDATE})

    def archive(self, model: str, version: int, *, state: str) -> None:
        """Put a version away as failed, undecided, stale or superseded. A person's no is `reject`.

        With the guard, one that was approved or rejected meanwhile stays where it is.
        """
        if not self.guarded():
            self.set_tag(model, version, "tidegate.state", state)
        self._transition(model, version, ARCHIVED, {"tidegate_state": state})

    def promote(
        self,
        model: str,
        version: int,
        *,
        why: str,
        who: str,
        approvals: Approvals | None = None,
        trust: Trust | None = None,
    ) -> Approval:
        """Ask for a version to go live, or back to live; answers the signed approval.

        With the guard in MLflow, it decides and signs. Without (a managed MLflow), the same checks run here
        and are
        signed into `approvals`, which then must be given, with `trust`.

        Raises:
            PromotionRefused: with the sentence that says why and what to do.
            UnknownVersion, RegistryUnavailable, RegistryError.
        """
        if not self.guarded():
            return self._desk(approvals, trust).promote(model, version, who=who, why=why)
        options = {"archive_existing_versions": True}
        return self._approval(model, self._transition(model, version, PRODUCTION, options, who=who, why=why))

    def reject(
        self,
        model: str,
        version: int,
        *,
        why: str,
        who: str,
        approvals: Approvals | None = None,
        trust: Trust | None = None,
    ) -> Approval:
        """Say no to a waiting candidate, for good. The same no again answers the row it has.

        Raises:
            PromotionRefused: it is no waiting candidate.
            UnknownVersion, RegistryUnavailable, RegistryError.
        """
        if not self.guarded():
            return self._desk(approvals, trust).reject(model, version, to_stage=ARCHIVED, who=who, why=why)
        told = {"tidegate_state": State.REJECTED}
        return self._approval(model, self._transition(model, version, ARCHIVED, told, who=who, why=why))

    def canary(
        self,
        model: str,
        version: int,
        terms: Terms,
        *,
        why: str,
        who: str,
        approvals: Approvals | None = None,
        trust: Trust | None = None,
    ) -> Approval:
        """Let a waiting candidate answer a share of requests; the checks are those of `promote`.

        Raises:
            PromotionRefused: with the sentence that says why and what to do.
            UnknownVersion, RegistryUnavailable, RegistryError.
        """
        if not self.guarded():
            return self._desk(approvals, trust).canary(model, version, terms, who=who, why=why)
        told = {"tidegate_canary": terms.as_json()}
        return self._approval(model, self._transition(model, version, STAGING, told, who=who, why=why))

    def end_canary(
        self,
        model: str,
        version: int,
        *,
        why: str,
        who: str,
        approvals: Approvals | None = None,
        trust: Trust | None = None,
    ) -> Approval:
        """Let what is live answer everything again.

        Raises:
            PromotionRefused: the version is no canary.
            UnknownVersion, RegistryUnavailable, RegistryError.
        """
        if not self.guarded():
            return self._desk(approvals, trust).end_canary(model, version, who=who, why=why)
        told = {"tidegate_canary": {"share": 0}}
        return self._approval(model, self._transition(model, version, STAGING, told, who=who, why=why))

    def step_back(self, model: str, version: int, seq: int, *, why: str, who: str) -> None:
        """Tell that serving ended the canary of decision `seq` by itself.

        The guard signs it into the history. Without a guard nobody here holds the key: a tag says so until the next
        decision signs it.

        Raises:
            PromotionRefused: that canary runs no more; then there is nothing to tell.
            RegistryUnavailable, RegistryError: it is to be told again.
        """
        if self.guarded():
            told = {"share": 0, "seq": seq, "automatic": True}
            self._transition(model, version, STAGING, {"tidegate_canary": told}, who=who, why=why)
        else:
            self.set_tag(model, version, f"tidegate.{STEPPED_BACK}", json.dumps({"seq": seq, "why": why}))

    def guarded(self) -> bool:
        """Whether the guard runs in this MLflow."""
        response = self._send("GET", "/tidegate/health")
        if response.status_code == requests.codes.ok:
            return True
        if response.status_code == requests.codes.not_found:
            return False
        raise _error(response, self._uri)

    def set_alias(self, model: str, alias: str, version: int) -> None:
        """Point an alias at a version; serving sets `live` to what really answers."""
        self._call(
            "POST",
            f"{_API}/registered-models/alias",
            json={"name": model, "alias": alias, "version": str(version)},
        )

    def set_tag(self, model: str, version: int, key: str, value: str) -> None:
        """Set a tag of a version."""
        self._call(
            "POST",
            f"{_API}/model-versions/set-tag",
            json={"name": model, "version": str(version), "key": key, "value": value},
        )

    def move(self, model: str, version: int, stage: str, *, archive_existing: bool = False) -> None:
        """Set a stage as MLflow does it; a guard still has its say."""
        self._transition(model, version, stage, {"archive_existing_versions": archive_existing})

    def fetch_adapter(self, model: str, version: int, dest: Path) -> Path:
        """Download the adapter's files into `dest`; the caller checks the sha256.

        Raises:
            RegistryError: a file is missing there. RegistryUnavailable: no answer. Then `dest` is as it was.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._download(model, version, f"{ADAPTER_FOLDER}/{CONFIG_FILE}", Path(folder) / CONFIG_FILE)
            names = adapter_files(Path(folder))
            for name in names:
                if name != CONFIG_FILE:
                    self._download(model, version, f"{ADAPTER_FOLDER}/{name}", Path(folder) / name)
            dest.mkdir(parents=True, exist_ok=True)
            for name in names:
                shutil.copyfile(Path(folder) / name, dest / name)
        return dest

    def remove_weights(self, model: str, version: int) -> None:
        """Remove the weights of a version from the artifact store; its config and evidence stay. May be repeated.

        Raises:
            RegistryError: the store does not let go of them. RegistryUnavailable: no answer.
        """
        query = {"name": model, "version": str(version)}
        root = str(self._call("GET", f"{_API}/model-versions/get-download-uri", params=query)["artifact_uri"])
        for name in (WEIGHTS_FILE, BOTTLENECK_FILE):
            path = f"{ADAPTER_FOLDER}/{name}"
            if root.startswith("mlflow-artifacts:"):
                # Through the server, which alone may know the credentials of the store behind it.
                base = quote(urlsplit(root).path.strip("/"))
                response = self._send("DELETE", f"/api/2.0/mlflow-artifacts/artifacts/{base}/{path}")
                if response.status_code not in {requests.codes.ok, requests.codes.not_found}:
                    raise _error(response, self._uri)
            else:
                _remove_direct(self._uri, root, path)

    def users(self) -> list[dict[str, Any]]:
        """All users by name: name, admin, service, and roles by model. Only admins are told.

        Raises:
            PromotionRefused: the login is no admin's. RegistryError: this MLflow asks for no logins.
        """
        return list(self._user_call("GET", "users")["users"])

    def add_user(self, name: str, password: str) -> bool:
        """Make a user without any role. False: there is one of that name, who stays as they are. Raises as `users`."""
        return bool(self._user_call("POST", "users", json={"name": name, "password": password})["made"])

    def grant(self, name: str, role: str, model: str) -> bool:
        """Give a user a role on a model, or `admin` on all. False: they have it. Raises as `users`."""
        given = {"name": name, "role": role, "model": model}
        return bool(self._user_call("POST", "roles", json=given)["changed"])

    def revoke(self, name: str, role: str, model: str) -> bool:
        """Take it. False: they have it not. Raises as `users`."""
        given = {"name": name, "role": role, "model": model}
        return bool(self._user_call("DELETE", "roles", json=given)["changed"])

    def _user_call(self, method: str, what: str, **options: Any) -> dict[str, Any]:
        response = self._send(method, f"/tidegate/{what}", **options)
        if response.status_code in {requests.codes.not_found, requests.codes.method_not_allowed} and not _coded(
            response
        ):
            raise RegistryError(
                f"mlflow={self._uri}: asks for no logins, so it has no users; set service.mlflow.auth: basic"
            )
        if response.status_code != requests.codes.ok:
            raise _error(response, self._uri)
        return dict(response.json())

    def _desk(self, approvals: Approvals | None, trust: Trust | None) -> Promotions:
        if approvals is None or trust is None:
            raise RegistryError(
                f"mlflow={self._uri}: no guard runs there, so the decision must be signed here: "
                f"use `tidegate approve` in the workspace that holds the keys"
            )
        return Promotions(self, approvals, trust)

    def _approval(self, model: str, seq: int) -> Approval:
        """The decision a transition was answered with: not the newest, which may be somebody else's."""
        rows = self._call("GET", "/tidegate/approvals", params={"model": model})["approvals"]
        return next(dict(row) for row in rows if row["seq"] == seq)

    def _transition(
        self, model: str, version: int, stage: str, more: Mapping[str, Any], *, who: str = "", why: str = ""
    ) -> int:
        """The `seq` of the decision it was; 0 for none, and where no guard runs."""
        headers = {"X-Tidegate-User": quote(who), "X-Tidegate-Why": quote(why)}
        response = self._send(
            "POST",
            f"{_API}/model-versions/transition-stage",
            json={"name": model, "version": str(version), "stage": stage, **more},
            headers={name: value for name, value in headers.items() if value},
            timeout=(CONNECT_TIMEOUT_S, TRANSITION_TIMEOUT_S),
        )
        if response.status_code != requests.codes.ok:
            raise _error(response, self._uri)
        return int(response.headers.get("X-Tidegate-Approval", 0))

    def _download(self, model: str, version: int, path: str, dest: Path) -> None:
        query = {"name": model, "version": str(version), "path": path}
        with self._send("GET", "/model-versions/get-artifact", params=query, stream=True) as response:
            if response.status_code != requests.codes.ok:
                raise _error(response, self._uri)
            try:
                with dest.open("wb") as out:
                    for chunk in response.iter_content(1 << 20):
                        out.write(chunk)
            except requests.RequestException as error:
                raise _unavailable(self._uri, error) from error

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        response = self._send(method, path, **options)
        if response.status_code != requests.codes.ok:
            raise _error(response, self._uri)
        try:
            return dict(response.json())
        except (ValueError, TypeError) as error:
            raise RegistryUnavailable(
                f"mlflow={self._uri}: {path} did not answer JSON: no MLflow server; see service.mlflow.uri"
            ) from error

    def _send(self, method: str, path: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", (CONNECT_TIMEOUT_S, READ_TIMEOUT_S))
        try:
            return self._session.request(method, self._uri + path, **options)
        except requests.RequestException as error:
            raise _unavailable(self._uri, error) from error


def _register(uri: str, candidate: Candidate, login: tuple[str, str] | None) -> int:
    """Run with evidence → logged model with the adapter → version with tags and description, in that order.

    The version comes last and whole: what is half done when this dies is an orphan nobody sees.
    """
    names = adapter_files(candidate.adapter_dir)
    for name in names:
        if not (candidate.adapter_dir / name).is_file():
            raise RegistryError(f"adapter {candidate.adapter_dir}: {name} is missing; nothing was registered")
    with _fast_failures(login):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        experiment = client.get_experiment_by_name(candidate.model)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(candidate.model)
        run_name = f"{candidate.round_id}.{candidate.attempt}"
        run_id = client.create_run(experiment_id, run_name=run_name).info.run_id
        at_ms = int(datetime.now(UTC).timestamp() * 1000)
        client.log_batch(
            run_id,
            metrics=[Metric(key, float(value), at_ms, 0) for key, value in candidate.metrics.items()],
            params=[Param(key, str(value)) for key, value in candidate.params.items()],
        )
        client.log_inputs(run_id, [_input(dataset) for dataset in candidate.datasets])
        with tempfile.TemporaryDirectory() as folder:
            for name, content in candidate.artifacts.items():
                (Path(folder) / name).write_bytes(content)
            client.log_artifacts(run_id, folder, _EVIDENCE)
        logged = client.create_logged_model(experiment_id, name="adapter", source_run_id=run_id)
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                shutil.copyfile(candidate.adapter_dir / name, Path(folder) / name)
            client.log_model_artifacts(logged.model_id, folder, ADAPTER_FOLDER)
        client.finalize_logged_model(logged.model_id, "READY")
        client.set_terminated(run_id)
        _ensure_model(client, candidate.model)
        made = client.create_model_version(
            candidate.model,
            f"models:/{logged.model_id}",
            run_id=run_id,
            tags=dict(candidate.tags),
            description=_describe(candidate, experiment_id, run_id),
            model_id=logged.model_id,
            await_creation_for=0,
        )
        return int(made.version)


def _remove_direct(uri: str, root: str, path: str) -> None:
    """Remove a file from an artifact store that clients reach without the server."""
    with _fast_failures():
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        try:
            get_artifact_repository(root).delete_artifacts(path)
        except Exception as error:  # every store has errors of its own
            raise RegistryError(f"mlflow={uri}: {root}/{path} was not removed ({error}); check its rights") from error


def _ensure_model(client: Any, model: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(model)


def _input(dataset: Dataset) -> Any:
    """A dataset as MLflow's client takes it. The source is the same for every run: (name, digest) is its key."""
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput, InputTag

    entity = Entity(
        name=dataset.name,
        digest=dataset.revision[:_DIGEST_CHARS_MAX],
        source_type=dataset.kind,
        source=json.dumps(dict(dataset.source), sort_keys=True),
        profile=json.dumps({"revision": dataset.revision}),
    )
    tags = {"mlflow.data.context": dataset.context, **{f"tidegate.{key}": told for key, told in dataset.tags.items()}}
    return DatasetInput(entity, [InputTag(key, told) for key, told in tags.items()])


def _describe(candidate: Candidate, experiment_id: str, run_id: str) -> str:
    """The description with artifacts by name turned into what MLflow's page can load, or open.

    A browser gets artifacts as downloads (MLflow's guard against scripts in them), so a link leads to the run's page,
    which shows them.
    """

    def target(match: re.Match[str]) -> str:
        image, said, name = match.groups()
        if name not in candidate.artifacts:
            return match.group(0)
        path = f"{_EVIDENCE}/{quote(name)}"
        if image:
            return f"![{said}](get-artifact?path={path}&run_uuid={run_id})"
        return f"[{said}](#/experiments/{experiment_id}/runs/{run_id}/artifacts/{path})"

    text = re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", target, candidate.description_md)
    if len(text) <= DESCRIPTION_CHARS_MAX:
        return text
    note = f"\n\n(Cut here; the whole report is in the run's artifacts, folder `{_EVIDENCE}`.)"
    whole_lines = text[: DESCRIPTION_CHARS_MAX - len(note)].rsplit("\n", 1)[0]
    return whole_lines + note


@contextmanager
def _fast_failures(login: tuple[str, str] | None = None) -> Iterator[None]:
    """MLflow's client retries for minutes by default; here a registry that is down is said to be down.

    Its login it takes from these variables and from nowhere else.
    """
    user, password = login or ("", "")
    given = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password} if login else {}
    wanted = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    before = {name: os.environ.get(name) for name in (*wanted, *given)}
    os.environ.update({name: value for name, value in wanted.items() if before[name] is None} | given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _mlflow_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except requests.RequestException as error:
        raise _unavailable(uri, error) from error
    except RegistryError:
        raise
    except Exception as error:
        from mlflow.exceptions import MlflowException, RestException

        if isinstance(error, RestException):
            raise RegistryError(f"mlflow={uri}: refused to register: {error.message}") from error
        if isinstance(error, MlflowException):
            raise RegistryUnavailable(f"mlflow={uri}: not registered: {error.message}") from error
        raise


def _version(entry: Mapping[str, Any], aliases: Iterable[str]) -> ModelVersion:
    created = datetime.fromtimestamp(int(entry["creation_timestamp"]) / 1000, UTC)
    return ModelVersion(
        version=int(entry["version"]),
        stage=entry.get("current_stage", "None"),
        tags={tag["key"]: tag.get("value", "") for tag in entry.get("tags", ())},
        created_at=created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        run_id=entry.get("run_id", ""),
        aliases=tuple(aliases),
        description=entry.get("description", ""),
    )


def _coded(response: requests.Response) -> bool:
    """Whether an answer is MLflow's or the guard's own, rather than that of a route that is not there."""
    try:
        return "error_code" in response.json()
    except (ValueError, TypeError):
        return False


def _unavailable(uri: str, error: Exception) -> RegistryUnavailable:
    kind = "no answer in time" if isinstance(error, requests.Timeout) else "cannot be reached"
    return RegistryUnavailable(
        f"mlflow={uri}: {kind}; start it by `tidegate up` or `tidegate mlflow`, or see service.mlflow.uri"
    )


def _error(response: requests.Response, uri: str) -> RegistryError:
    """MLflow's JSON error, or plain text of its middleware, as one of ours."""
    try:
        body = response.json()
        code, message = str(body.get("error_code")), str(body.get("message"))
    except (ValueError, AttributeError):
        code, message = "", " ".join(response.text[:300].split())
    if code == "RESOURCE_DOES_NOT_EXIST":
        return UnknownVersion(message)
    if response.status_code == requests.codes.unauthorized:
        return RegistryError(
            f"mlflow={uri}: wants a login, or another one: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; "
            f"an admin makes users by `tidegate users add NAME`"
        )
    if response.status_code == requests.codes.forbidden:
        if message == _PLAIN_NO:
            message = f"mlflow={uri}: this login may not do that; an admin gives roles by `tidegate users grant`"
        return PromotionRefused(message)
    if response.status_code >= requests.codes.internal_server_error:
        return RegistryUnavailable(f"mlflow={uri}: failed with {response.status_code}: {message}; see its log")
    return RegistryError(f"mlflow={uri}: {response.status_code} {code}: {message}")
