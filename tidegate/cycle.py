"""One round, from blocks to a registered version: the only place that orders ledger, learner, gates and registry.

    lock → resume what a crash left, else: pin → plan → reserve → start → train → commit + receipt → destroy the key
         → evaluate → signed verdict → MLflow version with its evidence → Staging if passed → plan and verdict into git

Every step leaves a file in `rounds/<round_id>/` or a row in the ledger before the next begins, so that a killed
round goes on where it was. Training resumes only exactly (same plan, data, base, code and key); anything else is a
new attempt and is charged in full.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from tidegate import heartbeat, switches
from tidegate.errors import RoundRefused
from tidegate.evidence import gate_policy, gate_set_of, judge, register
from tidegate.locks import Held, alone
from tidegate.planning import make_plan
from tidegate.stopping import keep_gate_set, signal_of
from tidegate.workspace import write_json as _write

if TYPE_CHECKING:
    from learner.base import Base
    from learner.plan import RoundPlan
    from learner.round import Speed
    from privacy.randomness import RoundKey, TestKey
    from tidegate.config import LearnerSettings
    from tidegate.wiring import Service

log = structlog.get_logger()

KEY_FILE = "round.key"

Progress = Callable[[str, int, int], None]
"""Called with (what, done, of). Never with a loss, a norm or a draw's size: those are private."""


@dataclass(frozen=True)
class NothingToDo:
    """Why no round ran, though nothing is wrong."""

    stream: str
    reason: str


@dataclass(frozen=True)
class RoundEnd:
    """What one round came to."""

    stream: str
    round_id: str
    attempt: int
    version: int
    outcome: str
    state: str
    reasons: tuple[str, ...]
    adapter_sha256: str
    epsilon: float | None
    delta: float | None
    unit: str
    share_used: float
    promise: str = ""


@dataclass(frozen=True)
class Trained:
    """A committed round: its plan, adapter folder and signed receipt."""

    plan: RoundPlan
    adapter_dir: Path
    adapter_sha256: str
    receipt: dict[str, Any]


def run(
    service: Service, stream: str, *, progress: Progress | None = None, test_seed: int | None = None
) -> RoundEnd | NothingToDo:
    """Run one round of a stream, or finish the one a crash left.

    Args:
        service: the workspace.
        stream: its name.
        progress: called while training and evaluating.
        test_seed: train with reproducible noise. The ledger then says epsilon infinity for the round's blocks and the
            version cannot be promoted.

    Raises:
        RoundRefused: another round runs, or noise from a seed was asked for where the settings do not allow it.
        PlanError, BudgetExceeded: no block can pay; the message has the choices.
        PolicyError, GateSetError: the candidate could not be judged; nothing was spent.
    """
    if test_seed is not None and not service.stream(stream).learner.test_noise:
        raise RoundRefused(
            f"--test-noise={test_seed}: a known seed hides nobody, and the blocks' epsilon would be infinity for good; "
            f"set streams.{stream}.learner.test_noise: true where no record is private"
        )
    service.stream(stream)
    workspace = service.workspace
    if told := switches.paused(workspace, stream):
        raise RoundRefused(
            f"stream={stream}: is paused {switches.words(told)}; `tidegate resume {stream} --why ...` lets rounds begin"
        )
    with (
        only_round(service, stream),
        heartbeat.beating(heartbeat.beat_file(workspace, stream), progress or _unheard) as tell,
    ):
        end = _run(service, stream, tell, test_seed)
        said = end.reason if isinstance(end, NothingToDo) else f"version {end.version}: {end.outcome}, now {end.state}"
        heartbeat.ended(heartbeat.beat_file(workspace, stream), said)
        heartbeat.hold_file(workspace, stream).unlink(missing_ok=True)  # whatever held the stream, its rounds end again
        return end


def _unheard(_what: str, _done: int, _of: int) -> None:
    pass


def _run(service: Service, stream: str, tell: Progress, test_seed: int | None) -> RoundEnd | NothingToDo:
    require_whole_ledger(service)
    # What would keep the candidate from being judged is found before anything is spent on it.
    gate_policy(service, stream)
    gate_set_of(service, stream)
    plan = _unfinished(service, stream)
    if plan is None:
        fresh = make_plan(service, stream, tell, test_noise=test_seed is not None)
        if isinstance(fresh, str):
            return NothingToDo(stream, fresh)
        plan = fresh
        folder = service.workspace.rounds(plan.round_id)
        # The plan comes last: with it the round is there to be resumed, and needs all the rest.
        keep_gate_set(service, plan)
        if test_seed is not None:
            _write(folder / "seed.json", test_seed)
        _write(folder / "plan.json", plan.as_json())
    base = service.base(stream, lambda done, of, what: tell(what, done, of))
    trained = _train_or_abandon(service, plan, base, tell)
    evaluation, verdict = judge(service, trained, base, tell)
    end = register(service, trained, base, evaluation, verdict)
    _write(service.workspace.rounds(plan.round_id) / "ended.json", end)
    log.info("round ended", **{k: v for k, v in end.items() if k != "reasons"})
    return RoundEnd(**{**end, "reasons": tuple(end["reasons"])})


@contextmanager
def only_round(service: Service, stream: str) -> Iterator[None]:
    """Held while a round of the stream runs, or while none may.

    Raises:
        RoundRefused: another process holds it.
    """
    try:
        with alone(heartbeat.lock_file(service.workspace, stream)):
            yield
    except Held as held:
        raise RoundRefused(f"stream={stream}: a round runs already (pid {held.pid}); wait for it") from None


def _unfinished(service: Service, stream: str) -> RoundPlan | None:
    """The plan of the round a crash or Ctrl-C left without an end."""
    from learner.plan import RoundPlan

    for file in sorted((service.workspace.root / "rounds").glob("*/plan.json")):
        plan = RoundPlan.model_validate(json.loads(file.read_text(encoding="utf-8")))
        if plan.stream == stream and not (file.parent / "ended.json").exists():
            log.info("round resumes", stream=stream, round=plan.round_id, attempt=plan.attempt)
            return plan
    return None


def _train_or_abandon(service: Service, plan: RoundPlan, base: Base, tell: Progress) -> Trained:
    """Train; a round that cannot end as planned is closed, so that the next one can be planned; spent stays spent."""
    from learner.errors import AdapterError, RoundError
    from privacy.errors import BudgetExceeded

    try:
        return _train(service, plan, base, tell)
    except (RoundError, AdapterError, BudgetExceeded) as error:
        folder = service.workspace.rounds(plan.round_id)
        attempts = int(json.loads((folder / "plan.json").read_text(encoding="utf-8"))["attempt"])
        for attempt in range(1, attempts + 1):
            _discard(service.workspace.checkpoints(plan.round_id, attempt))
        _write(folder / "ended.json", {"round_id": plan.round_id, "state": "abandoned", "reason": str(error)})
        log.warning("round abandoned", stream=plan.stream, round=plan.round_id, attempt=attempts)
        raise


def _train(service: Service, plan: RoundPlan, base: Base, tell: Progress) -> Trained:
    """Reserve, start, train, commit; on a resume that is not exact, the same again as the next attempt."""
    from learner.errors import ResumeRefused
    from learner.plan import code_sha256

    committed = _committed(service, plan)
    if committed is not None:
        return committed
    reason = "planned by other code than runs now"
    if plan.code_sha256 == code_sha256():
        try:
            return _attempt(service, plan, base, tell)
        except ResumeRefused as error:
            reason = str(error)
    again = plan.model_copy(update={"attempt": plan.attempt + 1, "code_sha256": code_sha256()})
    log.warning("new attempt", stream=plan.stream, round=plan.round_id, attempt=again.attempt, reason=reason)
    _discard(service.workspace.checkpoints(plan.round_id, plan.attempt))
    _write(service.workspace.rounds(plan.round_id) / "plan.json", again.as_json())
    return _attempt(service, again, base, tell)


def _committed(service: Service, plan: RoundPlan) -> Trained | None:
    """The outcome of a committed attempt; a receipt that a crash kept from being written is made up for."""
    rows = [r for r in service.ledger.rows(plan.stream) if (r.round_id, r.attempt) == (plan.round_id, plan.attempt)]
    if not rows or rows[-1].state != "committed":
        return None
    sha = rows[-1].adapter_sha256
    kept = service.workspace.adapters / sha
    if not kept.is_dir():
        raise RoundRefused(
            f"round={plan.round_id} attempt={plan.attempt}: was charged, but adapters/{sha[:16]} is gone; it cannot be "
            f"trained again: restore it, or remove rounds/{plan.round_id}/ to plan a new round"
        )
    file = service.workspace.rounds(plan.round_id) / "receipt.json"
    if not file.exists():
        _write(file, _receipt(service, plan, sha))
    _discard(service.workspace.checkpoints(plan.round_id, plan.attempt))
    return Trained(plan, kept, sha, json.loads(file.read_text(encoding="utf-8")))


def _attempt(service: Service, plan: RoundPlan, base: Base, tell: Progress) -> Trained:
    from learner.round import run_round

    ledger = service.ledger
    folder = service.workspace.checkpoints(plan.round_id, plan.attempt)
    folder.mkdir(parents=True, exist_ok=True)
    row = ledger.reserve(
        plan.stream,
        plan.round_id,
        plan.attempt,
        plan.plan_hash,
        plan.charges(),
        noise_source=plan.noise_source,
        uncharged=() if plan.private else [block.id for block in plan.blocks],
    )
    key = _key(service, plan, folder / KEY_FILE, fresh=row.state == "reserved")
    ledger.start(plan.round_id, plan.attempt, plan.plan_hash)
    records = _records(service, plan, tell)
    learner = service.stream(plan.stream).learner
    output = run_round(
        plan,
        base=base,
        parent_dir=_parent_dir(service, plan),
        records=records,
        key=key,
        system=learner.system,
        checkpoint_dir=folder / "steps",
        out_dir=folder / "adapter",
        max_tokens=learner.max_tokens,
        progress=lambda step, steps: tell("train", step, steps),
        speed=_speed(service, learner),
        signal=signal_of(service, plan),
    )
    kept = service.workspace.adapters / output.adapter_sha256
    if not kept.exists():
        shutil.copytree(output.adapter_dir, kept)
    ledger.commit(plan.round_id, plan.attempt, plan.plan_hash, adapter_sha256=output.adapter_sha256)
    receipt = _receipt(service, plan, output.adapter_sha256)
    _write(service.workspace.rounds(plan.round_id) / "receipt.json", receipt)
    _discard(folder)
    return Trained(plan, kept, output.adapter_sha256, receipt)


def _speed(service: Service, learner: LearnerSettings) -> Speed:
    from learner.round import Speed

    return Speed(
        threads=service.settings.service.threads,
        checkpoint_steps=learner.checkpoint_steps,
        precision=learner.precision,
        recompute=learner.recompute,
    )


def _discard(folder: Path) -> None:
    """End an attempt: the key is overwritten first, then everything goes."""
    from privacy.randomness import RoundKey

    RoundKey.destroy(folder / KEY_FILE)
    shutil.rmtree(folder, ignore_errors=True)


def require_whole_ledger(service: Service) -> int:
    """Insist that the ledger has every row that a receipt of this workspace names; returns how many receipts there are.

    Raises:
        SignatureError: a receipt was changed.
        LedgerBehindReceipt: an older backup of the ledger was restored: what was spent since is unknown.
    """
    from privacy.receipts import read_receipt

    trusted = service.trusted("receipts")
    files = sorted((service.workspace.root / "rounds").glob("*/receipt.json"))
    for file in files:
        service.ledger.require_head(read_receipt(json.loads(file.read_text(encoding="utf-8")), trusted).ledger_head)
    return len(files)


def _key(service: Service, plan: RoundPlan, file: Path, *, fresh: bool) -> RoundKey | TestKey:
    """The round's key: made when nothing private was read yet, else the very same one.

    Raises:
        ResumeRefused: the round has started and its key is gone, or is what a crash left of it.
    """
    from learner.errors import ResumeRefused
    from privacy.errors import RandomnessError
    from privacy.randomness import RoundKey, TestKey

    if plan.noise_source == "test":
        return TestKey(seed_of(service, plan.round_id))
    if fresh:
        # A key that a crash left before `start` was never used.
        file.unlink(missing_ok=True)
        return RoundKey.create(file)
    if not file.exists():
        raise ResumeRefused(f"round={plan.round_id} attempt={plan.attempt}: its key is gone; a new attempt starts")
    try:
        return RoundKey.load(file)
    except RandomnessError as error:
        raise ResumeRefused(f"round={plan.round_id} attempt={plan.attempt}: {error}") from None


def seed_of(service: Service, round_id: str) -> int:
    """The seed of a round with test noise, as it was given."""
    return int(json.loads((service.workspace.rounds(round_id) / "seed.json").read_text(encoding="utf-8")))


def _records(service: Service, plan: RoundPlan, tell: Progress) -> dict[str, Any]:
    """Training rows of the plan's blocks, from a clone pinned to the plan's revision."""
    tell("read blocks", 0, len(plan.blocks))
    repo = service.repository()
    pinned = repo.checkout(plan.data_revision, service.workspace.run / f"clone-{plan.stream}")
    manifests = {m.block_id: m for m in repo.manifests(plan.stream, revision=plan.data_revision)}
    records = {}
    for done, block in enumerate(plan.blocks, start=1):
        records[block.id] = pinned.records(manifests[block.id], split="train")
        tell("read blocks", done, len(plan.blocks))
    return records


def _parent_dir(service: Service, plan: RoundPlan) -> Path | None:
    """The adapter the round starts from, fetched from the registry when the workspace lost it."""
    if not plan.parent_sha256:
        return None
    kept = service.workspace.adapters / plan.parent_sha256
    if not kept.exists():
        model = service.model(plan.stream)
        for version in service.store.versions(model):
            if version.tag("adapter_sha256") == plan.parent_sha256:
                service.store.fetch_adapter(model, version.version, kept)
    return kept


def _receipt(service: Service, plan: RoundPlan, adapter_sha256: str) -> dict[str, Any]:
    from privacy.receipts import guarantee_of, make_receipt

    said = guarantee_of(plan.noise_source, [service.ledger.policy(block.id) for block in plan.blocks])
    return make_receipt(
        plan_hash=plan.plan_hash,
        adapter_sha256=adapter_sha256,
        ledger_head=service.ledger.head(),
        unit=said.unit,
        epsilon=said.epsilon,
        delta=said.delta,
        horizon=said.horizon,
        claim=said.claim,
        signer=service.signer("receipts"),
    )


def train_with_test_noise(service: Service, plan: RoundPlan, folder: Path) -> Path:
    """Train a test-noise plan again into `folder`, charging nothing: its epsilon is infinity already."""
    from learner.round import run_round
    from privacy.randomness import TestKey

    learner = service.stream(plan.stream).learner
    return run_round(
        plan,
        base=service.base(plan.stream),
        parent_dir=_parent_dir(service, plan),
        records=_records(service, plan, lambda _what, _done, _of: None),
        key=TestKey(seed_of(service, plan.round_id)),
        system=learner.system,
        checkpoint_dir=folder / "steps",
        out_dir=folder / "adapter",
        max_tokens=learner.max_tokens,
        speed=_speed(service, learner),
        signal=signal_of(service, plan),
    ).adapter_dir
