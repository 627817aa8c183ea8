"""What a person gets to read of a round, and the data that MLflow lists as its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.mlflow_store import Dataset
from tidegate.memory import share_used

if TYPE_CHECKING:
    from evaluation.verdict import Evaluation
    from learner.base import Base
    from learner.plan import RoundPlan
    from registry.states import ModelVersion
    from tidegate.memory import Line

SUMMARY_NAME = "report.md"


def reports(
    plan: RoundPlan,
    base: Base,
    evaluation: Evaluation,
    verdict: dict[str, Any],
    *,
    parent: ModelVersion | None,
    line: Line | None,
) -> dict[str, bytes]:
    """The page, the summary and its plot, by file name."""
    from evaluation.history import Past
    from evaluation.page import Origin, version_page
    from evaluation.report import PAGE_NAME, PLOT_NAME, plot_png, version_markdown

    blocks = [block.id for block in plan.blocks]
    trained_from = f"version {parent.version}" if parent else "the base model"
    kept = line.kept if line else None
    past = line.ancestors if line else ()
    origin = Origin(
        stream=plan.stream,
        round_id=plan.round_id,
        made_at=verdict["made_at"],
        data_revision=plan.data_revision,
        blocks=blocks,
        parent=trained_from,
        base=base,
        past=[Past(f"version {one.version}", accuracy, share_used(one)) for one, accuracy in past],
        kept=kept,
    )
    summary = version_markdown(
        evaluation,
        data_revision=plan.data_revision,
        blocks=blocks,
        parent=trained_from,
        base=base,
        round_id=f"{plan.round_id}.{plan.attempt}",
        kept=kept,
    )
    # Half a character, which an error's message may hold, is no UTF-8.
    found = {PAGE_NAME: version_page(evaluation, origin), SUMMARY_NAME: summary}
    return {name: text.encode(errors="replace") for name, text in found.items()} | {PLOT_NAME: plot_png(evaluation)}


def datasets(plan: RoundPlan, evaluation: Evaluation) -> tuple[Dataset, ...]:
    """What the round read, and what it was judged on; public facts only: no number of records of a private set."""
    revision = {"repository": "data", "revision": plan.data_revision}
    gate_set, private = evaluation.gate_set, evaluation.private
    found = [
        Dataset(
            name=f"{plan.stream} blocks",
            context="training",
            revision=plan.data_revision,
            kind="dvc",
            source=revision,
            tags={"data_revision": plan.data_revision, "blocks": str(len(plan.blocks)), "plan_hash": plan.plan_hash},
        ),
        Dataset(
            name=f"{gate_set['name']} gate set",
            context="gates",
            revision=str(gate_set["sha256"]),
            kind="gate-set",
            source={"name": gate_set["name"], "sha256": gate_set["sha256"]},
            tags={"sha256": str(gate_set["sha256"]), "records": str(gate_set["n"]), "data": str(gate_set["data"])},
        ),
    ]
    if private is not None and private.counts is not None:
        found.append(
            Dataset(
                name=f"{plan.stream} holdout",
                context="gates, noisy counts",
                revision=plan.data_revision,
                kind="dvc",
                source=revision,
                tags={"data_revision": plan.data_revision, "charge_id": private.charge_id or "", "data": "private"},
            )
        )
    return tuple(found)
