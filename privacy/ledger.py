"""The privacy ledger: append-only chained rows, a filter per block, charged before the first private byte is read.

A round's attempt is reserved, started and committed, a row each. Reserved, started and committed attempts count as
spent; only a reserved one can be cancelled, because nothing was read yet. Spending is always recomputed from the rows
in their order, so that a replay equals what was in memory, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa

from privacy import accounting, tables
from privacy.canonical import canonical, sha256_of
from privacy.errors import BudgetExceeded, LedgerBehindReceipt, LedgerBroken, LedgerConflict, LedgerError
from privacy.policy import Policy

State = Literal["reserved", "started", "committed", "cancelled"]
GENESIS = "0" * 64
# What may follow what. `planned` is a plan on disk that the ledger has not heard of.
_FOLLOWS: Mapping[str, str] = {"started": "reserved", "committed": "started", "cancelled": "reserved"}


@dataclass(frozen=True)
class Charge:
    """What one round does to every unit of one block: `steps` draws at rate `q` with noise multiplier `sigma`."""

    block_id: str
    q: float
    sigma: float
    steps: int

    def __post_init__(self) -> None:
        accounting.check_mechanism(self.q, self.sigma, self.steps)
        object.__setattr__(self, "q", float(self.q))
        object.__setattr__(self, "sigma", float(self.sigma))


@dataclass(frozen=True)
class LedgerRow:
    """One step of one attempt. Charges stand in the `reserved` row; the hash covers them and the row before."""

    seq: int
    stream: str
    round_id: str
    attempt: int
    state: State
    plan_hash: str
    noise_source: str
    adapter_sha256: str
    at: str
    charges: tuple[Charge, ...]
    prev_hash: str
    hash: str

    def computed_hash(self) -> str:
        """SHA-256 over everything in the row but its hash."""
        body = asdict(self)
        del body["hash"]
        return sha256_of(body)


@dataclass(frozen=True)
class Shortfall:
    """A block that cannot pay, and by how much, as a share of its filter."""

    block_id: str
    share_used: float
    share_asked: float


class Ledger:
    """The ledger of all streams of a workspace.

    Args:
        url: SQLAlchemy URL, `sqlite:///FILE` or `postgresql+psycopg://...`.

    Raises:
        LedgerError: the database cannot be opened.
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
        with self._engine.begin() as db:
            tables.lock(db)
            known = db.execute(sa.select(tables.blocks).where(tables.blocks.c.block_id == block_id)).one_or_none()
            if known is None:
                db.execute(sa.insert(tables.blocks).values(block_id=block_id, stream=stream, policy=text))
            elif (known.stream, known.policy) != (stream, text):
                raise LedgerConflict(
                    f"block={block_id}: is known with another policy or stream; a sealed policy never changes"
                )

    def knows(self, block_id: str) -> bool:
        """Whether the block was registered."""
        with self._engine.begin() as db:
            return self._policies(db, [block_id]).get(block_id) is not None

    def blocks(self, stream: str) -> list[str]:
        """Ids of a stream's registered blocks, in order of id."""
        query = sa.select(tables.blocks.c.block_id).where(tables.blocks.c.stream == stream)
        with self._engine.begin() as db:
            return sorted(str(name) for name in db.execute(query).scalars())

    def policy(self, block_id: str) -> Policy:
        """The frozen policy of a block.

        Raises:
            LedgerError: the block is unknown.
        """
        with self._engine.begin() as db:
            return self._known_policies(db, [block_id])[block_id]

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
            LedgerConflict: the attempt is known with another plan, or was cancelled.
            LedgerError: no charges, a block twice, or an unknown block.
        """
        names = [charge.block_id for charge in charges]
        if not names or len(set(names)) != len(names):
            raise LedgerError(f"round={round_id}: must charge at least one block, each once; charged: {names}")
        with self._engine.begin() as db:
            tables.lock(db)
            row = self._latest(db, round_id, attempt)
            if row is not None:
                self._agree(row, plan_hash, ("reserved", "started", "committed"))
                return row
            missing = self._shortfalls(db, charges)
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
        """Which blocks could not pay these charges now. Nothing is written."""
        with self._engine.begin() as db:
            return self._shortfalls(db, charges)

    def spent(self, block_id: str) -> tuple[float, ...]:
        """RDP spent by a block at each order of its grid, nats, summed in the order of the rows."""
        with self._engine.begin() as db:
            policy = self._known_policies(db, [block_id])[block_id]
            return self._spent(db, {block_id: policy})[block_id]

    def share_used(self, block_id: str) -> float:
        """Share of the block's filter used, in [0, 1]."""
        with self._engine.begin() as db:
            policy = self._known_policies(db, [block_id])[block_id]
            return accounting.share_used(self._spent(db, {block_id: policy})[block_id], policy.caps)

    # -- the chain ------------------------------------------------------------------------------------------------

    def rows(self, stream: str | None = None) -> list[LedgerRow]:
        """All rows, or one stream's, oldest first."""
        with self._engine.begin() as db:
            return self._rows(db, None if stream is None else tables.ledger.c.stream == stream)

    def head(self) -> str:
        """Hash of the newest row; 64 zeros for an empty ledger."""
        with self._engine.begin() as db:
            return self._head(db)[1]

    def verify_chain(self) -> int:
        """Recompute every hash; returns the number of rows.

        Raises:
            LedgerBroken: names the first row that does not match.
        """
        before = GENESIS
        rows = self.rows()
        for expected, row in enumerate(rows, start=1):
            if row.seq != expected:
                raise LedgerBroken(f"ledger row {expected} is missing: the next one is {row.seq}")
            if row.prev_hash != before or row.computed_hash() != row.hash:
                raise LedgerBroken(f"ledger row {row.seq} ({row.round_id}, {row.state}): its hash does not match")
            before = row.hash
        return len(rows)

    def require_head(self, head: str) -> None:
        """Insist that a row of this hash is in the chain.

        Raises:
            LedgerBehindReceipt: it is not: an older backup was restored, and what was spent since is unknown.
        """
        with self._engine.begin() as db:
            found = db.execute(sa.select(tables.ledger.c.seq).where(tables.ledger.c.hash == head)).scalar()
        if found is None and head != GENESIS:
            raise LedgerBehindReceipt(
                f"ledger: a receipt names head {head[:16]}, which is not in the chain: an older backup was restored; "
                f"restore the newest one before any round"
            )

    # -- inside one transaction -----------------------------------------------------------------------------------

    def _step(self, round_id: str, attempt: int, plan_hash: str, state: State, adapter_sha256: str) -> LedgerRow:
        with self._engine.begin() as db:
            tables.lock(db)
            row = self._latest(db, round_id, attempt)
            if row is None:
                raise LedgerConflict(f"round={round_id} attempt={attempt}: was never reserved; reserve it first")
            if row.state == state:
                self._agree(row, plan_hash, (state,))
                if row.adapter_sha256 != adapter_sha256:
                    raise LedgerConflict(f"round={round_id} attempt={attempt}: committed with another adapter already")
                return row
            self._agree(row, plan_hash, (_FOLLOWS[state],))
            return self._append(
                db, row.stream, round_id, attempt, state, plan_hash, row.noise_source, adapter_sha256, ()
            )

    @staticmethod
    def _agree(row: LedgerRow, plan_hash: str, states: Sequence[str]) -> None:
        name = f"round={row.round_id} attempt={row.attempt}"
        if row.plan_hash != plan_hash:
            raise LedgerConflict(
                f"{name}: plan_hash={plan_hash[:16]} but the ledger has {row.plan_hash[:16]}; use attempt+1"
            )
        if row.state not in states:
            raise LedgerConflict(f"{name}: is {row.state}; must be {' or '.join(states)}")

    def _append(
        self,
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
        seq, before = self._head(db)
        at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        fields = (
            seq + 1,
            stream,
            round_id,
            attempt,
            state,
            plan_hash,
            noise_source,
            adapter_sha256,
            at,
            charges,
            before,
        )
        row = LedgerRow(*fields, hash=LedgerRow(*fields, hash="").computed_hash())
        values = {k: v for k, v in asdict(row).items() if k != "charges"}
        db.execute(sa.insert(tables.ledger).values(**values))
        for position, charge in enumerate(charges):
            db.execute(sa.insert(tables.charges).values(seq=row.seq, position=position, **asdict(charge)))
        return row

    @staticmethod
    def _head(db: sa.Connection) -> tuple[int, str]:
        newest = sa.select(tables.ledger.c.seq, tables.ledger.c.hash).order_by(tables.ledger.c.seq.desc()).limit(1)
        found = db.execute(newest).one_or_none()
        return (0, GENESIS) if found is None else (int(found.seq), str(found.hash))

    def _latest(self, db: sa.Connection, round_id: str, attempt: int) -> LedgerRow | None:
        rows = self._rows(db, sa.and_(tables.ledger.c.round_id == round_id, tables.ledger.c.attempt == attempt))
        return rows[-1] if rows else None

    @staticmethod
    def _rows(db: sa.Connection, where: sa.ColumnElement[bool] | None) -> list[LedgerRow]:
        query = sa.select(tables.ledger).order_by(tables.ledger.c.seq)
        beside = sa.select(tables.charges).order_by(tables.charges.c.seq, tables.charges.c.position)
        if where is not None:
            query = query.where(where)
            beside = beside.join(tables.ledger, tables.ledger.c.seq == tables.charges.c.seq).where(where)
        charged: dict[int, list[Charge]] = {}
        for entry in db.execute(beside):
            charged.setdefault(entry.seq, []).append(Charge(entry.block_id, entry.q, entry.sigma, entry.steps))
        return [LedgerRow(**row._asdict(), charges=tuple(charged.get(row.seq, ()))) for row in db.execute(query)]

    @staticmethod
    def _policies(db: sa.Connection, names: Iterable[str]) -> dict[str, Policy]:
        query = sa.select(tables.blocks).where(tables.blocks.c.block_id.in_(list(names)))
        return {row.block_id: Policy.from_frozen(json.loads(row.policy)) for row in db.execute(query)}

    def _known_policies(self, db: sa.Connection, names: Sequence[str]) -> dict[str, Policy]:
        found = self._policies(db, names)
        missing = [name for name in names if name not in found]
        if missing:
            raise LedgerError(f"block={', '.join(missing)}: unknown to the ledger; is it sealed and committed?")
        return found

    def _spent(self, db: sa.Connection, policies: Mapping[str, Policy]) -> dict[str, tuple[float, ...]]:
        cancelled = sa.alias(tables.ledger)
        released = sa.exists().where(
            cancelled.c.round_id == tables.ledger.c.round_id,
            cancelled.c.attempt == tables.ledger.c.attempt,
            cancelled.c.state == "cancelled",
        )
        query = (
            sa.select(tables.charges)
            .join(tables.ledger, tables.ledger.c.seq == tables.charges.c.seq)
            .where(tables.charges.c.block_id.in_(list(policies)), ~released)
            .order_by(tables.charges.c.seq, tables.charges.c.position)
        )
        total = {name: (0.0,) * len(policy.orders) for name, policy in policies.items()}
        for row in db.execute(query):
            rho = accounting.rdp(row.q, row.sigma, row.steps, policies[row.block_id].orders)
            total[row.block_id] = tuple(s + r for s, r in zip(total[row.block_id], rho, strict=True))
        return total

    def _shortfalls(self, db: sa.Connection, charges: Sequence[Charge]) -> list[Shortfall]:
        policies = self._known_policies(db, [charge.block_id for charge in charges])
        spent = self._spent(db, policies)
        found = []
        for charge in charges:
            policy, before = policies[charge.block_id], spent[charge.block_id]
            rho = accounting.rdp(charge.q, charge.sigma, charge.steps, policy.orders)
            if not accounting.fits(before, rho, policy.caps):
                after = tuple(s + r for s, r in zip(before, rho, strict=True))
                used = accounting.share_used(before, policy.caps)
                asked = accounting.share_used(after, policy.caps) - used
                found.append(Shortfall(charge.block_id, used, asked))
        return found


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
