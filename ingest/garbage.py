"""What the data repository no longer needs: files in DVC's cache that no kept revision names.

Every block stays: the newest revision holds them all. What goes is what sealing leaves behind: the listing of a shelf
as it was before each of its blocks, DVC's listing of each single block, and files of blocks that a crash kept from
being committed. A revision that is kept can be checked out as before; one that is not has lost its listings, though
not its blocks.

Nothing younger than a bound is touched, so that a block under way is safe without a lock. The remote is left alone:
it is the backup. Loose git objects are packed, none is removed.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import yaml

from ingest import layout
from ingest.errors import DataCorrupt
from ingest.layout import MAIN

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from ingest.repository import DataRepository

# A block takes seconds from its first file to its commit, an hour where the disk is nearly dead.
YOUNG_SECONDS: Final = 3600.0
_HASH: Final = re.compile(r"[0-9a-f]{32}(\.dir)?\Z")


@dataclass(frozen=True)
class Garbage:
    """What a collection would remove, or has removed: files of the cache, and what it looked at.

    `bytes` counts what the disk gets back: a file that a lane's folder still links to gives nothing.
    """

    files: tuple[Path, ...]
    bytes: int
    kept_revisions: int
    kept_files: int


def find(repo: DataRepository, revisions: Iterable[str], older_seconds: float = YOUNG_SECONDS) -> Garbage:
    """Files of the cache that neither the heads nor `revisions` name and that are older than `older_seconds`.

    Raises:
        RepositoryError: a revision is not in the repository.
        DataCorrupt: the listing of a kept revision is missing, so that nothing can be said about its files.
    """
    # The cache first: what is committed later is younger than anything in this list, or named by the heads.
    now = time.time()
    present = {name: path for path in _cached(repo.cache) if (name := _name(path)) is not None}
    main = repo.git.head(MAIN)
    keep = {*revisions, *repo.lane_heads().values(), *([] if main is None else [main])}
    named = _named(repo, keep)
    files, size = [], 0
    for name, path in sorted(present.items()):
        if name in named:
            continue
        status = path.stat()
        if now - max(status.st_mtime, status.st_ctime) > older_seconds:
            files.append(path)
            size += status.st_size if status.st_nlink == 1 else 0
    return Garbage(tuple(files), size, len(keep), len(named))


def remove(repo: DataRepository, garbage: Garbage) -> None:
    """Remove what :func:`find` found, and pack git's loose objects. May be killed at any moment and run again.

    Raises:
        RepositoryError: git cannot pack.
    """
    for path in garbage.files:
        path.unlink(missing_ok=True)
    repo.git.pack()


def _cached(cache: Path) -> Iterator[Path]:
    return (path for path in (cache / "files" / "md5").glob("??/*") if path.is_file())


def _name(path: Path) -> str | None:
    name = path.parent.name + path.name
    return name if _HASH.match(name) else None


def _named(repo: DataRepository, revisions: Iterable[str]) -> set[str]:
    """Cache names of everything the pointers of these revisions lead to."""
    listings = {pointer for revision in revisions for pointer in _listings(repo, revision)}
    named = set(listings)
    for listing in listings:
        file = repo.cache / "files" / "md5" / listing[:2] / listing[2:]
        try:
            named |= {entry["md5"] for entry in json.loads(file.read_bytes())}
        except (OSError, ValueError, KeyError, TypeError):
            raise DataCorrupt(
                f"cache file {listing}: missing or unreadable, though a kept revision names it; "
                "`dvc fetch` it from the remote in a clone of that revision, then try again"
            ) from None
    return named


def _listings(repo: DataRepository, revision: str) -> Iterator[str]:
    for lane in repo.git.folders(revision, "lanes"):
        for shelf in repo.git.folders(revision, f"lanes/{lane}"):
            pointer = repo.git.read(revision, f"lanes/{lane}/{shelf}/{layout.POINTER}")
            if pointer is not None:
                yield str(yaml.safe_load(pointer)["outs"][0]["md5"])
