"""What each block has paid, and whether it can pay more: the filter, read inside one transaction.

Unit `record`: a record is in exactly one block and pays what its block pays. Unit `user`: a user may be in every block
of the stream that was sealed under that unit, so each of those blocks pays for every round that uses any of them, once
a round, and each of them must be able to.

A block has two accounts, because the people in its holdout are never trained on: `train` and `holdout`. With windows
as its horizon, only charges of the same window count.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa

from privacy import accounting, tables
from privacy.accounting import Flags, Indices, Mechanism
from privacy.chain import Charge
from privacy.errors import LedgerError
from privacy.facts import Charges, Entry, Facts, policy_of
from privacy.policy import ACCOUNTS, HOLDOUT, NONE, TRAIN, Policy


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
    of_users = _spent_by_users(db, rows, policies, windows, facts)
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
    db: sa.Connection,
    rows: Sequence[Any],
    policies: Sequence[Policy],
    windows: Mapping[tuple[str, str], int],
    facts: Facts,
) -> dict[int, list[tuple[float, ...]]]:
    """What users of these blocks have spent from each account, by place in the list: one purse for all of a stream."""
    users = [at for at, policy in enumerate(policies) if policy.unit == "user"]
    entries = {stream: facts.users(db, stream).entries for stream in sorted({rows[at].stream for at in users})}
    purses: dict[tuple[Any, ...], tuple[float, ...]] = {}
    spent: dict[int, list[tuple[float, ...]]] = {}
    for at in users:
        stream, policy = rows[at].stream, policies[at]
        for account in ACCOUNTS:
            able = policy.enabled and (account == TRAIN or policy.holdout_evaluations > 0)
            key = (stream, account, able, policy.horizon, policy.orders)
            if key not in purses:
                paid = _counted_of_users(entries[stream], account, policy.horizon, windows[stream, policy.horizon])
                purses[key] = _added(paid if able else [], policy.orders)
            spent.setdefault(at, []).append(purses[key])
    return spent


def _counted_of_users(entries: Sequence[Entry], account: str, horizon: str, window: int) -> list[Mechanism]:
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


def require_open(db: sa.Connection, names: Sequence[str], now: float, facts: Facts, *, stream: str) -> None:
    """Insist that nothing was promised to anybody in these blocks: a round without privacy reads no others.

    Raises:
        LedgerError: a block is unknown, of another stream, or sealed with a promise; or users of the stream, who may
            be in any of its blocks, were promised something in another.
    """
    found = require(db, names, now, facts)
    strangers = [name for name, account in found.items() if account.stream != stream]
    promised = [name for name, account in found.items() if account.policy.enabled]
    if strangers or promised:
        why = "of another stream" if strangers else "sealed with a promise"
        raise LedgerError(
            f"block={', '.join(strangers or promised)}: {why}; a round without privacy must use only blocks of its "
            f"stream that were sealed with enabled=false"
        )
    if any(account.policy.unit == "user" for account in found.values()) and facts.users(db, stream).blocks:
        raise LedgerError(_USERS_ON_BOTH_SIDES.format(stream=stream))


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
        LedgerError: a block is unknown, not of `stream`, sealed without a promise, or has no such account, or the
            blocks cannot pay together.
    """
    if account not in ACCOUNTS:
        raise LedgerError(f"account={account}: must be {' or '.join(ACCOUNTS)}")
    asked = {charge.block_id: charge for charge in charges}
    accounts = require(db, list(asked), now, facts)
    _check_together(stream, asked, accounts)
    _check_account(account, accounts)
    some = next(iter(accounts.values()))
    window = present_window(db, some.stream, some.policy, now)
    alike: dict[str, Sequence[str]] = {}  # blocks of one policy whose users pay from one purse, by the first of them
    if some.policy.unit == "user":
        if db.execute(sa.select(tables.ledger.c.seq).where(*_without_privacy(some.stream)).limit(1)).scalar():
            raise LedgerError(_USERS_ON_BOTH_SIDES.format(stream=some.stream))
        blocks = facts.users(db, some.stream).blocks
        _check_sides(blocks)
        alike = {names[0]: names for policy, names in blocks.items() if account == TRAIN or policy.holdout_evaluations}
        asked = dict.fromkeys(alike, charges[0])
        accounts = require(db, list(alike), now, facts)
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
            found += [Shortfall(other, used, after - used) for other in alike.get(name, (name,))]
    return found, window


_USERS_ON_BOTH_SIDES = (
    "stream={stream}: unit user, and blocks with and without privacy: somebody may be in both, and one round without "
    "privacy would end the promise to them; must be one kind for all rounds of the stream; start a stream of its own"
)


def _without_privacy(stream: str) -> tuple[sa.ColumnElement[bool], ...]:
    return tables.ledger.c.stream == stream, tables.ledger.c.noise_source == NONE


def _check_together(stream: str | None, asked: Mapping[str, Charge], accounts: Mapping[str, Account]) -> None:
    streams = sorted({account.stream for account in accounts.values()} | ({stream} if stream else set()))
    if len(streams) > 1:
        raise LedgerError(f"stream={', '.join(streams)}: must be one for all blocks of a round")
    if unpromised := [name for name, account in accounts.items() if not account.policy.enabled]:
        raise LedgerError(
            f"block={', '.join(unpromised)}: sealed without privacy (enabled=false), so it has no account; must be "
            f"left out of rounds with privacy"
        )
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


def _check_sides(policies: Collection[Policy]) -> None:
    """A user's side follows from the holdout's share: where it changed, somebody would be on both."""
    shares = sorted({policy.holdout_share for policy in policies})
    if len(shares) > 1 and any(policy.holdout_evaluations for policy in policies):
        raise LedgerError(
            f"holdout_share={', '.join(map(str, shares))}: must be one for all blocks of unit user once there are "
            f"holdout accounts, or a user is trained on and held out; start a stream of its own"
        )


def _blocks(db: sa.Connection, names: Sequence[str]) -> list[Any]:
    columns = tables.blocks.c
    query = sa.select(columns.seq, columns.block_id, columns.stream, columns.policy).order_by(columns.seq)
    return list(db.execute(query.where(tables.among(db, columns.block_id, names))).all())
