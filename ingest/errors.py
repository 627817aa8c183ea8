"""Every error `ingest` raises on purpose.

    IngestError
    ├── SettingError           an argument that cannot work (limits, share, key)
    ├── SourceError            a file to produce that is missing or unreadable
    ├── SendingStopped         a file was sent in part: interrupted, or the broker broke off
    ├── BrokerError            anything Kafka refuses
    │   ├── BrokerUnreachable  nobody answers at that address
    │   ├── BrokerAuthError    user, password or rights
    │   ├── BrokerTlsError     certificate, or TLS where there is none (and the other way round)
    │   └── TopicError         the topic is missing or misnamed
    │       ├── MessageTooLarge    a message is beyond the topic's limit
    │       └── OffsetsGone        the topic no longer holds what comes next
    ├── SuiteError             the expectation suite cannot be used as it is written
    ├── ValidationStopped      Great Expectations could not judge a batch; nothing of it was sealed
    └── RepositoryError        the data repository
        ├── LaneConflict       another writer committed first; this one must start over from the manifests
        ├── LaneBusy           another process on this machine writes the lane
        ├── DataCorrupt        a block's file is missing or is not what its manifest says
        └── DiskFull           the disk has no room; nothing is lost, and ingest goes on when it has

Foreign exceptions are translated in the one file that imports the library: kafka in `broker`,
great_expectations in `expectations`, dvc in `dvcstore`, pygit2 in `gitstore`, pyarrow in `parquet`, sqlite3 in `seen`.
A record that breaks the contract is no error: it is data, see :func:`ingest.record.parse`.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Final

# No room, no room under the user's quota, no room under the process's limit of a file's size.
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Less free than this is no room, whatever a library made of the disk's answer: a commit alone needs some kilobytes.
_FREE_BYTES_MIN: Final = 1 << 20


class IngestError(Exception):
    """Base of all errors of this package."""


class SettingError(IngestError):
    """An argument is out of its bounds."""


class SourceError(IngestError):
    """A file to produce cannot be read."""


class SendingStopped(IngestError):
    """Sending ended before the last row. `acknowledged` messages arrived; of `unknown` more nobody knows."""

    def __init__(self, message: str, *, acknowledged: int, unknown: int, interrupted: bool) -> None:
        super().__init__(message)
        self.acknowledged = acknowledged
        self.unknown = unknown
        self.interrupted = interrupted


class BrokerError(IngestError):
    """Kafka refused, or broke off."""


class BrokerUnreachable(BrokerError):
    """No broker answers at the address."""


class BrokerAuthError(BrokerError):
    """The broker knows no such user, or the user may not do this."""


class BrokerTlsError(BrokerError):
    """The TLS handshake failed."""


class TopicError(BrokerError):
    """The topic does not exist or does not take the message."""


class MessageTooLarge(TopicError):
    """A message is larger than the topic takes."""


class OffsetsGone(TopicError):
    """The wanted offset is outside of what the topic holds."""


class SuiteError(IngestError):
    """The expectation suite cannot be used."""


class ValidationStopped(IngestError):
    """A batch could not be judged; it is neither accepted nor rejected."""


class RepositoryError(IngestError):
    """The data repository is missing, broken or refused."""


class LaneConflict(RepositoryError):
    """The compare-and-swap on a lane was lost."""


class LaneBusy(RepositoryError):
    """The lane is held by another process."""


class DataCorrupt(RepositoryError):
    """A file of a block is missing or differs from its manifest."""


class DiskFull(RepositoryError):
    """A disk has no room for what comes next."""


def of_disk(path: Path, error: BaseException) -> RepositoryError:
    """What went wrong with a file, as one of ours in one line: a full disk by its name, else what the library said."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    there = next(folder for folder in (path, *path.parents, Path("/")) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < _FREE_BYTES_MIN or any(getattr(one, "errno", None) in _NO_ROOM for one in chain):
        return DiskFull(
            f"{path}: no room on its disk ({free >> 20} MB free); make room, then start again: nothing is lost"
        )
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return RepositoryError(f"{path}: {said}; is the disk read-only or failing?")
