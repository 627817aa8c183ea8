"""One private evaluation: plan → reserve → start → read the holdout → release noisy counts → commit → destroy the key.

The same rules as for a round. Charges are durable before the first holdout byte is read. What is released is on disk
before it is committed, so that a crash after it uses it again and one before it has released nothing: that one resumes
with the same key and plan, or, where either is gone, is charged again as the next attempt.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from tidegate.budget import evaluation_sigma
from tidegate.workspace import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from evaluation.gateset import GateSet
    from evaluation.private import Marked, NoisyCounts, PrivatePlan, PrivateScores
    from evaluation.scorer import Scorer
    from ingest.manifest import Manifest
    from learner.plan import RoundPlan
    from privacy.ledger import LedgerRow
    from privacy.policy import Policy
    from privacy.randomness import RoundKey, TestKey
    from tidegate.cycle import Trained
    from tidegate.wiring import Service

log = structlog.get_logger()

KEY_FILE = "round.key"
PLAN_FILE = "private-plan.json"
RESULT_FILE = "private.json"


def evaluation_id(round_id: str) -> str:
    """The ledger's name of the evaluation of a round's candidate."""
    return f"{round_id}-holdout"


def score(
    service: Service,
    trained: Trained,
    scorer: Scorer,
    gate_set: GateSet,
    tell: Callable[[str, int, int], None],
    *,
    test_seed: int | None = None,
) -> PrivateScores:
    """Score a candidate, and what is live beside it, on the holdouts that can pay.

    Args:
        service: the workspace.
        trained: the committed round.
        scorer: holds the adapters `candidate` and, where the round has a parent, `live`.
        gate_set: public; its labels and how each is said are what the models choose from.
        tell: progress; never a number of records.
        test_seed: reproducible noise: the ledger then says epsilon infinity for the holdouts it charges.

    Raises:
        LedgerError: the ledger cannot be used. A budget that is spent is no error: it is the scores' `refusal`.
    """
    from privacy.errors import BudgetExceeded

    folder = service.workspace.rounds(trained.plan.round_id)
    plan = _kept_plan(folder)
    if plan is None or not _goes_on(service, folder, plan, trained.adapter_sha256, gate_set):
        if problem := _broken(scorer, gate_set):
            return _refused(f"the engine cannot score a public record ({problem}); nothing was read or charged")
        attempt = 1 if plan is None else _next_attempt(service, plan)
        fresh = _plan(service, trained.plan, trained.adapter_sha256, gate_set, attempt, test=test_seed is not None)
        if isinstance(fresh, str):
            return _refused(fresh)
        plan = fresh
        write_json(folder / PLAN_FILE, plan.as_json())
    try:
        counts = _released(folder, plan) or _release(service, plan, scorer, gate_set, folder, tell, test_seed)
    except BudgetExceeded as error:  # another process was faster
        return _refused(f"{error}; {_made(service, plan.stream)}")
    service.ledger.commit(plan.evaluation_id, plan.attempt, plan.plan_hash, adapter_sha256=plan.candidate_sha256)
    _discard(service, plan)
    left = _left(service, plan)
    log.info("holdout scored", stream=plan.stream, evaluation=plan.evaluation_id, blocks=len(plan.blocks), left=left)
    return _scores(counts, plan, left)


def _refused(why: str) -> PrivateScores:
    from evaluation.private import PrivateScores

    return PrivateScores(None, refusal=why)


def _scores(counts: NoisyCounts, plan: PrivatePlan, left: int) -> PrivateScores:
    from evaluation.private import PrivateScores

    return PrivateScores(counts, charge_id=plan.evaluation_id, blocks=plan.blocks, evaluations_left=left)


# -- planning ----------------------------------------------------------------------------------------------------------


def _kept_plan(folder: Path) -> PrivatePlan | None:
    """The plan that a crash left."""
    from evaluation.private import PrivatePlan

    file = folder / PLAN_FILE
    return PrivatePlan.from_json(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def _rows(service: Service, plan: PrivatePlan) -> list[LedgerRow]:
    mine = (plan.evaluation_id, plan.attempt)
    return [row for row in service.ledger.rows(plan.stream) if (row.round_id, row.attempt) == mine]


def _goes_on(service: Service, folder: Path, plan: PrivatePlan, candidate_sha256: str, gate_set: GateSet) -> bool:
    """Whether an attempt can be finished as it was planned: released already, not begun, or with its very key."""
    from learner.plan import code_sha256
    from privacy.canonical import sha256_of
    from privacy.errors import RandomnessError
    from privacy.randomness import RoundKey

    same = (plan.candidate_sha256, plan.answers_sha256) == (candidate_sha256, sha256_of(dict(gate_set.answers)))
    rows = _rows(service, plan)
    state = rows[-1].state if rows else "planned"
    if same and _released(folder, plan) is not None:
        return state in {"started", "committed"}
    if not same or plan.code_sha256 != code_sha256() or state in {"committed", "cancelled"}:
        return False
    if state == "started" and plan.noise_source == "system":
        try:
            RoundKey.load(_key_file(service, plan))
        except RandomnessError:
            return False
    return True


def _next_attempt(service: Service, plan: PrivatePlan) -> int:
    """One more than the attempt that cannot go on; what it reserved and never read is given back."""
    rows = _rows(service, plan)
    if rows and rows[-1].state == "reserved":
        service.ledger.cancel(plan.evaluation_id, plan.attempt, rows[-1].plan_hash)
    return plan.attempt + 1


def _broken(scorer: Scorer, gate_set: GateSet) -> str:
    """Why the engine cannot score a public record; empty when it can."""
    from evaluation.scorer import one_line

    try:
        scorer.score_labels("candidate", [gate_set.records[0].prompt], list(gate_set.answers.values()))
    except Exception as error:  # noqa: BLE001 - whatever an engine throws must end in `undecided`
        return one_line(error)
    return ""


def _plan(
    service: Service, of: RoundPlan, candidate_sha256: str, gate_set: GateSet, attempt: int, *, test: bool
) -> PrivatePlan | str:
    """A plan over every holdout that can pay, or why there is none."""
    from evaluation.private import PrivatePlan
    from learner.plan import code_sha256
    from privacy.canonical import sha256_of

    manifests = service.repository().manifests(of.stream, revision=of.data_revision)
    policies = _with_account(service, manifests)
    if not policies:
        return (
            "no block has a holdout account (privacy.holdout_evaluations=0 when they were sealed), so no holdout is "
            "read; blocks sealed from now on have one if it is > 0"
        )
    able, sigma = _able(service, policies)
    if not able:
        names = ", ".join(policies)
        return (
            f"the holdouts of blocks {names} cannot pay for another evaluation; {_made(service, of.stream)}; wait for "
            f"new blocks, which bring a holdout of their own, or take data: private out of evaluation.gates"
        )
    return PrivatePlan(
        evaluation_id=evaluation_id(of.round_id),
        attempt=attempt,
        stream=of.stream,
        candidate_sha256=candidate_sha256,
        live_sha256=of.parent_sha256,
        base_sha256=of.base_sha256,
        data_revision=of.data_revision,
        unit=next(iter(policies.values())).unit,
        blocks=able,
        sigma=sigma,
        domains=tuple(service.stream(of.stream).ingest.domains),
        answers_sha256=sha256_of(dict(gate_set.answers)),
        code_sha256=code_sha256(),
        noise_source="test" if test else "system",
    )


def _with_account(service: Service, manifests: Sequence[Manifest]) -> dict[str, Policy]:
    """Policies of the blocks that have a holdout account, of one unit and horizon: those of the newest of them."""
    found = {m.block_id: service.ledger.policy(m.block_id) for m in manifests if service.ledger.knows(m.block_id)}
    found = {name: policy for name, policy in found.items() if policy.holdout_evaluations}
    if not found:
        return {}
    newest = found[max((m for m in manifests if m.block_id in found), key=lambda m: (m.sealed_at, m.seq)).block_id]
    kind = (newest.unit, newest.horizon)
    return {name: policy for name, policy in found.items() if (policy.unit, policy.horizon) == kind}


def _able(service: Service, policies: Mapping[str, Policy]) -> tuple[tuple[str, ...], float]:
    """Blocks that can pay, by the ledger alone, and the noise at which they can: the strictest block's."""
    from privacy.counts import CountsMechanism

    names = tuple(policies)
    while names:
        sigma = max(_sigmas(policies[name] for name in names))
        short = {s.block_id for s in service.ledger.shortfalls(CountsMechanism(1, sigma).charges(names), "holdout")}
        if not short:
            return names, sigma
        # A user may be in any block, so those of unit user pay together or not at all.
        together = any(policies[name].unit == "user" for name in names)
        names = () if together else tuple(name for name in names if name not in short)
    return (), 0.0


def _sigmas(policies: Iterable[Policy]) -> set[float]:
    """Blocks are sealed under few different policies: each is calibrated once."""
    return {evaluation_sigma(policy) for policy in set(policies)}


def _made(service: Service, stream: str) -> str:
    rows = [row for row in service.ledger.rows(stream) if row.account == "holdout"]
    released = {(row.round_id, row.attempt) for row in rows if row.state == "cancelled"}
    count = sum(row.state == "reserved" and (row.round_id, row.attempt) not in released for row in rows)
    return f"{count} evaluations were paid for, none is left"


def _left(service: Service, plan: PrivatePlan) -> int:
    """How many more evaluations at this noise there can be until none of these holdouts can pay."""
    from privacy.counts import affordable

    found = []
    for account in service.ledger.accounts(plan.blocks).values():
        policy, spent = account.policy, account.holdout_spent
        most = policy.holdout_evaluations
        found.append(affordable(plan.sigma, policy.orders, policy.holdout_caps, most, spent))
    return max(found)


# -- running -----------------------------------------------------------------------------------------------------------


def _release(
    service: Service,
    plan: PrivatePlan,
    scorer: Scorer,
    gate_set: GateSet,
    folder: Path,
    tell: Callable[[str, int, int], None],
    test_seed: int | None,
) -> NoisyCounts:
    """Charge, read, count, add noise; the counts are on disk when it returns."""
    from privacy.randomness import KeyedStream

    row = service.ledger.reserve(
        plan.stream,
        plan.evaluation_id,
        plan.attempt,
        plan.plan_hash,
        plan.charges(),
        noise_source=plan.noise_source,
        account="holdout",
    )
    key = _key(service, plan, test_seed, fresh=row.state == "reserved")
    service.ledger.start(plan.evaluation_id, plan.attempt, plan.plan_hash)
    tell("score the holdout", 0, 1)
    marked = _marked(service, plan, scorer, gate_set)
    context = {"plan": plan.plan_hash, "data": plan.data_revision, "base": plan.base_sha256, "code": plan.code_sha256}
    counts = plan.release(marked, KeyedStream(key, context, 0))
    write_json(folder / RESULT_FILE, {"plan_hash": plan.plan_hash, "counts": counts.as_json()})
    tell("score the holdout", 1, 1)
    return counts


def _marked(service: Service, plan: PrivatePlan, scorer: Scorer, gate_set: GateSet) -> list[Marked]:
    """Who was right about each holdout record of the plan's blocks; a redelivery in a later block counts once."""
    from evaluation.private import Marked, right

    repo = service.repository()
    pinned = repo.checkout(plan.data_revision, service.workspace.run / f"clone-{plan.stream}")
    manifests = {m.block_id: m for m in repo.manifests(plan.stream, revision=plan.data_revision)}
    records: dict[tuple[str, str], Any] = {}
    for block in plan.blocks:
        for record in pinned.records(manifests[block], split="holdout"):
            records.setdefault((record.user_id, record.event_id), record)
    asked = [(r.prompt, r.completion if r.label is None else r.label) for r in records.values()]
    candidate = right(scorer, "candidate", asked, gate_set.answers)
    live = right(scorer, "live", asked, gate_set.answers) if plan.paired else [None] * len(asked)
    return [
        Marked(user if plan.unit == "user" else json.dumps([user, event]), record.domain, ours, theirs)
        for ((user, event), record), ours, theirs in zip(records.items(), candidate, live, strict=True)
    ]


def _released(folder: Path, plan: PrivatePlan) -> NoisyCounts | None:
    """The counts of this very plan, if they were released already."""
    from evaluation.private import NoisyCounts

    file = folder / RESULT_FILE
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return NoisyCounts.from_json(kept["counts"]) if kept.get("plan_hash") == plan.plan_hash else None


def _key_file(service: Service, plan: PrivatePlan) -> Path:
    return service.workspace.checkpoints(plan.evaluation_id, plan.attempt) / KEY_FILE


def _key(service: Service, plan: PrivatePlan, test_seed: int | None, *, fresh: bool) -> RoundKey | TestKey:
    """The evaluation's key: made when nothing was read yet, else the very same one."""
    from privacy.randomness import RoundKey, TestKey

    if plan.noise_source == "test":
        return TestKey(test_seed or 0)
    file = _key_file(service, plan)
    if not fresh:
        return RoundKey.load(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    # A key that a crash left before `start` was never used.
    file.unlink(missing_ok=True)
    return RoundKey.create(file)


def _discard(service: Service, plan: PrivatePlan) -> None:
    """Overwrite and remove the keys of this attempt and of those before it."""
    import shutil

    from privacy.randomness import RoundKey

    for attempt in range(1, plan.attempt + 1):
        file = _key_file(service, replace(plan, attempt=attempt))
        RoundKey.destroy(file)
        shutil.rmtree(file.parent, ignore_errors=True)
