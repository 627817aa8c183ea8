"""DVC as a store of data files: the only file importing dvc."""

from __future__ import annotations

import hashlib
import logging
import shutil
import sqlite3
from typing import TYPE_CHECKING, Any, Final

import yaml

from ingest.errors import DataCorrupt, DiskFull, RepositoryError, of_disk
from ingest.layout import POINTER, TRACKED
from ingest.parquet import fsync_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# A hard link makes the file in the cache the one that was fsynced, and costs no second copy.
_LINKS: Final = "hardlink,copy"
_REMOTE: Final = "store"


def dvc_config(remote: str, *, in_git: bool = True) -> str:
    """`.dvc/config`. The data repository's is committed on main, so that `dvc pull` works in any clone."""
    scm = "" if in_git else "    no_scm = true\n"
    core = f"[core]\n    analytics = false\n    remote = {_REMOTE}\n{scm}"
    return core + f'[\'remote "{_REMOTE}"\']\n    url = "{remote}"\n'


def _quiet() -> None:
    # DVC logs failures with their traces and raises them too; Tidegate's log has one line per unit of work.
    for name in ("dvc", "dvc_data", "dvc_objects"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


class DvcStore:
    """A DVC directory: its settings, and the pointer file of the tracked folder."""

    def __init__(self, root: Path, cache: Path, remote: str | None) -> None:
        """Prepare `root`. With a remote it is a directory of its own without git; else it lies in a clone."""
        self.root = root
        self.cache = cache
        dvc_dir = root / ".dvc"
        local = f'[core]\n    site_cache_dir = "{dvc_dir / "site"}"\n'
        local += f'[cache]\n    dir = "{cache}"\n    type = "{_LINKS}"\n'
        try:
            dvc_dir.mkdir(parents=True, exist_ok=True)
            if remote is not None:
                (dvc_dir / "config").write_text(dvc_config(remote, in_git=False))
            (dvc_dir / "config.local").write_text(local)
        except OSError as error:
            raise of_disk(dvc_dir, error) from None
        self._alone = remote is not None
        self._opened: Any = None

    @property
    def _repo(self) -> Any:
        if self._opened is None:
            _quiet()
            from dvc.exceptions import DvcException
            from dvc.repo import Repo

            if self._alone:
                # Whoever opens it holds the lane: an entry is of a process that was killed, or torn by that.
                (self.root / ".dvc" / "tmp" / "rwlock").unlink(missing_ok=True)
            try:
                self._opened = Repo(str(self.root))
            except DvcException as error:
                raise RepositoryError(f"{self.root}: DVC refuses it: {_one_line(error)}") from None
            except (OSError, sqlite3.Error) as error:
                raise of_disk(self.root, error) from None
        return self._opened

    def close(self) -> None:
        """Let go of DVC's databases."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def restore_pointer(self, data: bytes | None) -> None:
        """Set the pointer back to what git says, after a crash between `add` and the commit."""
        pointer = self.root / POINTER
        if data is None:
            pointer.unlink(missing_ok=True)
        elif not pointer.exists() or pointer.read_bytes() != data:
            try:
                pointer.write_bytes(data)
            except OSError as error:
                raise of_disk(pointer, error) from None

    def add(self, folder: Path) -> bytes:
        """Track one block's folder below the tracked one, durably; returns the pointer file.

        Raises:
            RepositoryError: DVC refuses.
        """
        pointer = self.root / POINTER
        target = folder if pointer.exists() else self.root / TRACKED
        try:
            self._repo.add(str(target))
        except RepositoryError:
            raise
        except Exception as error:  # noqa: BLE001 - DVC's databases have errors of their own; none of them is a block
            if isinstance(trouble := of_disk(folder, error), DiskFull):
                raise trouble from None
            raise RepositoryError(f"{folder}: DVC could not add it: {_one_line(error)}") from None
        data = pointer.read_bytes()
        listing = yaml.safe_load(data)["outs"][0]["md5"]
        hashes = [hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() for file in folder.iterdir()]
        for name in (listing, *hashes):
            cached = self.cache / "files" / "md5" / name[:2] / name[2:]
            fsync_path(cached)
            fsync_path(cached.parent)
        return data

    def push(self) -> None:
        """Copy what the pointer names to the remote.

        Raises:
            RepositoryError: the remote cannot be reached or refuses.
        """
        self._transfer("push")

    def checkout(self, pointers: Sequence[Path]) -> None:
        """Put the tracked files in their place, from the cache, else from the remote.

        Raises:
            DataCorrupt: neither has them.
        """
        from dvc.exceptions import DvcException

        targets = [str(pointer) for pointer in pointers]
        try:
            self._repo.checkout(targets=targets, force=True)
        except (DvcException, OSError):
            # An open DVC remembers which folders of the cache it has made; they may be what is gone.
            self.close()
            try:
                self._transfer("pull", targets=targets, force=True)
            except RepositoryError as error:
                raise DataCorrupt(f"{error}; the blocks are neither in the cache nor in the remote") from None

    def _transfer(self, verb: str, **options: Any) -> None:
        targets = options.pop("targets", [str(self.root / POINTER)])
        try:
            getattr(self._repo, verb)(targets=targets, **options)
        except Exception as error:  # noqa: BLE001 - each remote's client has errors of its own; all mean: not now
            raise RepositoryError(f"dvc {verb}: {_one_line(error)}; see service.data.remote") from None

    def copy_pointer(self, source: Path) -> bool:
        """Take another directory's pointer over; False if it has none."""
        if not (source / POINTER).exists():
            return False
        shutil.copyfile(source / POINTER, self.root / POINTER)
        return True
