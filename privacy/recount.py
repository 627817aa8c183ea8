"""What the blocks of unit `record` have spent, added up row by row over the columns of a verified ledger.

A path of its own: it shares the price of a mechanism with the filter, and nothing of how charges are found and summed.
Large ledgers are why it works on columns; `privacy.audit.recompute` is the same sum written out, and the tests compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from privacy import accounting
from privacy.accounting import Flags, Indices, Vector
from privacy.chain import History, LedgerRow
from privacy.errors import LedgerBroken
from privacy.policy import ACCOUNTS, HOLDOUT, TRAIN, Policy


class Spending(NamedTuple):
    """What one block paid from one account.

    Attributes:
        fixed: epsilon at the sealed delta, had the schedule been fixed in advance.
        share_used: of the filter, in the window that used most; 0 where there is no account.
        test: whether a round with test noise is among them.
        rounds: oldest first, with `.2` for a second attempt.
    """

    fixed: float
    share_used: float
    test: bool
    rounds: tuple[str, ...]


class Spent:
    """What the blocks of unit `record` paid from one account.

    Args:
        policies: of the blocks, by id.
    """

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self._policies = policies
        nothing = Spending(0.0, 0.0, test=False, rounds=())
        self.blocks: dict[str, Spending] = dict.fromkeys(policies, nothing)
        self._newest: dict[tuple[int, ...], tuple[dict[str, int], Vector]] = {}

    def put(self, orders: tuple[int, ...], names: Sequence[str], found: Iterable[Spending], newest: Vector) -> None:
        """Blocks of one grid: their spending, and at each order what was spent in the newest window charged, (B, K)."""
        self.blocks.update(zip(names, found, strict=True))
        self._newest[orders] = dict(zip(names, range(len(names)), strict=True)), newest

    def newest(self, name: str) -> tuple[float, ...]:
        """What a block spent in the newest window that was charged, at each order of its grid, nats."""
        orders = self._policies[name].orders
        if orders not in self._newest:
            return (0.0,) * len(orders)
        place, spent = self._newest[orders]
        return tuple(spent[place[name]].tolist())


def recount(history: History, stream: str, policies: Mapping[str, Policy]) -> dict[str, Spent]:
    """Spending by account.

    Args:
        history: the whole ledger.
        stream: whose rows are walked.
        policies: the stream's blocks of unit `record`; their policies.

    Raises:
        LedgerBroken: a row charges a block of another stream, or an account that there is not.
    """
    books = _Books(history, stream, policies)
    return {account: books.spent(account) for account in ACCOUNTS}


class _Charges(NamedTuple):
    """Charges sorted by block, (N,) each: the block's place, the row's, the mechanism's number, the window."""

    block: Indices
    row: Indices
    mechanism: Indices
    window: Indices


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
        self._open = np.array([not policies[name].enabled for name in self._names], bool)
        # Nearly always nothing is wrong anywhere, and then no row need be looked at by itself.
        odd = np.array(self._members, np.int64)[without | self._open]
        suspect = strangers | np.isin(np.arange(len(history.blocks)), odd)
        hits = np.concatenate([[0], np.cumsum(suspect[history.block])])
        for at, row in self._rows:
            first, last = history.first[at], history.first[at + 1]
            if hits[first] < hits[last] or row.account not in ACCOUNTS:
                self._check(row, history.block[first:last], strangers, without)

    def _check(self, row: LedgerRow, blocks: Indices, strangers: Flags, without: Flags) -> None:
        if row.account not in ACCOUNTS:
            raise LedgerBroken(f"ledger row {row.seq}: account={row.account}: must be {TRAIN} or {HOLDOUT}")
        wrong = blocks[strangers[blocks]]
        if len(wrong):
            name = self._history.blocks[int(wrong[0])].block_id
            raise LedgerBroken(f"ledger row {row.seq}: charges {name}, not of stream {row.stream}")
        slots = self._slot[blocks]
        slots = slots[slots >= 0]
        if self._open[slots].any():
            name = self._names[int(slots[self._open[slots]][0])]
            raise LedgerBroken(f"ledger row {row.seq}: charges {name}, which was sealed without privacy")
        if row.account == HOLDOUT and without[slots].any():
            name = self._names[int(slots[without[slots]][0])]
            raise LedgerBroken(f"ledger row {row.seq}: reads the holdout of {name}, which has no account for it")

    def spent(self, account: str) -> Spent:
        """What each block paid from an account."""
        found = Spent(self._policies)
        rows = [(at, row) for at, row in self._rows if row.account == account]
        if not rows:
            return found
        charges = self._charges(rows)
        rounds, test = self._rounds(rows, charges)
        grids: dict[tuple[int, ...], list[int]] = {}
        for place, name in enumerate(self._names):
            grids.setdefault(self._policies[name].orders, []).append(place)
        for orders, places in grids.items():
            names = [self._names[place] for place in places]
            bounds = self._of_policies(names, lambda policy: policy.caps_of(account))
            on_top = self._of_policies(names, lambda policy: accounting.conversions(policy.orders, policy.delta))
            prices = accounting.vectors(self._history.mechanisms, orders)
            total, newest, share = self._added(charges, places, prices, bounds)
            fixed = np.maximum((total + on_top).min(axis=1), 0.0)
            paid = [rounds[place] for place in places]
            fixed[[not one for one in paid]] = 0.0
            columns = (fixed.tolist(), share.tolist(), [test[place] for place in places], paid)
            found.put(orders, names, map(Spending, *columns), newest)
        return found

    def _of_policies(self, names: Sequence[str], value: Callable[[Policy], tuple[float, ...]]) -> Vector:
        """(len(names), K): a value of each block's policy, of which there are few."""
        policies = [self._policies[name] for name in names]
        kinds = {id(policy): policy for policy in policies}
        number = dict(zip(kinds, range(len(kinds)), strict=True))
        values = np.array([value(policy) for policy in kinds.values()])
        found: Vector = values[[number[id(policy)] for policy in policies]]
        return found

    def _charges(self, rows: Sequence[tuple[int, LedgerRow]]) -> _Charges:
        """The charges of some rows, sorted by block and window, oldest first."""
        history, counts = self._history, np.diff(self._history.first)
        chosen = np.zeros(len(counts), bool)
        chosen[[at for at, _ in rows]] = True
        at = np.flatnonzero(np.repeat(chosen, counts))
        row = np.repeat(np.arange(len(rows)), counts[chosen])
        window = np.array([row.window for _, row in rows], np.int64)
        block = self._slot[history.block[at]]
        order = np.lexsort((window[row], block)) if window.any() else _sorting(block)
        order = order[np.searchsorted(block, 0, sorter=order) :]  # blocks of users come first, as -1
        row = row[order]
        return _Charges(block[order], row, history.mechanism[at[order]], window[row])

    def _added(
        self, charges: _Charges, places: Sequence[int], prices: Vector, bounds: Vector
    ) -> tuple[Vector, Vector, Vector]:
        """Of some blocks: total over all windows and in the newest, (B, K); share used in the fullest, (B,)."""
        block, _, mechanism, window = charges
        if len(places) < len(self._names):
            slot = np.full(len(self._names), -1, np.int64)
            slot[places] = np.arange(len(places))
            mine = slot[block] >= 0
            block, mechanism, window = slot[block][mine], mechanism[mine], window[mine]
        total = _sums(block, mechanism, prices, len(places))
        if not window.any():
            return total, total, _shares(total, bounds)
        # A purse is what one block paid in one window.
        turns = np.append(True, (block[1:] != block[:-1]) | (window[1:] != window[:-1]))
        purse = np.cumsum(turns) - 1
        owner = block[turns]
        by_purse = _sums(purse, mechanism, prices, len(owner))
        newest, share = np.zeros_like(total), np.zeros(len(places))
        newest[owner] = by_purse  # of a block's purses the last one stays
        np.maximum.at(share, owner, _shares(by_purse, bounds[owner]))
        return total, newest, share

    def _rounds(
        self, rows: Sequence[tuple[int, LedgerRow]], charges: _Charges
    ) -> tuple[list[tuple[str, ...]], list[bool]]:
        """Per block the rounds that charged it, and whether one of them had test noise."""
        names = np.array([r.round_id if r.attempt == 1 else f"{r.round_id}.{r.attempt}" for _, r in rows], object)
        noise = np.array([row.noise_source == "test" for _, row in rows], bool)
        ends = np.searchsorted(charges.block, np.arange(1, len(self._names) + 1)).tolist()
        of_charges = names[charges.row].tolist()
        test = np.zeros(len(self._names), bool)
        test[charges.block[noise[charges.row]]] = True
        return [tuple(of_charges[a:b]) for a, b in zip([0, *ends], ends, strict=False)], test.tolist()


def _sorting(numbers: Indices) -> Indices:
    """What sorts numbers in [-1, 2^31), equal ones staying in their order: two digits in turn, which numpy counts."""
    high, low = np.divmod(numbers + 1, 1 << 16)
    order = np.argsort(low.astype(np.uint16), kind="stable")
    found: Indices = order[np.argsort(high.astype(np.uint16)[order], kind="stable")]
    return found


def _sums(owner: Indices, mechanism: Indices, prices: Vector, count: int) -> Vector:
    """(count, K): prices of each owner's charges, one after another: equal to what the filter adds up, to the bit."""
    columns = [np.bincount(owner, prices[:, order][mechanism], count) for order in range(prices.shape[1])]
    return np.stack(columns, axis=1)


def _shares(spent: Vector, bounds: Vector) -> Vector:
    """(B,) share of the filter used; 0 where no order is usable: there is no account."""
    usable = bounds > 0.0
    ratio = np.where(usable, spent / np.where(usable, bounds, 1.0), np.inf).min(axis=1)
    found: Vector = np.where(usable.any(axis=1), ratio, 0.0)
    return found
