"""`tidegate versions|approve|promote|reject|rollback|history`: what the registry wants to run, and who said so."""

from __future__ import annotations

import getpass
from typing import Any

import click

from registry.canary import CANARY, told_of
from tidegate import ancestry, memory, output, pruning

_WHO = click.option(
    "--who",
    default=getpass.getuser,
    help="Your name, for the signed history; MLflow's login where it asks for one.",
    show_default="login",
)
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
    approval = service.desk.promote(
        model, version, why=why, who=who, approvals=service.approvals(signing=True), trust=service.trust
    )
    output.say(f"version {version} of {model} is Production; approval {approval['seq']} signed by {approval['key_id']}")


class _Share(click.ParamType[float]):
    """A share of requests: 10% or 0.1."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """A number of 0 to 1."""
        try:
            text = str(value).strip()
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            self.fail(f"{value}: must be between 0% and 100%, such as 10% or 0.1", param, ctx)
        return share


@click.command()
@click.argument("stream")
@click.argument("version", type=int)
@click.option(
    "--canary",
    "share",
    type=_Share(),
    default="100%",
    metavar="SHARE",
    help="Of the requests, such as 10%. 0% ends it; the default, 100%, is `tidegate approve`.",
)
@click.option("--header/--no-header", default=True, help="Whether a client may choose by x-tidegate-canary.")
@click.option("--sticky/--no-sticky", default=True, help="Whether a user, by the field `user`, stays on one side.")
@_WHY
@_WHO
@click.pass_obj
def promote(
    given: str | None, stream: str, version: int, *, share: float, header: bool, sticky: bool, why: str, who: str
) -> None:
    """Promote VERSION of STREAM in steps: a share of the requests as a canary, more of them, then all.

    The checks are those of `tidegate approve`, and the decision is signed the same way; the version stays in Staging
    until it gets everything. The server steps back by itself when its answers fail more often or come later than those
    of what is live.
    """
    from registry.canary import Terms
    from tidegate.wiring import open_service

    service = open_service(given)
    model = service.model(stream)
    signing: dict[str, Any] = {"approvals": service.approvals(signing=True), "trust": service.trust}
    if share == 1:
        row = service.desk.promote(model, version, why=why, who=who, **signing)
        told = "is Production"
    elif share:
        terms = Terms(share, header=header, sticky=sticky)
        row = service.desk.canary(model, version, terms, why=why, who=who, **signing)
        told = f"is a canary: {terms}"
    else:
        row = service.desk.end_canary(model, version, why=why, who=who, **signing)
        told = "is no canary any more; it waits"
    output.say(f"version {version} of {model} {told}; approval {row['seq']} signed by {row['key_id']}")


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
    service.desk.reject(
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
        if row["kind"] == CANARY:
            row["kind"] = told_of(row["canary"])
        if row.get("guarantee") == "none":
            row["kind"] += ", without privacy"
    output.table(f"history of {stream} (verified)", columns, [[r[c] for c in columns] for r in rows])
