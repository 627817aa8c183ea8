"""The data repository: manifests in git, blocks in DVC.

    root/.git         a repository without a work tree; `main` is what rounds are pinned to
    root/.dvc/cache   the data of all blocks, by hash, shared by lanes and clones
    LANES/<lane>/     where one writer's blocks are made, see `ingest.lane`

Each lane has a ref of its own, `refs/heads/lanes/<lane>`, and its own folder `lanes/<lane>/` in the tree,
so that merging lanes into main can never conflict. What stands where is in `ingest.layout`.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from ingest import frontier, layout
from ingest.dvcstore import DvcStore, dvc_config
from ingest.errors import DataCorrupt, LaneConflict, RepositoryError
from ingest.frontier import Frontier, furthest
from ingest.gitstore import GitStore
from ingest.layout import LANE_REFS, MAIN, lane_order, stream_of
from ingest.manifest import Manifest
from ingest.ownership import Ownership
from ingest.parquet import REJECTS, file_sha256, read_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    from ingest.lane import Lane
    from ingest.parquet import Row
    from ingest.record import Record

_IDENTITY: Final = ".tidegate-id"
# Writers of main are a few processes of one service; each try takes milliseconds.
_TRIES: Final = 50


@dataclass(frozen=True)
class LaneHead:
    """Where a lane stands: its commit, its newest manifest (None: no block yet), and how far it has read."""

    commit: str | None
    last: Manifest | None
    frontier: Frontier = field(default_factory=dict)

    @property
    def seq_next(self) -> int:
        """Sequence number of the next block."""
        return 1 if self.last is None else self.last.seq + 1


class PinnedData:
    """The data of one revision, in a clone of its own."""

    def __init__(self, root: Path, revision: str, cache: Path) -> None:
        self.root = root
        self.revision = revision
        self._dvc = DvcStore(root, cache, remote=None)
        self._ready: set[str] = set()

    def file(self, manifest: Manifest, split: str) -> Path | None:
        """The Parquet file of a split, checked against the manifest's sha256; None when the split is empty.

        Raises:
            DataCorrupt: the file is missing, or is not what the manifest says.
        """
        entry = manifest.file(split)
        if entry is None:
            return None
        if manifest.lane not in self._ready:
            # All blocks of a lane at once: hard links, so it costs per file, not per byte.
            self._dvc.checkout(sorted((self.root / "lanes" / manifest.lane).glob(f"*/{layout.POINTER}")))
            self._ready.add(manifest.lane)
        path = self.root / entry.path
        if not path.is_file():
            raise DataCorrupt(f"{entry.path}: not at revision {self.revision}; is the manifest from another one?")
        if (found := file_sha256(path)) != entry.sha256:
            raise DataCorrupt(
                f"{entry.path}: sha256 is {found}, the manifest says {entry.sha256}; "
                "remove the file from the DVC cache and run `dvc pull`"
            )
        return path

    def records(self, manifest: Manifest, split: str = "train") -> list[Record]:
        """Records of one block's split, in the topic's order.

        Raises:
            DataCorrupt: the file is missing, or is not what the manifest says.
        """
        path = self.file(manifest, split)
        return [] if path is None else [record for _, _, record in read_rows(path)]

    def close(self) -> None:
        """Let go of DVC's databases."""
        self._dvc.close()


class DataRepository:
    """Reads every lane, pins revisions, commits small files on main. Safe to use from several processes."""

    def __init__(self, root: Path, lanes: Path | None = None) -> None:
        """Open the repository at `root`; lanes are made beside it unless `lanes` says where.

        Raises:
            RepositoryError: there is no data repository.
        """
        self.root = root.resolve()
        self.lanes = (lanes or self.root.parent / "lanes").resolve()
        self.git = GitStore(self.root)
        self.cache = self.root / ".dvc" / "cache"

    @classmethod
    def init(cls, root: Path, remote: str, lanes: Path | None = None) -> Self:
        """Make the repository, or set the remote of an existing one. Idempotent."""
        GitStore.init(root)
        repo = cls(root, lanes)
        repo.cache.mkdir(parents=True, exist_ok=True)
        files = {
            ".dvc/config": dvc_config(remote).encode(),
            ".dvc/.gitignore": b"/config.local\n/tmp\n/cache\n/site\n",
            ".dvcignore": b"",
        }
        head = repo.git.head(MAIN)
        if head is None or repo.git.read(head, _IDENTITY) is None:
            files[_IDENTITY] = f"{secrets.token_hex(6)}\n".encode()
        if head is None or any(repo.git.read(head, path) != data for path, data in files.items()):
            repo.commit_files(files, "Set up the data repository")
        return repo

    @property
    def identity(self) -> str:
        """A random name of this repository, drawn when it was made: two services never share a consumer group.

        Raises:
            RepositoryError: main has none.
        """
        head = self.git.head(MAIN)
        found = None if head is None else self.git.read(head, _IDENTITY)
        if found is None:
            raise RepositoryError(f"{self.root}: has no {_IDENTITY} on main; set it up with `tidegate init`")
        return found.decode().strip()

    @property
    def remote(self) -> str:
        """What DVC pushes to, as committed on main.

        Raises:
            RepositoryError: main has no DVC settings.
        """
        head = self.git.head(MAIN)
        config = None if head is None else self.git.read(head, ".dvc/config")
        for line in (config or b"").decode().splitlines():
            name, _, value = line.partition("=")
            if name.strip() == "url":
                return value.strip().strip('"')
        raise RepositoryError(f"{self.root}: no DVC remote on main; set it up with `tidegate init`")

    def lane(self, stream: str, lane: str) -> Lane:
        """Take a lane for writing, until it is closed.

        Raises:
            LaneBusy: another process on this machine writes it.
        """
        from ingest.lane import Lane

        return Lane(self, stream, lane)

    def ownership(self, stream: str) -> Ownership:
        """Which of the stream's lanes may write which partition."""
        return Ownership(self.git, stream, LANE_REFS)

    def lane_heads(self, stream: str | None = None) -> dict[str, str]:
        """Lane to commit, of one stream or of all, in the order of lanes."""
        heads = {ref.removeprefix(LANE_REFS): commit for ref, commit in self.git.refs(LANE_REFS).items()}
        lanes = [lane for lane in heads if stream is None or stream_of(lane) == stream]
        return {lane: heads[lane] for lane in sorted(lanes, key=lane_order)}

    def lane_head(self, lane: str) -> LaneHead:
        """Where a lane stands now; reads two small files, however long its history."""
        commit = self.git.head(layout.lane_ref(lane))
        if commit is None:
            return LaneHead(None, None)
        reached = frontier.from_json(self.git.read(commit, layout.frontier_path(lane)))
        shelves = self.git.folders(commit, f"lanes/{lane}")
        # Names sort like sequence numbers: only the newest manifest is parsed.
        names = self.git.read_folder(commit, f"lanes/{lane}/{max(shelves)}/manifests") if shelves else {}
        last = Manifest.from_json(names[max(names)]) if names else None
        return LaneHead(commit, last, reached)

    def frontier(self, stream: str) -> Frontier:
        """How far the stream's topic has been read, by all its lanes together."""
        heads = self.lane_heads(stream)
        files = (self.git.read(commit, layout.frontier_path(lane)) for lane, commit in heads.items())
        return furthest(frontier.from_json(data) for data in files)

    def lane_manifests(self, commit: str, lane: str) -> list[Manifest]:
        """A lane's manifests at a commit, oldest first."""
        shelves = sorted(self.git.folders(commit, f"lanes/{lane}"))
        return [
            Manifest.from_json(data)
            for shelf in shelves
            for _, data in sorted(self.git.read_folder(commit, f"lanes/{lane}/{shelf}/manifests").items())
        ]

    def manifest(self, block_id: str) -> Manifest | None:
        """One block's manifest as committed now, in constant time; None: there is no such block."""
        lane, _, number = block_id.rpartition("-")
        commit = self.git.head(layout.lane_ref(lane)) if number.isdigit() and int(number) else None
        data = None if commit is None else self.git.read(commit, layout.manifest_path(lane, int(number)))
        return None if data is None else Manifest.from_json(data)

    def lane_folder(self, lane: str, seq: int) -> Path:
        """Where a lane makes a block's files, and keeps them."""
        return self.lanes / lane / layout.shelf(seq) / layout.TRACKED / layout.block_id(lane, seq)

    def rows(self, manifest: Manifest) -> list[Row]:
        """All rows of a committed block of any lane, whatever their split.

        Raises:
            DataCorrupt: a file is in neither the lane, nor the cache, nor the remote.
        """
        splits = [file.split for file in manifest.files if file.split != REJECTS]
        folder = self.lane_folder(manifest.lane, manifest.seq)
        paths = [folder / f"{split}.parquet" for split in splits]
        if all(path.exists() for path in paths):
            return [row for path in paths for row in read_rows(path)]
        # Main has DVC's settings beside the lanes.
        revision = self.pin(manifest.stream)
        with TemporaryDirectory(prefix="restore-", dir=self.lanes) as name:
            pinned = self.checkout(revision, Path(name) / "clone")
            try:
                found = [pinned.file(manifest, split) for split in splits]
                return [row for path in found if path is not None for row in read_rows(path)]
            finally:
                pinned.close()

    def manifests(self, stream: str, revision: str | None = None) -> list[Manifest]:
        """A stream's manifests by lane and sequence: those of a revision, or all that are committed now.

        Raises:
            RepositoryError: the revision is unknown.
        """
        if revision is None:
            at = self.lane_heads(stream)
        else:
            lanes = [lane for lane in self.git.folders(revision, "lanes") if stream_of(lane) == stream]
            at = dict.fromkeys(sorted(lanes, key=lane_order), revision)
        return [manifest for lane, commit in at.items() for manifest in self.lane_manifests(commit, lane)]

    def pin(self, stream: str) -> str:
        """Merge the stream's lanes into main; returns main's commit, the old one when it has them all."""

        def attempt() -> str:
            main = self.git.head(MAIN)
            if main is None:
                raise RepositoryError(f"{self.root}: no main branch; set it up with `tidegate init`")
            trees: dict[str, str] = {}
            merged = []
            for lane, commit in self.lane_heads(stream).items():
                path = f"lanes/{lane}"
                tree = self.git.tree_id(commit, path)
                if tree is not None and tree != self.git.tree_id(main, path):
                    trees[path] = tree
                    merged.append(commit)
            if not trees:
                return main
            return self.git.commit(MAIN, main, f"Pin {', '.join(trees)}", trees=trees, merged=merged)

        return self._retried(attempt)

    def commit_files(self, files: Mapping[str, bytes], message: str) -> str:
        """Put files (path to content) on main; returns the commit.

        Raises:
            RepositoryError: a path that leaves the repository or lies in a lane.
        """
        for path in files:
            parts = path.split("/")
            if not all(parts) or {".", "..", ".git"} & set(parts) or parts[0] == "lanes":
                raise RepositoryError(f"path={path}: must be relative, inside the repository, outside lanes/")

        def attempt() -> str:
            return self.git.commit(MAIN, self.git.head(MAIN), message, files=files)

        return self._retried(attempt)

    def committed_files(self, path: str) -> list[tuple[str, bytes]]:
        """Commits on main that gave a file new content, oldest first, each with that content."""
        return self.git.changes(MAIN, path)

    def committed_file(self, path: str, revision: str | None = None) -> bytes | None:
        """A file as main has it, now or at a revision; None where it has none.

        Raises:
            RepositoryError: the revision is unknown.
        """
        at = revision or self.git.head(MAIN)
        return None if at is None else self.git.read(at, path)

    def _retried(self, attempt: Callable[[], str]) -> str:
        for _ in range(_TRIES):
            with suppress(LaneConflict):
                return attempt()
        raise LaneConflict(f"{MAIN}: moved {_TRIES} times while committing; is something else writing it in a loop?")

    def checkout(self, revision: str, dest: Path) -> PinnedData:
        """A clone at `dest`, at a revision; its data comes from the shared cache, else from the remote.

        Raises:
            RepositoryError: the revision is unknown, or `dest` is something else.
        """
        self.git.clone(revision, dest)
        return PinnedData(dest, revision, self.cache)
