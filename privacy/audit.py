"""What was spent on whose data, recomputed from the ledger's rows by a path of its own.

It shares with the ledger the formula of a step and the reading of rows, nothing else: it walks the rows, adds up, and
compares. `recompute` needs no database: an auditor's export is added up by it too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import SystemRandom
from typing import Any, NamedTuple

from privacy import accounting
from privacy.accounts import Account
from privacy.chain import Charge, History, LedgerRow, without_collection
from privacy.errors import LedgerBroken
from privacy.facts import policy_of
from privacy.ledger import Ledger
from privacy.policy import ACCOUNTS, HOLDOUT, NO_PRIVACY, NONE, TRAIN, Policy
from privacy.recount import Spending, recount

# Every block's spending is recomputed. What the filter itself reads costs a third of a millisecond a block: beyond so
# many blocks it is asked for the fullest, and for others that nobody can foresee.
COMPARED_MAX = 500


class _Entry(NamedTuple):
    """What one row took from an account of a block; `horizon` is that of the blocks it names."""

    row: LedgerRow
    charge: Charge
    horizon: str


# Oldest first.
_Paid = list[_Entry]


class BlockAudit(NamedTuple):
    """One block: its claim, what was used of its filter, by which rounds. `epsilon` None means infinity.

    Attributes:
        unit: `record` or `user`.
        share_used: of the filter of the people trained on, in its fullest window; 1 is full.
        rounds: those that people of this block may have been in, with `.2` for a second attempt.
        claim: the same in words.
        epsilon_if_fixed_in_advance: no claim over rounds chosen as they went; in nats, over all windows.
        span: over which rounds the claim holds: `for life`, `per window of 30 days`.
        holdout: what the people never trained on are promised, in words.
        holdout_share_used: of their filter.
        holdout_reads: the evaluations that paid from it.
        private: False: sealed without privacy, so nothing was ever promised.
    """

    block: str
    unit: str
    epsilon: float | None
    delta: float
    share_used: float
    rounds: tuple[str, ...]
    claim: str
    epsilon_if_fixed_in_advance: float | None
    span: str = "for life"
    holdout: str = ""
    holdout_share_used: float = 0.0
    holdout_reads: tuple[str, ...] = ()
    private: bool = True


@dataclass(frozen=True)
class AuditReport:
    """One stream: the guarantee of a unit is the maximum over the blocks it may be in.

    `rounds_without_privacy` trained on blocks without a promise; their rows charge nobody.
    """

    stream: str
    claim: str
    epsilon: float | None
    delta: float
    share_used_max: float
    blocks: tuple[BlockAudit, ...]
    rounds_without_privacy: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"blocks": [block._asdict() for block in self.blocks]}


def audit(ledger: Ledger, stream: str) -> AuditReport:
    """Verify both chains, then recompute every block's spending from the rows of one consistent view.

    Raises:
        LedgerBroken: a chain does not verify, or the recomputed spending is not what the filter works with.
    """
    found = _Recount(stream)
    with without_collection():
        view = ledger.snapshot(stream, found.take)
        found.compare(view.accounts)
        blocks = tuple(found.block(name) for name in sorted(found.policies))
        return _whole(stream, blocks, found.unprotected)


class _Recount:
    """A stream's spending from a verified history: unit `record` over its columns, unit `user` row by row."""

    def __init__(self, stream: str) -> None:
        self._stream = stream
        self.policies: dict[str, Policy] = {}
        self.unprotected: tuple[str, ...] = ()
        self._promised: dict[int, tuple[str, str, str, str]] = {}

    def take(self, history: History) -> list[str]:
        """Add everything up; returns the blocks whose filter is to be compared."""
        self.policies = {r.block_id: policy_of(r.policy) for r in history.blocks if r.stream == self._stream}
        self.unprotected = _unprotected([row for row in history.rows if row.stream == self._stream])
        users = {name: policy for name, policy in self.policies.items() if policy.unit == "user"}
        records = {name: policy for name, policy in self.policies.items() if policy.unit == "record"}
        self._of_records = recount(history, self._stream, records)
        rows = history.of_stream(self._stream, charging=users)
        released = history.released()
        self._of_users = _Books([r for r in rows if (r.round_id, r.attempt) not in released], users)
        if len(self.policies) <= COMPARED_MAX:
            return list(self.policies)
        trained = self._of_records[TRAIN].blocks
        fullest = sorted(records, key=lambda name: -trained[name].share_used)[: COMPARED_MAX // 2]
        return list({*fullest, *SystemRandom().sample(sorted(self.policies), COMPARED_MAX // 2)})

    def compare(self, accounts: Mapping[str, Account]) -> None:
        """Raise LedgerBroken where the filter works with another figure."""
        for name, account in sorted(accounts.items()):
            for side in ACCOUNTS:
                if account.spent_of(side) not in self._present(name, side):
                    raise LedgerBroken(
                        f"block={name}: recomputed spending of {side} differs from the filter's; do not train until it "
                        f"is found"
                    )

    def _present(self, name: str, side: str) -> list[tuple[float, ...]]:
        policy = self.policies[name]
        if policy.unit == "user":
            return self._of_users.present(name, side)
        newest = self._of_records[side].newest(name)
        return [newest, (0.0,) * len(policy.orders)] if policy.days else [newest]

    def block(self, name: str) -> BlockAudit:
        """One block's part of the report."""
        policy = self.policies[name]
        if policy.unit == "user":
            return _block(self._of_users, name)
        promises = self._promised.get(id(policy))
        if promises is None:  # the hash of a policy takes longer than all else that is done here
            promises = self._promised[id(policy)] = _promises(policy)
        return _block_of(
            name, policy, promises, self._of_records[TRAIN].blocks[name], self._of_records[HOLDOUT].blocks[name]
        )


def recompute(stream: str, rows: Sequence[LedgerRow], policies: Mapping[str, Policy]) -> AuditReport:
    """What a stream's rows add up to, block by block; the chains are not looked at.

    Args:
        stream: its name.
        rows: all of its rows, oldest first.
        policies: the frozen policy of each of its blocks.

    Raises:
        LedgerBroken: a row charges a block that is not among them, or an account that there is not.
    """
    books = _Books(rows, policies)
    return _whole(stream, tuple(_block(books, name) for name in sorted(policies)), _unprotected(rows))


class _Books:
    """Per block and account the rows it paid for: what its units may have taken part in.

    A user may be in any block sealed under unit `user`, hence in any round that used one of them: all those blocks pay
    from one purse. A block without a holdout account has nobody in it who may be read.
    """

    def __init__(self, rows: Sequence[LedgerRow], policies: Mapping[str, Policy]) -> None:
        self.policies = policies
        self._users: dict[str, _Paid] = {account: [] for account in ACCOUNTS}
        self._paid: dict[tuple[str, str], _Paid] = {}
        self._sums: dict[tuple[int, tuple[int, ...], str], dict[int, tuple[float, ...]]] = {}
        for name, policy in policies.items():
            for account in ACCOUNTS:
                held = account == TRAIN or policy.holdout_evaluations > 0
                able = policy.unit == "user" and policy.enabled and held
                self._paid[name, account] = self._users[account] if able else []
        released = {(row.round_id, row.attempt) for row in rows if row.state == "cancelled"}
        for row in rows:
            if row.charges and (row.round_id, row.attempt) not in released:
                self._take(row)

    def _take(self, row: LedgerRow) -> None:
        where, of_users = f"ledger row {row.seq}", set[tuple[float, float, int]]()
        if row.account not in ACCOUNTS:
            raise LedgerBroken(f"{where}: account={row.account}: must be {TRAIN} or {HOLDOUT}")
        for charge in row.charges:
            policy = self.policies.get(charge.block_id)
            if policy is None:
                raise LedgerBroken(f"{where}: charges {charge.block_id}, not of stream {row.stream}")
            if not policy.enabled:
                raise LedgerBroken(f"{where}: charges {charge.block_id}, which was sealed without privacy")
            if row.account == HOLDOUT and not policy.holdout_evaluations:
                raise LedgerBroken(f"{where}: reads the holdout of {charge.block_id}, which has no account for it")
            entry = _Entry(row, charge, policy.horizon)
            if policy.unit == "record":
                self._paid[charge.block_id, row.account].append(entry)
            elif not of_users:
                self._users[row.account].append(entry)
            if policy.unit == "user":
                of_users.add((charge.q, charge.sigma, charge.steps))
        if len(of_users) > 1:
            raise LedgerBroken(f"{where}: users pay {len(of_users)} prices in one round, must be one")

    def paid(self, name: str, account: str) -> _Paid:
        """What a block paid from an account, oldest first."""
        return self._paid[name, account]

    def total(self, name: str, account: str) -> tuple[float, ...]:
        """Over all windows, at each order of the block's grid, nats."""
        return _total(self._paid[name, account], self.policies[name].orders)

    def windows(self, name: str, account: str) -> dict[int, tuple[float, ...]]:
        """Total per window, oldest first; what users paid under another horizon falls into each of them."""
        paid, policy = self._paid[name, account], self.policies[name]
        key = (id(paid), policy.orders, policy.horizon)
        if key not in self._sums:
            numbers = sorted({entry.row.window for entry in paid if entry.horizon == policy.horizon})
            self._sums[key] = {
                number: _total(
                    [e for e in paid if e.row.window == number or e.horizon != policy.horizon], policy.orders
                )
                for number in numbers
            }
        return self._sums[key]

    def present(self, name: str, account: str) -> list[tuple[float, ...]]:
        """What may be spent in the present window: it is the newest that was charged, or one in which nothing was."""
        charged, policy = list(self.windows(name, account).values())[-1:], self.policies[name]
        if charged and not policy.days:
            return charged
        others = [entry for entry in self._paid[name, account] if entry.horizon != policy.horizon]
        return [*charged, _total(others, policy.orders)]

    def share_used(self, name: str, account: str) -> float:
        """Of the account's filter, in the window that used most; 0 where there is no account."""
        bounds = self.policies[name].caps_of(account)
        if not any(cap > 0.0 for cap in bounds):
            return 0.0
        totals = self.windows(name, account).values() or [self.total(name, account)]
        return max(accounting.share_used(total, bounds) for total in totals)


@lru_cache(maxsize=65_536)
def _price(q: float, sigma: float, steps: int, orders: tuple[int, ...]) -> tuple[float, ...]:
    return accounting.rdp(q, sigma, steps, orders)


def _total(paid: _Paid, orders: tuple[int, ...]) -> tuple[float, ...]:
    """Rényi divergence at each order, nats, added up in the order of the rows."""
    total = [0.0] * len(orders)
    for _, charge, _ in paid:
        rho = _price(charge.q, charge.sigma, charge.steps, orders)
        total = [t + r for t, r in zip(total, rho, strict=True)]
    return tuple(total)


def _names(paid: _Paid) -> tuple[str, ...]:
    return tuple(row.round_id if row.attempt == 1 else f"{row.round_id}.{row.attempt}" for row, _, _ in paid)


def _block(books: _Books, name: str) -> BlockAudit:
    policy = books.policies[name]
    sides = []
    for account in ACCOUNTS:
        paid = books.paid(name, account)
        test = any(entry.row.noise_source == "test" for entry in paid)
        total = books.total(name, account)
        fixed = accounting.epsilon_from_rdp(total, policy.orders, policy.delta)[0] if paid else 0.0
        sides.append(Spending(fixed, books.share_used(name, account), test, _names(paid)))
    return _block_of(name, policy, _promises(policy), *sides)


def _block_of(
    name: str, policy: Policy, promises: tuple[str, str, str, str], trained: Spending, held_out: Spending
) -> BlockAudit:
    return BlockAudit(
        block=name,
        unit=policy.unit,
        epsilon=None if trained.test or not policy.enabled else policy.epsilon,
        delta=policy.delta,
        share_used=trained.share_used,
        rounds=trained.rounds,
        claim=promises[trained.test],
        # Not a claim over adaptively chosen rounds; where the noise was a known seed it is none at all.
        epsilon_if_fixed_in_advance=None if trained.test or not policy.enabled else round(trained.fixed, 6),
        span=policy.span,
        holdout=promises[2 + held_out.test],
        holdout_share_used=held_out.share_used,
        holdout_reads=held_out.rounds,
        private=policy.enabled,
    )


@lru_cache(maxsize=1024)
def _promises(policy: Policy) -> tuple[str, str, str, str]:
    """The claim, the claim once test noise was used, and the same of the holdout."""
    return (
        _claim(policy, test=False),
        _claim(policy, test=True),
        policy.promise(HOLDOUT),
        f"epsilon infinity per {policy.unit}: read with test noise",
    )


def _claim(policy: Policy, *, test: bool) -> str:
    if not policy.enabled:
        return NO_PRIVACY
    if test:
        return f"epsilon infinity per {policy.unit}: trained with test noise"
    return f"({policy.epsilon:g}, {policy.delta:g})-DP per {policy.unit}, {policy.span}"


def _unprotected(rows: Sequence[LedgerRow]) -> tuple[str, ...]:
    """Rounds without privacy, oldest first. What they read they have read, whatever became of them."""
    started = (row for row in rows if row.noise_source == NONE and row.state == "started")
    return tuple(row.round_id if row.attempt == 1 else f"{row.round_id}.{row.attempt}" for row in started)


def _whole(stream: str, blocks: tuple[BlockAudit, ...], unprotected: tuple[str, ...]) -> AuditReport:
    if not blocks:
        return AuditReport(stream, "no block is sealed: nothing was spent", 0.0, 0.0, 0.0, ())
    unbounded = any(block.epsilon is None for block in blocks)
    return AuditReport(
        stream,
        claim="; ".join(_claim_of_kind(kind, blocks) for kind in sorted({_kind(block) for block in blocks})),
        epsilon=None if unbounded else max(block.epsilon or 0.0 for block in blocks),
        delta=max(block.delta for block in blocks),
        share_used_max=max(block.share_used for block in blocks),
        blocks=blocks,
        rounds_without_privacy=unprotected,
    )


def _kind(block: BlockAudit) -> tuple[str, str]:
    """What a claim is about: the unit, and over which rounds it holds."""
    return block.unit, block.span


def _claim_of_kind(kind: tuple[str, str], blocks: tuple[BlockAudit, ...]) -> str:
    mine = [block for block in blocks if _kind(block) == kind]
    over = f"(the maximum over {len(mine)} blocks)"
    if not mine[0].private:
        return f"{mine[0].claim} ({len(mine)} blocks)"
    unbounded = [block for block in mine if block.epsilon is None]
    if unbounded:
        return f"{unbounded[0].claim} {over}"
    epsilon, delta = max(block.epsilon or 0.0 for block in mine), max(block.delta for block in mine)
    return f"({epsilon:g}, {delta:g})-DP per {kind[0]}, {kind[1]} {over}"
