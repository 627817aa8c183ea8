"""Git as a store of small files with a compare-and-swap per ref: the only file importing pygit2.

Commits are made as objects, without a work tree and without an index, and come into force by
`git update-ref REF NEW OLD`: whoever saw an older OLD loses, and nothing of its work is visible.
"""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import pygit2
from pygit2.enums import FileMode, SortMode

from ingest.errors import DiskFull, LaneConflict, RepositoryError, of_disk

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_ABSENT: Final = "0" * 40
_AUTHOR: Final = ("Tidegate", "tidegate@localhost")
# Local refs move in milliseconds; a minute means a stale lock or a dead disk.
_GIT_SECONDS_MAX: Final = 60
_CLONE_SECONDS_MAX: Final = 600
# A writer holds a ref's lock for milliseconds, and is given up after a minute: an older lock is that of a dead one.
_LOCK_SECONDS_MAX: Final = 10.0
_LOCK_STALE_SECONDS: Final = 2.0 * _GIT_SECONDS_MAX
_LOCK_LOOK_SECONDS: Final = 0.1

# Objects are on disk before the ref that names them is.
pygit2.settings.enable_fsync_gitdir(True)


def _environment() -> dict[str, str]:
    # A hook that runs us must not point git at its own repository.
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}


def _git(*arguments: str, seconds_max: int = _GIT_SECONDS_MAX) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["git", *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=seconds_max,
            env=_environment(),
        )
    except FileNotFoundError:
        raise RepositoryError("git: no such command; install git") from None
    except subprocess.TimeoutExpired:
        raise RepositoryError(f"git {arguments[0]}: no end after {seconds_max} s; is the disk alive?") from None


def _remove_stale(lock: Path) -> None:
    """Remove a lock that no process of ours can still hold."""
    with suppress(FileNotFoundError):
        if time.time() - lock.stat().st_mtime > _LOCK_STALE_SECONDS:
            lock.unlink()


def _way_out(lock: Path) -> str:
    if lock.exists():
        return f"if no git runs there, remove {lock}"
    return "is the disk full or read-only?"


class GitStore:
    """One repository without a work tree, at `root/.git`."""

    def __init__(self, root: Path) -> None:
        """Open it.

        Raises:
            RepositoryError: there is none, or it cannot be read.
        """
        self.path = root / ".git"
        try:
            self._repo: Any = pygit2.Repository(str(self.path))
        except (pygit2.GitError, KeyError):
            raise RepositoryError(f"{root}: no data repository; make one with `tidegate init`") from None

    @classmethod
    def init(cls, root: Path) -> GitStore:
        """Make the repository if it is not there yet; its branch is `main`."""
        if not (root / ".git" / "HEAD").exists():
            root.mkdir(parents=True, exist_ok=True)
            repo: Any = pygit2.init_repository(str(root / ".git"), bare=True, initial_head="main")
            repo.config["core.fsync"] = "committed,reference"
            # `git gc` must keep what a clone on the same disk borrows.
            repo.config["gc.pruneExpire"] = "never"
        return cls(root)

    def head(self, ref: str) -> str | None:
        """The commit a ref names now."""
        reference = self._repo.references.get(ref)
        return None if reference is None else str(reference.target)

    def refs(self, prefix: str) -> dict[str, str]:
        """Refs below a prefix with their commits, sorted by name."""
        found = {name: self.head(name) for name in sorted(self._repo.references) if name.startswith(prefix)}
        return {name: commit for name, commit in found.items() if commit is not None}

    def _tree(self, commit: str) -> Any:
        try:
            return self._repo[commit].peel(pygit2.Tree)
        except (KeyError, ValueError, pygit2.GitError):
            raise RepositoryError(f"revision={commit}: not in the data repository {self.path.parent}") from None

    def _entry(self, commit: str, path: str) -> Any:
        tree = self._tree(commit)
        return tree[path] if path in tree else None  # noqa: SIM401 - a pygit2 tree has no get

    def tree_id(self, commit: str | None, path: str) -> str | None:
        """Hash of the subtree at a path."""
        entry = None if commit is None else self._entry(commit, path)
        return None if entry is None else str(entry.id)

    def read(self, commit: str, path: str) -> bytes | None:
        """One file of a commit."""
        entry = self._entry(commit, path)
        return bytes(entry.data) if isinstance(entry, pygit2.Blob) else None

    def read_folder(self, commit: str, path: str) -> dict[str, bytes]:
        """The files directly in a folder of a commit, sorted by name."""
        entry = self._entry(commit, path)
        if not isinstance(entry, pygit2.Tree):
            return {}
        return {child.name: bytes(child.data) for child in entry if isinstance(child, pygit2.Blob)}

    def folders(self, commit: str, path: str) -> list[str]:
        """Names of the folders in a folder of a commit."""
        entry = self._entry(commit, path)
        return [c.name for c in entry if isinstance(c, pygit2.Tree)] if isinstance(entry, pygit2.Tree) else []

    def changes(self, ref: str, path: str) -> list[tuple[str, bytes]]:
        """Commits of a branch that gave a file new content, oldest first, each with that content.

        Merged branches are not walked: of `main`, only what was committed on it.
        """
        head = self.head(ref)
        if head is None:
            return []
        walker = self._repo.walk(pygit2.Oid(hex=head), SortMode.TOPOLOGICAL | SortMode.REVERSE)
        walker.simplify_first_parent()
        found, before = [], None
        for commit in walker:
            entry = self._entry(str(commit.id), path)
            if isinstance(entry, pygit2.Blob) and entry.id != before:
                found.append((str(commit.id), bytes(entry.data)))
            before = None if entry is None else entry.id
        return found

    def _grown(self, tree: Any, leaves: Mapping[tuple[str, ...], tuple[Any, FileMode]]) -> Any:
        """A copy of a tree with leaves (path, (object id, mode)) put in."""
        builder = self._repo.TreeBuilder(tree) if tree is not None else self._repo.TreeBuilder()
        deeper: dict[str, dict[tuple[str, ...], tuple[Any, FileMode]]] = {}
        for path, leaf in leaves.items():
            if len(path) == 1:
                builder.insert(path[0], *leaf)
            else:
                deeper.setdefault(path[0], {})[path[1:]] = leaf
        for name, below in deeper.items():
            old = tree[name] if tree is not None and name in tree else None
            builder.insert(name, self._grown(old, below), FileMode.TREE)
        return builder.write()

    def commit(
        self,
        ref: str,
        old: str | None,
        message: str,
        *,
        files: Mapping[str, bytes] | None = None,
        trees: Mapping[str, str] | None = None,
        merged: Sequence[str] = (),
    ) -> str:
        """Put files and subtrees (path to hash) on top of `old` and move the ref there.

        Raises:
            LaneConflict: the ref is not at `old` any more; nothing happened.
        """
        new = self.write_commit(old, message, files=files, trees=trees, merged=merged)
        self.move(ref, old, new)
        return new

    def write_commit(
        self,
        old: str | None,
        message: str,
        *,
        files: Mapping[str, bytes] | None = None,
        trees: Mapping[str, str] | None = None,
        merged: Sequence[str] = (),
    ) -> str:
        """A commit on top of `old` that no ref names yet.

        Raises:
            RepositoryError: the disk is full (then `DiskFull`), or the repository is broken.
        """
        base = None if old is None else self._tree(old)
        author = pygit2.Signature(*_AUTHOR, int(time.time()), 0)
        parents = ([] if old is None else [old]) + list(merged)
        try:
            leaves = {
                tuple(path.split("/")): (self._repo.create_blob(data), FileMode.BLOB)
                for path, data in (files or {}).items()
            }
            for path, tree_id in (trees or {}).items():
                leaves[tuple(path.split("/"))] = (pygit2.Oid(hex=tree_id), FileMode.TREE)
            tree = self._grown(base, leaves)
            return str(self._repo.create_commit(None, author, author, message, tree, parents))
        except (pygit2.GitError, OSError) as error:
            raise of_disk(self.path, error) from None

    def move(self, ref: str, old: str | None, new: str) -> None:
        """Move a ref from one commit to another: the compare-and-swap.

        Raises:
            LaneConflict: the ref is not at `old` any more; nothing happened.
            RepositoryError: git cannot write it.
        """
        end = time.monotonic() + _LOCK_SECONDS_MAX
        while True:
            done = _git("--git-dir", str(self.path), "update-ref", ref, new, old or _ABSENT)
            if done.returncode == 0:
                return
            if (now := self.head(ref)) != old:
                raise LaneConflict(f"{ref}: moved from {old} to {now} by another writer; start over from the manifests")
            lock = self.path / f"{ref}.lock"
            # libgit2 does not notice that a full disk took no object: git does, when a ref is to name it.
            if isinstance(full := of_disk(self.path, OSError(done.stderr)), DiskFull):
                raise full
            if time.monotonic() >= end or not ("lock" in done.stderr or lock.exists()):
                raise RepositoryError(f"{ref}: not moved: {' '.join(done.stderr.split())}; {_way_out(lock)}")
            _remove_stale(lock)
            time.sleep(_LOCK_LOOK_SECONDS)

    def clone(self, revision: str, dest: Path) -> None:
        """Bring a work tree of its own at `dest` to a revision; made if it is not there.

        Raises:
            RepositoryError: the revision is unknown, or `dest` is something else.
        """
        self._tree(revision)
        if not (dest / ".git").exists():
            if dest.exists() and any(dest.iterdir()):
                raise RepositoryError(f"{dest}: exists and is no clone; remove it or choose another folder")
            dest.parent.mkdir(parents=True, exist_ok=True)
            self._run("clone", "--quiet", "--shared", "--no-checkout", str(self.path), str(dest))
        # The objects are shared: a new revision needs no fetch.
        self._run("-C", str(dest), "checkout", "--quiet", "--force", "--detach", revision)

    def pack(self) -> None:
        """Put loose objects into a pack; none is removed, and readers are not held up.

        Raises:
            RepositoryError: git cannot.
        """
        self._run("--git-dir", str(self.path), "repack", "-d", "-l", "-q")

    @staticmethod
    def _run(*arguments: str) -> None:
        done = _git(*arguments, seconds_max=_CLONE_SECONDS_MAX)
        if done.returncode != 0:
            raise RepositoryError(f"git {' '.join(arguments)}: {' '.join(done.stderr.split())}")
