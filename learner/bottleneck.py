"""Bottleneck adapters whose backward pass writes per-sample gradients.

z + U f(D z + d) + u behind a sublayer of a block, before its residual (Houlsby et al. 2019; behind the MLP alone:
Pfeiffer et al. 2021). U and both biases begin at zero, so a fresh adapter changes nothing. Where they stand behind a
layer with a low-rank update, they act on the updated output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - its usual name

from learner.gradients import Gradients
from learner.layout import BOTTLENECK_MATRICES, Slot

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class BottleneckAfter(nn.Module):
    """A linear layer that ends a sublayer, and the bottleneck adapter behind it.

    Args:
        inner: the layer, frozen or with its low-rank update.
        slots: "down", "down_bias", "up", "up_bias" of this place.
        theta: the flat vector.
        gradients: the buffer.
        nonlinearity: a key of ACTIVATIONS.
    """

    def __init__(
        self, inner: nn.Module, slots: Mapping[str, Slot], theta: Tensor, gradients: Gradients, nonlinearity: str
    ) -> None:
        super().__init__()
        self.inner = inner
        self.slots = slots
        self.gradients = gradients
        self.activation = ACTIVATIONS[nonlinearity]
        self.down, self.down_bias, self.up, self.up_bias = (
            theta[slots[name].start : slots[name].stop].view(slots[name].shape) for name in BOTTLENECK_MATRICES
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) to (B, T, H)."""
        out: Tensor = _Bottleneck.apply(self.gradients.anchor, self.inner(x), self)  # type: ignore[no-untyped-call]
        return out


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, z: Tensor, layer: BottleneckAfter) -> Tensor:  # noqa: ARG004 - autograd looks at it
        kind = z.dtype
        flat = z.reshape(-1, z.shape[-1])  # (B*T, H)
        inner = torch.addmm(layer.down_bias.to(kind), flat, layer.down.to(kind).t())  # (B*T, w)
        out = flat + layer.up_bias.to(kind)
        out.addmm_(layer.activation(inner), layer.up.to(kind).t())
        ctx.layer = layer
        ctx.shape = z.shape
        ctx.save_for_backward(flat, inner)
        return out.view(z.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[None, Tensor | None, None]:
        layer: BottleneckAfter = ctx.layer
        flat, inner = ctx.saved_tensors
        grad = grad_out.reshape(flat.shape)
        with torch.enable_grad():
            leaf = inner.detach().requires_grad_()
            active = layer.activation(leaf)
        gradients, slots = layer.gradients, layer.slots
        gradients.products(slots["up"], grad, active.detach())
        gradients.sums(slots["up_bias"], grad)
        (grad_inner,) = torch.autograd.grad(active, leaf, grad @ layer.up.to(grad.dtype))
        gradients.products(slots["down"], grad_inner, flat)
        gradients.sums(slots["down_bias"], grad_inner)
        if not ctx.needs_input_grad[1]:
            return None, None, None
        return None, torch.addmm(grad, grad_inner, layer.down.to(grad.dtype)).view(ctx.shape), None
