"""What each block has paid, and whether it can pay more: the filter, read inside one transaction.

Unit `record`: a record is in exactly one block and pays what its block pays. Unit `user`: a user may be in every block
of the stream that was sealed under that unit, so each of those blocks pays for every round that uses any of them, once
a round, and each of them must be able to.

A block has two accounts, because the people in its holdout are never trained on: `train` and `holdout`. With windows
as its horizon, only charges of the same window count.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa

from privacy import accounting, tables
from privacy.accounting import Flags, Indices, Mechanism, Vector
from privacy.chain import Charge
from privacy.errors import LedgerBroken, LedgerError
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


class Charges(NamedTuple):
    """What blocks of unit `record` have paid, column by column, each block's in the order of the rows.

    Attributes:
        block: (N,) its number.
        mechanism: (N,) a line of the prices.
        account: (N,) index into ACCOUNTS.
        window: (N,) number of the window, 0 for life.
        prices: by grid, (M, K) what each mechanism costs, nats.
    """

    block: Indices
    mechanism: Indices
    account: Indices
    window: Indices
    prices: Mapping[tuple[int, ...], Vector]


class _Entry(NamedTuple):
    """One charge of a stream's users: its mechanism, whose budget, in which window, and the horizon of its block."""

    mechanism: Mechanism
    account: str
    window: int
    horizon: str


def read(db: sa.Connection, names: Iterable[str], now: float, facts: Facts) -> dict[str, Account]:
    """Accounts of the blocks that are known, by name.

    Args:
        db: an open transaction.
        names: ids of blocks.
        now: POSIX seconds, to know which window is the present one.
        facts: what is known of the rows already.
    """
    rows = _blocks(db, list(names))
    policies = [policy_of(row.policy) for row in rows]
    horizons = {(row.stream, policy.horizon): policy for row, policy in zip(rows, policies, strict=True)}
    windows = {where: present_window(db, where[0], policy, now) for where, policy in horizons.items()}
    of_users = _spent_by_users(db, rows, policies, windows)
    records = [at for at, policy in enumerate(policies) if policy.unit == "record"]
    of_records = _spent_by_records(
        db,
        np.array([rows[at].seq for at in records], np.int64),
        [policies[at] for at in records],
        np.array([windows[rows[at].stream, policies[at].horizon] for at in records], np.int64),
        facts,
    )
    spent = of_users | dict(zip(records, of_records, strict=True))
    return {
        row.block_id: Account(row.block_id, row.stream, policy, *spent[at])
        for at, (row, policy) in enumerate(zip(rows, policies, strict=True))
    }


def _spent_by_records(
    db: sa.Connection, blocks: Indices, policies: Sequence[Policy], windows: Indices, facts: Facts
) -> list[list[tuple[float, ...]]]:
    """Per block what it spent from each account, at each order of its grid, nats.

    Args:
        db: an open transaction.
        blocks: (B,) their numbers.
        policies: of each.
        windows: (B,) the window that counts for each.
        facts: what is known of the rows already.
    """
    grids = {policy.orders for policy in policies}
    charges = facts.charges(db, blocks, grids)
    sorting = np.argsort(blocks)
    owner = sorting[np.searchsorted(blocks[sorting], charges.block)]
    held = np.array([policy.holdout_evaluations > 0 for policy in policies], bool)
    spent: list[list[tuple[float, ...]]] = [[] for _ in policies]
    for orders in grids:
        places = [at for at, policy in enumerate(policies) if policy.orders == orders]
        slot = np.full(len(policies), -1, np.int64)
        slot[places] = np.arange(len(places))
        for number, account in enumerate(ACCOUNTS):
            paid = _counted(charges, number, windows[owner]) & (slot[owner] >= 0)
            if account == HOLDOUT:
                paid &= held[owner]
            total = accounting.totals(slot[owner[paid]], charges.mechanism[paid], charges.prices[orders], len(places))
            for at, values in zip(places, total.tolist(), strict=True):
                spent[at].append(tuple(values))
    return spent


def _counted(charges: Charges, account: int, windows: Indices) -> Flags:
    """(N,) which charges an account of ACCOUNTS paid, in the window that counts for their block."""
    found: Flags = (charges.account == account) & (charges.window == windows)
    return found


def _spent_by_users(
    db: sa.Connection, rows: Sequence[Any], policies: Sequence[Policy], windows: Mapping[tuple[str, str], int]
) -> dict[int, list[tuple[float, ...]]]:
    """What users of these blocks have spent from each account, by place in the list: one purse for all of a stream."""
    users = [at for at, policy in enumerate(policies) if policy.unit == "user"]
    entries = {stream: _entries_of_users(db, stream) for stream in sorted({rows[at].stream for at in users})}
    purses: dict[tuple[Any, ...], tuple[float, ...]] = {}
    spent: dict[int, list[tuple[float, ...]]] = {}
    for at in users:
        stream, policy = rows[at].stream, policies[at]
        for account in ACCOUNTS:
            able = account == TRAIN or policy.holdout_evaluations > 0
            key = (stream, account, able, policy.horizon, policy.orders)
            if key not in purses:
                paid = _counted_of_users(entries[stream], account, policy.horizon, windows[stream, policy.horizon])
                purses[key] = _added(paid if able else [], policy.orders)
            spent.setdefault(at, []).append(purses[key])
    return spent


def _counted_of_users(entries: Sequence[_Entry], account: str, horizon: str, window: int) -> list[Mechanism]:
    """What counts in a window. A charge under another horizon always does: it may fall into any window."""
    return [
        mechanism
        for mechanism, whose, when, other in entries
        if whose == account and (when == window or other != horizon)
    ]


def _added(paid: Sequence[Mechanism], orders: tuple[int, ...]) -> tuple[float, ...]:
    """The sum of prices in the order of the charges, nats."""
    which = np.arange(len(paid))
    total = accounting.totals(np.zeros_like(which), which, accounting.vectors(paid, orders), 1)
    return tuple(total[0].tolist())


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


def require(db: sa.Connection, names: Sequence[str], now: float, facts: Facts) -> dict[str, Account]:
    """Accounts of these blocks.

    Raises:
        LedgerError: one is unknown.
    """
    found = read(db, names, now, facts)
    missing = [name for name in names if name not in found]
    if missing:
        raise LedgerError(f"block={', '.join(missing)}: unknown to the ledger; is it sealed and committed?")
    return found


def shortfalls(
    db: sa.Connection,
    charges: Sequence[Charge],
    now: float,
    facts: Facts,
    *,
    account: str = TRAIN,
    stream: str | None = None,
) -> tuple[list[Shortfall], int]:
    """Blocks whose filter has no order left for these charges, and the window in which the charges would fall.

    Raises:
        LedgerError: a block is unknown, not of `stream`, or has no such account, or the blocks cannot pay together.
    """
    if account not in ACCOUNTS:
        raise LedgerError(f"account={account}: must be {' or '.join(ACCOUNTS)}")
    asked = {charge.block_id: charge for charge in charges}
    accounts = require(db, list(asked), now, facts)
    _check_together(stream, asked, accounts)
    _check_account(account, accounts)
    some = next(iter(accounts.values()))
    window = present_window(db, some.stream, some.policy, now)
    if some.policy.unit == "user":
        others = {name: policy for name, (_, policy) in _user_blocks(db, some.stream).items()}
        _check_sides(others)
        able = [name for name, policy in others.items() if account == TRAIN or policy.holdout_evaluations]
        asked = dict.fromkeys(able, charges[0])
        accounts = require(db, able, now, facts)
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


def _blocks(db: sa.Connection, names: Sequence[str]) -> list[Any]:
    columns = tables.blocks.c
    query = sa.select(columns.seq, columns.block_id, columns.stream, columns.policy).order_by(columns.seq)
    return list(db.execute(query.where(tables.among(db, columns.block_id, names))).all())


def _user_blocks(db: sa.Connection, stream: str) -> dict[str, tuple[int, Policy]]:
    """Number and policy of a stream's blocks under unit `user`, by id."""
    query = sa.select(tables.blocks).where(tables.blocks.c.stream == stream).order_by(tables.blocks.c.seq)
    found = {str(row.block_id): (int(row.seq), policy_of(row.policy)) for row in db.execute(query)}
    return {name: (seq, policy) for name, (seq, policy) in found.items() if policy.unit == "user"}


def _released() -> sa.Exists:
    """Whether the attempt of a ledger's row was cancelled."""
    cancelled = sa.alias(tables.ledger)
    return sa.exists().where(
        cancelled.c.round_id == tables.ledger.c.round_id,
        cancelled.c.attempt == tables.ledger.c.attempt,
        cancelled.c.state == "cancelled",
    )


class Facts:
    """What rows say about their charges, remembered from one question to the next: rows are added, never changed.

    It holds for a chain that still has the newest row it knows, by number and hash: the rows before are then the same,
    and only those after it can have cancelled something. Else, as when a backup was restored, all is forgotten.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._forget()

    def _forget(self) -> None:
        self._newest: tuple[int, str] | None = None
        self._numbers: dict[Mechanism, int] = {}
        self._prices: dict[tuple[int, ...], Vector] = {}
        # Columns, a line for each mechanism of a row, ascending by key.
        self._keys, self._mechanism, self._account, self._window = (np.zeros(0, np.int64) for _ in range(4))
        self._released = np.zeros(0, bool)

    def charges(self, db: sa.Connection, blocks: Indices, grids: Collection[tuple[int, ...]]) -> Charges:
        """What each block paid, without what cancelled attempts gave back, with prices at some grids of orders.

        Raises:
            LedgerBroken: charges that nobody could have written.
        """
        try:
            block, keys = tables.charges_by_block(db, blocks)
        except ValueError as error:
            raise LedgerBroken(f"ledger: a charge was changed ({error})") from None
        with self._lock:
            self._catch_up(db)
            at, unknown = self._places(keys)
            if len(unknown):
                self._learn(db, unknown >> tables.KEY_SHIFT)
                at, unknown = self._places(keys)
            if len(unknown):
                raise LedgerBroken(f"ledger row {unknown[0] >> tables.KEY_SHIFT}: a charge has no mechanism")
            if self._released.any():
                kept = ~self._released[at]
                block, at = block[kept], at[kept]
            prices = {orders: self._priced(orders) for orders in grids}
            return Charges(block, self._mechanism[at], self._account[at], self._window[at], prices)

    def _priced(self, orders: tuple[int, ...]) -> Vector:
        known = self._prices.get(orders, np.zeros((0, len(orders))))
        if len(known) < len(self._numbers):
            later = list(self._numbers)[len(known) :]
            known = self._prices[orders] = np.concatenate([known, accounting.vectors(later, orders)])
        return known

    def _places(self, keys: Indices) -> tuple[Indices, Indices]:
        """(N,) where each key stands, and those of them that stand nowhere."""
        at = np.searchsorted(self._keys, keys)
        return at, keys[np.append(self._keys, -1)[at] != keys]

    def _catch_up(self, db: sa.Connection) -> None:
        ledger = tables.ledger.c
        query = sa.select(ledger.seq, ledger.hash, ledger.round_id, ledger.attempt, ledger.state)
        if self._newest is not None:
            found = db.execute(query.where(ledger.seq >= self._newest[0]).order_by(ledger.seq)).all()
            if found and (found[0].seq, found[0].hash) == self._newest:
                self._newest = (found[-1].seq, found[-1].hash)
                for _, _, round_id, attempt, state in found[1:]:
                    if state == "cancelled":
                        mine = sa.and_(ledger.round_id == round_id, ledger.attempt == attempt)
                        rows = np.array(db.execute(sa.select(ledger.seq).where(mine)).scalars().all())
                        self._released |= np.isin(self._keys >> tables.KEY_SHIFT, rows)
                return
            self._forget()
        newest = db.execute(query.order_by(ledger.seq.desc()).limit(1)).one_or_none()
        self._newest = None if newest is None else (newest.seq, newest.hash)

    def _learn(self, db: sa.Connection, rows: Indices) -> None:
        """Add what stands in rows of which nothing is known yet."""
        ledger, mechanisms = tables.ledger.c, tables.mechanisms.c
        names = (mechanisms.seq, mechanisms.number, mechanisms.q, mechanisms.sigma, mechanisms.steps)
        query = (
            sa.select(*names, ledger.account, ledger.window, _released())
            .join_from(tables.mechanisms, tables.ledger, ledger.seq == mechanisms.seq)
            .where(tables.among(db, mechanisms.seq, np.unique(rows)))
        )
        lines = [
            (
                (seq << tables.KEY_SHIFT) | number,
                self._numbers.setdefault((q, sigma, steps), len(self._numbers)),
                ACCOUNTS.index(account) if account in ACCOUNTS else len(ACCOUNTS),
                window,
                released,
            )
            for seq, number, q, sigma, steps, account, window, released in db.execute(query).all()
        ]
        made = np.array(lines, np.int64).reshape(-1, 5)
        order = np.argsort(np.concatenate([self._keys, made[:, 0]]))
        self._keys = np.concatenate([self._keys, made[:, 0]])[order]
        self._mechanism = np.concatenate([self._mechanism, made[:, 1]])[order]
        self._account = np.concatenate([self._account, made[:, 2]])[order]
        self._window = np.concatenate([self._window, made[:, 3]])[order]
        self._released = np.concatenate([self._released, made[:, 4] > 0])[order]


def _entries_of_users(db: sa.Connection, stream: str) -> list[_Entry]:
    """What users of a stream paid, in the order of the rows.

    The blocks of a round have one mechanism, which a user pays once: the first charge stands for all.
    """
    horizons = {seq: policy.horizon for seq, policy in _user_blocks(db, stream).values()}
    mechanisms, charges, ledger = tables.mechanisms.c, tables.charges.c, tables.ledger.c
    query = (
        sa.select(charges.block, mechanisms.q, mechanisms.sigma, mechanisms.steps, ledger.account, ledger.window)
        .join(tables.ledger, ledger.seq == charges.seq)
        .join(tables.mechanisms, sa.and_(mechanisms.seq == charges.seq, mechanisms.number == charges.number))
        .where(ledger.stream == stream, charges.position == 0, ~_released())
        .order_by(charges.seq)
    )
    return [
        _Entry((q, sigma, steps), account, window, horizons[block])
        for block, q, sigma, steps, account, window in db.execute(query)
        if block in horizons
    ]
