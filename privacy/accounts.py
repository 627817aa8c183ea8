"""What each block has paid, and whether it can pay more: the filter, read inside one transaction.

Unit `record`: a record is in exactly one block and pays what its block pays. Unit `user`: a user may be in every block
of the stream that was sealed under that unit, so each of those blocks pays for every round that uses any of them, once
a round, and each of them must be able to.

A block has two accounts, because the people in its holdout are never trained on: `train` and `holdout`. With windows
as its horizon, only charges of the same window count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa

from privacy import accounting, tables
from privacy.accounting import Mechanism
from privacy.chain import Charge
from privacy.errors import LedgerError
from privacy.policy import ACCOUNTS, HOLDOUT, TRAIN, Policy


@dataclass(frozen=True)
class Account:
    """A block's policy and what it has spent, per order of the policy's grid, nats.

    Of a block with windows: spent in the present one.
    """

    block_id: str
    stream: str
    policy: Policy
    spent: tuple[float, ...]
    holdout_spent: tuple[float, ...]

    @property
    def share_used(self) -> float:
        """Share of the block's filter used, in [0, 1]: spent over cap at the order that has the most left."""
        return accounting.share_used(self.spent, self.policy.caps)

    @property
    def holdout_share_used(self) -> float:
        """The same of its holdout's filter; 0 where there is no such account."""
        return accounting.share_used(self.holdout_spent, self.policy.holdout_caps)

    def spent_of(self, account: str) -> tuple[float, ...]:
        """Spent by `train` or `holdout`."""
        return self.spent if account == TRAIN else self.holdout_spent


@dataclass(frozen=True)
class Shortfall:
    """A block that cannot pay, and by how much, as a share of its filter."""

    block_id: str
    share_used: float
    share_asked: float


class _Purse(NamedTuple):
    """Charges that add up: who pays (a block's number, or a stream whose users pay together), from which account."""

    owner: int | str
    account: str
    horizon: str
    orders: tuple[int, ...]


class _Entry(NamedTuple):
    """One charge: the block it names, its mechanism, whose budget, in which window."""

    block: int
    q: float
    sigma: float
    steps: int
    account: str
    window: int


def read(db: sa.Connection, names: Iterable[str], now: float) -> dict[str, Account]:
    """Accounts of the blocks that are known, by name.

    Args:
        db: an open transaction.
        names: ids of blocks.
        now: POSIX seconds, to know which window is the present one.
    """
    rows = {str(row.block_id): row for row in _blocks(db, list(names))}
    policies = {name: policy_of(row.policy) for name, row in rows.items()}
    present = {
        (stream, policy.horizon): present_window(db, stream, policy, now)
        for (stream, _), policy in {
            (str(row.stream), policies[name].horizon): policies[name] for name, row in rows.items()
        }.items()
    }
    users = {str(rows[name].stream) for name, policy in policies.items() if policy.unit == "user"}
    entries: dict[int | str, list[_Entry]] = {}
    horizons: dict[int, str] = {}
    for stream in sorted(users):
        entries[stream], horizons_of_users = _entries_of_users(db, stream)
        horizons.update(horizons_of_users)
    entries.update(_entries_of_blocks(db, [row.seq for name, row in rows.items() if policies[name].unit == "record"]))
    purses: dict[str, tuple[_Purse, _Purse]] = {}
    paid: dict[_Purse, list[Mechanism]] = {}
    for name, policy in policies.items():
        row = rows[name]
        owner = str(row.stream) if policy.unit == "user" else int(row.seq)
        first, second = (_Purse(owner, account, policy.horizon, policy.orders) for account in ACCOUNTS)
        purses[name] = first, second
        for purse in purses[name]:
            if purse not in paid:
                window = present[str(row.stream), policy.horizon]
                paid[purse] = _counted(entries[owner], purse, window, horizons)
    spent = _added(paid)
    return {
        name: Account(name, str(row.stream), policies[name], *(spent[purse] for purse in purses[name]))
        for name, row in rows.items()
    }


def _counted(entries: Sequence[_Entry], purse: _Purse, window: int, horizons: Mapping[int, str]) -> list[Mechanism]:
    """What counts in a window. A user's charge under another horizon always does: it may fall into any window."""
    return [
        (q, sigma, steps)
        for block, q, sigma, steps, account, when in entries
        if account == purse.account and (when == window or horizons.get(block, purse.horizon) != purse.horizon)
    ]


def _added(paid: Mapping[_Purse, Sequence[Mechanism]]) -> dict[_Purse, tuple[float, ...]]:
    """Sums of prices, each in the order of its charges."""
    found: dict[_Purse, tuple[float, ...]] = {}
    for orders in {purse.orders for purse in paid}:
        mine = [purse for purse in paid if purse.orders == orders]
        numbers: dict[Mechanism, int] = {}
        which = [numbers.setdefault(mechanism, len(numbers)) for purse in mine for mechanism in paid[purse]]
        owner = np.repeat(np.arange(len(mine)), [len(paid[purse]) for purse in mine])
        prices = accounting.vectors(list(numbers), orders)
        total = accounting.totals(owner, np.array(which, np.int64), prices, len(mine))
        found.update(zip(mine, map(tuple, total.tolist()), strict=True))
    return found


def present_window(db: sa.Connection, stream: str, policy: Policy, now: float) -> int:
    """Number of the window in which a charge made now falls; 0 for life.

    It never falls, also when the clock goes back: at least the window of the stream's newest charge of that horizon.
    """
    if not policy.days:
        return 0
    newest = (
        sa.select(tables.ledger.c.window)
        .join(tables.charges, tables.charges.c.seq == tables.ledger.c.seq)
        .join(tables.blocks, tables.blocks.c.seq == tables.charges.c.block)
        .where(
            tables.ledger.c.stream == stream,
            tables.ledger.c.window > 0,
            tables.charges.c.position == 0,
            # The blocks of a row have one horizon, and policies are stored as canonical JSON.
            tables.blocks.c.policy.contains(f'"horizon":"{policy.horizon}"', autoescape=True),
        )
        .order_by(tables.ledger.c.window.desc())
        .limit(1)
    )
    return max(int(db.execute(newest).scalar() or 0), policy.window_at(now))


def require(db: sa.Connection, names: Sequence[str], now: float) -> dict[str, Account]:
    """Accounts of these blocks.

    Raises:
        LedgerError: one is unknown.
    """
    found = read(db, names, now)
    missing = [name for name in names if name not in found]
    if missing:
        raise LedgerError(f"block={', '.join(missing)}: unknown to the ledger; is it sealed and committed?")
    return found


def shortfalls(
    db: sa.Connection, charges: Sequence[Charge], now: float, *, account: str = TRAIN, stream: str | None = None
) -> tuple[list[Shortfall], int]:
    """Blocks whose filter has no order left for these charges, and the window in which the charges would fall.

    Raises:
        LedgerError: a block is unknown, not of `stream`, or has no such account, or the blocks cannot pay together.
    """
    if account not in ACCOUNTS:
        raise LedgerError(f"account={account}: must be {' or '.join(ACCOUNTS)}")
    asked = {charge.block_id: charge for charge in charges}
    accounts = require(db, list(asked), now)
    _check_together(stream, asked, accounts)
    _check_account(account, accounts)
    some = next(iter(accounts.values()))
    window = present_window(db, some.stream, some.policy, now)
    if some.policy.unit == "user":
        others = {name: policy for name, (_, policy) in _user_blocks(db, some.stream).items()}
        _check_sides(others)
        able = [name for name, policy in others.items() if account == TRAIN or policy.holdout_evaluations]
        asked = dict.fromkeys(able, charges[0])
        accounts = require(db, able, now)
    prices: dict[tuple[Mechanism, tuple[int, ...]], list[float]] = {}
    found = []
    for name, charge in asked.items():
        policy, spent = accounts[name].policy, accounts[name].spent_of(account)
        caps, kind = policy.caps_of(account), (charge.mechanism, policy.orders)
        if kind not in prices:
            (prices[kind],) = accounting.vectors([charge.mechanism], policy.orders).tolist()
        rho = prices[kind]
        if not accounting.fits(spent, rho, caps):
            used = accounting.share_used(spent, caps)
            after = accounting.share_used([s + r for s, r in zip(spent, rho, strict=True)], caps)
            found.append(Shortfall(name, used, after - used))
    return found, window


def _check_together(stream: str | None, asked: Mapping[str, Charge], accounts: Mapping[str, Account]) -> None:
    streams = sorted({account.stream for account in accounts.values()} | ({stream} if stream else set()))
    if len(streams) > 1:
        raise LedgerError(f"stream={', '.join(streams)}: must be one for all blocks of a round")
    for name in ("unit", "horizon"):
        values = sorted({getattr(account.policy, name) for account in accounts.values()})
        if len(values) > 1:
            raise LedgerError(f"{name}={', '.join(values)}: must be one for all blocks of a round; plan them apart")
    mechanisms = {charge.mechanism for charge in asked.values()}
    if len(mechanisms) > 1 and any(account.policy.unit == "user" for account in accounts.values()):
        raise LedgerError(
            f"charges={sorted(mechanisms)}: unit user is drawn once over all blocks of a round, at one rate; "
            f"charge one (q, sigma, steps)"
        )


def _check_account(account: str, accounts: Mapping[str, Account]) -> None:
    without = [name for name, found in accounts.items() if not found.policy.holdout_evaluations]
    if account == HOLDOUT and without:
        raise LedgerError(
            f"block={', '.join(without)}: sealed without a holdout account (holdout_evaluations=0); must be left out "
            f"of private evaluations; set privacy.holdout_evaluations for blocks sealed from now on"
        )


def _check_sides(policies: Mapping[str, Policy]) -> None:
    """A user's side follows from the holdout's share: where it changed, somebody would be on both."""
    shares = sorted({policy.holdout_share for policy in policies.values()})
    if len(shares) > 1 and any(policy.holdout_evaluations for policy in policies.values()):
        raise LedgerError(
            f"holdout_share={', '.join(map(str, shares))}: must be one for all blocks of unit user once there are "
            f"holdout accounts, or a user is trained on and held out; start a stream of its own"
        )


@lru_cache(maxsize=65_536)
def policy_of(text: str) -> Policy:
    """The policy of a block from its canonical JSON.

    Raises:
        PolicyError: it is not whole.
    """
    return Policy.from_frozen(json.loads(text))


def _blocks(db: sa.Connection, names: Sequence[str]) -> Iterable[Any]:
    for part in tables.in_parts(names):
        query = sa.select(tables.blocks).where(tables.blocks.c.block_id.in_(part))
        yield from db.execute(query.order_by(tables.blocks.c.seq))


def _user_blocks(db: sa.Connection, stream: str) -> dict[str, tuple[int, Policy]]:
    """Number and policy of a stream's blocks under unit `user`, by id."""
    query = sa.select(tables.blocks).where(tables.blocks.c.stream == stream).order_by(tables.blocks.c.seq)
    found = {str(row.block_id): (int(row.seq), policy_of(row.policy)) for row in db.execute(query)}
    return {name: (seq, policy) for name, (seq, policy) in found.items() if policy.unit == "user"}


def _paid() -> sa.Select[Any]:
    """Charges with their mechanism, account and window, without those of cancelled attempts."""
    cancelled = sa.alias(tables.ledger)
    released = sa.exists().where(
        cancelled.c.round_id == tables.ledger.c.round_id,
        cancelled.c.attempt == tables.ledger.c.attempt,
        cancelled.c.state == "cancelled",
    )
    mechanisms, charges, ledger = tables.mechanisms.c, tables.charges.c, tables.ledger.c
    return (
        sa.select(charges.block, mechanisms.q, mechanisms.sigma, mechanisms.steps, ledger.account, ledger.window)
        .join(tables.ledger, ledger.seq == charges.seq)
        .join(tables.mechanisms, sa.and_(mechanisms.seq == charges.seq, mechanisms.number == charges.number))
        .where(~released)
        .order_by(charges.seq)
    )


def _entries_of_blocks(db: sa.Connection, blocks: Sequence[int]) -> dict[int | str, list[_Entry]]:
    """What each block paid, in the order of the rows."""
    found: dict[int | str, list[Any]] = {block: [] for block in blocks}
    for part in tables.in_parts(blocks):
        for entry in db.execute(_paid().where(tables.charges.c.block.in_(part))).all():
            found[entry[0]].append(entry)
    return found


def _entries_of_users(db: sa.Connection, stream: str) -> tuple[list[_Entry], dict[int, str]]:
    """What users of a stream paid, in the order of the rows, and the horizon of each of their blocks.

    The blocks of a round have one mechanism, which a user pays once: the first charge stands for all.
    """
    horizons = {seq: policy.horizon for seq, policy in _user_blocks(db, stream).values()}
    query = _paid().where(tables.ledger.c.stream == stream, tables.charges.c.position == 0)
    return [_Entry(*entry) for entry in db.execute(query) if entry[0] in horizons], horizons
