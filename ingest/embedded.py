"""The embedded broker for one machine: noida-db speaking Kafka's protocol. The only file knowing it.

It is not Apache Kafka: one node, no replicas, no topic ids, and after SIGKILL it may lose its last second.
"""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from ingest.child import die_with_parent
from ingest.errors import BrokerError, BrokerUnreachable

# It listens within 0.1 s on a quiet machine, and saves on SIGTERM in less.
_START_SECONDS: Final = 20.0
_STOP_SECONDS: Final = 20.0
_LOOPBACK: Final = "127.0.0.1"


def _binary() -> Path:
    spec = importlib.util.find_spec("noida_db")
    if spec is None or spec.origin is None:
        raise BrokerError("embedded broker: not installed; pip install 'tidegate[embedded]', or name a Kafka address")
    binary = Path(spec.origin).parent / "noida-db"
    if not binary.is_file():
        raise BrokerError(f"embedded broker: no {binary}; reinstall noida-db, or set service.broker.bootstrap")
    if not binary.stat().st_mode & 0o100:
        binary.chmod(0o755)
    return binary


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


class EmbeddedBroker:
    """A broker as a child process on loopback; dies with this process. A context manager.

    `port=0` takes a free one. Data stays in `data_dir`: the next broker there goes on with it.
    """

    def __init__(self, data_dir: Path, port: int = 0) -> None:
        self.data_dir = data_dir
        self._port = port or _free_port()
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap(self) -> str:
        """Its address."""
        return f"{_LOOPBACK}:{self._port}"

    @property
    def pid(self) -> int | None:
        """Process id of the child, None when it does not run."""
        return None if self._child is None else self._child.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start and return when it listens.

        Raises:
            BrokerError: the port is taken, or the broker does not come up.
        """
        with socket.socket() as probe:
            if probe.connect_ex((_LOOPBACK, self._port)) == 0:
                raise BrokerError(f"service.broker.port={self._port}: taken by another process; choose another port")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        command = [str(_binary()), "start", "--only", "kafka", "--host", _LOOPBACK]
        command += ["--kafka-port", str(self._port), "--data-dir", str(self.data_dir)]
        with (self.data_dir / "broker.log").open("ab") as log:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Its own group: Ctrl-C reaches us, and we stop it in order.
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call, safe after fork
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            self.check()
            with suppress(OSError), socket.create_connection((_LOOPBACK, self._port), timeout=1):
                return
            time.sleep(0.02)
        self.stop()
        raise BrokerUnreachable(f"embedded broker: silent for {_START_SECONDS:g} s; see {self.data_dir}/broker.log")

    def check(self) -> None:
        """Raise if the child is gone.

        Raises:
            BrokerError: it ended by itself.
        """
        if self._child is not None and (code := self._child.poll()) is not None:
            raise BrokerError(f"embedded broker: ended with code {code}; see {self.data_dir}/broker.log")

    def stop(self) -> None:
        """Stop it cleanly: everything acknowledged is on disk afterwards."""
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child = None
