"""From a trained adapter to a version a person can judge: gates, signed verdict, report, MLflow, git."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.states import waiting
from tidegate import holdout

if TYPE_CHECKING:
    from evaluation.verdict import Evaluation
    from learner.base import Base
    from tidegate.cycle import Trained
    from tidegate.wiring import Service


def judge(
    service: Service, trained: Trained, base: Base, tell: Callable[[str, int, int], None]
) -> tuple[Evaluation, dict[str, Any]]:
    """Run the gates on candidate, live and base; returns the evaluation and its signed verdict."""
    from evaluation.gates import GatePolicy, evaluate
    from evaluation.gateset import GateSet
    from serving.inprocess import InProcessEngine

    plan = trained.plan
    settings = service.stream(plan.stream)
    tell("evaluate", 0, 1)
    gate_set = GateSet.load(service.workspace.root / settings.evaluation.gate_set)
    engine = InProcessEngine(base, system=settings.learner.system, threads=service.settings.service.threads)
    with engine:
        engine.load("candidate", trained.adapter_dir)
        live = None
        if plan.parent_sha256:
            engine.load("live", service.workspace.adapters / plan.parent_sha256)
            live = "live"
        # A candidate of test noise can never be promoted: nobody in the holdout pays for it.
        wanted = settings.evaluation.private and plan.noise_source == "system"
        private = holdout.score(service, trained, engine, gate_set, tell) if wanted else None
        evaluation = evaluate(
            gate_set,
            GatePolicy(**settings.evaluation.model_dump(exclude={"gate_set", "private"})),
            engine,
            candidate="candidate",
            live=live,
            facts=facts_of(service, trained, base),
            private=private,
        )
    tell("evaluate", 1, 1)
    return evaluation, evaluation.verdict(service.signer("verdicts"))


def facts_of(service: Service, trained: Trained, base: Base) -> Any:
    """What the gates need to know besides scores: did the weights change, was the budget kept."""
    from evaluation.gates import CandidateFacts
    from learner.adapter import read_adapter

    plan = trained.plan
    policies = [service.ledger.policy(block.id) for block in plan.blocks]
    adapter = read_adapter(trained.adapter_dir, base=base)
    parent = read_adapter(service.workspace.adapters / plan.parent_sha256, base=base) if plan.parent_sha256 else None
    shares = [service.ledger.share_used(block.id) for block in plan.blocks]
    return CandidateFacts(
        adapter_sha256=trained.adapter_sha256,
        parent_sha256=plan.parent_sha256,
        base_sha256=base.sha256,
        max_abs_delta=adapter.max_abs_delta(parent),
        budget_kept=max(shares) <= 1.0,
        share_used=max(shares),
        epsilon=max(p.epsilon for p in policies),
        delta=max(p.delta for p in policies),
        unit=plan.unit,
        private=plan.noise_source == "system",
        promise="; ".join(sorted({policy.promise() for policy in policies})),
    )


def register(
    service: Service, trained: Trained, base: Base, evaluation: Evaluation, verdict: dict[str, Any]
) -> dict[str, Any]:
    """Make the MLflow version with its evidence, put it in Staging if it passed, keep plan and verdict in git."""
    from evaluation.report import plot_png, version_markdown
    from registry.mlflow_store import Candidate

    plan, stream, model = trained.plan, trained.plan.stream, service.model(trained.plan.stream)
    versions = service.store.versions(model)
    parent = next((v for v in versions if v.tag("adapter_sha256") == plan.parent_sha256), None)
    passed = evaluation.outcome == "passed"
    state = "candidate" if passed else evaluation.outcome
    facts = facts_of(service, trained, base)
    report = version_markdown(
        evaluation,
        data_revision=plan.data_revision,
        blocks=[b.id for b in plan.blocks],
        parent=f"version {parent.version}" if parent else "the base model",
        base=base,
    )
    folder = service.workspace.rounds(plan.round_id)
    (folder / "report.md").write_text(report, encoding="utf-8")
    (folder / "verdict.json").write_text(json.dumps(verdict, indent=2, sort_keys=True), encoding="utf-8")
    tags = {
        "state": state,
        "stream": stream,
        "round_id": plan.round_id,
        "attempt": str(plan.attempt),
        "adapter_sha256": trained.adapter_sha256,
        "parent_sha256": plan.parent_sha256 or "",
        "parent_version": str(parent.version) if parent else "",
        "base_sha256": base.sha256,
        "base_name": base.name,
        "base_licence": base.licence,
        "data_revision": plan.data_revision,
        "plan_hash": plan.plan_hash,
        "plan": json.dumps(plan.as_json(), sort_keys=True),
        "receipt": json.dumps(trained.receipt, sort_keys=True),
        "verdict": json.dumps(verdict, sort_keys=True),
    }
    version = service.store.register(
        Candidate(
            model=model,
            round_id=plan.round_id,
            attempt=plan.attempt,
            adapter_dir=trained.adapter_dir,
            tags={f"tidegate.{name}": value for name, value in tags.items()},
            description_md=report,
            artifacts={"accuracy.png": plot_png(evaluation), "report.md": report.encode()},
            metrics=evaluation.metrics(),
        )
    )
    if passed:
        for older in waiting(versions):
            if older.version != version:
                service.store.archive(model, older.version, state="superseded")
        service.store.to_staging(model, version)
    else:
        service.store.archive(model, version, state=state)
    keep_in_git(service, trained, evaluation, verdict)
    return {
        "stream": stream,
        "round_id": plan.round_id,
        "attempt": plan.attempt,
        "version": version,
        "outcome": evaluation.outcome,
        "state": state,
        "reasons": list(evaluation.reasons),
        "adapter_sha256": trained.adapter_sha256,
        "epsilon": facts.epsilon,
        "delta": facts.delta,
        "unit": facts.unit,
        "share_used": facts.share_used,
        "promise": facts.promise,
    }


def keep_in_git(service: Service, trained: Trained, evaluation: Evaluation, verdict: dict[str, Any]) -> None:
    """Commit plan, receipt, verdict and metrics beside the data they speak of; the newest also for `dvc repro`."""
    plan = trained.plan

    def encode(value: Any) -> bytes:
        return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()

    files = {
        "plan.json": encode(plan.as_json()),
        "receipt.json": encode(trained.receipt),
        "verdict.json": encode(verdict),
        "metrics.json": encode(evaluation.metrics()),
    }
    folder = Path("rounds") / plan.round_id
    paths = {str(folder / name): content for name, content in files.items()}
    # Where both chains stood: a later ledger without these hashes is not the one this round was charged in.
    heads = {"ledger_head": trained.receipt["ledger_head"], "approvals_head": service.approvals().head()}
    paths["round.json"] = encode({"round_id": plan.round_id, "adapter_sha256": trained.adapter_sha256, **heads})
    paths["params.yaml"] = service.workspace.params.read_bytes()
    service.repository().commit_files(paths, f"Record round {plan.round_id}")
