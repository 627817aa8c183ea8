"""The privacy ledger: append-only chained rows, a filter per block, charged before the first private byte is read.

A round's attempt is reserved, started and committed, a row each. Reserved, started and committed attempts count as
spent; only a reserved one can be cancelled, because nothing was read yet. Spending is always recomputed from the rows
in their order, so that a replay equals what was in memory, bit for bit. Time plays no part: a clock that goes back
changes what a row says, not where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from privacy import accounts, chain, tables
from privacy.accounts import Account, Shortfall
from privacy.canonical import canonical
from privacy.chain import GENESIS, BlockRow, Charge, LedgerRow, State, hash_of
from privacy.errors import BudgetExceeded, LedgerBehindReceipt, LedgerConflict, LedgerError
from privacy.policy import Policy

__all__ = ["GENESIS", "Account", "Charge", "Ledger", "LedgerRow", "Shortfall", "Snapshot", "State"]

# What may follow what. `planned` is a plan on disk that the ledger has not heard of.
_FOLLOWS: Mapping[str, str] = {"started": "reserved", "committed": "started", "cancelled": "reserved"}


@dataclass(frozen=True)
class Snapshot:
    """A stream's rows and accounts as they stood at one moment; accounts in the order in which blocks became known."""

    rows: tuple[LedgerRow, ...]
    accounts: Mapping[str, Account]


class Ledger:
    """The ledger of all streams of a workspace. Safe to use from several threads and processes at once.

    Args:
        url: SQLAlchemy URL, `sqlite:///FILE` or `postgresql+psycopg://...`.

    Raises:
        LedgerError: the database cannot be opened, now or at any later call.
    """

    def __init__(self, url: str) -> None:
        self._engine = tables.open_database(url)

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    # -- blocks ---------------------------------------------------------------------------------------------------

    def register_block(self, stream: str, block_id: str, frozen_policy: Mapping[str, Any]) -> None:
        """Make a sealed block known with its frozen policy. Idempotent.

        Raises:
            LedgerConflict: the block is known with another policy or in another stream.
            PolicyError: the policy is not whole.
        """
        text = canonical(dict(frozen_policy)).decode("utf-8")
        Policy.from_frozen(frozen_policy)
        # Asked for every block before every round; nearly always the answer is there to be read.
        with tables.reading(self._engine) as db:
            if self._agrees_on_block(db, stream, block_id, text):
                return
        with tables.writing(self._engine) as db:
            if self._agrees_on_block(db, stream, block_id, text):
                return
            seq, before = _head(db, tables.blocks)
            row = BlockRow(seq + 1, block_id, stream, text, before)
            db.execute(sa.insert(tables.blocks).values(**asdict(replace(row, hash=hash_of(row)))))

    def knows(self, block_id: str) -> bool:
        """Whether the block was registered."""
        with tables.reading(self._engine) as db:
            return block_id in accounts.read(db, [block_id])

    def blocks(self, stream: str) -> list[str]:
        """Ids of a stream's registered blocks, in order of id."""
        query = sa.select(tables.blocks.c.block_id).where(tables.blocks.c.stream == stream)
        with tables.reading(self._engine) as db:
            return sorted(str(name) for name in db.execute(query).scalars())

    def policy(self, block_id: str) -> Policy:
        """The frozen policy of a block.

        Raises:
            LedgerError: the block is unknown.
        """
        return self._account(block_id).policy

    # -- rounds ---------------------------------------------------------------------------------------------------

    def reserve(
        self,
        stream: str,
        round_id: str,
        attempt: int,
        plan_hash: str,
        charges: Sequence[Charge],
        noise_source: str = "system",
    ) -> LedgerRow:
        """Charge an attempt durably; returns the attempt's newest row. A lost response may be asked again.

        Raises:
            BudgetExceeded: a block has no order left that can pay; the message names blocks, shares and choices.
            LedgerConflict: the attempt is known with another plan or other charges, or was cancelled.
            LedgerError: no charges, a block twice, unknown, or of another stream, or blocks that cannot pay together.
        """
        names = [charge.block_id for charge in charges]
        if not names or len(set(names)) != len(names):
            raise LedgerError(f"round={round_id}: must charge at least one block, each once; charged: {names}")
        if noise_source not in {"system", "test"}:
            raise LedgerError(f"noise_source={noise_source}: must be system or test")
        with tables.writing(self._engine) as db:
            known = self._attempt(db, round_id, attempt)
            if known:
                _agree(known[-1], plan_hash, ("reserved", "started", "committed"))
                first = known[0]
                if (first.stream, first.charges, first.noise_source) != (stream, tuple(charges), noise_source):
                    raise LedgerConflict(f"round={round_id} attempt={attempt}: has other charges; use attempt+1")
                return known[-1]
            missing = accounts.shortfalls(db, charges, stream)
            if missing:
                raise BudgetExceeded(_explain(round_id, missing))
            return self._append(db, stream, round_id, attempt, "reserved", plan_hash, noise_source, "", tuple(charges))

    def start(self, round_id: str, attempt: int, plan_hash: str) -> LedgerRow:
        """Mark that private bytes are about to be read; durable when it returns. Idempotent.

        Raises:
            LedgerConflict: not reserved, cancelled, or another plan.
        """
        return self._step(round_id, attempt, plan_hash, "started", "")

    def commit(self, round_id: str, attempt: int, plan_hash: str, adapter_sha256: str) -> LedgerRow:
        """Mark that the attempt ended with this adapter. Idempotent.

        Raises:
            LedgerConflict: not started, another plan, or another adapter.
        """
        return self._step(round_id, attempt, plan_hash, "committed", adapter_sha256)

    def cancel(self, round_id: str, attempt: int, plan_hash: str) -> LedgerRow:
        """Release a reservation from which nothing was read. Idempotent.

        Raises:
            LedgerConflict: it has started: what was read is spent.
        """
        return self._step(round_id, attempt, plan_hash, "cancelled", "")

    def shortfalls(self, charges: Sequence[Charge]) -> list[Shortfall]:
        """Which blocks could not pay these charges now. Nothing is written.

        Raises:
            LedgerError: a block is unknown, or the blocks cannot pay together.
        """
        with tables.reading(self._engine) as db:
            return accounts.shortfalls(db, charges)

    def spent(self, block_id: str) -> tuple[float, ...]:
        """RDP spent by a block at each order of its grid, nats, summed in the order of the rows."""
        return self._account(block_id).spent

    def share_used(self, block_id: str) -> float:
        """Share of the block's filter used, in [0, 1]."""
        return self._account(block_id).share_used

    # -- the chain ------------------------------------------------------------------------------------------------

    def rows(self, stream: str | None = None) -> list[LedgerRow]:
        """All rows, or one stream's, oldest first."""
        with tables.reading(self._engine) as db:
            return chain.read_rows(db, None if stream is None else tables.ledger.c.stream == stream)

    def snapshot(self, stream: str) -> Snapshot:
        """Rows and accounts of a stream from one consistent view: nothing is half-way between them."""
        query = sa.select(tables.blocks.c.block_id).where(tables.blocks.c.stream == stream)
        with tables.reading(self._engine) as db:
            names = list(db.execute(query.order_by(tables.blocks.c.seq)).scalars())
            found = accounts.read(db, names)
            rows = chain.read_rows(db, tables.ledger.c.stream == stream)
        return Snapshot(tuple(rows), {name: found[name] for name in names})

    def head(self) -> str:
        """Hash of the newest row; 64 zeros for an empty ledger."""
        with tables.reading(self._engine) as db:
            return _head(db, tables.ledger)[1]

    def verify_chain(self) -> int:
        """Recompute every hash of rounds and blocks; returns the number of the rounds' rows.

        Raises:
            LedgerBroken: names the first row that does not match.
        """
        with tables.reading(self._engine) as db:
            blocks, rows = chain.read_blocks(db), chain.read_rows(db)
        chain.verify(blocks, rows)
        return len(rows)

    def require_head(self, head: str) -> None:
        """Insist that a row of this hash is in the chain.

        Raises:
            LedgerBehindReceipt: it is not: an older backup was restored, and what was spent since is unknown.
        """
        with tables.reading(self._engine) as db:
            found = db.execute(sa.select(tables.ledger.c.seq).where(tables.ledger.c.hash == head)).scalar()
        if found is None and head != GENESIS:
            raise LedgerBehindReceipt(
                f"ledger: a receipt names head {head[:16]}, which is not in the chain: an older backup was restored; "
                f"restore the newest one before any round"
            )

    # -- inside one transaction -----------------------------------------------------------------------------------

    def _account(self, block_id: str) -> Account:
        with tables.reading(self._engine) as db:
            return accounts.require(db, [block_id])[block_id]

    @staticmethod
    def _agrees_on_block(db: sa.Connection, stream: str, block_id: str, text: str) -> bool:
        known = db.execute(sa.select(tables.blocks).where(tables.blocks.c.block_id == block_id)).one_or_none()
        if known is not None and (known.stream, known.policy) != (stream, text):
            raise LedgerConflict(
                f"block={block_id}: is known with another policy or stream; a sealed policy never changes"
            )
        return known is not None

    @staticmethod
    def _attempt(db: sa.Connection, round_id: str, attempt: int) -> list[LedgerRow]:
        """Rows of one attempt, oldest first."""
        mine = sa.and_(tables.ledger.c.round_id == round_id, tables.ledger.c.attempt == attempt)
        return chain.read_rows(db, mine)

    def _step(self, round_id: str, attempt: int, plan_hash: str, state: State, adapter_sha256: str) -> LedgerRow:
        with tables.writing(self._engine) as db:
            known = self._attempt(db, round_id, attempt)
            if not known:
                raise LedgerConflict(f"round={round_id} attempt={attempt}: was never reserved; reserve it first")
            row = known[-1]
            if row.state == state:
                _agree(row, plan_hash, (state,))
                if row.adapter_sha256 != adapter_sha256:
                    raise LedgerConflict(f"round={round_id} attempt={attempt}: committed with another adapter already")
                return row
            _agree(row, plan_hash, (_FOLLOWS[state],))
            return self._append(
                db, row.stream, round_id, attempt, state, plan_hash, row.noise_source, adapter_sha256, ()
            )

    @staticmethod
    def _append(
        db: sa.Connection,
        stream: str,
        round_id: str,
        attempt: int,
        state: State,
        plan_hash: str,
        noise_source: str,
        adapter_sha256: str,
        charges: tuple[Charge, ...],
    ) -> LedgerRow:
        seq, before = _head(db, tables.ledger)
        row = LedgerRow(
            seq=seq + 1,
            stream=stream,
            round_id=round_id,
            attempt=attempt,
            state=state,
            plan_hash=plan_hash,
            noise_source=noise_source,
            adapter_sha256=adapter_sha256,
            at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            charges=charges,
            blocks_head=_head(db, tables.blocks)[1],
            prev_hash=before,
        )
        row = replace(row, hash=hash_of(row))
        db.execute(sa.insert(tables.ledger).values(**{k: v for k, v in asdict(row).items() if k != "charges"}))
        if charges:
            beside = [{"seq": row.seq, "position": at, **asdict(charge)} for at, charge in enumerate(charges)]
            db.execute(sa.insert(tables.charges), beside)
        return row


def _head(db: sa.Connection, table: sa.Table) -> tuple[int, str]:
    newest = sa.select(table.c.seq, table.c.hash).order_by(table.c.seq.desc()).limit(1)
    found = db.execute(newest).one_or_none()
    return (0, GENESIS) if found is None else (int(found.seq), str(found.hash))


def _agree(row: LedgerRow, plan_hash: str, states: Sequence[str]) -> None:
    name = f"round={row.round_id} attempt={row.attempt}"
    if row.plan_hash != plan_hash:
        raise LedgerConflict(
            f"{name}: plan_hash={plan_hash[:16]} but the ledger has {row.plan_hash[:16]}; use attempt+1"
        )
    if row.state not in states:
        raise LedgerConflict(f"{name}: is {row.state}; must be {' or '.join(states)}")


def _explain(round_id: str, missing: Sequence[Shortfall]) -> str:
    parts = [
        f"{m.block_id} (used {m.share_used:.1%}, asked {m.share_asked:.1%}, "
        f"over by {m.share_used + m.share_asked - 1:.1%})"
        for m in missing
    ]
    return (
        f"round={round_id}: blocks {', '.join(parts)} cannot pay; must stay within 100% of the sealed filter; "
        f"raise sigma, lower the sampling rate or the steps, leave them out, or wait for new blocks"
    )
