"""The buffer of per-sample gradients that every trained layer of a model writes to, and the low-rank update.

A row of it is clipped as one person's contribution. So a slice that a layer did not write would carry whatever stood
there before, which is another person's: each backward pass must write every slice once, and that is checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learner.errors import RoundError
from learner.layout import Slot


class Gradients:
    """Rows (B, P) for one backward pass at a time.

    Attributes:
        rows: what the running pass fills.
        seeds: one dropout seed per row; None: no dropout.
        anchor: makes autograd visit layers whose input needs no gradient, so that the lowest adapted layer computes
            none.

    Args:
        slots: everything that is trained.
        rows_max: samples one backward pass may hold; the buffer takes rows_max * P * 4 bytes.
    """

    def __init__(self, slots: Sequence[Slot], rows_max: int) -> None:
        self._slots = {slot.start: slot for slot in slots}
        self._buffer = torch.empty(rows_max, slots[-1].stop)
        self._missing: set[int] = set()
        self._unscale: Tensor | None = None
        self.rows_max = rows_max
        self.rows = self._buffer[:0]
        self.seeds: Sequence[int] | None = None
        self.anchor = torch.zeros(0, requires_grad=True)

    def open(self, rows: int, seeds: Sequence[int] | None = None) -> None:
        """Make room for `rows` samples; every slice is overwritten by the next backward pass."""
        self.rows = self._buffer[:rows]
        self.seeds = seeds
        self._missing = set(self._slots)
        self._unscale = None

    def scaled(self, scales: Tensor) -> None:
        """What reaches the layers from here on is (B,) times each row's gradient: divide before writing."""
        self._unscale = scales.reciprocal()

    def close(self) -> Tensor:
        """The rows, now that the pass is over.

        Raises:
            RoundError: a layer wrote nothing: it is not connected to the loss.
        """
        if self._missing:
            name = self._slots[min(self._missing)].name
            raise RoundError(f"{name}: no gradient reached it; the layer is not part of the model, report this")
        return self.rows

    def place(self, slot: Slot) -> Tensor:
        """Where a slot's gradients go: (B, *slot.shape), to be overwritten.

        Raises:
            RoundError: it was written before: a second pass through a layer would replace the first.
        """
        if slot.start not in self._missing:
            raise RoundError(f"{slot.name}: a second gradient in one pass; the layer is used twice, report this")
        self._missing.remove(slot.start)
        return self.rows[:, slot.start : slot.stop].view(len(self.rows), *slot.shape)

    def products(self, slot: Slot, left: Tensor, right: Tensor) -> None:
        """Row i of the slot becomes left_i^T right_i in fp32; left (B*T, m), right (B*T, n)."""
        rows, columns = slot.shape
        lifted = self._true(left.view(len(self.rows), -1, rows))
        torch.bmm(lifted.transpose(1, 2), right.view(len(self.rows), -1, columns).float(), out=self.place(slot))

    def sums(self, slot: Slot, left: Tensor) -> None:
        """Row i of the slot becomes the sum over tokens of left_i in fp32; left (B*T, m)."""
        torch.sum(self._true(left.view(len(self.rows), -1, *slot.shape)), dim=1, out=self.place(slot))

    def _true(self, gradient: Tensor) -> Tensor:
        """(B, T, m) in fp32, with the scale of its row undone."""
        return gradient.float() if self._unscale is None else gradient.float() * self._unscale[:, None, None]


class LowRank:
    """One low-rank update: scale * (x A^T) B^T, with where its gradients go.

    Attributes:
        a, b: (r, in) and (out, r), views of the flat vector.
    """

    def __init__(self, a: Slot, b: Slot, theta: Tensor, gradients: Gradients, scale: float, dropout: float) -> None:
        self.slot_a = a
        self.slot_b = b
        self.a = theta[a.start : a.stop].view(a.shape)  # (r, in)
        self.b = theta[b.start : b.stop].view(b.shape)  # (out, r)
        self.gradients = gradients
        self.scale = scale
        self.dropout = dropout

    def masks(self, sizes: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """One dropout mask per sample, scaled to keep the mean; it depends on its own seed alone, not on its batch."""
        if not self.dropout or self.gradients.seeds is None:
            return None
        keep = 1.0 - self.dropout
        generator = torch.Generator()
        masks = []
        for seed, size in zip(self.gradients.seeds, sizes, strict=True):
            # The slot's place separates the layers of one sample; seeds are spread over 2**53, so sums rarely meet.
            generator.manual_seed(seed + self.slot_a.start)
            masks.append((torch.rand(*size, generator=generator) < keep).float().div_(keep))
        return masks
