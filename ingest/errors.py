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
        └── DataCorrupt        a block's file is missing or is not what its manifest says

Foreign exceptions are translated in the one file that imports the library: kafka in `broker`,
great_expectations in `expectations`, dvc and pygit2 in `repository`.
A record that breaks the contract is no error: it is data, see :func:`ingest.record.parse`.
"""

from __future__ import annotations


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
