"""A lane: the one place where one writer's blocks are made, and the commit by which they come to exist.

    LANES/<lane>/<shelf>/blocks/<block>/<split>.parquet   tracked by DVC, hard-linked with the shared cache
    LANES/<lane>/<shelf>/blocks.dvc                       DVC's pointer; the committed one is in git
    LANES/<lane>/lock                                     held by the writing process
    LANES/<lane>/push/                                    where pushing holds a DVC lock of its own

Whatever a crash leaves here that git does not know is removed when the lane is taken again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from ingest import frontier, layout
from ingest.dvcstore import DvcStore
from ingest.errors import LaneBusy, LaneConflict, of_disk
from ingest.frontier import advanced
from ingest.parquet import fsync_folder
from ingest.repository import LaneHead
from ingest.steps import Step

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet
    from pathlib import Path

    from ingest.manifest import Manifest
    from ingest.repository import DataRepository
    from ingest.steps import Tell

# More than there are cores in any machine that runs one service.
_LANES_MAX = 1024


def _nobody(_: Step) -> None:
    pass


def take_free_lane(repo: DataRepository, stream: str) -> Lane:
    """The stream's first lane that no process on this machine holds: `STREAM-0`, else `STREAM-1`, and so on."""
    for number in range(_LANES_MAX):
        with suppress(LaneBusy):
            return Lane(repo, stream, f"{stream}-{number}")
    raise LaneBusy(f"stream={stream}: {_LANES_MAX} processes write it already; stop some of them")


class Lane:
    """Exclusive writer of a lane. A context manager."""

    def __init__(self, repo: DataRepository, stream: str, name: str) -> None:
        self.repo = repo
        self.stream = stream
        self.name = name
        self.root = repo.lanes / name
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = self._take()
        except OSError as error:
            raise of_disk(self.root, error) from None
        try:
            self._remote = repo.remote
            self._dvc: DvcStore | None = None
            self._push = DvcStore(self.root / "push", repo.cache, self._remote)
            self.recover()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the lane."""
        if self._dvc is not None:
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

    def _shelf(self, seq: int) -> DvcStore:
        """The DVC directory of a block's shelf; one is open at a time."""
        root = self.root / layout.shelf(seq)
        if self._dvc is None or self._dvc.root != root:
            if self._dvc is not None:
                self._dvc.close()
            self._dvc = DvcStore(root, self.repo.cache, self._remote)
        return self._dvc

    def recover(self) -> None:
        """Back to what git says: the pointer as committed, no folder of a block that was never committed."""
        head = self.head()
        pointer = None
        if head.commit is not None:
            path = f"{layout.shelf_path(self.name, head.seq_next)}/{layout.POINTER}"
            pointer = self.repo.git.read(head.commit, path)
        self._shelf(head.seq_next).restore_pointer(pointer)
        shutil.rmtree(self.folder(head.seq_next), ignore_errors=True)

    def head(self) -> LaneHead:
        """The lane as committed now."""
        return self.repo.lane_head(self.name)

    def block_id(self, seq: int) -> str:
        """Name of a block of this lane."""
        return layout.block_id(self.name, seq)

    def folder(self, seq: int) -> Path:
        """Where a block's files are made."""
        return self.repo.lane_folder(self.name, seq)

    def commit(
        self,
        manifest: Manifest,
        head: LaneHead,
        *,
        gaps: AbstractSet[int] = frozenset(),
        tell: Tell = _nobody,
    ) -> LaneHead:
        """Make a block exist: DVC add, then one git commit on top of `head`.

        `gaps` names partitions whose next offset may jump, because the topic no longer holds what is between.

        Raises:
            LaneConflict: another writer committed since `head`, or took one of the lane's partitions,
                or an offset does not continue the last.
        """
        self._check_continuation(manifest, head, gaps)
        reached = advanced(head.frontier, manifest.incarnation, manifest.next_offsets)
        shelf = layout.shelf_path(self.name, manifest.seq)
        files = {
            layout.manifest_path(self.name, manifest.seq): manifest.to_json(),
            layout.frontier_path(self.name): frontier.to_json(reached),
        }
        if manifest.files:
            fsync_folder(self.folder(manifest.seq))
            tell(Step.SYNCED)
            files[f"{shelf}/{layout.POINTER}"] = self._shelf(manifest.seq).add(self.folder(manifest.seq))
            tell(Step.ADDED)
            files[f"{shelf}/.gitignore"] = f"/{layout.TRACKED}\n".encode()
        message = f"Seal {manifest.block_id}"
        commit = self.repo.git.commit(layout.lane_ref(self.name), head.commit, message, files=files)
        return LaneHead(commit, manifest, reached)

    def check_unmoved(self, head: LaneHead) -> None:
        """Return if nobody has fenced this lane since `head`.

        Raises:
            LaneConflict: somebody has.
        """
        if (now := self.repo.git.head(layout.lane_ref(self.name))) != head.commit:
            raise LaneConflict(
                f"lane={self.name}: moved from {head.commit} to {now} by another writer; start over from the manifests"
            )

    def _check_continuation(self, manifest: Manifest, head: LaneHead, gaps: AbstractSet[int]) -> None:
        self.check_unmoved(head)
        if manifest.seq != head.seq_next:
            raise LaneConflict(f"lane={self.name}: block {manifest.seq} where {head.seq_next} is next")
        reached = self.repo.frontier(self.stream).get(manifest.incarnation, {})
        for part in manifest.offsets:
            expected = reached.get(part.partition, part.start)
            if part.start != expected and not (part.partition in gaps and part.start > expected):
                raise LaneConflict(
                    f"lane={self.name}: partition {part.partition} starts at {part.start}, next offset is {expected}; "
                    "start over from the manifests"
                )

    def push(self) -> None:
        """Copy the lane's data to the DVC remote; may run in a thread beside :meth:`commit`.

        What was pushed is remembered by shelf, so that a push costs what is new.

        Raises:
            RepositoryError: the remote cannot be reached or refuses.
        """
        done = self._push.root / "done"
        known = done.read_text(encoding="utf-8") if done.exists() else ""
        shelves = sorted(path.parent for path in self.root.glob(f"[0-9]*/{layout.POINTER}"))
        try:
            for shelf in shelves:
                if shelf.name < known:
                    continue
                self._push.copy_pointer(shelf)
                self._push.push()
                # A torn name sorts before the right one: then a shelf is pushed twice.
                done.write_text(shelf.name, encoding="utf-8")
        except OSError as error:
            raise of_disk(self.root, error) from None
