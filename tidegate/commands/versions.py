"""`tidegate versions|approve|reject|rollback|history`: what the registry wants to run, and who said so."""

from __future__ import annotations

import getpass
from typing import Any

import click

from tidegate import ancestry, memory, output, pruning

_WHO = click.option("--who", default=getpass.getuser, help="Your name, for the signed history.", show_default="login")
_WHY = click.option("--why", required=True, help="The reason, kept and signed.")
_JSON = click.option("--json", "want_json", is_flag=True, help="JSON instead of a table.")


@click.command()
@click.argument("stream")
@_JSON
@click.pass_obj
def versions(given: str | None, stream: str, *, want_json: bool) -> None:
    """List STREAM's model versions: stage, state, parent, verdict, and a link to the evidence in MLflow.

    `kept`, on the public gate set along a version's ancestry: average accuracy over the domains, backward transfer in
    points, and the domain that stands worst against the best ancestor. --json has forgetting for every domain.
    """
    from tidegate.wiring import open_service

    service = open_service(given)
    model = service.model(stream)
    found = sorted(service.store.versions(model), key=lambda v: v.version, reverse=True)
    rows = []
    for version in found:
        verdict = ancestry.signed_tag(version, "verdict", service.trusted("verdicts"))
        kept = memory.read(version) or {}
        rows.append(
            {
                "version": version.version,
                "stage": version.stage,
                "state": version.tag("state"),
                "alias": ",".join(version.aliases),
                "verdict": verdict["outcome"] if verdict else "no valid signature",
                "guarantee": ancestry.guarantee(version, service.trusted("receipts")),
                "parent_version": version.tag("parent_version") or "base",
                "round": version.tag("round_id"),
                "adapter_sha256": version.tag("adapter_sha256"),
                "pruned": pruning.pruned_at(version),
                **{name: kept.get(name) for name in ("average_accuracy", "backward_transfer", "forgetting")},
                "url": f"{service.mlflow_uri}/#/models/{model}/versions/{version.version}",
            }
        )
    if want_json:
        output.as_json(rows)
        return
    first = ("version", "stage", "state", "alias", "verdict", "guarantee")
    columns = (*first, "parent", "round", "adapter", "kept", "evidence")
    for row in rows:
        row["state"] = f"{row['state']}, pruned" if row["pruned"] else row["state"]
    cells = [(*list(r.values())[:8], str(r["adapter_sha256"])[:12], _kept(r), r["url"]) for r in rows]
    output.table(f"versions of {stream}", columns, cells)


def _kept(row: dict[str, Any]) -> str:
    """Average accuracy, backward transfer, and the domain that was forgotten most."""
    if row["average_accuracy"] is None:
        return "-"
    told = f"{100 * row['average_accuracy']:.0f}%"
    if row["backward_transfer"] is not None:
        worst = max(row["forgetting"], key=row["forgetting"].__getitem__)
        told += f", {100 * row['backward_transfer']:+.1f}, {worst} {-100 * row['forgetting'][worst]:+.1f}"
    return told


@click.command()
@click.argument("stream")
@click.argument("version", type=int)
@_WHY
@_WHO
@click.pass_obj
def approve(given: str | None, stream: str, version: int, *, why: str, who: str) -> None:
    """Approve VERSION of STREAM: it becomes Production, and the server swaps to it. The same as in MLflow's UI.

    The guard refuses a version that failed its gates, is stale, or is not what was signed.
    """
    from tidegate.wiring import open_service

    service = open_service(given)
    model = service.model(stream)
    approval = service.store.promote(
        model, version, why=why, who=who, approvals=service.approvals(signing=True), trust=service.trust
    )
    output.say(f"version {version} of {model} is Production; approval {approval['seq']} signed by {approval['key_id']}")


@click.command()
@click.argument("stream")
@click.argument("version", type=int)
@_WHY
@_WHO
@click.pass_obj
def reject(given: str | None, stream: str, version: int, *, why: str, who: str) -> None:
    """Reject candidate VERSION of STREAM. What it spent stays spent; the next round may run."""
    from tidegate.wiring import open_service

    service = open_service(given)
    model = service.model(stream)
    service.store.reject(
        model, version, why=why, who=who, approvals=service.approvals(signing=True), trust=service.trust
    )
    output.say(f"version {version} of {model} is rejected")


@click.command()
@click.argument("stream")
@click.option("--to", type=int, help="The version to return to; default: the one that was live before.")
@_WHY
@_WHO
@click.option(
    "--emergency", is_flag=True, help="With the registry down: from the server's own cache, reconciled later."
)
@click.pass_obj
def rollback(given: str | None, stream: str, *, to: int | None, why: str, who: str, emergency: bool) -> None:
    """Return STREAM to a version that was approved before. No restart; the server swaps within a second."""
    from tidegate.rollback import roll_back
    from tidegate.wiring import open_service

    service = open_service(given)
    result = roll_back(service, stream, to=to, why=why, who=who, emergency=emergency)
    output.say(result)


@click.command()
@click.argument("stream")
@_JSON
@click.pass_obj
def history(given: str | None, stream: str, *, want_json: bool) -> None:
    """Who moved which version of STREAM, when and why. The signatures and the chain are verified before printing."""
    from tidegate.wiring import open_service

    service = open_service(given)
    approvals = service.approvals()
    approvals.verify(service.trusted("approvals"))
    rows = approvals.history(service.model(stream))
    if want_json:
        output.as_json(rows)
        return
    columns = ("seq", "when", "who", "kind", "version", "from", "to", "why")
    for row in rows:
        if row.get("guarantee") == "none":
            row["kind"] += ", without privacy"
    output.table(f"history of {stream} (verified)", columns, [[r[c] for c in columns] for r in rows])
