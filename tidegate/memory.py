"""What a candidate's line of versions has kept, on the public gate set: from the scores its ancestors were judged with.

Every version carries its own accuracies as a tag, so that its descendants compare with what was measured then. Only
ancestors judged on the very same gate set count: against others no number would mean anything. A tag can be forged by
whoever may write tags; these figures inform a person, and decide nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evaluation.continual import VERSION, Memory, memory
from tidegate.ancestry import ancestors

if TYPE_CHECKING:
    from evaluation.verdict import Evaluation
    from registry.states import ModelVersion

TAG = "continual"


@dataclass(frozen=True)
class Line:
    """A candidate at the end of its line.

    Attributes:
        gate_set: sha256 of the set all were judged on.
        ancestors: those that count, oldest first, each with its accuracy by domain.
        accuracy: of the candidate, by domain.
        kept: the figures.
    """

    gate_set: str
    ancestors: tuple[tuple[ModelVersion, Mapping[str, float]], ...]
    accuracy: Mapping[str, float]
    kept: Memory

    @property
    def versions(self) -> tuple[int, ...]:
        """Numbers of the ancestors."""
        return tuple(version.version for version, _ in self.ancestors)

    def tag(self) -> str:
        """JSON, as the version carries it."""
        return json.dumps(
            {
                "version": VERSION,
                "gate_set": self.gate_set,
                "versions": list(self.versions),
                "accuracy": dict(self.accuracy),
                "average_accuracy": self.kept.average_accuracy,
                "backward_transfer": self.kept.backward_transfer,
                "forgetting": dict(self.kept.forgetting),
            },
            sort_keys=True,
        )

    def metrics(self) -> dict[str, float]:
        """Figures by name, for `metrics.json` and MLflow."""
        found: dict[str, float | None] = {
            "average_accuracy": self.kept.average_accuracy,
            "backward_transfer": self.kept.backward_transfer,
            "forgetting": self.kept.forgetting_mean,
        }
        for domain, value in self.kept.forgetting.items():
            # MLflow takes letters, digits and these in a metric's name.
            found["forgetting." + re.sub(r"[^\w./ -]", "_", domain, flags=re.ASCII)] = value
        return {name: value for name, value in found.items() if value is not None}


def line_of(versions: Sequence[ModelVersion], parent: ModelVersion | None, evaluation: Evaluation) -> Line | None:
    """The candidate's line; None when it could not be scored.

    Args:
        versions: of the registered model.
        parent: what the candidate was trained from; None for the bare base.
        evaluation: of the candidate.
    """
    accuracy = {s.domain: s.candidate.accuracy.value for s in evaluation.slices if s.domain and s.candidate}
    if not accuracy:
        return None
    gate_set = str(evaluation.gate_set["sha256"])
    older = []
    for version in reversed(ancestors(versions, parent) if parent else []):
        told = read(version)
        if told and told["gate_set"] == gate_set:
            older.append((version, told["accuracy"]))
    kept = memory([*(scores for _, scores in older), accuracy])
    return Line(gate_set, tuple(older), accuracy, kept)


def read(version: ModelVersion) -> dict[str, Any] | None:
    """What a version's tag says; None when there is none, or it is not in this version's form."""
    try:
        told = json.loads(version.tag(TAG) or "null")
    except ValueError:
        return None
    if not isinstance(told, dict) or told.get("version") != VERSION or not isinstance(told.get("gate_set"), str):
        return None
    whole = all(isinstance(told.get(name), dict) for name in ("accuracy", "forgetting"))
    return told if whole and _finite(told) else None


def share_used(version: ModelVersion) -> float | None:
    """Of the fullest block's filter when a version was judged, by its verdict; None where that does not tell."""
    try:
        gates = json.loads(version.tag("verdict") or "null")["gates"]
        value = next(gate["value"] for gate in gates if gate["name"] == "budget_kept")
    except (ValueError, TypeError, KeyError, StopIteration):
        return None
    return float(value) if isinstance(value, float | int) and math.isfinite(value) else None


def _finite(told: Mapping[str, Any]) -> bool:
    values = [told.get("average_accuracy"), told.get("backward_transfer")]
    values = [value for value in values if value is not None]
    values += [*told["accuracy"].values(), *told["forgetting"].values()]
    return all(isinstance(value, float | int) and math.isfinite(value) for value in values)
