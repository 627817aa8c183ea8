"""Which blocks a round may use: chosen by ancestry, age and budget, never by looking at content."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

import structlog

from registry.states import ModelVersion, waiting
from tidegate import ancestry
from tidegate.errors import RoundRefused
from tidegate.stopping import stopping_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ingest.manifest import Manifest
    from learner.plan import BlockAccount, ContinualSettings, LoraSettings, OptimiserSettings, RoundPlan
    from privacy.ledger import Charge
    from tidegate.config import LearnerSettings
    from tidegate.wiring import Service

log = structlog.get_logger()


class PlanArguments(TypedDict):
    """What of a stream's settings goes into `learner.plan.plan_round`."""

    expected_batch: float
    steps: int
    clip_norm: float
    replay_rate: float
    q_max: float
    lora: LoraSettings
    optimiser: OptimiserSettings
    continual: ContinualSettings
    priors: Mapping[str, float]


def plan_arguments(learner: LearnerSettings) -> PlanArguments:
    """A stream's learner settings as arguments of `plan_round`: the only place that maps one to the other."""
    from learner.plan import ContinualSettings, LoraSettings, OptimiserSettings

    return PlanArguments(
        expected_batch=learner.expected_batch,
        steps=learner.steps,
        clip_norm=learner.clip_norm,
        replay_rate=learner.replay_rate,
        q_max=learner.sampling_rate_max,
        lora=LoraSettings(**learner.lora.model_dump()),
        optimiser=OptimiserSettings(
            learning_rate=learner.learning_rate,
            layer_rate_decay=learner.layer_rate_decay,
            warmup_share=learner.warmup_share,
            weight_decay=learner.weight_decay,
        ),
        continual=ContinualSettings(
            method=learner.continual, rank_groups=learner.rank_groups, weight=learner.average_weight
        ),
        priors=learner.priors,
    )


@dataclass(frozen=True)
class Survey:
    """A stream's blocks as the next round finds them: public sizes, policies and accounts, nothing of their content.

    Attributes:
        revision: the data revision they were read from.
        parent_sha256: the live adapter; None when nothing is live.
        live_version: its number, 0 when nothing is live.
        new: blocks outside the live version's ancestry that may still be new.
        replay: blocks of the live version's ancestry.
        tried: blocks outside it that were new as often as their policy allows.
        times_new: how many rounds each of the blocks outside the ancestry was charged for.
        waits: candidates that wait for a person and hold the schedule.
        private: whether the next round is one with privacy; the blocks above are of its kind alone.
        apart: blocks of the other kind: with and without a promise are never mixed.
        unprotected_parent: live was trained without privacy, and a round with privacy cannot start from it.
    """

    stream: str
    revision: str
    parent_sha256: str | None
    live_version: int
    new: tuple[BlockAccount, ...]
    replay: tuple[BlockAccount, ...]
    tried: tuple[BlockAccount, ...]
    times_new: Mapping[str, int]
    waits: tuple[int, ...] = ()
    private: bool = True
    apart: tuple[str, ...] = ()
    unprotected_parent: bool = False

    @property
    def noise_source(self) -> Literal["system", "none"]:
        """Of the next round."""
        return "system" if self.private else "none"

    @property
    def idle(self) -> str:
        """Why no round is due, though nothing is wrong; empty when one is."""
        if not (self.new or self.replay or self.tried):
            if self.apart:
                kind, other = ("with", "without") if self.private else ("without", "with")
                return (
                    f"no block is sealed {kind} privacy yet; {len(self.apart)} were sealed {other} it, and the two are "
                    f"never mixed (privacy.enabled)"
                )
            return "no block is sealed yet"
        if self.waits:
            numbers = ", ".join(map(str, self.waits))
            return f"version {numbers} waits for approval; approve or reject it (learner.waiting=hold)"
        if not (self.new or self.tried):
            return f"nothing new since version {self.live_version}"
        return ""

    def require_new(self) -> None:
        """Raise RoundRefused when every block that is not in the live version was tried as often as it may be.

        Or when the round cannot start from what is live: an adapter without privacy carries unprotected data, and a
        candidate that does not descend from live could never be promoted.
        """
        if self.unprotected_parent:
            raise RoundRefused(
                f"stream={self.stream}: version {self.live_version} is live and was trained without privacy, so a "
                f"round with privacy cannot start from it; set its stage to Archived in MLflow: the next round starts "
                f"from the base"
            )
        if self.new:
            return
        shown = ", ".join(f"{block.block_id} (new in {self.times_new[block.block_id]} rounds)" for block in self.tried)
        raise RoundRefused(
            f"stream={self.stream}: blocks {shown} cannot pay for being new again; must be new in at most "
            f"{self.tried[0].policy['attempts']} rounds (privacy.attempts, sealed), and the live version knows none; "
            f"return to a version that does, or wait for new blocks"
        )


def survey(service: Service, stream: str, versions: Sequence[ModelVersion], *, tidy: bool = False) -> Survey:
    """Look at a stream's blocks through the ledger; they are made known to it, which is idempotent.

    Args:
        service: the workspace.
        stream: its name.
        versions: of its registered model; none: nothing is taken to be live.
        tidy: archive candidates whose parent is no longer live, as a round does.

    Raises:
        TidegateError: a version stands in Production without a valid approval.
    """
    revision = service.repository().pin(stream)
    private = service.stream(stream).privacy.enabled
    everything = register_blocks(service, stream, revision)
    manifests = [m for m in everything if service.ledger.policy(m.block_id).enabled == private]
    live = ancestry.find_live(versions, service.trusted("approvals")) if manifests else None
    fresh = _fresh_candidates(service, stream, versions, live, tidy=tidy) if manifests else []
    holds = service.stream(stream).learner.waiting == "hold"
    known = live.block_ids if live else frozenset()
    times = _times_charged(service, stream)
    outside = [m for m in manifests if m.block_id not in known]
    return Survey(
        stream=stream,
        revision=revision,
        parent_sha256=live.adapter_sha256 if live else None,
        live_version=live.version if live else 0,
        new=tuple(_account(service, m) for m in outside if times[m.block_id] < m.policy.attempts),
        replay=tuple(_account(service, m) for m in manifests if m.block_id in known),
        tried=tuple(_account(service, m) for m in outside if times[m.block_id] >= m.policy.attempts),
        times_new={m.block_id: times[m.block_id] for m in outside},
        waits=tuple(v.version for v in fresh) if holds else (),
        private=private,
        apart=tuple(m.block_id for m in everything if m not in manifests),
        unprotected_parent=private and live is not None and live.adapter_sha256 in _unprotected(service, stream),
    )


def _unprotected(service: Service, stream: str) -> frozenset[str]:
    """Adapters that were trained without privacy, by the ledger: a tag could be forged."""
    rows = service.ledger.rows(stream)
    return frozenset(row.adapter_sha256 for row in rows if row.noise_source == "none" and row.state == "committed")


def make_plan(
    service: Service, stream: str, tell: Callable[[str, int, int], None], *, test_noise: bool
) -> RoundPlan | str:
    """A plan for the stream's next round, or the reason why none is due.

    Raises:
        RoundRefused: every new block has been tried as often as its policy allows, or live was trained without privacy.
        PlanError: no block can pay.
    """
    from learner.plan import plan_round

    found = survey(service, stream, service.store.versions(service.model(stream)), tidy=True)
    if found.idle:
        return found.idle
    base = service.base(stream, lambda done, of, what: tell(what, done, of))
    found.require_new()
    plan = plan_round(
        stream=stream,
        round_id=next_round_id(service, stream),
        attempt=1,
        parent_sha256=found.parent_sha256,
        base_sha256=base.sha256,
        data_revision=found.revision,
        new=found.new,
        replay=found.replay,
        stopping=stopping_of(service, stream),
        noise_source="test" if test_noise else found.noise_source,
        **plan_arguments(service.stream(stream).learner),
    )
    will_use = max((_share_after(service, charge) for charge in plan.charges()), default=0.0)
    log.info(
        "round planned",
        stream=stream,
        round=plan.round_id,
        blocks=len(plan.blocks),
        sigma=plan.sigma,
        steps=plan.steps,
        filter_used_after=f"{will_use:.1%}" if plan.private else "nothing is charged: no privacy",
    )
    if found.apart:
        reason = "sealed under the other privacy.enabled"
        log.info("blocks left out", stream=stream, blocks=len(found.apart), reason=reason)
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
    # An evaluation is named after the round whose candidate it judges: `STREAM-r0001-holdout`.
    numbers = [int(name.rpartition("-r")[2].partition("-")[0]) for name in seen]
    return f"{stream}-r{max(numbers, default=0) + 1:04d}"


def _fresh_candidates(
    service: Service, stream: str, versions: Sequence[ModelVersion], live: ancestry.Live | None, *, tidy: bool
) -> list[ModelVersion]:
    """Candidates that could still be approved; with `tidy`, those whose parent is no longer live become stale."""
    parent = live.adapter_sha256 if live else ""
    fresh = []
    for version in waiting(versions):
        if version.tag("parent_sha256") == parent:
            fresh.append(version)
        elif tidy:
            service.store.archive(service.model(stream), version.version, state="stale")
            reason = "its parent is no longer live"
            log.info("candidate stale", stream=stream, version=version.version, reason=reason)
    return fresh


def _times_charged(service: Service, stream: str) -> Counter[str]:
    """How many attempts each block was charged for in rounds."""
    return Counter(
        charge.block_id
        for row in service.ledger.rows(stream)
        if row.state == "reserved" and getattr(row, "account", "train") == "train"
        for charge in row.charges
    )
