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

# What a physical batch costs besides its tokens, in tokens: the weights of the model go through the caches once more.
BATCH_TOKENS = 32


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

    Of all ways to cut the draw, sorted by length, the one with the fewest padded tokens, counting BATCH_TOKENS for
    each batch. A unit that is larger than the bounds stands alone in its batch, whole: its gradient is clipped once.
    """
    longest = {u: max(lengths[i] for i in units[u].examples) for u in drawn}
    order = sorted(drawn, key=lambda u: (longest[u], u))
    cheapest, begins = [0], [0]  # of the first n units: their tokens, and where the last batch begins
    for stop in range(1, len(order) + 1):
        length, rows, best = longest[order[stop - 1]], 0, -1
        begin = stop - 1
        for first in range(stop - 1, -1, -1):
            rows += len(units[order[first]].examples)
            if first < stop - 1 and (rows > rows_max or rows * length > tokens_max):
                break
            tokens = cheapest[first] + rows * length + BATCH_TOKENS
            if best < 0 or tokens < best:
                best, begin = tokens, first
        cheapest.append(best)
        begins.append(begin)
    batches: list[PhysicalBatch] = []
    stop = len(order)
    while stop:
        batches.append(_batch(order[begins[stop] : stop], units))
        stop = begins[stop]
    return batches[::-1]


def _batch(current: Sequence[int], units: Sequence[Unit]) -> PhysicalBatch:
    pairs = [(example, owner) for owner, index in enumerate(current) for example in units[index].examples]
    return PhysicalBatch(
        examples=tuple(example for example, _ in pairs),
        owners=tuple(owner for _, owner in pairs),
        units=tuple(current),
    )
