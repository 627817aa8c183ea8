"""Child processes that never outlive the process that started them."""

from __future__ import annotations

import ctypes
import signal
import sys

# prctl(2): the signal a process gets when its parent dies. Linux only; elsewhere children end by SIGTERM alone.
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies; for `preexec_fn`."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
