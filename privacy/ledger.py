"""The privacy ledger: append-only chained rows, a filter per block, charged before the first private byte is read.

A round's attempt is reserved, started and committed, a row each. Reserved, started and committed attempts count as
spent; only a reserved one can be cancelled, because nothing was read yet. Spending is always recomputed from the rows
in their order, so that a replay equals what was in memory, bit for bit. A block has two accounts: `train`, and
`holdout` for the people who are only ever evaluated on. Time plays no part but in windows, and there only forwards: a
clock that goes back changes what a row says, not where it stands, and opens no window again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import sqlalchemy as sa

from privacy import accounting, accounts, chain, tables
from privacy.accounting import Mechanism
from privacy.accounts import Account, Shortfall
from privacy.canonical import canonical
from privacy.chain import GENESIS, BlockRow, Charge, History, LedgerRow, State, hash_of
from privacy.errors import BudgetExceeded, LedgerBehindReceipt, LedgerConflict, LedgerError
from privacy.facts import Facts, policy_of
from privacy.policy import NONE, TRAIN, Policy

__all__ = ["GENESIS", "Account", "Charge", "Ledger", "LedgerRow", "Shortfall", "Snapshot", "State"]

# What may follow what. `planned` is a plan on disk that the ledger has not heard of.
_FOLLOWS: Mapping[str, str] = {"started": "reserved", "committed": "started", "cancelled": "reserved"}


@dataclass(frozen=True)
class Snapshot:
    """The verified ledger and a stream's accounts at one moment; accounts in the order in which blocks became known."""

    stream: str
    history: History
    accounts: Mapping[str, Account]

    @cached_property
    def rows(self) -> tuple[LedgerRow, ...]:
        """The stream's rows with their charges, oldest first; of a long history the columns are quicker to walk."""
        return self.history.of_stream(self.stream)


class Ledger:
    """The ledger of all streams of a workspace. Safe to use from several threads and processes at once.

    Args:
        url: SQLAlchemy URL, `sqlite:///FILE` or `postgresql+psycopg://...`.

    Raises:
        LedgerError: the database cannot be opened, now or at any later call.
    """

    def __init__(self, url: str) -> None:
        self._engine = tables.open_database(url)
        self._facts = Facts()

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
        self.register_blocks(stream, {block_id: frozen_policy})

    def register_blocks(self, stream: str, frozen_policies: Mapping[str, Mapping[str, Any]]) -> None:
        """Make many sealed blocks known, all or none. Idempotent.

        Args:
            stream: of all of them.
            frozen_policies: by block id, in the order in which they are to be known.

        Raises:
            LedgerConflict: a block is known with another policy or in another stream.
            PolicyError: a policy is not whole.
        """
        texts = {name: canonical(dict(policy)).decode("utf-8") for name, policy in frozen_policies.items()}
        for text in set(texts.values()):
            policy_of(text)
        # Asked for every block before every round; nearly always the answer is there to be read.
        with tables.reading(self._engine) as db:
            if not _unknown(db, stream, texts):
                return
        with tables.writing(self._engine) as db:
            seq, before = _head(db, tables.blocks)
            made: list[dict[str, Any]] = []
            for name in _unknown(db, stream, texts):
                row = BlockRow(seq + len(made) + 1, name, stream, texts[name], before)
                before = hash_of(row)
                made.append(asdict(replace(row, hash=before)))
            if made:
                db.execute(sa.insert(tables.blocks), made)

    def knows(self, block_id: str) -> bool:
        """Whether the block was registered."""
        query = sa.select(tables.blocks.c.seq).where(tables.blocks.c.block_id == block_id)
        with tables.reading(self._engine) as db:
            return db.execute(query).scalar() is not None

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
        account: str = TRAIN,
        uncharged: Sequence[str] = (),
    ) -> LedgerRow:
        """Charge an attempt durably; returns the attempt's newest row. A lost response may be asked again.

        Args:
            stream: of all charged blocks.
            round_id: unique among all rounds and evaluations of all streams.
            attempt: 1 and up.
            plan_hash: of what is going to run.
            charges: what each block pays; nothing where the round is without privacy.
            noise_source: `system`, or `test`: known to whoever knows the seed, hence no privacy; or `none`: no clip and
                no noise, on blocks to whose people nothing was promised.
            account: `train`, or `holdout` for an evaluation on people who are never trained on.
            uncharged: blocks that a round without privacy reads. Its plan, whose hash stands in the row, names them.

        Raises:
            BudgetExceeded: a block has no order left that can pay; the message names blocks, shares and choices.
            LedgerConflict: the attempt is known with another plan or other charges, or was cancelled.
            LedgerError: no charges, a block twice, unknown, of another stream or without that account, or blocks that
                cannot pay together; a round with privacy on blocks without, or the other way.
        """
        names = [charge.block_id for charge in charges]
        if noise_source not in {"system", "test", NONE}:
            raise LedgerError(f"noise_source={noise_source}: must be system, test or none")
        if noise_source == NONE and (names or not uncharged or account != TRAIN):
            raise LedgerError(f"noise_source=none: must charge no block, and name those it trains on; charged: {names}")
        if noise_source != NONE and (uncharged or not names or len(set(names)) != len(names)):
            raise LedgerError(f"round={round_id}: must charge at least one block, each once; charged: {names}")
        with tables.writing(self._engine) as db:
            known = self._attempt(db, round_id, attempt)
            if known:
                _agree(known[-1], plan_hash, ("reserved", "started", "committed"))
                first = known[0]
                asked = (stream, tuple(charges), noise_source, account)
                if (first.stream, first.charges, first.noise_source, first.account) != asked:
                    raise LedgerConflict(f"round={round_id} attempt={attempt}: has other charges; use attempt+1")
                return known[-1]
            now = _now()
            missing: Sequence[Shortfall] = ()
            window = 0
            if noise_source == NONE:
                accounts.require_open(db, uncharged, now.timestamp(), self._facts, stream=stream)
            else:
                missing, window = accounts.shortfalls(
                    db, charges, now.timestamp(), self._facts, account=account, stream=stream
                )
            if missing:
                raise BudgetExceeded(_explain(round_id, missing, account))
            row = LedgerRow(
                seq=0,
                stream=stream,
                round_id=round_id,
                attempt=attempt,
                state="reserved",
                plan_hash=plan_hash,
                noise_source=noise_source,
                adapter_sha256="",
                at="",
                charges=tuple(charges),
                blocks_head="",
                prev_hash="",
                account=account,
                window=window,
            )
            return _append(db, row, now)

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

    def shortfalls(self, charges: Sequence[Charge], account: str = TRAIN) -> list[Shortfall]:
        """Which blocks could not pay these charges now. Nothing is written.

        Raises:
            LedgerError: a block is unknown or has no such account, or the blocks cannot pay together.
        """
        with tables.reading(self._engine) as db:
            return accounts.shortfalls(db, charges, _now().timestamp(), self._facts, account=account)[0]

    def spent(self, block_id: str, account: str = TRAIN) -> tuple[float, ...]:
        """RDP spent by a block at each order of its grid, nats, summed in the order of the rows.

        Of a block with windows: in the window in which a charge made now would fall.

        Raises:
            LedgerError: the block is unknown.
            PolicyError: there is no such account.
        """
        found = self._account(block_id)
        found.policy.caps_of(account)
        return found.spent_of(account)

    def share_used(self, block_id: str, account: str = TRAIN) -> float:
        """Share of the block's filter used, in [0, 1]; of a block with windows: in the present one.

        Raises:
            LedgerError: the block is unknown.
            PolicyError: there is no such account.
        """
        return accounting.share_used(self.spent(block_id, account), self.policy(block_id).caps_of(account))

    def accounts(self, block_ids: Sequence[str]) -> dict[str, Account]:
        """Accounts of many blocks from one consistent view, by id.

        Raises:
            LedgerError: a block is unknown.
        """
        with tables.reading(self._engine) as db:
            return accounts.require(db, block_ids, _now().timestamp(), self._facts)

    # -- the chain ------------------------------------------------------------------------------------------------

    def rows(self, stream: str | None = None) -> list[LedgerRow]:
        """All rows, or one stream's, oldest first."""
        with tables.reading(self._engine) as db:
            return chain.read_rows(db, None if stream is None else tables.ledger.c.stream == stream)

    def snapshot(self, stream: str, choose: Callable[[History], Iterable[str]] | None = None) -> Snapshot:
        """The whole ledger, verified, and accounts of a stream, from one consistent view: nothing is half-way.

        Args:
            stream: its name.
            choose: which of its blocks' accounts to read, by what the rows say; all if not given.

        Raises:
            LedgerBroken: names the first row that does not match.
        """
        with tables.reading(self._engine) as db:
            history = chain.read_history(db)
            mine = [row.block_id for row in history.blocks if row.stream == stream]
            names = mine if choose is None else list(choose(history))
            found = accounts.read(db, names, _now().timestamp(), self._facts)
        return Snapshot(stream, history, {name: found[name] for name in names})

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
            return len(chain.read_history(db).rows)

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
            return accounts.require(db, [block_id], _now().timestamp(), self._facts)[block_id]

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
            changed = replace(row, state=state, adapter_sha256=adapter_sha256, charges=())
            return _append(db, changed, _now())


def _now() -> datetime:
    return datetime.now(UTC)


def _append(db: sa.Connection, draft: LedgerRow, now: datetime) -> LedgerRow:
    """Write the row at the end of the chain; its number, time, heads and hash are filled in."""
    seq, before = _head(db, tables.ledger)
    row = replace(
        draft,
        seq=seq + 1,
        at=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        blocks_head=_head(db, tables.blocks)[1],
        prev_hash=before,
    )
    row = replace(row, hash=hash_of(row))
    values = {name: getattr(row, name) for name in LedgerRow.__dataclass_fields__ if name != "charges"}
    db.execute(sa.insert(tables.ledger).values(**values))
    if row.charges:
        numbers: dict[Mechanism, int] = {}
        charged = tables.among(db, tables.blocks.c.block_id, [charge.block_id for charge in row.charges])
        known = sa.select(tables.blocks.c.block_id, tables.blocks.c.seq).where(charged)
        places = {row.block_id: row.seq for row in db.execute(known)}
        beside = [
            {
                "seq": row.seq,
                "position": position,
                "block": places[charge.block_id],
                "number": numbers.setdefault(charge.mechanism, position),
            }
            for position, charge in enumerate(row.charges)
        ]
        kinds = [
            {"seq": row.seq, "number": number, "q": q, "sigma": sigma, "steps": steps}
            for (q, sigma, steps), number in numbers.items()
        ]
        db.execute(sa.insert(tables.mechanisms), kinds)
        db.execute(sa.insert(tables.charges), beside)
    return row


def _unknown(db: sa.Connection, stream: str, texts: Mapping[str, str]) -> list[str]:
    """Blocks that are not known yet, in the order given.

    Raises:
        LedgerConflict: one is known with another policy or in another stream.
    """
    known = set()
    columns = (tables.blocks.c.block_id, tables.blocks.c.stream, tables.blocks.c.policy)
    asked = tables.among(db, tables.blocks.c.block_id, list(texts))
    for name, where, text in db.execute(sa.select(*columns).where(asked)):
        if (where, text) != (stream, texts[name]):
            raise LedgerConflict(f"block={name}: is known with another policy or stream; a sealed policy never changes")
        known.add(name)
    return [name for name in texts if name not in known]


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


def _explain(round_id: str, missing: Sequence[Shortfall], account: str) -> str:
    parts = [
        f"{m.block_id} (used {m.share_used:.1%}, asked {m.share_asked:.1%}, "
        f"over by {m.share_used + m.share_asked - 1:.1%})"
        for m in missing
    ]
    if account != TRAIN:
        return (
            f"round={round_id}: blocks {', '.join(parts)} cannot pay from their {account} account; must stay within "
            f"100% of the sealed filter; raise sigma, ask less, leave them out, or wait for new blocks"
        )
    return (
        f"round={round_id}: blocks {', '.join(parts)} cannot pay; must stay within 100% of the sealed filter; "
        f"raise sigma, lower the sampling rate or the steps, leave them out, or wait for new blocks"
    )
