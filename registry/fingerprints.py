"""The sha256 of stored adapters, computed once for files that are still the same files.

A file is taken for the same by device, inode, size, mtime and ctime (nanoseconds) of each of the adapter's files. Names
and mtime alone would not do: `touch -d` and `cp -p` set an mtime back. The ctime nobody sets: the kernel moves it at
every write, rename over it or change of its times. Two rules close what is left:
    - the kernel's clock moves in ticks, so that a second write may leave the same ctime: a hash is kept only of files
      whose last change was `SETTLED_S` before it was begun, and that were the same files when it was done;
    - what cannot be seen here at all (a raw disk, a network file system that answers from its own cache) cannot answer
      people either: serving hashes what it loaded, against the signed approval.
"""

import threading
import time
from collections import OrderedDict
from pathlib import Path

from learner.adapter import adapter_files, adapter_sha256
from learner.errors import AdapterError

# Coarser than any clock tick and any file system's time stamp (FAT's: 2 s).
SETTLED_S = 3.0
# Adapters that decisions were made about lately; a few hundred bytes each.
KEPT = 1024

Identity = tuple[tuple[str, int, int, int, int, int], ...]


class Fingerprints:
    """Hashes of adapters by the identity of their files. Threads may share it."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Path, Identity], str] = OrderedDict()
        self._lock = threading.Lock()

    def sha256(self, folder: Path) -> str:
        """`learner.adapter.adapter_sha256` of the folder.

        Raises:
            AdapterError: one of its files cannot be read.
        """
        before = _identity(folder)
        key = (folder, before)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        begun_ns = time.time_ns()
        found = adapter_sha256(folder)
        if _settled(before, begun_ns) and _identity(folder) == before:
            with self._lock:
                self._known[key] = found
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
        return found


def _identity(folder: Path) -> Identity:
    rows = []
    for name in adapter_files(folder):
        try:
            found = (folder / name).stat()
        except OSError as error:
            raise AdapterError(
                f"adapter {folder}: {name} cannot be read ({error.strerror}); fetch or train it anew"
            ) from error
        rows.append((name, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    return tuple(rows)


def _settled(identity: Identity, now_ns: int) -> bool:
    """Whether the last change is so long ago that another one would show."""
    return all(ctime_ns + SETTLED_S * 1e9 < now_ns for *_, ctime_ns in identity)
