"""Where reading starts: decided from the manifests, never from what a consumer group once committed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ingest.broker import TopicInfo
    from ingest.lane import LaneHead
    from ingest.manifest import Manifest


@dataclass(frozen=True)
class Start:
    """Offsets to read from, and what an operator should hear about.

    `gaps`: partitions whose next messages the topic has dropped before they were read (retention).
    `renewed`: the topic was deleted and made anew, or lost messages: it is read from its beginning,
    and what is known already counts as duplicate.
    """

    incarnation: str
    offsets: dict[int, int]
    gaps: frozenset[int]
    renewed: bool


def _continues(last: Manifest, info: TopicInfo, bounds: Mapping[int, tuple[int, int]], marks_agree: bool) -> bool:
    """Whether this is the topic the last block was read from."""
    if last.topic != info.name or not marks_agree:
        return False
    if info.topic_id is not None and not last.incarnation.startswith(info.topic_id):
        return False
    return all(p in bounds and bounds[p][1] >= end for p, end in last.next_offsets.items())


def plan_start(
    info: TopicInfo, head: LaneHead, bounds: Mapping[int, tuple[int, int]], *, marks_agree: bool = True
) -> Start:
    """Continue after the newest manifest, or begin with a new incarnation of the topic.

    `bounds` are first and next offset by partition. A broker without topic ids is recognised by offsets that went back,
    and by `marks_agree`: whether the last message read is still the one at its offset.
    """
    first = {partition: bound[0] for partition, bound in bounds.items()}
    last = head.last
    if last is not None and _continues(last, info, bounds, marks_agree):
        wanted = {p: last.next_offsets.get(p, first[p]) for p in bounds}
        gaps = frozenset(p for p in last.next_offsets if first[p] > wanted[p])
        return Start(last.incarnation, {p: max(wanted[p], first[p]) for p in bounds}, gaps, renewed=False)
    # The sequence number makes the name unique, also when offsets of one topic went back.
    name = info.topic_id or "local"
    used = last is not None and last.incarnation.startswith(name)
    incarnation = f"{name}.{head.seq_next}" if used or info.topic_id is None else name
    return Start(incarnation, first, frozenset(), renewed=last is not None)
