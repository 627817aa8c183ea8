"""One private step: per-unit gradients, one clip each, their sum, one draw of Gaussian noise, a constant divisor.

This is the sampled Gaussian mechanism of DP-SGD (Abadi et al. 2016): sensitivity C in the sum, noise sigma * C.
A round without privacy takes the same draws and has no mechanism: `NoMechanism`, a branch of its own in `gradient`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from learner.head import loss_gradient
from learner.sampling import PhysicalBatch, Unit, draw, split

if TYPE_CHECKING:
    from learner.lora import LoraModel
    from learner.prefix import PrefixCache, SplitModel
    from privacy.randomness import KeyedStream

# Entries whose squares are summed in fp32; the sums of the chunks are added in fp64. n squares summed in fp32, in
# whatever order, are off by at most n * 2^-24 of the sum: 1.6e-5 here, so half of that in the norm. Squares too small
# for fp32 hide a norm of 1e-15 in a million entries, nothing beside any clip norm.
NORM_CHUNK = 256
# Above this norm the squares leave fp32: as broken as NaN.
NORM_MAX = 1e18
# The bound that is charged for must hold although the norm may be read 8e-6 too small. What is left,
# 2e-6, pays for the rounding of sums: see `add_weighted`.
CLIP_MARGIN = 1.0 - 1e-5
# Coordinates that are made fp64 at a time, so that they stay in a core's cache.
SUM_CHUNK = 1 << 16
# Largest number of an example's loss gradient when it enters layers in fp16: it may grow 4096-fold on its way down.
FP16_SLOPE = 16.0


@dataclass(frozen=True)
class Example:
    """One rendered record: token ids, where its completion begins, and what it counts (declared, in (0, 1])."""

    ids: tuple[int, ...]
    completion_start: int
    weight: float = 1.0


@dataclass(frozen=True)
class Mechanism:
    """What privacy depends on. Nothing here changes speed, nothing outside changes privacy."""

    clip_norm: float
    sigma: float
    expected_batch: float


@dataclass(frozen=True)
class NoMechanism:
    """A round without privacy: nothing is clipped, nothing is added, nothing is protected."""

    expected_batch: float


@dataclass(frozen=True)
class Limits:
    """What only speed and memory depend on."""

    tokens_max: int  # padded tokens in a physical batch
    rows_max: int  # examples in a physical batch


class PrivateStep:
    """Turns a step's keyed stream into the noisy mean gradient (P,).

    Args:
        lora: the model with its flat weights and gradient buffer.
        halves: the same model, split below its lowest adapted layer.
        cache: inputs of the upper half, per example.
        examples: the round's rendered records.
        units: the round's privacy units over them.
        mask: (P,) ones and zeros: weights at zero are no part of the mechanism. Fixed before the round; None: all are.
    """

    def __init__(
        self,
        lora: LoraModel,
        halves: SplitModel,
        cache: PrefixCache,
        examples: Sequence[Example],
        units: Sequence[Unit],
        mechanism: Mechanism | NoMechanism,
        limits: Limits,
        mask: Tensor | None = None,
    ) -> None:
        self._lora = lora
        self._halves = halves
        self._cache = cache
        self._examples = examples
        self._units = units
        self._mechanism = mechanism
        self._limits = limits
        self._mask = mask

    def gradient(self, stream: KeyedStream) -> Tensor:
        """The step's noisy mean gradient, (P,) fp32. An empty draw is noise over the expected batch."""
        mechanism, drawn = self._mechanism, draw(self._units, stream)
        if isinstance(mechanism, NoMechanism):
            return self._plain_sum(drawn, stream).div_(mechanism.expected_batch).float()
        total = self.clipped_sum(drawn, stream)
        noise = torch.from_numpy(stream.gaussians(len(total)))
        total.add_(noise, alpha=mechanism.sigma * mechanism.clip_norm)
        return total.div_(mechanism.expected_batch).float()

    def clipped_sum(self, drawn: Sequence[int], stream: KeyedStream) -> Tensor:
        """Sum of the drawn units' clipped gradients, (P,) fp64. Secret: only `gradient` may leave this object."""
        total = torch.zeros(len(self._lora.theta), dtype=torch.float64)
        for batch, rows in self._rows(drawn, stream):
            add_weighted(total, rows, clip_weights(rows, self._bounds(batch)))
        return total

    def _plain_sum(self, drawn: Sequence[int], stream: KeyedStream) -> Tensor:
        """Sum of the drawn units' gradients as they are, (P,) fp64; one that is not finite is left out."""
        total = torch.zeros(len(self._lora.theta), dtype=torch.float64)
        for _, rows in self._rows(drawn, stream):
            total += rows[rows.isfinite().all(dim=1)].sum(dim=0)
        return total

    def _rows(self, drawn: Sequence[int], stream: KeyedStream) -> Iterator[tuple[PhysicalBatch, Tensor]]:
        """Each physical batch of a draw with its units' gradients, (U, P)."""
        if not drawn:
            return
        lengths = [len(example.ids) for example in self._examples]
        limits = self._limits
        seeds = self._dropout_seeds(stream)
        for batch in split(drawn, self._units, lengths, tokens_max=limits.tokens_max, rows_max=limits.rows_max):
            rows = self._unit_gradients(batch, seeds)
            if self._mask is not None:
                rows *= self._mask
            yield batch, rows

    def _bounds(self, batch: PhysicalBatch) -> float | Tensor:
        """What each unit's gradient is clipped to: C times the mean weight of its examples, hence never above C.

        With one example that is its clipped gradient times its weight: a weight works on whatever the clip leaves.
        """
        if isinstance(self._mechanism, NoMechanism):
            raise TypeError("a round without privacy has no clip norm: its gradients are never clipped, nor noised")
        norm = self._mechanism.clip_norm
        members = [[self._examples[index].weight for index in self._units[unit].examples] for unit in batch.units]
        if all(weight == 1.0 for weights in members for weight in weights):
            return norm
        return torch.tensor([norm * (sum(weights) / len(weights)) for weights in members], dtype=torch.float64)

    def _dropout_seeds(self, stream: KeyedStream) -> list[int] | None:
        """One seed per example of the round, so that a mask depends neither on the draw nor on the split."""
        if not self._lora.settings.dropout:
            return None
        uniforms = stream.uniforms(len(self._examples), "dropout")
        return [int(seed) for seed in uniforms * 2.0**53]

    def _unit_gradients(self, batch: PhysicalBatch, seeds: Sequence[int] | None) -> Tensor:
        """(U, P): each unit's gradient, summed over its examples."""
        if len(batch.units) == len(batch.examples) <= self._limits.rows_max:
            return self._example_gradients(batch.examples, seeds)
        total = torch.zeros(len(batch.units), len(self._lora.theta))
        rows_max = self._limits.rows_max
        for first in range(0, len(batch.examples), rows_max):
            part = slice(first, first + rows_max)
            rows = self._example_gradients(batch.examples[part], seeds)
            total.index_add_(0, torch.tensor(batch.owners[part]), rows)
        return total

    def _example_gradients(self, indices: Sequence[int], seeds: Sequence[int] | None) -> Tensor:
        """(B, P): gradient of each example's mean loss over its own completion tokens."""
        buffer = self._lora.gradients
        buffer.open(len(indices), None if seeds is None else [seeds[i] for i in indices])
        row, column, position, target, weight = completions([self._examples[i] for i in indices])
        positions = torch.zeros(len(indices), int(column.max()) + 1, dtype=torch.long)  # (B, C), padded with 0
        positions[row, column] = position
        with torch.set_grad_enabled(bool(self._lora.layers)):  # no graph when nothing below the head is trained
            hidden = self._halves.upper(self._cache.hidden(indices), positions)  # (B, C, H)
        # Without the padding, and in fp32 whatever the layers below compute in.
        leaf = hidden.detach()[row, column].float().requires_grad_()  # (N, H)
        normed = self._halves.norm(leaf)
        update = self._lora.head.begin(normed.detach(), row, weight) if self._lora.head else None
        slopes = loss_gradient(normed.detach(), self._halves.head, target, weight, update)
        if self._lora.layers:
            (slope,) = torch.autograd.grad(normed, leaf, slopes)  # (N, H)
            padded_slope = torch.zeros(hidden.shape)
            padded_slope[row, column] = slope
            torch.autograd.backward(hidden, self._lowered(padded_slope, hidden.dtype))
        return buffer.close()

    def _lowered(self, slope: Tensor, kind: torch.dtype) -> Tensor:
        """What enters the backward pass of the layers, (B, C, H).

        fp16 ends at 6e-8 and 65504, so each example is brought to the same size by a power of two; the buffer divides
        by it before anything is clipped. It follows from that example alone: a scale that adapts to the batch, as is
        usual, would let one record change the rounding of another's gradient.
        """
        if kind != torch.float16:
            return slope.to(kind)
        largest = slope.abs().amax(dim=(1, 2)).clamp_(min=torch.finfo(torch.float32).tiny)
        usable = torch.where(torch.isfinite(largest), largest, FP16_SLOPE)  # what is not finite will count as zero
        scales = torch.exp2(torch.floor(torch.log2(FP16_SLOPE / usable)).clamp_(max=100.0))
        self._lora.gradients.scaled(scales)
        return (slope * scales[:, None, None]).to(kind)


def clip_weights(rows: Tensor, clip_norm: float | Tensor) -> Tensor:
    """(U,) factors min(1, C / norm). A row that is not finite is set to zero in place and counts as a zero gradient.

    C is one bound for all units, or (U,) fp64, one for each.
    """
    count = rows.shape[1] // NORM_CHUNK
    whole = count * NORM_CHUNK
    chunks = rows[:, :whole].view(len(rows), count, NORM_CHUNK)
    parts = (torch.linalg.vector_norm(chunks, dim=2), torch.linalg.vector_norm(rows[:, None, whole:], dim=2))
    norms = torch.cat(parts, dim=1).double().square_().sum(dim=1).sqrt_()
    broken = ~(norms < NORM_MAX)  # also true for NaN
    if bool(broken.any()):
        rows[broken] = 0.0
        norms[broken] = 0.0
    return (clip_norm * CLIP_MARGIN / norms.clamp_(min=np.finfo(np.float64).tiny)).clamp_(max=1.0)


def add_weighted(total: Tensor, rows: Tensor, weights: Tensor) -> None:
    """Add sum_u weights_u * rows_u to the total; total (P,) fp64, rows (U, P) fp32, weights (U,) fp64.

    Products and sums are fp64. With n units each of two neighbouring draws is off by at most n * 2^-53 of n clip norms:
    together 6e-7 of one for n = 50,000, less than CLIP_MARGIN leaves. In fp32 one unit would shift the rounding of all
    others by more.
    """
    for first in range(0, len(total), SUM_CHUNK):
        part = slice(first, first + SUM_CHUNK)
        total[part].addmv_(rows[:, part].double().t(), weights)


def completions(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per completion token (N,): example, place in the completion, position that predicts it, id, weight.

    The weight is the example's own over its own completion length, so that no example's loss depends on another's.
    """
    row: list[int] = []
    column: list[int] = []
    position: list[int] = []
    target: list[int] = []
    weight: list[float] = []
    for index, example in enumerate(examples):
        ids, start = example.ids, example.completion_start
        count = len(ids) - start
        row += [index] * count
        column += range(count)
        position += range(start - 1, len(ids) - 1)
        target += ids[start:]
        weight += [example.weight / count] * count
    return torch.tensor(row), torch.tensor(column), torch.tensor(position), torch.tensor(target), torch.tensor(weight)
