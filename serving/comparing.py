"""Is the canary worse than live? A sequence of exact tests whose false alarms are bounded over all of them together.

Who answers a request is drawn at random, whatever the request. So if the canary is no worse, its label is shuffled over
what was seen, and the number of canaries among those that failed, or among the slowest, is hypergeometric: Fisher's
exact test, one-sided (Fisher 1935). A unit of the shuffle is what was drawn: a request, or a user whose requests all go
the same way; a user with a thousand requests is one unit.

    errors   units with a failed answer
    slower   the slower half, after the canary's times were divided by `latency_ratio`
    slowest  the slowest tenth, the same way, and the slowest fiftieth: a few very slow answers move no median

The division makes the null hypothesis `not slower by more than that factor`: smaller canary times only lower the count.
Looking again and again finds something in the end: so the i-th window, its j-th look and each of the four tests get
the share 1/(i(i+1)) * 1/(j(j+1)) * 1/4 of `false_alarm`. These add up to 1, so that the chance to step back from a
canary that is not worse is at most `false_alarm`, however long it runs (union bound). When looks happen follows the
number of requests alone, never what was seen. Windows begin anew, so that good days do not hide a bad hour.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

# Each look sees a quarter more than the one before: waiting costs at most that, and the share of a look falls slowly.
LOOK_GROWTH = 1.25
# A window is this many first looks long, then it begins anew.
WINDOW_LOOKS = 25
# Of a window's requests: bounds the memory when the share is tiny.
WINDOW_REQUESTS_MAX = 50_000
TESTS = 4
# Failed answers of the canary in a row, while live failed none: no statistics needed.
FAILED_RUN = 5


@dataclass(frozen=True)
class Rules:
    """When a canary is worse.

    Attributes:
        false_alarm: the chance to step back from a canary that is not worse, over its whole life.
        requests_min: of the canary, expected at the first look.
        latency_ratio: slower by no more than this factor is not worse.
    """

    false_alarm: float = 0.01
    requests_min: int = 20
    latency_ratio: float = 1.2


@dataclass
class _Unit:
    requests: int = 0
    failed: int = 0
    seconds: float = 0.0  # of those that did not fail


class Watch:
    """What was seen of one canary beside live. Safe over threads.

    Args:
        share: of requests that it gets.
        rules: when it is worse.
    """

    def __init__(self, share: float, rules: Rules) -> None:
        self._rules = rules
        self._first = math.ceil(rules.requests_min / share)
        self._window_requests = min(WINDOW_LOOKS * self._first, max(WINDOW_REQUESTS_MAX, self._first))
        self._window = self._looks = self._requests = self._due = 0
        self._units: dict[bool, dict[Hashable, _Unit]] = {}
        self._failed_run = 0
        self.counts = {"canary": [0, 0], "live": [0, 0]}  # requests, failed
        self._lock = threading.Lock()
        self._begin_window()

    def saw(self, *, canary: bool, unit: Hashable, drawn: bool, ok: bool, seconds: float) -> None:
        """One request that was answered, or failed.

        Args:
            canary: who answered.
            unit: what was drawn for.
            drawn: whether by lot; what a client chose for itself tells nothing and is only counted.
            ok: whether it was answered.
            seconds: from the request to the last of its answer.
        """
        with self._lock:
            count = self.counts["canary" if canary else "live"]
            count[0] += 1
            count[1] += not ok
            self._note_run(canary=canary, ok=ok)
            if drawn:
                self._requests += 1
                seen = self._units[canary].setdefault(unit, _Unit())
                seen.requests += 1
                seen.failed += not ok
                seen.seconds += seconds if ok else 0.0

    def look(self) -> str | None:
        """What is worse, in a sentence; None when nothing is, or it is not time to look."""
        with self._lock:
            if self._failed_run >= FAILED_RUN:
                return f"{self._failed_run} of its answers failed in a row, while live failed none"
            if self._requests < self._due:
                return None
            units = {side: [_Unit(u.requests, u.failed, u.seconds) for u in self._units[side].values()]
                     for side in (True, False)}  # fmt: skip
            self._looks += 1
            level = self._rules.false_alarm / self._window / (self._window + 1) / self._looks / (self._looks + 1)
            self._due = math.ceil(self._requests * LOOK_GROWTH)
            if self._requests >= self._window_requests:
                self._begin_window()
        return worse(units[True], units[False], level, self._rules.latency_ratio)

    def _note_run(self, *, canary: bool, ok: bool) -> None:
        if canary:
            self._failed_run = 0 if ok else self._failed_run + 1
        elif not ok:
            self._failed_run = 0

    def _begin_window(self) -> None:
        self._window += 1
        self._looks = 0
        self._requests = 0
        self._due = self._first
        self._units = {True: {}, False: {}}


def worse(canary: Sequence[_Unit], live: Sequence[_Unit], level: float, latency_ratio: float) -> str | None:
    """One look: what the canary does worse than live by chance at most `level` of the time, or None."""
    failed, live_failed = sum(u.failed > 0 for u in canary), sum(u.failed > 0 for u in live)
    p = p_at_least(failed, len(canary) + len(live), failed + live_failed, len(canary))
    if p <= level / TESTS:
        return (
            f"more answers fail: for {failed} of {len(canary)} users or requests, for {live_failed} of {len(live)} on "
            f"live (p={p:.1g})"
        )
    times = [u.seconds / (u.requests - u.failed) for u in canary if u.requests > u.failed]
    live_times = [u.seconds / (u.requests - u.failed) for u in live if u.requests > u.failed]
    scaled = [seconds / latency_ratio for seconds in times]
    for share, name in ((0.5, "half"), (0.1, "tenth"), (0.02, "fiftieth")):
        found = _among_slowest(scaled, live_times, share)
        if found is not None and found[0] <= level / TESTS:
            p, among = found
            return (
                f"answers are slower by more than {latency_ratio:g}: {among} of {len(times)} are among the slowest "
                f"{name}; median {_median(times):.3f} s, {_median(live_times):.3f} s on live (p={p:.1g})"
            )
    return None


def _among_slowest(canary: Sequence[float], live: Sequence[float], share: float) -> tuple[float, int] | None:
    """How likely chance puts so many canaries among the slowest, and how many there are; ties are all among them."""
    pooled = sorted((*canary, *live), reverse=True)
    if not canary or not live:
        return None
    bound = pooled[math.ceil(share * len(pooled)) - 1]
    among = sum(seconds >= bound for seconds in canary)
    slowest = among + sum(seconds >= bound for seconds in live)
    return p_at_least(among, len(pooled), slowest, len(canary)), among


def p_at_least(count: int, of: int, marked: int, drawn: int) -> float:
    """The chance that `drawn` of `of` things, `marked` of them marked, have at least `count` marked ones among them."""
    if count <= max(drawn + marked - of, 0):
        return 1.0
    whole = _log_choose(of, drawn)
    logs = [
        _log_choose(marked, hit) + _log_choose(of - marked, drawn - hit) - whole
        for hit in range(count, min(marked, drawn) + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def _log_choose(of: int, some: int) -> float:
    return math.lgamma(of + 1) - math.lgamma(some + 1) - math.lgamma(of - some + 1)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else math.nan
