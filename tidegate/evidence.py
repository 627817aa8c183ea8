"""From a trained adapter to a version a person can judge: gates, signed verdict, report, MLflow, git."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from registry.states import waiting
from tidegate import holdout
from tidegate.errors import TidegateError
from tidegate.memory import Line, line_of
from tidegate.pruning import note

if TYPE_CHECKING:
    from evaluation.examples import Example
    from evaluation.gates import CandidateFacts
    from evaluation.gateset import GateSet
    from evaluation.policy import GatePolicy
    from evaluation.private import PrivateScores
    from evaluation.scorer import Role, Scorer
    from evaluation.verdict import Evaluation
    from learner.base import Base
    from learner.plan import RoundPlan
    from registry.states import ModelVersion
    from serving.inprocess import InProcessEngine
    from tidegate.cycle import Trained
    from tidegate.wiring import Service

log = structlog.get_logger()


def judge(
    service: Service, trained: Trained, base: Base, tell: Callable[[str, int, int], None]
) -> tuple[Evaluation, dict[str, Any]]:
    """Run the gates on candidate, live and base; returns the evaluation and its signed verdict."""
    from evaluation.private import PrivateScores
    from serving.inprocess import InProcessEngine

    plan = trained.plan
    settings = service.stream(plan.stream)
    gate_set = gate_set_of(service, plan.stream)
    live = service.workspace.adapters / plan.parent_sha256 if plan.parent_sha256 else None
    with InProcessEngine(base, system=settings.learner.system, threads=service.settings.service.threads) as engine:

        def private() -> PrivateScores:
            if plan.noise_source != "system":
                why = "a candidate without private noise: nobody in the holdout pays for it"
                return PrivateScores(None, refusal=why)
            return holdout.score(service, trained, engine, gate_set, tell)

        evaluation = judge_with(
            service,
            plan.stream,
            engine,
            gate_set,
            trained.adapter_dir,
            live,
            facts_of(service, trained, base),
            private=private,
            tell=tell,
            side_by_side=True,
        )
    return evaluation, evaluation.verdict(service.signer("verdicts"))


def judge_with(
    service: Service,
    stream: str,
    engine: InProcessEngine,
    gate_set: GateSet,
    candidate: Path,
    live: Path | None,
    facts: CandidateFacts,
    *,
    private: Callable[[], PrivateScores],
    tell: Callable[[str, int, int], None],
    everything: bool = False,
    side_by_side: bool = False,
) -> Evaluation:
    """Run a stream's policy on an adapter; nothing is signed, and nothing but `private` charges anybody.

    Args:
        service: the workspace.
        stream: whose policy.
        engine: holds the base; the adapters are loaded into it.
        gate_set: public.
        candidate: folder of the adapter.
        live: folder of what it is compared with; None: nothing is live.
        facts: what is known of the candidate besides its scores.
        private: scores on the holdout.
        tell: told how far it is.
        everything: also what costs more than a hard gate that failed.
        side_by_side: also let the models answer some public records, as examples.
    """
    from evaluation.cache import Cache
    from evaluation.gates import evaluate
    from evaluation.together import for_policy
    from learner.adapter import adapter_sha256
    from serving.inprocess import code_sha256
    from serving.timing import timed

    if not facts.problem:
        engine.load("candidate", candidate)
    folders = {"candidate": candidate}
    if live is not None:
        engine.load("live", live)
        folders["live"] = live
    policy = gate_policy(service, stream)
    names: dict[Role, str | None] = {"candidate": "candidate", "base": None}
    sha256: dict[str | None, str] = {"candidate": facts.adapter_sha256, None: ""}
    if live is not None:
        names["live"], sha256["live"] = "live", adapter_sha256(live)
    about = {"base": engine.base.sha256, "system": service.stream(stream).learner.system, "code": code_sha256()}
    scorer = for_policy(policy, gate_set, engine, names, sha256, about=about, cache=Cache(service.workspace.asked))
    evaluation = evaluate(
        gate_set,
        policy,
        scorer,
        candidate="candidate",
        live="live" if live is not None else None,
        facts=facts,
        private=private,
        everything=everything,
        folders=folders,
        root=service.workspace.root,
        timer=lambda adapter, prompts, max_tokens: timed(engine, adapter, prompts, max_tokens),
        progress=lambda done, total, _what: tell("evaluate", done, total),
    )
    if not side_by_side:
        return evaluation
    return replace(evaluation, examples=examples_of(evaluation, gate_set, scorer, names))


def examples_of(
    evaluation: Evaluation, gate_set: GateSet, scorer: Scorer, names: Mapping[Role, str | None]
) -> tuple[Example, ...]:
    """Public records side by side; none where the gates asked nobody for labels, since asking costs minutes."""
    from evaluation.examples import examples

    whole = next((part for part in evaluation.slices if not part.domain), None)
    scored: dict[Role, str | None] = {role: name for role, name in names.items() if whole and getattr(whole, role)}
    try:
        return examples(gate_set, scorer, scored)
    except Exception as error:  # noqa: BLE001 - the verdict stands without examples, whatever an engine throws
        log.warning("no examples", problem=type(error).__name__)
        return ()


def evaluate_version(
    service: Service,
    stream: str,
    number: int,
    tell: Callable[[str, int, int], None],
    *,
    everything: bool,
    side_by_side: bool = False,
) -> tuple[Evaluation, int | None]:
    """Run today's gates on any version against what is live now; returns the evaluation and the live version.

    The holdout is not asked, since that would be charged, and nothing is signed or written but fetched adapters.

    Raises:
        UnknownVersion: the model has no such version.
        TidegateError: the version is not of a round, or its stored adapter is not what it was registered as.
    """
    from evaluation.private import PrivateScores
    from learner.plan import RoundPlan
    from registry.promotion import pick
    from serving.inprocess import InProcessEngine
    from tidegate.ancestry import find_live

    settings = service.stream(stream)
    gate_policy(service, stream)
    gate_set = gate_set_of(service, stream)
    versions = service.store.versions(service.model(stream))
    chosen = pick(versions, service.model(stream), number)
    if not chosen.tag("plan"):
        raise TidegateError(f"version {number} of {stream} has no plan: it did not come out of a round; judge another")
    plan = RoundPlan.model_validate(json.loads(chosen.tag("plan")))
    live = find_live(versions, service.trusted("approvals"))
    wanted = (chosen.tag("adapter_sha256"), live.adapter_sha256 if live else None, plan.parent_sha256)
    folders = {sha: stored_adapter(service, stream, sha, versions) for sha in wanted if sha}
    base = service.base(stream, lambda done, of, what: tell(what, done, of))
    facts = facts_about(service, plan, folders[wanted[0] or ""], wanted[0] or "", base)
    refusal = "the holdout is not asked here: it would be charged; a round's own evaluation asks it"
    threads = service.settings.service.threads
    with InProcessEngine(base, system=settings.learner.system, threads=threads) as engine:
        evaluation = judge_with(
            service,
            stream,
            engine,
            gate_set,
            folders[wanted[0] or ""],
            folders[live.adapter_sha256] if live else None,
            facts,
            private=lambda: PrivateScores(None, refusal=refusal),
            tell=tell,
            everything=everything,
            side_by_side=side_by_side,
        )
    return evaluation, live.version if live else None


def page_of(service: Service, stream: str, number: int, evaluation: Evaluation) -> bytes:
    """The page of an evaluation that no round made: the same as a round's, of now.

    Raises:
        UnknownVersion: the model has no such version.
    """
    from evaluation.report import PAGE_NAME
    from learner.plan import RoundPlan
    from registry.approvals import now
    from registry.promotion import pick
    from tidegate.reports import reports

    versions = service.store.versions(service.model(stream))
    plan = RoundPlan.model_validate(json.loads(pick(versions, service.model(stream), number).tag("plan")))
    parent = next((v for v in versions if v.tag("adapter_sha256") == plan.parent_sha256), None)
    line = line_of(versions, parent, evaluation)
    base = service.base(stream, lambda *_: None)
    return reports(plan, base, evaluation, {"made_at": now()}, parent=parent, line=line)[PAGE_NAME]


def stored_adapter(service: Service, stream: str, sha256: str, versions: Sequence[ModelVersion]) -> Path:
    """The folder of an adapter, fetched from the registry when the workspace lost it.

    Raises:
        TidegateError: no version has it, or what is stored is another.
    """
    from learner.adapter import adapter_sha256

    kept = service.workspace.adapters / sha256
    if not kept.is_dir():
        number = next((v.version for v in versions if v.tag("adapter_sha256") == sha256), None)
        if number is None:
            raise TidegateError(f"adapter {sha256[:12]} of {stream} is in no version and not in the workspace")
        if gone := note(service.workspace.root, sha256):
            raise TidegateError(f"adapter {sha256[:12]} of version {number} was pruned {gone['at']} by {gone['who']}")
        service.store.fetch_adapter(service.model(stream), number, kept)
    if (found := adapter_sha256(kept)) != sha256:
        raise TidegateError(f"{kept}: holds adapter {found[:12]}, must hold {sha256[:12]}; remove it to fetch it again")
    return kept


def gate_policy(service: Service, stream: str) -> GatePolicy:
    """The gates of a stream, each with a metric that exists.

    Raises:
        PolicyError: a metric does not exist, or has no such option. Asked before a round is spent.
    """
    from evaluation.gates import check
    from evaluation.policy import GatePolicy

    settings = service.stream(stream).evaluation
    policy = GatePolicy(settings.gates, settings.samples_min, settings.samples_per_domain_min)
    check(policy)
    return policy


def gate_set_of(service: Service, stream: str) -> GateSet:
    """The public gate set of a stream.

    Raises:
        GateSetError: there is none, or it cannot be scored.
    """
    from evaluation.gateset import GateSet

    return GateSet.load(service.workspace.root / service.stream(stream).evaluation.gate_set)


def facts_of(service: Service, trained: Trained, base: Base) -> CandidateFacts:
    """What the gates need to know besides scores: did the weights change, was the budget kept."""
    return facts_about(service, trained.plan, trained.adapter_dir, trained.adapter_sha256, base)


def facts_about(
    service: Service, plan: RoundPlan, adapter_dir: Path, adapter_sha256: str, base: Base
) -> CandidateFacts:
    """The same of any adapter that a round of this workspace trained, by the ledger as it stands now."""
    from evaluation.gates import CandidateFacts
    from learner.adapter import read_adapter
    from learner.errors import AdapterError

    policies = [service.ledger.policy(block.id) for block in plan.blocks]
    parent = read_adapter(service.workspace.adapters / plan.parent_sha256, base=base) if plan.parent_sha256 else None
    delta, problem = math.nan, ""
    try:
        delta = read_adapter(adapter_dir, base=base).max_abs_delta(parent)
    except AdapterError as error:
        # Weights that are no numbers, or no weights: that is a verdict on the candidate, not the end of the round.
        problem = str(error)
    shares = [service.ledger.share_used(block.id) for block in plan.blocks]
    return CandidateFacts(
        adapter_sha256=adapter_sha256,
        parent_sha256=plan.parent_sha256,
        base_sha256=base.sha256,
        max_abs_delta=delta,
        budget_kept=max(shares) <= 1.0,
        share_used=max(shares),
        epsilon=max(p.epsilon for p in policies),
        delta=max(p.delta for p in policies),
        unit=plan.unit,
        private=plan.noise_source == "system",
        unprotected=not plan.private,
        open_stream=service.is_open(plan.stream),
        promise="; ".join(sorted({policy.promise() for policy in policies})),
        problem=problem,
        chosen_on=plan.stopping.signal_sha256 if plan.stopping else "",
    )


def register(
    service: Service, trained: Trained, base: Base, evaluation: Evaluation, verdict: dict[str, Any]
) -> dict[str, Any]:
    """Make the MLflow version with its evidence, put it in Staging if it passed, keep plan and verdict in git."""
    from evaluation.report import PAGE_NAME
    from registry.mlflow_store import Candidate
    from tidegate.reports import SUMMARY_NAME, datasets, reports

    plan, stream, model = trained.plan, trained.plan.stream, service.model(trained.plan.stream)
    versions = service.store.versions(model)
    parent = next((v for v in versions if v.tag("adapter_sha256") == plan.parent_sha256), None)
    line = line_of(versions, parent, evaluation)
    passed = evaluation.outcome == "passed"
    state = "candidate" if passed else evaluation.outcome
    facts = facts_of(service, trained, base)
    files = reports(plan, base, evaluation, verdict, parent=parent, line=line)
    folder = service.workspace.rounds(plan.round_id)
    for name in (PAGE_NAME, SUMMARY_NAME):
        (folder / name).write_bytes(files[name])
    (folder / "verdict.json").write_text(json.dumps(verdict, indent=2, sort_keys=True), encoding="utf-8")
    metrics = {**evaluation.metrics(), **(line.metrics() if line else {})}
    tags = _tags(trained, base, verdict, state=state, parent=parent, line=line)
    version = service.store.register(
        Candidate(
            model=model,
            round_id=plan.round_id,
            attempt=plan.attempt,
            adapter_dir=trained.adapter_dir,
            tags={f"tidegate.{name}": value for name, value in tags.items()},
            description_md=files[SUMMARY_NAME].decode(),
            artifacts=files,
            metrics=metrics,
            datasets=datasets(plan, evaluation),
        )
    )
    if passed:
        for older in waiting(versions):
            if older.version != version:
                service.store.archive(model, older.version, state="superseded")
        service.store.to_staging(model, version)
    else:
        service.store.archive(model, version, state=state)
    keep_in_git(service, trained, metrics, verdict)
    return {
        "stream": stream,
        "round_id": plan.round_id,
        "attempt": plan.attempt,
        "version": version,
        "outcome": evaluation.outcome,
        "state": state,
        "reasons": list(evaluation.reasons),
        "adapter_sha256": trained.adapter_sha256,
        "epsilon": facts.epsilon if plan.private else None,
        "delta": facts.delta if plan.private else None,
        "unit": facts.unit,
        "share_used": facts.share_used,
        "promise": facts.promise,
    }


def _tags(
    trained: Trained,
    base: Base,
    verdict: dict[str, Any],
    *,
    state: str,
    parent: ModelVersion | None,
    line: Line | None,
) -> dict[str, str]:
    """What a version carries for programs to read; what decides is signed."""
    plan = trained.plan
    return {
        "state": state,
        "stream": plan.stream,
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
        "continual": line.tag() if line else "",
        **({} if plan.private else {"guarantee": "none"}),
    }


def keep_in_git(service: Service, trained: Trained, metrics: dict[str, float], verdict: dict[str, Any]) -> None:
    """Commit plan, receipt, verdict and metrics beside the data they speak of; the newest also for `dvc repro`."""
    plan = trained.plan

    def encode(value: Any) -> bytes:
        return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()

    files = {
        "plan.json": encode(plan.as_json()),
        "receipt.json": encode(trained.receipt),
        "verdict.json": encode(verdict),
        "metrics.json": encode(metrics),
    }
    folder = Path("rounds") / plan.round_id
    paths = {str(folder / name): content for name, content in files.items()}
    # Where both chains stood: a later ledger without these hashes is not the one this round was charged in.
    heads = {"ledger_head": trained.receipt["ledger_head"], "approvals_head": service.approvals().head()}
    paths["round.json"] = encode({"round_id": plan.round_id, "adapter_sha256": trained.adapter_sha256, **heads})
    paths["params.yaml"] = service.workspace.params.read_bytes()
    service.repository().commit_files(paths, f"Record round {plan.round_id}")
