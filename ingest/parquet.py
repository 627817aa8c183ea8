"""Parquet files, those of blocks and those to produce from: the only file importing pyarrow.

Beside the contract's fields a block's row holds `_partition` and `_offset`, to check a block against the topic.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any, Final, Self

import pyarrow as pa
import pyarrow.parquet as pq

from ingest.errors import DataCorrupt, SourceError, of_disk
from ingest.record import Record

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

Row = tuple[int, int, Record]
"""Partition, offset, record."""

REJECTS: Final = "rejects"
"""The one split that holds no records."""

# Rows of a file to produce from that are in memory at once, whatever the size of its row groups.
_SOURCE_ROWS: Final = 1000

_FIELDS: Final = tuple(Record.model_fields)
_SCHEMA: Final = pa.schema(
    [
        ("_partition", pa.int32()),
        ("_offset", pa.int64()),
        ("schema_version", pa.int32()),
        ("event_id", pa.string()),
        ("user_id", pa.string()),
        ("domain", pa.string()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("label", pa.string()),
        ("occurred_at", pa.string()),
        ("attributes", pa.map_(pa.string(), pa.string())),
    ]
)


def fsync_path(path: Path) -> None:
    """Make a file, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Lower-case hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make a folder's files, their names, and its own name survive a power cut."""
    try:
        for file in folder.iterdir():
            fsync_path(file)
        fsync_path(folder)
        fsync_path(folder.parent)
    except OSError as error:
        raise of_disk(folder, error) from None


def write_rows(path: Path, rows: Sequence[Row]) -> str:
    """Write rows; returns the file's sha256. What must survive a power cut needs :func:`fsync_folder` too.

    Raises:
        RepositoryError: the disk is full (then `DiskFull`) or refuses.
    """
    columns: dict[str, list[Any]] = {
        "_partition": [partition for partition, _, _ in rows],
        "_offset": [offset for _, offset, _ in rows],
    }
    for name in _FIELDS:
        columns[name] = [getattr(record, name) for _, _, record in rows]
    columns["attributes"] = [None if a is None else list(a.items()) for a in columns["attributes"]]
    return _write(path, pa.table(columns, schema=_SCHEMA))


def _write(path: Path, table: Any) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, compression="zstd")
        return file_sha256(path)
    except (OSError, pa.ArrowException) as error:
        raise of_disk(path, error) from None


def write_rejects(path: Path, rejects: Sequence[tuple[int, int, bytes]]) -> str:
    """Write messages (partition, offset, bytes) that are too large for the dead-letter topic; returns the sha256."""
    columns = dict(zip(("_partition", "_offset", "value"), zip(*rejects, strict=True), strict=True))
    schema = pa.schema([("_partition", pa.int32()), ("_offset", pa.int64()), ("value", pa.large_binary())])
    return _write(path, pa.table({name: list(column) for name, column in columns.items()}, schema=schema))


def read_rows(path: Path) -> list[Row]:
    """Read what :func:`write_rows` wrote, in the same order.

    Raises:
        DataCorrupt: the file is missing or is no Parquet file of records.
    """
    try:
        table = pq.read_table(path, partitioning=None)
        columns = {name: table.column(name).to_pylist() for name in _SCHEMA.names}
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataCorrupt(f"{path}: unreadable ({type(error).__name__}); restore it with `dvc pull`") from None
    columns["attributes"] = [None if a is None else dict(a) for a in columns["attributes"]]
    contract = [columns[name] for name in _FIELDS]
    # Written by us and checked by sha256: not validated a second time.
    records = [
        Record.model_construct(**dict(zip(_FIELDS, values, strict=True))) for values in zip(*contract, strict=True)
    ]
    return list(zip(columns["_partition"], columns["_offset"], records, strict=True))


def read_rejects(path: Path) -> dict[tuple[int, int], bytes]:
    """What :func:`write_rejects` wrote: (partition, offset) to the message's bytes.

    Raises:
        DataCorrupt: the file is missing or is no Parquet file of rejects.
    """
    try:
        table = pq.read_table(path, partitioning=None)
        columns = [table.column(name).to_pylist() for name in ("_partition", "_offset", "value")]
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataCorrupt(f"{path}: unreadable ({type(error).__name__}); restore it with `dvc pull`") from None
    return {(partition, offset): value for partition, offset, value in zip(*columns, strict=True)}


class ParquetSource:
    """A Parquet file of somebody else's, to produce from; a context manager. Its columns may be of any type."""

    def __init__(self, path: Path) -> None:
        """Read the footer.

        Raises:
            SourceError: the file is missing, or is no Parquet file.
        """
        self.path = path
        try:
            self._file: Any = pq.ParquetFile(path)
        except FileNotFoundError:
            raise SourceError(f"file={path}: no such file") from None
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error, 0) from None
        self.columns: tuple[str, ...] = tuple(self._file.schema_arrow.names)
        self.rows: int = self._file.metadata.num_rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _unreadable(self, error: Exception, row: int) -> SourceError:
        why = " ".join(str(error).split())[:200]
        return SourceError(f"file={self.path}: row {row + 1}: unreadable as Parquet ({why}); write the file again")

    def values(self, after: int = 0) -> Generator[tuple[Any, ...]]:
        """Rows behind the first `after`, as tuples in the order of `columns`; a thousand are in memory at once.

        Row groups that lie wholly before are not read. Times of nanoseconds lose what is below a microsecond.

        Raises:
            SourceError: a row group cannot be read; the rows before it were given.
        """
        row = 0
        for group in range(self._file.metadata.num_row_groups):
            held = self._file.metadata.row_group(group).num_rows
            if row + held <= after:
                row += held
                continue
            batches = self._file.iter_batches(_SOURCE_ROWS, row_groups=[group])
            while True:
                try:
                    batch = next(batches, None)
                    rows = [] if batch is None else list(zip(*map(_as_python, batch.columns), strict=True))
                except (OSError, ValueError, pa.ArrowException) as error:
                    raise self._unreadable(error, row) from None
                if batch is None:
                    break
                yield from rows[max(after - row, 0) :]
                row += batch.num_rows


def _as_python(column: Any) -> list[Any]:
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        # Python's times have microseconds; what is finer would raise.
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    return list(column.to_pylist())
