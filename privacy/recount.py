"""What the blocks of unit `record` have spent, added up row by row over the columns of a verified ledger.

A path of its own: it shares the price of a mechanism with the filter, and nothing of how charges are found and summed.
Large ledgers are why it works on columns; `privacy.audit.recompute` is the same sum written out, and the tests compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from privacy import accounting
from privacy.accounting import Indices, Vector
from privacy.chain import History, LedgerRow
from privacy.errors import LedgerBroken
from privacy.policy import ACCOUNTS, HOLDOUT, TRAIN, Policy

_Flags = NDArray[np.bool_]


class Spending(NamedTuple):
    """What one block paid from one account.

    Attributes:
        total: over all windows, at each order of its grid, nats.
        newest: in the newest window that was charged.
        fixed: epsilon at the sealed delta, had the schedule been fixed in advance.
        share_used: of the filter, in the window that used most; 0 where there is no account.
        test: whether a round with test noise is among them.
        rounds: oldest first, with `.2` for a second attempt.
    """

    total: tuple[float, ...]
    newest: tuple[float, ...]
    fixed: float
    share_used: float
    test: bool
    rounds: tuple[str, ...]


def recount(history: History, stream: str, policies: Mapping[str, Policy]) -> dict[str, dict[str, Spending]]:
    """Spending by account and block id.

    Args:
        history: the whole ledger.
        stream: whose rows are walked.
        policies: the stream's blocks of unit `record`; their policies.

    Raises:
        LedgerBroken: a row charges a block of another stream, or an account that there is not.
    """
    books = _Books(history, stream, policies)
    return {account: books.spending(account) for account in ACCOUNTS}


class _Books:
    def __init__(self, history: History, stream: str, policies: Mapping[str, Policy]) -> None:
        self._history, self._policies = history, policies
        self._members = [at for at, row in enumerate(history.blocks) if row.block_id in policies]
        self._names = [history.blocks[at].block_id for at in self._members]
        self._slot = np.full(len(history.blocks) + 1, -1, np.int64)
        self._slot[self._members] = np.arange(len(self._members))
        released = history.released()
        charged = np.flatnonzero(np.diff(history.first)).tolist()
        mine = [(at, history.rows[at]) for at in charged if history.rows[at].stream == stream]
        self._rows = [(at, row) for at, row in mine if (row.round_id, row.attempt) not in released]
        strangers = np.array([row.stream != stream for row in history.blocks], bool)
        without = np.array([name in policies and not policies[name].holdout_evaluations for name in self._names], bool)
        # Nearly always nothing is wrong anywhere, and then no row need be looked at by itself.
        suspect = strangers | np.isin(np.arange(len(history.blocks)), np.array(self._members, np.int64)[without])
        hits = np.concatenate([[0], np.cumsum(suspect[history.block])])
        for at, row in self._rows:
            first, last = history.first[at], history.first[at + 1]
            if hits[first] < hits[last] or row.account not in ACCOUNTS:
                self._check(row, history.block[first:last], strangers, without)

    def _check(self, row: LedgerRow, blocks: Indices, strangers: _Flags, without: _Flags) -> None:
        if row.account not in ACCOUNTS:
            raise LedgerBroken(f"ledger row {row.seq}: account={row.account}: must be {TRAIN} or {HOLDOUT}")
        wrong = blocks[strangers[blocks]]
        if len(wrong):
            name = self._history.blocks[int(wrong[0])].block_id
            raise LedgerBroken(f"ledger row {row.seq}: charges {name}, not of stream {row.stream}")
        if row.account == HOLDOUT:
            slots = self._slot[blocks]
            slots = slots[slots >= 0]
            if without[slots].any():
                name = self._names[int(slots[without[slots]][0])]
                raise LedgerBroken(f"ledger row {row.seq}: reads the holdout of {name}, which has no account for it")

    def spending(self, account: str) -> dict[str, Spending]:
        """By block id."""
        rows = [(at, row) for at, row in self._rows if row.account == account]
        names, test = self._rounds(rows)
        found: dict[str, Spending] = {}
        grids: dict[tuple[int, ...], list[int]] = {}
        for place, name in enumerate(self._names):
            grids.setdefault(self._policies[name].orders, []).append(place)
        for orders, places in grids.items():
            mine = [self._names[place] for place in places]
            if not rows:
                zeros = (0.0,) * len(orders)
                found.update(dict.fromkeys(mine, Spending(zeros, zeros, 0.0, 0.0, test=False, rounds=())))
                continue
            slot = np.full(len(self._names) + 1, -1, np.int64)
            slot[places] = np.arange(len(places))
            prices = accounting.vectors(self._history.mechanisms, orders)
            bounds = self._of_policies(mine, lambda policy: policy.caps_of(account))
            total, newest, share = self._walk(rows, slot[self._slot], prices, bounds)
            on_top = self._of_policies(mine, lambda policy: accounting.conversions(policy.orders, policy.delta))
            fixed = np.maximum((total + on_top).min(axis=1), 0.0).tolist()
            sums = list(map(tuple, total.tolist()))
            ends = sums if newest is total else list(map(tuple, newest.tolist()))
            used = share.tolist()
            for at, (name, place) in enumerate(zip(mine, places, strict=True)):
                paid = fixed[at] if names[place] else 0.0
                found[name] = Spending(sums[at], ends[at], paid, used[at], test[place], names[place])
        return found

    def _of_policies(self, names: Sequence[str], value: Callable[[Policy], tuple[float, ...]]) -> Vector:
        """(len(names), K): a value of each block's policy, of which there are few."""
        known = {key: value(policy) for key, policy in {id(p): p for p in self._policies.values()}.items()}
        return np.array([known[id(self._policies[name])] for name in names])

    def _walk(
        self, rows: Sequence[tuple[int, LedgerRow]], slot: Indices, prices: Vector, bounds: Vector
    ) -> tuple[Vector, Vector, Vector]:
        """Row after row: total over all windows and total of the newest window, (B, K); share used in the fullest."""
        history, (blocks, orders) = self._history, bounds.shape
        total, current, fullest = np.zeros((blocks, orders)), np.zeros((blocks, orders)), np.zeros(blocks)
        latest = np.zeros(blocks, np.int64)
        windows = any(row.window for _, row in rows)
        for at, row in rows:
            part = slice(history.first[at], history.first[at + 1])
            slots, price = slot[history.block[part]], prices[history.mechanism[part]]
            if slots.min() < 0:  # blocks of another grid, or of users
                price, slots = price[slots >= 0], slots[slots >= 0]
            turned = slots[latest[slots] != row.window]
            if len(turned):
                fullest[turned] = np.maximum(fullest[turned], _shares(current[turned], bounds[turned]))
                current[turned], latest[turned] = 0.0, row.window
            _add(current, slots, price)
            if windows:
                _add(total, slots, price)
        share = np.maximum(fullest, _shares(current, bounds))
        return total if windows else current, current, share

    def _rounds(self, rows: Sequence[tuple[int, LedgerRow]]) -> tuple[list[tuple[str, ...]], list[bool]]:
        """Per block the rounds that charged it, and whether one of them had test noise."""
        history, blocks = self._history, len(self._names)
        names = np.array([r.round_id if r.attempt == 1 else f"{r.round_id}.{r.attempt}" for _, r in rows], object)
        parts = [np.arange(history.first[at], history.first[at + 1]) for at, _ in rows]
        which = np.repeat(np.arange(len(rows)), [len(part) for part in parts])
        slots = self._slot[history.block[np.concatenate([np.zeros(0, np.int64), *parts])]]
        which, slots = which[slots >= 0], slots[slots >= 0]
        noise = np.array([row.noise_source == "test" for _, row in rows], bool)
        order = np.argsort(slots, kind="stable")
        ends = np.cumsum(np.bincount(slots, minlength=blocks)).tolist()
        sorted_names = names[which[order]].tolist()
        test = np.bincount(slots, weights=noise[which], minlength=blocks) > 0
        starts = [0, *ends][:blocks]
        return [tuple(sorted_names[a:b]) for a, b in zip(starts, ends, strict=True)], test.tolist()


def _add(total: Vector, slots: Indices, price: Vector) -> None:
    if len(np.unique(slots)) == len(slots):
        total[slots] += price
    else:  # a row that names a block twice, which the ledger refuses to write
        np.add.at(total, slots, price)


def _shares(spent: Vector, bounds: Vector) -> Vector:
    """(B,) share of the filter used; 0 where no order is usable: there is no account."""
    usable = bounds > 0.0
    ratio = np.where(usable, spent / np.where(usable, bounds, 1.0), np.inf).min(axis=1)
    found: Vector = np.where(usable.any(axis=1), ratio, 0.0)
    return found
