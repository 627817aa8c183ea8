"""Metrics by name: what a gate of `params.yaml` may ask for.

A metric is a small function with a version. One of your own is written

    from evaluation.catalogue import Subject, metric
    from evaluation.measurement import Measurement

    @metric(version="brevity/1", cost="answers", better="lower", unit="characters", what="length of an answer")
    def brevity(subject: Subject, options: Mapping[str, Any]) -> Measurement:
        asked = subject.gate_set.records
        return Measurement.of([len(text) for text in subject.answers(asked)], [record.domain for record in asked])

in a module that Python can import, and named `module:function` in `evaluation.gates`. Nothing is looked for in
folders: what runs is what the settings name.

The function is called for the candidate, and for live or the base where a gate compares with them; always with the
same options. What it cannot measure it says by raising `NotMeasured`: the gate is undecided then. The same becomes
of whatever else it throws. A value that is NaN or infinite fails a candidate.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from evaluation.errors import PolicyError
from evaluation.measurement import Measurement
from evaluation.scorer import Subject

__all__ = ["BUILT_IN", "COSTS", "Cost", "Metric", "Subject", "find", "metric"]

Cost = Literal["free", "scores", "answers", "suite"]
COSTS: tuple[Cost, ...] = ("free", "scores", "answers", "suite")
"""What a metric needs, cheapest first: nothing of the model; one scoring of the gate set; written answers; a set of
prompts of its own, with a budget of seconds."""

Measure = Callable[[Subject, Mapping[str, Any]], Measurement]

# Where each named metric is: read only when a gate asks for it.
BUILT_IN: dict[str, str] = {
    "accuracy": "evaluation.labels:accuracy",
    "macro_f1": "evaluation.labels:macro_f1",
    "weighted_f1": "evaluation.labels:weighted_f1",
    "recall": "evaluation.labels:recall",
    "calibration": "evaluation.labels:calibration",
    "perplexity": "evaluation.labels:perplexity",
    "exact_match": "evaluation.texts:exact_match",
    "empty_answers": "evaluation.texts:empty_answers",
    "refusals": "evaluation.texts:refusals",
    "rouge_l": "evaluation.texts:rouge_l",
    "bleu": "evaluation.texts:bleu",
    "similarity": "evaluation.texts:similarity",
    "latency_p50": "evaluation.running:latency_p50",
    "latency_p95": "evaluation.running:latency_p95",
    "tokens_per_second": "evaluation.running:tokens_per_second",
    "adapter_bytes": "evaluation.running:adapter_bytes",
    "mmlu": "evaluation.ability:mmlu",
    "ceval": "evaluation.ability:ceval",
    "cmmlu": "evaluation.ability:cmmlu",
    "crows_pairs": "evaluation.ability:crows_pairs",
    "crows_pairs_gap": "evaluation.ability:crows_pairs_gap",
    "toxicity": "evaluation.toxicity:toxicity",
    "secrets_extracted": "evaluation.leakage:secrets_extracted",
    "secrets_exposed": "evaluation.leakage:secrets_exposed",
}

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*\Z")


@dataclass(frozen=True)
class Metric:
    """A metric as the gates see it.

    Attributes:
        name: as gates are named: the function's.
        version: of everything that decides the number; two values compare only when it is the same.
        cost: what it needs.
        better: which way is better.
        unit: `share` is shown in percentage points where it is compared; else the unit's name.
        what: one clause for `tidegate gates explain`.
        measure: the function.
        options: names of the options it takes, each with its default.
    """

    name: str
    version: str
    cost: Cost
    better: Literal["higher", "lower"]
    unit: str
    what: str
    measure: Measure
    options: Mapping[str, Any]

    def __call__(self, subject: Subject, options: Mapping[str, Any] | None = None) -> Measurement:
        """Measure one model; options that are not given have their defaults.

        Raises:
            PolicyError: there is no such option.
            NotMeasured: why it could not be measured.
        """
        return self.measure(subject, self.settle(options or {}))

    def settle(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with the defaults of those that are not given.

        Raises:
            PolicyError: there is no such option.
        """
        given = dict(options)
        if unknown := sorted(set(given) - set(self.options)):
            known = ", ".join(self.options) or "none"
            raise PolicyError(f"metric {self.name}: options={', '.join(unknown)}: there are none such; it has: {known}")
        return {**self.options, **given}


def metric(
    *,
    version: str,
    cost: Cost,
    what: str,
    better: Literal["higher", "lower"] = "higher",
    unit: str = "share",
    name: str = "",
    **options: Any,
) -> Callable[[Measure], Metric]:
    """Make a function a metric; further arguments are its options and their defaults."""

    def wrap(function: Measure) -> Metric:
        return Metric(name or function.__name__, version, cost, better, unit, what, function, options)

    return wrap


def find(name: str) -> Metric:
    """The metric of a name, or at `module:function`.

    Raises:
        PolicyError: there is none, or what is there is no metric.
    """
    path = BUILT_IN.get(name, name)
    if not _PATH.match(path):
        raise PolicyError(f"metric={name}: must be one of {', '.join(sorted(BUILT_IN))}, or module:function")
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        # A module of somebody's own may throw anything; the policy is what has to be mended.
        raise PolicyError(f"metric={name}: cannot be imported ({error}); is {module} on PYTHONPATH?") from error
    if not isinstance(found, Metric):
        raise PolicyError(f"metric={name}: is no metric; put @metric(...) of evaluation.catalogue before it")
    return found
