import math

import pytest
import torch

from bench.peers.steps import OurPlain, Ours, Task
from learner.base import load_model
from learner.plan import LoraSettings
from learner.step import Mechanism
from tests.learner.rounds import examples, stream


def test_the_plain_step_of_the_comparison_computes_the_private_steps_gradient_before_clip_and_noise(tiny):
    task = Task(tiny, LoraSettings(layers=2), tuple(examples(tiny, 12)), 6)
    private, plain = Ours(task, load_model(tiny)), OurPlain(task, load_model(tiny))
    generator = torch.Generator().manual_seed(1)
    plain.theta.copy_(torch.randn(plain.theta.shape, generator=generator) * 0.05)
    private.lora.theta.copy_(plain.theta)
    step = private.steps[1]
    step._mechanism = Mechanism(1e9, 1.0, 6.0)
    oracle = step.clipped_sum(range(6), stream()) / 6
    plain.backward(range(6, 12))
    difference = float((plain.gradient.double() - oracle).norm())
    assert difference < 2e-5 * float(oracle.norm())
    plain.backward([3])
    assert float((plain.gradient.double() - oracle).norm()) > 1e-2 * float(oracle.norm())


def test_a_ratio_is_that_of_equal_work_whatever_the_number_of_turns(monkeypatch):
    from bench import learner as bench

    made = bench.compared("x", [1.0, 3.0, 2.0, 2.0], [4.0, 8.0], 0.5)
    assert made["x"] == pytest.approx((2.0 + 0.5) / 6.0, abs=1e-3)
    assert made["x_spread"] == pytest.approx((2.5 / 4 - 2.5 / 8) / 2, abs=1e-3)
    assert math.isfinite(made["x"])
