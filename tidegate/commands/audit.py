"""`tidegate audit`: what was spent on whose data, verified here, exported, or verified from an export."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tidegate import output

if TYPE_CHECKING:
    from privacy.verify import Report


@click.command()
@click.argument("stream", required=False)
@click.option(
    "--export", "to", metavar="DIR", type=click.Path(path_type=Path), help="Write all proofs to a new folder."
)
@click.option(
    "--verify", "of", metavar="DIR", type=click.Path(path_type=Path), help="Verify an export; needs no workspace."
)
@click.option(
    "--key",
    "keys",
    metavar="[PURPOSE=]KEY",
    multiple=True,
    help="With --verify: a public key you got by another way, a PEM file or its fingerprint in hex; PURPOSE (receipts, "
    "verdicts or approvals) binds it to that purpose.",
)
@click.option(
    "--expect-head",
    "heads",
    metavar="HEAD",
    multiple=True,
    help="With --verify: a head you noted earlier; it must be in the ledger's chain or the approvals'.",
)
@click.option("--json", "want_json", is_flag=True, help="JSON instead of a table.")
@click.pass_obj
def audit(
    given: str | None,
    stream: str | None,
    *,
    to: Path | None,
    of: Path | None,
    keys: tuple[str, ...],
    heads: tuple[str, ...],
    want_json: bool,
) -> None:
    """Recompute what was spent from the ledger's rows: per block and stream, the claim and the filter's share used.

    The hash chain of the ledger, receipts, approvals and the commits that name a head are verified first. With
    --export, the proofs are written for somebody else, who verifies them by --verify with keys of their own.
    """
    if sum(value is not None for value in (stream, to, of)) > 1:
        raise click.UsageError("one of STREAM, --export and --verify at a time: an export holds all streams")
    if of is None and (keys or heads):
        raise click.UsageError("--key and --expect-head go with --verify")
    if of is not None:
        if not keys:
            raise click.UsageError("--verify needs --key: a key inside the export is not trusted by itself")
        _verify(of, keys, heads, want_json=want_json)
        return
    from tidegate.audit import examine, export
    from tidegate.wiring import open_service

    service = open_service(given)
    if to is not None:
        report, written = export(service, to)
        _tell(report, {"folder": str(to), "written": written}, want_json=want_json)
        return
    _show(examine(service, stream), want_json=want_json)


def _verify(folder: Path, keys: tuple[str, ...], heads: tuple[str, ...], *, want_json: bool) -> None:
    from privacy.errors import ExportBroken
    from tidegate.audit import check

    try:
        report = check(folder, keys, heads)
    except ExportBroken as error:
        if want_json:
            output.as_json({"holds": False, "mismatch": str(error)})
            sys.exit(1)
        raise
    _tell(report, {"holds": True}, want_json=want_json)


def _tell(report: Report, more: dict[str, Any], *, want_json: bool) -> None:
    if want_json:
        streams = {name: found.as_json() for name, found in report.streams.items()}
        facts = {"verified": report.verified, "not_checked": report.not_checked, "streams": streams}
        output.as_json({**more, **facts, "ledger_head": report.ledger_head, "approvals_head": report.approvals_head})
        return
    for line in report.verified:
        output.say(f"verified     {line}")
    for line in report.not_checked:
        output.say(f"not checked  {line}")
    for name, found in report.streams.items():
        output.say(f"\n{name}: {found.claim}; {found.share_used_max:.1%} of the fullest filter used")
        _tell_unprotected(found.rounds_without_privacy)
    output.say(f"\nledger head     {report.ledger_head}\napprovals head  {report.approvals_head}")
    if "folder" in more:
        state = "written" if more["written"] else "unchanged"
        output.say(f"{state}: {more['folder']}; note the heads, and send the fingerprints in STATEMENT.md another way")


def _tell_unprotected(rounds: Sequence[str]) -> None:
    if rounds:
        output.say(f"WITHOUT PRIVACY, on blocks without a promise: rounds {', '.join(rounds)}")


def _show(report: dict[str, Any], *, want_json: bool) -> None:
    if want_json:
        output.as_json(report)
        return
    for line in report["verified"]:
        output.say(f"verified  {line}")
    for row in report["rounds"]:
        if not row["installed_code"]:
            output.say(f"note      {row['round_id']}: made by other code than is installed ({row['code_sha256'][:12]})")
        if row["pruned"]:
            output.say(f"note      {row['round_id']}: weights pruned {row['pruned']}; its papers are all here")
    for name, part in report["streams"].items():
        output.say(f"\n{name}: {part['claim']}")
        _tell_unprotected(part["rounds_without_privacy"])
        rows = [
            (
                b["block"],
                b["claim"],
                f"{b['share_used']:.1%}",
                ", ".join(b["rounds"]),
                f"{b['holdout_share_used']:.1%}" if b["holdout_reads"] else "",
            )
            for b in part["blocks"]
        ]
        output.table("", ("block", "claim", "filter used", "rounds", "holdout used"), rows)
