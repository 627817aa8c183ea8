"""One process at a time: a lock file with the holder's pid, which the kernel lets go of, also after SIGKILL."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


# `is_held` takes the lock for a moment to see whether it can: whoever meets that moment asks again.
_TRIES = 5
_PAUSE_SECONDS = 0.02


class Held(Exception):
    """Another process has the lock; `pid` is its number as it wrote it, or `unknown`."""

    def __init__(self, pid: str) -> None:
        super().__init__(pid)
        self.pid = pid


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Held while the block runs.

    Raises:
        Held: another process holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as handle:
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    handle.seek(0)
                    raise Held(handle.read().strip() or "unknown") from None
                time.sleep(_PAUSE_SECONDS)
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def is_held(file: Path) -> bool:
    """Whether a process holds it now."""
    try:
        with file.open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
