"""Real brokers as fixtures: the embedded one, and Apache Kafka beside the checkout.

Import the fixtures by name in a `conftest.py`. Apache Kafka is sought in `../shared/kafka`,
or where TIDEGATE_TEST_KAFKA says.
What is missing (Java, the jars, the wheel) skips on a laptop and fails under CI=true.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ingest.broker import KafkaSettings
from ingest.embedded import EmbeddedBroker

KAFKA_HOME = Path(os.environ.get("TIDEGATE_TEST_KAFKA", Path(__file__).parents[2] / "shared" / "kafka"))


def missing(what: str) -> None:
    """Skip on a laptop, fail in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and CI=true forbids skipping")
    pytest.skip(f"{what} is missing")


def _free_port_pair() -> int:
    """A port such that it and the one a thousand above are free (Kafka's controller listens there)."""
    while True:
        with socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", 0))
            port: int = low.getsockname()[1]
            try:
                high.bind(("127.0.0.1", port + 1000))
            except (OSError, OverflowError):
                continue
            return port


@dataclass(frozen=True)
class ApacheKafka:
    """One Apache Kafka broker with its data in `folder`."""

    folder: Path
    protocol: str = "PLAINTEXT"
    props: str = ""
    port: int = field(default_factory=_free_port_pair)

    def _run(self, verb: str, *arguments: str) -> None:
        environment = {**os.environ, "KAFKA_PROTOCOL": self.protocol, "KAFKA_PROPS": self.props}
        command = [str(KAFKA_HOME / "kafka"), verb, str(self.folder), *arguments]
        # To a file, not to a pipe: the broker inherits it and would hold the pipe open.
        with (self.folder.parent / f"{self.folder.name}.{verb}.log").open("w+") as log:
            done = subprocess.run(command, check=False, stdout=log, stderr=log, env=environment, timeout=180)
            log.seek(0)
            assert done.returncode == 0, log.read()

    def start(self) -> None:
        self._run("start", str(self.port))

    def stop(self) -> None:
        self._run("stop")

    def kill(self) -> None:
        """As a power cut would."""
        self._run("kill")

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def settings(self) -> KafkaSettings:
        secure = self.protocol.endswith("SSL")
        login = self.protocol.startswith("SASL")
        return KafkaSettings(
            bootstrap=f"127.0.0.1:{self.port}",
            security_protocol=self.protocol,
            sasl_mechanism="PLAIN" if login else None,
            sasl_username="tidegate" if login else None,
            sasl_password="tidegate-secret" if login else None,
            ssl_cafile=str(self.ca) if secure else None,
        )


def run_apache(protocol: str, props: str = "") -> Iterator[ApacheKafka]:
    """One broker from start to kill; `props` are further lines of its server.properties."""
    if shutil.which("java") is None:
        missing("Java 17")
    if not (KAFKA_HOME / "kafka").exists():
        missing(f"Apache Kafka in {KAFKA_HOME}")
    # Not pytest's tmp_path: the broker's folder is large and must go at once.
    with tempfile.TemporaryDirectory(prefix="tidegate-kafka-", ignore_cleanup_errors=True) as folder:
        kafka = ApacheKafka(Path(folder) / "broker", protocol, props)
        try:
            kafka.start()
            yield kafka
        finally:
            kafka.kill()


@pytest.fixture(scope="session")
def apache_kafka() -> Iterator[ApacheKafka]:
    """Apache Kafka, plain."""
    yield from run_apache("PLAINTEXT")


@pytest.fixture(scope="session")
def apache_kafka_tls() -> Iterator[ApacheKafka]:
    """Apache Kafka behind TLS and SASL/PLAIN."""
    yield from run_apache("SASL_SSL")


@pytest.fixture(scope="session")
def embedded_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """The embedded broker."""
    if importlib.util.find_spec("noida_db") is None:
        missing("noida-db")
    with EmbeddedBroker(tmp_path_factory.mktemp("embedded")) as running:
        yield running


@pytest.fixture(scope="session", params=["embedded", "apache"])
def broker(request: pytest.FixtureRequest) -> KafkaSettings:
    """Connection settings, once for each kind of broker."""
    if request.param == "embedded":
        running: EmbeddedBroker = request.getfixturevalue("embedded_broker")
        return KafkaSettings(running.bootstrap)
    kafka: ApacheKafka = request.getfixturevalue("apache_kafka")
    return kafka.settings


@pytest.fixture
def topic() -> str:
    """A topic name nobody used before."""
    return f"t-{uuid.uuid4().hex[:12]}"
