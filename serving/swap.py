"""Hot swap: what the registry wants and a person signed is what answers, without a restart.

Poll → check the signed approval → fetch → check the sha256 → load under a name of its own → probe → remember on disk →
flip one reference → acknowledge; the old one drains and is evicted later. Whatever fails leaves the live version
answering and stands as one alarm. Approvals are followed in the order they were signed: the highest `seq` ever followed
is kept on disk, so that an old approval brings no old version back.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from privacy.signing import TrustedKeys
from serving.alarms import Alarm, Alarms
from serving.approval import Approval, Wanted, check_wanted, read_approval
from serving.cache import LocalCache, write_emergency
from serving.engine import Engine
from serving.errors import Ambiguous, ApprovalRefused, NotReady, ServingError, SwapError, VersionElsewhere
from serving.killswitch import KillSwitch
from serving.question import NoAnswerYet, Question

if TYPE_CHECKING:
    from serving.delivery import Delivery

__all__ = ["HotSwap", "Served", "Wanted", "write_emergency"]

# What failed is tried again when the registry wants something else, and anyway after this long: it may be mended there.
RETRY_SECONDS = 30.0
# The registry is waited for so long at a time, so that one that hangs holds up no emergency; it is asked on meanwhile.
ANSWER_SECONDS = 0.3
# So long it may take to answer before that is an alarm.
SILENT_SECONDS = 5.0
# What was found wrong by the registry's last answer, and stays so until the next.
_BY_REGISTRY = frozenset({"registry", "production", "ambiguous", "approval", "adapter"})
# So long a version that was live can still be asked for by name: a router does until every replica has the new one.
PIN_SECONDS = 60.0
# At most so many of them: stages that flap must not fill the memory.
LEFT_MAX = 4
# Leases taken in the last moment of that time are under way when eviction looks.
PIN_GRACE_SECONDS = 5.0
# Of the files of resident adapters, the live one among them: going back to one of them needs no loading.
RESIDENT_MB = 256.0
# However small they are: an engine behind HTTP has so many places at least, and going further back may take a second.
RESIDENT_MAX = 16

log = structlog.get_logger()


@dataclass(frozen=True)
class Served:
    """A version that can answer. Each request holds one from beginning to end.

    Attributes:
        version: the registered version, 0 for the bare base.
        name: `stream@7`, or `stream@base`; what answers are labelled with.
        adapter: its name in the engine, None for the bare base.
        adapter_sha256: empty for the bare base.
    """

    stream: str
    version: int
    name: str
    adapter: str | None
    adapter_sha256: str

    @property
    def pin(self) -> str:
        """Its name among replicas, whatever number a registry that was made anew gives to it."""
        return f"{self.version}:{self.adapter_sha256}"


class HotSwap:
    """Keeps one stream on the version that is wanted.

    Args:
        stream: its name.
        engine: holds the adapters.
        wanted: asks the registry; None when no version is in Production; raises `Ambiguous` when several are, and
            anything else when there is no answer.
        fetch: downloads the adapter of a version into a folder; returns it.
        acknowledge: tells the registry what really answers now.
        trusted: the keys approvals may be signed with.
        cache: folder of what is kept on disk.
        model: the registered model approvals must be for; the stream's name when None.
        open_stream: whether nothing was ever promised to anybody in the stream: else none without privacy answers.
        poll_seconds: pause between two questions to the registry.
        retry_seconds: pause before a version that failed is tried again.
        resident_mb: adapters used last stay in the engine while their files are no larger together; the live one does.
        replica: which of several servers behind a router: what was live there can still be asked for, for a while.
    """

    def __init__(
        self,
        stream: str,
        engine: Engine,
        *,
        wanted: Callable[[], Wanted | None],
        fetch: Callable[[int, Path], Path],
        acknowledge: Callable[[int], object],
        trusted: TrustedKeys,
        cache: Path,
        model: str | None = None,
        open_stream: bool = False,
        poll_seconds: float = 0.5,
        retry_seconds: float = RETRY_SECONDS,
        resident_mb: float = RESIDENT_MB,
        replica: str = "",
    ) -> None:
        self.stream = stream
        self.engine = engine
        self.counts: Counter[str] = Counter()
        self.delivery: Delivery | None = None  # what goes on beside the live version; started and stopped with it
        self._model = model or stream
        self._open_stream = open_stream
        self._wanted = Question(wanted)
        self._fetch, self._acknowledge = fetch, acknowledge
        self._trusted = trusted
        self._cache = LocalCache(cache, stream, replica)
        self.kill_switch = KillSwitch(cache, stream)
        self._replica = replica
        self._poll_seconds, self._retry_seconds = poll_seconds, retry_seconds
        self._alarms = Alarms(stream)
        self._base = Served(stream, 0, f"{stream}@base", None, "")
        self._current: Served | None = None
        self._followed: Approval | None = None
        self._loading = ""
        self._swap_s = 0.0
        self._acknowledged = 0
        self._failed: tuple[Approval, Alarm, float] | None = None
        self._restored = False
        self._restore_at = 0.0  # when what was followed in the last run is tried again, by itself
        self._resident_bytes = resident_mb * 1e6
        self._residents: list[Served] = []  # last used last
        self._sizes: dict[str, int] = {}  # bytes of an adapter's files, by sha256
        self._left: dict[Served, float] = {}  # what was live a moment ago, and until when it was
        self._leases: Counter[Served] = Counter()
        self._lock = threading.Lock()  # guards _current and _leases
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"swap {stream}", daemon=True)

    # For answers

    @property
    def current(self) -> Served | None:
        """What answers now; None until the registry or the cache has said something. The kill switch goes before."""
        return self._base if self.kill_switch.on else self._current

    @contextmanager
    def lease(self, pin: str = "") -> Iterator[Served]:
        """The version one request is answered with; it stays resident until the request is over.

        Args:
            pin: of `state()["held"]`: what a router still sends everybody to; none: what is live here.

        Raises:
            NotReady: nothing is known yet about what to serve.
            VersionElsewhere: `pin` is neither live nor was a moment ago.
        """
        with self._lock:
            served = self.current
            if served is None:
                raise NotReady(f"stream={self.stream}: no version is known yet; the registry must answer once")
            if pin:
                served = next((one for one in self._held() if one.pin == pin), None)
            if served is None:
                raise VersionElsewhere(f"stream={self.stream}: {pin[:80]} is not live here; ask another replica")
            self._leases[served] += 1
        try:
            yield served
        finally:
            with self._lock:
                self._leases[served] -= 1
                if not self._leases[served]:
                    del self._leases[served]

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """What is wrong now."""
        return (*self._alarms.standing, *(self.delivery.alarms if self.delivery else ()))

    @property
    def followed_seq(self) -> int:
        """The newest decision that is followed, by its place in the history; 0 when none is."""
        return self._followed.seq if self._followed else 0

    def state(self) -> dict[str, Any]:
        """JSON for `tidegate status`."""
        current = self.current
        with self._lock:
            in_flight = {served.name: count for served, count in self._leases.items()}
            held = [served.pin for served in self._held()]
        return {
            "version": current.name if current else "nothing",
            "pin": current.pin if current else "",
            "held": held,
            "healthy": self.engine.healthy,
            "number": current.version if current else None,
            "adapter_sha256": current.adapter_sha256 if current else "",
            "guarantee": self._followed.guarantee if self._followed and current and current.version else "",
            "approval_seq": self.followed_seq,
            "killed": self.kill_switch.on,
            "loading": self._loading,
            "swap_s": self._swap_s,
            "resident": [served.name for served in self._residents],
            "in_flight": in_flight,
            "waiting": self.engine.waiting,
            "swaps": dict(self.counts),
            **(self.delivery.state() if self.delivery else {}),
            "alarms": [str(alarm) for alarm in self.alarms],
        }

    # Life

    def start(self) -> None:
        """Take up what the cache knows, then follow the registry on a thread of its own.

        Where the engine is not there yet, that thread takes it up: nobody who looks whether the server lives must wait.
        """
        if self.engine.healthy:
            self.restore()
        self._thread.start()
        if self.delivery:
            self.delivery.start()

    def stop(self) -> None:
        """Stop following; what answers goes on. Idempotent."""
        if self.delivery:
            self.delivery.stop()
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                if not self._restored:
                    self.restore()
                self.tick()
            except Exception:  # a defect here must not freeze the version for good
                log.exception("swap failed", stream=self.stream)
            if self._stopping.wait(self._poll_seconds):
                return

    def restore(self) -> None:
        """Take up the version of the last run from the cache, so that a start needs no registry."""
        self._restored = True
        try:
            signed = self._cache.live()
            if signed is None:
                return
            approval = read_approval(signed, self._trusted, self._model, open_stream=self._open_stream)
            self._followed = approval
            self._become(approval)
            log.info("restored from cache", stream=self.stream, version=approval.version)
        except ServingError as error:
            self._restore_at = time.monotonic() + self._retry_seconds
            self._alarms.settle([Alarm("cache", "", str(error))])

    def _restore_late(self, found: list[Alarm]) -> None:
        """Take up again what could not be at the start, as when the engine was away, or what the engine has lost."""
        if self._followed is None or time.monotonic() < self._restore_at:
            found += [alarm for alarm in self._alarms.standing if alarm.kind == "cache"]
            return
        self._restore_at = time.monotonic() + self._retry_seconds
        self._residents = [served for served in self._residents if served != self._current]
        try:
            self._become(self._followed)
        except ServingError as error:
            found.append(Alarm("cache", "", str(error)))

    def _has(self, served: Served) -> bool:
        """Whether the engine has a version: one that was away may be unable to load it again."""
        return served.adapter is None or served.adapter in self.engine.resident

    # One round of following

    def tick(self) -> None:
        """Ask what is wanted, and become it if that is right. Never raises for what is wrong outside."""
        found: list[Alarm] = []
        approval = self._decide(found)
        if approval is not None:
            self._follow(approval, found)
        if self.kill_switch.on:
            found.append(Alarm("killed", "", self.kill_switch.sentence()))
        if self._current is None or not self._has(self._current):
            self._restore_late(found)
        self._tell(found)
        self._evict()
        self._alarms.settle(found)

    def _decide(self, found: list[Alarm]) -> Approval | None:
        """The approval to follow now: the latest of the registry's and the emergency's; None to stay as it is."""
        emergency = self._emergency(found)
        asked = self._by_registry(found, alone=emergency is None)
        if emergency is None:
            return asked
        if asked is not None and asked.seq > emergency.seq:
            self._cache.end_emergency(emergency.seq)
            return asked
        if asked is None or asked.version != emergency.version:
            message = (
                f"stream={self.stream}: an emergency approval (seq={emergency.seq}) keeps version {emergency.version}; "
                f"when the registry is back: tidegate rollback {self.stream} --to {emergency.version} --why ..."
            )
            found.append(Alarm("emergency", str(emergency.seq), message))
        return emergency

    def _by_registry(self, found: list[Alarm], *, alone: bool) -> Approval | None:
        """The approval of what the registry wants; None when it wants nothing, or what it says does not hold.

        Args:
            found: alarms, to be added to.
            alone: whether it is the registry alone that says what is followed.
        """
        wanted: Wanted | None = None
        try:
            wanted = self._wanted.answer(ANSWER_SECONDS)
            if wanted is not None:
                return check_wanted(wanted, self._trusted, self._model, open_stream=self._open_stream)
            if self._followed is None and alone:
                self._flip(self._base)
            elif alone:
                message = f"model={self._model}: no version is in Production, 1 must be; {self._staying}"
                found.append(Alarm("production", "", message))
        except Ambiguous as error:
            found.append(Alarm("ambiguous", "", f"{error}; {self._staying}"))
        except ApprovalRefused as error:
            found.append(Alarm("approval", str(wanted and wanted.version), f"{error}; {self._staying}"))
        except NoAnswerYet as silence:
            if silence.seconds > SILENT_SECONDS:
                found.append(self._no_registry(silence))
            else:
                found += [alarm for alarm in self._alarms.standing if alarm.kind in _BY_REGISTRY]
        except Exception as error:  # noqa: BLE001 - the caller's function: a registry that is down must not stop answers
            found.append(self._no_registry(error))
        return None

    def _no_registry(self, why: Exception) -> Alarm:
        return Alarm("registry", "", f"model={self._model}: no answer from the registry ({why}); {self._staying}")

    def _emergency(self, found: list[Alarm]) -> Approval | None:
        """The emergency approval, unless it is none, not ours, or overtaken."""
        try:
            signed = self._cache.emergency()
            if signed is None:
                return None
            approval = read_approval(signed, self._trusted, self._model, open_stream=self._open_stream)
        except SwapError as error:
            found.append(Alarm("emergency", "", f"emergency approval: {error}"))
            return None
        if self._followed and approval.seq < self._followed.seq:
            self._cache.end_emergency(approval.seq)
            return None
        return approval

    def _follow(self, approval: Approval, found: list[Alarm]) -> None:
        """Become the approved version, unless it is so already, is out of order, or failed a moment ago."""
        current = self._current
        followed = self._followed
        try:
            if followed and approval.seq < followed.seq:
                raise ApprovalRefused(
                    f"version {approval.version} of {self._model}: its approval seq={approval.seq} must be >= "
                    f"{followed.seq}, the latest followed; an old approval brings no version back: approve it anew"
                )
            same = followed and (approval.version, approval.adapter_sha256) == (
                followed.version,
                followed.adapter_sha256,
            )
            if followed and approval.seq == followed.seq and not same:
                raise ApprovalRefused(
                    f"version {approval.version} of {self._model}: its approval has the seq={approval.seq} of the one "
                    f"for version {followed.version}; the history was changed: see `tidegate history {self.stream}`"
                )
            if current and (current.version, current.adapter_sha256) == (approval.version, approval.adapter_sha256):
                if approval.seq != (followed.seq if followed else 0):
                    self._cache.remember(approval.signed)
                    self._followed = approval
                self._failed = None
                return
        except SwapError as error:
            found.append(Alarm("approval", f"{approval.version}/{approval.seq}", f"{error}; {self._staying}"))
            return
        if self._failed and self._failed[0] == approval and time.monotonic() < self._failed[2]:
            found.append(self._failed[1])
            return
        try:
            self._become(approval)
            self._failed = None
        except ServingError as error:
            alarm = Alarm(
                "adapter", f"{approval.version}/{approval.seq}", f"version {approval.version}: {error}; {self._staying}"
            )
            self._failed = (approval, alarm, time.monotonic() + self._retry_seconds)
            self.counts["failed"] += 1
            found.append(alarm)

    def _become(self, approval: Approval) -> None:
        """Fetch, check, load, probe, remember, flip.

        Raises:
            SwapError, EngineError: then nothing has changed.
        """
        began = time.monotonic()
        served = self._named(approval)
        fresh = served not in self._residents
        self._loading = served.name
        try:
            if fresh:
                folder = self._cache.adapter(approval.adapter_sha256) or self._fetched(approval)
                self.engine.load(str(served.adapter), folder)
                self._sizes[served.adapter_sha256] = sum(file.stat().st_size for file in folder.iterdir())
            try:
                self.engine.probe(served.adapter)
                if self._followed is not approval:
                    self._cache.remember(approval.signed)
            except ServingError:
                if fresh:
                    self.engine.unload(str(served.adapter))
                raise
        finally:
            self._loading = ""
        self._residents = [other for other in self._residents if other != served] + [served]
        self._followed = approval
        old = self._flip(served)
        self.counts["done"] += 1
        self._swap_s = round(time.monotonic() - began, 3)
        log.info("swapped", stream=self.stream, version=served.name, was=old, seq=approval.seq, seconds=self._swap_s)

    def _fetched(self, approval: Approval) -> Path:
        if approval.kind == "emergency":
            raise SwapError(
                f"adapter {approval.adapter_sha256[:12]}: is not in the local cache, must be for an emergency; "
                "choose a version that ran here before"
            )
        return self._cache.take(approval.adapter_sha256, lambda dest: self._fetch(approval.version, dest))

    def _named(self, approval: Approval) -> Served:
        """The version under a name of its own: an engine may keep what it computed by an adapter's name."""
        name = f"{self.stream}@{approval.version}"
        adapter = name
        if any(other.adapter == name and other.adapter_sha256 != approval.adapter_sha256 for other in self._residents):
            adapter = f"{name}.{approval.adapter_sha256[:12]}"  # a registry made anew counts from 1 again
        return Served(self.stream, approval.version, name, adapter, approval.adapter_sha256)

    def _flip(self, served: Served) -> str:
        """The one moment at which new requests change; answers that run keep what they hold."""
        with self._lock:
            old, self._current = self._current, served
            if old and old != served and self._replica:
                self._left.pop(old, None)
                self._left[old] = time.monotonic()
        return old.name if old else "nothing"

    def _tell(self, found: list[Alarm]) -> None:
        """Acknowledge what answers, until the registry has heard it."""
        current = self.current
        if not current or not current.version:
            self._acknowledged = 0  # whatever comes back is told anew
            return
        if self._acknowledged == current.version:
            return
        if any(alarm.kind == "registry" for alarm in found):
            return
        try:
            self._acknowledge(current.version)
            self._acknowledged = current.version
        except Exception as error:  # noqa: BLE001 - the caller's function; it is asked again at the next tick
            message = (
                f"model={self._model}: version {current.version} answers but the registry did not take it ({error}); "
                "it is told again"
            )
            found.append(Alarm("acknowledge", str(current.version), message))

    def _evict(self) -> None:
        """Unload what is neither live, nor answering, nor among the last that fit into the budget."""
        with self._lock:
            ago = time.monotonic() - PIN_SECONDS - PIN_GRACE_SECONDS
            self._left = {one: at for one, at in list(self._left.items())[-LEFT_MAX:] if at > ago}
            busy = {self._current, *self._leases, *self._left}
        kept: list[Served] = []
        used = 0
        for served in reversed(self._residents):
            size = self._sizes[served.adapter_sha256]
            if served in busy or (used + size <= self._resident_bytes and len(kept) < RESIDENT_MAX):
                kept.insert(0, served)
                used += size
            else:
                self.engine.unload(str(served.adapter))
        self._residents = kept
        if self._sizes.keys() != (needed := {served.adapter_sha256 for served in kept}):
            self._sizes = {sha256: size for sha256, size in self._sizes.items() if sha256 in needed}
            self._cache.prune(needed)

    def _held(self) -> list[Served]:
        """What a router may name: what is live, first, and what was a moment ago. Under the lock."""
        if self.kill_switch.on:
            return [self._base]
        ago = time.monotonic() - PIN_SECONDS
        left = [served for served, at in self._left.items() if at > ago and served != self._current]
        return [one for one in (self._current, *left[: -1 - LEFT_MAX : -1]) if one]

    @property
    def _staying(self) -> str:
        return f"{self.current.name} goes on answering" if self.current else "nothing answers yet"
