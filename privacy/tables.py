"""The ledger's tables, and opening a database so that what is committed survives a power cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa

from privacy.errors import LedgerError

SCHEMA_HEAD = "0001"
# A learner, an ingest process and an audit share one SQLite file; each transaction lasts milliseconds.
BUSY_SECONDS = 30.0

metadata = sa.MetaData()
blocks = sa.Table(
    "blocks",
    metadata,
    sa.Column("block_id", sa.String),
    sa.Column("stream", sa.String),
    sa.Column("policy", sa.Text),
)
ledger = sa.Table(
    "ledger",
    metadata,
    sa.Column("seq", sa.Integer),
    *(
        sa.Column(name, sa.Integer if name == "attempt" else sa.String)
        for name in (
            "stream",
            "round_id",
            "attempt",
            "state",
            "plan_hash",
            "noise_source",
            "adapter_sha256",
            "at",
            "prev_hash",
            "hash",
        )
    ),
)
charges = sa.Table(
    "charges",
    metadata,
    sa.Column("seq", sa.Integer),
    sa.Column("position", sa.Integer),
    sa.Column("block_id", sa.String),
    sa.Column("q", sa.Float),
    sa.Column("sigma", sa.Float),
    sa.Column("steps", sa.Integer),
)


def open_database(url: str) -> sa.Engine:
    """An engine whose transactions are serialised from their first statement, with the schema brought up to date.

    Raises:
        LedgerError: the URL is wrong, the database does not answer, or its schema is newer than this code.
    """
    try:
        engine = sa.create_engine(url, pool_pre_ping=True)
    except (sa.exc.ArgumentError, ImportError) as error:
        raise LedgerError(
            f"ledger url={_safe(url)}: {' '.join(str(error).split())[:200]}; see service.ledger.url"
        ) from None
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _durable)
        sa.event.listen(engine, "begin", _begin)
    try:
        _migrate(engine)
    except sa.exc.OperationalError as error:
        raise LedgerError(f"ledger url={_safe(url)}: cannot be opened ({error.orig}); see service.ledger.url") from None
    return engine


def _safe(url: str) -> str:
    """The URL without its password."""
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return "(unreadable)"


def _durable(connection: Any, _record: Any) -> None:
    # The driver must not begin transactions by itself: `_begin` takes the write lock before the first read.
    connection.isolation_level = None
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute(f"PRAGMA busy_timeout={int(BUSY_SECONDS * 1000)}")


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def lock(connection: sa.Connection) -> None:
    """Keep other writers out until the transaction ends; SQLite's BEGIN IMMEDIATE has done so already."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("LOCK TABLE ledger IN EXCLUSIVE MODE")


def _version(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    return found


def _migrate(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            # Two first starts at once: the second waits here and then finds the schema made.
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7236112)")
        found = _version(connection)
        if found == SCHEMA_HEAD:
            return
        if found is not None and found > SCHEMA_HEAD:
            raise LedgerError(f"ledger schema={found}: this code knows up to {SCHEMA_HEAD}; use a newer Tidegate")
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
