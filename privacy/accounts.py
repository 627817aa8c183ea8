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
from threading import Lock
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


class _Entry(NamedTuple):
    """One charge: its mechanism, whose budget, in which window, and of a user's charge the horizon of its block."""

    mechanism: Mechanism
    account: str
    window: int
    horizon: str | None = None


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
    users = {row.stream for row, policy in zip(rows, policies, strict=True) if policy.unit == "user"}
    of_users = {stream: _entries_of_users(db, stream) for stream in sorted(users)}
    of_blocks = facts.entries(db, [r.seq for r, policy in zip(rows, policies, strict=True) if policy.unit == "record"])
    # A sum is what one block paid from one account, or what all users of a stream paid: (orders, charges).
    sums: list[tuple[tuple[int, ...], list[Mechanism]]] = []
    shared: dict[tuple[Any, ...], int] = {}
    places: list[list[int]] = []
    for row, policy in zip(rows, policies, strict=True):
        window, at = windows[row.stream, policy.horizon], []
        for account in ACCOUNTS:
            able = account == TRAIN or policy.holdout_evaluations > 0
            key = (row.stream, account, able, policy.horizon, policy.orders) if policy.unit == "user" else None
            if key is None or key not in shared:
                entries = of_users[row.stream] if policy.unit == "user" else of_blocks[row.seq]
                sums.append((policy.orders, _counted(entries, account, policy.horizon, window) if able else []))
                if key is not None:
                    shared[key] = len(sums) - 1
            at.append(len(sums) - 1 if key is None else shared[key])
        places.append(at)
    spent = _added(sums)
    return {
        row.block_id: Account(row.block_id, row.stream, policy, *(spent[place] for place in at))
        for row, policy, at in zip(rows, policies, places, strict=True)
    }


def _counted(entries: Sequence[_Entry], account: str, horizon: str, window: int) -> list[Mechanism]:
    """What counts in a window. A user's charge under another horizon always does: it may fall into any window."""
    return [
        mechanism
        for mechanism, whose, when, other in entries
        if whose == account and (when == window or other not in {None, horizon})
    ]


def _added(sums: Sequence[tuple[tuple[int, ...], Sequence[Mechanism]]]) -> dict[int, tuple[float, ...]]:
    """Sums of prices, each in the order of its charges, by place in the list."""
    found: dict[int, tuple[float, ...]] = {}
    for orders in {orders for orders, _ in sums}:
        mine = [at for at, (grid, _) in enumerate(sums) if grid == orders]
        numbers: dict[Mechanism, int] = {}
        which = [numbers.setdefault(mechanism, len(numbers)) for at in mine for mechanism in sums[at][1]]
        owner = np.repeat(np.arange(len(mine)), [len(sums[at][1]) for at in mine])
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
    found: list[Any] = []
    for part in tables.in_parts(names):
        query = sa.select(columns.seq, columns.block_id, columns.stream, columns.policy)
        found += db.execute(query.where(columns.block_id.in_(part)).order_by(columns.seq)).all()
    return found


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
        self._rows: set[int] = set()
        self._entries: dict[tuple[int, int], _Entry] = {}  # by row and number of a mechanism
        self._released: set[int] = set()

    def entries(self, db: sa.Connection, blocks: Sequence[int]) -> dict[int, list[_Entry]]:
        """What each block paid, in the order of the rows, without what cancelled attempts gave back."""
        found: dict[int, list[_Entry]] = {block: [] for block in blocks}
        with self._lock:
            self._catch_up(db)
            for part in tables.in_parts(blocks):
                packed = list(tables.charges_by_block(db, part))
                self._learn(db, sorted({seq for _, rows, _ in packed for seq in rows} - self._rows))
                for block, rows, numbers in packed:
                    charges: Iterable[tuple[int, int]] = zip(rows, numbers, strict=True)
                    if not self._released.isdisjoint(rows):
                        charges = [charge for charge in charges if charge[0] not in self._released]
                    found[block] = list(map(self._entries.__getitem__, charges))
        return found

    def _catch_up(self, db: sa.Connection) -> None:
        ledger = tables.ledger.c
        if self._newest is not None:
            seq, known = self._newest
            if db.execute(sa.select(ledger.hash).where(ledger.seq == seq)).scalar() != known:
                self._forget()
        columns = (ledger.seq, ledger.hash, ledger.round_id, ledger.attempt, ledger.state)
        if self._newest is None:
            later = db.execute(sa.select(*columns).order_by(ledger.seq.desc()).limit(1)).all()
        else:
            later = db.execute(sa.select(*columns).where(ledger.seq > self._newest[0]).order_by(ledger.seq)).all()
            for _, _, round_id, attempt, state in later:
                if state == "cancelled":
                    mine = sa.and_(ledger.round_id == round_id, ledger.attempt == attempt)
                    self._released.update(db.execute(sa.select(ledger.seq).where(mine)).scalars())
        if later:
            self._newest = (later[-1].seq, later[-1].hash)

    def _learn(self, db: sa.Connection, rows: Sequence[int]) -> None:
        ledger, mechanisms = tables.ledger.c, tables.mechanisms.c
        for part in tables.in_parts(rows):
            query = sa.select(ledger.seq, ledger.account, ledger.window).where(ledger.seq.in_(part))
            known = {seq: (account, window) for seq, account, window in db.execute(query).all()}
            released = sa.select(ledger.seq).where(ledger.seq.in_(part), _released())
            self._released.update(db.execute(released).scalars())
            kinds = sa.select(mechanisms.seq, mechanisms.number, mechanisms.q, mechanisms.sigma, mechanisms.steps)
            for seq, number, q, sigma, steps in db.execute(kinds.where(mechanisms.seq.in_(part))).all():
                self._entries[seq, number] = _Entry((q, sigma, steps), *known[seq])
            self._rows.update(known)


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
