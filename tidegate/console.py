"""What the console shows, gathered at most once a second for all who look, and never on the server's event loop.

Each source (registry, broker, history, rounds, budgets of a stream) is asked on a thread of its own. One that is slow
or down holds up neither the others nor the page: what it said last is shown, with the time it said so.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog

from registry.states import PRODUCTION, ModelVersion, waiting
from tidegate import ancestry, budget, lag, status
from tidegate.errors import expected_errors
from tidegate.runbook import pointed

if TYPE_CHECKING:
    from serving.swap import HotSwap
    from tidegate.wiring import Service

# A person sees no difference below; each look asks every source that is due.
LOOK_SECONDS = 1.0
# A source is asked so seldom that it takes a tenth of a core at most: a long history costs no more than a short one.
REST_FACTOR = 9
# The broker is asked by a client made anew, and budgets by the account of every block.
LAG_SECONDS = 5.0
BUDGET_SECONDS = 10.0
# The first page waits so long for sources that have said nothing yet; then it says that it waits.
PATIENCE_SECONDS = 1.0
# An answer is late when it takes so long: the page says so beside what it shows.
LATE_SECONDS = 5.0
ROUNDS_SHOWN = 5
HISTORY_SHOWN = 12

log = structlog.get_logger()


@dataclass(frozen=True)
class Told:
    """What a source said last.

    Attributes:
        value: None when it never answered.
        at: when that was, UTC; empty: never.
        error: why it did not answer the last time; empty: it did.
        late: whether it is being asked, and takes long.
    """

    value: Any = None
    at: str = ""
    error: str = ""
    late: bool = False


class Source:
    """One thing that is asked now and then, on a thread of its own.

    Args:
        name: for the log.
        ask: answers, or raises one of the expected errors.
        seconds: least pause between two questions.
    """

    def __init__(self, name: str, ask: Callable[[], Any], seconds: float = LOOK_SECONDS) -> None:
        self._name, self._ask, self._seconds = name, ask, seconds
        self._lock = threading.Lock()
        self._told = Told()
        self._began: float | None = None
        self._due = 0.0
        self._answered = threading.Event()

    def poke(self) -> None:
        """Ask, if it is time and nobody is asking; returns at once."""
        with self._lock:
            if self._began is not None or time.monotonic() < self._due:
                return
            self._began = time.monotonic()
        threading.Thread(target=self._run, name=f"console {self._name}", daemon=True).start()

    def wait(self, seconds: float) -> None:
        """Return when it has been asked once, or after so long."""
        self._answered.wait(seconds)

    @property
    def told(self) -> Told:
        """What it said last."""
        with self._lock:
            late = self._began is not None and time.monotonic() - self._began > LATE_SECONDS
            return Told(self._told.value, self._told.at, self._told.error, late)

    def _run(self) -> None:
        began = time.monotonic()
        told = Told(self._told.value, self._told.at)
        try:
            told = Told(self._ask(), datetime.now(UTC).strftime("%H:%M:%SZ"))
        except expected_errors() as error:
            told = Told(told.value, told.at, str(error))
        except Exception as error:  # a defect in one source must not freeze the page
            log.exception("console source failed", source=self._name)
            told = Told(told.value, told.at, f"{type(error).__name__}: {error}")
        finally:
            took = time.monotonic() - began
            with self._lock:
                self._told, self._began = told, None
                self._due = time.monotonic() + max(self._seconds - took, took * REST_FACTOR, 0.0)
            self._answered.set()


@dataclass(frozen=True)
class StreamView:
    """One stream as the console shows it. Every `Told` may be old, and says so."""

    name: str
    model: str
    base: str
    serving: Mapping[str, Any]
    registry: Told
    lag: Told
    rounds: Told
    budget: Told
    history: Told


@dataclass(frozen=True)
class Snapshot:
    """Everything the page shows."""

    mlflow_uri: str
    streams: tuple[StreamView, ...]
    alarms: tuple[str, ...]


@dataclass(frozen=True)
class Registry:
    """What the registry says of a stream: what should answer, and who waits for a person."""

    wanted: tuple[int, ...]
    waiting: tuple[Mapping[str, Any], ...]


class Console:
    """Gathers for everybody who looks.

    Args:
        service: the workspace; one of its own, since its parts are used on other threads than the caller's.
        swaps: what this server answers with.
    """

    def __init__(self, service: Service, swaps: Sequence[HotSwap]) -> None:
        self._service = service
        self._swaps = {swap.stream: swap for swap in swaps}
        self._sources = {name: self._sources_of(name) for name in self._swaps}
        self._lock = threading.Lock()
        self._looked = 0.0
        self._snapshot: Snapshot | None = None

    def snapshot(self) -> Snapshot:
        """The newest one; made anew when it is older than a second. May take as long as PATIENCE_SECONDS, once."""
        with self._lock:
            now = time.monotonic()
            if self._snapshot is None or now - self._looked >= LOOK_SECONDS:
                self._look()
                self._looked = now
            assert self._snapshot is not None  # noqa: S101 - for the type checker
            return self._snapshot

    def _look(self) -> None:
        sources = [source for own in self._sources.values() for source in own.values()]
        for source in sources:
            source.poke()
        if self._snapshot is None:
            end = time.monotonic() + PATIENCE_SECONDS
            for source in sources:
                source.wait(max(0.0, end - time.monotonic()))
        views = tuple(self._view(name) for name in self._swaps)
        self._snapshot = Snapshot(self._service.mlflow_uri, views, tuple(_alarms(views)))

    def _view(self, name: str) -> StreamView:
        told = {kind: source.told for kind, source in self._sources[name].items()}
        base = self._service.stream(name).base
        return StreamView(name, self._service.model(name), base, self._swaps[name].state(), **told)

    def _sources_of(self, name: str) -> dict[str, Source]:
        asks: dict[str, tuple[Callable[[], Any], float]] = {
            "registry": (lambda: _registry(self._service, name), LOOK_SECONDS),
            "lag": (lambda: lag.look(self._service, name), LAG_SECONDS),
            "rounds": (lambda: _rounds(self._service, name), LOOK_SECONDS),
            "budget": (lambda: _budget(self._service, name), BUDGET_SECONDS),
            "history": (_History(self._service, name), LOOK_SECONDS),
        }
        return {kind: Source(f"{kind} {name}", ask, seconds) for kind, (ask, seconds) in asks.items()}


def _registry(service: Service, stream: str) -> Registry:
    versions = service.store.versions(service.model(stream), aliases=False)
    verdicts, receipts = service.trusted("verdicts"), service.trusted("receipts")

    def shown(version: ModelVersion) -> dict[str, Any]:
        verdict = ancestry.signed_tag(version, "verdict", verdicts)
        return {
            "version": version.version,
            "verdict": verdict["outcome"] if verdict else "no valid signature",
            "guarantee": ancestry.guarantee(version, receipts),
            "round": version.tag("round_id"),
            "created_at": version.created_at,
        }

    wanted = tuple(v.version for v in versions if v.stage == PRODUCTION)
    return Registry(wanted, tuple(shown(v) for v in waiting(versions)))


def _rounds(service: Service, stream: str) -> dict[str, Any]:
    """The schedule of a stream, and what its newest rounds came to."""
    alarms: list[str] = []
    now = status.rounds_now(service, stream, alarms)
    folders = sorted((service.workspace.root / "rounds").glob(f"{stream}-r[0-9]*"), reverse=True)
    return {"now": now, "last": [_round(folder) for folder in folders[:ROUNDS_SHOWN]], "alarms": alarms}


def _round(folder: Any) -> dict[str, Any]:
    ended = _read(folder / "ended.json")
    verdict = _read(folder / "verdict.json")
    if not ended:
        outcome = "runs, or waits to go on"
    elif ended.get("state") == "abandoned":
        outcome = f"abandoned: {ended.get('reason', '')}"
    else:
        outcome = str(ended.get("outcome", ""))
    return {
        "round": folder.name,
        "outcome": outcome,
        "version": ended.get("version", ""),
        "gates": [gate for gate in verdict.get("gates", ()) if isinstance(gate, dict)],
    }


def _read(file: Any) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _budget(service: Service, stream: str) -> budget.Budget | None:
    """None while no block is sealed."""
    if not service.repository().manifests(stream):
        return None
    return budget.look(service, stream, service.store.versions(service.model(stream), aliases=False))


class _History:
    """The newest decisions on a stream's versions. The chain is verified when it has grown, not at each look."""

    def __init__(self, service: Service, stream: str) -> None:
        self._service, self._stream = service, stream
        self._head = ""
        self._rows: list[dict[str, Any]] = []
        self._approvals: Any = None

    def __call__(self) -> list[dict[str, Any]]:
        self._approvals = self._approvals or self._service.approvals()
        head = self._approvals.head()
        if head != self._head:
            self._approvals.verify(self._service.trusted("approvals"))
            rows = self._approvals.history(self._service.model(self._stream))
            self._rows, self._head = list(reversed(rows))[:HISTORY_SHOWN], head
        return self._rows


def _alarms(views: Sequence[StreamView]) -> list[str]:
    """What is wrong, each with its stream in front."""
    found = []
    for view in views:
        found += [status.of_serving(view.name, alarm) for alarm in view.serving["alarms"]]
        found += (view.rounds.value or {}).get("alarms", [])
        found += [pointed("budget", alarm) for alarm in (view.budget.value.alarms if view.budget.value else ())]
        if view.lag.error:
            found.append(pointed("broker", f"{view.name}: lag: {view.lag.error}"))
        found += [
            pointed("records", f"{view.name}: {kind}: {error}")
            for kind in ("budget", "history", "rounds")
            if (error := getattr(view, kind).error) and error != view.registry.error
        ]
        if view.registry.error and not any(str(a).startswith("registry:") for a in view.serving["alarms"]):
            found.append(pointed("registry", f"{view.name}: registry: {view.registry.error}"))
    return list(dict.fromkeys(found))
