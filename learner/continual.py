"""How a round keeps what the live adapter knows: arithmetic on values that are private already, so it costs nothing.

Four ways, compared on one stream by `bench/continual.py` (docs/tuning.md has the figures):

- sequential: the round trains on from the live adapter, on the new blocks alone;
- replay: old blocks take part at a lower rate, which their ledger pays for (learner/plan.py; nothing here);
- orthogonal: the round trains a group of ranks of its own, orthogonal to those that earlier rounds trained;
- average: the round's adapter is averaged with the live one.

Orthogonal is O-LoRA (Wang et al. 2023) in one adapter of fixed rank. B A is the sum over ranks of b_k a_k; the ranks
are divided into groups, and a round trains one: the group whose B is smallest, which is an unused one (B zero) while
there are any. All other ranks stay as they are. The trained rows of A are projected off the span of the rows other
groups have used, after every step, so that the update leaves alone what those rows respond to. O-LoRA asks the same by
a penalty, and adds an adapter a task; here the rank, and so the adapter's size, stays what it is. Which group is
trained follows from the live adapter's weights: they are public in privacy's sense. The mask that zeroes other ranks'
gradients is therefore fixed before the round, and applied before the clip, whose bound it cannot raise.

Average is linear interpolation of weights, (1 - w) live + w trained, as in WiSE-FT (Wortsman et al. 2022) but on the
matrices A and B themselves: both come from one start, and the rank stays what it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from learner.layout import Slot


@dataclass(frozen=True)
class Subspace:
    """The ranks one round trains, and what it must stay orthogonal to.

    Attributes:
        group: which group of ranks.
        mask: (P,) one where a weight is trained, zero elsewhere.
        begin: (P,) the weights the round began with.
        used: for each A slot, in the order of `slots`, orthonormal rows (k, in) spanning what others have used.
        slots: where the matrices live.
        rows: the group's ranks.
    """

    group: int
    mask: Tensor
    begin: Tensor
    used: tuple[Tensor, ...]
    slots: Sequence[Slot]
    rows: slice

    def hold(self, theta: Tensor) -> None:
        """Bring theta (P,) back, in place: other ranks as they began, the trained rows of A off the used span."""
        theta.copy_(torch.where(self.mask > 0, theta, self.begin))
        for slot, used in zip(self.slots[::2], self.used, strict=True):
            rows = theta[slot.start : slot.stop].view(slot.shape)[self.rows]
            rows -= (rows @ used.t()) @ used


def rank_groups(r: int, groups: int) -> tuple[slice, ...]:
    """R ranks as `groups` runs of nearly equal length, none empty: at most r of them."""
    count = min(r, groups)
    bounds = [r * number // count for number in range(count + 1)]
    return tuple(slice(start, stop) for start, stop in itertools.pairwise(bounds))


def subspace(slots: Sequence[Slot], begin: Tensor, r: int, groups: int) -> Subspace:
    """Choose the group of ranks a round trains from the weights (P,) it begins with.

    Args:
        slots: A and B of every adapted layer, in turn (learner.lora).
        begin: the live adapter's weights, or fresh ones.
        r: rank.
        groups: how many groups; after so many rounds the group that says least is trained again.
    """
    parts = rank_groups(r, groups)
    sizes = [_size_of_b(slots, begin, rows) for rows in parts]
    group = sizes.index(min(sizes))
    mask = torch.zeros_like(begin)
    used = []
    taken = torch.zeros(r, dtype=torch.bool)
    for number, rows in enumerate(parts):
        taken[rows] = number != group and sizes[number] > 0.0
    for slot in slots:
        view = mask[slot.start : slot.stop].view(slot.shape)
        if slot.matrix == "A":
            view[parts[group]] = 1.0
            used.append(_span(begin[slot.start : slot.stop].view(slot.shape)[taken]))
        else:
            view[:, parts[group]] = 1.0
    return Subspace(group, mask, begin.clone(), tuple(used), slots, parts[group])


def averaged(live: Tensor, trained: Tensor, weight: float) -> Tensor:
    """(1 - weight) * live + weight * trained, (P,)."""
    return torch.lerp(live, trained, weight)


def _size_of_b(slots: Sequence[Slot], theta: Tensor, rows: slice) -> float:
    """Sum of squares of the group's columns in every B: zero exactly when the group was never trained."""
    parts = [theta[s.start : s.stop].view(s.shape)[:, rows] for s in slots if s.matrix == "B"]
    return float(sum(part.double().square().sum() for part in parts))


def _span(rows: Tensor) -> Tensor:
    """(k, in) rows to (k', in) orthonormal ones with the same span. In fp64: a projection is applied at every step."""
    if not len(rows):
        return rows
    _, sizes, directions = torch.linalg.svd(rows.double(), full_matrices=False)
    kept = sizes > sizes.max() * torch.finfo(torch.float32).eps * max(rows.shape)
    found: Tensor = directions[kept].float()
    return found
