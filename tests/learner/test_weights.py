"""Declared priors: what a record counts is bounded by what it may count, whatever its gradient and its neighbours."""

from dataclasses import replace

import pytest
import torch

from learner.plan import BlockRate, LoraSettings
from learner.sampling import Unit
from learner.step import Limits, clip_weights
from tests.learner.rounds import clipped, examples, one_at_a_time, plain_model, plan, private_step, stream
from tests.learner.test_round import run

KIND = LoraSettings(r=4, layers=2)
WEIGHTS = (1.0, 0.25, 0.5, 1.0, 0.1)
TOLERANCE = 2e-5


def weighted(tiny, count):
    return [replace(e, weight=w) for e, w in zip(examples(tiny, count), WEIGHTS[:count], strict=True)]


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_a_record_counts_its_weight_times_its_clipped_gradient(tiny, clip):
    made = weighted(tiny, 5)
    lora, step = private_step(tiny, made, settings=KIND, clip=clip)
    model, parameters = plain_model(tiny, lora)
    oracle = sum(e.weight * clipped(one_at_a_time(model, parameters, e).double(), clip) for e in made)
    ours = step.clipped_sum(range(5), stream())
    assert float((ours - oracle).norm() / oracle.norm()) < TOLERANCE


@pytest.mark.parametrize("rows_max", [64, 2])
def test_a_person_of_several_records_is_bounded_by_the_mean_of_their_weights(tiny, rows_max):
    made = weighted(tiny, 5)
    units = [Unit(0.5, (0, 1, 4)), Unit(0.5, (2, 3))]
    limits = Limits(1 << 20, rows_max)
    lora, step = private_step(tiny, made, settings=KIND, clip=0.01, units=units, limits=limits)
    model, parameters = plain_model(tiny, lora)
    for at, unit in enumerate(units):
        mine = [made[i] for i in unit.examples]
        gradient = sum(e.weight * one_at_a_time(model, parameters, e).double() for e in mine)
        bound = 0.01 * sum(e.weight for e in mine) / len(mine)
        ours = step.clipped_sum([at], stream())
        assert float(ours.norm()) <= bound
        torch.testing.assert_close(ours, clipped(gradient, bound), rtol=1e-3, atol=1e-7)


def test_with_weights_of_one_nothing_changes_in_any_bit(tiny):
    plain, ones = examples(tiny, 5), [replace(e, weight=1.0) for e in examples(tiny, 5)]
    first = private_step(tiny, plain, settings=KIND)[1].clipped_sum(range(5), stream())
    second = private_step(tiny, ones, settings=KIND)[1].clipped_sum(range(5), stream())
    assert torch.equal(first, second)


def test_a_gradient_that_is_not_finite_counts_zero_under_any_bound():
    rows = torch.tensor([[3.0, 4.0], [float("nan"), 1.0]])
    factors = clip_weights(rows, torch.tensor([0.5, 0.1], dtype=torch.float64))
    assert float(factors[0] * rows[0].norm()) == pytest.approx(0.5, rel=1e-4)
    assert torch.equal(rows[1], torch.zeros(2))


def test_priors_reach_the_round_and_are_bound_to_its_data(tiny, tmp_path):
    bare = run(tiny, tmp_path / "bare").adapter_sha256
    even = run(tiny, tmp_path / "even", plan(tiny, priors={"banking": 1.0}))
    assert even.adapter_sha256 != bare, "another plan has noise of its own"
    rates = (BlockRate(id="b1", q=1.0), BlockRate(id="b2", q=1.0))
    quiet = {"blocks": rates, "sigma": 1e-3, "steps": 1}
    all_alike = run(tiny, tmp_path / "alike", plan(tiny, priors={"banking": 1.0, "work": 1.0}, **quiet))
    lowered = run(tiny, tmp_path / "lowered", plan(tiny, priors={"banking": 10.0, "work": 1.0}, **quiet))
    # All records are of `banking`: a tenth of the gradient, which Adam's first step does not see but its sign.
    assert all_alike.max_abs_delta == pytest.approx(lowered.max_abs_delta, rel=1e-3)
