"""AdamW on one flat vector, with warm-up, cosine, and a rate of its own for each adapted layer.

What it sees is already private, so nothing here can spend.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from learner.layout import Slot
    from learner.plan import OptimiserSettings

EPSILON = 1e-8  # torch's and Adam's own default


def learning_rate(settings: OptimiserSettings, step: int, steps: int) -> float:
    """The rate of the 0-based `step` of `steps`: up in a line over the warm-up, then down a cosine; never zero."""
    warmup = math.ceil(settings.warmup_share * steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def layer_rates(slots: Sequence[Slot], decay: float) -> Tensor | None:
    """(P,) factor of every weight's rate: 1 in the highest adapted layer, `decay` times less in each one below it.

    What is learnt low in a network serves everything above it, so it had better change less (Howard, Ruder 2018,
    discriminative fine-tuning). None where the factor is 1 everywhere.
    """
    if decay == 1.0:
        return None
    ranks = {layer: rank for rank, layer in enumerate(sorted({slot.layer for slot in slots}, reverse=True))}
    factors = torch.empty(slots[-1].stop)
    for slot in slots:
        factors[slot.start : slot.stop] = decay ** ranks[slot.layer]
    return factors


class FlatAdamW:
    """Decoupled weight decay (Loshchilov, Hutter 2019) on `theta` (P,), changed in place.

    `first` and `second` are the moments (P,); with the number of steps done they are its whole state.

    Args:
        theta: the weights.
        settings: rate, schedule, decay, moments.
        steps: of the round.
        rates: (P,) factor of each weight's rate, for its step and its decay alike; None: 1.
    """

    def __init__(self, theta: Tensor, settings: OptimiserSettings, steps: int, rates: Tensor | None = None) -> None:
        self.theta = theta
        self.first = torch.zeros_like(theta)
        self.second = torch.zeros_like(theta)
        self._settings = settings
        self._steps = steps
        self._rates = rates

    def step(self, gradient: Tensor, step: int) -> None:
        """Apply the gradient (P,) of the 0-based `step`."""
        rate = learning_rate(self._settings, step, self._steps)
        beta1, beta2 = self._settings.betas
        decay = rate * self._settings.weight_decay
        self.theta.mul_(1.0 - decay if self._rates is None else 1.0 - decay * self._rates)
        self.first.lerp_(gradient, 1.0 - beta1)
        self.second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        root = self.second.sqrt().div_(math.sqrt(1.0 - beta2 ** (step + 1))).add_(EPSILON)
        if self._rates is not None:
            root.div_(self._rates)
        self.theta.addcdiv_(self.first, root, value=-rate / (1.0 - beta1 ** (step + 1)))
