import re
import subprocess
import sys

import pytest

from learner.errors import PlanError
from learner.plan import BlockAccount, ContinualSettings, LoraSettings, RoundPlan, StoppingSettings, plan_round
from privacy.accounting import fits, rdp
from privacy.canonical import canonical
from tests.learner.rounds import account

IDENTITY = {
    "round_id": "r1",
    "attempt": 1,
    "stream": "desk",
    "parent_sha256": None,
    "base_sha256": "b" * 64,
    "data_revision": "0" * 40,
}


def planned(new, replay=(), **changes):
    return plan_round(**{**IDENTITY, "expected_batch": 40, "steps": 20, **changes}, new=new, replay=replay)


def test_more_records_a_step_than_rounding_is_bounded_for_are_refused():
    with pytest.raises(ValueError, match=r"expected_batch\n.*less than or equal to 20001"):
        planned([account(units=100_000)], expected_batch=20_002)
    assert planned([account(units=100_000)], expected_batch=20_000).expected_batch == pytest.approx(20_000)


def test_a_plan_is_the_same_value_from_the_same_inputs_and_survives_json():
    first = planned([account(units=200)], [account("old", units=500)])
    second = planned([account(units=200)], [account("old", units=500)])
    assert first == second
    assert first.plan_hash == second.plan_hash
    again = RoundPlan.model_validate(first.as_json())
    assert again == first
    assert again.plan_hash == first.plan_hash
    assert planned([account(units=201)]).plan_hash != planned([account(units=200)]).plan_hash


def test_rates_follow_from_nominal_sizes_and_give_the_expected_batch():
    plan = planned([account("n1", units=200), account("n2", units=100)], [account("old", units=400)])
    q = {block.id: block.q for block in plan.blocks}
    assert q["n1"] == q["n2"]
    assert q["old"] == pytest.approx(0.25 * q["n1"])
    assert 0.9 * (300 * q["n1"] + 400 * q["old"]) == pytest.approx(40)
    assert plan.expected_batch == pytest.approx(40)


def test_the_batch_shrinks_where_the_rate_would_pass_its_maximum():
    plan = planned([account(units=100)], expected_batch=90, q_max=0.5)
    assert plan.blocks[0].q == 0.5
    assert plan.expected_batch == pytest.approx(45)


def test_a_plan_cannot_see_accepted_counts():
    """Planning is given a block's frozen policy and its account: no manifest, no counts, no records."""
    assert set(BlockAccount.__dataclass_fields__) == {"block_id", "policy", "spent"}
    block = account(units=200)
    counted = BlockAccount(block.block_id, {**block.policy, "counts": {"sealed": 3, "rejected": 197}}, block.spent)
    assert planned([counted]) == planned([block])


def test_a_new_block_pays_at_most_its_share_for_one_attempt_and_sigma_is_the_smallest():
    block = account(units=200)
    plan = planned([block])
    orders, caps = tuple(block.policy["orders"]), block.policy["caps"]
    allowance = [cap * 0.75 / 3 for cap in caps]
    zero = [0.0] * len(orders)
    q = plan.blocks[0].q
    assert fits(zero, rdp(q, plan.sigma, 20, orders), allowance)
    assert not fits(zero, rdp(q, plan.sigma - 0.001, 20, orders), allowance)


def test_all_attempts_of_a_new_block_fit_its_cap():
    block = account(units=200)
    spent = block.spent
    for _ in range(3):
        plan = planned([BlockAccount("b1", block.policy, spent)])
        charge = plan.charges()[0]
        rho = rdp(charge.q, charge.sigma, charge.steps, tuple(block.policy["orders"]))
        spent = tuple(s + r for s, r in zip(spent, rho, strict=True))
        assert fits(spent, [0.0] * len(spent), block.policy["caps"])


def test_replay_blocks_that_cannot_pay_are_left_out_by_name_and_the_rest_share_the_batch():
    full = account("full", units=400)
    full = BlockAccount("full", full.policy, tuple(full.policy["caps"]))
    plan = planned([account("new", units=200)], [full, account("old", units=400)])
    assert plan.left_out == ("full",)
    assert [block.id for block in plan.blocks] == ["new", "old"]
    assert plan.expected_batch == pytest.approx(40)


def test_a_new_block_that_cannot_pay_names_block_missing_share_and_choices():
    block = account("worn", units=200)
    worn = BlockAccount("worn", block.policy, tuple(block.policy["caps"]))
    with pytest.raises(
        PlanError,
        match=r"round=r1: blocks worn \(used 100.0%, asked .*over by .*cannot pay.*fewer steps.*smaller expected_batch",
    ) as caught:
        planned([worn, account("fresh", units=200)])
    assert "fresh" not in str(caught.value)


def test_a_round_without_new_blocks_is_refused():
    with pytest.raises(PlanError, match="new blocks=0"):
        planned([], [account()])


def test_blocks_of_different_units_are_refused():
    with pytest.raises(PlanError, match="record,user"):
        planned([account("a"), account("b", unit="user")])


def test_users_have_one_rate_in_all_blocks():
    plan = planned([account("n", units=200, unit="user")], [account("o", units=400, unit="user")])
    assert plan.unit == "user"
    assert len({block.q for block in plan.blocks}) == 1


def test_layers_count_from_the_top():
    assert LoraSettings(layers=2).layer_indices(5) == (3, 4)
    assert LoraSettings(layers=0).layer_indices(3) == (0, 1, 2)
    assert LoraSettings(layers=9).layer_indices(3) == (0, 1, 2)
    assert LoraSettings(layers=(2, 0)).layer_indices(3) == (0, 2)


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match=r"lora\.targets=embed_tokens: must be among q_proj,.*,lm_head"):
        LoraSettings(targets=("q_proj", "embed_tokens"))


def test_settings_that_came_later_leave_the_hash_of_older_plans_alone():
    """A plan is kept with its hash; new fields at their defaults must not change it, others must."""
    settings = LoraSettings()
    assert list(settings.model_dump()) == ["r", "alpha", "dropout", "targets", "layers", "rslora"]
    for change in (
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"bottleneck": 2},
        {"bottleneck_places": ("attention",)},
        {"nonlinearity": "silu"},
    ):
        changed = LoraSettings(**change)
        assert set(change) == set(changed.model_dump()) - set(settings.model_dump())
        assert LoraSettings.model_validate(changed.model_dump(mode="json")) == changed


def test_the_order_of_patterns_is_part_of_the_plan():
    one, other = ({"q_proj": 4, "layers.1.*": 2}, {"layers.1.*": 2, "q_proj": 4})
    plans = [planned([account()], lora=LoraSettings(rank_pattern=pattern)) for pattern in (one, other)]
    assert plans[0].plan_hash != plans[1].plan_hash
    for plan in plans:
        assert RoundPlan.model_validate_json(canonical(plan.as_json())) == plan
    module = "model.layers.1.self_attn.q_proj"
    assert [plan.lora.rank_of(module) for plan in plans] == [4, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"nope": 3}}, "lora.rank_pattern: 'nope' fits no target"),
        ({"rank_pattern": {"lm_head": 3}}, "lora.rank_pattern: 'lm_head' fits no target"),
        ({"alpha_pattern": {"(": 3}}, "is no regular expression"),
        ({"alpha_pattern": {"(q_proj|x)*": 3}}, "repeats a group"),
        ({"bottleneck_places": ("norm",)}, "lora.bottleneck_places=norm: must be among attention,mlp"),
        ({"use_dora": True}, "use_dora: is refused"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_reason(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LoraSettings(**changes)


def test_a_pattern_for_layers_that_are_not_adapted_is_refused_where_the_base_is_known(tiny):
    from learner.adapter import trained_weights
    from learner.errors import AdapterError

    with pytest.raises(AdapterError, match=r"'layers\.0\.\.\*': fits no adapted layer"):
        trained_weights(tiny, LoraSettings(layers=2, rank_pattern={"layers.0..*": 2}))


@pytest.mark.parametrize("lora", [LoraSettings(rank_pattern={"q_proj": 4}), LoraSettings(bottleneck=2)])
def test_ranks_of_its_own_need_one_rank(lora):
    with pytest.raises(ValueError, match="continual=orthogonal: needs one rank everywhere"):
        planned([account()], lora=lora, continual=ContinualSettings(method="orthogonal"))


def test_planning_imports_no_torch():
    heavy = ("torch", "transformers", "opacus", "mlflow", "dvc")
    code = f"import sys, learner.plan, learner.errors; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_number_of_trained_weights_is_that_of_the_model(tiny):
    from learner.adapter import trained_weights
    from learner.base import load_model
    from learner.lora import LoraModel

    for settings in (
        LoraSettings(r=2, layers=1),
        LoraSettings(r=3, layers=0, targets=("k_proj", "down_proj"), rank_pattern={"down_proj": 5}),
        LoraSettings(r=2, targets=("lm_head",)),
        LoraSettings(r=2, layers=2, bottleneck=3, bottleneck_places=("attention", "mlp")),
    ):
        assert trained_weights(tiny, settings) == LoraModel.width(load_model(tiny), settings)


def test_a_records_weight_follows_from_declared_shares_alone_and_never_exceeds_one():
    by_label = planned([account()], priors={"common": 0.9, "rare": 0.1})
    assert by_label.weight_of("banking", "rare") == 1.0
    assert by_label.weight_of("banking", "common") == pytest.approx(1 / 9)
    assert by_label.weight_of("banking", None) == 1.0
    by_domain = planned([account()], priors={"banking": 3.0, "work": 1.0})
    assert by_domain.weight_of("banking", "rare") == pytest.approx(1 / 3)
    assert by_domain.weight_of("work", None) == 1.0
    assert planned([account()]).weight_of("banking", "rare") == 1.0


def test_priors_and_early_stopping_are_hashed_and_change_no_charge():
    bare = planned([account()])
    stopping = StoppingSettings(every_steps=5, signal_sha256="a" * 64)
    for changes in ({"priors": {"rare": 0.1}}, {"stopping": stopping}):
        other = planned([account()], **changes)
        assert other.plan_hash != bare.plan_hash
        assert other.charges() == bare.charges()
        assert RoundPlan.model_validate(other.as_json()) == other
