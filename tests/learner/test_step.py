import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.errors import RoundError
from learner.plan import LoraSettings
from learner.prefix import SplitModel
from learner.sampling import Unit, draw
from learner.step import CLIP_MARGIN, NORM_CHUNK, Limits, NoMechanism, add_weighted, clip_weights, loss_gradient
from tests.learner.rounds import clipped, examples, one_at_a_time, plain_model, private_step, stream

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# fp32 arithmetic in another order: what separates batched from single, relative to the clipped sum's norm.
TOLERANCE = 2e-5


def relative(ours, oracle):
    return float((ours - oracle).norm() / oracle.norm())


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize(
    "lora_settings",
    [
        LoraSettings(r=4, layers=1),
        LoraSettings(r=4, layers=2),
        LoraSettings(r=3, layers=0, rslora=True),
        LoraSettings(r=2, layers=(0, 2), targets=("q_proj", "down_proj")),
        LoraSettings(r=4, layers=(1,), targets=ATTENTION),
        LoraSettings(r=4, layers=(2,), targets=("v_proj",)),
    ],
    ids=str,
)
def test_batched_gradient_is_the_clipped_sum_of_one_example_at_a_time(tiny, lora_settings, count):
    made = examples(tiny, count)
    lora, step = private_step(tiny, made, settings=lora_settings, clip=0.5)
    model, parameters = plain_model(tiny, lora)
    oracle = sum(clipped(one_at_a_time(model, parameters, e).double(), 0.5) for e in made)
    assert relative(step.clipped_sum(range(count), stream()), oracle) < TOLERANCE


def test_a_step_without_privacy_is_the_plain_mean_of_the_same_draw(tiny):
    made = examples(tiny, 7)
    lora, step = private_step(tiny, made, settings=LoraSettings(r=4, layers=2), clip=0.5)
    step._mechanism = NoMechanism(8.0)
    model, parameters = plain_model(tiny, lora)
    drawn = draw([Unit(0.5, (i,)) for i in range(7)], stream())
    assert 0 < len(drawn) < 7
    oracle = sum(one_at_a_time(model, parameters, made[i]).double() for i in drawn) / 8.0
    assert relative(step.gradient(stream()), oracle) < TOLERANCE
    with pytest.raises(TypeError, match="no clip norm"):
        step.clipped_sum(drawn, stream())
    assert float(step.gradient(stream(step=1)).norm()) != pytest.approx(float(oracle.norm()))


def test_the_oracle_tells_a_token_mean_over_the_batch_apart(tiny):
    """Negative control: the usual loss, under which one record's gradient depends on who else is in the batch."""
    made = examples(tiny, 7)
    lora, step = private_step(tiny, made, settings=LoraSettings(r=4, layers=2), clip=1e9)
    model, parameters = plain_model(tiny, lora)
    each = [one_at_a_time(model, parameters, e).double() for e in made]
    counts = [len(e.ids) - e.completion_start for e in made]
    token_mean = sum(g * n * len(made) / sum(counts) for g, n in zip(each, counts, strict=True))
    ours = step.clipped_sum(range(7), stream())
    assert relative(ours, sum(each)) < TOLERANCE
    assert relative(ours, token_mean) > 100 * TOLERANCE


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed:UserWarning")
def test_opacus_on_a_peft_model_gives_the_same_per_sample_gradients(tiny):
    from opacus import GradSampleModule
    from peft import LoraConfig, get_peft_model

    from learner.base import load_model

    made = examples(tiny, 5)
    lora, step = private_step(tiny, made, settings=LoraSettings(r=4, layers=2), clip=1e9)
    config = LoraConfig(
        r=4,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=list(lora.settings.targets),
        layers_to_transform=list(lora.layers),
        layers_pattern="layers",
    )
    model = get_peft_model(load_model(tiny), config)
    named = dict(model.named_parameters())
    for slot in lora.slots:
        weight = named[slot.name.replace(".weight", ".default.weight")]
        weight.data.copy_(lora.theta[slot.start : slot.stop].view(slot.shape))
    model.train()
    wrapped = GradSampleModule(model, loss_reduction="sum")
    longest = max(len(e.ids) for e in made)
    ids, labels = torch.zeros(5, longest, dtype=torch.long), torch.full((5, longest), -100)
    for i, e in enumerate(made):
        ids[i, : len(e.ids)] = torch.tensor(e.ids)
        labels[i, e.completion_start : len(e.ids)] = ids[i, e.completion_start : len(e.ids)]
    # Opacus takes the batch from the first dimension of what each layer sees, so positions must be per row.
    positions = torch.arange(longest).expand(5, -1)
    logits = wrapped(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
    (losses / (labels != -100).sum(1)).sum().backward()
    rows = torch.cat(
        [named[s.name.replace(".weight", ".default.weight")].grad_sample.flatten(1) for s in lora.slots], 1
    )
    for i in range(5):
        assert relative(step.clipped_sum([i], stream()), rows[i].double()) < TOLERANCE


@pytest.mark.parametrize(
    ("limits", "cached"),
    [(Limits(64, 64), True), (Limits(1 << 20, 3), True), (Limits(1, 1), True), (Limits(1 << 20, 64), False)],
)
def test_physical_split_and_prefix_cache_do_not_change_the_update(tiny, limits, cached):
    made = examples(tiny, 23)
    kind = LoraSettings(r=4, layers=2, dropout=0.2)
    reference = private_step(tiny, made, settings=kind)[1].clipped_sum(range(23), stream())
    other = private_step(tiny, made, settings=kind, limits=limits, cached=cached)[1]
    assert relative(other.clipped_sum(range(23), stream()), reference) < TOLERANCE


def test_a_prefix_cache_over_its_bound_recomputes(tiny):
    from learner.prefix import PrefixCache

    made = examples(tiny, 6)
    lora, _ = private_step(tiny, made, settings=LoraSettings(r=4, layers=1))
    halves = SplitModel(lora.model, lora.lowest)
    whole, part = (PrefixCache(halves, [e.ids for e in made], size) for size in (1 << 30, 4000))
    whole.fill(range(6), 4096)
    part.fill(range(6), 64)
    assert 0 < len(part._kept) < 6
    for i, e in enumerate(made):
        difference = whole.hidden([i])[0, : len(e.ids)] - part.hidden([i])[0, : len(e.ids)]
        assert float(difference.abs().max()) < 1e-5


@pytest.mark.parametrize("rows_max", [2, 64])
def test_a_user_is_summed_then_clipped_once(tiny, rows_max):
    made = examples(tiny, 9)
    units = [Unit(0.5, (0, 4, 8)), Unit(0.5, (1,)), Unit(0.5, (2, 3, 5, 6, 7))]
    limits = Limits(1 << 20, rows_max)
    lora, step = private_step(tiny, made, settings=LoraSettings(r=4, layers=2), units=units, clip=0.5, limits=limits)
    model, parameters = plain_model(tiny, lora)
    each = [one_at_a_time(model, parameters, e).double() for e in made]
    oracle = sum(clipped(sum(each[i] for i in unit.examples), 0.5) for unit in units)
    assert relative(step.clipped_sum(range(3), stream()), oracle) < TOLERANCE


def test_closed_form_of_the_loss_gradient_is_autograds():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 8, generator=generator, requires_grad=True)
    head, target = torch.randn(50, 8, generator=generator), torch.randint(50, (600,), generator=generator)
    weight = torch.rand(600, generator=generator)
    loss = (torch.nn.functional.cross_entropy(hidden @ head.T, target, reduction="none") * weight).sum()
    (oracle,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(loss_gradient(hidden.detach(), head, target, weight), oracle, rtol=1e-4, atol=1e-6)


def summed(rows, weights):
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    add_weighted(total, rows, weights)
    return total


def test_the_clip_margin_covers_what_rounding_of_norms_and_sums_can_hide():
    """The worst cases of `clip_weights` and `add_weighted`, for the largest draw that is spoken of."""
    units, u32, u64 = 50_000, 2.0**-24, 2.0**-53
    norm = NORM_CHUNK * u32 / 2 + 2 * u32  # half of what squares in fp32 lose; each root once more
    sums = 2 * units * u64 * units
    assert norm + sums < 1.0 - CLIP_MARGIN
    assert norm + 100 * sums > 1.0 - CLIP_MARGIN, "ten times as many would not be covered"


def test_a_sum_is_exact_to_the_last_bits_of_fp64_whoever_else_is_in_it():
    """In fp32 a large unit would round away what a small one adds, by 1e-7 of the large one."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 70_000, generator=generator)
    rows[0] *= 1e6
    weights = torch.rand(40, generator=generator, dtype=torch.float64)
    with_all, without = summed(rows, weights), summed(rows[1:], weights[1:])
    added = (with_all - without) - rows[0].double() * weights[0]
    assert float(added.abs().max()) < 1e-8
    in_fp32 = (weights.float() @ rows).double() - (weights[1:].float() @ rows[1:]).double()
    assert float((in_fp32 - rows[0].double() * weights[0]).abs().max()) > 1e-3


@settings(max_examples=80, deadline=None)
@given(
    scale=st.floats(min_value=1e-30, max_value=3e38),
    clip=st.floats(min_value=1e-3, max_value=1e3),
    poison=st.sampled_from([0.0, math.nan, math.inf, -math.inf, 3.4e38, 1e-45]),
    width=st.sampled_from([1, 4095, 4097, 20_000]),
    seed=st.integers(0, 2**31),
)
def test_clip_bound_holds_for_every_input(scale, clip, poison, width, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(3, width, generator=generator, dtype=torch.float64) * scale).float()
    rows[1, seed % width] = poison
    clean = rows[2].clone()
    weights = clip_weights(rows, clip)
    total = summed(rows, weights)
    assert bool(torch.isfinite(total).all())
    for i in range(3):
        alone = summed(rows[i : i + 1], weights[i : i + 1])
        assert float(alone.norm()) <= clip
    if not math.isfinite(poison):
        assert not bool(rows[1].any())
    norm = float(clean.double().norm())
    if norm < clip * 0.999:
        assert float(weights[2]) == 1.0


def test_a_record_that_is_not_finite_counts_as_zero_and_spoils_no_other(tiny):
    made = examples(tiny, 4)
    _, step = private_step(tiny, made, settings=LoraSettings(r=4, layers=1), clip=0.5)
    others = step.clipped_sum([0, 1, 3], stream())
    step._cache._kept[2][0, 0] = math.nan
    torch.testing.assert_close(step.clipped_sum([0, 1, 2, 3], stream()), others, rtol=1e-5, atol=1e-7)


def test_an_empty_draw_steps_on_noise_alone(tiny):
    made = examples(tiny, 3)
    units = [Unit(1e-12, (i,)) for i in range(3)]
    _, step = private_step(tiny, made, settings=LoraSettings(r=4, layers=1), units=units, clip=0.5, sigma=2.0)
    gradient = step.gradient(stream())
    noise = torch.from_numpy(stream().gaussians(len(gradient))) * 2.0 * 0.5 / 8.0
    torch.testing.assert_close(gradient, noise.float())


@pytest.mark.parametrize(("factor", "accepted"), [(1.0, True), (2 / 3, False), (3 / 2, False)])
def test_noise_has_the_standard_deviation_that_is_charged(tiny, factor, accepted):
    """The same draw, with and without noise: the difference, undone by the divisor, must be N(0, (sigma C)^2)."""
    made = examples(tiny, 5)
    _, step = private_step(tiny, made, settings=LoraSettings(r=4, layers=1), clip=0.5, sigma=1.5 * factor)
    from learner.sampling import draw

    values = []
    for number in range(6):
        total = step.clipped_sum(draw(step._units, stream(number)), stream(number))
        values.append(step.gradient(stream(number)).double() * 8.0 - total)
    noise = torch.cat(values).numpy() / (1.5 * 0.5)
    bound = 5 / math.sqrt(2 * len(noise))  # five standard errors of a standard deviation
    assert (abs(float(noise.std()) - 1.0) < bound) == accepted
    assert abs(float(noise.mean())) < 5 * factor / math.sqrt(len(noise))
    assert abs(np.corrcoef(values[0], values[1])[0, 1]) < 5 / math.sqrt(len(values[0]))


def test_dropout_of_a_record_does_not_depend_on_who_else_was_drawn(tiny):
    made = examples(tiny, 6)
    _, step = private_step(tiny, made, settings=LoraSettings(r=4, layers=2, dropout=0.3), clip=1e9)
    alone = sum(step.clipped_sum([i], stream()) for i in range(6))
    assert relative(step.clipped_sum(range(6), stream()), alone) < TOLERANCE
    assert relative(step.clipped_sum(range(6), stream(1)), alone) > 100 * TOLERANCE


def test_a_model_with_other_attention_is_refused(tiny):
    from learner.base import load_model

    model = load_model(tiny)
    model.set_attn_implementation("eager")
    with pytest.raises(RoundError, match="attention=eager"):
        SplitModel(model, 1)
