"""What was spent on whose data, recomputed from the ledger's rows by a path of its own.

It shares with the ledger the formula of a step and the reading of rows, nothing else: it walks the rows, adds up, and
compares.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from privacy import accounting
from privacy.errors import LedgerBroken
from privacy.ledger import Account, Charge, Ledger, LedgerRow, Snapshot
from privacy.policy import Policy


@dataclass(frozen=True)
class BlockAudit:
    """One block: its claim, what was used of its filter, by which rounds. `epsilon` None means infinity."""

    block: str
    unit: str
    epsilon: float | None
    delta: float
    share_used: float
    rounds: tuple[str, ...]
    claim: str
    epsilon_if_fixed_in_advance: float | None


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
    paid = _paid(view)
    return _whole(stream, tuple(_block(account, paid[name]) for name, account in sorted(view.accounts.items())))


def _paid(view: Snapshot) -> dict[str, list[tuple[LedgerRow, Charge]]]:
    """Per block the rounds it paid for, oldest first: what its units may have taken part in."""
    released = {(row.round_id, row.attempt) for row in view.rows if row.state == "cancelled"}
    # A user may be in any block sealed under unit `user`, hence in any round that used one of them.
    of_users = {name for name, account in view.accounts.items() if account.policy.unit == "user"}
    paid: dict[str, list[tuple[LedgerRow, Charge]]] = {name: [] for name in view.accounts}
    for row in view.rows:
        charged = {charge.block_id: charge for charge in row.charges}
        if not charged or (row.round_id, row.attempt) in released:
            continue
        if strangers := charged.keys() - paid.keys():
            raise LedgerBroken(
                f"ledger row {row.seq}: charges {', '.join(sorted(strangers))}, not of stream {row.stream}"
            )
        if not of_users.isdisjoint(charged):
            charged |= dict.fromkeys(of_users, row.charges[0])
        for name, charge in charged.items():
            paid[name].append((row, charge))
    return paid


def _block(account: Account, paid: list[tuple[LedgerRow, Charge]]) -> BlockAudit:
    policy = account.policy
    total = [0.0] * len(policy.orders)
    for _, charge in paid:
        rho = accounting.rdp(charge.q, charge.sigma, charge.steps, policy.orders)
        total = [t + r for t, r in zip(total, rho, strict=True)]
    if tuple(total) != account.spent:
        raise LedgerBroken(
            f"block={account.block_id}: recomputed spending differs from the filter's; do not train until it is found"
        )
    test = any(row.noise_source == "test" for row, _ in paid)
    fixed = accounting.epsilon_from_rdp(total, policy.orders, policy.delta)[0] if paid else 0.0
    return BlockAudit(
        block=account.block_id,
        unit=policy.unit,
        epsilon=None if test else policy.epsilon,
        delta=policy.delta,
        share_used=accounting.share_used(total, policy.caps),
        rounds=tuple(row.round_id if row.attempt == 1 else f"{row.round_id}.{row.attempt}" for row, _ in paid),
        claim=_claim(policy, test=test),
        # Not a claim over adaptively chosen rounds; where the noise was a known seed it is none at all.
        epsilon_if_fixed_in_advance=None if test else round(fixed, 6),
    )


def _claim(policy: Policy, *, test: bool) -> str:
    if test:
        return f"epsilon infinity per {policy.unit}: trained with test noise"
    return f"({policy.epsilon:g}, {policy.delta:g})-DP per {policy.unit}, for {policy.horizon}"


def _whole(stream: str, blocks: tuple[BlockAudit, ...]) -> AuditReport:
    if not blocks:
        return AuditReport(stream, "no block is sealed: nothing was spent", 0.0, 0.0, 0.0, ())
    unbounded = any(block.epsilon is None for block in blocks)
    return AuditReport(
        stream,
        claim="; ".join(_claim_of_unit(unit, blocks) for unit in sorted({block.unit for block in blocks})),
        epsilon=None if unbounded else max(block.epsilon or 0.0 for block in blocks),
        delta=max(block.delta for block in blocks),
        share_used_max=max(block.share_used for block in blocks),
        blocks=blocks,
    )


def _claim_of_unit(unit: str, blocks: tuple[BlockAudit, ...]) -> str:
    mine = [block for block in blocks if block.unit == unit]
    over = f"(the maximum over {len(mine)} blocks)"
    unbounded = [block for block in mine if block.epsilon is None]
    if unbounded:
        return f"{unbounded[0].claim} {over}"
    epsilon, delta = max(block.epsilon or 0.0 for block in mine), max(block.delta for block in mine)
    return f"({epsilon:g}, {delta:g})-DP per {unit}, for life {over}"
