from itertools import pairwise

import pytest
import torch

from learner.lora import Slot
from learner.optimiser import FlatAdamW, layer_rates, learning_rate
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


# Two layers of a model, the upper with two targets: 30 weights.
SLOTS = (
    Slot(4, "q_proj", "A", 0, (2, 5)),
    Slot(7, "q_proj", "A", 10, (2, 4)),
    Slot(7, "v_proj", "A", 18, (3, 4)),
)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_each_layer_has_its_rate_as_in_torchs_parameter_groups(decay):
    settings = OptimiserSettings(
        weight_decay=decay, schedule="constant", warmup_share=0.0, learning_rate=3e-3, layer_rate_decay=0.7
    )
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(30, generator=generator)
    low, high = ours[:10].clone().requires_grad_(), ours[10:].clone().requires_grad_()
    flat = FlatAdamW(ours, settings, 12, layer_rates(SLOTS, settings.layer_rate_decay))
    groups = [{"params": [low], "lr": 0.7 * 3e-3}, {"params": [high], "lr": 3e-3}]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=decay)
    for step in range(12):
        gradient = torch.randn(30, generator=generator)
        low.grad, high.grad = gradient[:10].clone(), gradient[10:].clone()
        reference.step()
        flat.step(gradient, step)
    torch.testing.assert_close(ours, torch.cat([low, high]).detach(), rtol=1e-5, atol=1e-6)


def test_without_a_decay_over_the_layers_nothing_is_multiplied():
    assert layer_rates(SLOTS, 1.0) is None
    assert layer_rates(SLOTS, 0.5).tolist() == [0.5] * 10 + [1.0] * 20
