"""Looking into sealed blocks: what the manifest says, whether the files are what it says, and what is in them."""

from __future__ import annotations

import difflib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tidegate.errors import TidegateError, UnknownName

if TYPE_CHECKING:
    from ingest.manifest import Manifest
    from ingest.repository import PinnedData
    from tidegate.wiring import Service

NEAR_MAX = 3


def find_block(service: Service, block_id: str) -> Manifest:
    """The manifest of a block of any stream.

    Raises:
        UnknownName: there is no such block; the message names those that look like it.
    """
    repo = service.repository()
    if (found := repo.manifest(block_id)) is not None:
        return found
    names = [m.block_id for stream in service.settings.streams for m in repo.manifests(stream)]
    near = difflib.get_close_matches(block_id, names, NEAR_MAX)
    hint = f"near it: {', '.join(near)}" if near else "list them by `tidegate blocks STREAM`"
    raise UnknownName(f"block={block_id}: no such block among {len(names)}; {hint}")


@contextmanager
def opened(service: Service, stream: str) -> Iterator[PinnedData]:
    """A clone of the data repository at the stream's newest revision, gone when the block ends."""
    repo = service.repository()
    with tempfile.TemporaryDirectory(prefix="look-", dir=service.workspace.run) as scratch:
        pinned = repo.checkout(repo.pin(stream), Path(scratch) / "data")
        try:
            yield pinned
        finally:
            pinned.close()


def sealing_commit(service: Service, manifest: Manifest) -> str | None:
    """The commit by which the block came to exist; None if git does not know.

    Raises:
        TidegateError: git cannot be run.
    """
    command = ["git", "--git-dir", str(service.workspace.data / ".git"), "log", "-1", "--format=%H", "--diff-filter=A"]
    command += [f"refs/heads/lanes/{manifest.lane}", "--", f":(glob)lanes/**/{manifest.block_id}.json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise TidegateError(f"block={manifest.block_id}: git log: {' '.join(done.stderr.split())}; see {command[2]}")
    return done.stdout.strip() or None


def facts_of(service: Service, manifest: Manifest, pinned: PinnedData) -> dict[str, Any]:
    """Everything about a block but its content; each file's sha256 is computed and compared."""
    from ingest.errors import DataCorrupt

    files = []
    for file in manifest.files:
        wrong = ""
        try:
            pinned.file(manifest, file.split)
        except DataCorrupt as error:
            wrong = str(error)
        files.append({**file.model_dump(mode="json"), "verified": not wrong, "wrong": wrong})
    counts = manifest.counts
    share = service.ledger.share_used(manifest.block_id) if service.ledger.knows(manifest.block_id) else 0.0
    return {
        "block": manifest.block_id,
        "stream": manifest.stream,
        "lane": manifest.lane,
        "topic": manifest.topic,
        "incarnation": manifest.incarnation,
        "offsets": [part.model_dump() for part in manifest.offsets],
        "nominal_units": manifest.nominal_units,
        "counts": {"in": counts.total, **counts.model_dump()},
        "sealed_at": manifest.sealed_at,
        "sealed_by_commit": sealing_commit(service, manifest),
        "revision": pinned.revision,
        "schema_version": manifest.schema_version,
        "suite_sha256": manifest.suite_sha256,
        "policy": manifest.policy.model_dump(mode="json"),
        "filter_used": share,
        "files": files,
    }


def rows_of(manifest: Manifest, pinned: PinnedData, split: str | None, limit: int) -> list[dict[str, Any]]:
    """The first rows of one split, or of all: where each stood on the topic, and what it holds.

    Raises:
        DataCorrupt: a file is missing, or is not what the manifest says.
    """
    from ingest.parquet import REJECTS, read_rejects, read_rows

    found: list[dict[str, Any]] = []
    for file in manifest.files:
        if split not in {None, file.split} or len(found) >= limit:
            continue
        path = pinned.file(manifest, file.split)
        if path is None:
            continue
        if file.split == REJECTS:
            values = [(place, as_text(value)) for place, value in read_rejects(path).items()]
            found += [{"split": REJECTS, "partition": p, "offset": o, "value": text} for (p, o), text in values]
        else:
            found += [
                {"split": file.split, "partition": p, "offset": o, "record": r.model_dump(exclude_none=True)}
                for p, o, r in read_rows(path)
            ]
    return found[:limit]


def as_text(value: bytes) -> str:
    """Bytes as text; what is no UTF-8 is escaped by its number."""
    return value.decode("utf-8", "backslashreplace")


class Rejects:
    """Bytes of rejected messages that were too large for the dead-letter topic, from the data repository."""

    def __init__(self, service: Service, pinned: PinnedData) -> None:
        self._repo = service.repository()
        self._pinned = pinned
        self._read: dict[str, dict[tuple[int, int], bytes]] = {}

    def value(self, reference: str, source: tuple[int, int] | None) -> bytes:
        """The bytes of the message at `source` (partition, offset), from the file a letter refers to.

        Raises:
            UnknownName: the block is not sealed, or holds no such message.
            DataCorrupt: the file is missing, or is not what the manifest says.
        """
        from ingest.parquet import REJECTS, read_rejects

        if reference not in self._read:
            # .../BLOCK/rejects.parquet
            manifest = self._repo.manifest(PurePosixPath(reference).parent.name)
            file = None if manifest is None else manifest.file(REJECTS)
            if manifest is None or file is None or file.path != reference:
                raise UnknownName(f"reference={reference}: no such file is sealed; ask again when ingest has sealed it")
            path = self._pinned.file(manifest, REJECTS)
            # One file at a time: they are large by nature.
            self._read = {reference: {} if path is None else read_rejects(path)}
        held = self._read[reference]
        if source is None or source not in held:
            raise UnknownName(f"reference={reference}: holds no message of partition and offset {source}")
        return held[source]
