"""How far a stream's sealed blocks are behind its topic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidegate.wiring import Service


@dataclass(frozen=True)
class Lag:
    """Offsets of a topic, by partition, that are in no sealed block yet: those a block collects now are among them."""

    behind: tuple[tuple[int, int], ...]

    @property
    def offsets(self) -> int:
        """Over all partitions."""
        return sum(count for _, count in self.behind)


def look(service: Service, stream: str) -> Lag | None:
    """What the topic holds against what the blocks account for; None where there is no topic yet.

    Raises:
        BrokerError: the broker cannot be asked; the message says why within seconds.
    """
    from ingest.broker import TopicReader, check, describe_topic

    kafka, topic = service.kafka(), service.stream(stream).topic
    check(kafka)
    info = describe_topic(kafka, topic)
    if info is None:
        return None
    repo = service.repository()
    reached = repo.frontier(stream).get(repo.ownership(stream).read().incarnation, {})
    with TopicReader(kafka, topic) as reader:
        bounds = reader.bounds(info.partitions)
    return Lag(tuple((part, end - max(first, reached.get(part, first))) for part, (first, end) in bounds.items()))
