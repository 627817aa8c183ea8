"""A lane: the one place where one writer's blocks are made, and the commit by which they come to exist.

    LANES/<lane>/blocks/<block>/<split>.parquet   tracked by DVC, hard-linked with the shared cache
    LANES/<lane>/blocks.dvc                       DVC's pointer; the committed one is in git
    LANES/<lane>/lock                             held by the writing process
    LANES/<lane>/push/                            where pushing holds a DVC lock of its own

Whatever a crash leaves here that git does not know is removed when the lane is taken again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from ingest.dvcstore import POINTER, TRACKED, DvcStore
from ingest.errors import LaneBusy, LaneConflict
from ingest.manifest import Manifest
from ingest.parquet import REJECTS, read_rows
from ingest.repository import LANE_REFS

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet
    from pathlib import Path

    from ingest.parquet import Row
    from ingest.repository import DataRepository


@dataclass(frozen=True)
class LaneHead:
    """Where a lane stands: its commit and its newest manifest (None: no block yet)."""

    commit: str | None
    last: Manifest | None

    @property
    def seq_next(self) -> int:
        """Sequence number of the next block."""
        return 1 if self.last is None else self.last.seq + 1


class Lane:
    """Exclusive writer of a lane. A context manager."""

    def __init__(self, repo: DataRepository, stream: str, name: str) -> None:
        self.repo = repo
        self.stream = stream
        self.name = name
        self.root = repo.lanes / name
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = self._take()
        remote = repo.remote
        self._dvc = DvcStore(self.root, repo.cache, remote)
        self._push = DvcStore(self.root / "push", repo.cache, remote)
        self.recover()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the lane."""
        self._dvc.close()
        self._push.close()
        os.close(self._lock)

    def _take(self) -> int:
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Let go by the kernel, also after SIGKILL.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise LaneBusy(f"lane={self.name}: written by process {holder}; one writer a lane: stop it first") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        return descriptor

    def recover(self) -> None:
        """Back to what git says: the pointer as committed, no folder of a block that was never committed."""
        commit = self.repo.git.head(self._ref)
        pointer = None if commit is None else self.repo.git.read(commit, f"lanes/{self.name}/{POINTER}")
        self._dvc.restore_pointer(pointer)
        known = set()
        if commit is not None:
            names = self.repo.git.read_folder(commit, f"lanes/{self.name}/manifests")
            known = {name.removesuffix(".json") for name in names}
        tracked = self.root / TRACKED
        if tracked.is_dir():
            for folder in tracked.iterdir():
                if folder.name not in known:
                    shutil.rmtree(folder)

    @property
    def _ref(self) -> str:
        return LANE_REFS + self.name

    def head(self) -> LaneHead:
        """The lane as committed now."""
        commit = self.repo.git.head(self._ref)
        if commit is None:
            return LaneHead(None, None)
        # Names sort like sequence numbers: only the newest manifest is parsed.
        names = self.repo.git.read_folder(commit, f"lanes/{self.name}/manifests")
        last = Manifest.from_json(names[max(names)]) if names else None
        return LaneHead(commit, last)

    def block_id(self, seq: int) -> str:
        """Name of a block; sorts like its number."""
        return f"{self.name}-{seq:09d}"

    def folder(self, block_id: str) -> Path:
        """Where a block's files are made."""
        return self.root / TRACKED / block_id

    def path_in_repository(self, block_id: str, split: str) -> str:
        """A file's path as the manifest names it."""
        return f"lanes/{self.name}/{TRACKED}/{block_id}/{split}.parquet"

    def commit(self, manifest: Manifest, head: LaneHead, *, gaps: AbstractSet[int] = frozenset()) -> LaneHead:
        """Make a block exist: DVC add, then one git commit on top of `head`.

        `gaps` names partitions whose next offset may jump, because the topic no longer holds what is between.

        Raises:
            LaneConflict: another writer committed since `head`, or an offset does not continue the last.
        """
        self._check_continuation(manifest, head, gaps)
        prefix = f"lanes/{self.name}"
        files = {f"{prefix}/manifests/{manifest.block_id}.json": manifest.to_json()}
        if manifest.files:
            files[f"{prefix}/{POINTER}"] = self._dvc.add(self.folder(manifest.block_id))
            files[f"{prefix}/.gitignore"] = f"/{TRACKED}\n".encode()
        message = f"Seal {manifest.block_id}"
        commit = self.repo.git.commit(self._ref, head.commit, message, files=files)
        return LaneHead(commit, manifest)

    def _check_continuation(self, manifest: Manifest, head: LaneHead, gaps: AbstractSet[int]) -> None:
        if (now := self.repo.git.head(self._ref)) != head.commit:
            raise LaneConflict(
                f"lane={self.name}: moved from {head.commit} to {now} by another writer; start over from the manifests"
            )
        if manifest.seq != head.seq_next:
            raise LaneConflict(f"lane={self.name}: block {manifest.seq} where {head.seq_next} is next")
        if head.last is None or head.last.incarnation != manifest.incarnation:
            return
        starts = {part.partition: part.start for part in manifest.offsets}
        for partition, expected in head.last.next_offsets.items():
            start = starts.get(partition)
            if start != expected and not (partition in gaps and start is not None and start > expected):
                raise LaneConflict(
                    f"lane={self.name}: partition {partition} starts at {start}, next offset is {expected}; "
                    "start over from the manifests"
                )

    def manifests(self) -> list[Manifest]:
        """All committed manifests, oldest first."""
        commit = self.repo.git.head(self._ref)
        return [] if commit is None else self.repo.lane_manifests(commit, self.name)

    def rows(self, manifest: Manifest) -> list[Row]:
        """All rows of a committed block, whatever their split.

        Raises:
            DataCorrupt: a file is in neither the lane, nor the cache, nor the remote.
        """
        splits = [file.split for file in manifest.files if file.split != REJECTS]
        paths = [self.folder(manifest.block_id) / f"{split}.parquet" for split in splits]
        if not all(path.exists() for path in paths):
            self._dvc.checkout([self.root / POINTER])
        return [row for path in paths for row in read_rows(path)]

    def push(self) -> None:
        """Copy the lane's data to the DVC remote; may run in a thread beside :meth:`commit`.

        Raises:
            RepositoryError: the remote cannot be reached or refuses.
        """
        if self._push.copy_pointer(self.root):
            self._push.push()
