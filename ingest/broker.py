"""Kafka, as Tidegate uses it: the only file importing kafka-python. Its errors do not leave this file.

Every client starts with :func:`ingest.preflight.preflight`, so that a wrong address, certificate or password
is said within seconds instead of retried for half a minute.
"""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self
from uuid import UUID

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient, NewTopic
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import (
    AuthorizationError,
    BrokerResponseError,
    CommitFailedError,
    FencedInstanceIdError,
    IllegalGenerationError,
    IllegalStateError,
    InvalidTopicError,
    KafkaConfigurationError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    RebalanceInProgressError,
    RecordListTooLargeError,
    SaslAuthenticationFailedError,
    TopicAlreadyExistsError,
    UnknownMemberIdError,
    UnknownTopicOrPartitionError,
    UnsupportedSaslMechanismError,
)
from kafka.net.sasl import get_sasl_mechanism
from kafka.structs import OffsetAndMetadata

from ingest.errors import (
    BrokerAuthError,
    BrokerError,
    BrokerUnreachable,
    MessageTooLarge,
    OffsetsGone,
    SettingError,
    TopicError,
)
from ingest.preflight import SaslExchange, preflight

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

Headers = tuple[tuple[str, bytes], ...]

# After the preflight only the cluster's own address can be wrong (advertised.listeners).
_BOOTSTRAP_MS: Final = 10_000
_ANSWER_MS: Final = 15_000
# Flushing waits for the slowest of all replicas that acks=all asks for.
_FLUSH_SECONDS: Final = 60.0
# A sender that was told to give up does so within its current wait for the network.
_ABANDON_SECONDS: Final = 2.0
# The broker's limit decides what is too large, not the client's.
_REQUEST_BYTES_MAX: Final = 100 << 20
# Kafka's own default of max.message.bytes, for brokers that do not tell or that we may not ask.
_MESSAGE_BYTES_DEFAULT: Final = 1_048_588
# Large enough for thousands of records a fetch, so that a block needs few of them.
_FETCH_BYTES_MAX: Final = 8 << 20
# Heartbeats come from a thread of their own, also while a block is sealed: silence this long means a dead process.
_SESSION_MS: Final = 10_000
_HEARTBEAT_MS: Final = 2_000
# Between two polls lies the sealing of one block; beyond this the process hangs, and its partitions are given away.
_POLL_INTERVAL_MS: Final = 300_000
# A rebalance takes as long as the slowest member's heartbeat; a stop is heeded after this at the latest.
_JOIN_MS: Final = 5_000
# New partitions, and a topic made anew, are noticed within this time.
_METADATA_MS: Final = 30_000


@dataclass(frozen=True)
class KafkaSettings:
    """Where Kafka is and how to be let in. Never printed with its password."""

    bootstrap: str
    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str | None = None
    sasl_username: str | None = None
    sasl_password: str | None = field(default=None, repr=False)
    ssl_cafile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    def __post_init__(self) -> None:
        known = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
        if self.security_protocol not in known:
            raise SettingError(f"security_protocol={self.security_protocol}: must be one of {', '.join(known)}")
        if self.security_protocol.startswith("SASL"):
            if self.sasl_mechanism is None:
                object.__setattr__(self, "sasl_mechanism", "PLAIN")
            for name, way_out in (("username", "service.broker"), ("password", "TIDEGATE_SASL_PASSWORD")):
                if not getattr(self, f"sasl_{name}"):
                    raise SettingError(f"sasl_{name}: missing; {self.security_protocol} needs one; set {way_out}")


class Message(NamedTuple):
    """One message of a topic. A tuple: there are tens of thousands a second."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int


@dataclass(frozen=True)
class TopicInfo:
    """A topic: its partitions, its limit, and its id where the broker gives one (Apache Kafka does)."""

    name: str
    topic_id: str | None
    partitions: tuple[int, ...]
    message_bytes_max: int


# The first class that fits decides; a test walks through every error of kafka-python.
_ERRORS: Final[tuple[tuple[tuple[type[Exception], ...], type[BrokerError], str], ...]] = (
    ((SaslAuthenticationFailedError, UnsupportedSaslMechanismError), BrokerAuthError, "check user and password"),
    ((AuthorizationError,), BrokerAuthError, "grant the user this right on the broker"),
    ((MessageSizeTooLargeError, RecordListTooLargeError), MessageTooLarge, "raise the topic's max.message.bytes"),
    ((OffsetOutOfRangeError, NoOffsetForPartitionError), OffsetsGone, "raise the topic's retention"),
    ((FencedInstanceIdError,), BrokerError, "another process has this lane's name; stop one"),
    ((UnknownTopicOrPartitionError, InvalidTopicError), TopicError, "check the topic's name"),
    ((KafkaTimeoutError, KafkaConnectionError), BrokerUnreachable, "is the broker running?"),
    ((KafkaConfigurationError, BrokerResponseError, KafkaError), BrokerError, "see the broker's log"),
)


def translate(error: Exception, what: str, settings: KafkaSettings) -> BrokerError:
    """One of kafka-python's errors as one of ours, in one line."""
    for kinds, ours, way_out in _ERRORS:
        if isinstance(error, kinds):
            text = " ".join(str(error).split())[:200]
            return ours(f"{what}: {text or type(error).__name__} at {settings.bootstrap}; {way_out}")
    return BrokerError(f"{what}: {type(error).__name__} at {settings.bootstrap}; see the broker's log")


@contextmanager
def _translated(what: str, settings: KafkaSettings, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    try:
        yield
    except but:
        raise
    except KafkaError as error:
        raise translate(error, what, settings) from None


def _client_options(settings: KafkaSettings) -> dict[str, Any]:
    return {
        "bootstrap_servers": settings.bootstrap.split(","),
        "security_protocol": settings.security_protocol,
        "sasl_mechanism": settings.sasl_mechanism if settings.security_protocol.startswith("SASL") else None,
        "sasl_plain_username": settings.sasl_username,
        "sasl_plain_password": settings.sasl_password,
        "ssl_cafile": settings.ssl_cafile,
        "ssl_certfile": settings.ssl_certfile,
        "ssl_keyfile": settings.ssl_keyfile,
        "bootstrap_timeout_ms": _BOOTSTRAP_MS,
        "client_id": "tidegate",
    }


def check(settings: KafkaSettings) -> None:
    """Return when the broker lets us in, within seconds.

    Raises:
        BrokerUnreachable, BrokerTlsError, BrokerAuthError: why it does not.
    """
    # kafka-python logs each retry with a trace; what matters is raised here or by the calls below.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    options = _client_options(settings)

    def exchange() -> SaslExchange:
        mechanism: SaslExchange = get_sasl_mechanism(settings.sasl_mechanism)(**options)
        return mechanism

    if settings.security_protocol.startswith("SASL"):
        try:
            get_sasl_mechanism(settings.sasl_mechanism)
        except KeyError:
            raise SettingError(
                f"sasl_mechanism={settings.sasl_mechanism}: must be PLAIN or SCRAM-SHA-256/512"
            ) from None
        preflight(settings, exchange)
    else:
        preflight(settings, None)


@contextmanager
def _admin(settings: KafkaSettings, what: str) -> Iterator[Any]:
    check(settings)
    with _translated(what, settings):
        client = KafkaAdminClient(**_client_options(settings))
        try:
            yield client
        finally:
            client.close()


def _describe(admin: Any, topic: str) -> TopicInfo | None:
    try:
        (found,) = admin.describe_topics([topic])
    except UnknownTopicOrPartitionError:
        return None
    if found["error_code"] or not found["partitions"]:
        return None
    topic_id = found.get("topic_id")
    known = topic_id is not None and UUID(str(topic_id)).int != 0
    partitions = tuple(sorted(part["partition_index"] for part in found["partitions"]))
    return TopicInfo(topic, str(topic_id) if known else None, partitions, _message_bytes_max(admin, topic))


def _message_bytes_max(admin: Any, topic: str) -> int:
    try:
        found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)], config_filter="all")
        return int(found["topic"][topic]["max.message.bytes"]["value"])
    except (KafkaError, KeyError, TypeError, ValueError):
        return _MESSAGE_BYTES_DEFAULT


def describe_topic(settings: KafkaSettings, topic: str) -> TopicInfo | None:
    """What the broker says of a topic; None if there is none.

    Raises:
        BrokerError: the broker cannot be asked.
    """
    with _admin(settings, f"topic={topic}") as admin:
        return _describe(admin, topic)


def ensure_topic(settings: KafkaSettings, topic: str, partitions: int = 1) -> TopicInfo:
    """Make a topic unless it exists; an existing one is left as it is.

    Raises:
        TopicError: the broker refuses the name.
        BrokerError: the broker cannot be asked, or we may not make topics.
    """
    with _admin(settings, f"topic={topic}") as admin:
        info = _describe(admin, topic)
        if info is None:
            # Replication is the broker's default: one on a laptop, three in a cluster.
            wanted = NewTopic(topic, num_partitions=partitions, replication_factor=-1)
            with suppress(TopicAlreadyExistsError):
                admin.create_topics([wanted], timeout_ms=_ANSWER_MS)
            admin.wait_for_topics([topic], timeout_ms=_ANSWER_MS)
            info = _describe(admin, topic)
        if info is None:
            raise TopicError(f"topic={topic}: made but not there; see the broker's log")
        return info


class _Moves(ConsumerRebalanceListener):  # type: ignore[misc] # kafka-python has no types
    """Notes what a rebalance gave and took, and keeps gained partitions still until they are sought.

    Called in kafka-python's own thread, which must not wait for the broker: so nothing is looked up here.
    """

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._lock = threading.Lock()
        self._gained: set[int] = set()
        self._lost: set[int] = set()

    def on_partitions_assigned(self, assigned: Iterable[Any]) -> None:
        with self._lock:
            for part in assigned:
                # Not from what the group once committed: where reading starts is in the manifests.
                self._consumer.seek(part, 0)
                self._consumer.pause(part)
                self._gained.add(part.partition)

    def on_partitions_revoked(self, revoked: Iterable[Any]) -> None:
        with self._lock:
            for part in revoked:
                self._gained.discard(part.partition)
                self._lost.add(part.partition)

    def on_partitions_lost(self, lost: Iterable[Any]) -> None:
        self.on_partitions_revoked(lost)

    def take(self) -> tuple[set[int], set[int]]:
        """What was lost and what was gained since the last call; a partition in both was lost first."""
        with self._lock:
            moved = self._lost, self._gained
            self._lost, self._gained = set(), set()
            return moved


class TopicReader:
    """Reads one topic from offsets the caller names.

    Alone it reads whatever partitions it seeks. With a `group` and a `member` it shares the topic with the group's
    other members (cooperative rebalancing, KIP-429): :meth:`moves` tells which partitions it was given and has lost,
    and those it was given stand still until they are sought. A member's name outlives its process (static membership,
    KIP-345), so that one that is killed and started again has its partitions back at once.

    Control records and aborted transactions are skipped (read_committed), so that positions may move without messages.
    """

    def __init__(
        self, settings: KafkaSettings, topic: str, group: str | None = None, member: str | None = None
    ) -> None:
        check(settings)
        self._settings = settings
        self.topic = topic
        self._group = group
        self._what = f"topic={topic}"
        membership = {"group_instance_id": member} if member is not None else {}
        with _translated(self._what, settings):
            self._consumer: Any = KafkaConsumer(
                **_client_options(settings),
                **membership,
                group_id=group,
                enable_auto_commit=False,
                auto_offset_reset="none",
                isolation_level="read_committed",
                max_partition_fetch_bytes=_FETCH_BYTES_MAX,
                partition_assignment_strategy=[CooperativeStickyAssignor],
                session_timeout_ms=_SESSION_MS,
                heartbeat_interval_ms=_HEARTBEAT_MS,
                max_poll_interval_ms=_POLL_INTERVAL_MS,
                metadata_max_age_ms=_METADATA_MS,
                metrics_enabled=False,
            )
            self._moves = _Moves(self._consumer) if member is not None else None
            if self._moves is not None:
                self._consumer.subscribe([topic], listener=self._moves)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up. A member's partitions stay its own until its session ends."""
        with suppress(KafkaError):
            self._consumer.close(autocommit=False, timeout_ms=_ANSWER_MS)

    def _parts(self, partitions: Iterable[int]) -> list[Any]:
        return [TopicPartition(self.topic, partition) for partition in partitions]

    def moves(self) -> tuple[set[int], set[int]]:
        """Partitions lost and partitions given since the last call; one in both was lost first."""
        return self._moves.take() if self._moves is not None else (set(), set())

    def assigned(self) -> set[int]:
        """Partitions this reader reads now."""
        return {part.partition for part in self._consumer.assignment()}

    def bounds(self, partitions: Iterable[int]) -> dict[int, tuple[int, int]]:
        """First offset held and next offset to be written, by partition."""
        parts = self._parts(partitions)
        with _translated(self._what, self._settings):
            first = self._consumer.beginning_offsets(parts, timeout_ms=_ANSWER_MS)
            end = self._consumer.end_offsets(parts, timeout_ms=_ANSWER_MS)
        return {part.partition: (first[part], end[part]) for part in parts}

    def seek(self, offsets: Mapping[int, int]) -> None:
        """Read these partitions from these offsets; a member skips those it has lost meanwhile."""
        with _translated(self._what, self._settings):
            if self._moves is None:
                self._consumer.assign(self._parts(offsets))
            here = self.assigned()
            for partition, offset in offsets.items():
                if partition in here:
                    part = TopicPartition(self.topic, partition)
                    self._consumer.seek(part, offset)
                    self._consumer.resume(part)

    def poll(self, messages_max: int, timeout_ms: int) -> list[Message]:
        """Next messages, at most `messages_max`; none after `timeout_ms`.

        Raises:
            OffsetsGone: the topic no longer holds, or never held, the wanted offset.
        """
        with _translated(self._what, self._settings):
            self._finish_joining()
            batches = self._consumer.poll(timeout_ms=timeout_ms, max_records=messages_max)
        return [
            Message(r.partition, r.offset, r.key, r.value, tuple(r.headers), r.timestamp)
            for batch in batches.values()
            for r in batch
        ]

    def _finish_joining(self) -> None:
        """Wait for a rebalance that is under way, which gives nobody messages anyway.

        kafka-python 3 drops the answer to a JoinGroup that comes between two polls, and asks again: with polls as short
        as ours each member would start the next rebalance of all, over and over.
        """
        if self._moves is not None:
            coordinator = self._consumer._coordinator  # noqa: SLF001 - a poll as long would wait for messages too
            if coordinator.need_rejoin():
                coordinator.ensure_active_group(timeout_ms=_JOIN_MS)

    def positions(self) -> dict[int, int]:
        """Next offset to be read, by partition; none of those that stand still."""
        found: dict[int, int] = {}
        with _translated(self._what, self._settings):
            for part in self._consumer.assignment() - self._consumer.paused():
                # A rebalance may take one away between the question and the answer.
                with suppress(IllegalStateError):
                    found[part.partition] = self._consumer.position(part, timeout_ms=_ANSWER_MS)
        return found

    def commit(self, offsets: Mapping[int, int]) -> None:
        """Tell the group's lag monitors how far we are. Nothing here ever reads it back; a rebalance may drop it.

        Raises:
            BrokerError: Kafka refused; the data is safe all the same.
        """
        here = self.assigned()
        values = {TopicPartition(self.topic, p): OffsetAndMetadata(o, "", -1) for p, o in offsets.items() if p in here}
        if not values:
            return
        rebalanced = (CommitFailedError, RebalanceInProgressError, IllegalGenerationError, UnknownMemberIdError)
        with suppress(*rebalanced), _translated(f"group={self._group}", self._settings, but=rebalanced):
            self._consumer.commit(values, timeout_ms=_ANSWER_MS)


class TopicWriter:
    """Writes messages with acks=all, idempotent: what `flush` returned from is on the topic once, in order.

    After an error it is of no more use: kafka-python's idempotent producer does not get over one.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        check(settings)
        self._settings = settings
        with _translated("produce", settings):
            self._producer: Any = KafkaProducer(
                **_client_options(settings),
                acks="all",
                enable_idempotence=True,
                max_request_size=_REQUEST_BYTES_MAX,
                linger_ms=5,
                metrics_enabled=False,
            )
        self._pending: list[tuple[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; what was not flushed may be lost."""
        with suppress(KafkaError):
            self._producer.close(timeout=_FLUSH_SECONDS)

    def send(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers = ()) -> None:
        """Hand a message over; :meth:`flush` tells whether it arrived.

        Raises:
            MessageTooLarge: it is beyond what any broker takes.
        """
        with _translated(f"topic={topic}", self._settings):
            self._pending.append((topic, self._producer.send(topic, key=key, value=value, headers=list(headers))))

    def flush(self) -> None:
        """Wait until everything sent has been written by all replicas asked for.

        Raises:
            MessageTooLarge, TopicError, BrokerError: at least one message was not.
        """
        pending, self._pending = self._pending, []
        with _translated("produce", self._settings):
            self._producer.flush(timeout=_FLUSH_SECONDS)
        for topic, future in pending:
            with _translated(f"topic={topic}", self._settings):
                future.get(timeout=_FLUSH_SECONDS)


def abandon(writer: TopicWriter) -> None:
    """Hang up without waiting for what was not acknowledged: the broker has broken off, or nobody wants to wait."""
    producer = writer._producer  # noqa: SLF001 - the one place beside the class
    # Its close() flushes first, and so waits for a broker that is gone; the sender gives up when it is told to.
    if (sender := getattr(producer, "_sender", None)) is not None:
        sender.force_close()
    with suppress(KafkaError):
        producer.close(timeout=_ABANDON_SECONDS)


def delete_before(settings: KafkaSettings, topic: str, offsets: Mapping[int, int]) -> dict[int, int]:
    """Delete messages below these offsets, by partition (DeleteRecords); returns the first offset each now holds.

    They are no longer given to anybody at once; a broker frees their disk space when a whole segment is below.

    Raises:
        BrokerAuthError: the user may not delete.
        BrokerError: the broker refuses, or cannot delete.
    """
    wanted = {TopicPartition(topic, partition): offset for partition, offset in offsets.items()}
    if not wanted:
        return {}
    with _admin(settings, f"topic={topic}: delete") as admin:
        done = admin.delete_records(wanted, timeout_ms=_ANSWER_MS)
    return {part.partition: answer["low_watermark"] for part, answer in done.items()}


def offsets_at(settings: KafkaSettings, topic: str, partitions: Sequence[int], time_ms: int) -> dict[int, int]:
    """By partition, the offset of the first message of this time (ms since 1970) or later, else of the next to come.

    Raises:
        BrokerError: the broker cannot be asked.
    """
    with TopicReader(settings, topic) as reader:
        bounds = reader.bounds(partitions)
        with _translated(f"topic={topic}", settings):
            found = reader._consumer.offsets_for_times(  # noqa: SLF001 - the one place beside the class
                {TopicPartition(topic, partition): time_ms for partition in partitions}
            )
    return {
        part.partition: bounds[part.partition][1] if at is None else max(at.offset, bounds[part.partition][0])
        for part, at in found.items()
    }
