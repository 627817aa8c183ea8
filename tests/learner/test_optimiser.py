from itertools import pairwise

import pytest
import torch

from learner.optimiser import FlatAdamW, learning_rate
from learner.plan import OptimiserSettings


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_flat_adamw_is_torchs(decay):
    settings = OptimiserSettings(weight_decay=decay, schedule="constant", warmup_share=0.0, learning_rate=3e-3)
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(500, generator=generator)
    theirs = ours.clone().requires_grad_()
    flat = FlatAdamW(ours, settings, 12)
    reference = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.999), weight_decay=decay)
    for step in range(12):
        gradient = torch.randn(500, generator=generator)
        theirs.grad = gradient.clone()
        reference.step()
        flat.step(gradient, step)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_the_rate_warms_up_then_falls_and_is_never_zero():
    settings = OptimiserSettings(learning_rate=1.0, warmup_share=0.1)
    rates = [learning_rate(settings, step, 40) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.01


def test_a_round_of_one_step_moves():
    assert learning_rate(OptimiserSettings(learning_rate=1.0), 0, 1) == 1.0
