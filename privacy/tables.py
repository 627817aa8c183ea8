"""The ledger's tables, and a database in which what is committed survives a power cut.

The only file that knows which database it is. SQLite stays with its rollback journal and `synchronous=EXTRA`: one file
to back up, and the folder is synced after the journal is deleted. (With FULL a power cut just after a commit may bring
the journal back and undo the commit: https://www.sqlite.org/pragma.html#pragma_synchronous.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from privacy.accounting import Indices
from privacy.errors import LedgerError

SCHEMA = "0002_accounts"
# Schemas of earlier versions that are brought up to date when they are opened.
OLDER = ("0001_chained",)
# A learner, an ingest process and an audit share one SQLite file; each transaction lasts milliseconds.
BUSY_SECONDS = 30.0
# A file of 100,000 blocks and 10,000 rounds has 200 MB; a reservation touches a few thousand pages of it.
_CACHE_KIB = 64 * 1024
# A row's number and a mechanism's in it, as one number: both are 32-bit integers.
KEY_SHIFT = 32
# Any constant will do, if no other program on the same PostgreSQL database takes this advisory lock.
_MIGRATION_LOCK = 7236112

metadata = sa.MetaData()
blocks = sa.Table(
    "blocks",
    metadata,
    sa.Column("seq", sa.Integer),
    *(sa.Column(name, sa.String) for name in ("block_id", "stream", "policy", "prev_hash", "hash")),
)
ledger = sa.Table(
    "ledger",
    metadata,
    sa.Column("seq", sa.Integer),
    sa.Column("stream", sa.String),
    sa.Column("round_id", sa.String),
    sa.Column("attempt", sa.Integer),
    *(
        sa.Column(name, sa.String)
        for name in (
            "state",
            "plan_hash",
            "noise_source",
            "adapter_sha256",
            "at",
            "blocks_head",
            "prev_hash",
            "hash",
            "account",
        )
    ),
    sa.Column("window", sa.Integer),
)
mechanisms = sa.Table(
    "mechanisms",
    metadata,
    sa.Column("seq", sa.Integer),
    sa.Column("number", sa.Integer),
    sa.Column("q", sa.Float),
    sa.Column("sigma", sa.Float),
    sa.Column("steps", sa.Integer),
)
charges = sa.Table(
    "charges",
    metadata,
    sa.Column("seq", sa.Integer),
    sa.Column("position", sa.Integer),
    sa.Column("block", sa.Integer),
    sa.Column("number", sa.Integer),
)


def open_database(url: str) -> sa.Engine:
    """An engine on a database whose schema has been brought up to date.

    Raises:
        LedgerError: the URL is wrong, the database does not answer, or its schema is not known to this code.
    """
    try:
        name = sa.make_url(url).get_backend_name()
        # PostgreSQL: several queries of one transaction must see one state, or an audit meets half of a round.
        isolation = {"isolation_level": "REPEATABLE READ"} if name == "postgresql" else {}
        engine = sa.create_engine(url, pool_pre_ping=True, **isolation)
    except (sa.exc.ArgumentError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LedgerError(f"ledger url={_safe(url)}: {reason}; see service.ledger.url") from None
    sa.event.listen(engine, "connect", _prepare_sqlite if name == "sqlite" else _prepare_server)
    if name == "sqlite":
        sa.event.listen(engine, "begin", _begin_sqlite)
    with _translated(engine):
        _migrate(engine)
    return engine


@contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """One consistent view of the database. Needs no right to write.

    Raises:
        LedgerError: the database does not answer, or holds what is no text.
    """
    with _translated(engine), engine.connect() as connection, connection.begin():
        yield connection


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that keeps every other writer out from before its first read until it is durable.

    Raises:
        LedgerError: the database does not answer. Whether the transaction took place is then unknown: ask again, every
            operation of the ledger is idempotent.
    """
    with _translated(engine), engine.connect() as connection:
        connection = connection.execution_options(tidegate_writes=True)  # noqa: PLW2901 - the same connection
        with connection.begin():
            if connection.dialect.name == "postgresql":
                # Before the first SELECT, so that the snapshot is taken when the lock is held.
                connection.exec_driver_sql("LOCK TABLE ledger IN EXCLUSIVE MODE")
            yield connection


def among(db: sa.Connection, column: sa.ColumnElement[Any], values: Sequence[str] | Indices) -> sa.ColumnElement[bool]:
    """That a column holds one of these names or numbers: one parameter, and one statement, however many there are."""
    plain = values.tolist() if isinstance(values, np.ndarray) else list(values)
    if db.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import ARRAY

        return column == sa.any_(sa.literal(plain, ARRAY(column.type)))
    each = sa.func.json_each(json.dumps(plain)).table_valued("value")
    return column.in_(sa.select(each.c.value))


def charges_by_row(
    db: sa.Connection, where: sa.ColumnElement[bool] | None = None
) -> Iterator[tuple[int, Indices, Indices]]:
    """Per row that charges blocks, in their order: its number, the blocks' and the number of each one's mechanism.

    The database packs a row's charges into lists: read one by one, a million of them would take seconds.

    Args:
        db: an open transaction.
        where: a condition on the ledger's rows.

    Raises:
        ValueError: the positions of a row's charges are not 0, 1, 2 and so on, or a value is no whole number.
    """
    lists = _packed(db, (charges.c.block, _both(charges.c.position, charges.c.number)), charges.c.position)
    query = sa.select(charges.c.seq, *lists).group_by(charges.c.seq).order_by(charges.c.seq)
    if where is not None:
        query = query.where(charges.c.seq.in_(sa.select(ledger.c.seq).where(where)))
    for seq, *packed in db.execute(query):
        try:
            found, keys = map(_unpacked, packed)
        except ValueError as error:
            raise ValueError(f"ledger row {seq}: a charge was changed ({error})") from None
        positions, numbers = keys >> KEY_SHIFT, keys & ((1 << KEY_SHIFT) - 1)
        if not np.array_equal(positions, np.arange(len(positions))):
            order = np.argsort(positions)
            if not np.array_equal(positions[order], np.arange(len(positions))):
                raise ValueError(f"ledger row {seq}: a charge is missing, positions are {sorted(positions)[:9]}")
            found, numbers = found[order], numbers[order]
        yield int(seq), found, numbers


def charges_by_block(db: sa.Connection, blocks: Indices) -> tuple[Indices, Indices]:
    """What these blocks were ever charged, block by block and each one's oldest first.

    Args:
        db: an open transaction.
        blocks: numbers of blocks.

    Returns:
        (N,) numbers of blocks, and what each was charged: the number of the row, shifted by KEY_SHIFT, and of its
        mechanism.

    Raises:
        ValueError: a value is no whole number.
    """
    lists = _packed(db, (charges.c.block, _both(charges.c.seq, charges.c.number)), charges.c.block, charges.c.seq)
    query = sa.select(*lists)
    found, keys = map(_unpacked, db.execute(query.where(among(db, charges.c.block, blocks))).one())
    steps = np.diff(found)
    if (steps < 0).any() or (np.diff(keys)[steps == 0] <= 0).any():
        order = np.lexsort((keys, found))
        found, keys = found[order], keys[order]
    return found, keys


def _both(high: sa.ColumnElement[int], low: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
    """Two 32-bit numbers as one of 64."""
    return sa.cast(high, sa.BigInteger) * (1 << KEY_SHIFT) + low


def _packed(
    db: sa.Connection, columns: Sequence[sa.ColumnElement[Any]], *order: sa.ColumnElement[Any]
) -> list[sa.ColumnElement[Any]]:
    """Lists of the values of a group. SQLite packs in the order in which it reads: look whether it is the right one."""
    if db.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import aggregate_order_by

        return [sa.func.json_agg(aggregate_order_by(column, *order)) for column in columns]
    return [sa.func.json_group_array(column) for column in columns]


def _unpacked(packed: str | list[int] | None) -> Indices:
    """The whole numbers of a list; of JSON in a third of the time of a parser that makes a Python object of each."""
    if not packed or packed == "[]":
        return np.zeros(0, np.int64)
    if not isinstance(packed, str):
        return np.array(packed, np.int64)
    try:
        # What is no whole number ends the reading, and the zero at the end is not reached.
        found: Indices = np.fromstring(packed[1:-1] + ",0", np.int64, sep=",")[:-1]
    except DeprecationWarning:
        found = np.zeros(0, np.int64)
    if len(found) != packed.count(",") + 1:
        raise ValueError("must be whole numbers")
    return found


@contextmanager
def _translated(engine: sa.Engine) -> Iterator[None]:
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())[:200]
        name = engine.url.render_as_string(hide_password=True)
        raise LedgerError(f"ledger url={name}: {reason}; see service.ledger.url, then ask again") from error


def _safe(url: str) -> str:
    """The URL without its password."""
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return "(unreadable)"


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver must not begin transactions by itself: `_begin_sqlite` takes the write lock before the first read.
    connection.isolation_level = None
    connection.execute("PRAGMA synchronous=EXTRA")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute(f"PRAGMA busy_timeout={int(BUSY_SECONDS * 1000)}")
    connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")


def _prepare_server(connection: Any, _record: Any) -> None:
    # A database that was tuned for speed must still not lose what was charged.
    connection.execute("SET synchronous_commit = on")
    connection.commit()


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("tidegate_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(engine: sa.Engine) -> None:
    with engine.connect() as connection, connection.begin():
        if _is_current(connection):
            return
    with engine.connect() as connection:
        # READ COMMITTED: two first starts at once, and the second, once it has the lock, finds the schema made.
        options = {"isolation_level": "READ COMMITTED"} if engine.dialect.name == "postgresql" else {}
        connection = connection.execution_options(tidegate_writes=True, **options)  # noqa: PLW2901
        with connection.begin():
            if engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
            if not _is_current(connection):
                _upgrade(connection)


def _is_current(connection: sa.Connection) -> bool:
    """Whether the schema is the newest; False where there is none yet, or an older one."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return False
    found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    if found not in {SCHEMA, *OLDER}:
        raise LedgerError(f"ledger schema={found}: must be {SCHEMA}; open it with the Tidegate that wrote it")
    return bool(found == SCHEMA)


def _upgrade(connection: sa.Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
