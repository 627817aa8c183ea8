"""What of the past must stay: asked of the registry and of the workspace's records."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tidegate.errors import WorkspaceError

if TYPE_CHECKING:
    from tidegate.wiring import Service


def needed_revisions(service: Service) -> set[str]:
    """Data revisions that a registered version, or a round recorded in the workspace, names.

    Raises:
        RegistryError: the registry cannot be asked; then nothing may be removed.
        WorkspaceError: a round's plan cannot be read.
    """
    needed = set()
    for stream in service.settings.streams:
        for version in service.store.versions(service.model(stream)):
            if revision := version.tag("data_revision"):
                needed.add(revision)
    for file in sorted((service.workspace.root / "rounds").glob("*/plan.json")):
        try:
            needed.add(str(json.loads(file.read_bytes())["data_revision"]))
        except (OSError, ValueError, KeyError):
            raise WorkspaceError(
                f"{file}: unreadable, so the data it needs is unknown; restore it or remove it"
            ) from None
    return needed
