"""LoRA layers whose backward pass writes per-sample gradients into one flat buffer, and the model with all of them.

LoRA (Hu et al. 2021) adds scale * (x A^T) B^T to a frozen linear layer. Privacy needs the gradient of every sample by
itself; for A and B these are two small batched products of what the backward pass holds anyway, so nothing is computed
twice and no gradient is taken for a frozen weight. All that is trained is views of one flat vector `theta` (P,), all
per-sample gradients are slices of one buffer (B, P): clipping, noise and optimiser work on flat memory, and there is
one clip over everything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from learner.bottleneck import BottleneckAfter
from learner.errors import AdapterError
from learner.gradients import Gradients, LowRank
from learner.head import HeadUpdate
from learner.layout import BLOCK_PART, HEAD, PLACES, BaseShapes, Slot, base_shapes, layout, module_name

if TYPE_CHECKING:
    from learner.plan import LoraSettings


class LoraLinear(nn.Module):
    """A frozen linear layer plus its low-rank update."""

    def __init__(self, base: nn.Linear, update: LowRank) -> None:
        super().__init__()
        self.base = base
        self.update = update

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) to (B, T, out)."""
        out: Tensor = _LoraProduct.apply(self.update.gradients.anchor, x, self)  # type: ignore[no-untyped-call]
        return out


class _LoraProduct(torch.autograd.Function):
    """base(x) + scale * (x A^T) B^T, with per-sample gradients of A and B as a side effect of backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, layer: LoraLinear) -> Tensor:  # noqa: ARG004 - autograd looks at it
        batch, tokens, width = x.shape
        update, weight, bias = layer.update, layer.base.weight, layer.base.bias
        flat = x.reshape(-1, width)
        out = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())  # (B*T, out)
        masks = update.masks([x.shape[1:]] * batch)
        mask = None if masks is None else torch.cat(masks).to(x.dtype)  # (B*T, in)
        seen = flat if mask is None else flat * mask
        low = (seen @ update.a.to(x.dtype).t()).mul_(update.scale)  # (B*T, r)
        out.addmm_(low, update.b.to(x.dtype).t())
        ctx.layer = layer
        ctx.save_for_backward(seen, low, mask)
        ctx.shape = (batch, tokens)
        return out.view(batch, tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[None, Tensor | None, None]:
        layer: LoraLinear = ctx.layer
        update = layer.update
        seen, low, mask = ctx.saved_tensors
        batch, tokens = ctx.shape
        grad = grad_out.reshape(batch * tokens, -1)
        grad_low = (grad @ update.b.to(grad.dtype)).mul_(update.scale)  # (B*T, r)
        update.gradients.products(update.slot_a, grad_low, seen)
        update.gradients.products(update.slot_b, grad, low)
        if not ctx.needs_input_grad[1]:
            return None, None, None
        grad_seen = grad_low @ update.a.to(grad.dtype)
        if mask is not None:
            grad_seen.mul_(mask)
        grad_x = grad_seen.addmm_(grad, layer.base.weight)
        return None, grad_x.view(batch, tokens, -1), None


class LoraModel:
    """A Qwen2 model with everything that is trained injected: the model, the flat weights, and where each lies.

    Attributes:
        layers: adapted blocks, ascending.
        lowest: autograd stops at this block's input. With nothing but the vocabulary projection adapted it is the last
            block, which is run for completion positions alone.
        head: the update of the vocabulary projection, or None.

    Args:
        model: a frozen `Qwen2ForCausalLM` (learner.base.load_model). Its target layers are replaced in place.
        settings: what is trained.
        rows_max: samples one backward pass may hold; the buffer takes rows_max * P * 4 bytes.

    Raises:
        AdapterError: a layer index is outside the model, or a pattern fits nothing.
    """

    def __init__(self, model: Any, settings: LoraSettings, rows_max: int) -> None:
        self.model = model
        self.settings = settings
        shapes = _shapes(model)
        self.slots = layout(settings, shapes)
        self.layers = settings.block_layers(shapes.depth)
        self.lowest = self.layers[0] if self.layers else shapes.depth - 1
        self.theta = torch.zeros(self.slots[-1].stop)
        self.gradients = Gradients(self.slots, rows_max)
        self.head: HeadUpdate | None = None
        places: dict[tuple[int, str], dict[str, Slot]] = {}
        for slot in self.slots:
            places.setdefault((slot.layer, slot.target), {})[slot.matrix] = slot
        for (layer, target), slots in places.items():
            self._inject(layer, target, slots)

    def _inject(self, layer: int, target: str, slots: Mapping[str, Slot]) -> None:
        """Put one update where it belongs; a bottleneck comes after the low-rank updates of its block."""
        if target == HEAD:
            self.head = HeadUpdate(self._low_rank(slots))
            return
        name = PLACES.get(target, target)
        part = getattr(self.model.model.layers[layer], BLOCK_PART[name])
        inner = getattr(part, name)
        if target in PLACES:
            kind = self.settings.nonlinearity
            setattr(part, name, BottleneckAfter(inner, slots, self.theta, self.gradients, kind))
        else:
            setattr(part, name, LoraLinear(inner, self._low_rank(slots)))

    def _low_rank(self, slots: Mapping[str, Slot]) -> LowRank:
        a, b = slots["A"], slots["B"]
        scale = self.settings.scale_of(module_name(a.layer, a.target))
        return LowRank(a, b, self.theta, self.gradients, scale, self.settings.dropout)

    @staticmethod
    def width(model: Any, settings: LoraSettings) -> int:
        """P, the number of trained weights these settings give on a model."""
        return layout(settings, _shapes(model))[-1].stop

    def start_fresh(self, seed: int) -> None:
        """What multiplies the input from Kaiming's uniform (He et al. 2015), as in peft, under a public seed.

        The rest is zero: the function is the base's, unchanged.
        """
        generator = torch.Generator().manual_seed(seed)
        for slot in self.slots:
            view = self.theta[slot.start : slot.stop]
            if slot.zero_at_first:
                view.zero_()
            else:
                bound = 1.0 / math.sqrt(slot.shape[1])
                view.copy_(torch.rand(view.shape, generator=generator).mul_(2 * bound).sub_(bound))

    def weights(self) -> dict[str, Tensor]:
        """A copy of each matrix and bias under its name on disk."""
        return {slot.name: self._view(slot).clone() for slot in self.slots}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from a parent's weights.

        Raises:
            AdapterError: names or shapes are not those of the settings.
        """
        names = {slot.name for slot in self.slots}
        if names != set(weights):
            different = min(names ^ set(weights))
            raise AdapterError(
                f"parent adapter: {different} is only on one side; keep targets, layers and bottleneck, "
                "or start from the base"
            )
        for slot in self.slots:
            value = weights[slot.name]
            if tuple(value.shape) != slot.shape:
                raise AdapterError(
                    f"parent adapter: {slot.name} has shape {tuple(value.shape)}, must be {slot.shape}; "
                    "keep r, its patterns and the bottleneck's width, or start from the base"
                )
            self._view(slot).copy_(value)

    def _view(self, slot: Slot) -> Tensor:
        return self.theta[slot.start : slot.stop].view(slot.shape)


def _shapes(model: Any) -> BaseShapes:
    return base_shapes(model.config.to_dict())
