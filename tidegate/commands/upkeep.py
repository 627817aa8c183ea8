"""`tidegate gc|prune`: what the workspace no longer needs, of data and of adapters."""

from __future__ import annotations

import getpass

import click

from tidegate import output


@click.command()
@click.option("--yes", is_flag=True, help="Remove it; without this flag it is only told.")
@click.option(
    "--older-hours",
    default=1.0,
    show_default=True,
    type=click.FloatRange(min=0.1),
    help="Leave what is younger: a block under way must be.",
)
@click.option("--json", "want_json", is_flag=True, help="JSON instead of sentences.")
@click.pass_obj
def gc(given: str | None, *, yes: bool, older_hours: float, want_json: bool) -> None:
    """Remove what neither the newest data nor any version or round needs from the data repository's cache.

    Every sealed block stays, and every revision that a registered version or a recorded round names can be checked out
    as before. The DVC remote is left alone. Safe beside running ingest. Needs the registry, which knows the versions.
    """
    from ingest import garbage
    from tidegate.upkeep import needed_revisions
    from tidegate.wiring import open_service

    service = open_service(given)
    repo = service.repository()
    found = garbage.find(repo, needed_revisions(service), older_hours * 3600)
    if yes:
        garbage.remove(repo, found)
    if want_json:
        output.as_json(
            {
                "removed": yes,
                "files": len(found.files),
                "bytes": found.bytes,
                "kept_revisions": found.kept_revisions,
                "kept_files": found.kept_files,
            }
        )
        return
    output.say(f"kept: {found.kept_files} files that {found.kept_revisions} revisions name")
    verb = "removed" if yes else "would remove"
    output.say(f"{verb}: {len(found.files)} files, {found.bytes / 1e6:.1f} MB" + ("" if yes else "; --yes does it"))


@click.command()
@click.argument("stream", required=False)
@click.option("--apply", is_flag=True, help="Remove them; without this flag it is only told.")
@click.option("--who", default=getpass.getuser, help="Your name, kept with what is removed.", show_default="login")
@click.option("--json", "want_json", is_flag=True, help="JSON instead of a table.")
@click.pass_obj
def prune(given: str | None, stream: str | None, *, apply: bool, who: str, want_json: bool) -> None:
    """Remove adapter weights that nobody needs any more, of STREAM or of all, in MLflow and in the workspace.

    Kept: what is live, what waits for a person, registry.keep_previous versions to roll back to, and what an unfinished
    round needs. Plans, receipts, verdicts, approvals and reports are never removed. May be stopped and repeated.
    """
    from tidegate import pruning
    from tidegate.wiring import open_service

    service = open_service(given)
    if stream is not None:
        service.stream(stream)
    found = [fate for fate in pruning.look(service) if stream in (None, fate.stream)]
    done: dict[tuple[str, int], pruning.Fate] = {}
    for fate in pruning.prune(service, stream, who=who) if apply else ():
        done[fate.stream, fate.version] = fate
        if not want_json:
            output.say(f"version {fate.version} of {fate.stream}: {fate.fate}: {fate.why}")
    now = [done.get((fate.stream, fate.version), fate) for fate in found]
    over = [fate for fate in (done.values() if apply else found) if fate.fate == ("pruned" if apply else "prune")]
    size = sum({fate.adapter_sha256: fate.bytes for fate in over}.values())
    if want_json:
        output.as_json({"applied": apply, "versions": [fate.as_json() for fate in now], "workspace_bytes": size})
        return
    if not apply:
        rows = [(f.stream, f.version, f.state, f.adapter_sha256[:12], f.fate, f.why) for f in now]
        output.table("", ("stream", "version", "state", "adapter", "weights", "why"), rows)
    verb, way = ("removed", "") if apply else ("would remove", "; --apply does it")
    output.say(
        f"{verb}: weights of {len(over)} versions, {size / 1e6:.1f} MB in the workspace and their copies in MLflow{way}"
    )
