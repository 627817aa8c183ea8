"""What replicas say about themselves, and which version of a stream all of them are sent requests for.

A replica is a server of its own that follows the registry by itself. For a while it goes on answering with the version
that it had before, where a router names that (a pin): so all replicas can change at one moment, the router's.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Names the version to answer with, and proves that the router asks; clients cannot send either.
PIN_HEADER = "x-tidegate-pin"
ROUTER_HEADER = "x-tidegate-router"
# On an answer that was not begun: another replica may be asked the same, and why.
ELSEWHERE_HEADER = "x-tidegate-elsewhere"
# So long one replica may lack a version that another has. Loading takes seconds; a replica that needs longer would hold
# back a rollback of all.
SETTLE_S = 10.0


def router_token(answer_key: bytes) -> str:
    """What a router shows its replicas: they share the key of the answer ids anyway."""
    return hmac.new(answer_key, b"tidegate router v1", hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Said:
    """What one replica says about one stream it can answer for.

    Attributes:
        pin: the version that is current there.
        name: the same as answers are labelled, `stream@7`.
        seq: the approval that was followed to it; 0 for the bare base.
        held: pins it answers with, the current one included.
    """

    pin: str
    name: str
    version: int
    seq: int
    held: frozenset[str]
    state: Mapping[str, Any] = field(default_factory=dict, compare=False)


def said_of(state: Mapping[str, Any]) -> dict[str, Said]:
    """The streams a replica can answer for, out of its `/tidegate/state`.

    Raises:
        KeyError, TypeError, ValueError: this is no such state.
    """
    return {
        stream: Said(
            pin=str(told["pin"]),
            name=str(told["version"]),
            version=int(told["number"]),
            seq=int(told["approval_seq"]),
            held=frozenset(map(str, told["held"])),
            state=told,
        )
        for stream, told in state["streams"].items()
        if told["pin"] and told["healthy"]
    }


class Agreement:
    """The one version of a stream that gets all traffic; it moves from decision to later decision and never back.

    It moves when every healthy replica holds the later one; or when some has for `settle_s` and others do not come
    after: they get no traffic until they do. A version that nobody holds any more is left at once, and for the bare
    base, chosen by hand, at the first replica that says so.

    Args:
        stream: its name.
        floor: the latest decision that ever got traffic, by its place in the history; what is kept on disk.
        settle_s: patience with replicas that lack what others have.
    """

    def __init__(self, stream: str, *, floor: int = 0, settle_s: float = SETTLE_S) -> None:
        self.stream = stream
        self.floor = floor
        self.traffic: Said | None = None
        self._settle_s = settle_s
        self._since = math.inf  # when somebody was first seen to be ahead

    def next(self, said: Mapping[str, Said], now_s: float) -> Said | None:
        """The version traffic should move to; None when it should stay.

        Args:
            said: by healthy replica.
            now_s: on a monotonic clock.
        """
        traffic = self.traffic
        ahead = sorted(
            (one for one in said.values() if one.seq >= self.floor and not (traffic and one.pin == traffic.pin)),
            key=lambda one: (one.seq, -one.version),
        )
        ahead = [one for one in ahead if traffic is None or self._overtakes(one, said)]
        if not ahead:
            self._since = math.inf
            return None
        if self._since == math.inf:
            self._since = now_s
        if traffic and traffic.version and (bare := [one for one in ahead if not one.version]):
            return bare[-1]
        shared = [one for one in ahead if all(one.pin in other.held for other in said.values())]
        if shared:
            return shared[-1]
        lost = traffic is None or not any(traffic.pin in other.held for other in said.values())
        return ahead[-1] if lost or now_s - self._since >= self._settle_s else None

    def move(self, to: Said) -> None:
        """From now on this version gets the traffic."""
        self.traffic, self.floor, self._since = to, max(self.floor, to.seq), math.inf

    def confirm(self, said: Mapping[str, Said]) -> None:
        """Take note of a later decision for the version that has the traffic already."""
        if self.traffic:
            seqs = [one.seq for one in said.values() if one.pin == self.traffic.pin]
            self.floor = max(self.floor, *seqs, 0)

    def complete(self, said: Mapping[str, Said]) -> bool:
        """Whether every healthy replica runs what gets the traffic."""
        return self.traffic is not None and bool(said) and all(one.pin == self.traffic.pin for one in said.values())

    def behind(self, said: Mapping[str, Said]) -> list[str]:
        """Healthy replicas that cannot answer with it, and so get no traffic."""
        return [name for name, one in said.items() if self.traffic is None or self.traffic.pin not in one.held]

    def _overtakes(self, one: Said, said: Mapping[str, Said]) -> bool:
        """A later decision; or under the same one the bare base, or back from it when nobody is on it any more."""
        if one.seq > self.floor or not one.version:
            return True
        return self.traffic is not None and all(other.pin != self.traffic.pin for other in said.values())
