"""The vocabulary projection and the loss: their gradient in closed form, so the loss itself is never made.

Only positions that predict a completion token come here, and of their logits only LOGIT_ROWS rows exist at a time.
There is no autograd in this file.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from learner.gradients import LowRank

# Completion positions whose logits are held at a time: 256 * 151,936 * 4 bytes = 156 MB on Qwen2.5.
LOGIT_ROWS = 256
# d loss / d logits is at most 1 and mostly tiny: lifted by this before it is rounded to fp16, which ends at 6e-8.
LIFT = 1024.0


def loss_gradient(
    hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor, update: HeadPass | None = None
) -> Tensor:
    """d/d hidden of sum_n weight_n * cross_entropy(logits_n, target_n), logits = hidden head^T plus the update's.

    hidden (N, H) fp32, head (V, H), target (N,), weight (N,). Products with `head` are made in its precision, the
    softmax and all that is summed in fp32.
    """
    grad = torch.empty_like(hidden)
    for first in range(0, len(hidden), LOGIT_ROWS):
        part = slice(first, min(first + LOGIT_ROWS, len(hidden)))
        logits = plain_logits(hidden[part], head)  # (n, V)
        if update:
            update.add(logits, part)
        slope = torch.softmax(logits, dim=1)
        slope[torch.arange(len(slope)), target[part]] -= 1.0
        if update:
            update.take(slope, part)
        if head.dtype == torch.float32:
            torch.mm(slope, head, out=grad[part])
        else:
            grad[part] = (slope.mul_(LIFT).to(head.dtype) @ head).float().div_(LIFT)
    if update:
        update.finish(grad)
    return grad.mul_(weight[:, None])


def plain_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """(n, H) fp32 to (n, V) fp32, multiplied in the precision of `head` (V, H); without any update of it."""
    return (hidden.to(head.dtype) @ head.t()).float()


class HeadUpdate:
    """The low-rank update of the vocabulary projection.

    The embedding is often the very same tensor; it stays as it is: the update belongs to the projection alone.
    """

    def __init__(self, update: LowRank) -> None:
        self._update = update

    def add(self, logits: Tensor, hidden: Tensor) -> None:
        """Add the update to logits (n, V) of hidden (n, H), as when serving: no dropout, nothing for gradients."""
        logits.addmm_((hidden @ self._update.a.t()).mul_(self._update.scale), self._update.b.t())

    def begin(self, hidden: Tensor, row: Tensor, weight: Tensor) -> HeadPass:
        """One batch: hidden (N, H) fp32; row (N,), ascending, whose each position is; weight (N,) of its loss."""
        return HeadPass(self._update, hidden, row, weight)


class HeadPass:
    """One batch on its way through `loss_gradient`, which owes it a call of `take` for every position."""

    def __init__(self, update: LowRank, hidden: Tensor, row: Tensor, weight: Tensor) -> None:
        counts = torch.bincount(row, minlength=len(update.gradients.rows)).tolist()
        ends = torch.tensor([0, *counts]).cumsum(0).tolist()
        masks = update.masks([(count, hidden.shape[1]) for count in counts])
        self._update = update
        self._samples = tuple(pairwise(ends))  # first position of each, and one past its last
        self._mask = None if masks is None else torch.cat(masks)
        self._seen = hidden if self._mask is None else hidden * self._mask  # (N, H)
        self._low = (self._seen @ update.a.t()).mul_(update.scale)  # (N, r)
        self._grad_low = torch.empty_like(self._low)  # unweighted
        self._weight = weight[:, None]
        self._weighted = self._low * self._weight
        self._grad_b = update.gradients.place(update.slot_b)  # (B, V, r)

    def add(self, logits: Tensor, part: slice) -> None:
        """Add the update to the logits (n, V) of some positions."""
        logits.addmm_(self._low[part], self._update.b.t())

    def take(self, slope: Tensor, part: slice) -> None:
        """From the softmax less the target (n, V) of some positions: B's gradients, and what A's need."""
        torch.mm(slope, self._update.b, out=self._grad_low[part])
        for sample, (first, stop) in enumerate(self._samples):
            begin, end = max(first, part.start), min(stop, part.stop)
            if begin < end:
                mine = slope[begin - part.start : end - part.start]
                # beta 0 overwrites: what stood there is another batch's.
                self._grad_b[sample].addmm_(mine.t(), self._weighted[begin:end], beta=0 if begin == first else 1)

    def finish(self, grad: Tensor) -> None:
        """Write A's gradients, and add the update's part to the unweighted gradient of hidden (N, H)."""
        update = self._update
        grad_low = self._grad_low.mul_(update.scale)
        grad_a = update.gradients.place(update.slot_a)  # (B, r, H)
        weighted = grad_low * self._weight
        for sample, (first, stop) in enumerate(self._samples):
            torch.mm(weighted[first:stop].t(), self._seen[first:stop], out=grad_a[sample])
        grad_seen = grad_low @ update.a
        grad.add_(grad_seen if self._mask is None else grad_seen.mul_(self._mask))
