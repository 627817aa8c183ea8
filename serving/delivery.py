"""What goes on beside the live version of a stream: a canary, shadow, and the candidate that waits, on demand.

A canary runs by a signed decision alone, as the live version does: read from the tag of a version in Staging, checked,
its adapter proved, loaded and probed. It gets its share of the requests until a later decision: its end, another share,
or anything that moves the live version. Decisions are followed in the order they were signed, and the newest one seen
is kept on disk, so that an old one brings no canary back.

When `comparing.Watch` finds it worse than live, this server steps back at once, whether the registry answers or not,
remembers that on disk, and tells the registry until it has taken it into the history.
"""

from __future__ import annotations

import hashlib
import hmac
import random
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from privacy.signing import TrustedKeys
from registry.canary import CANARY, Terms
from registry.errors import PromotionRefused
from registry.states import STAGING, ModelVersion
from serving.alarms import Alarm, Alarms
from serving.approval import Canary, read_canary
from serving.cache import LocalCache
from serving.candidates import Candidates
from serving.comparing import Rules, Watch
from serving.errors import ApprovalRefused, RequestRefused, ServingError, SwapError
from serving.shadow import Shadow
from serving.swap import HotSwap, Served
from serving.trip import Trip

HEADER = "x-tidegate-canary"
_CHOICES = ("always", "never")
_CONTEXT = b"tidegate canary 1"

log = structlog.get_logger()


@dataclass(frozen=True)
class _Running:
    """A canary that answers."""

    canary: Canary
    terms: Terms
    served: Served
    watch: Watch


@dataclass(frozen=True)
class _SteppedBack:
    """A canary this server ended.

    Attributes:
        told: whether the registry has taken it, or it was over there anyway.
    """

    seq: int
    version: int
    why: str
    told: bool = False


class Delivery:
    """Started and stopped with the stream's hot swap, on a thread of its own.

    Args:
        swap: the stream's.
        candidates: what waits for a person.
        trusted: the keys decisions may be signed with.
        cache: folder of what the stream's server keeps on disk.
        key: secret; draws users' sides.
        step_back: tells the registry (version, seq, why); raises PromotionRefused when that canary is over there.
        model: the registered model decisions must be for; the stream's name when None.
        open_stream: whether nothing was ever promised to anybody in the stream.
        rules: when a canary is worse.
        shadow: asks the candidate what people asked; None: nobody does.
        poll_seconds: pause between two looks at what the registry said last.
        replica: which of several servers on this folder.
    """

    def __init__(
        self,
        swap: HotSwap,
        candidates: Candidates,
        *,
        trusted: TrustedKeys,
        cache: Path,
        key: bytes,
        step_back: Callable[[int, int, str], object],
        model: str | None = None,
        open_stream: bool = False,
        rules: Rules | None = None,
        shadow: Shadow | None = None,
        poll_seconds: float = 0.5,
        replica: str = "",
    ) -> None:
        self.candidates = candidates
        self.shadow = shadow
        self.counts: Counter[str] = Counter()
        self._swap = swap
        self._trusted, self._model, self._open_stream = trusted, model or swap.stream, open_stream
        self._key, self._tell, self._rules = key, step_back, rules or Rules()
        self._cache = LocalCache(cache, swap.stream, replica)
        self._alarms = Alarms(swap.stream)
        self._running: _Running | None = None
        self._newest = 0  # the newest decision on a canary that was seen
        self._stepped_back: _SteppedBack | None = None
        self._poll_seconds = poll_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"delivery {swap.stream}", daemon=True)
        self._restore()

    # Life

    def start(self) -> None:
        """Follow the registry on a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """Stop following. Idempotent."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._poll_seconds):
            try:
                self.tick()
            except Exception:  # a defect here must not stop what goes on beside the live version for good
                log.exception("delivery failed", stream=self._swap.stream)

    # For answers

    @contextmanager
    def admit(self, header: str | None = None, user: str | None = None, pin: str = "") -> Iterator[Trip]:
        """The version one request is answered with, live or canary; it stays resident until the request is over.

        Args:
            header: of the request, `x-tidegate-canary`.
            user: OpenAI's field of that name.
            pin: which version is live for a router, see `HotSwap.lease`.

        Raises:
            NotReady, VersionElsewhere: as `HotSwap.lease`.
            RequestRefused: the header says something else.
        """
        if header is not None and header not in _CHOICES:
            raise RequestRefused(f"{HEADER}={header[:40]!r}: must be always or never; or leave it out", param=HEADER)
        running = self._running_now
        with ExitStack() as held:
            if self.shadow is not None:
                held.enter_context(self.shadow.idle.busy())
            trip = self._trip(running, self._draw(running, header, user), pin, held)
            yield trip
            held.close()  # before anything is offered: the engine is free then, or not
            self._ended(trip, running)

    def _trip(self, running: _Running | None, draw: tuple[object, bool, bool], pin: str, held: ExitStack) -> Trip:
        unit, drawn, canary = draw
        seq = running.canary.seq if running else 0
        watched = running is not None or (self.shadow is not None and self.shadow.resident is not None)
        if running is not None and canary:
            try:
                served = held.enter_context(self.candidates.lease(running.served))
                return Trip(served, self._swap.engine, canary=True, unit=unit, drawn=drawn, seq=seq, watched=True)
            except SwapError:  # ended a moment ago
                watched = False
        served = held.enter_context(self._swap.lease(pin))
        return Trip(served, self._swap.engine, unit=unit, drawn=drawn, seq=seq, watched=watched)

    def _draw(self, running: _Running | None, header: str | None, user: str | None) -> tuple[object, bool, bool]:
        """What is drawn for, whether a lot decides, and whether the canary answers."""
        if running is None:
            return None, False, False
        if header is not None and running.terms.header:
            return None, False, header == "always"
        if user and running.terms.sticky:
            # By version, so that a larger share keeps those who have it, and the next canary has other people.
            said = b"\0".join((_CONTEXT, running.served.name.encode(), user.encode()))
            pseudonym = hmac.new(self._key, said, hashlib.sha256).digest()[:16]
            return pseudonym, True, int.from_bytes(pseudonym[:8]) / 2**64 < running.terms.share
        return object(), True, random.random() < running.terms.share  # noqa: S311 - no secret

    def _ended(self, trip: Trip, running: _Running | None) -> None:
        if trip.away:
            return
        if running is not None and trip.asked:
            running.watch.saw(
                canary=trip.canary, unit=trip.unit, drawn=trip.drawn, ok=not trip.failed, seconds=trip.seconds
            )
        elif self.shadow is not None and trip.watched:
            self.shadow.offer(trip)

    @property
    def _running_now(self) -> _Running | None:
        """The canary, unless a decision on what is live has overtaken it, or the kill switch is on."""
        running = self._running if not self._swap.kill_switch.on else None
        if running is None or self._swap.current is None or running.canary.seq < self._swap.followed_seq:
            return None
        return running

    # For people

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """What is wrong now."""
        return self._alarms.standing

    @property
    def share(self) -> tuple[str, float] | None:
        """The canary's name and share; None when none runs."""
        running = self._running_now
        return (running.served.name, running.terms.share) if running else None

    def state(self) -> dict[str, Any]:
        """JSON for `tidegate status`."""
        running = self._running_now
        canary = None
        if running is not None:
            (asked, failed), (live, live_failed) = running.watch.counts["canary"], running.watch.counts["live"]
            canary = {
                "version": running.served.name,
                "number": running.served.version,
                "seq": running.canary.seq,
                **running.terms.as_json(),
                "requests": asked,
                "failed": failed,
                "live_requests": live,
                "live_failed": live_failed,
            }
        shadow = {"shadow": self.shadow.state()} if self.shadow else {}
        return {"candidate": self.candidates.state(), "canary": canary, **shadow}

    # One round of following

    def tick(self) -> None:
        """Follow what was decided, and judge what was seen. Never raises for what is wrong outside."""
        found: list[Alarm] = []
        versions = self.candidates.seen()
        if versions is not None:
            try:
                self._follow(versions, found)
                self._keep_shadow(found)
            except Exception as error:  # a defect here must not keep a canary from being judged
                log.exception("canary not followed", stream=self._swap.stream)
                found.append(Alarm("canary", "", f"decisions cannot be followed ({type(error).__name__}); see the log"))
        running = self._running_now
        if running is not None and (why := running.watch.look()):
            self._step_back(running, why)
        self._report(versions, found)
        kept = (self._running and self._running.served, self.shadow and self.shadow.resident)
        self.candidates.release([served for served in kept if served])
        self._alarms.settle(found)

    def _follow(self, versions: Collection[ModelVersion], found: list[Alarm]) -> None:
        """Run the canary that is decided, or none."""
        running, wanted = self._running, self._wanted(versions, found)
        terms = wanted[0].terms if wanted else None
        if wanted is None or terms is None:
            if running is not None:
                log.info("canary over", stream=self._swap.stream, version=running.served.name)
            self._running = None
            if wanted is not None and wanted[0].automatic:
                found.append(self._stands_back(wanted[0].version, wanted[0].why))
            return
        canary, version = wanted
        if running is not None and running.canary == canary:
            return
        try:
            served = self.candidates.hold(version)
            if served.adapter_sha256 != canary.adapter_sha256:
                raise SwapError(f"its documents are about adapter {served.adapter_sha256[:12]}; decide it again")
        except ServingError as error:
            self._running = None
            message = f"version {canary.version} cannot be the canary: {error}; live answers everything"
            found.append(Alarm("canary", f"{canary.version}/{canary.seq}", message))
            return
        self._running = _Running(canary, terms, served, Watch(terms.share, self._rules))
        log.info("canary", stream=self._swap.stream, version=served.name, share=terms.share, seq=canary.seq)

    def _wanted(self, versions: Collection[ModelVersion], found: list[Alarm]) -> tuple[Canary, ModelVersion] | None:
        """The newest decision on a canary, if it still counts."""
        decided: list[tuple[Canary, ModelVersion]] = []
        for version in versions:
            if version.stage == STAGING and version.tag(CANARY):
                try:
                    decided.append((self._read(version), version))
                except ApprovalRefused as error:
                    message = f"version {version.version}: no canary, {error}; live answers everything"
                    found.append(Alarm("canary", str(version.version), message))
        if not decided:
            return None
        canary, version = max(decided, key=lambda one: one[0].seq)
        back = self._stepped_back
        if canary.seq <= max(back.seq if back else 0, self._swap.followed_seq):
            return None
        if canary.seq < self._newest:
            message = (
                f"version {version.version}: its canary seq={canary.seq} must be >= {self._newest}, the newest seen; "
                f"an old decision brings no canary back: decide it again"
            )
            found.append(Alarm("canary", f"{version.version}/{canary.seq}", message))
            return None
        if canary.seq > self._newest:
            self._newest = canary.seq
            if back and back.told and not canary.automatic:
                self._stepped_back = None  # a person has decided since
            self._note(found)
        return canary, version

    def _read(self, version: ModelVersion) -> Canary:
        """The decision on a version, when it is about that version.

        Raises:
            ApprovalRefused: it is not, or is not signed.
        """
        canary = read_canary(version.tag(CANARY), self._trusted, self._model, open_stream=self._open_stream)
        if (canary.version, canary.adapter_sha256) != (version.version, version.adapter_sha256):
            raise ApprovalRefused(
                f"it is for version {canary.version} with adapter {canary.adapter_sha256[:12]}; decide it again"
            )
        return canary

    def _keep_shadow(self, found: list[Alarm]) -> None:
        """Keep the waiting candidate resident for shadow, unless it is the canary."""
        if self.shadow is None:
            return
        version = None if self._running else self.candidates.waiting()
        kept = self.shadow.resident
        if kept and version and (kept.version, kept.adapter_sha256) == (version.version, version.adapter_sha256):
            return
        try:
            self.shadow.resident = self.candidates.hold(version) if version else None
        except ServingError as error:
            self.shadow.resident = None
            message = f"version {version.version if version else 0} cannot be asked in the shadow: {error}"
            found.append(Alarm("shadow", str(version and version.version), message))

    # Stepping back

    def _step_back(self, running: _Running, why: str) -> None:
        self._running = None
        sentence = f"stepped back from {running.terms.share:.3g} of the requests: {why}"
        self._stepped_back = _SteppedBack(running.canary.seq, running.served.version, sentence)
        self.counts["stepped_back"] += 1
        log.warning("canary stepped back", stream=self._swap.stream, version=running.served.name, why=why)
        self._note([])

    def _report(self, versions: Collection[ModelVersion] | None, found: list[Alarm]) -> None:
        """Tell the registry of a step back until it has taken it; stand as an alarm until a person has decided."""
        back = self._stepped_back
        if back is None:
            return
        heard = ""
        if not back.told:
            try:
                self._tell(back.version, back.seq, back.why)
                told = True
            except PromotionRefused:  # over there already, by somebody else's decision
                told = True
            except Exception as error:  # noqa: BLE001 - the caller's function; it is told again at the next tick
                told, heard = False, f"; the registry has not taken it yet ({error})"
            if told:
                self._stepped_back = back = _SteppedBack(back.seq, back.version, back.why, told=True)
                self._note(found)
        waits = versions is None or any(v.version == back.version and v.stage == STAGING for v in versions)
        if waits and not self._running and not any(alarm.kind == "stepped_back" for alarm in found):
            found.append(self._stands_back(back.version, back.why, heard))

    def _stands_back(self, version: int, why: str, heard: str = "") -> Alarm:
        message = (
            f"version {version} {why}; live answers everything{heard}. Reject it, or try again by "
            f"`tidegate promote {self._swap.stream} {version} --canary SHARE --why ...`"
        )
        return Alarm("stepped_back", str(version), message)

    def _restore(self) -> None:
        try:
            noted = self._cache.canary() or {}
            self._newest = int(noted.get("newest", 0))
            if back := noted.get("stepped_back"):
                self._stepped_back = _SteppedBack(
                    int(back["seq"]), int(back["version"]), str(back["why"]), told=bool(back["told"])
                )
        except (SwapError, ValueError, TypeError, KeyError) as error:
            log.warning("notes on canaries not read", stream=self._swap.stream, why=str(error))

    def _note(self, found: list[Alarm]) -> None:
        back = asdict(self._stepped_back) if self._stepped_back else None
        try:
            self._cache.note_canary({"newest": self._newest, "stepped_back": back})
        except SwapError as error:
            found.append(Alarm("canary", "disk", str(error)))


@contextmanager
def admit(swap: HotSwap, header: str | None = None, user: str | None = None, pin: str = "") -> Iterator[Trip]:
    """The version one request to a stream is answered with; see `Delivery.admit`."""
    if swap.delivery is not None:
        with swap.delivery.admit(header, user, pin) as trip:
            yield trip
    else:
        with swap.lease(pin) as served:
            yield Trip(served, swap.engine)
