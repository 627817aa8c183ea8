"""Who asked to see or to move people's data, and when: `access.log` in the workspace, a line of JSON each.

It holds no content. It is a record for people who may read the workspace anyway, not a lock.
"""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from tidegate.errors import WorkspaceError
from tidegate.workspace import Workspace

ACCESS_LOG = "access.log"


def who() -> str:
    """The user of the operating system; its number where it has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def now() -> str:
    """RFC 3339, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def append_lines(file: os.PathLike[str], lines: Iterable[Mapping[str, Any]]) -> None:
    """Append objects to a file of lines that only its owner may read; on disk when this returns.

    Raises:
        WorkspaceError: the file cannot be written.
    """
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    try:
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # One write: lines of two processes do not mix.
            os.write(handle, text.encode("utf-8", "backslashreplace"))
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise WorkspaceError(f"{os.fspath(file)}: {error.strerror}; make it writable") from None


def record_access(workspace: Workspace, what: str, **facts: Any) -> None:
    """Record that somebody asked, before it is answered.

    Raises:
        WorkspaceError: the log cannot be written; then the answer must not be given.
    """
    append_lines(workspace.root / ACCESS_LOG, [{"when": now(), "who": who(), "what": what, **facts}])
