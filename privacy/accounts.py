"""What each block has paid, and whether it can pay more: the filter, read inside one transaction.

Unit `record`: a record is in exactly one block and pays what its block pays. Unit `user`: a user may be in every block
of the stream that was sealed under that unit, so each of those blocks pays for every round that uses any of them, once
a round, and each of them must be able to.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from privacy import accounting, tables
from privacy.chain import Charge
from privacy.errors import LedgerError
from privacy.policy import Policy


@dataclass(frozen=True)
class Account:
    """A block's policy and what it has spent, per order of the policy's grid, nats."""

    block_id: str
    stream: str
    policy: Policy
    spent: tuple[float, ...]

    @property
    def share_used(self) -> float:
        """Share of the block's filter used, in [0, 1]: spent over cap at the order that has the most left."""
        return accounting.share_used(self.spent, self.policy.caps)


@dataclass(frozen=True)
class Shortfall:
    """A block that cannot pay, and by how much, as a share of its filter."""

    block_id: str
    share_used: float
    share_asked: float


def read(db: sa.Connection, names: Iterable[str]) -> dict[str, Account]:
    """Accounts of the blocks that are known, by name."""
    rows = {str(row.block_id): row for row in _blocks(db, tables.blocks.c.block_id.in_(list(names)))}
    policies = {name: _policy(row) for name, row in rows.items()}
    purse = {name: name for name, policy in policies.items() if policy.unit == "record"}
    for stream in {str(rows[name].stream) for name in rows if name not in purse}:
        purse.update(dict.fromkeys(_user_blocks(db, stream), f"users of {stream}"))
    paid: dict[str, dict[int, Charge]] = {owner: {} for owner in purse.values()}
    for entry in _charges(db, purse):
        # The user blocks of one round have one mechanism (`_check_together`), and a user pays it once.
        paid[purse[entry.block_id]].setdefault(entry.seq, Charge(entry.block_id, entry.q, entry.sigma, entry.steps))
    return {
        name: Account(name, str(row.stream), policies[name], _total(paid[purse[name]].values(), policies[name]))
        for name, row in rows.items()
    }


def require(db: sa.Connection, names: Sequence[str]) -> dict[str, Account]:
    """Accounts of these blocks.

    Raises:
        LedgerError: one is unknown.
    """
    found = read(db, names)
    missing = [name for name in names if name not in found]
    if missing:
        raise LedgerError(f"block={', '.join(missing)}: unknown to the ledger; is it sealed and committed?")
    return found


def shortfalls(db: sa.Connection, charges: Sequence[Charge], stream: str | None = None) -> list[Shortfall]:
    """Blocks whose filter has no order left for these charges.

    Raises:
        LedgerError: a block is unknown or not of `stream`, or the blocks cannot pay together.
    """
    asked = {charge.block_id: charge for charge in charges}
    accounts = require(db, list(asked))
    _check_together(stream, asked, accounts)
    for owner in {a.stream for a in accounts.values() if a.policy.unit == "user"}:
        asked = dict.fromkeys(_user_blocks(db, owner), charges[0])
        accounts = require(db, list(asked))
    found = []
    for name, charge in asked.items():
        spent, policy, used = accounts[name].spent, accounts[name].policy, accounts[name].share_used
        rho = accounting.rdp(charge.q, charge.sigma, charge.steps, policy.orders)
        if not accounting.fits(spent, rho, policy.caps):
            after = accounting.share_used([s + r for s, r in zip(spent, rho, strict=True)], policy.caps)
            found.append(Shortfall(name, used, after - used))
    return found


def _check_together(stream: str | None, asked: Mapping[str, Charge], accounts: Mapping[str, Account]) -> None:
    streams = sorted({account.stream for account in accounts.values()} | ({stream} if stream else set()))
    if len(streams) > 1:
        raise LedgerError(f"stream={', '.join(streams)}: must be one for all blocks of a round")
    units = sorted({account.policy.unit for account in accounts.values()})
    if len(units) > 1:
        raise LedgerError(f"unit={', '.join(units)}: must be one for all blocks of a round; plan them apart")
    mechanisms = {(charge.q, charge.sigma, charge.steps) for charge in asked.values()}
    if units == ["user"] and len(mechanisms) > 1:
        raise LedgerError(
            f"charges={sorted(mechanisms)}: unit user is drawn once over all blocks of a round, at one rate; "
            f"charge one (q, sigma, steps)"
        )


def _total(charges: Iterable[Charge], policy: Policy) -> tuple[float, ...]:
    total = (0.0,) * len(policy.orders)
    for charge in charges:
        rho = accounting.rdp(charge.q, charge.sigma, charge.steps, policy.orders)
        total = tuple(t + r for t, r in zip(total, rho, strict=True))
    return total


def _policy(row: Any) -> Policy:
    return Policy.from_frozen(json.loads(row.policy))


def _blocks(db: sa.Connection, where: sa.ColumnElement[bool]) -> Iterable[Any]:
    return db.execute(sa.select(tables.blocks).where(where).order_by(tables.blocks.c.seq))


def _user_blocks(db: sa.Connection, stream: str) -> list[str]:
    rows = _blocks(db, tables.blocks.c.stream == stream)
    return [str(row.block_id) for row in rows if _policy(row).unit == "user"]


def _charges(db: sa.Connection, names: Iterable[str]) -> Iterable[Any]:
    """Charges of these blocks in the order of the rows, without those of cancelled attempts."""
    cancelled = sa.alias(tables.ledger)
    released = sa.exists().where(
        cancelled.c.round_id == tables.ledger.c.round_id,
        cancelled.c.attempt == tables.ledger.c.attempt,
        cancelled.c.state == "cancelled",
    )
    query = (
        sa.select(tables.charges)
        .join(tables.ledger, tables.ledger.c.seq == tables.charges.c.seq)
        .where(tables.charges.c.block_id.in_(list(names)), ~released)
        .order_by(tables.charges.c.seq, tables.charges.c.position)
    )
    return db.execute(query)
