"""Which adapters' weights nobody needs any more, and removing them. Papers are never touched.

    kept      what is live, what waits for a person, what a rollback can return to (registry.keep_previous of them),
              what an unfinished round needs, and whatever is not known to be over
    removed   weights of failed, undecided, rejected, superseded and stale versions, and of those retired long ago:
              in MLflow's artifact store and in the workspace's `adapters`

What was decided is read from the signed history, since tags can be rewritten. One adapter may be that of several
versions: it goes when none of them, in no stream, needs it. Receipts, verdicts, approvals, plans, reports and the
adapter's config stay, so that audit and lineage answer as before.

A removal happens under the lock of decisions, after a second look: tag, MLflow's weights, the folder, a note in
`pruned/`. Every step may be repeated; what a crash or Ctrl-C left is done by the next run.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from registry.approvals import now
from registry.promotion import PRUNED
from registry.states import PRODUCTION, STAGING, State
from tidegate.workspace import write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from registry.approvals import Standing
    from registry.states import ModelVersion
    from tidegate.wiring import Service

SHA256 = re.compile(r"[0-9a-f]{64}")
# What is over, and never comes back by itself.
OVER = frozenset({State.FAILED, State.UNDECIDED, State.REJECTED, State.SUPERSEDED, State.STALE, State.RETIRED})


@dataclass(frozen=True)
class Fate:
    """What becomes of one version's weights.

    Attributes:
        fate: keep, prune (they go), or pruned (they are gone).
        why: in words.
        bytes: of the workspace's copy; 0 when it has none. Versions of one adapter share it.
    """

    stream: str
    version: int
    state: str
    adapter_sha256: str
    fate: str
    why: str
    bytes: int

    def as_json(self) -> dict[str, Any]:
        """JSON form, with every field."""
        return asdict(self)


def look(service: Service) -> list[Fate]:
    """The fate of every version of every stream; streams share adapters, so that all are looked at. Changes nothing.

    Raises:
        RegistryError: the registry or the history cannot be asked; then nothing is known to be over.
        WorkspaceError: a round's plan cannot be read.
    """
    approvals = service.approvals()
    approvals.verify(service.trusted("approvals"))
    found = {name: service.store.versions(service.model(name)) for name in service.settings.streams}
    needed: dict[tuple[str, int], str] = {}
    shas: dict[str, str] = dict(_of_rounds(service))
    for stream, versions in found.items():
        standing = approvals.standing(service.model(stream))
        keep = service.stream(stream).registry.keep_previous
        for version in versions:
            why = _needed(version, standing, keep) or shas.get(version.adapter_sha256, "")
            if why:
                needed[stream, version.version] = why
                shas.setdefault(version.adapter_sha256, f"version {version.version} of {stream} has the same adapter")
        for row in (*_returnable(standing, keep), *([standing.live] if standing.live else [])):
            shas.setdefault(str(row["adapter_sha256"]), f"version {row['version']} of {stream} needs this adapter")
    fates = []
    for stream, versions in found.items():
        for version in sorted(versions, key=lambda v: v.version):
            why = needed.get((stream, version.version)) or shas.get(version.adapter_sha256, "")
            fates.append(_fate(service, stream, version, why))
    return fates


def prune(service: Service, stream: str | None, *, who: str) -> Iterator[Fate]:
    """Remove what `look` says nobody needs, of one stream or of all; yields each version as it is done.

    Raises:
        RegistryError: MLflow does not let go of a file; the rest is left for the next run.
    """
    for fate in look(service):
        if fate.fate != "prune" or (stream is not None and fate.stream != stream):
            continue
        # Nobody goes live or is rolled back to while it is looked at once more and removed.
        with service.approvals().deciding():
            again = {(f.stream, f.version): f for f in look(service)}.get((fate.stream, fate.version))
            if again is None or again.fate != "prune":
                continue
            removed = _remove(service, again, who)
        why = again.why if removed else "what is stored there is another adapter; left alone"
        yield replace(again, fate="pruned" if removed else "keep", why=why)


def note(root: Path, adapter_sha256: str) -> dict[str, Any] | None:
    """What the workspace knows of an adapter that was pruned: at, who, why, versions; None when it was not.

    Args:
        root: the workspace's.
        adapter_sha256: which.
    """
    try:
        return dict(json.loads(_note_file(root, adapter_sha256).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def pruned_at(version: ModelVersion) -> str:
    """When a version's weights were removed, by its tag; empty when they were not."""
    try:
        return str(json.loads(version.tag(PRUNED) or "{}").get("at", ""))
    except (ValueError, AttributeError):
        return ""


def _of_rounds(service: Service) -> Iterator[tuple[str, str]]:
    """Adapters that a round without an end starts from or has made."""
    from tidegate.errors import WorkspaceError

    rows = service.ledger.rows()
    for file in sorted((service.workspace.root / "rounds").glob("*/plan.json")):
        if (file.parent / "ended.json").exists():
            continue
        try:
            plan = json.loads(file.read_bytes())
            why = f"round {plan['round_id']} has not ended"
            parent = plan["parent_sha256"]
        except (OSError, ValueError, KeyError):
            raise WorkspaceError(f"{file}: unreadable, so what it needs is unknown; restore it or remove it") from None
        if parent:
            yield str(parent), why
        for row in rows:
            if row.round_id == plan["round_id"] and row.adapter_sha256:
                yield str(row.adapter_sha256), why


def _needed(version: ModelVersion, standing: Standing, keep: int) -> str:
    """Why a version's weights stay; empty: by itself it needs them no more."""
    live = standing.live is not None and standing.live["version"] == version.version
    if live or version.stage == PRODUCTION or "live" in version.aliases:
        return "is live"
    if version.state is State.CANDIDATE or version.stage == STAGING:
        return "waits for a person"
    if version.version in {int(row["version"]) for row in _returnable(standing, keep)}:
        return "was live: a rollback can return to it"
    if version.state not in OVER:
        return f"is {version.state or 'of no known state'}"
    if not SHA256.fullmatch(version.adapter_sha256):
        return "names no adapter"  # a tag is anybody's text, and this one becomes a path
    return ""


def _returnable(standing: Standing, keep: int) -> Sequence[Mapping[str, Any]]:
    """The newest decisions behind versions that a rollback can return to: first what it passes through, then others."""
    below = list(reversed(standing.stack[:-1] if standing.live else standing.stack))
    passed = {row["version"] for row in below}
    others = sorted(standing.approved.values(), key=lambda row: int(row["seq"]), reverse=True)
    live = standing.live["version"] if standing.live else None
    rows = [*below, *(row for row in others if row["version"] not in passed)]
    return [row for row in rows if row["version"] != live][:keep]


def _fate(service: Service, stream: str, version: ModelVersion, why: str) -> Fate:
    sha, size = version.adapter_sha256, 0
    if SHA256.fullmatch(sha) and (folder := service.workspace.adapters / sha).is_dir():
        size = sum(file.stat().st_size for file in folder.iterdir())
    gone = note(service.workspace.root, sha) if SHA256.fullmatch(sha) else None
    if why:
        fate = "keep"
    elif pruned_at(version) and not size and gone and gone["versions"].get(f"{stream}/{version.version}") == "done":
        fate, why = "pruned", f"weights removed at {gone['at']} by {gone['who']}"
    else:
        fate, why = "prune", f"is {version.state}, and nobody needs it"
    return Fate(stream, version.version, str(version.state or ""), version.adapter_sha256, fate, why, size)


def _remove(service: Service, fate: Fate, who: str) -> bool:
    """Remove one version's weights; False when MLflow holds something else there, whose owner may need it.

    Where a version's files are is for MLflow to say, and whoever made the version may have pointed it at another's:
    only what is the adapter that nobody needs is removed, or what an earlier run began to.
    """
    from tidegate.audit import stored_sha256

    model, root, sha, name = service.model(fate.stream), service.workspace.root, fate.adapter_sha256, _name(fate)
    before = note(root, sha)
    steps = dict(before["versions"]) if before else {}
    stored = stored_sha256(service, model, fate.version)
    if stored not in {None, sha}:
        return False
    told = {"at": now(), "who": who, "why": fate.why}
    begun = name in steps
    steps[name] = "begun"
    file = _note_file(root, sha)
    write_json(file, {**told, "adapter_sha256": sha, "versions": steps})
    # Before the weights go: a refusal then names the reason, even if this is killed between.
    service.store.set_tag(model, fate.version, f"tidegate.{PRUNED}", json.dumps(told))
    if stored or begun:
        service.store.remove_weights(model, fate.version)
    _remove_folder(service.workspace.adapters, sha)
    write_json(file, {**told, "adapter_sha256": sha, "versions": {**steps, name: "done"}})
    return True


def _remove_folder(adapters: Path, sha: str) -> None:
    """Remove the workspace's copy; renamed first, so that no half an adapter is ever found under its name."""
    if (adapters / sha).is_dir():
        gone = adapters / f".pruned-{sha}"
        shutil.rmtree(gone, ignore_errors=True)
        (adapters / sha).rename(gone)
    for rest in adapters.glob(".pruned-*"):
        shutil.rmtree(rest)


def _name(fate: Fate) -> str:
    return f"{fate.stream}/{fate.version}"


def _note_file(root: Path, sha: str) -> Path:
    return root / "pruned" / f"{sha}.json"
