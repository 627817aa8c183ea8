"""The data repository: manifests in git, blocks in DVC.

    root/.git         a repository without a work tree; `main` is what rounds are pinned to
    root/.dvc/cache   the data of all blocks, by hash, shared by lanes and clones
    LANES/<lane>/     where one writer's blocks are made, see `ingest.lane`

Each lane has a ref of its own, `refs/heads/lanes/<lane>`, and its own folder `lanes/<lane>/` in the tree,
so that merging lanes into main can never conflict.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from ingest.dvcstore import POINTER, DvcStore, dvc_config
from ingest.errors import DataCorrupt, LaneConflict, RepositoryError
from ingest.gitstore import GitStore
from ingest.manifest import Manifest
from ingest.parquet import file_sha256, read_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import Self

    from ingest.lane import Lane
    from ingest.record import Record

MAIN: Final = "refs/heads/main"
LANE_REFS: Final = "refs/heads/lanes/"
# Writers of main are a few processes of one service; each try takes milliseconds.
_TRIES: Final = 50


def stream_of(lane: str) -> str:
    """The stream a lane belongs to: `support-desk-0` is lane 0 of `support-desk`."""
    return lane.rpartition("-")[0]


def _lane_order(lane: str) -> tuple[str, int]:
    stream, _, number = lane.rpartition("-")
    return (stream, int(number)) if number.isdigit() else (lane, -1)


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
            self._dvc.checkout([self.root / "lanes" / manifest.lane / POINTER])
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
        if head is None or any(repo.git.read(head, path) != data for path, data in files.items()):
            repo.commit_files(files, "Set up the data repository")
        return repo

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

    def lane_heads(self, stream: str | None = None) -> dict[str, str]:
        """Lane to commit, of one stream or of all, in the order of lanes."""
        heads = {ref.removeprefix(LANE_REFS): commit for ref, commit in self.git.refs(LANE_REFS).items()}
        lanes = [lane for lane in heads if stream is None or stream_of(lane) == stream]
        return {lane: heads[lane] for lane in sorted(lanes, key=_lane_order)}

    def lane_manifests(self, commit: str, lane: str) -> list[Manifest]:
        """A lane's manifests at a commit, oldest first."""
        files = self.git.read_folder(commit, f"lanes/{lane}/manifests")
        return sorted((Manifest.from_json(data) for data in files.values()), key=lambda m: m.seq)

    def manifests(self, stream: str, revision: str | None = None) -> list[Manifest]:
        """A stream's manifests by lane and sequence: those of a revision, or all that are committed now.

        Raises:
            RepositoryError: the revision is unknown.
        """
        if revision is None:
            at = self.lane_heads(stream)
        else:
            lanes = [lane for lane in self.git.folders(revision, "lanes") if stream_of(lane) == stream]
            at = dict.fromkeys(sorted(lanes, key=_lane_order), revision)
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
