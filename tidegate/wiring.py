"""The composition root: settings and workspace in, the parts of the other packages out, by plain arguments.

Nothing else turns settings into objects. Heavy libraries are imported by the part that is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from tidegate.config import Resolved, Settings, StreamSettings, load, read_secret
from tidegate.errors import ConfigError, UnknownName
from tidegate.workspace import CHECKOUT, Workspace, find

if TYPE_CHECKING:
    from ingest.broker import KafkaSettings
    from ingest.ingester import Ingester
    from ingest.record import RecordLimits
    from ingest.repository import DataRepository
    from learner.base import Base
    from privacy.ledger import Ledger
    from privacy.policy import Policy
    from privacy.signing import SigningKey, TrustedKeys
    from registry.approvals import Approvals
    from registry.mlflow_store import MlflowStore
    from registry.promotion import Trust
    from registry.server import Logins

SPLIT_KEY_BYTES = 32


@dataclass(frozen=True)
class Service:
    """One workspace with its settings; each property builds a part when it is first asked for."""

    workspace: Workspace
    resolved: Resolved
    # Which login of the service's own this process has in the registry.
    acting: Literal["learner", "server"] = "learner"

    @property
    def settings(self) -> Settings:
        """The checked settings."""
        return self.resolved.settings

    def stream(self, name: str) -> StreamSettings:
        """Settings of one stream.

        Raises:
            UnknownName: there is no such stream.
        """
        try:
            return self.settings.streams[name]
        except KeyError:
            known = ", ".join(self.settings.streams)
            raise UnknownName(f"stream={name}: not in params.yaml; the streams are: {known}") from None

    def model(self, stream: str) -> str:
        """Name of the registered model of a stream."""
        return self.stream(stream).registry.model or stream

    @property
    def keys_dir(self) -> Path:
        """Folder of the keys."""
        return self.workspace.keys(self.settings.service.keys.directory)

    def signer(self, purpose: str) -> SigningKey:
        """The signing key for `receipts`, `verdicts` or `approvals`; made on first use."""
        from privacy.signing import SigningKey

        return SigningKey.load_or_create(self.keys_dir / f"{purpose}.pem")

    def trusted(self, purpose: str) -> TrustedKeys:
        """Public keys whose signatures count for `receipts`, `verdicts` or `approvals`."""
        from privacy.signing import TrustedKeys

        return TrustedKeys.from_dir(self.keys_dir, purpose)

    @property
    def trust(self) -> Trust:
        """What a promotion is checked against where MLflow runs no guard."""
        from registry.promotion import Trust

        return Trust.from_dir(self.keys_dir, self.open_models())

    def is_open(self, stream: str) -> bool:
        """Whether nothing was ever promised to anybody in a stream: privacy is off, and no block was sealed with it on.

        Only such a stream may promote and serve what was trained without privacy.
        """
        if self.stream(stream).privacy.enabled:
            return False
        return not any(getattr(m.policy, "enabled", True) for m in self.repository().manifests(stream))

    def open_models(self) -> list[str]:
        """Registered models of the streams that are open."""
        return [self.model(stream) for stream in self.settings.streams if self.is_open(stream)]

    def secret_bytes(self, name: str) -> bytes:
        """A key of 32 random bytes in the keys folder (mode 0600), made on first use."""
        file = self.keys_dir / f"{name}.key"
        try:
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            value = read_secret(file.name, self.keys_dir)
            return bytes.fromhex(value or "")
        with os.fdopen(handle, "w") as out:
            out.write(os.urandom(SPLIT_KEY_BYTES).hex())
            out.flush()
            os.fsync(out.fileno())
        return bytes.fromhex(file.read_text())

    @cached_property
    def ledger(self) -> Ledger:
        """The privacy ledger."""
        from privacy.ledger import Ledger

        return Ledger(self.ledger_url)

    @property
    def ledger_url(self) -> str:
        """SQLAlchemy URL of the ledger; a secret URL may come from TIDEGATE_LEDGER_URL or a key file."""
        url = self.settings.service.ledger.url
        if url != "embedded":
            return url
        return read_secret("ledger_url", self.keys_dir) or self.workspace.sqlite("ledger.db")

    @property
    def approvals_url(self) -> str:
        """SQLAlchemy URL of the signed history of approvals: beside the ledger, else beside MLflow's tables.

        A database server that either of them has is where several machines see one history, and one lock.
        """
        for url in (self.ledger_url, self.mlflow_backend_url):
            if not url.startswith("sqlite"):
                return url
        return self.workspace.sqlite("approvals.db")

    @property
    def mlflow_backend_url(self) -> str:
        """SQLAlchemy URL of the embedded MLflow's tables; a secret one from TIDEGATE_MLFLOW_BACKEND_URL or a key file.

        Raises:
            ConfigError: it is the ledger's database.
        """
        from sqlalchemy import make_url
        from sqlalchemy.exc import ArgumentError

        url = self.settings.service.mlflow.backend
        if url == "embedded":
            own = self.workspace.sqlite("mlflow/mlflow.db")
            url = read_secret("mlflow_backend_url", self.keys_dir) or own
        try:
            ours, ledgers = ((u.host, u.port, u.database, u.query) for u in map(make_url, (url, self.ledger_url)))
        except ArgumentError:
            raise ConfigError(
                "service.mlflow.backend: must be `embedded` or an SQLAlchemy URL, such as "
                "postgresql://user@host/mlflow; a URL with a password belongs into TIDEGATE_MLFLOW_BACKEND_URL"
            ) from None
        if ours == ledgers:
            raise ConfigError(
                "service.mlflow.backend: must not be the ledger's database, since each keeps the number of its schema "
                "under the same name; make a second database on that server"
            )
        return url

    def approvals(self, *, signing: bool = False) -> Approvals:
        """The signed history of approvals, for reading, or for signing where MLflow has no guard."""
        from privacy.signing import KeyFile
        from registry.approvals import Approvals

        # The key itself is asked for when something is signed: with a guard it may be kept on another machine.
        return Approvals(self.approvals_url, KeyFile(self.keys_dir / "approvals.pem") if signing else None)

    def repository(self) -> DataRepository:
        """The data repository."""
        from ingest.repository import DataRepository

        return DataRepository(self.workspace.data)

    @property
    def data_remote(self) -> str:
        """URL or folder DVC pushes to."""
        remote = self.settings.service.data.remote
        return str(self.workspace.remote) if remote == "embedded" else remote

    @property
    def bootstrap(self) -> str:
        """Kafka's address."""
        broker = self.settings.service.broker
        return f"127.0.0.1:{broker.port}" if broker.bootstrap == "embedded" else broker.bootstrap

    def kafka(self) -> KafkaSettings:
        """Connection settings of Kafka; the SASL password is a secret (TIDEGATE_SASL_PASSWORD)."""
        from ingest.broker import KafkaSettings

        broker = self.settings.service.broker
        return KafkaSettings(
            bootstrap=self.bootstrap,
            security_protocol=broker.security_protocol,
            sasl_mechanism=broker.sasl_mechanism,
            sasl_username=broker.sasl_username,
            sasl_password=read_secret("sasl_password", self.keys_dir),
            ssl_cafile=broker.ssl_cafile,
            ssl_certfile=broker.ssl_certfile,
            ssl_keyfile=broker.ssl_keyfile,
        )

    @property
    def mlflow_uri(self) -> str:
        """MLflow's address."""
        mlflow = self.settings.service.mlflow
        host = "127.0.0.1" if mlflow.host in {"0.0.0.0", "::"} else mlflow.host  # noqa: S104 - compared, not bound
        return f"http://{host}:{mlflow.port}" if mlflow.uri == "embedded" else mlflow.uri

    @property
    def api_uri(self) -> str:
        """The serving API's address, as a client on this machine reaches it."""
        api = self.settings.service.api
        host = "127.0.0.1" if api.host in {"0.0.0.0", "::"} else api.host  # noqa: S104 - compared, not bound
        return f"http://{host}:{api.port}"

    @property
    def api_keys(self) -> Path:
        """File of the API keys' hashes."""
        from serving.access import KEYS_FILE

        return self.keys_dir / KEYS_FILE

    @property
    def api_keys_required(self) -> bool:
        """Whether the API asks for keys: where other machines reach it always, on loopback when the settings say so."""
        from serving.access import is_loopback

        api = self.settings.service.api
        hosts = [api.host, *(urlsplit(url).hostname or "" for url in self.settings.service.replicas)]
        return api.require_keys or not all(map(is_loopback, hosts))

    @property
    def local_api_key(self) -> str:
        """The key by which this workspace's own commands reach its server."""
        from serving.access import local_key

        return local_key(self.secret_bytes("answers"))

    @property
    def api_headers(self) -> dict[str, str]:
        """What a request of this workspace's own commands to its server carries."""
        return {"Authorization": f"Bearer {self.local_api_key}"} if self.api_keys_required else {}

    @property
    def vllm_key(self) -> str:
        """The API key of vLLM, which whoever may load adapters needs: TIDEGATE_VLLM_KEY, a key file, or made here."""
        return read_secret("vllm_key", self.keys_dir) or self.secret_bytes("vllm").hex()

    @property
    def asks_logins(self) -> bool:
        """Whether the registry does."""
        return self.settings.service.mlflow.auth == "basic"

    @property
    def solo_models(self) -> list[str]:
        """Registered models whose versions may be approved by whom registered them."""
        return [
            self.model(name) for name, stream in self.settings.streams.items() if stream.registry.four_eyes is False
        ]

    def mlflow_logins(self) -> Logins | None:
        """Logins of the embedded MLflow, by the passwords in the keys folder; None: it asks for none."""
        from registry.server import Logins
        from tidegate import identities

        admin = identities.of_service(self.keys_dir, identities.ADMIN)
        if not self.asks_logins or admin is None:
            return None
        models = [self.model(stream) for stream in self.settings.streams]
        return Logins(admin[1], identities.secret_of_forms(self.keys_dir), models, self.solo_models)

    @cached_property
    def store(self) -> MlflowStore:
        """The model registry, by the login of the service's own that this process works as.

        A login in the environment of a command counts before the learner's: what a person registers is theirs.
        """
        from registry.mlflow_store import MlflowStore
        from tidegate import identities

        if not self.asks_logins or (self.acting == "learner" and identities.of_person()):
            return MlflowStore(self.mlflow_uri)
        return MlflowStore(self.mlflow_uri, identities.of_service(self.keys_dir, self.acting))

    @cached_property
    def desk(self) -> MlflowStore:
        """The model registry for a person's decision, by their own login where it asks for one.

        Raises:
            ConfigError: it asks, and nobody is there to answer.
        """
        from registry.mlflow_store import MlflowStore
        from tidegate import identities

        return MlflowStore(self.mlflow_uri, identities.ask_person()) if self.asks_logins else self.store

    @cached_property
    def users(self) -> MlflowStore:
        """The model registry for its users and roles: by the environment's login, else by the admin's among the keys.

        Raises:
            ConfigError: logins are off, or there is neither.
        """
        from registry.mlflow_store import MlflowStore
        from tidegate import identities

        if not self.asks_logins:
            raise ConfigError("service.mlflow.auth=off: there are no users; set it to basic and restart MLflow")
        login = identities.of_person() or identities.of_service(self.keys_dir, identities.ADMIN)
        if login is None:
            raise ConfigError(
                f"{self.keys_dir}/mlflow_admin: not there; start MLflow once by `tidegate up` or `tidegate mlflow`, "
                f"or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an admin's login"
            )
        return MlflowStore(self.mlflow_uri, login)

    def limits(self, stream: str) -> RecordLimits:
        """What a record of the stream may be."""
        from ingest.record import RecordLimits

        ingest = self.stream(stream).ingest
        return RecordLimits(
            domains=frozenset(ingest.domains),
            labels=frozenset(ingest.labels) or None,
            prompt_chars_max=ingest.prompt_chars_max,
            completion_chars_max=ingest.completion_chars_max,
        )

    def policy(self, stream: str) -> Policy:
        """The privacy policy that blocks sealed from now on are frozen with."""
        from privacy.policy import Policy

        privacy = self.stream(stream).privacy
        return Policy(
            unit=privacy.unit,
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            attempts=privacy.attempts,
            replay_share=privacy.replay_share,
            holdout_share=privacy.holdout_share,
            horizon=privacy.horizon,
            holdout_epsilon=privacy.holdout_epsilon,
            holdout_evaluations=privacy.holdout_evaluations,
            enabled=privacy.enabled,
        )

    def base(self, stream: str, progress: Callable[[int, int, str], None] | None = None) -> Base:
        """The prepared base model of a stream."""
        from learner.base import prepare_base

        return prepare_base(self.stream(stream).base, self.workspace.bases, progress=progress)

    def ingester(self, stream: str, on_event: Callable[..., Any] | None = None) -> Ingester:
        """A consumer of one stream's topic, in a lane of its own."""
        from ingest.datadocs import DataDocs
        from ingest.ingester import Ingester

        settings = self.stream(stream)
        policy = self.policy(stream)
        return Ingester(
            stream=stream,
            topic=settings.topic,
            settings=self.kafka(),
            repo=self.repository(),
            limits=self.limits(stream),
            suite_path=self.workspace.expectations(stream),
            unit=settings.privacy.unit,
            k_per_user=settings.ingest.records_per_user_max,
            split_key=self.secret_bytes(f"split-{stream}"),
            holdout_share=settings.privacy.holdout_share,
            policy=policy.frozen,
            block_offsets=settings.ingest.block_offsets,
            block_seconds=settings.ingest.block_seconds,
            docs=DataDocs(self.workspace.docs(stream), settings.ingest.docs_seconds),
            on_event=on_event,
        )


def open_service(given: str | None, acting: Literal["learner", "server"] = "learner") -> Service:
    """The service of a workspace, with all settings checked.

    Raises:
        WorkspaceError: there is no workspace.
        ConfigError: a setting is wrong.
    """
    workspace = find(given)
    return Service(workspace, load(workspace.params), acting)


def complete_workspace(workspace: Workspace) -> list[str]:
    """Make what needs the other packages: keys, data repository, ledger, expectation suites. Idempotent."""
    from ingest.expectations import write_default_suite
    from ingest.repository import DataRepository

    service = Service(workspace, load(workspace.params))
    made = []
    for purpose in ("receipts", "verdicts", "approvals"):
        if not any((service.keys_dir / f"{purpose}{half}").exists() for half in (".pem", ".pub")):
            service.signer(purpose)
            made.append(f"keys/{purpose}.pem")
    for name in ("answers", *(f"split-{stream}" for stream in service.settings.streams)):
        if not (service.keys_dir / f"{name}.key").exists():
            service.secret_bytes(name)
            made.append(f"keys/{name}.key")
    fresh = not (workspace.data / ".git").exists()
    repo = DataRepository.init(workspace.data, remote=service.data_remote)
    if fresh:
        template = (CHECKOUT / "dvc.yaml").read_bytes()
        repo.commit_files({"dvc.yaml": template, "params.yaml": workspace.params.read_bytes()}, "Lay out")
        made.append("data/")
    if service.ledger_url.startswith("sqlite") and not (workspace.root / "ledger.db").exists():
        made.append("ledger.db")
    service.ledger.head()
    for stream in service.settings.streams:
        suite = workspace.expectations(stream)
        if not suite.exists():
            write_default_suite(suite, service.limits(stream))
            made.append(f"expectations/{suite.name}")
    return made
