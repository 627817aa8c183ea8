"""Poisson sampling of privacy units, and the split of a draw into physical batches.

Every unit is drawn independently with its block's rate (Mironov, Talwar, Zhang 2019 assume exactly this). The draw
comes first and is never truncated or topped up; how it is then cut into batches of like length only changes speed.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ingest.record import Record
    from learner.plan import BlockRate
    from privacy.randomness import KeyedStream


@dataclass(frozen=True)
class Unit:
    """What is drawn, clipped and protected as one: a record's deliveries, or all of a user's records in the round."""

    q: float
    examples: tuple[int, ...]  # indices into the round's records


@dataclass(frozen=True)
class PhysicalBatch:
    """Units whose gradients are computed in one pass over the buffer: the examples, and each one's unit."""

    examples: tuple[int, ...]  # (B,)
    owners: tuple[int, ...]  # (B,), ascending, index of the example's unit within this batch
    units: tuple[int, ...]  # (U,), index of each unit in the round


def gather(
    blocks: Sequence[BlockRate], records: Mapping[str, Sequence[Record]], unit: str
) -> tuple[list[Record], list[Unit]]:
    """The round's records in a fixed order, and their units.

    Unit `record`: one unit per (user_id, event_id); a redelivery in a later block belongs to no unit there, so that
    nobody takes part through two blocks. Unit `user`: one unit per user over all blocks, which share one rate.
    """
    gathered: list[Record] = []
    members: dict[Hashable, list[int]] = {}
    rates: dict[Hashable, tuple[float, str]] = {}
    for block in blocks:
        for record in records[block.id]:
            name: Hashable = record.user_id if unit == "user" else (record.user_id, record.event_id)
            q, first_block = rates.setdefault(name, (block.q, block.id))
            if unit == "record" and first_block != block.id:
                continue
            rates[name] = (q, first_block)
            members.setdefault(name, []).append(len(gathered))
            gathered.append(record)
    return gathered, [Unit(rates[name][0], tuple(indices)) for name, indices in members.items()]


def draw(units: Sequence[Unit], stream: KeyedStream) -> list[int]:
    """Indices of the units drawn in one step. May be empty; the step is then taken all the same."""
    if not units:
        return []
    rates = np.array([unit.q for unit in units])
    return [int(i) for i in np.flatnonzero(stream.uniforms(len(units)) < rates)]


def split(
    drawn: Sequence[int], units: Sequence[Unit], lengths: Sequence[int], *, tokens_max: int, rows_max: int
) -> list[PhysicalBatch]:
    """Cut a draw into batches of units of like length, each at most `tokens_max` padded tokens and `rows_max` examples.

    A unit that is larger than that stands alone in its batch, whole: its gradient is clipped once.
    """
    by_length = sorted(drawn, key=lambda u: (max(lengths[i] for i in units[u].examples), u))
    batches: list[PhysicalBatch] = []
    current: list[int] = []
    rows = longest = 0
    for index in by_length:
        size = len(units[index].examples)
        length = max(lengths[i] for i in units[index].examples)
        if current and (rows + size > rows_max or (rows + size) * max(longest, length) > tokens_max):
            batches.append(_batch(current, units))
            current, rows, longest = [], 0, 0
        current.append(index)
        rows, longest = rows + size, max(longest, length)
    if current:
        batches.append(_batch(current, units))
    return batches


def _batch(current: Sequence[int], units: Sequence[Unit]) -> PhysicalBatch:
    pairs = [(example, owner) for owner, index in enumerate(current) for example in units[index].examples]
    return PhysicalBatch(
        examples=tuple(example for example, _ in pairs),
        owners=tuple(owner for _, owner in pairs),
        units=tuple(current),
    )
