"""Which lane may write which partition: a small map in git, moved by compare-and-swap.

A consumer group tells each process its partitions, but a process that slept through a rebalance still believes the old
assignment. So a lane that is given a partition

    1. writes its name before the last holder's into the map (one swap: two takers cannot both succeed unseen),
    2. moves the last holder's ref by an empty commit, so that whatever block it was making can no longer be committed,
    3. takes the last holder's name out of the map, and only then asks how far the partition has been read.

Killed in between, the next taker finds both names and moves both refs. A lane reads its own head before step 1:
a commit on top of that head proves that nobody took anything from it since.
(Fencing as in Kleppmann, "How to do distributed locking", 2016, and the epochs of KIP-98.)
"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ingest.errors import LaneConflict, RepositoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ingest.gitstore import GitStore

OWNER_REFS: Final = "refs/tidegate/owners/"
_FILE: Final = "owners.json"
# As many as there are processes of a stream may swap at once; each try takes milliseconds.
_TRIES: Final = 200


@dataclass(frozen=True)
class Owners:
    """The map as committed.

    `holders`: partition to the lanes that may have a block with it under way, the rightful one first.
    `incarnation`: the name of the topic as it is now; `renewals` counts its names.
    """

    commit: str | None = None
    topic: str = ""
    incarnation: str = ""
    renewals: int = 0
    holders: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """As it stands in git."""
        value = {
            "topic": self.topic,
            "incarnation": self.incarnation,
            "renewals": self.renewals,
            "holders": {str(p): list(self.holders[p]) for p in sorted(self.holders)},
        }
        return (json.dumps(value, indent=1) + "\n").encode()

    def held_by(self, lane: str) -> set[int]:
        """Partitions that are rightfully this lane's."""
        return {p for p, lanes in self.holders.items() if lanes[:1] == (lane,)}


class Ownership:
    """A stream's map. Safe to use from several processes."""

    def __init__(self, git: GitStore, stream: str, lane_refs: str) -> None:
        self._git = git
        self._ref = OWNER_REFS + stream
        self._lane_refs = lane_refs

    def read(self) -> Owners:
        """The map as it is now."""
        commit = self._git.head(self._ref)
        data = None if commit is None else self._git.read(commit, _FILE)
        if data is None:
            return Owners(commit)
        try:
            value = json.loads(data)
            holders = {int(p): tuple(lanes) for p, lanes in value["holders"].items()}
            return Owners(commit, value["topic"], value["incarnation"], value["renewals"], holders)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RepositoryError(f"{self._ref}: {error}; restore the data repository from its backup") from None

    def renew(self, seen: Owners, topic: str, incarnation: str) -> None:
        """Give the topic a new name, unless another lane has changed the map since `seen`.

        Lanes that hold partitions stay named: they have blocks of the old topic under way.
        """
        new = Owners(seen.commit, topic, incarnation, seen.renewals + 1, seen.holders)
        with suppress(LaneConflict):
            self._write(new, f"Name the topic {incarnation}")

    def take(self, lane: str, partitions: Collection[int]) -> Owners:
        """Make partitions this lane's, and keep every other lane that held one from committing what it has under way.

        Raises:
            LaneConflict: the map moved too often while trying.
        """

        def first(holders: dict[int, tuple[str, ...]]) -> None:
            for p in partitions:
                holders[p] = (lane, *(other for other in holders.get(p, ()) if other != lane))

        owners = self._change(first, f"{lane} takes {_named(partitions)}")
        others = {other for p in partitions for other in owners.holders[p] if other != lane}
        for other in sorted(others):
            self._fence(other, lane)

        def alone(holders: dict[int, tuple[str, ...]]) -> None:
            for p in partitions:
                holders[p] = tuple(name for name in holders.get(p, ()) if name not in others)

        return self._change(alone, f"{lane} holds {_named(partitions)}") if others else owners

    def release(self, lane: str, partitions: Collection[int]) -> None:
        """Say that this lane has no block with these partitions under way, so that their next owner need not fence it.

        Raises:
            LaneConflict: the map moved too often while trying.
        """

        def without(holders: dict[int, tuple[str, ...]]) -> None:
            for p in partitions:
                holders[p] = tuple(name for name in holders.get(p, ()) if name != lane)

        self._change(without, f"{lane} gives up {_named(partitions)}")

    def fence_others(self, lane: str, lanes: Iterable[str]) -> None:
        """Keep every other lane from committing the block it has under way; each then starts over from the manifests.

        `lanes` are those with blocks; one that makes its first is in the map.

        Raises:
            LaneConflict: a lane's ref moved too often while trying.
        """
        holders = {other for names in self.read().holders.values() for other in names}
        for other in sorted((holders | set(lanes)) - {lane}):
            self._fence(other, lane)

    def _change(self, change: Callable[[dict[int, tuple[str, ...]]], None], message: str) -> Owners:
        for _ in range(_TRIES):
            seen = self.read()
            holders = dict(seen.holders)
            change(holders)
            if holders == dict(seen.holders):
                return seen
            with suppress(LaneConflict):
                return self._write(Owners(seen.commit, seen.topic, seen.incarnation, seen.renewals, holders), message)
        raise LaneConflict(f"{self._ref}: moved {_TRIES} times while changing it; is a process restarted in a loop?")

    def _write(self, owners: Owners, message: str) -> Owners:
        commit = self._git.commit(self._ref, owners.commit, message, files={_FILE: owners.to_json()})
        return Owners(commit, owners.topic, owners.incarnation, owners.renewals, owners.holders)

    def _fence(self, lane: str, by: str) -> None:
        ref = self._lane_refs + lane
        for _ in range(_TRIES):
            with suppress(LaneConflict):
                self._git.commit(ref, self._git.head(ref), f"{by} took partitions of {lane}")
                return
        raise LaneConflict(f"{ref}: moved {_TRIES} times while fencing it; is a process restarted in a loop?")


def _named(partitions: Iterable[int]) -> str:
    return "partitions " + ", ".join(str(p) for p in sorted(partitions))
