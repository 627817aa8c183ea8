"""`tidegate plan STREAM`: what the next rounds would cost, and for how many more there is budget. A dry run."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from tidegate import output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from learner.plan import BlockAccount, RoundPlan
    from registry.states import ModelVersion
    from tidegate.planning import PlanArguments, Survey
    from tidegate.wiring import Service

_FORMULA = "sigma x sqrt(weights) / expected batch; over the round divided by sqrt(steps)"
_CAVEAT = (
    "relative to the clip norm, which the mean gradient reaches only when every record pulls one way; "
    "what the signal really is cannot be known without looking"
)


@click.command()
@click.argument("stream")
@click.option(
    "--rounds", default=3, show_default=True, type=click.IntRange(0, 100), help="How many rounds to simulate."
)
@click.option(
    "--target-sigma",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="Find the largest expected batch whose sigma is at most S.",
)
@click.option(
    "--target-noise",
    type=click.FloatRange(min=0, min_open=True),
    metavar="X",
    help="Find the smallest expected batch whose noise to signal over the round is at most X.",
)
@click.option("--offline", is_flag=True, help="Do not ask the registry: plan as if nothing were live.")
@click.option("--json", "want_json", is_flag=True, help="JSON instead of tables.")
@click.pass_obj
def plan(
    given: str | None,
    stream: str,
    *,
    rounds: int,
    target_sigma: float | None,
    target_noise: float | None,
    offline: bool,
    want_json: bool,
) -> None:
    """Plan STREAM's next rounds without running any: who can pay, sigma and rates, noise, how many rounds are left.

    Nothing is reserved and nothing private is read: blocks, sizes, policies and the ledger are all it looks at. Exit 1
    when the next round cannot be paid; the message has the blocks, what they lack and the choices.
    """
    from tidegate.wiring import open_service

    if target_sigma is not None and target_noise is not None:
        raise click.UsageError("--target-sigma and --target-noise: choose one")
    service = open_service(given)
    service.stream(stream)
    report = _report(service, stream, rounds, target_sigma, target_noise, offline=offline)
    if want_json:
        output.as_json(report)
    else:
        _show(report)


def _report(
    service: Service, stream: str, rounds: int, sigma: float | None, noise: float | None, *, offline: bool
) -> dict[str, Any]:
    from tidegate import budget
    from tidegate.planning import plan_arguments, survey

    settings = service.stream(stream)
    policy = service.policy(stream)
    found = survey(service, stream, () if offline else _versions(service, stream))
    arguments = plan_arguments(settings.learner)
    coming = budget.stand_in_for(policy, settings.ingest.block_offsets)
    note = found.idle
    if found.tried and not found.new and not note:
        found.require_new()
    whole = _with(found, coming)
    weights = _weights(service, stream, arguments)
    if sigma is not None or noise is not None:
        arguments = _calibrated(whole, arguments, sigma, noise, weights)
    plan = budget.next_plan(whole, arguments)
    arriving = tuple(found.new) or (coming,)
    return {
        "stream": stream,
        "promise": policy.promise(),
        "live_version": found.live_version,
        "assumed": "nothing is live (--offline)" if offline else "",
        "note": f"{note}: shown as if a block of {settings.ingest.block_offsets} offsets were sealed" if note else "",
        "next": _next(plan, found, arguments, weights),
        "attempts_left": budget.attempts_left(found, arguments),
        "blocks": [asdict(row) for row in budget.blocks_of(found, plan, arguments)],
        "rounds": [asdict(row) for row in budget.simulate(whole, arguments, rounds, arriving)],
        "budget": asdict(budget.assess(found, arguments, coming, policy, budget.holdouts_of(service, found))),
    }


def _versions(service: Service, stream: str) -> Sequence[ModelVersion]:
    from registry.errors import RegistryError
    from tidegate.errors import TidegateError

    try:
        return service.store.versions(service.model(stream))
    except RegistryError as error:
        raise TidegateError(
            f"{error}; what is live is not known; `tidegate plan {stream} --offline` plans as if nothing were"
        ) from None


def _with(found: Survey, coming: BlockAccount) -> Survey:
    """The survey with a block to come where none is new."""
    from dataclasses import replace

    return found if found.new else replace(found, new=(coming,))


def _weights(service: Service, stream: str, arguments: PlanArguments) -> int | None:
    """Trained weights; None while the base is not there: a dry run downloads nothing."""
    from learner.adapter import trained_weights
    from learner.base import is_prepared

    if not is_prepared(service.stream(stream).base, service.workspace.bases):
        return None
    return trained_weights(service.base(stream), arguments["lora"])


def _calibrated(
    found: Survey, arguments: PlanArguments, sigma: float | None, noise: float | None, weights: int | None
) -> PlanArguments:
    from tidegate import budget
    from tidegate.errors import TidegateError

    if noise is not None and weights is None:
        raise TidegateError(
            "--target-noise: needs the number of trained weights, and the base is not prepared yet; "
            "`tidegate round` or `tidegate serve` prepares it, or use --target-sigma"
        )
    plan = budget.batch_for(found, arguments, sigma=sigma, noise=noise, weights=weights or 0)
    return budget.replace_batch(arguments, int(plan.expected_batch + 1e-6))


def _next(plan: RoundPlan, found: Survey, arguments: PlanArguments, weights: int | None) -> dict[str, Any]:
    from tidegate import budget

    noise = budget.noise_to_signal(plan, weights) if weights else (None, None)
    return {
        "new": len(found.new),
        "replay": len(plan.blocks) - max(len(found.new), 1),
        "left_out": list(plan.left_out),
        "sigma": plan.sigma,
        "q_new": plan.blocks[0].q,
        "q_replay": budget.replay_rate(plan, arguments),
        "expected_batch": plan.expected_batch,
        "steps": plan.steps,
        "clip_norm": plan.clip_norm,
        "trained_weights": weights,
        "noise_to_signal_step": noise[0],
        "noise_to_signal_round": noise[1],
        "noise_formula": _FORMULA,
        "noise_caveat": _CAVEAT,
    }


def _show(report: dict[str, Any]) -> None:
    head = report["next"]
    output.say(f"{report['stream']}: a dry run; nothing is reserved")
    for line in (report["note"], report["assumed"]):
        if line:
            output.say(f"note     {line}")
    output.say(f"promise  {report['promise']}")
    output.say(
        f"next     {head['new']} new, {head['replay']} replay, {len(head['left_out'])} left out; "
        f"{head['steps']} steps, expected batch {head['expected_batch']:.4g}"
    )
    output.say(f"noise    sigma {head['sigma']:g}, q {head['q_new']:.4g} new, {head['q_replay']:.4g} replay")
    if head["trained_weights"]:
        output.say(
            f"         noise to signal {head['noise_to_signal_step']:.3g} a step, "
            f"{head['noise_to_signal_round']:.3g} over the round ({head['trained_weights']} weights)"
        )
        output.say(f"         = {_FORMULA}; {_CAVEAT}")
    else:
        output.say("         noise to signal unknown until the base is prepared")
    output.say(f"left     {report['attempts_left']} rounds on these blocks if no candidate is approved")
    _show_blocks(report["blocks"])
    _show_rounds(report["rounds"])
    for alarm in report["budget"]["alarms"]:
        output.say(f"BUDGET   {alarm}")


def _show_blocks(blocks: Sequence[dict[str, Any]]) -> None:
    rows = [
        (
            b["block"],
            b["use"],
            f"{b['share_used']:.1%}",
            f"{b['share_after']:.1%}",
            f"{b['missing']:.1%}" if b["missing"] else "",
            "" if b["times_left"] is None else b["times_left"],
            b["rounds_left"],
        )
        for b in blocks
    ]
    columns = ("block", "use", "filter used", "after", "missing", "times new left", "replays left")
    output.table("", columns, rows)


def _show_rounds(rounds: Sequence[dict[str, Any]]) -> None:
    if not rounds:
        return
    rows = [
        (
            r["number"],
            r["new"],
            r["replay"],
            len(r["left_out"]),
            f"{r['sigma']:g}",
            f"{r['q_new']:.4g}",
            f"{r['share_median']:.1%}",
            f"{r['share_max']:.1%}",
        )
        for r in rounds
    ]
    title = "if every candidate is approved and as many new blocks come each time"
    columns = ("round", "new", "replay", "left out", "sigma", "q", "median used after", "fullest used after")
    output.table(title, columns, rows)
