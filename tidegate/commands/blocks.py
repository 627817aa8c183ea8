"""`tidegate blocks`, `tidegate block`: what was sealed, and whether it still is what its manifest says."""

from __future__ import annotations

import sys
from typing import Any

import click

from tidegate import output

_SPLITS = ("train", "holdout", "set_aside", "rejects")


@click.command()
@click.argument("stream")
@click.option("--json", "want_json", is_flag=True, help="JSON instead of a table.")
@click.pass_obj
def blocks(given: str | None, stream: str, *, want_json: bool) -> None:
    """List STREAM's sealed blocks: which offsets each covers, and how many records were accepted and rejected.

    Exact counts are for people who may read the workspace; they never leave it by MLflow, metrics or exports.
    """
    from tidegate.wiring import open_service

    service = open_service(given)
    service.stream(stream)
    manifests = service.repository().manifests(stream)
    if want_json:
        output.as_json([m.model_dump(mode="json") for m in manifests])
        return
    rows = [
        (
            m.block_id,
            " ".join(f"{o.partition}:{o.start}-{o.end - 1}" for o in m.offsets),
            m.counts.sealed,
            m.counts.rejected,
            m.counts.duplicate,
            m.counts.set_aside,
            f"{service.ledger.share_used(m.block_id):.1%}" if service.ledger.knows(m.block_id) else "0.0%",
        )
        for m in manifests
    ]
    columns = ("block", "partition:offsets", "accepted", "rejected", "duplicate", "set aside", "filter used")
    output.table(f"blocks of {stream}", columns, rows)


@click.command()
@click.argument("block_id", metavar="ID")
@click.option("--content", is_flag=True, help="Show rows too: they are people's data, and that you asked is recorded.")
@click.option("--split", type=click.Choice(_SPLITS), help="Rows of this split only.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1), help="At most so many rows.")
@click.option("--json", "want_json", is_flag=True, help="JSON instead of lines and tables.")
@click.pass_obj
def block(given: str | None, block_id: str, *, content: bool, split: str | None, limit: int, want_json: bool) -> None:
    """Tell of one sealed block: offsets, counts, policy, its commit, and whether each file still has its sha256.

    Exit 1 if a file is missing or changed. With --content who asked, and when, is a line in the workspace's access.log.
    """
    from tidegate.access import record_access
    from tidegate.blocks import facts_of, find_block, opened, rows_of
    from tidegate.wiring import open_service

    if split is not None and not content:
        raise click.UsageError("--split: chooses rows to show; give --content too")
    service = open_service(given)
    manifest = find_block(service, block_id)
    with opened(service, manifest.stream) as pinned:
        facts = facts_of(service, manifest, pinned)
        if content:
            record_access(service.workspace, "block content", block=block_id, split=split or "all", rows_max=limit)
            facts["rows"] = rows_of(manifest, pinned, split, limit)
    if want_json:
        output.as_json(facts)
    else:
        _tell(facts)
    sys.exit(0 if all(file["verified"] for file in facts["files"]) else 1)


def _tell(facts: dict[str, Any]) -> None:
    from privacy.policy import NO_PRIVACY

    names = ("block", "stream", "topic", "incarnation", "sealed_at", "sealed_by_commit", "revision", "suite_sha256")
    output.facts({name.replace("_", " "): facts[name] for name in names})
    counts, policy = facts["counts"], facts["policy"]
    promise = f"({policy['epsilon']:g}, {policy['delta']:g})-DP per {policy['unit']}, horizon {policy['horizon']}"
    if not policy.get("enabled", True):
        promise = NO_PRIVACY
    parts = " + ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in counts if name != "in")
    output.facts(
        {
            "counts": f"{counts['in']} in = {parts}",
            "policy": f"{promise}, {policy['attempts']} attempts, {policy['nominal_units']} nominal units",
            "filter": f"{facts['filter_used']:.1%} used",
        }
    )
    spans = [(o["partition"], o["start"], o["end"] - 1, o["end"] - o["start"]) for o in facts["offsets"]]
    output.table("offsets", ("partition", "first", "last", "span"), spans)
    files = [(f["split"], f["path"], f["sha256"], "as sealed" if f["verified"] else f["wrong"]) for f in facts["files"]]
    output.table("files", ("split", "path", "sha256", "now"), files)
    if "rows" in facts:
        rows = [(r["split"], f"{r['partition']}:{r['offset']}", r.get("record", r.get("value"))) for r in facts["rows"]]
        output.table(f"first {len(rows)} rows", ("split", "partition:offset", "content"), rows)
