"""What is left of the budgets: per block, per stream, over the rounds to come, and when to raise an alarm.

Everything here is arithmetic on policies, the ledger's accounts and public sizes: no figure depends on a record.
A future round is made by the planner that makes real ones, and is paid with the ledger's own sums, in copies.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from privacy import accounting
from tidegate.errors import TidegateError
from tidegate.planning import PlanArguments, Survey, plan_arguments, survey

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from learner.plan import BlockAccount, RoundPlan
    from privacy.policy import Policy
    from registry.states import ModelVersion
    from tidegate.wiring import Service

# Share of the live ancestry's median block. What is left then still pays for some rounds of replay: time to plan.
SHARE_ALARM = 0.8
# With one round left, the next candidate is the last that remembers these blocks.
ROUNDS_ALARM = 2
HOLDOUT_ALARM = 2
# More rounds than a service runs in years are told as "at least": nobody plans that far.
ROUNDS_MAX = 1_000
# A plan that only asks what a round would cost names neither data nor base.
_NO_SHA = "0" * 64


@dataclass(frozen=True)
class BlockBudget:
    """One block before and after the next round.

    Attributes:
        use: new, replay, left out (cannot pay the replay), or tried (new as often as it may be).
        share_used: of its filter, in [0, 1].
        share_after: once it has paid the next round; over 1 it cannot.
        missing: by how much of its filter it falls short; 0 when it can pay.
        rounds_left: how many more rounds it can be replayed in at this pace, the next one included.
        times_left: in how many more rounds it may be new, by its policy's attempts; None in live's ancestry.
    """

    block: str
    use: str
    share_used: float
    share_after: float
    missing: float
    rounds_left: int
    times_left: int | None


@dataclass(frozen=True)
class FutureRound:
    """One simulated round: its plan's figures and what is used of the filters afterwards."""

    number: int
    new: int
    replay: int
    left_out: tuple[str, ...]
    sigma: float
    q_new: float
    q_replay: float
    expected_batch: float
    share_median: float
    share_max: float


@dataclass(frozen=True)
class Budget:
    """A stream's budget as an operator sees it.

    Attributes:
        promise: the policy of the newest block in words.
        share_used_median: over the blocks of live's ancestry (nothing live: over all), in [0, 1].
        share_used_max: over all blocks.
        rounds_left: how many more rounds the median of those blocks can be replayed in at this pace; None: no block.
        blocks_retired: blocks of live's ancestry that can pay for no further replay.
        holdout_evaluations_left: until no holdout can pay; None: no block has a holdout account.
        alarms: what an operator should plan for.
    """

    stream: str
    promise: str
    share_used_median: float
    share_used_max: float
    rounds_left: int | None
    blocks_retired: tuple[str, ...]
    holdout_evaluations_left: int | None
    alarms: tuple[str, ...]


# -- one block ---------------------------------------------------------------------------------------------------------


def after(block: BlockAccount, q: float, sigma: float, steps: int) -> tuple[float, ...]:
    """What a block has spent once it has paid (q, sigma, steps), per order, nats; without privacy nobody pays."""
    if not block.private:
        return block.spent
    rho = accounting.rdp(q, sigma, steps, tuple(block.policy["orders"]))
    return tuple(s + r for s, r in zip(block.spent, rho, strict=True))


def rounds_payable(block: BlockAccount, q: float, sigma: float, steps: int, most: int = ROUNDS_MAX) -> int:
    """How often a block can pay (q, sigma, steps), one round after another as the ledger adds them; `most` at most."""
    if not block.private:
        return most
    caps, orders = tuple(block.policy["caps"]), tuple(block.policy["orders"])
    rho = accounting.rdp(q, sigma, steps, orders)
    spent = block.spent
    for count in range(most):
        if not accounting.fits(spent, rho, caps):
            return count
        spent = tuple(s + r for s, r in zip(spent, rho, strict=True))
    return most


def share_used(block: BlockAccount) -> float:
    """Share of the block's filter used, in [0, 1]."""
    return accounting.share_used(block.spent, tuple(block.policy["caps"]))


# -- the next round ----------------------------------------------------------------------------------------------------


def next_plan(found: Survey, arguments: PlanArguments, stand_in: BlockAccount | None = None) -> RoundPlan:
    """The plan of the next round, if one were due now. Nothing is reserved.

    Args:
        found: the stream's blocks.
        arguments: settings (`planning.plan_arguments`).
        stand_in: taken for the new block when there is none, to know at which rates the others would be replayed.

    Raises:
        PlanError: a new block cannot pay.
    """
    from learner.plan import plan_round

    new = found.new or ((stand_in,) if stand_in else ())
    return plan_round(
        stream=found.stream,
        round_id=f"{found.stream}-next",
        attempt=1,
        parent_sha256=found.parent_sha256,
        base_sha256=_NO_SHA,
        data_revision=found.revision,
        new=new,
        replay=found.replay,
        noise_source=found.noise_source,
        **arguments,
    )


def stand_in_for(policy: Policy, nominal_units: int, name: str = "(a block to come)") -> BlockAccount:
    """A block as ingest would seal it next, under the present settings."""
    from learner.plan import BlockAccount

    return BlockAccount(name, policy.frozen(nominal_units), (0.0,) * len(policy.orders))


def replay_rate(plan: RoundPlan, arguments: PlanArguments) -> float:
    """The rate at which the plan draws a unit of a block in live's ancestry."""
    q = max(block.q for block in plan.blocks)
    return q if plan.unit == "user" else q * arguments["replay_rate"]


def blocks_of(found: Survey, plan: RoundPlan, arguments: PlanArguments) -> tuple[BlockBudget, ...]:
    """Every block before and after the plan: new ones first, then replay, then those that were tried."""
    rates = {block.id: block.q for block in plan.blocks}
    replayed = replay_rate(plan, arguments)
    rows = []
    for block, use in _with_use(found, plan):
        q = rates.get(block.block_id, replayed)
        caps = tuple(block.policy["caps"])
        then = accounting.share_used(after(block, q, plan.sigma, plan.steps), caps)
        used = share_used(block)
        times = None if use in {"replay", "left out"} or not block.private else int(block.policy["attempts"])
        rows.append(
            BlockBudget(
                block=block.block_id,
                use=use,
                share_used=used,
                share_after=then if block.block_id in rates else used,
                missing=max(0.0, then - 1.0) if use in {"new", "left out"} else 0.0,
                rounds_left=rounds_payable(block, replayed, plan.sigma, plan.steps) if replayed else 0,
                times_left=None if times is None else max(0, times - found.times_new.get(block.block_id, 0)),
            )
        )
    return tuple(rows)


def _with_use(found: Survey, plan: RoundPlan) -> Iterable[tuple[BlockAccount, str]]:
    yield from ((block, "new") for block in found.new)
    yield from ((block, "left out" if block.block_id in plan.left_out else "replay") for block in found.replay)
    yield from ((block, "tried") for block in found.tried)


# -- rounds to come ----------------------------------------------------------------------------------------------------


def attempts_left(found: Survey, arguments: PlanArguments, most: int = ROUNDS_MAX) -> int:
    """How many rounds can be reserved one after another on these very blocks if no candidate is ever approved."""
    from learner.errors import PlanError

    if not found.private:
        return most if found.new else 0  # nothing is spent, so nothing is divided over attempts
    times: Counter[str] = Counter(found.times_new)
    for count in range(most):
        found = replace(found, new=tuple(b for b in found.new if times[b.block_id] < int(b.policy["attempts"])))
        if not found.new:
            return count
        try:
            plan = next_plan(found, arguments)
        except PlanError:
            return count
        times.update(block.block_id for block in found.new)
        found = paid(found, plan)
    return most


def simulate(
    found: Survey, arguments: PlanArguments, rounds: int, arriving: Sequence[BlockAccount]
) -> list[FutureRound]:
    """The rounds to come if every candidate is approved and `arriving` blocks are sealed before each later one.

    Args:
        found: the blocks now; when none is new, the first round waits for `arriving` too.
        arguments: settings.
        rounds: how many, at most.
        arriving: sizes and policies of the blocks of one round; each later round gets new ones like them.

    Returns:
        As many rounds as can be planned: fewer than asked when the new blocks of one cannot pay.
    """
    from learner.errors import PlanError

    done: list[FutureRound] = []
    for number in range(1, rounds + 1):
        if not found.new:
            found = replace(found, new=tuple(_arrive(found, arriving, number)))
        try:
            plan = next_plan(found, arguments)
        except PlanError:
            break
        then = paid(found, plan)
        shares = [share_used(block) for block in (*then.new, *then.replay)]
        done.append(
            FutureRound(
                number=number,
                new=len(found.new),
                replay=len(plan.blocks) - len(found.new),
                left_out=plan.left_out,
                sigma=plan.sigma,
                q_new=plan.blocks[0].q,
                q_replay=replay_rate(plan, arguments),
                expected_batch=plan.expected_batch,
                share_median=median(shares),
                share_max=max(shares),
            )
        )
        found = replace(then, new=(), replay=(*then.replay, *then.new))
    return done


def paid(found: Survey, plan: RoundPlan) -> Survey:
    """The survey once the plan was charged: unit user pays in every block that may hold the user, once a round."""
    rates = {block.id: block.q for block in plan.blocks}
    if plan.unit == "user":
        everywhere = plan.blocks[0].q
        rates = {b.block_id: everywhere for b in (*found.new, *found.replay, *found.tried)}

    def pay(blocks: Sequence[BlockAccount]) -> tuple[BlockAccount, ...]:
        return tuple(
            replace(b, spent=after(b, rates[b.block_id], plan.sigma, plan.steps)) if b.block_id in rates else b
            for b in blocks
        )

    return replace(found, new=pay(found.new), replay=pay(found.replay), tried=pay(found.tried))


def _arrive(found: Survey, arriving: Sequence[BlockAccount], number: int) -> Iterable[BlockAccount]:
    """New blocks like `arriving`; a user block starts with what the users of the stream have spent."""
    known = (*found.replay, *found.tried)
    for index, like in enumerate(arriving, start=1):
        spent: tuple[float, ...] = (0.0,) * len(like.policy["orders"])
        if like.policy["unit"] == "user" and known:
            spent = known[0].spent
        yield replace(like, block_id=f"(round {number}, block {index})", spent=spent)


# -- calibration -------------------------------------------------------------------------------------------------------


def noise_to_signal(plan: RoundPlan, weights: int) -> tuple[float, float]:
    """Norm of the noise over the largest signal there can be: of one step, and of the round's sum of steps.

    A step's noise has norm sigma C sqrt(P) / B on average (P trained weights, B the expected batch), and its mean
    clipped gradient a norm of at most C, when every record pulls in one direction. Over T steps independent noise grows
    by sqrt(T) and a constant signal by T. What the signal really is cannot be known without looking at private data.
    """
    step = plan.sigma * math.sqrt(weights) / plan.expected_batch
    return step, step / math.sqrt(plan.steps)


def batch_for(
    found: Survey, arguments: PlanArguments, *, sigma: float | None = None, noise: float | None = None, weights: int = 0
) -> RoundPlan:
    """The plan with another `expected_batch` that meets a target; whole records, so the rate is rounded down.

    Args:
        found: the stream's blocks.
        arguments: settings; their expected batch is replaced.
        sigma: the largest batch whose noise multiplier, rounded up, is at most this.
        noise: the smallest batch whose noise to signal over the round is at most this; needs `weights`.
        weights: trained weights.

    Raises:
        TidegateError: no batch meets the target; the message has the nearest.
        PlanError: no batch at all can be paid.
    """
    top = replace_batch(arguments, _batch_max(found, arguments))

    def plan_of(batch: int) -> RoundPlan | None:
        from learner.errors import PlanError

        try:
            return next_plan(found, replace_batch(arguments, batch))
        except PlanError:
            return None

    low, high = 1, int(top["expected_batch"])
    if sigma is not None:
        least = next_plan(found, replace_batch(arguments, 1))
        if least.sigma > sigma:
            raise TidegateError(
                f"target sigma={sigma:g}: must be >= {least.sigma:g}, what one record a step costs; fewer steps "
                f"(now {arguments['steps']}) or more blocks allow less"
            )
        while low < high:
            middle = (low + high + 1) // 2
            found_plan = plan_of(middle)
            low, high = (middle, high) if found_plan and found_plan.sigma <= sigma else (low, middle - 1)
        return next_plan(found, replace_batch(arguments, low))

    def ratio(batch: int) -> float:
        found_plan = plan_of(batch)
        return noise_to_signal(found_plan, weights)[1] if found_plan else math.inf

    target = noise if noise is not None else math.inf
    candidates = sorted({round(high ** (step / 60)) for step in range(61)})
    meeting = next((batch for batch in candidates if ratio(batch) <= target), None)
    if meeting is None:
        best = min(candidates, key=ratio)
        raise TidegateError(
            f"target noise={target:g}: must be >= {ratio(best):.3g}, what expected_batch={best} gives; fewer trained "
            f"weights ({weights} now), a larger epsilon, more steps or more blocks allow less"
        )
    # Between the last candidate that missed and the first that met it.
    low, high = max((b for b in candidates if b < meeting), default=1), meeting
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ratio(middle) <= target else (middle + 1, high)
    return next_plan(found, replace_batch(arguments, high))


def replace_batch(arguments: PlanArguments, batch: int) -> PlanArguments:
    """The arguments with another expected batch."""
    changed = arguments.copy()
    changed["expected_batch"] = batch
    return changed


def _batch_max(found: Survey, arguments: PlanArguments) -> int:
    """The largest batch the blocks can give at the largest rate."""
    rate = 1.0 if found.new and found.new[0].policy["unit"] == "user" else arguments["replay_rate"]
    kept = found.replay if arguments["replay_rate"] else ()
    units = sum(b.units for b in found.new) + rate * sum(b.units for b in kept)
    return max(1, math.floor(units * arguments["q_max"]))


# -- a stream ----------------------------------------------------------------------------------------------------------


def look(service: Service, stream: str, versions: Sequence[ModelVersion]) -> Budget:
    """A stream's budget now.

    Args:
        service: the workspace.
        stream: its name.
        versions: of its registered model; none: nothing is taken to be live.

    Raises:
        TidegateError: a version stands in Production without a valid approval.
    """
    settings = service.stream(stream)
    found = survey(service, stream, versions)
    coming = stand_in_for(service.policy(stream), settings.ingest.block_offsets)
    return assess(found, plan_arguments(settings.learner), coming, service.policy(stream), holdouts_of(service, found))


def holdouts_of(service: Service, found: Survey) -> Mapping[str, tuple[float, ...]]:
    """What the holdout of each block that has such an account has spent, per order, nats."""
    with_account = [b for b in (*found.new, *found.replay, *found.tried) if b.policy.get("holdout_evaluations")]
    return {b.block_id: service.ledger.spent(b.block_id, account="holdout") for b in with_account}


def assess(
    found: Survey,
    arguments: PlanArguments,
    coming: BlockAccount,
    policy: Policy,
    holdouts: Mapping[str, tuple[float, ...]],
) -> Budget:
    """A stream's budget from values alone; see `look`."""
    from learner.errors import PlanError

    everything = (*found.new, *found.replay, *found.tried)
    watched = found.replay or everything
    try:
        plan = next_plan(found, arguments, coming)
        rate = replay_rate(plan, arguments)
        left = {b.block_id: rounds_payable(b, rate, plan.sigma, plan.steps) if rate else 0 for b in watched}
    except PlanError:
        left = dict.fromkeys((b.block_id for b in watched), 0)
    retired = tuple(b.block_id for b in found.replay if left[b.block_id] == 0)
    budget = Budget(
        stream=found.stream,
        promise=policy.promise(),
        share_used_median=median([share_used(b) for b in watched]) if watched else 0.0,
        share_used_max=max((share_used(b) for b in everything), default=0.0),
        rounds_left=math.floor(median(left.values())) if left else None,
        blocks_retired=retired,
        holdout_evaluations_left=evaluations_left(everything, holdouts),
        alarms=(),
    )
    return replace(budget, alarms=tuple(_alarms(budget, len(found.replay))))


def evaluations_left(blocks: Iterable[BlockAccount], holdouts: Mapping[str, tuple[float, ...]]) -> int | None:
    """How many more private evaluations there can be until no holdout can pay; None: no block has such an account."""
    from privacy.counts import affordable
    from privacy.policy import Policy

    left = []
    for block in blocks:
        if block.block_id in holdouts:
            policy = Policy.from_frozen(block.policy)
            most, sigma = policy.holdout_evaluations, evaluation_sigma(policy)
            left.append(affordable(sigma, policy.orders, policy.holdout_caps, most, holdouts[block.block_id]))
    return max(left) if left else None


def evaluation_sigma(policy: Policy) -> float:
    """Noise of one private evaluation, votes: `holdout_evaluations` of them fit the holdout's filter, no more.

    Raises:
        PolicyError: the policy has no holdout account.
    """
    from privacy.counts import calibrate_releases

    return calibrate_releases([(policy.orders, policy.holdout_caps)], policy.holdout_evaluations)


def _alarms(budget: Budget, ancestors: int) -> Iterable[str]:
    """What to plan for while there is still something left to plan with."""
    if ancestors and budget.share_used_median >= SHARE_ALARM:
        yield (
            f"{budget.stream}: {budget.share_used_median:.0%} of the median block's filter is used, "
            f"the alarm is at {SHARE_ALARM:.0%}; lower learner.replay_rate or learner.steps, or wait for new blocks"
        )
    if ancestors and budget.rounds_left is not None and budget.rounds_left < ROUNDS_ALARM:
        yield (
            f"{budget.stream}: the median block can be replayed in {budget.rounds_left} more rounds at this pace, "
            f"the alarm is below {ROUNDS_ALARM}; `tidegate plan {budget.stream}` shows each block"
        )
    if budget.holdout_evaluations_left is not None and budget.holdout_evaluations_left < HOLDOUT_ALARM:
        yield (
            f"{budget.stream}: the holdouts can pay for {budget.holdout_evaluations_left} more private evaluations, "
            f"the alarm is below {HOLDOUT_ALARM}; new blocks bring new ones, or let no gate ask private data"
        )
