"""Early stopping of a round: the gate set as it was when the round was planned, and how weights are scored on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidegate.errors import RoundRefused

if TYPE_CHECKING:
    from pathlib import Path

    from learner.plan import RoundPlan, StoppingSettings
    from learner.stopping import Render, Score, Signal
    from tidegate.wiring import Service

# A copy in the round's folder: a gate set that is edited while a round waits to be resumed changes no decision.
COPY_FILE = "stopping.jsonl"


def stopping_of(service: Service, stream: str) -> StoppingSettings | None:
    """What the plan of a round says of early stopping; None where the settings want none.

    Raises:
        GateSetError: the gate set cannot be read.
    """
    from evaluation.gateset import GateSet
    from learner.plan import StoppingSettings

    settings = service.stream(stream).learner.early_stopping
    if not settings.every_steps:
        return None
    return StoppingSettings(
        every_steps=settings.every_steps,
        patience=settings.patience,
        keep=settings.keep,
        signal_sha256=GateSet.load(_gate_set(service, stream)).sha256,
    )


def keep_gate_set(service: Service, plan: RoundPlan) -> None:
    """Put the planned set into the round's folder, before the plan itself is there.

    Raises:
        RoundRefused: it was changed between planning and this.
    """
    from evaluation.gateset import GateSet
    from ingest.parquet import fsync_path

    if plan.stopping is None:
        return
    copy = service.workspace.rounds(plan.round_id) / COPY_FILE
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(_gate_set(service, plan.stream).read_bytes())
    fsync_path(copy)
    if GateSet.load(copy).sha256 != plan.stopping.signal_sha256:
        raise RoundRefused(f"gate set of {plan.stream}: was changed while a round was planned; run the round again")


def signal_of(service: Service, plan: RoundPlan) -> Signal | None:
    """The plan's public signal: the mean likelihood of the gate set's completions."""
    from evaluation.gateset import GateSet
    from learner.stopping import Signal, likelihood

    if plan.stopping is None:
        return None
    gate_set = GateSet.load(service.workspace.rounds(plan.round_id) / COPY_FILE)

    def prepare(render: Render) -> Score:
        return likelihood([render(record.prompt, record.completion) for record in gate_set.records])

    return Signal(gate_set.sha256, prepare)


def _gate_set(service: Service, stream: str) -> Path:
    return service.workspace.root / service.stream(stream).evaluation.gate_set
