"""AdamW on one flat vector, with warm-up and cosine.

What it sees is already private, so nothing here can spend.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
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


class FlatAdamW:
    """Decoupled weight decay (Loshchilov, Hutter 2019) on `theta` (P,), changed in place.

    `first` and `second` are the moments (P,); with the number of steps done they are its whole state.
    """

    def __init__(self, theta: Tensor, settings: OptimiserSettings, steps: int) -> None:
        self.theta = theta
        self.first = torch.zeros_like(theta)
        self.second = torch.zeros_like(theta)
        self._settings = settings
        self._steps = steps

    def step(self, gradient: Tensor, step: int) -> None:
        """Apply the gradient (P,) of the 0-based `step`."""
        rate = learning_rate(self._settings, step, self._steps)
        beta1, beta2 = self._settings.betas
        self.theta.mul_(1.0 - rate * self._settings.weight_decay)
        self.first.lerp_(gradient, 1.0 - beta1)
        self.second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        root = self.second.sqrt().div_(math.sqrt(1.0 - beta2 ** (step + 1))).add_(EPSILON)
        self.theta.addcdiv_(self.first, root, value=-rate / (1.0 - beta1 ** (step + 1)))
