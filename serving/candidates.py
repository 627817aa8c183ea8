"""The candidate that waits for a person, resident on demand: for an approver's question, for a canary, for shadow.

A candidate is believed by its signed documents alone, as a promotion believes it: a verdict that says passed and a
receipt with a finite epsilon, both about the very adapter that is loaded, whose sha256 is checked against its content.
It is loaded under a name of its own, so that no model name under /v1 reaches it, and forgotten when it waits no more,
or when nobody asked for a while.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from privacy.errors import PrivacyError
from registry.errors import RegistryError
from registry.states import STAGING, ModelVersion, State
from serving.cache import LocalCache
from serving.engine import Engine
from serving.errors import ServingError, SwapError
from serving.swap import Served

# An approver reads between two questions; an adapter costs memory.
IDLE_SECONDS = 600.0
# What could not be loaded is tried again after this long: it may be mended in the registry.
RETRY_SECONDS = 30.0

log = structlog.get_logger()

Seen = Callable[[], Sequence[ModelVersion] | None]
"""The versions of the newest look at the registry; None before the first."""


class Candidates:
    """Keeps candidates of one stream resident, beside the live version, in the same engine.

    Args:
        stream: its name.
        engine: holds the adapters.
        seen: the registry's versions.
        prove: the adapter sha256 a version's signed documents are about; raises RegistryError where they do not hold.
        fetch: downloads the adapter of a version into a folder; returns it.
        cache: folder of what the stream's server keeps on disk.
        idle_seconds: how long nobody may ask before a candidate is forgotten.
    """

    def __init__(
        self,
        stream: str,
        engine: Engine,
        *,
        seen: Seen,
        prove: Callable[[ModelVersion], str],
        fetch: Callable[[int, Path], Path],
        cache: Path,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self.stream = stream
        self.engine = engine
        self.seen, self._prove, self._fetch = seen, prove, fetch
        self._cache = LocalCache(cache, stream)
        self._idle_seconds = idle_seconds
        self._used_at: dict[Served, float] = {}  # what is resident
        self._leases: Counter[Served] = Counter()
        self._failed: tuple[str, str, float] | None = None  # adapter, why, until when
        self._lock = threading.Lock()  # guards _used_at and _leases
        self._loading = threading.Lock()  # one is loaded at a time

    def waiting(self, version: int | None = None) -> ModelVersion | None:
        """The candidate that waits, the newest if several do; or one of them by its number."""
        found = [v for v in self.seen() or () if v.stage == STAGING and v.state is State.CANDIDATE]
        if version is not None:
            found = [v for v in found if v.version == version]
        return max(found, key=lambda v: v.version, default=None)

    def hold(self, version: ModelVersion) -> Served:
        """Make a candidate resident. Takes seconds when it is not.

        Raises:
            SwapError: its documents do not hold, or its adapter is not the one they are about.
            EngineError: the engine cannot load it.
        """
        try:
            sha = self._prove(version)
        except (RegistryError, PrivacyError) as error:
            raise SwapError(str(error)) from error
        name = f"{self.stream}@{version.version}"
        # Not the name it gets when it is live: an engine may keep what it computed by a name.
        served = Served(self.stream, version.version, name, f"{name}.waits.{sha[:12]}", sha)
        with self._loading:
            if served not in self._used_at:
                self._load(served)
            with self._lock:
                self._used_at[served] = time.monotonic()
        return served

    @contextmanager
    def lease(self, served: Served, *, used: bool = True) -> Iterator[Served]:
        """Keep a candidate resident until one answer is over.

        Args:
            served: what `hold` gave.
            used: whether somebody asked for it: then it stays for a while.

        Raises:
            SwapError: it was forgotten meanwhile.
        """
        with self._lock:
            if served not in self._used_at:
                raise SwapError(f"{served.name}: is no longer resident; ask again")
            self._leases[served] += 1
            if used:
                self._used_at[served] = time.monotonic()
        try:
            yield served
        finally:
            with self._lock:
                self._leases[served] -= 1
                if not self._leases[served]:
                    del self._leases[served]

    def release(self, needed: Collection[Served] = ()) -> None:
        """Forget what neither waits nor is asked any more, and is not needed; answers on it finish first."""
        waiting = {v.version for v in self.seen() or () if v.stage == STAGING and v.state is State.CANDIDATE}
        now = time.monotonic()
        with self._lock:
            gone = [
                served
                for served, used_at in self._used_at.items()
                if served not in needed
                and not self._leases[served]
                and (served.version not in waiting or now - used_at > self._idle_seconds)
            ]
            for served in gone:
                del self._used_at[served]
        for served in gone:
            self.engine.unload(str(served.adapter))

    def state(self) -> dict[str, Any]:
        """JSON: which waits, which are resident."""
        waits = self.waiting()
        return {"waiting": waits.version if waits else None, "resident": [served.name for served in self._used_at]}

    def _load(self, served: Served) -> None:
        """Fetch, check, load, probe.

        Raises:
            SwapError, EngineError: then nothing is resident.
        """
        sha = served.adapter_sha256
        if self._failed and self._failed[0] == sha and time.monotonic() < self._failed[2]:
            raise SwapError(self._failed[1])
        try:
            folder = self._cache.adapter(sha) or self._cache.take(sha, lambda dest: self._fetch(served.version, dest))
            self.engine.load(str(served.adapter), folder)
            try:
                self.engine.probe(served.adapter)
            except ServingError:
                self.engine.unload(str(served.adapter))
                raise
        except ServingError as error:
            self._failed = (sha, str(error), time.monotonic() + RETRY_SECONDS)
            raise
        log.info("candidate loaded", stream=self.stream, version=served.name)
