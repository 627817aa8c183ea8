"""What was spent on whose data, recomputed from the ledger's rows by a path of its own.

It shares the formula of a step with the ledger and nothing else: it walks the rows, adds up, and compares.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from privacy import accounting
from privacy.errors import LedgerBroken
from privacy.ledger import Ledger, LedgerRow
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
    epsilon_if_fixed_in_advance: float


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
    """Verify the chain, then recompute every block's spending from the rows.

    Raises:
        LedgerBroken: the chain does not verify, or the recomputed spending is not what the filter works with.
    """
    ledger.verify_chain()
    rows = ledger.rows(stream)
    released = {(r.round_id, r.attempt) for r in rows if r.state == "cancelled"}
    paid = [r for r in rows if r.charges and (r.round_id, r.attempt) not in released]
    blocks = tuple(_block(ledger, name, paid) for name in ledger.blocks(stream))
    return _whole(stream, blocks)


def _block(ledger: Ledger, name: str, paid: list[LedgerRow]) -> BlockAudit:
    policy = ledger.policy(name)
    total = [0.0] * len(policy.orders)
    rounds, test = [], False
    for row in paid:
        for charge in row.charges:
            if charge.block_id == name:
                rho = accounting.rdp(charge.q, charge.sigma, charge.steps, policy.orders)
                total = [t + r for t, r in zip(total, rho, strict=True)]
                rounds.append(row.round_id if row.attempt == 1 else f"{row.round_id}.{row.attempt}")
                test = test or row.noise_source == "test"
    if tuple(total) != ledger.spent(name):
        raise LedgerBroken(
            f"block={name}: recomputed spending differs from the filter's; do not train until it is found"
        )
    share = accounting.share_used(total, policy.caps)
    fixed = accounting.epsilon_from_rdp(total, policy.orders, policy.delta)[0] if rounds else 0.0
    epsilon = None if test else policy.epsilon
    return BlockAudit(
        name,
        policy.unit,
        epsilon,
        policy.delta,
        share,
        tuple(rounds),
        _claim(policy, test=test),
        round(fixed, 6),
    )


def _claim(policy: Policy, *, test: bool) -> str:
    if test:
        return f"epsilon infinity per {policy.unit}: trained with test noise"
    return f"({policy.epsilon:g}, {policy.delta:g})-DP per {policy.unit}, for {policy.horizon}"


def _whole(stream: str, blocks: tuple[BlockAudit, ...]) -> AuditReport:
    if not blocks:
        return AuditReport(stream, "no block is sealed: nothing was spent", 0.0, 0.0, 0.0, ())
    unbounded = [b for b in blocks if b.epsilon is None]
    worst = max(blocks, key=lambda b: (b.epsilon or 0.0, b.delta))
    epsilon = None if unbounded else worst.epsilon
    delta = max(b.delta for b in blocks)
    claim = (unbounded[0] if unbounded else worst).claim + f" (the maximum over {len(blocks)} blocks)"
    return AuditReport(stream, claim, epsilon, delta, max(b.share_used for b in blocks), blocks)
