"""Least rights on Kafka: what docs/records.md asks of an administrator is enough, and each of it is needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ingest.broker import KafkaSettings, _admin, ensure_topic
from ingest.deadletters import topic_of
from ingest.errors import BrokerAuthError
from tests.ingest.world import STREAM, World, line, put
from tests.kafka_servers import ApacheKafka, run_apache

# DVC's own trie library announces a change of its own.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")

PROPS = """
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:tidegate;User:ANONYMOUS
listener.name.client.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \\
  username="tidegate" password="tidegate-secret" user_tidegate="tidegate-secret" \\
  user_ingest="ingest-secret" user_upstream="upstream-secret";
"""


@pytest.fixture(scope="module")
def guarded() -> Iterator[ApacheKafka]:
    """Apache Kafka that lets nobody do anything without a rule."""
    yield from run_apache("SASL_PLAINTEXT", PROPS)


def _as(kafka: ApacheKafka, user: str) -> KafkaSettings:
    return replace(kafka.settings, sasl_username=user, sasl_password=f"{user}-secret")


def _rules(topic: str) -> list[Any]:
    """The table of docs/records.md."""
    from kafka.admin import (
        ACL,
        ACLOperation,
        ACLPermissionType,
        ACLResourcePatternType,
        ResourcePattern,
        ResourceType,
    )

    def rule(user: str, operation: Any, kind: Any, name: str, pattern: Any = ACLResourcePatternType.LITERAL) -> Any:
        resource = ResourcePattern(kind, name, pattern)
        return ACL(f"User:{user}", "*", operation, ACLPermissionType.ALLOW, resource)

    group = f"tidegate-{STREAM}-"
    return [
        rule("upstream", ACLOperation.WRITE, ResourceType.TOPIC, topic),
        rule("ingest", ACLOperation.READ, ResourceType.TOPIC, topic),
        rule("ingest", ACLOperation.WRITE, ResourceType.TOPIC, topic_of(topic)),
        rule("ingest", ACLOperation.READ, ResourceType.GROUP, group, ACLResourcePatternType.PREFIXED),
    ]


@contextmanager
def _allowed(kafka: ApacheKafka, rules: list[Any]) -> Iterator[None]:
    with _admin(kafka.settings, "test") as admin:
        admin.create_acls(rules)
        try:
            yield
        finally:
            admin.delete_acls(rules)


def test_these_rights_are_enough(tmp_path: Path, guarded: ApacheKafka, topic: str) -> None:
    for name in (topic, topic_of(topic)):
        ensure_topic(guarded.settings, name)
    with _allowed(guarded, _rules(topic)):
        put(_as(guarded, "upstream"), topic, [*(line(i) for i in range(30)), b"broken"])
        world = World(tmp_path, _as(guarded, "ingest"), topic).make()
        (sealed,) = world.ingest()
    assert (sealed.counts.sealed, sealed.counts.rejected) == (30, 1)


@pytest.mark.parametrize("missing", range(4))
def test_without_one_of_them_it_is_said_at_once(tmp_path: Path, guarded: ApacheKafka, topic: str, missing: int) -> None:
    for name in (topic, topic_of(topic)):
        ensure_topic(guarded.settings, name)
    put(guarded.settings, topic, [line(1), b"broken"])
    world = World(tmp_path, _as(guarded, "ingest"), topic).make()
    with (
        _allowed(guarded, [rule for number, rule in enumerate(_rules(topic)) if number != missing]),
        pytest.raises(BrokerAuthError, match="grant"),
    ):
        if missing == 0:
            put(_as(guarded, "upstream"), topic, [line(2)])
        world.ingest()
    assert world.repo.manifests(STREAM) == []
