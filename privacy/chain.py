"""The rows of the ledger as values, their hashes, and the two chains they form.

Blocks are chained in the order in which they became known; rounds are chained in the order of their steps, and every
step names the head of the blocks' chain at that moment. So the head of the rounds' chain, which a signed receipt
carries, fixes every charge and every policy it was judged by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import sqlalchemy as sa

from privacy import accounting, tables
from privacy.canonical import sha256_of
from privacy.errors import LedgerBroken, PrivacyError

State = Literal["reserved", "started", "committed", "cancelled"]
GENESIS = "0" * 64


@dataclass(frozen=True)
class Charge:
    """What one round does to every unit of one block: `steps` draws at rate `q` with noise multiplier `sigma`.

    Raises:
        PolicyError: q is not in [0, 1], sigma is not positive and finite, or steps is not a whole number >= 1.
    """

    block_id: str
    q: float
    sigma: float
    steps: int

    def __post_init__(self) -> None:
        accounting.check_mechanism(self.q, self.sigma, self.steps)
        object.__setattr__(self, "q", float(self.q))
        object.__setattr__(self, "sigma", float(self.sigma))


@dataclass(frozen=True)
class BlockRow:
    """A sealed block that became known; `policy` is the canonical JSON of its frozen policy."""

    seq: int
    block_id: str
    stream: str
    policy: str
    prev_hash: str
    hash: str = ""


@dataclass(frozen=True)
class LedgerRow:
    """One step of one attempt. Charges stand in the `reserved` row; the hash covers them and the row before."""

    seq: int
    stream: str
    round_id: str
    attempt: int
    state: State
    plan_hash: str
    noise_source: str
    adapter_sha256: str
    at: str
    charges: tuple[Charge, ...]
    blocks_head: str
    prev_hash: str
    hash: str = ""


def hash_of(row: BlockRow | LedgerRow) -> str:
    """SHA-256 over everything in the row but its hash."""
    body = asdict(row)
    del body["hash"]
    return sha256_of(body)


def verify(blocks: Sequence[BlockRow], rows: Sequence[LedgerRow]) -> None:
    """Recompute both chains.

    Raises:
        LedgerBroken: names the first row that does not match.
    """
    known = _verify_links(blocks, "block")
    _verify_links(rows, "ledger")
    names = {block.block_id: seq for seq, block in enumerate(blocks, start=1)}
    for row in rows:
        seen = known.get(row.blocks_head)
        if seen is None or any(names.get(charge.block_id, seen + 1) > seen for charge in row.charges):
            raise LedgerBroken(
                f"ledger row {row.seq} ({row.round_id}, {row.state}): charges blocks that were not known at its time"
            )


def _verify_links(rows: Sequence[BlockRow | LedgerRow], kind: str) -> dict[str, int]:
    """Position of each hash in a chain that holds."""
    before, seen = GENESIS, {GENESIS: 0}
    for expected, row in enumerate(rows, start=1):
        if row.seq != expected:
            raise LedgerBroken(f"{kind} row {expected}: is missing, the next one is {row.seq}")
        try:
            computed = hash_of(row)
        except PrivacyError:
            computed = "none"
        if row.prev_hash != before or computed != row.hash:
            name = f"{row.round_id}, {row.state}" if isinstance(row, LedgerRow) else row.block_id
            raise LedgerBroken(
                f"{kind} row {row.seq} ({name}): its hash does not match, it was changed; restore the newest backup"
            )
        before = row.hash
        seen[before] = expected
    return seen


def read_blocks(db: sa.Connection) -> list[BlockRow]:
    """All blocks, oldest first."""
    columns = [tables.blocks.c[name] for name in BlockRow.__dataclass_fields__]
    return [BlockRow(**row._asdict()) for row in db.execute(sa.select(*columns).order_by(tables.blocks.c.seq))]


def read_rows(db: sa.Connection, where: sa.ColumnElement[bool] | None = None) -> list[LedgerRow]:
    """The steps that match, or all, oldest first.

    Raises:
        LedgerBroken: a charge that nobody could have written.
    """
    query = sa.select(tables.ledger).order_by(tables.ledger.c.seq)
    beside = sa.select(tables.charges).order_by(tables.charges.c.seq, tables.charges.c.position)
    if where is not None:
        query = query.where(where)
        beside = beside.join(tables.ledger, tables.ledger.c.seq == tables.charges.c.seq).where(where)
    charged: dict[int, list[Charge]] = {}
    for entry in db.execute(beside):
        of_row = charged.setdefault(entry.seq, [])
        try:
            charge = Charge(entry.block_id, entry.q, entry.sigma, entry.steps)
        except PrivacyError as error:
            raise LedgerBroken(f"ledger row {entry.seq}: a charge was changed ({error})") from None
        if entry.position != len(of_row):
            raise LedgerBroken(f"ledger row {entry.seq}: charge {len(of_row)} is missing, the next is {entry.position}")
        of_row.append(charge)
    rows = [_row(row, tuple(charged.pop(row.seq, ()))) for row in db.execute(query)]
    if charged:
        raise LedgerBroken(f"ledger row {min(charged)}: is missing, though its charges are there")
    return rows


def _row(found: Any, charges: tuple[Charge, ...]) -> LedgerRow:
    return LedgerRow(**found._asdict(), charges=charges)
