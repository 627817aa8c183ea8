"""What runs, what waits, what is spent, what is wrong. A part that is down is told, not raised."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from privacy.policy import NO_PRIVACY
from registry.errors import RegistryUnavailable
from registry.states import PRODUCTION, ModelVersion, waiting
from tidegate import ancestry, budget, heartbeat, switches, timetable
from tidegate.errors import expected_errors
from tidegate.locks import is_held
from tidegate.runbook import pointed

if TYPE_CHECKING:
    from tidegate.wiring import Service


def look(service: Service) -> dict[str, Any]:
    """Facts of the service and of every stream; `alarms` is empty when all is well, `budget_low` names some of them."""
    from tidegate.up import listens

    alarms: list[str] = []
    low: list[str] = []
    serving = serving_state(service)
    reached = {
        "broker": listens(service.bootstrap.split(",")[0]),
        "mlflow": listens(service.mlflow_uri.partition("://")[2].partition("/")[0]),
        "serve": serving is not None,
    }
    addresses = {"broker": service.bootstrap, "mlflow": service.mlflow_uri, "serve": service.api_uri}
    for part, up in reached.items():
        if not up:
            text = f"{part}: nothing answers at {addresses[part]}; `tidegate up` starts everything"
            alarms.append(pointed("down", text))
    for name, state in ((serving or {}).get("streams") or {}).items():
        alarms.extend(of_serving(name, alarm) for alarm in state.get("alarms", ()))
    streams = [
        _stream(service, name, (serving or {}).get("streams", {}).get(name), alarms, low)
        for name in service.settings.streams
    ]
    shown = {part: f"{'up' if up else 'DOWN'}  {addresses[part]}" for part, up in reached.items()}
    return {"service": shown, "streams": streams, "alarms": alarms, "budget_low": low}


def of_serving(stream: str, alarm: str) -> str:
    """An alarm of the server, `kind: message`, with its stream and where the runbook speaks of it."""
    return pointed(alarm.partition(":")[0], f"{stream}: {alarm}")


def serving_state(service: Service) -> dict[str, Any] | None:
    """What the server says of itself, or None when it does not answer."""
    try:
        request = urllib.request.Request(  # noqa: S310 - our own http address
            f"{service.api_uri}/tidegate/state", headers=service.api_headers
        )
        with urllib.request.urlopen(request, timeout=2) as reply:  # noqa: S310
            return dict(json.load(reply))
    except (OSError, urllib.error.URLError, ValueError):
        return None


def _stream(
    service: Service, name: str, serving: dict[str, Any] | None, alarms: list[str], low: list[str]
) -> dict[str, Any]:
    manifests = service.repository().manifests(name)
    shares = [service.ledger.share_used(m.block_id) for m in manifests if service.ledger.knows(m.block_id)]
    policy = service.policy(name)
    row: dict[str, Any] = {
        "stream": name,
        "rounds_now": rounds_now(service, name, alarms),
        "blocks": len(manifests),
        "offsets_sealed": sum(o.end - o.start for m in manifests for o in m.offsets),
        "claim": policy.promise(),
        "filter_used_max": f"{max(shares, default=0.0):.1%}",
        "rounds": len({r.round_id for r in service.ledger.rows(name) if r.account == "train"}),
        "answers_with": serving.get("version", "nothing") if serving else "unknown: the server is down",
    }
    if canary := (serving or {}).get("canary"):
        row["canary"] = (
            f"{canary['version']} {100 * canary['share']:.4g}%: {canary['failed']} of {canary['requests']} failed, "
            f"{canary['live_failed']} of {canary['live_requests']} of live"
        )
    try:
        versions = service.store.versions(service.model(name))
        trusted = service.trusted("receipts")

        def shown(version: ModelVersion) -> str:
            bare = ancestry.guarantee(version, trusted) == NO_PRIVACY
            return f"{version.version} ({NO_PRIVACY})" if bare else str(version.version)

        row["wanted"] = ", ".join(shown(v) for v in versions if v.stage == PRODUCTION) or "base"
        row["waiting"] = ", ".join(shown(v) for v in waiting(versions)) or "none"
        ancestry.find_live(versions, service.trusted("approvals"))
        if manifests:
            left = budget.look(service, name, versions)
            row["rounds_left"] = "unknown" if left.rounds_left is None else left.rounds_left
            row["blocks_retired"] = len(left.blocks_retired)
            low_now = [pointed("budget", alarm) for alarm in left.alarms]
            alarms.extend(low_now)
            low.extend(low_now)
    except expected_errors() as error:
        row["wanted"] = row["waiting"] = "unknown"
        text = f"{name}: {error}"
        alarms.append(pointed("registry", text) if isinstance(error, RegistryUnavailable) else pointed("records", text))
    return row


def rounds_now(service: Service, name: str, alarms: list[str]) -> dict[str, str]:
    """The stream on the schedule: next and last round, what runs now, and whether one was late, overlapped or stuck."""
    workspace = service.workspace
    kept = {turn.stream: turn for turn in timetable.read(workspace.run / timetable.FILE)}
    turn = kept.get(name, timetable.Turn(name))
    told = {name_: str(value) for name_, value in asdict(turn).items() if name_ not in {"stream", "stuck"} and value}
    beat = heartbeat.running(workspace, name)
    if beat:
        told["runs"] = f"{beat.what} {beat.done} of {beat.of}, since {beat.at}" if beat.of else f"since {beat.at}"
    if turn.stuck:
        told["stuck"] = f"{turn.stuck} in a row; the stream is held after {timetable.STUCK_MAX}"
        text = f"{name}: its last round got {turn.last_outcome}; it goes on from its checkpoint the next time"
        alarms.append(pointed("stuck", text))
    if turn.last_outcome.startswith("failed"):
        text = f"{name}: its last round {turn.last_outcome}; `tidegate round {name}` tries again"
        alarms.append(pointed("round_failed", text))
    hold = heartbeat.hold_file(workspace, name)
    if hold.exists():
        told["held"] = json.loads(hold.read_text(encoding="utf-8"))["reason"]
        text = (
            f"{name}: no round is started, {told['held']}; run `tidegate round {name}` and watch it: when it ends, the "
            f"schedule goes on; learner.stuck_seconds says how long a round may show nothing"
        )
        alarms.append(pointed("held", text))
    if pause := switches.paused(workspace, name):
        told["paused"] = switches.words(pause)
    overdue = turn.waiting_since or turn.next_due
    if overdue and timetable.is_late(overdue) and not is_held(workspace.run / timetable.LOCK):
        text = f"{name}: a round was due at {overdue}, but nothing runs the schedule; start `tidegate learn`"
        alarms.append(pointed("overdue", text))
    return told
