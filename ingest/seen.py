"""Which records are in a block, or about to be: a small SQLite file beside a stream's lanes, shared by their processes.

`seen` holds the identities of committed blocks; `claim` those of blocks under way, each with the one message it stands
for. A claim belongs to a message, not to a process: while another lane holds it, every other delivery of the record is
its duplicate, and if that lane dies, whoever reads the message again finds the claim its own. So each record ends up in
exactly one block, whichever lanes its deliveries reach, and no lane waits for another's commit.

The file is a cache: it is brought up to date from the blocks when it is behind, and made anew when it disagrees
or is broken. A claim that is lost with it is made again with its message, which is still unread. It holds hashes only,
and never leaves the workspace.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from ingest.errors import LaneConflict, RepositoryError, of_disk
from ingest.layout import block_id

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from ingest.broker import Message
    from ingest.frontier import Frontier
    from ingest.manifest import Manifest, OffsetRange
    from ingest.record import Record
    from ingest.repository import DataRepository

# A claim of another process takes a fraction of a second; a minute means a stopped process or a dead disk.
_BUSY_SECONDS: Final = 60.0
# SQLite's primary result codes: what a file is that cannot be used, and what a disk says that has no room.
_BROKEN: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_NO_ROOM: Final = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS seen (
    identity BLOB PRIMARY KEY, digest BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS claim (
    identity BLOB PRIMARY KEY, digest BLOB NOT NULL,
    incarnation TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS made (epoch TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS block (lane TEXT PRIMARY KEY, seq INTEGER NOT NULL, nonce TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS mark (
    partition INTEGER PRIMARY KEY, incarnation TEXT NOT NULL, offset INTEGER NOT NULL, digest BLOB NOT NULL
);
"""
_TEMPORARY: Final = """
CREATE TEMP TABLE IF NOT EXISTS batch (
    place INTEGER NOT NULL, identity BLOB NOT NULL, digest BLOB NOT NULL,
    partition INTEGER NOT NULL, offset INTEGER NOT NULL
);
"""


@dataclass(frozen=True)
class Mark:
    """The last message read of a partition: what is at that offset now tells whether the topic is still the same."""

    offset: int
    digest: bytes


def identity_of(record: Record) -> bytes:
    """What makes two deliveries the same event: user and event. Two users' events of one id have nothing in common."""
    text = f"{len(record.user_id)} {record.user_id}{record.event_id}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def digest_of(record: Record) -> bytes:
    """Equal for records of equal content, however their JSON was written."""
    attributes = None if record.attributes is None else sorted(record.attributes.items())
    # `repr` quotes every text, so that no two contents have the same.
    content = repr(
        (
            record.schema_version,
            record.domain,
            record.prompt,
            record.completion,
            record.label,
            record.occurred_at,
            attributes,
        )
    )
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def mark_of(message: Message) -> bytes:
    """Recognises a message at an offset; another there means another incarnation of the topic."""
    digest = hashlib.blake2b(str(message.timestamp_ms).encode(), digest_size=16)
    for part in (message.key, message.value):
        digest.update(b"-" if part is None else str(len(part)).encode() + b"+" + part)
    return digest.digest()


class SeenIndex:
    """Identity to content of everything in a stream's blocks. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._epoch: str | None = None
        try:
            with self._translated():
                self._db = self._open()
        except LaneConflict:
            # It was broken, and is gone.
            with self._translated():
                self._db = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, timeout=_BUSY_SECONDS)
        try:
            # A power cut may lose the last entries, which are then read from the blocks; it breaks nothing.
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            # A batch of 100,000 records takes some ten megabytes, for as long as a claim takes.
            db.execute("PRAGMA temp_store=MEMORY")
            db.executescript(_SCHEMA + _TEMPORARY)
        except sqlite3.DatabaseError:
            db.close()
            raise
        return db

    def _remove(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """SQLite's errors as ours. A broken file goes: the next to open it makes it anew, and fences the rest."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            if code in _BROKEN:
                self._remove()
                raise LaneConflict(f"{self._path}: {error}; it is made anew from the blocks") from None
            if code in _NO_ROOM:
                raise of_disk(self._path, error) from None
            raise RepositoryError(
                f"{self._path}: {error}; does a stopped process hold it, or is it read-only?"
            ) from None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._translated():
            # Immediate: a reader that would write later could find its snapshot outdated.
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                # A full disk has ended it already.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _is_of(self) -> str | None:
        """Drawn anew each time the index is made anew."""
        row = self._db.execute("SELECT epoch FROM made").fetchone()
        return None if row is None else str(row[0])

    def reconcile(self, repo: DataRepository, stream: str, fence: Callable[[], None]) -> int:
        """Bring the index up to the newest blocks of all lanes; returns how many blocks had to be read.

        `fence` is called before an index is made anew: it must keep the other lanes from committing what they claimed.

        Raises:
            DataCorrupt: a block's file is nowhere to be had.
        """
        with self._translated():
            # Before what it knows: if it is made anew in between, claims on it are refused.
            self._epoch = self._is_of()
            known = {lane: (seq, nonce) for lane, seq, nonce in self._db.execute("SELECT lane, seq, nonce FROM block")}
        if self._epoch is None or self._is_of_another_history(repo, known):
            self._clear(fence)
            known = {}
        # Before the heads: a claim below it is of a block that the heads have.
        reached = repo.frontier(stream)
        read = 0
        for lane in repo.lane_heads(stream):
            last = repo.lane_head(lane).last
            for seq in range(known.get(lane, (0, ""))[0] + 1, 1 if last is None else last.seq + 1):
                manifest = repo.manifest(block_id(lane, seq))
                if manifest is not None:
                    self._take_in(manifest, (record for _, _, record in repo.rows(manifest)))
                    read += 1
        self._settle(reached)
        return read

    def _clear(self, fence: Callable[[], None]) -> None:
        """Begin anew. Inside the transaction a claim comes before the fence, or after everything is gone."""
        epoch = secrets.token_hex(8)
        with self._transaction():
            fence()
            for table in ("seen", "claim", "block", "mark", "made"):
                self._db.execute(f"DELETE FROM {table}")  # noqa: S608 - names from this line
            self._db.execute("INSERT INTO made VALUES (?)", (epoch,))
        self._epoch = epoch

    @staticmethod
    def _is_of_another_history(repo: DataRepository, known: Mapping[str, tuple[int, str]]) -> bool:
        """Whether the index was made from other blocks than there are, such as before a backup was restored."""
        for lane, (seq, nonce) in known.items():
            last = repo.manifest(block_id(lane, seq))
            if last is None or last.nonce != nonce:
                return True
        return False

    def _take_in(self, manifest: Manifest, records: Iterable[Record]) -> None:
        with self._transaction():
            self._db.executemany(
                "INSERT OR IGNORE INTO seen VALUES (?, ?)", ((identity_of(r), digest_of(r)) for r in records)
            )
            self._know(manifest)

    def _know(self, manifest: Manifest) -> None:
        # Never back, and never over a block that is not in: another process may have begun anew meanwhile.
        self._db.execute(
            "INSERT INTO block SELECT ?1, ?2, ?3 WHERE ?2 = 1 + coalesce((SELECT seq FROM block WHERE lane = ?1), 0) "
            "ON CONFLICT (lane) DO UPDATE SET seq = excluded.seq, nonce = excluded.nonce",
            (manifest.lane, manifest.seq, manifest.nonce),
        )

    def _settle(self, reached: Frontier) -> None:
        """Drop the claims of messages that have been read: they are in `seen`, or in no block."""
        with self._transaction():
            for incarnation, nexts in reached.items():
                for partition, end in nexts.items():
                    self._db.execute(
                        "DELETE FROM claim WHERE incarnation = ? AND partition = ? AND offset < ?",
                        (incarnation, partition, end),
                    )

    def has_others(self, incarnation: str) -> bool:
        """Whether messages of another incarnation of the topic hold claims."""
        with self._translated():
            found = self._db.execute("SELECT 1 FROM claim WHERE incarnation != ? LIMIT 1", (incarnation,)).fetchone()
        return found is not None

    def forget_others(self, incarnation: str) -> None:
        """Drop the claims of messages of a topic that is no more: nobody will ever read them again."""
        with self._transaction():
            self._db.execute("DELETE FROM claim WHERE incarnation != ?", (incarnation,))

    def forget_dropped(self, incarnation: str, partition: int, start: int, end: int) -> None:
        """Drop the claims of messages `[start, end)` that a topic no longer holds, and that are in no block."""
        with self._transaction():
            self._db.execute(
                "DELETE FROM claim WHERE incarnation = ? AND partition = ? AND offset >= ? AND offset < ?",
                (incarnation, partition, start, end),
            )

    def claim(
        self,
        incarnation: str,
        spans: Collection[OffsetRange],
        found: Sequence[tuple[bytes, bytes, int, int]],
        check: Callable[[], None] = lambda: None,
    ) -> dict[int, bytes]:
        """Claim identities for the messages that hold them; returns what of them is another message's already.

        `found` holds (identity, digest, partition, offset) of each record that the batch would accept, in its order;
        `spans` the offsets the batch covers: an older claim of one of them stands if its message would be accepted
        still, so that what a killed process has sent to the dead letters stays rejected. The answer maps a place in
        `found` to the digest its identity stands for. One transaction: of two lanes with one record one comes first.
        `check` raises, inside of it, if somebody has taken a partition of the batch: else a process that slept could
        void the claims of its successor.

        Raises:
            LaneConflict: `check` did, or the index was made anew.
        """
        with self._transaction():
            check()
            if self._is_of() != self._epoch:
                raise LaneConflict(f"{self._path}: made anew by another process; start over from the manifests")
            self._db.execute("DELETE FROM batch")
            # In the order of the trees they are looked up in and put into, which are then walked once from end to end.
            # Of equal identities the first in the batch stays first.
            by_identity = sorted(range(len(found)), key=lambda place: found[place][0])
            self._db.executemany(
                "INSERT INTO batch VALUES (?, ?, ?, ?, ?)", ((place, *found[place]) for place in by_identity)
            )
            self._void(incarnation, spans)
            known: dict[int, bytes] = dict(
                self._db.execute("SELECT place, seen.digest FROM batch CROSS JOIN seen USING (identity)")
            )
            self._db.execute(
                "INSERT OR IGNORE INTO claim SELECT identity, digest, ?, partition, offset FROM batch "
                "WHERE NOT EXISTS (SELECT 1 FROM seen WHERE seen.identity = batch.identity) ORDER BY batch.rowid",
                (incarnation,),
            )
            known.update(
                self._db.execute(
                    "SELECT place, claim.digest FROM batch CROSS JOIN claim USING (identity) "
                    "WHERE claim.incarnation != ? OR claim.partition != batch.partition "
                    "OR claim.offset != batch.offset",
                    (incarnation,),
                )
            )
            self._db.execute("DELETE FROM batch")
        return known

    def _void(self, incarnation: str, spans: Iterable[OffsetRange]) -> None:
        """Drop the claims of messages of the batch that would no longer be accepted: the suite was changed."""
        for span in spans:
            where = (incarnation, span.partition, span.start, span.end)
            of_span = "FROM claim WHERE incarnation = ? AND partition = ? AND offset >= ? AND offset < ?"
            # None, unless a process was killed with these messages: only then is an index of the batch worth its while.
            if self._db.execute(f"SELECT 1 {of_span} LIMIT 1", where).fetchone() is None:
                continue
            self._db.execute("CREATE INDEX IF NOT EXISTS temp.batch_by_message ON batch (partition, offset)")
            self._db.execute(
                f"DELETE {of_span} AND NOT EXISTS (SELECT 1 FROM batch WHERE "  # noqa: S608 - fixed text
                "(batch.partition, batch.offset, batch.identity) = (claim.partition, claim.offset, claim.identity))",
                where,
            )
        self._db.execute("DROP INDEX IF EXISTS temp.batch_by_message")

    def settle(self, manifest: Manifest, marks: Mapping[int, Mark]) -> None:
        """A block was committed: what it claimed is seen. `marks`: last message read, by partition."""
        with self._transaction():
            if self._is_of() != self._epoch:
                # The claims are gone with the index that was; the block is read by whoever reconciles next.
                return
            for span in manifest.offsets:
                where = (manifest.incarnation, span.partition, span.start, span.end)
                of_span = "FROM claim WHERE incarnation = ? AND partition = ? AND offset >= ? AND offset < ?"
                self._db.execute(f"INSERT OR IGNORE INTO seen SELECT identity, digest {of_span}", where)
                self._db.execute(f"DELETE {of_span}", where)
            self._know(manifest)
            self._db.executemany(
                "INSERT OR REPLACE INTO mark VALUES (?, ?, ?, ?)",
                ((p, manifest.incarnation, mark.offset, mark.digest) for p, mark in marks.items()),
            )

    def marks(self, incarnation: str) -> dict[int, Mark]:
        """Last message read of each partition of an incarnation, as far as known."""
        with self._translated():
            rows = self._db.execute("SELECT partition, offset, digest FROM mark WHERE incarnation = ?", (incarnation,))
            return {partition: Mark(offset, digest) for partition, offset, digest in rows}
