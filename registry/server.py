"""MLflow with the guard as a child process: safe defaults, gone when its parent is gone.

Two processes: the `mlflow` command and the one uvicorn worker it starts (MLflow's default is fifteen). The
guard is in the worker; both ask the kernel to end them with their parent. Start it from a thread that lives
as long as the server should: Linux counts the death of the starting thread as the parent's.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import requests
import structlog
from sqlalchemy import make_url

from ingest.child import die_with_parent
from registry.errors import ServerFailed

log = structlog.get_logger()

# Importing MLflow takes seconds on a quiet core; the first start also makes the database's 60 tables.
START_TIMEOUT_S = 180.0
# A worker ends within a second when it is idle; a long artifact upload may take some more.
STOP_TIMEOUT_S = 15.0
_POLL_S = 0.2
_LOG_TAIL_LINES = 5


# The server is one process, and everything that changes a user passes through it and empties this.
_LOGIN_CACHE_S = 60


@dataclass(frozen=True)
class Logins:
    """MLflow's basic authentication, with roles.

    Attributes:
        admin_password: of MLflow's user `admin`; it counts at the very first start only.
        secret_key: signs the forms of MLflow's own pages; the same at every start.
        models: registered models that get roles, and an experiment, when the server starts.
        solo_models: models whose versions may be promoted by whom registered them.
        database_url: of users and roles; default: MLflow's own database when that is no SQLite, else one beside it.
    """

    admin_password: str
    secret_key: str
    models: Sequence[str] = ()
    solo_models: Sequence[str] = ()
    database_url: str | None = None


class MlflowServer:
    """`mlflow server` with its artifacts in `WORKSPACE/mlflow`; a context manager.

    Args:
        workspace: the workspace's folder.
        host: address to listen on; loopback unless told otherwise.
        port: 0 takes a free one.
        approvals_url: SQLAlchemy URL of the history of approvals; default `approvals.db` in the workspace.
        keys_dir: default `keys` in the workspace.
        open_models: models of streams that promise nothing to anybody; only theirs may be promoted without privacy.
        backend_url: SQLAlchemy URL of MLflow's own tables; default `mlflow/mlflow.db` in the workspace. PostgreSQL is
            driven by psycopg2, whatever driver the URL names.
        public_names: further host names under which browsers reach it, such as `mlflow.example.org`.
        logins: who may do what; None: no login is asked for, and everybody who reaches it may do everything.
    """

    _HEALTH = "/tidegate/health"

    def __init__(
        self,
        workspace: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 5000,
        approvals_url: str | None = None,
        keys_dir: Path | None = None,
        open_models: Sequence[str] = (),
        public_names: Sequence[str] = (),
        backend_url: str | None = None,
        logins: Logins | None = None,
    ) -> None:
        self._root = workspace.resolve()
        self._host = host
        self._port = port or _free_port(host)
        self._approvals_url = approvals_url or f"sqlite:///{self._root / 'approvals.db'}"
        self._backend_url = _for_mlflow(backend_url or f"sqlite:///{self._root / 'mlflow' / 'mlflow.db'}")
        self._keys = (keys_dir or self._root / "keys").resolve()
        self._open_models = tuple(open_models)
        self._names = ("localhost", "127.0.0.1", "[::1]", *public_names)
        self._logins = logins
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address for clients on this machine; also MLflow's tracking URI."""
        host = "127.0.0.1" if self._host in {"0.0.0.0", "::"} else self._host  # noqa: S104 - not bound
        return f"http://{host}:{self._port}"

    @property
    def pid(self) -> int | None:
        """Process id of the `mlflow` command while it runs."""
        return self._process.pid if self._process else None

    @property
    def log_file(self) -> Path:
        """What MLflow and the guard print."""
        return self._root / "run" / "mlflow.log"

    def start(self) -> None:
        """Start it and wait until the guard answers.

        Raises:
            ServerFailed: the port is taken, the process ended, or it did not answer in time.
        """
        _refuse_taken(self._host, self._port)
        for folder in (self._root / "mlflow" / "artifacts", self.log_file.parent):
            folder.mkdir(parents=True, exist_ok=True)
        if self._logins is not None:
            self._write_login_settings(self._logins)
        with self.log_file.open("ab") as out:
            self._process = subprocess.Popen(
                self._command(),
                env=self._environment(),
                cwd=self._root / "mlflow",
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the parent, which then stops this in order
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call, no locks
            )
        try:
            self._wait_healthy()
        except BaseException:
            self.stop()
            raise
        log.info("mlflow started", url=self.url, pid=self.pid)

    def check(self) -> None:
        """Raise ServerFailed when the process has ended."""
        if self._process is None:
            raise ServerFailed(f"mlflow {self.url}: not started")
        code = self._process.poll()
        if code is not None:
            raise ServerFailed(f"mlflow {self.url}: ended with code {code}; see {self.log_file}: {self._tail()}")

    def stop(self) -> None:
        """End it in order; after `STOP_TIMEOUT_S` by force. Stopping twice is nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            log.warning("mlflow killed", pid=process.pid, after_s=STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the worker, should the command have died before it
        process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _command(self) -> list[str]:
        hosts = [form for name in self._names for form in (name, f"{name}:{self._port}")]
        origins = [f"{scheme}://{host}" for scheme in ("http", "https") for host in hosts]
        home = self._root / "mlflow"
        return [
            *(sys.executable, "-m", "mlflow", "server", "--app-name", "tidegate"),
            *("--host", self._host, "--port", str(self._port), "--workers", "1"),
            # Serving asks once a second: a line each would be the whole log.
            *("--uvicorn-opts", "--no-access-log"),
            *("--serve-artifacts", "--artifacts-destination", str(home / "artifacts")),
            *("--allowed-hosts", ",".join(hosts), "--cors-allowed-origins", ",".join(origins)),
        ]

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "TIDEGATE_WORKSPACE": str(self._root),
            "TIDEGATE_KEYS": str(self._keys),
            "TIDEGATE_APPROVALS_URL": self._approvals_url,
            "TIDEGATE_OPEN_MODELS": json.dumps(self._open_models),
            "TIDEGATE_MLFLOW_CHILD": "1",
            # By the environment: other users of the machine read command lines, and a URL may hold a password.
            "MLFLOW_BACKEND_STORE_URI": self._backend_url,
            # Thirteen further processes and 2.5 GB, for jobs nobody here starts.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONUNBUFFERED": "1",
            **({} if self._logins is None else self._login_environment(self._logins)),
        }

    @property
    def _login_settings(self) -> Path:
        return self._root / "run" / "mlflow-auth.ini"

    def _login_environment(self, logins: Logins) -> dict[str, str]:
        return {
            "TIDEGATE_MLFLOW_AUTH": "basic",
            "TIDEGATE_MODELS": json.dumps(list(logins.models)),
            "TIDEGATE_SOLO_MODELS": json.dumps(list(logins.solo_models)),
            "MLFLOW_AUTH_CONFIG_PATH": str(self._login_settings),
            "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
            "MLFLOW_AUTH_ADMIN_PASSWORD": logins.admin_password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": logins.secret_key,
            # A route without a rule of MLflow's own is closed rather than open.
            "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",
        }

    def _write_login_settings(self, logins: Logins) -> None:
        """MLflow reads these from a file only. The URL may hold a password."""
        beside = f"sqlite:///{self._root / 'mlflow' / 'logins.db'}"
        url = logins.database_url or (beside if self._backend_url.startswith("sqlite") else self._backend_url)
        text = "\n".join(
            (
                "[mlflow]",
                # Whoever has no role on a model sees nothing of it.
                "default_permission = NO_PERMISSIONS",
                f"database_uri = {url.replace('%', '%%')}",
                f"auth_cache_ttl_seconds = {_LOGIN_CACHE_S}",
                "",
            )
        )
        self._login_settings.unlink(missing_ok=True)
        handle = os.open(self._login_settings, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)

    def _wait_healthy(self) -> None:
        session = requests.Session()
        session.trust_env = False  # a proxy has no business between a process and its child
        deadline = time.monotonic() + START_TIMEOUT_S
        with session:
            while time.monotonic() < deadline:
                self.check()
                try:
                    # 401: MLflow's own authentication is on, and answers; so does the guard behind it.
                    if session.get(self.url + self._HEALTH, timeout=2).status_code in {200, 401}:
                        return
                except requests.RequestException:
                    pass
                time.sleep(_POLL_S)
        raise ServerFailed(
            f"mlflow {self.url}: no answer after {START_TIMEOUT_S:.0f} s; see {self.log_file}: {self._tail()}"
        )

    def _tail(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines[-_LOG_TAIL_LINES:] if line.strip()) or "empty"


def _for_mlflow(url: str) -> str:
    """The URL with the driver MLflow's queries work with.

    MLflow compares a version's number, an integer, with text; psycopg 3 sends types along, and PostgreSQL refuses that.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg2")
    return parsed.render_as_string(hide_password=False)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _refuse_taken(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerFailed(
                f"mlflow port={port}: cannot listen on {host} ({error.strerror}); "
                f"stop what uses it, or set service.mlflow.port in params.yaml"
            ) from None
