"""Tries one configuration of the demonstration's rounds on the example stream, without broker, registry or ledger.

Plan, noise, training, scoring and gates are the product's own; only the noise comes from a test key, so that a figure
can be made again. `make bench-tuning` runs what `params.yaml` says; every setting has a flag to try something else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Python puts this folder first, where bench/learner.py would stand in for the package `learner`.
sys.path[0] = str(ROOT)

from evaluation.gates import CandidateFacts, evaluate  # noqa: E402
from evaluation.gateset import GateSet  # noqa: E402
from evaluation.policy import GatePolicy  # noqa: E402
from evaluation.verdict import Evaluation  # noqa: E402
from ingest.record import Record, RecordLimits, parse  # noqa: E402
from ingest.split import split_of  # noqa: E402
from learner.adapter import read_adapter  # noqa: E402
from learner.base import Base, prepare_base  # noqa: E402
from learner.plan import BlockAccount, RoundPlan, plan_round  # noqa: E402
from privacy.accounting import epsilon_from_rdp, rdp  # noqa: E402
from privacy.policy import Policy  # noqa: E402
from privacy.randomness import TestKey  # noqa: E402
from tidegate.config import LearnerSettings, PrivacySettings, StreamSettings, load  # noqa: E402
from tidegate.planning import plan_arguments  # noqa: E402

STREAM = "support-desk"
# A fixed key: the same records are held out in every run. (A workspace draws its own.)
SPLIT_KEY = b"bench/tuning split"


def arguments() -> argparse.Namespace:
    """Flags; what is not given stands in params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attempts", type=int)
    parser.add_argument("--replay-share", type=float)
    parser.add_argument("--epsilon", type=float)
    parser.add_argument("--expected-batch", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--replay-rate", type=float)
    parser.add_argument("--clip-norm", type=float)
    parser.add_argument("--system")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--r", type=int)
    parser.add_argument("--alpha", type=float)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="one run of all rounds for each")
    parser.add_argument("--rounds", type=int, choices=(1, 2), default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bases", type=Path, default=ROOT / "workspace" / "bases", help="prepared base models")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "tuning.json")
    return parser.parse_args()


def configured(flags: argparse.Namespace) -> StreamSettings:
    """The stream's settings with the flags over them."""
    settings = load(ROOT / "params.yaml", environ={}).settings.streams[STREAM]
    given = {name: value for name, value in vars(flags).items() if value is not None}

    def over(section: Any) -> Any:
        return section.model_copy(update={name: given[name] for name in type(section).model_fields if name in given})

    learner: LearnerSettings = over(settings.learner)
    privacy: PrivacySettings = over(settings.privacy)
    return settings.model_copy(
        update={"privacy": privacy, "learner": learner.model_copy(update={"lora": over(learner.lora)})}
    )


def blocks_of(settings: StreamSettings) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """Training records by block, of the stream's first 60% and of the rest, sealed by offsets as ingest does."""
    ingest = settings.ingest
    limits = RecordLimits(
        frozenset(ingest.domains), frozenset(ingest.labels), ingest.prompt_chars_max, ingest.completion_chars_max
    )
    lines = (ROOT / "examples" / f"{STREAM}.jsonl").read_bytes().splitlines()
    cut, seen = len(lines) * 6 // 10, set()
    worlds: tuple[dict[str, list[Record]], dict[str, list[Record]]] = ({}, {})
    for index, raw in enumerate(lines):
        record = parse(raw, limits)
        if not isinstance(record, Record) or (record.user_id, record.event_id) in seen:
            continue
        seen.add((record.user_id, record.event_id))
        world = worlds[index >= cut]
        block = world.setdefault(f"b{(index - cut * (index >= cut)) // ingest.block_offsets}-{index >= cut:d}", [])
        if split_of(record.user_id, SPLIT_KEY, settings.privacy.holdout_share) == "train":
            block.append(record)
    return worlds


def planned(
    settings: StreamSettings,
    base: Base,
    seed: int,
    new: Sequence[str],
    spent: Mapping[str, tuple[float, ...]],
    parent_sha256: str | None,
) -> RoundPlan:
    """A plan over new blocks and those that have spent."""
    policy = policy_of(settings)
    frozen = policy.frozen(settings.ingest.block_offsets)
    return plan_round(
        round_id=f"tuning-{seed}-{'second' if spent else 'first'}",
        attempt=1,
        stream=STREAM,
        parent_sha256=parent_sha256,
        base_sha256=base.sha256,
        data_revision="0" * 40,
        new=[BlockAccount(name, frozen, (0.0,) * len(policy.orders)) for name in new],
        replay=[BlockAccount(name, frozen, paid) for name, paid in spent.items()],
        noise_source="test",
        **plan_arguments(settings.learner),
    )


def policy_of(settings: StreamSettings) -> Policy:
    """The blocks' policy."""
    return Policy(**settings.privacy.model_dump())


def judged(
    settings: StreamSettings, base: Base, plan: RoundPlan, adapter: Path, live: Path | None, threads: int
) -> Evaluation:
    """The candidate through the gates. Test noise guarantees nothing; the gates are asked as if it were real."""
    from serving.inprocess import InProcessEngine

    gates = settings.evaluation
    with InProcessEngine(base, system=settings.learner.system, threads=threads) as engine:
        engine.load("candidate", adapter)
        if live is not None:
            engine.load("live", live)
        candidate = read_adapter(adapter, base=base)
        parent = read_adapter(live, base=base) if live else None
        return evaluate(
            GateSet.load(ROOT / "examples" / f"{STREAM}-gates.jsonl"),
            GatePolicy(gates.gates, gates.samples_min, gates.samples_per_domain_min),
            engine,
            candidate="candidate",
            live="live" if live is not None else None,
            facts=CandidateFacts(
                adapter_sha256=candidate.sha256,
                parent_sha256=plan.parent_sha256,
                base_sha256=base.sha256,
                max_abs_delta=candidate.max_abs_delta(parent),
                budget_kept=True,
                share_used=0.0,
                epsilon=settings.privacy.epsilon,
                delta=settings.privacy.delta,
                unit=settings.privacy.unit,
                private=True,
            ),
        )


def one_round(
    settings: StreamSettings,
    base: Base,
    plan: RoundPlan,
    records: Mapping[str, Sequence[Record]],
    seed: int,
    parent: Path | None,
    folder: Path,
    threads: int,
) -> tuple[Path, dict[str, Any]]:
    """Train and judge; the adapter's folder and the figures."""
    from learner.round import Speed, run_round

    wall, cpu = time.monotonic(), time.process_time()
    output = run_round(
        plan,
        base=base,
        parent_dir=parent,
        records=records,
        key=TestKey(seed),
        system=settings.learner.system,
        checkpoint_dir=folder / "checkpoint",
        out_dir=folder / "adapter",
        max_tokens=settings.learner.max_tokens,
        speed=Speed(threads=threads, checkpoint_steps=settings.learner.checkpoint_steps),
    )
    trained_wall, trained_cpu = time.monotonic(), time.process_time()
    evaluation = judged(settings, base, plan, output.adapter_dir, parent, threads)
    orders = plan.orders
    paid = rdp(plan.blocks[0].q, plan.sigma, plan.steps, orders)
    return output.adapter_dir, {
        "seed": seed,
        "round": plan.round_id.rpartition("-")[2],
        "sigma": plan.sigma,
        "q": round(plan.blocks[0].q, 4),
        "epsilon_of_this_round": round(epsilon_from_rdp(paid, orders, settings.privacy.delta)[0], 2),
        "left_out": len(plan.left_out),
        "outcome": evaluation.outcome,
        "reasons": list(evaluation.reasons),
        "slices": [dataclasses.asdict(part) for part in evaluation.slices],
        "train_wall_s": round(trained_wall - wall, 1),
        "train_cpu_s": round(trained_cpu - cpu, 1),
        "judge_wall_s": round(time.monotonic() - trained_wall, 1),
        "judge_cpu_s": round(time.process_time() - trained_cpu, 1),
    }


def run(settings: StreamSettings, base: Base, seed: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """The first round from the base, and the second from it when the world has changed."""
    first, second = blocks_of(settings)
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = planned(settings, base, seed, list(first), {}, None)
        one, figures = one_round(settings, base, plan, first, seed, None, folder / "one", threads)
        found.append(figures)
        show(figures)
        if rounds > 1:
            paid = {b.id: rdp(b.q, plan.sigma, plan.steps, policy_of(settings).orders) for b in plan.blocks}
            parent = read_adapter(one, base=base).sha256
            plan = planned(settings, base, seed, list(second), paid, parent)
            _, figures = one_round(settings, base, plan, {**first, **second}, seed, one, folder / "two", threads)
            found.append(figures)
            show(figures)
    return found


def show(figures: Mapping[str, Any]) -> None:
    """A round as a few lines."""
    print(json.dumps({key: value for key, value in figures.items() if key != "slices"}), flush=True)
    for part in figures["slices"]:
        print("   ", json.dumps(part), flush=True)


def main() -> None:
    """Run it for each seed and keep the figures."""
    flags = arguments()
    settings = configured(flags)
    base = prepare_base(settings.base, flags.bases)
    found = [figures for seed in flags.seeds for figures in run(settings, base, seed, flags.rounds, flags.threads)]
    said = {"privacy": settings.privacy.model_dump(), "learner": settings.learner.model_dump(), "rounds": found}
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
