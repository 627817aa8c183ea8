"""Rate limits of one key: requests and tokens a minute, each a token bucket that starts full.

A bucket holds a minute's worth and fills evenly, so that a burst is allowed and the average is held. What answers may
cost at most is taken when they are asked for, and what they did not use is given back when they end. Buckets live in
the process: several servers behind one router each hold their own.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from serving.errors import TooFast

_MINUTE_S = 60.0


class Limits:
    """What one key may use.

    Args:
        requests_per_minute: 0 is no limit.
        tokens_per_minute: 0 is no limit.
        clock: seconds that only grow.
    """

    def __init__(
        self, requests_per_minute: int = 0, tokens_per_minute: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.asked = (requests_per_minute, tokens_per_minute)
        self._lock = threading.Lock()
        self._buckets = {
            kind: _Bucket(limit, clock) for kind, limit in zip(("requests", "tokens"), self.asked, strict=True) if limit
        }

    def take(self, kind: str, amount: int) -> None:
        """Use some of a bucket, or nothing of it.

        Args:
            kind: `requests` or `tokens`.
            amount: how many.

        Raises:
            TooFast: there is not enough left now, or there never is so much.
        """
        bucket = self._buckets.get(kind)
        if bucket is None:
            return
        with self._lock:
            wait_s = bucket.wait_s(amount)
            if wait_s == 0:
                bucket.take(amount)
                return
        limit = f"Rate limit reached for {kind} per min: Limit {bucket.limit}, Requested {amount}"
        if math.isinf(wait_s):
            raise TooFast(f"{limit}: is more than a minute's; ask for less at a time", kind, None, self.headers())
        raise TooFast(f"{limit}. Please try again in {wait_s:.3f}s", kind, wait_s, self.headers())

    def give_back(self, kind: str, amount: int) -> None:
        """Return what was taken and not used; a negative amount takes more."""
        bucket = self._buckets.get(kind)
        if bucket is not None:
            with self._lock:
                bucket.take(-amount)

    def headers(self) -> dict[str, str]:
        """OpenAI's x-ratelimit headers, for the limits there are."""
        found = {}
        with self._lock:
            for kind, bucket in self._buckets.items():
                found[f"x-ratelimit-limit-{kind}"] = str(bucket.limit)
                found[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.left())))
                found[f"x-ratelimit-reset-{kind}"] = _duration(bucket.full_in_s())
        return found


class _Bucket:
    """Not safe between threads by itself."""

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._clock = clock
        self._left = float(limit)
        self._at_s = clock()

    def left(self) -> float:
        """What may be used now; below nought where answers took more than was thought."""
        now_s = self._clock()
        self._left = min(self.limit, self._left + (now_s - self._at_s) * self.limit / _MINUTE_S)
        self._at_s = now_s
        return self._left

    def take(self, amount: float) -> None:
        """Use some; below nought gives back."""
        self._left = min(self.limit, self.left() - amount)

    def wait_s(self, amount: float) -> float:
        """Seconds until so much is there; 0: it is; infinite: it never will be."""
        if amount > self.limit:
            return math.inf
        return max(0.0, (amount - self.left()) * _MINUTE_S / self.limit)

    def full_in_s(self) -> float:
        """Seconds until the bucket is full."""
        return (self.limit - self.left()) * _MINUTE_S / self.limit


def _duration(seconds: float) -> str:
    """As OpenAI writes it: `120ms`, `1.5s`, `1m2s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < _MINUTE_S:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"
