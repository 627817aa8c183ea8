"""Which records are already in a block: a small SQLite file beside the lane.

It is a cache of the blocks, never a truth of its own: it is written after the commit, brought up to date
from the blocks when it is behind, and made anew when it disagrees or is broken. It never leaves the workspace.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from ingest.broker import Message
    from ingest.lane import Lane
    from ingest.manifest import Manifest
    from ingest.record import Record

Identity = tuple[str, str]
"""user_id, event_id. Two users' events of the same id have nothing to do with each other."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS seen (
    user_id TEXT, event_id TEXT, digest BLOB NOT NULL, PRIMARY KEY (user_id, event_id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS block (seq INTEGER NOT NULL, nonce TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS mark (partition INTEGER PRIMARY KEY, offset INTEGER NOT NULL, digest BLOB NOT NULL);
"""


def identity_of(record: Record) -> Identity:
    """What makes two deliveries the same event."""
    return record.user_id, record.event_id


def digest_of(record: Record) -> bytes:
    """Equal for records of equal content, however their JSON was written."""
    content = json.dumps(record.model_dump(), sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def mark_of(message: Message) -> bytes:
    """Recognises a message at an offset; another there means another incarnation of the topic."""
    digest = hashlib.blake2b(str(message.timestamp_ms).encode(), digest_size=16)
    for part in (message.key, message.value):
        digest.update(b"-" if part is None else str(len(part)).encode() + b"+" + part)
    return digest.digest()


class SeenIndex:
    """Identity to content of everything in the lane's blocks. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._db = self._open()
        except sqlite3.DatabaseError:
            self._remove()
            self._db = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None)
        try:
            # A power cut may lose the last blocks' entries, which are then read from the blocks; it breaks nothing.
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.executescript(_SCHEMA)
        except sqlite3.DatabaseError:
            db.close()
            raise
        return db

    def _remove(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    def _last(self) -> tuple[int, str]:
        found: tuple[int, str] | None = self._db.execute("SELECT seq, nonce FROM block").fetchone()
        return found or (0, "")

    def reconcile(self, lane: Lane) -> int:
        """Bring the index up to the lane's newest block; returns how many blocks had to be read.

        Raises:
            DataCorrupt: a block's file is nowhere to be had.
        """
        manifests = lane.manifests()
        seq, nonce = self._last()
        known = {manifest.seq: manifest.nonce for manifest in manifests}
        if seq and known.get(seq) != nonce:
            # Another history than the one it was made from, such as a restored backup.
            self._db.executescript("DELETE FROM seen; DELETE FROM block; DELETE FROM mark;")
            seq = 0
        behind = [manifest for manifest in manifests if manifest.seq > seq]
        for manifest in behind:
            entries = ((identity_of(record), digest_of(record)) for _, _, record in lane.rows(manifest))
            self.add(manifest, entries, {})
        return len(behind)

    def digests(self, identities: Iterable[Identity]) -> dict[Identity, bytes]:
        """Content digests of those identities that are in a block."""
        query = "SELECT digest FROM seen WHERE user_id = ? AND event_id = ?"
        found = {}
        for identity in identities:
            row = self._db.execute(query, identity).fetchone()
            if row is not None:
                found[identity] = row[0]
        return found

    def add(
        self, manifest: Manifest, entries: Iterable[tuple[Identity, bytes]], marks: Mapping[int, tuple[int, bytes]]
    ) -> None:
        """Take in a committed block, as one transaction. `marks`: last message read, by partition."""
        self._db.execute("BEGIN")
        self._db.executemany(
            "INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", ((*identity, digest) for identity, digest in entries)
        )
        self._db.execute("DELETE FROM block")
        self._db.execute("INSERT INTO block VALUES (?, ?)", (manifest.seq, manifest.nonce))
        self._db.executemany(
            "INSERT OR REPLACE INTO mark VALUES (?, ?, ?)",
            ((partition, offset, digest) for partition, (offset, digest) in marks.items()),
        )
        self._db.execute("COMMIT")

    def marks(self) -> dict[int, tuple[int, bytes]]:
        """Last message of the newest block, by partition: offset and digest."""
        rows = self._db.execute("SELECT partition, offset, digest FROM mark")
        return {partition: (offset, digest) for partition, offset, digest in rows}
