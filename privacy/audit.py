"""What was spent on whose data, recomputed from the ledger's rows by a path of its own.

It shares with the ledger the formula of a step and the reading of rows, nothing else: it walks the rows, adds up, and
compares. `recompute` needs no database: an auditor's export is added up by it too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from privacy import accounting
from privacy.chain import Charge, LedgerRow
from privacy.errors import LedgerBroken
from privacy.ledger import Ledger
from privacy.policy import HOLDOUT, TRAIN, Policy


class _Entry(NamedTuple):
    """What one row took from an account of a block; `horizon` is that of the blocks it names."""

    row: LedgerRow
    charge: Charge
    horizon: str


# Oldest first.
_Paid = list[_Entry]


@dataclass(frozen=True)
class BlockAudit:
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


@dataclass(frozen=True)
class AuditReport:
    """One stream: the guarantee of a unit is the maximum over the blocks it may be in."""

    stream: str
    claim: str
    epsilon: float | None
    delta: float
    share_used_max: float
    blocks: tuple[BlockAudit, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def audit(ledger: Ledger, stream: str) -> AuditReport:
    """Verify both chains, then recompute every block's spending from the rows of one consistent view.

    Raises:
        LedgerBroken: a chain does not verify, or the recomputed spending is not what the filter works with.
    """
    ledger.verify_chain()
    view = ledger.snapshot(stream)
    policies = {name: account.policy for name, account in view.accounts.items()}
    paid = _paid(view.rows, policies)
    for name, account in sorted(view.accounts.items()):
        for side, spent in ((TRAIN, account.spent), (HOLDOUT, account.holdout_spent)):
            if spent not in _present(paid[name, side], account.policy):
                raise LedgerBroken(
                    f"block={name}: recomputed spending of {side} differs from the filter's; do not train until it is "
                    f"found"
                )
    return recompute(stream, view.rows, policies)


def recompute(stream: str, rows: Sequence[LedgerRow], policies: Mapping[str, Policy]) -> AuditReport:
    """What a stream's rows add up to, block by block; the chains are not looked at.

    Args:
        stream: its name.
        rows: all of its rows, oldest first.
        policies: the frozen policy of each of its blocks.

    Raises:
        LedgerBroken: a row charges a block that is not among them, or an account that there is not.
    """
    paid = _paid(rows, policies)
    blocks = (_block(name, policy, paid[name, TRAIN], paid[name, HOLDOUT]) for name, policy in sorted(policies.items()))
    return _whole(stream, tuple(blocks))


def _paid(rows: Sequence[LedgerRow], policies: Mapping[str, Policy]) -> dict[tuple[str, str], _Paid]:
    """Per block and account the rows it paid for, oldest first: what its units may have taken part in."""
    released = {(row.round_id, row.attempt) for row in rows if row.state == "cancelled"}
    # A user may be in any block sealed under unit `user`, hence in any round that used one of them.
    of_users = {name for name, policy in policies.items() if policy.unit == "user"}
    paid: dict[tuple[str, str], _Paid] = {(name, account): [] for name in policies for account in (TRAIN, HOLDOUT)}
    for row in rows:
        charged = {charge.block_id: charge for charge in row.charges}
        if not charged or (row.round_id, row.attempt) in released:
            continue
        if strangers := charged.keys() - policies.keys():
            raise LedgerBroken(
                f"ledger row {row.seq}: charges {', '.join(sorted(strangers))}, not of stream {row.stream}"
            )
        horizon = policies[row.charges[0].block_id].horizon
        if not of_users.isdisjoint(charged):
            # A block without a holdout account has nobody in it who may be read.
            able = of_users if row.account == TRAIN else {n for n in of_users if policies[n].holdout_evaluations}
            charged |= dict.fromkeys(able, row.charges[0])
        for name, charge in charged.items():
            if (name, row.account) not in paid:
                raise LedgerBroken(f"ledger row {row.seq}: account={row.account}: must be {TRAIN} or {HOLDOUT}")
            paid[name, row.account].append(_Entry(row, charge, horizon))
    return paid


@lru_cache(maxsize=65_536)
def _price(charge: tuple[float, float, int], orders: tuple[int, ...]) -> tuple[float, ...]:
    return accounting.rdp(*charge, orders)


def _total(paid: _Paid, policy: Policy) -> tuple[float, ...]:
    """Rényi divergence at each order, nats, added up in the order of the rows."""
    total = [0.0] * len(policy.orders)
    for _, charge, _ in paid:
        rho = _price((charge.q, charge.sigma, charge.steps), policy.orders)
        total = [t + r for t, r in zip(total, rho, strict=True)]
    return tuple(total)


def _windows(paid: _Paid, policy: Policy) -> dict[int, tuple[float, ...]]:
    """Total per window, in their order; what users paid under another horizon falls into each of them."""
    numbers = sorted({entry.row.window for entry in paid if entry.horizon == policy.horizon})
    return {
        number: _total([e for e in paid if e.row.window == number or e.horizon != policy.horizon], policy)
        for number in numbers
    }


def _present(paid: _Paid, policy: Policy) -> list[tuple[float, ...]]:
    """What may be spent in the present window: it is the newest that was charged, or one in which nothing was yet."""
    charged = list(_windows(paid, policy).values())[-1:]
    if charged and not policy.days:
        return charged
    return [*charged, _total([entry for entry in paid if entry.horizon != policy.horizon], policy)]


def _share_used(paid: _Paid, policy: Policy, account: str) -> float:
    """Of the account's filter, in the window that used most; infinity where there is no account to pay from."""
    bounds = policy.caps_of(account)
    if not any(cap > 0.0 for cap in bounds):
        return math.inf if paid else 0.0
    totals = _windows(paid, policy).values() or [_total(paid, policy)]
    return max(accounting.share_used(total, bounds) for total in totals)


def _names(paid: _Paid) -> tuple[str, ...]:
    return tuple(row.round_id if row.attempt == 1 else f"{row.round_id}.{row.attempt}" for row, _, _ in paid)


def _block(name: str, policy: Policy, trained: _Paid, held_out: _Paid) -> BlockAudit:
    test = any(row.noise_source == "test" for row, _, _ in trained)
    total = _total(trained, policy)
    fixed = accounting.epsilon_from_rdp(total, policy.orders, policy.delta)[0] if trained else 0.0
    unbounded = any(row.noise_source == "test" for row, _, _ in held_out)
    return BlockAudit(
        block=name,
        unit=policy.unit,
        epsilon=None if test else policy.epsilon,
        delta=policy.delta,
        share_used=_share_used(trained, policy, TRAIN),
        rounds=_names(trained),
        claim=_claim(policy, test=test),
        # Not a claim over adaptively chosen rounds; where the noise was a known seed it is none at all.
        epsilon_if_fixed_in_advance=None if test else round(fixed, 6),
        span=policy.span,
        holdout=f"epsilon infinity per {policy.unit}: read with test noise" if unbounded else policy.promise(HOLDOUT),
        holdout_share_used=_share_used(held_out, policy, HOLDOUT),
        holdout_reads=_names(held_out),
    )


def _claim(policy: Policy, *, test: bool) -> str:
    if test:
        return f"epsilon infinity per {policy.unit}: trained with test noise"
    return f"({policy.epsilon:g}, {policy.delta:g})-DP per {policy.unit}, {policy.span}"


def _whole(stream: str, blocks: tuple[BlockAudit, ...]) -> AuditReport:
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
    )


def _kind(block: BlockAudit) -> tuple[str, str]:
    """What a claim is about: the unit, and over which rounds it holds."""
    return block.unit, block.span


def _claim_of_kind(kind: tuple[str, str], blocks: tuple[BlockAudit, ...]) -> str:
    mine = [block for block in blocks if _kind(block) == kind]
    over = f"(the maximum over {len(mine)} blocks)"
    unbounded = [block for block in mine if block.epsilon is None]
    if unbounded:
        return f"{unbounded[0].claim} {over}"
    epsilon, delta = max(block.epsilon or 0.0 for block in mine), max(block.delta for block in mine)
    return f"({epsilon:g}, {delta:g})-DP per {kind[0]}, {kind[1]} {over}"
