"""What is worth telling, found in what is durable anyway, and its delivery: beside the schedule of `tidegate learn`.

    candidate               the registry: a version waits for a person
    promoted, rolled_back,  the signed history of approvals
      rejected, canary,
      stepped_back
    refused                 the refusals that promotion leaves beside it
    budget_low, alarm       `tidegate status`, once it has stood for a while

Nothing that causes an event knows of receivers: it can neither wait for one nor fail with one. An event's id is made
from what happened, so that a crash between finding and keeping it makes no second one; a crash between a receiver's
answer and noting it sends the same id again. What is told follows from public facts, decisions and the arithmetic of
budgets: no score, no loss, no record.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from re import sub
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import structlog

from registry.approvals import SWITCHES
from registry.canary import CANARY
from registry.states import PRODUCTION, waiting
from tidegate import ancestry, status, webhook
from tidegate.errors import ConfigError, TidegateError, expected_errors
from tidegate.locks import Held, alone
from tidegate.outbox import Event, Outbox
from tidegate.timetable import text_of, time_of
from tidegate.wiring import Service

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Mapping

    from registry.approvals import Approval
    from registry.states import ModelVersion
    from tidegate.outbox import Delivery

log = structlog.get_logger()

FILE = "hooks.db"
LOCK = "hooks.lock"
# A person who waits for a candidate does not notice; the registry answers one more request.
LOOK_SECONDS = 5.0
# `tidegate status` reads the account of every block.
ALARM_LOOK_SECONDS = 60.0
# At a start parts come up one after another: what stands for less is no alarm.
ALARM_SECONDS = 45.0
# The service was down so long that nobody waits for the news; `tidegate history` has it.
NEWS_DAYS = 7
SENTENCE_CHARS_MAX = 600


def watch(service: Service, stop: threading.Event) -> None:
    """Find events and deliver them until `stop` is set; ends at once where no stream has a receiver.

    Whatever is wrong outside is logged, and looked at again.
    """
    try:
        _watch(Service(service.workspace, service.resolved), stop)  # with connections of this thread's own
    except Held as held:
        log.warning("webhooks are sent by another process", pid=held.pid)
    except expected_errors() as error:
        log.error("no webhooks are sent", why=str(error))  # noqa: TRY400 - the message names the way out


def _watch(service: Service, stop: threading.Event) -> None:
    hooked = {name: s.hooks for name, s in service.settings.streams.items() if s.hooks.urls}
    outbox = outbox_of(service)
    if (service.workspace.root / FILE).exists():
        outbox.keep_marks(f"{kind}:{name}" for name in hooked for kind in ("approvals", "refusals"))
    if not hooked:
        return
    with alone(service.workspace.run / LOCK):
        watcher = Watcher(service, outbox)
        while not stop.is_set():
            try:
                watcher.look(time.time(), stop.is_set)
            except expected_errors() as error:
                log.warning("webhooks not sent", why=str(error))
            except Exception:  # rounds go on beside it, whatever it is
                log.exception("webhooks not sent")
            stop.wait(LOOK_SECONDS)


def outbox_of(service: Service) -> Outbox:
    """The workspace's outbox."""
    return Outbox(service.workspace.root / FILE)


class Watcher:
    """Finds events of the streams that have receivers, and delivers what is due."""

    def __init__(self, service: Service, outbox: Outbox) -> None:
        self._service, self._outbox = service, outbox
        self._streams = [name for name, s in service.settings.streams.items() if s.hooks.urls]
        self._alarms_at = 0.0
        self._told: set[str] = set()
        self._failed: dict[str, str] = {}
        self._keys = secret_keys(service)

    def look(self, now: float, stopped: Callable[[], bool] = lambda: False) -> None:
        """Find what is new, then try every delivery that is due; what cannot be asked is told and skipped."""
        for stream in self._streams:
            for find in (self._decided, self._refused, self._waiting):
                self._try(partial(find, stream, now), stream)
        if now - self._alarms_at >= ALARM_LOOK_SECONDS:
            self._alarms_at = now
            self._try(partial(self._wrong, now), "")
        self._deliver(now, stopped)

    def _try(self, find: partial[None], stream: str) -> None:
        what = f"{find.func.__name__} {stream}"
        try:
            find()
            self._failed.pop(what, None)
        except expected_errors() as error:
            if self._failed.get(what) != str(error):  # told once, not every five seconds
                log.warning("not looked up for webhooks", stream=stream, why=str(error))
            self._failed[what] = str(error)

    def _decided(self, stream: str, now: float) -> None:
        model = self._service.model(stream)
        # The kill switch is told of by its alarm.
        rows = [row for row in self._service.approvals().history(model) if row["kind"] not in SWITCHES]
        found = [(int(row["seq"]), row, decision(self._service, stream, row)) for row in rows]
        self._rows(f"approvals:{stream}", stream, found, now)

    def _refused(self, stream: str, now: float) -> None:
        rows = self._service.approvals().refusals(self._service.model(stream))
        found = [(int(row["id"]), row, refusal(self._service, stream, row)) for row in rows]
        self._rows(f"refusals:{stream}", stream, found, now)

    def _rows(self, mark: str, stream: str, found: Iterable[tuple[int, Mapping[str, Any], Event]], now: float) -> None:
        """Take in what came after the mark; the first look only sets it, since the past is no news."""
        found = list(found)
        last = max((number for number, _, _ in found), default=0)
        seen = self._outbox.mark(mark)
        if seen is None:
            self._outbox.put((), now, marks={mark: last})
        elif last > seen:
            oldest = datetime.fromtimestamp(now, UTC) - timedelta(days=NEWS_DAYS)
            events = [e for n, row, e in found if n > seen and time_of(row["when"]) >= oldest]
            self._put(stream, events, now, marks={mark: last})

    def _waiting(self, stream: str, now: float) -> None:
        service = self._service
        found = waiting(service.store.versions(service.model(stream), aliases=False))
        events = [candidate(service, stream, version) for version in found]
        self._put(stream, [event for event in events if event.id not in self._told], now)
        self._told |= {event.id for event in events}

    def _wrong(self, now: float) -> None:
        report = status.look(self._service)
        filters = {row["stream"]: row["filter_used_max"] for row in report["streams"]}
        low = set(report["budget_low"])
        of: dict[str, tuple[str, str, str]] = {}
        for text in report["alarms"]:
            about = text.partition(":")[0]
            for stream in self._streams if about not in filters else [about]:
                kind = "budget_low" if text in low else "alarm"
                # Figures in an alarm move while it stands; it is the same alarm.
                of[_id(stream, kind, sub(r"\d[\d:.%TZ-]*", "#", text))] = (stream, kind, text)
        for key, since in self._outbox.settle(of, now, ALARM_SECONDS).items():
            stream, kind, text = of[key]
            data = {"sentence": _short(text), "since": text_of(datetime.fromtimestamp(since, UTC))}
            if kind == "budget_low":
                data["filter_used_max"] = filters[stream]
            event = Event(_id(key, str(since)), stream, kind, text_of(datetime.fromtimestamp(now, UTC)), data)
            self._put(stream, [event], now, told=[key])

    def _put(
        self,
        stream: str,
        events: Iterable[Event],
        now: float,
        *,
        marks: Mapping[str, int] | None = None,
        told: Iterable[str] = (),
    ) -> None:
        events = list(events)
        if not events and not marks:
            return
        hooks = self._service.stream(stream).hooks
        wanted = [(event, hooks.urls) for event in events if event.type in hooks.events]
        for event in self._outbox.put(wanted, now, marks=marks, told=told):
            log.info("webhook event", stream=stream, type=event.type, id=event.id)

    def _deliver(self, now: float, stopped: Callable[[], bool]) -> None:
        """Try what is due; a receiver that fails is left alone until the next look, so that it holds up no other."""
        failed: set[str] = set()
        for delivery in self._outbox.due(now):
            if stopped():
                return
            if delivery.url in failed:
                continue
            if not self._wanted(delivery):
                gone = webhook.Answer(None, "not sent: the address is no longer in params.yaml")
                self._outbox.tried(delivery, gone, now, final=True)
                continue
            answer, state = attempt(self._outbox, self._keys, delivery)
            if not answer.taken:
                failed.add(delivery.url)
                log.warning("webhook not taken", url=webhook.shown(delivery.url), status=answer.status, state=state)

    def _wanted(self, delivery: Delivery) -> bool:
        stream = self._service.settings.streams.get(delivery.stream)
        return stream is not None and delivery.url in stream.hooks.urls


def attempt(
    outbox: Outbox, keys: tuple[bytes, ...], delivery: Delivery, *, final: bool = False
) -> tuple[webhook.Answer, str]:
    """Sign and send one delivery and note the answer; returns it with the delivery's new state."""
    given = webhook.headers(keys, delivery.event, int(time.time()), delivery.body)
    answer = webhook.send(delivery.url, given, delivery.body)
    return answer, outbox.tried(delivery, answer, time.time(), final=final)


def test(service: Service, stream: str) -> list[dict[str, Any]]:
    """Send a test event to every receiver of a stream now, once; returns what each answered.

    Raises:
        TidegateError: the stream has no receiver.
    """
    urls = service.stream(stream).hooks.urls
    if not urls:
        raise TidegateError(f"streams.{stream}.hooks.urls: is empty; name an address in params.yaml")
    keys, outbox, now = secret_keys(service), outbox_of(service), time.time()
    at = text_of(datetime.fromtimestamp(now, UTC))
    event = Event(_id(token_hex(16)), stream, "test", at, {"sentence": "This is a test; nothing happened."})
    outbox.put([(event, urls)], now, state="test")
    told = []
    for delivery in outbox.of(event.id):
        answer, _ = attempt(outbox, keys, delivery, final=True)
        told.append({"id": event.id, "url": delivery.url, "taken": answer.taken, "status": answer.status,
                     "said": answer.said})  # fmt: skip
    return told


def secret_keys(service: Service) -> tuple[bytes, ...]:
    """What signs: from TIDEGATE_HOOK_SECRET or the keys folder; made there when there is none.

    Raises:
        ConfigError: it is too short, or the file can be read by others.
    """
    from tidegate.config import read_secret

    text = read_secret(webhook.SECRET, service.keys_dir)
    if text is None:
        webhook.make_secret(service.keys_dir)
        text = read_secret(webhook.SECRET, service.keys_dir)
    if text is None:
        raise ConfigError(f"{service.keys_dir / webhook.SECRET}: was made and is gone")
    return webhook.keys_of(text)


# -- from facts to events ----------------------------------------------------------------------------------------------


def candidate(service: Service, stream: str, version: ModelVersion) -> Event:
    """A version that waits for a person. What it scored stands on its page."""
    verdict = ancestry.signed_tag(version, "verdict", service.trusted("verdicts"))
    outcome = str(verdict["outcome"]) if verdict else "no valid signature"
    guarantee = ancestry.guarantee(version, service.trusted("receipts"))
    model = service.model(stream)
    sentence = (
        f"Version {version.version} of {model} waits for a person. Verdict: {outcome}. Privacy: {guarantee}. "
        f"tidegate approve {stream} {version.version} --why ..., or tidegate reject"
    )
    data = {
        **_about(service, stream, version.version),
        "round": version.tag("round_id"),
        "verdict": outcome,
        "guarantee": guarantee,
        "parent_version": version.tag("parent_version") or "base",
        "sentence": _short(sentence),
    }
    return Event(_id(stream, model, str(version.version), version.created_at), stream, "candidate", version.created_at,
                 data)  # fmt: skip


def decision(service: Service, stream: str, row: Approval) -> Event:
    """A row of the signed history."""
    number, who = int(row["version"]), row["who"]
    to, kind = str(row["to"]), str(row["kind"])
    if kind == CANARY:
        automatic = row["canary"].get("automatic")
        told = "stepped_back" if automatic else "canary"
        share = float(row["canary"]["share"])
        what = (
            f"Candidate {number} gets {100 * share:.4g}% of the requests"
            if share
            else f"Candidate {number} is no canary any more"
        )
    elif to == PRODUCTION and kind == "promote":
        told, what = "promoted", f"Version {number} is Production now"
    elif to == PRODUCTION:
        emergency = ", by an emergency approval while the registry is down" if kind == "emergency" else ""
        told, what = "rolled_back", f"Version {number} is Production again{emergency}"
    elif row["from"] == PRODUCTION:
        told, what = "rolled_back", f"Version {number} left Production"
    else:
        told, what = "rejected", f"Candidate {number} was rejected"
    data = {
        **_about(service, stream, number),
        "who": who,
        "why": _short(str(row["why"])),
        "from": row["from"],
        "to": to,
        "seq": row["seq"],
        **({"share": row["canary"]["share"]} if kind == CANARY else {}),
        "sentence": _short(f"{what}: {who}: {row['why'] or 'no reason given'}"),
    }
    return Event(_id(row["key_id"], str(row["seq"]), row["signature"]), stream, told, row["when"], data)


def refusal(service: Service, stream: str, row: Mapping[str, Any]) -> Event:
    """A promotion that the guard refused, with its sentence."""
    data = {
        **_about(service, stream, int(row["version"])),
        "who": row["who"],
        "why": _short(row["why"]),
        "sentence": _short(row["sentence"]),
    }
    return Event(_id(stream, "refused", str(row["id"]), row["when"]), stream, "refused", row["when"], data)


def _about(service: Service, stream: str, version: int) -> dict[str, Any]:
    model = service.model(stream)
    return {
        "model": model,
        "version": version,
        "url": f"{service.mlflow_uri}/#/models/{model}/versions/{version}",
    }


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SENTENCE_CHARS_MAX else line[: SENTENCE_CHARS_MAX - 1] + "…"


def _id(*facts: str) -> str:
    """An id that is the same for the same facts: 128 bits of their hash."""
    return "msg_" + sha256("\x00".join(facts).encode()).hexdigest()[:32]
