"""Where reading starts: decided from what is committed, never from what a consumer group once committed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ingest.broker import TopicInfo
    from ingest.ownership import Owners


@dataclass(frozen=True)
class Start:
    """The topic's name, offsets to read from by partition, and what an operator should hear about.

    `gaps`: how many offsets of a partition the topic has dropped before they were read (retention).
    """

    incarnation: str
    offsets: Mapping[int, int]
    gaps: Mapping[int, int]


def _continues(
    owners: Owners, info: TopicInfo, reached: Mapping[int, int], bounds: Mapping[int, tuple[int, int]]
) -> bool:
    """Whether this is the topic that was read before."""
    if not owners.incarnation or owners.topic != info.name:
        return False
    if info.topic_id is not None and not owners.incarnation.startswith(info.topic_id):
        return False
    return all(p in bounds and bounds[p][1] >= end for p, end in reached.items())


def incarnation_of(
    info: TopicInfo,
    owners: Owners,
    reached: Mapping[int, int],
    bounds: Mapping[int, tuple[int, int]],
    *,
    marks_agree: bool = True,
) -> str:
    """The topic's name: the one it had, or a new one if it was deleted and made anew, or lost messages.

    `reached` is how far the topic of the known name has been read, `bounds` are first and next offset by partition.
    A broker without topic ids is recognised by offsets that went back, and by `marks_agree`: whether the last message
    read is still the one at its offset.
    """
    if marks_agree and _continues(owners, info, reached, bounds):
        return owners.incarnation
    name = info.topic_id or "local"
    # The count makes the name unique, also when offsets of one topic went back.
    used = info.topic_id is None or owners.incarnation.startswith(name)
    return f"{name}.{owners.renewals + 1}" if used else name


def plan_start(incarnation: str, reached: Mapping[int, int], bounds: Mapping[int, tuple[int, int]]) -> Start:
    """Continue each partition of `bounds` where its blocks end; one never read starts at what the topic holds."""
    offsets, gaps = {}, {}
    for partition, (first, _) in bounds.items():
        wanted = reached.get(partition, first)
        offsets[partition] = max(wanted, first)
        if first > wanted:
            gaps[partition] = first - wanted
    return Start(incarnation, offsets, gaps)
