"""Per-sample gradients of everything that is trained, against one example at a time under plain autograd.

The oracle shares nothing with the code under test: transformers' own forward, low-rank updates and bottlenecks as
ordinary modules with parameters, autograd through the loss itself.
"""

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch

from learner.errors import RoundError
from learner.gradients import Gradients
from learner.head import HeadPass
from learner.lora import LoraModel
from learner.plan import ALL_TARGETS, LoraSettings
from learner.sampling import Unit
from learner.step import Example, Limits
from learner.stopping import likelihood
from tests.learner.rounds import awake, clipped, one_at_a_time, plain_copy, random_model, step_of, stream

VOCABULARY = 61
# Relative to the norm of the clipped sum: fp32 in another order, and the 1e-5 by which every clip stays inside
# its bound. The broken copies below are off by dozens of it.
TOLERANCE = 3e-5
# Small enough that every unit is clipped, so a wrong norm shows as well as a wrong direction.
CLIP = 0.05
UNITS = [Unit(0.5, (0, 3)), Unit(0.5, (1,)), Unit(0.5, (2, 4, 5))]

TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "every": ALL_TARGETS,
    "every and head": (*ALL_TARGETS, "lm_head"),
    "head": ("lm_head",),
}
RANKS = {
    "one": {"r": 3, "alpha": 5.0},
    "stable": {"r": 4, "alpha": 3.0, "rslora": True},
    "ranks by pattern": {"r": 2, "rank_pattern": {"layers.1.self_attn.[qv]_proj": 5, "o_proj|lm_head|down_proj": 1}},
    "both patterns": {
        "r": 2,
        "rslora": True,
        "rank_pattern": {"v_proj": 4, "lm_head": 3},
        "alpha_pattern": {r"layers.2.*_proj": 11.0, "lm_head": 7.0},
    },
}
# Physical batches of two examples, whole units or not; and everything at once.
ACCUMULATION = {"two at a time": Limits(1 << 20, 2), "at once": Limits(1 << 20, 64)}
RECOMPUTE = ("none", "reentrant", "non-reentrant")
BOTTLENECKS = {
    "none": {},
    "behind the MLP": {"bottleneck": 3, "nonlinearity": "relu"},
    "behind both": {"bottleneck": 2, "bottleneck_places": ("attention", "mlp"), "nonlinearity": "gelu"},
}
CASES = list(product(TARGETS, RANKS, ACCUMULATION, RECOMPUTE, BOTTLENECKS))


def model():
    return random_model(VOCABULARY, hidden=16, layers=3)


def examples():
    rng = np.random.default_rng(5)
    made = []
    for length, start in ((9, 6), (5, 4), (12, 3), (7, 1), (8, 5), (6, 2)):
        ids = tuple(int(i) for i in rng.integers(0, VOCABULARY, size=length))
        made.append(Example(ids, start))
    return made


def chosen_settings(targets, rank, bottleneck):
    """Patterns that name nothing among these targets are left out: they are an error, and tested as one."""
    values = dict(RANKS[rank])
    names = TARGETS[targets]
    for key in ("rank_pattern", "alpha_pattern"):
        kept = {p: v for p, v in values.get(key, {}).items() if any(_may_fit(p, name) for name in names)}
        values[key] = kept
    return LoraSettings(layers=2, targets=names, **values, **BOTTLENECKS[bottleneck])


def _may_fit(pattern, target):
    from learner.layout import fits, module_name

    return any(fits(pattern, module_name(layer, target)) for layer in (1, 2))


@cache
def trained(targets, rank, bottleneck):
    settings = chosen_settings(targets, rank, bottleneck)
    return awake(LoraModel(model(), settings, rows_max=64), seed=3)


@cache
def oracle(targets, rank, bottleneck):
    """(units, P): each unit's gradient, one example at a time."""
    plain, parameters = plain_copy(model(), trained(targets, rank, bottleneck))
    each = [one_at_a_time(plain, parameters, example).double() for example in examples()]
    return torch.stack([sum(each[i] for i in unit.examples) for unit in UNITS])


def ours(lora, limits=ACCUMULATION["at once"], recompute="none", clip=CLIP):
    step = step_of(lora, examples(), UNITS, clip, limits=limits, recompute=recompute)
    return step.clipped_sum(range(len(UNITS)), stream())


def distance(ours, oracle):
    return float((ours - oracle).norm() / oracle.norm())


def test_there_are_at_least_256_of_them():
    assert len(CASES) >= 256


@pytest.mark.parametrize(("targets", "rank", "accumulation", "recompute", "bottleneck"), CASES)
def test_the_clipped_sum_is_that_of_one_example_at_a_time(targets, rank, accumulation, recompute, bottleneck):
    expected = sum(clipped(unit, CLIP) for unit in oracle(targets, rank, bottleneck))
    found = ours(trained(targets, rank, bottleneck), ACCUMULATION[accumulation], recompute)
    assert distance(found, expected) < TOLERANCE


def everything():
    """Weights of every kind, not shared with the tests above: to be broken."""
    return awake(LoraModel(model(), chosen_settings("every and head", "both patterns", "behind both"), 64), seed=3)


def expected():
    return sum(clipped(unit, CLIP) for unit in oracle("every and head", "both patterns", "behind both"))


def swap_two_scales(lora, monkeypatch):
    one, other = (lora.model.model.layers[layer].self_attn.q_proj.update for layer in (1, 2))
    assert one.scale != other.scale
    one.scale, other.scale = other.scale, one.scale


def forget_a_bias(lora, monkeypatch):
    sums = Gradients.sums

    def forgetful(buffer, slot, left):
        sums(buffer, slot, left)
        if slot.matrix == "down_bias" and slot.layer == 1:
            buffer.rows[:, slot.start : slot.stop] = 0.0

    monkeypatch.setattr(Gradients, "sums", forgetful)


def give_one_matrix_to_the_neighbour(lora, monkeypatch):
    products = Gradients.products

    def confused(buffer, slot, left, right):
        products(buffer, slot, left, right)
        if (slot.layer, slot.target, slot.matrix) == (1, "up_proj", "B"):
            mine = buffer.rows[:, slot.start : slot.stop]
            mine.copy_(mine.roll(1, dims=0))

    monkeypatch.setattr(Gradients, "products", confused)


def stop_at_the_head(lora, monkeypatch):
    def short(finish):
        return lambda one, grad: finish(one, torch.zeros_like(grad))

    monkeypatch.setattr(HeadPass, "finish", short(HeadPass.finish))


def forget_the_head_in_the_loss(lora, monkeypatch):
    monkeypatch.setattr(HeadPass, "add", lambda *_: None)


def let_a_nonlinearity_pass(lora, monkeypatch):
    lora.model.model.layers[1].mlp.down_proj.activation = torch.relu


def clip_the_kinds_apart(lora, monkeypatch):
    import learner.step

    whole = learner.step.clip_weights

    def apart(rows, clip):
        half = rows.shape[1] // 2
        rows[:, half:] *= (whole(rows[:, half:], clip) / whole(rows[:, :half], clip))[:, None].float()
        return whole(rows[:, :half], clip)

    monkeypatch.setattr(learner.step, "clip_weights", apart)


@pytest.mark.parametrize(
    "fault",
    [
        swap_two_scales,
        forget_a_bias,
        give_one_matrix_to_the_neighbour,
        stop_at_the_head,
        forget_the_head_in_the_loss,
        let_a_nonlinearity_pass,
        clip_the_kinds_apart,
    ],
    ids=lambda fault: fault.__name__,
)
def test_a_broken_copy_is_far_outside_the_tolerance(fault, monkeypatch):
    lora = everything()
    assert distance(ours(lora), expected()) < TOLERANCE
    fault(lora, monkeypatch)
    assert distance(ours(lora), expected()) > 30 * TOLERANCE


def test_every_unit_is_clipped_and_its_bound_holds_over_all_kinds_of_weights():
    """One clip over everything: a unit alone comes out at the clip's norm, whatever it is made of."""
    for unit in oracle("every and head", "both patterns", "behind both"):
        assert float(unit.norm()) > CLIP
    lora = everything()
    step = step_of(lora, examples(), UNITS, CLIP)
    for index in range(len(UNITS)):
        norm = float(step.clipped_sum([index], stream()).norm())
        assert CLIP * (1 - TOLERANCE) < norm <= CLIP


def test_a_layer_that_no_gradient_reaches_stops_the_round():
    """opacus#820: what is put into the model and not used would train on noise alone, and carry other people's rows."""
    lora = everything()
    mlp = lora.model.model.layers[2].mlp
    mlp.gate_proj = mlp.gate_proj.base
    with pytest.raises(RoundError, match=r"layers\.2\.mlp\.gate_proj\.lora_A\.weight: no gradient reached it"):
        ours(lora)


def test_a_layer_that_is_used_twice_stops_the_round():
    lora = everything()
    layers = lora.model.model.layers
    layers[1].mlp.down_proj = layers[2].mlp.down_proj
    with pytest.raises(RoundError, match=r"bottleneck\.layers\.2\.mlp\.up: a second gradient in one pass"):
        ours(lora)


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_running_layers_again_gives_the_same_bits(bottleneck):
    lora = trained("every and head", "one", bottleneck)
    kept = ours(lora)
    for kind in ("reentrant", "non-reentrant"):
        assert torch.equal(ours(lora, recompute=kind), kept)


def test_early_stopping_scores_the_model_with_all_of_it():
    """Its score is the plain model's likelihood, the update of the vocabulary projection and bottlenecks included."""
    lora = everything()
    plain, _ = plain_copy(model(), lora)
    wanted = 0.0
    for example in examples():
        ids = torch.tensor([example.ids])
        logits = plain(input_ids=ids, use_cache=False).logits[0, example.completion_start - 1 : -1].detach()
        wanted -= float(torch.nn.functional.cross_entropy(logits, ids[0, example.completion_start :]))
    assert likelihood(examples())(lora) == pytest.approx(wanted / len(examples()), abs=1e-5)
