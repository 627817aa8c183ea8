"""LoRA layers whose backward pass writes per-sample gradients into one flat buffer.

LoRA (Hu et al. 2021) adds scale * (x A^T) B^T to a frozen linear layer. Privacy needs the gradient of every sample by
itself; for A and B these are two small batched products of what the backward pass holds anyway, so nothing is computed
twice and no gradient is taken for a frozen weight. All A and B are views of one flat vector `theta` (P,), all
per-sample gradients are slices of one buffer (B, P): clipping, noise and optimiser work on flat memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from learner.adapter import BLOCK_PART, weight_name
from learner.errors import AdapterError

if TYPE_CHECKING:
    from learner.plan import LoraSettings


@dataclass(frozen=True)
class Slot:
    """Where one matrix lives in the flat vector."""

    layer: int
    target: str  # such as "q_proj"
    matrix: str  # "A" (r, in) or "B" (out, r)
    start: int
    shape: tuple[int, int]

    @property
    def stop(self) -> int:
        """One past the last index in `theta`."""
        return self.start + self.shape[0] * self.shape[1]

    @property
    def name(self) -> str:
        """Its name on disk."""
        return weight_name(self.layer, self.target, self.matrix)


class Gradients:
    """The per-sample gradient buffer that all layers of one model write to.

    `rows` (B, P) is what the running backward pass fills; `seeds` has one dropout seed per row (None: no dropout).
    `anchor` makes autograd visit layers whose input needs no gradient, so that the lowest adapted layer computes none.
    """

    def __init__(self, width: int, rows_max: int) -> None:
        self._buffer = torch.empty(rows_max, width)
        self.rows_max = rows_max
        self.rows = self._buffer[:0]
        self.seeds: Sequence[int] | None = None
        self.anchor = torch.zeros(0, requires_grad=True)

    def open(self, rows: int, seeds: Sequence[int] | None = None) -> Tensor:
        """Make room for `rows` samples; every slice is overwritten by the next backward pass."""
        self.rows = self._buffer[:rows]
        self.seeds = seeds
        return self.rows


class LoraLinear(nn.Module):
    """A frozen linear layer plus its low-rank update."""

    def __init__(
        self, base: nn.Linear, a: Slot, b: Slot, theta: Tensor, gradients: Gradients, settings: LoraSettings
    ) -> None:
        super().__init__()
        self.base = base
        self.slot_a = a
        self.slot_b = b
        self.a = theta[a.start : a.stop].view(a.shape)  # (r, in)
        self.b = theta[b.start : b.stop].view(b.shape)  # (out, r)
        self.gradients = gradients
        self.scale = settings.scale
        self.dropout = settings.dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) to (B, T, out)."""
        out: Tensor = _LoraProduct.apply(self.gradients.anchor, x, self)  # type: ignore[no-untyped-call]
        return out

    def mask(self, x: Tensor) -> Tensor | None:
        """Dropout mask (B, T, in), scaled to keep the mean; a row depends on its own seed alone, not on its batch."""
        if not self.dropout or self.gradients.seeds is None:
            return None
        keep = 1.0 - self.dropout
        generator = torch.Generator()
        rows = []
        for seed in self.gradients.seeds:
            # The slot's place separates the layers of one sample; seeds are spread over 2**53, so sums rarely meet.
            generator.manual_seed(seed + self.slot_a.start)
            rows.append(torch.rand(x.shape[1:], generator=generator) < keep)
        return torch.stack(rows).to(x.dtype).div_(keep)


class _LoraProduct(torch.autograd.Function):
    """base(x) + scale * (x A^T) B^T, with per-sample gradients of A and B as a side effect of backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, layer: LoraLinear) -> Tensor:  # noqa: ARG004 - autograd looks at it
        batch, tokens, width = x.shape
        weight, bias = layer.base.weight, layer.base.bias
        flat = x.reshape(-1, width)
        out = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())  # (B*T, out)
        mask = layer.mask(x)
        seen = flat if mask is None else flat * mask.view(-1, width)
        low = (seen @ layer.a.t()).mul_(layer.scale)  # (B*T, r)
        out.addmm_(low, layer.b.t())
        ctx.layer = layer
        ctx.save_for_backward(seen, low, mask)
        ctx.shape = (batch, tokens)
        return out.view(batch, tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[None, Tensor | None, None]:
        layer: LoraLinear = ctx.layer
        seen, low, mask = ctx.saved_tensors
        batch, tokens = ctx.shape
        grad = grad_out.reshape(batch * tokens, -1)
        grad_low = (grad @ layer.b).mul_(layer.scale)  # (B*T, r)
        _per_sample(layer.gradients.rows, layer.slot_a, grad_low, seen, batch)
        _per_sample(layer.gradients.rows, layer.slot_b, grad, low, batch)
        if not ctx.needs_input_grad[1]:
            return None, None, None
        grad_seen = grad_low @ layer.a
        if mask is not None:
            grad_seen.mul_(mask.view(grad_seen.shape))
        grad_x = grad_seen.addmm_(grad, layer.base.weight)
        return None, grad_x.view(batch, tokens, -1), None


def _per_sample(rows: Tensor, slot: Slot, left: Tensor, right: Tensor, batch: int) -> None:
    """rows[i, slot] = left_i^T right_i for each sample i; left (B*T, m), right (B*T, n)."""
    target = rows[:, slot.start : slot.stop].view(batch, *slot.shape)
    torch.bmm(left.view(batch, -1, slot.shape[0]).transpose(1, 2), right.view(batch, -1, slot.shape[1]), out=target)


class LoraModel:
    """A Qwen2 model with LoRA layers injected: the model itself, the flat weights, and where each matrix lives.

    Args:
        model: a frozen `Qwen2ForCausalLM` (learner.base.load_model). Its target layers are replaced in place.
        settings: ranks, targets, layers.
        rows_max: samples one backward pass may hold; the buffer takes rows_max * P * 4 bytes.

    Raises:
        AdapterError: a layer index is outside the model.
    """

    def __init__(self, model: Any, settings: LoraSettings, rows_max: int) -> None:
        self.model = model
        self.settings = settings
        layers = model.model.layers
        self.layers = settings.layer_indices(len(layers))
        self.slots = _slots(layers, self.layers, settings)
        self.theta = torch.zeros(self.slots[-1].stop)
        self.gradients = Gradients(len(self.theta), rows_max)
        for a, b in zip(self.slots[::2], self.slots[1::2], strict=True):
            part = getattr(layers[a.layer], BLOCK_PART[a.target])
            linear = LoraLinear(getattr(part, a.target), a, b, self.theta, self.gradients, settings)
            setattr(part, a.target, linear)

    @staticmethod
    def width(model: Any, settings: LoraSettings) -> int:
        """P, the number of trained weights these settings give on a model."""
        layers = model.model.layers
        return _slots(layers, settings.layer_indices(len(layers)), settings)[-1].stop

    def start_fresh(self, seed: int) -> None:
        """A from Kaiming's uniform (He et al. 2015), as in peft, under a public seed; B zero: the base, unchanged."""
        generator = torch.Generator().manual_seed(seed)
        for slot in self.slots:
            view = self.theta[slot.start : slot.stop]
            if slot.matrix == "B":
                view.zero_()
            else:
                bound = 1.0 / math.sqrt(slot.shape[1])
                view.copy_(torch.rand(view.shape, generator=generator).mul_(2 * bound).sub_(bound))

    def weights(self) -> dict[str, Tensor]:
        """A copy of each matrix under its name on disk."""
        return {slot.name: self._view(slot).clone() for slot in self.slots}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from a parent's matrices.

        Raises:
            AdapterError: names or shapes are not those of the settings.
        """
        names = {slot.name for slot in self.slots}
        if names != set(weights):
            different = min(names ^ set(weights))
            raise AdapterError(
                f"parent adapter: {different} is only on one side; keep targets and layers, or start from the base"
            )
        for slot in self.slots:
            value = weights[slot.name]
            if tuple(value.shape) != slot.shape:
                raise AdapterError(
                    f"parent adapter: {slot.name} has shape {tuple(value.shape)}, must be {slot.shape}; "
                    "keep r, or start from the base"
                )
            self._view(slot).copy_(value)

    def _view(self, slot: Slot) -> Tensor:
        return self.theta[slot.start : slot.stop].view(slot.shape)


def _slots(layers: Any, indices: Sequence[int], settings: LoraSettings) -> tuple[Slot, ...]:
    slots: list[Slot] = []
    start = 0
    for index in indices:
        if not 0 <= index < len(layers):
            raise AdapterError(f"lora.layers={index}: must be in 0..{len(layers) - 1}, the layers of this base")
        for target in (t for t in BLOCK_PART if t in settings.targets):
            linear = getattr(getattr(layers[index], BLOCK_PART[target]), target)
            shapes = (("A", (settings.r, linear.in_features)), ("B", (linear.out_features, settings.r)))
            for matrix, shape in shapes:
                slots.append(Slot(index, target, matrix, start, shape))
                start = slots[-1].stop
    return tuple(slots)
