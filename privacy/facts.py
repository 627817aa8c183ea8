"""What the ledger's rows say about charges and users, remembered from one question to the next.

Rows are added and never changed, so what was read of one holds. It holds for a chain that still has the newest row that
is known, by number and hash: the rows before are then the same, and only those after it can have cancelled something.
Else, as when a backup was restored, all is forgotten.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import numpy as np
import sqlalchemy as sa

from privacy import accounting, tables
from privacy.accounting import Indices, Mechanism, Vector
from privacy.errors import LedgerBroken
from privacy.policy import ACCOUNTS, Policy


@lru_cache(maxsize=65_536)
def policy_of(text: str) -> Policy:
    """The policy of a block from its canonical JSON.

    Raises:
        PolicyError: it is not whole.
    """
    return Policy.from_frozen(json.loads(text))


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


class Entry(NamedTuple):
    """One charge of a stream's users: its mechanism, whose budget, in which window, and the horizon of its block."""

    mechanism: Mechanism
    account: str
    window: int
    horizon: str


class Users(NamedTuple):
    """The users of a stream.

    Attributes:
        entries: what they paid, once a round, in the order of the rows.
        blocks: ids of the blocks they may be in, by policy.
    """

    entries: tuple[Entry, ...]
    blocks: Mapping[Policy, Sequence[str]]


class _Purse:
    """What is known of a stream's users, up to a row and a block."""

    def __init__(self) -> None:
        self.row = 0
        self.entries: dict[int, Entry] = {}  # by row, ascending
        self.newest: tuple[int, str] | None = None  # number and hash of a block
        self.blocks: dict[str, list[str]] = {}  # by the text of their policy


class Facts:
    """Of one database, for any number of threads."""

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
        self._purses: dict[str, _Purse] = {}

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

    def users(self, db: sa.Connection, stream: str) -> Users:
        """A stream's users: what they paid, without what cancelled attempts gave back, and their blocks."""
        with self._lock:
            self._catch_up(db)
            purse = self._purses.setdefault(stream, _Purse())
            self._meet(db, stream, purse)
            if self._newest is not None and purse.row < self._newest[0]:
                purse.entries.update(self._entries(db, stream, purse.row))
                purse.row = self._newest[0]
            blocks: dict[Policy, list[str]] = {}
            for text, names in purse.blocks.items():  # texts also tell how many offsets a block spans
                blocks.setdefault(policy_of(text), []).extend(names)
            return Users(tuple(purse.entries.values()), blocks)

    @staticmethod
    def _meet(db: sa.Connection, stream: str, purse: _Purse) -> None:
        """Add the blocks under unit `user` that became known since."""
        columns = tables.blocks.c
        query = sa.select(columns.seq, columns.hash, columns.block_id, columns.policy).where(columns.stream == stream)
        seq, known = purse.newest or (0, "")
        found = db.execute(query.where(columns.seq >= seq).order_by(columns.seq)).all()
        if known and not (found and found[0].hash == known):  # another chain: a backup, restored
            purse.blocks = {}
            found = db.execute(query.order_by(columns.seq)).all()
        elif known:
            found = found[1:]
        for row in found:
            policy = policy_of(row.policy)
            if policy.unit == "user" and policy.enabled:  # of a block without a promise nobody pays
                purse.blocks.setdefault(row.policy, []).append(row.block_id)
            purse.newest = (row.seq, row.hash)

    @staticmethod
    def _entries(db: sa.Connection, stream: str, after: int) -> dict[int, Entry]:
        """What users paid in the rows after one, by row.

        The blocks of a round have one mechanism, which a user pays once: the first charge stands for all.
        """
        mechanisms, charges, ledger, blocks = (
            table.c for table in (tables.mechanisms, tables.charges, tables.ledger, tables.blocks)
        )
        what = (mechanisms.q, mechanisms.sigma, mechanisms.steps, ledger.account, ledger.window, blocks.policy)
        query = (
            sa.select(ledger.seq, *what)
            .join_from(tables.ledger, tables.charges, sa.and_(charges.seq == ledger.seq, charges.position == 0))
            .join(tables.mechanisms, sa.and_(mechanisms.seq == charges.seq, mechanisms.number == charges.number))
            .join(tables.blocks, blocks.seq == charges.block)
            .where(ledger.stream == stream, ledger.seq > after, ~_released())
            .order_by(ledger.seq)
        )
        return {
            seq: Entry((q, sigma, steps), account, window, policy_of(policy).horizon)
            for seq, q, sigma, steps, account, window, policy in db.execute(query).all()
            if policy_of(policy).unit == "user"
        }

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
                        for purse in self._purses.values():
                            for row in rows.tolist():
                                purse.entries.pop(row, None)
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


def _released() -> sa.Exists:
    """Whether the attempt of a ledger's row was cancelled."""
    cancelled = sa.alias(tables.ledger)
    return sa.exists().where(
        cancelled.c.round_id == tables.ledger.c.round_id,
        cancelled.c.attempt == tables.ledger.c.attempt,
        cancelled.c.state == "cancelled",
    )
