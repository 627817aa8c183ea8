"""Which blocks a round may use: chosen by ancestry, age and budget, never by looking at content."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import structlog

from registry.states import ModelVersion, waiting
from tidegate import ancestry
from tidegate.errors import RoundRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ingest.manifest import Manifest
    from learner.plan import BlockAccount, RoundPlan
    from privacy.ledger import Charge
    from tidegate.wiring import Service

log = structlog.get_logger()


def make_plan(
    service: Service, stream: str, tell: Callable[[str, int, int], None], *, test_noise: bool
) -> RoundPlan | str:
    """A plan for the stream's next round, or the reason why none is due.

    Raises:
        RoundRefused: every new block has been tried as often as its policy allows.
        PlanError: no block can pay.
    """
    from learner.plan import LoraSettings, OptimiserSettings, plan_round

    settings = service.stream(stream)
    repo = service.repository()
    revision = repo.pin(stream)
    manifests = register_blocks(service, stream, revision)
    if not manifests:
        return "no block is sealed yet"
    versions = service.store.versions(service.model(stream))
    live = ancestry.find_live(versions, service.trusted("approvals"))
    waiting = _fresh_candidates(service, stream, versions, live)
    if waiting and settings.learner.waiting == "hold":
        numbers = ", ".join(str(v.version) for v in waiting)
        return f"version {numbers} waits for approval; approve or reject it (learner.waiting=hold)"
    known = live.block_ids if live else frozenset()
    fresh = [m for m in manifests if m.block_id not in known]
    if not fresh:
        return f"nothing new since version {live.version if live else 0}"
    base = service.base(stream, lambda done, of, what: tell(what, done, of))
    learner = settings.learner
    plan = plan_round(
        stream=stream,
        round_id=next_round_id(service, stream),
        attempt=1,
        parent_sha256=live.adapter_sha256 if live else None,
        base_sha256=base.sha256,
        data_revision=revision,
        new=[_account(service, m) for m in _with_attempts_left(service, stream, fresh)],
        replay=[_account(service, m) for m in manifests if m.block_id in known],
        expected_batch=learner.expected_batch,
        steps=learner.steps,
        clip_norm=learner.clip_norm,
        replay_rate=learner.replay_rate,
        q_max=learner.sampling_rate_max,
        lora=LoraSettings(**learner.lora.model_dump()),
        optimiser=OptimiserSettings(
            learning_rate=learner.learning_rate,
            warmup_share=learner.warmup_share,
            weight_decay=learner.weight_decay,
        ),
        noise_source="test" if test_noise else "system",
    )
    will_use = max(_share_after(service, charge) for charge in plan.charges())
    log.info(
        "round planned",
        stream=stream,
        round=plan.round_id,
        blocks=len(plan.blocks),
        sigma=plan.sigma,
        steps=plan.steps,
        filter_used_after=f"{will_use:.1%}",
    )
    return plan


def _account(service: Service, manifest: Manifest) -> BlockAccount:
    from learner.plan import BlockAccount

    policy = manifest.policy.model_dump(mode="json")
    return BlockAccount(manifest.block_id, policy, service.ledger.spent(manifest.block_id))


def _share_after(service: Service, charge: Charge) -> float:
    """Share of a block's filter that is used once it has paid this charge."""
    from privacy.accounting import rdp, share_used

    policy = service.ledger.policy(charge.block_id)
    spent = service.ledger.spent(charge.block_id)
    rho = rdp(charge.q, charge.sigma, charge.steps, policy.orders)
    return share_used([s + r for s, r in zip(spent, rho, strict=True)], policy.caps)


def register_blocks(service: Service, stream: str, revision: str) -> list[Manifest]:
    """Tell the ledger of every sealed block with the policy frozen in its manifest; returns the manifests."""
    manifests = service.repository().manifests(stream, revision=revision)
    for manifest in manifests:
        service.ledger.register_block(stream, manifest.block_id, manifest.policy.model_dump(mode="json"))
    return manifests


def next_round_id(service: Service, stream: str) -> str:
    """`STREAM-r0001` and up: one more than the ledger and the rounds folder have seen."""
    seen = {row.round_id for row in service.ledger.rows(stream)}
    seen |= {path.name for path in (service.workspace.root / "rounds").glob(f"{stream}-r*")}
    numbers = [int(name.rpartition("-r")[2]) for name in seen]
    return f"{stream}-r{max(numbers, default=0) + 1:04d}"


def _fresh_candidates(
    service: Service, stream: str, versions: Sequence[ModelVersion], live: ancestry.Live | None
) -> list[ModelVersion]:
    """Candidates that could still be approved; those whose parent is no longer live are archived as stale."""
    parent = live.adapter_sha256 if live else ""
    fresh = []
    for version in waiting(versions):
        if version.tag("parent_sha256") == parent:
            fresh.append(version)
            continue
        service.store.archive(service.model(stream), version.version, state="stale")
        log.info("candidate stale", stream=stream, version=version.version, reason="its parent is no longer live")
    return fresh


def _with_attempts_left(service: Service, stream: str, fresh: Sequence[Manifest]) -> list[Manifest]:
    """New blocks that were not yet charged as often as their policy's attempts allow."""
    charged = Counter(
        charge.block_id for row in service.ledger.rows(stream) if row.state == "reserved" for charge in row.charges
    )
    able = [m for m in fresh if charged[m.block_id] < m.policy.attempts]
    if not able:
        names = ", ".join(m.block_id for m in fresh)
        raise RoundRefused(
            f"stream={stream}: blocks {names} have been new in {fresh[0].policy.attempts} rounds, as many as their "
            f"sealed policy allows (privacy.attempts), and the live version knows none; return to one that "
            f"does, or wait for a new block"
        )
    return able
