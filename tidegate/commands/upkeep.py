"""`tidegate gc`: what the workspace no longer needs."""

from __future__ import annotations

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
