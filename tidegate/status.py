"""What runs, what waits, what is spent, what is wrong. A part that is down is told, not raised."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from registry.states import PRODUCTION, waiting
from tidegate import ancestry, budget
from tidegate.errors import expected_errors

if TYPE_CHECKING:
    from tidegate.wiring import Service


def look(service: Service) -> dict[str, Any]:
    """Facts of the service and of every stream; `alarms` is empty when all is well."""
    from tidegate.up import listens

    alarms: list[str] = []
    serving = serving_state(service)
    reached = {
        "broker": listens(service.bootstrap.split(",")[0]),
        "mlflow": listens(service.mlflow_uri.partition("://")[2].partition("/")[0]),
        "serve": serving is not None,
    }
    addresses = {"broker": service.bootstrap, "mlflow": service.mlflow_uri, "serve": service.api_uri}
    for part, up in reached.items():
        if not up:
            alarms.append(f"{part}: nothing answers at {addresses[part]}; `tidegate up` starts everything")
    for name, state in ((serving or {}).get("streams") or {}).items():
        alarms.extend(f"{name}: {alarm}" for alarm in state.get("alarms", ()))
    streams = [
        _stream(service, name, (serving or {}).get("streams", {}).get(name), alarms)
        for name in service.settings.streams
    ]
    shown = {part: f"{'up' if up else 'DOWN'}  {addresses[part]}" for part, up in reached.items()}
    return {"service": shown, "streams": streams, "alarms": alarms}


def serving_state(service: Service) -> dict[str, Any] | None:
    """What the server says of itself, or None when it does not answer."""
    try:
        with urllib.request.urlopen(f"{service.api_uri}/tidegate/state", timeout=2) as reply:  # noqa: S310
            return dict(json.load(reply))
    except (OSError, urllib.error.URLError, ValueError):
        return None


def _stream(service: Service, name: str, serving: dict[str, Any] | None, alarms: list[str]) -> dict[str, Any]:
    manifests = service.repository().manifests(name)
    shares = [service.ledger.share_used(m.block_id) for m in manifests if service.ledger.knows(m.block_id)]
    policy = service.policy(name)
    row: dict[str, Any] = {
        "stream": name,
        "blocks": len(manifests),
        "offsets_sealed": sum(o.end - o.start for m in manifests for o in m.offsets),
        "claim": policy.promise(),
        "filter_used_max": f"{max(shares, default=0.0):.1%}",
        "rounds": len({r.round_id for r in service.ledger.rows(name) if r.account == "train"}),
        "answers_with": serving.get("version", "nothing") if serving else "unknown: the server is down",
    }
    try:
        versions = service.store.versions(service.model(name))
        row["wanted"] = ", ".join(str(v.version) for v in versions if v.stage == PRODUCTION) or "base"
        row["waiting"] = ", ".join(str(v.version) for v in waiting(versions)) or "none"
        ancestry.find_live(versions, service.trusted("approvals"))
        if manifests:
            left = budget.look(service, name, versions)
            row["rounds_left"] = "unknown" if left.rounds_left is None else left.rounds_left
            row["blocks_retired"] = len(left.blocks_retired)
            alarms.extend(left.alarms)
    except expected_errors() as error:
        row["wanted"] = row["waiting"] = "unknown"
        alarms.append(f"{name}: {error}")
    return row
