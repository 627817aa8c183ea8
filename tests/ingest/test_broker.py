"""Kafka through our eyes: what is written is read, and every failure is one clear sentence within seconds."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import kafka.errors
import psutil
import pytest

from ingest.broker import (
    KafkaSettings,
    TopicReader,
    TopicWriter,
    check,
    describe_topic,
    ensure_topic,
    translate,
)
from ingest.embedded import EmbeddedBroker
from ingest.errors import (
    BrokerAuthError,
    BrokerError,
    BrokerTlsError,
    BrokerUnreachable,
    MessageTooLarge,
    OffsetsGone,
    SettingError,
)
from tests.kafka_servers import ApacheKafka

# Each refusal must be said before a person gives up waiting.
SECONDS_MAX = 6.0


@contextmanager
def _soon(kind: type[Exception], match: str) -> Iterator[None]:
    began = time.monotonic()
    with pytest.raises(kind, match=match) as caught:
        yield
    assert time.monotonic() - began < SECONDS_MAX
    assert "\n" not in str(caught.value)


def test_what_is_written_is_read(broker: KafkaSettings, topic: str) -> None:
    info = ensure_topic(broker, topic, partitions=2)
    assert info.partitions == (0, 1)
    assert ensure_topic(broker, topic, partitions=5) == info
    with TopicWriter(broker) as writer:
        for i in range(50):
            writer.send(topic, b"k%d" % (i % 7), None if i == 3 else b"v%d" % i, (("h", b"x"),))
        writer.flush()
    with TopicReader(broker, topic, group="g") as reader:
        bounds = reader.bounds(info.partitions)
        assert sum(end for _, end in bounds.values()) == 50
        reader.seek({0: 0, 1: 0})
        seen = []
        while len(seen) < 50:
            batch = reader.poll(20, 2000)
            assert batch, "the broker lost messages"
            seen += batch
        assert reader.positions() == {p: end for p, (_, end) in bounds.items()}
        assert {m.value for m in seen} == {None} | {b"v%d" % i for i in range(50) if i != 3}
        assert all(m.headers == (("h", b"x"),) for m in seen)
        reader.commit(reader.positions())
        reader.seek({0: 10_000_000, 1: 0})
        with pytest.raises(OffsetsGone, match=topic):
            for _ in range(20):
                reader.poll(20, 500)


def test_apache_kafka_names_the_topic_by_id(apache_kafka: ApacheKafka, topic: str) -> None:
    first = ensure_topic(apache_kafka.settings, topic)
    assert first.topic_id is not None
    assert describe_topic(apache_kafka.settings, topic) == first


def test_a_missing_topic_is_none(broker: KafkaSettings, topic: str) -> None:
    assert describe_topic(broker, topic) is None


def test_a_message_over_the_limit_is_told(apache_kafka: ApacheKafka, topic: str) -> None:
    assert ensure_topic(apache_kafka.settings, topic).message_bytes_max < 3_000_000
    with TopicWriter(apache_kafka.settings) as writer:
        writer.send(topic, b"k", b"x" * 3_000_000)
        with pytest.raises(MessageTooLarge, match=r"max\.message\.bytes"):
            writer.flush()


def test_tls_and_sasl(apache_kafka_tls: ApacheKafka, topic: str) -> None:
    ensure_topic(apache_kafka_tls.settings, topic)
    assert "tidegate-secret" not in repr(apache_kafka_tls.settings)


def test_wrong_password(apache_kafka_tls: ApacheKafka) -> None:
    with _soon(BrokerAuthError, "sasl_username=tidegate: refused") as _:
        check(replace(apache_kafka_tls.settings, sasl_password="wrong-secret"))
    with _soon(BrokerAuthError, "TIDEGATE_SASL_PASSWORD"):
        TopicWriter(replace(apache_kafka_tls.settings, sasl_password="wrong-secret"))


def test_wrong_mechanism(apache_kafka_tls: ApacheKafka) -> None:
    with _soon(BrokerAuthError, "sasl_mechanism=SCRAM-SHA-256: must be one of PLAIN"):
        check(replace(apache_kafka_tls.settings, sasl_mechanism="SCRAM-SHA-256"))


def test_untrusted_certificate(apache_kafka_tls: ApacheKafka) -> None:
    with _soon(BrokerTlsError, "certificate not trusted"):
        check(replace(apache_kafka_tls.settings, ssl_cafile=None))


def test_missing_certificate_file(apache_kafka_tls: ApacheKafka) -> None:
    with _soon(BrokerTlsError, r"ssl_cafile=/nowhere\.pem"):
        check(replace(apache_kafka_tls.settings, ssl_cafile="/nowhere.pem"))


def test_tls_on_a_plain_port(apache_kafka: ApacheKafka, apache_kafka_tls: ApacheKafka) -> None:
    with _soon(BrokerTlsError, "does that port speak TLS"):
        check(KafkaSettings(apache_kafka.settings.bootstrap, "SSL", ssl_cafile=str(apache_kafka_tls.ca)))


def test_plain_on_a_tls_port(apache_kafka_tls: ApacheKafka) -> None:
    with _soon(BrokerTlsError, "does that port speak TLS"):
        check(KafkaSettings(apache_kafka_tls.settings.bootstrap))


def test_no_sasl_where_it_is_wanted(apache_kafka_tls: ApacheKafka) -> None:
    with _soon(BrokerAuthError, "wants SASL"):
        check(replace(apache_kafka_tls.settings, security_protocol="SSL"))


def test_sasl_where_there_is_none(apache_kafka: ApacheKafka) -> None:
    with _soon(BrokerAuthError, "SASL|sasl"):
        check(replace(apache_kafka.settings, security_protocol="SASL_PLAINTEXT", sasl_username="u", sasl_password="p"))


def test_nobody_there() -> None:
    with _soon(BrokerUnreachable, r"bootstrap=127\.0\.0\.1:1: connection refused"):
        check(KafkaSettings("127.0.0.1:1"))
    with _soon(BrokerUnreachable, "no such host"):
        check(KafkaSettings("no-such-host.invalid:9092"))


def test_somebody_else_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with _soon(BrokerUnreachable, "is it a Kafka broker"):
            check(KafkaSettings(f"127.0.0.1:{port}"))


def test_one_of_several_addresses_is_enough(broker: KafkaSettings) -> None:
    check(replace(broker, bootstrap=f"127.0.0.1:1,{broker.bootstrap}"))


@pytest.mark.parametrize("bootstrap", ["", "host", "host:port", "host:99999", "a:1,,b:2"])
def test_an_address_that_is_none(bootstrap: str) -> None:
    with pytest.raises(SettingError, match="host:port"):
        check(KafkaSettings(bootstrap))


def test_settings_are_checked() -> None:
    with pytest.raises(SettingError, match="security_protocol=TLS"):
        KafkaSettings("a:1", "TLS")
    with pytest.raises(SettingError, match="TIDEGATE_SASL_PASSWORD"):
        KafkaSettings("a:1", "SASL_SSL", sasl_username="u")


def test_every_error_of_the_client_is_translated() -> None:
    def below(kind: type[Exception]) -> list[type[Exception]]:
        return [kind, *(k for sub in kind.__subclasses__() for k in below(sub))]

    kinds = below(kafka.errors.KafkaError)
    assert len(kinds) > 100
    for kind in kinds:
        error = kind.__new__(kind)
        error.args = ("first\nsecond",)
        ours = translate(error, "topic=t", KafkaSettings("a:1"))
        assert isinstance(ours, BrokerError)
        assert "\n" not in str(ours)


def test_the_embedded_broker_keeps_its_data_and_its_port_is_guarded(tmp_path: Path, topic: str) -> None:
    with EmbeddedBroker(tmp_path / "b") as running:
        settings = KafkaSettings(running.bootstrap)
        ensure_topic(settings, topic)
        with TopicWriter(settings) as writer:
            writer.send(topic, b"k", b"v")
            writer.flush()
        port = int(running.bootstrap.rpartition(":")[2])
        with pytest.raises(BrokerError, match=f"port={port}: taken"):
            EmbeddedBroker(tmp_path / "c", port).start()
    with EmbeddedBroker(tmp_path / "b", port), TopicReader(settings, topic) as reader:
        assert reader.bounds([0]) == {0: (0, 1)}


def test_the_embedded_broker_dies_with_its_parent(tmp_path: Path) -> None:
    code = f"""
        import time
        from pathlib import Path
        from ingest.embedded import EmbeddedBroker
        with EmbeddedBroker(Path({str(tmp_path / "b")!r})) as running:
            print(running.pid, flush=True)
            time.sleep(60)
    """
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, cwd=root)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert psutil.wait_procs([child], timeout=10)[1] == []


def test_a_dead_embedded_broker_is_noticed(tmp_path: Path) -> None:
    running = EmbeddedBroker(tmp_path / "b")
    running.start()
    running.check()
    assert running.pid is not None
    os.kill(running.pid, signal.SIGKILL)
    with pytest.raises(BrokerError, match="ended with code"):
        for _ in range(100):
            running.check()
            time.sleep(0.05)
    running.stop()
