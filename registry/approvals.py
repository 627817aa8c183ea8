"""The history of approvals: who moved which version, when, why. Append-only, hash-chained, every row signed.

MLflow keeps no such history, and its tags can be rewritten; serving trusts a version only by a row of this
table. One chain for all models: a row's `prev_hash` is the sha256 of the row before it, signature included,
so that changing, dropping or reordering a row breaks the chain at a place that `verify` names. Cutting off
the newest rows does not: that shows where a version's own copy (tag `tidegate.approval`) has a higher `seq`
than the chain's head.
"""

import fcntl
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import structlog
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
)
from sqlalchemy import select as sql_select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from privacy.canonical import canonical, sha256_of
from privacy.errors import PrivacyError
from registry.canary import CANARY
from registry.errors import ApprovalsError, ApprovalsTampered
from registry.states import PRODUCTION

log = structlog.get_logger()

GENESIS = "0" * 64
# The kill switch and its end: they move no version and stage, and say that the bare base answered in between.
SWITCHES = ("kill", "unkill")
KINDS = ("promote", "reject", "rollback", "emergency", CANARY, *SWITCHES)
# Writers wait for each other; an approval takes milliseconds, so this long means a stuck process.
LOCK_TIMEOUT_S = 30
# Any fixed number no other user of the database takes: the first eight bytes of sha256("tidegate approvals"),
# halved.
_ADVISORY_LOCK = int.from_bytes(sha256(b"tidegate approvals").digest()[:8], "big") >> 1

_metadata = MetaData()
_table = Table(
    "approvals",
    _metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("model", String(256), nullable=False, index=True),
    Column("hash", String(64), nullable=False, unique=True),
    Column("signed", Text, nullable=False),
)

# Promotions that were refused: no decision, so neither signed nor chained; kept for whoever is told of them.
_refusals = Table(
    "refusals",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("model", String(256), nullable=False, index=True),
    Column("version", Integer, nullable=False),
    Column("when", String(32), nullable=False),
    Column("who", Text, nullable=False),
    Column("why", Text, nullable=False),
    Column("sentence", Text, nullable=False),
    sqlite_autoincrement=True,
)
# Whoever asks again and again fills no disk.
REFUSALS_MAX = 1000


class Signer(Protocol):
    """What signs a row: `privacy.signing.SigningKey`."""

    def sign(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """The payload with `key_id` and `signature`."""


class Verifier(Protocol):
    """What checks a row: `privacy.signing.TrustedKeys`."""

    def verify(self, signed: Mapping[str, Any]) -> dict[str, Any]:
        """The payload; raises SignatureError."""


Approval = dict[str, Any]
"""One signed decision, exactly as stored: seq (its place in the chain, 1 and up), model, version,
adapter_sha256, from and to (stages; to Production means "this version is to answer"), who, when (UTC, RFC
3339), why, kind, prev_hash, key_id,
signature. One of kind canary moves no stage: it says under `canary` which share of requests the version answers
beside what is live; 0 ends it."""


@dataclass(frozen=True)
class Standing:
    """What the decisions on one model add up to.

    Attributes:
        live: the decision by which a version is in Production; None when none is.
        stack: decisions behind the versions a rollback passes through, newest last; the live one on top if
            there is one.
        approved: every version that was ever live, with its newest decision.
        canary: the decision by which a candidate answers a share of requests; None when none does.
    """

    live: Approval | None = None
    stack: tuple[Approval, ...] = ()
    approved: Mapping[int, Approval] = field(default_factory=dict)
    canary: Approval | None = None

    @property
    def previous(self) -> Approval | None:
        """What a rollback without a number returns to."""
        below = self.stack[:-1] if self.live else self.stack
        return below[-1] if below else None

    def then(self, row: Approval) -> "Standing":
        """The standing after one more decision.

        A promotion goes on top; going back to an older version takes off all above it, so that rolling back
        twice goes
        two versions back and not to and fro. Whatever moves what is live ends a canary: it was compared with that.
        """
        if row["kind"] == CANARY:
            return replace(self, canary=row if row["canary"]["share"] else None)
        if row["to"] == PRODUCTION:
            at = next((i for i, below in enumerate(self.stack) if below["version"] == row["version"]), None)
            stack = (*(self.stack if at is None else self.stack[:at]), row)
            return Standing(row, stack, {**self.approved, row["version"]: row})
        if row["from"] == PRODUCTION and self.live and self.live["version"] == row["version"]:
            return replace(self, live=None, canary=None)
        if self.canary and self.canary["version"] == row["version"]:
            return replace(self, canary=None)
        return self


class Approvals:
    """The table, in any database SQLAlchemy knows. Made on first use.

    Args:
        url: such as `sqlite:////srv/ws/approvals.db`.
        signer: signs new rows; without one the history can only be read.

    Raises:
        ApprovalsError: the database cannot be opened.
    """

    def __init__(self, url: str, signer: Signer | None = None) -> None:
        self._signer = signer
        self._where = url.rsplit("@", 1)[-1]  # never a password in a message
        self._sqlite = url.startswith("sqlite")
        self._turn = threading.Lock()
        try:
            self._engine = _engine(url)
            with self._exclusive(made=False) as connection:
                _metadata.create_all(connection)
        except SQLAlchemyError as error:
            raise ApprovalsError(
                f"approvals={self._where}: cannot be opened ({_cause(error)}); check address and rights"
            ) from error

    def append(
        self,
        *,
        model: str,
        version: int,
        adapter_sha256: str,
        from_stage: str,
        to_stage: str,
        who: str,
        why: str,
        kind: str,
        guarantee: str = "",
        when: str | None = None,
        canary: Mapping[str, Any] | None = None,
    ) -> Approval:
        """Sign a decision and add it to the chain; durable when this returns.

        Raises:
            ApprovalsError: no signing key, an unknown kind, or the database does not take it.
        """
        if self._signer is None:
            raise ApprovalsError(f"approvals={self._where}: opened without a signing key; it can only be read")
        if kind not in KINDS:
            raise ApprovalsError(f"kind={kind}: must be one of {', '.join(KINDS)}")
        if (kind == CANARY) != (canary is not None):
            raise ApprovalsError(f"kind={kind}: a share is of kind {CANARY}, and of no other")
        try:
            with self._exclusive() as connection:
                last = connection.execute(_newest(None)).first()
                payload = {
                    "seq": last.seq + 1 if last else 1,
                    "model": model,
                    "version": version,
                    "adapter_sha256": adapter_sha256,
                    "from": from_stage,
                    "to": to_stage,
                    "who": who,
                    "when": when or now(),
                    "why": why,
                    "kind": kind,
                    "prev_hash": last.hash if last else GENESIS,
                    # Written only where there is something to say: `none`, for a version without privacy.
                    **({"guarantee": guarantee} if guarantee else {}),
                    **({"canary": dict(canary)} if canary else {}),
                }
                signed = self._signer.sign(payload)
                connection.execute(
                    _table.insert().values(
                        seq=payload["seq"],
                        model=model,
                        hash=sha256_of(signed),
                        signed=canonical(signed).decode(),
                    )
                )
        except SQLAlchemyError as error:
            raise ApprovalsError(f"approvals={self._where}: not written ({_cause(error)}); try again") from error
        return signed

    def history(self, model: str | None = None) -> list[Approval]:
        """Every decision, oldest first; of one model, or of all."""
        query = sql_select(_table).order_by(_table.c.seq)
        if model is not None:
            query = query.where(_table.c.model == model)
        return [json.loads(row.signed) for row in self._read(query)]

    def latest(self, model: str) -> Approval | None:
        """The newest decision on a model, of any kind."""
        rows = self._read(_newest(model))
        return dict(json.loads(rows[0].signed)) if rows else None

    def models(self) -> list[str]:
        """Every model that anything was decided on."""
        rows = self._read(sql_select(_table.c.model).distinct().order_by(_table.c.model))
        return [str(row.model) for row in rows]

    def standing(self, model: str) -> Standing:
        """What is live by these decisions, and what it can be rolled back to."""
        return standing(self.history(model))

    def note_refusal(self, *, model: str, version: int, who: str, why: str, sentence: str) -> None:
        """Keep that a promotion was refused. Never raises: the refusal stands whether it is kept or not."""
        told = {"model": model, "version": version, "when": now(), "who": who, "why": why, "sentence": sentence}
        try:
            with self._exclusive() as connection:
                made = connection.execute(_refusals.insert().values(**told)).inserted_primary_key
                if made is not None:
                    connection.execute(_refusals.delete().where(_refusals.c.id <= made[0] - REFUSALS_MAX))
        except SQLAlchemyError as error:
            log.warning("refusal not kept", model=model, version=version, why=_cause(error))

    def refusals(self, model: str) -> list[dict[str, Any]]:
        """The newest refused promotions of a model, oldest first: id, model, version, when, who, why, sentence."""
        rows = self._read(sql_select(_refusals).where(_refusals.c.model == model).order_by(_refusals.c.id))
        return [dict(row._mapping) for row in rows]  # noqa: SLF001 - SQLAlchemy's public name for it

    def head(self) -> str:
        """Hash of the newest row, or 64 zeros."""
        rows = self._read(_newest(None))
        return str(rows[0].hash) if rows else GENESIS

    def verify(self, keys: Verifier) -> int:
        """Check every row's number, predecessor, hash and signature; returns how many there are.

        Raises:
            ApprovalsTampered: names the first row that does not match, and in what.
        """
        prev_hash, seq = GENESIS, 0
        for seq, row in enumerate(self._read(sql_select(_table).order_by(_table.c.seq)), start=1):
            wrong = _mismatch(row, seq, prev_hash, keys)
            if wrong:
                raise ApprovalsTampered(
                    f"approvals={self._where}: row seq={row.seq}: {wrong}; "
                    f"the history was changed after it was written: restore it from a backup"
                )
            prev_hash = row.hash
        return seq

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Held while a decision is checked, written and carried out: two approvers see each other.

        Over threads, processes and, on PostgreSQL, machines. It is not the lock that `append` takes: a decision is
        durable before it is carried out. Threads of one process take turns first: each that waits on the database would
        hold a connection of the pool, and the one whose turn it is needs a second to write.

        Raises:
            ApprovalsError: the lock cannot be taken.
        """
        with ExitStack() as held:
            held.enter_context(self._turn)
            try:
                held.enter_context(self._file_lock() if self._sqlite else self._advisory_lock())
            except (SQLAlchemyError, OSError) as error:
                raise ApprovalsError(f"approvals={self._where}: no lock ({_cause(error)}); check its rights") from error
            yield

    @contextmanager
    def _file_lock(self) -> Iterator[None]:
        with Path(f"{self._engine.url.database}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _advisory_lock(self) -> Iterator[None]:
        # A lock of the session, not of a transaction: an open transaction would be idle as long as the decision takes.
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_lock({_ADVISORY_LOCK})")
            try:
                yield
            finally:
                with suppress(SQLAlchemyError):  # the session is gone, and its lock with it
                    connection.exec_driver_sql(f"SELECT pg_advisory_unlock({_ADVISORY_LOCK})")

    def close(self) -> None:
        """Release the database's connections."""
        self._engine.dispose()

    @contextmanager
    def _exclusive(self, *, made: bool = True) -> Iterator[Connection]:
        """One writer at a time, over all processes; committed at the end, rolled back on an error."""
        with self._engine.connect() as connection:
            if self._sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            elif not made:
                # Two that start at once would both find no table. Held until the end of the transaction.
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK + 1})")
            else:
                connection.exec_driver_sql(f"LOCK TABLE {_table.name} IN EXCLUSIVE MODE")
            yield connection
            connection.commit()

    def _read(self, query: Any) -> Sequence[Any]:
        try:
            with self._engine.connect() as connection:
                return connection.execute(query).all()
        except SQLAlchemyError as error:
            raise ApprovalsError(
                f"approvals={self._where}: cannot be read ({_cause(error)}); check the address and its rights"
            ) from error


def standing(history: Sequence[Approval]) -> Standing:
    """What the decisions on one model, oldest first, add up to.

    A row of kind reject that leaves Production says that the version's newest promotion before it never happened (see
    `promotion.py`): both count for nothing, whatever stands between them.
    """
    void: set[int] = set()
    for at, row in enumerate(history):
        if _takes_back(row):
            void.update(next(([i] for i in range(at - 1, -1, -1) if i not in void and _same(history[i], row)), []))
    now_ = Standing()
    for at, row in enumerate(history):
        if _takes_back(row):
            now_ = replace(now_, canary=None)  # while it lasted, the promotion had ended it
        elif at not in void:
            now_ = now_.then(row)
    return now_


def _takes_back(row: Approval) -> bool:
    return bool(row["kind"] == "reject" and row["from"] == PRODUCTION)


def _same(row: Approval, taken_back: Approval) -> bool:
    """Whether a row is what another takes back. An emergency never is: it happens without MLflow."""
    return bool(
        row["to"] == PRODUCTION and row["version"] == taken_back["version"] and row["kind"] in {"promote", "rollback"}
    )


def now() -> str:
    """The time, UTC, RFC 3339, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _newest(model: str | None) -> Any:
    query = sql_select(_table).order_by(_table.c.seq.desc()).limit(1)
    return query if model is None else query.where(_table.c.model == model)


def _mismatch(row: Any, seq: int, prev_hash: str, keys: Verifier) -> str | None:
    if row.seq != seq:
        return f"row {seq} is missing"
    try:
        signed = json.loads(row.signed)
        if sha256_of(signed) != row.hash:
            return "its content does not match its hash"
        if (signed["seq"], signed["model"]) != (row.seq, row.model):
            return "its columns do not match its signed content"
        if signed["prev_hash"] != prev_hash:
            return "its prev_hash is not the hash of the row before"
        keys.verify(signed)
    except (ValueError, KeyError, TypeError, PrivacyError) as error:
        return f"it does not verify ({error})"
    return None


def _engine(url: str) -> Engine:
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True)
    # No pool: opening the file is cheap, and a connection that outlives its thread is a warning at exit.
    engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": LOCK_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _manual_transactions(connection: Any, _record: Any) -> None:
        # The sqlite3 module would begin a deferred transaction by itself; ours takes the write lock at once.
        connection.isolation_level = None

    return engine


def _cause(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
