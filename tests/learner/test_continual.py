import pytest
import torch
from safetensors.torch import load_file

from learner.adapter import read_adapter, weight_name
from learner.base import load_model
from learner.checkpoint import FILE
from learner.continual import averaged, rank_groups, subspace
from learner.lora import LoraModel
from learner.plan import ContinualSettings, LoraSettings
from learner.round import Speed, run_round
from privacy.randomness import TestKey
from tests.learner.rounds import account, examples, plan, private_step, records, stream
from tests.learner.test_plan import planned

R, GROUPS = 8, 4


@pytest.fixture(scope="module")
def lora(tiny):
    return LoraModel(load_model(tiny), LoraSettings(r=R, layers=2), 1)


def trained_groups(lora, *numbers):
    """Weights as after rounds that trained these groups."""
    generator = torch.Generator().manual_seed(1)
    lora.start_fresh(3)
    theta = lora.theta.clone()
    for slot in lora.slots:
        if slot.matrix == "B":
            for number in numbers:
                view = theta[slot.start : slot.stop].view(slot.shape)[:, rank_groups(R, GROUPS)[number]]
                view.copy_(torch.randn(view.shape, generator=generator))
    return theta


def rows_of(lora, theta, matrix):
    return [theta[s.start : s.stop].view(s.shape) for s in lora.slots if s.matrix == matrix]


@pytest.mark.parametrize(("r", "groups", "sizes"), [(8, 4, [2] * 4), (16, 5, [3, 3, 3, 3, 4]), (2, 5, [1, 1])])
def test_ranks_are_divided_without_gap_and_none_is_empty(r, groups, sizes):
    parts = rank_groups(r, groups)
    assert [part.stop - part.start for part in parts] == sizes
    assert [i for part in parts for i in range(r)[part]] == list(range(r))


def test_a_round_trains_the_first_unused_group_and_then_the_smallest(lora):
    assert subspace(lora.slots, trained_groups(lora), R, GROUPS).group == 0
    assert subspace(lora.slots, trained_groups(lora, 0, 1), R, GROUPS).group == 2
    theta = trained_groups(lora, 0, 1, 2, 3)
    for b in rows_of(lora, theta, "B"):
        b[:, rank_groups(R, GROUPS)[2]] *= 0.1
    assert subspace(lora.slots, theta, R, GROUPS).group == 2


def test_other_ranks_come_back_exactly_and_the_trained_rows_are_orthogonal_to_the_used_ones(lora):
    begin = trained_groups(lora, 0, 1)
    own = subspace(lora.slots, begin, R, GROUPS)
    theta = begin + torch.randn(begin.shape, generator=torch.Generator().manual_seed(2))
    own.hold(theta)
    others = own.mask == 0
    assert torch.equal(theta[others], begin[others])
    for now, before in zip(rows_of(lora, theta, "A"), rows_of(lora, begin, "A"), strict=True):
        assert (now[own.rows] @ before[:4].T).abs().max() < 1e-5
        assert (now[own.rows] @ before[6:].T).abs().max() > 0.05  # ranks nobody has used yet claim nothing
    for now in rows_of(lora, theta, "B"):
        assert now[:, own.rows].abs().max() > 0


def test_what_used_rows_respond_to_is_answered_as_before(lora):
    begin = trained_groups(lora, 0, 1)
    own = subspace(lora.slots, begin, R, GROUPS)
    theta = begin + torch.randn(begin.shape, generator=torch.Generator().manual_seed(2))
    own.hold(theta)
    pairs = zip(rows_of(lora, theta, "A"), rows_of(lora, theta, "B"), rows_of(lora, begin, "A"), strict=True)
    for a, b, before in pairs:
        x = before[:4].sum(0)
        assert torch.allclose(b[:, own.rows] @ (a[own.rows] @ x), torch.zeros(len(b)), atol=1e-4)


def test_the_mean_of_two_adapters_is_their_mean():
    live, new = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 4.0])
    assert averaged(live, new, 0.25).tolist() == [0.25, 2.5]
    assert averaged(live, new, 1.0).tolist() == new.tolist()


def test_a_masked_step_clips_what_is_left_of_a_gradient(tiny):
    made = examples(tiny, 12)
    lora, step = private_step(tiny, made, settings=LoraSettings(r=4, layers=2), clip=0.01, sigma=0.0)
    whole = step.clipped_sum([0], stream())
    mask = torch.zeros(len(lora.theta))
    mask[: len(mask) // 3] = 1.0
    step._mask = mask
    part = step.clipped_sum([0], stream())
    assert torch.equal(part != 0, (mask > 0) & (part != 0))
    assert float(part.norm()) == pytest.approx(0.01, rel=1e-4)
    assert float((whole * mask).norm()) < 0.009  # the same record, unmasked: others took their share of the bound


def in_line(tiny, folder, method, rounds=2, **changes):
    """Adapters of some rounds, each from the one before."""
    parent, found = None, []
    for number in range(rounds):
        output = run_round(
            plan(
                tiny,
                steps=2,
                round_id=f"r{number}",
                parent_sha256=found[-1].sha256 if found else None,
                continual=ContinualSettings(method=method, rank_groups=2, **changes),
            ),
            base=tiny,
            parent_dir=parent,
            records={"b1": records(40, seed=number), "b2": records(30, block="b2", seed=9 + number)},
            key=TestKey(5),
            system="",
            checkpoint_dir=folder / f"{number}-checkpoint",
            out_dir=folder / f"{number}-adapter",
            max_tokens=64,
            speed=Speed(threads=1),
        )
        parent = output.adapter_dir
        found.append(read_adapter(parent, base=tiny))
    return found


def test_two_orthogonal_rounds_train_different_ranks(tiny, tmp_path):
    one, two = in_line(tiny, tmp_path, "orthogonal")
    for name in (weight_name(2, "q_proj", "B"), weight_name(1, "down_proj", "B")):
        assert one.weights[name][:, :2].abs().max() > 0
        assert one.weights[name][:, 2:].abs().max() == 0
        assert torch.equal(two.weights[name][:, :2], one.weights[name][:, :2])
        assert two.weights[name][:, 2:].abs().max() > 0
    name = weight_name(2, "up_proj", "A")
    assert (two.weights[name][2:] @ two.weights[name][:2].T).abs().max() < 1e-5


def test_an_averaged_round_is_the_mean_of_live_and_trained_and_the_first_is_as_trained(tiny, tmp_path):
    one, two = in_line(tiny, tmp_path, "average", weight=0.25)
    lora = LoraModel(load_model(tiny), LoraSettings(r=4, layers=2), 1)

    def theta(adapter):
        lora.load(adapter.weights)
        return lora.theta.clone()

    # The last checkpoint holds the weights as they were trained.
    first, second = (load_file(tmp_path / f"{n}-checkpoint" / FILE)["theta"] for n in range(2))
    assert torch.equal(theta(one), first)
    assert torch.equal(theta(two), averaged(first, second, 0.25))
    assert not torch.equal(theta(two), second)


def test_only_replay_takes_old_blocks_along():
    new, old = [account("new", units=200)], [account("old", units=400)]
    by_method = {
        method: planned(new, old, continual=ContinualSettings(method=method))
        for method in ("sequential", "replay", "orthogonal", "average")
    }
    assert {method: len(plan.blocks) for method, plan in by_method.items()} == {
        "sequential": 1,
        "replay": 2,
        "orthogonal": 1,
        "average": 1,
    }
    assert {method for method, plan in by_method.items() if plan.left_out == ("old",)} == {*by_method} - {"replay"}
    assert len({plan.plan_hash for plan in by_method.values()}) == 4
