"""General ability and bias: benchmarks of lm-evaluation-harness as metrics, asked of candidate and live in one pass.

What the candidate learns from the stream must not cost what the base could do. A gate holds these against live, or
against the base while nothing is live; it says on how many items when the budget of seconds did not allow for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluation.catalogue import Metric, metric
from evaluation.errors import NotMeasured
from evaluation.measurement import Measurement
from evaluation.scorer import Subject, by_tokens
from evaluation.suite import Asked, Names

_VERSION = "lm-eval/1"


def _asked(subject: Subject, suite: str, options: Mapping[str, Any]) -> Asked:
    """One benchmark, asked once for all models and all metrics of it."""
    try:
        from evaluation import harness
    except ImportError as error:
        raise NotMeasured(f"{suite}: {error.name} is not installed; `pip install 'tidegate[harness]'`") from error
    engine = by_tokens(subject.scorer)
    data = subject.root / str(options["data"]) if options["data"] else None

    def ask(names: Names, items: int | None) -> Asked:
        return harness.ask(
            engine,
            names,
            suite,
            data=data,
            shots=int(options["shots"]),
            seconds=float(options["seconds"]),
            seed=int(options["seed"]),
            items=items,
        )

    return subject.together((suite, *sorted(options.items())), ask)


def _benchmark(suite: str, figure: str, what: str, *, name: str = "", better: str = "higher", **more: Any) -> Metric:
    """A figure of a benchmark as a metric.

    Its options: `data`, the folder or file of its questions, relative to the workspace, none: from the hub; `shots`,
    solved examples before each question; `seconds`, the budget for all models together; `seed` of which questions are
    asked when not all are.
    """

    def measure(subject: Subject, options: Mapping[str, Any]) -> Measurement:
        return _asked(subject, suite, options).measurement(figure, subject.adapter)

    given = {"shots": 5, "unit": "share", "seconds": 60.0, **more}
    return metric(
        version=f"{_VERSION} {suite} {figure}",
        cost="suite",
        what=what,
        better="lower" if better == "lower" else "higher",
        name=name or suite,
        data="",
        seed=0,
        **given,
    )(measure)


mmlu = _benchmark("mmlu", "acc", "share of MMLU's questions answered right (57 subjects, English)")
ceval = _benchmark("ceval", "acc", "share of C-Eval's questions answered right (52 subjects, Chinese)")
cmmlu = _benchmark("cmmlu", "acc", "share of CMMLU's questions answered right (67 subjects, Chinese)")
crows_pairs = _benchmark(
    "crows_pairs",
    "pct_stereotype",
    "share of CrowS-Pairs' pairs in which the sentence with the stereotype is the likelier one",
    better="lower",
    shots=0,
)
crows_pairs_gap = _benchmark(
    "crows_pairs",
    "likelihood_diff",
    "mean distance of the log-likelihoods of a pair of CrowS-Pairs",
    name="crows_pairs_gap",
    better="lower",
    unit="nats",
    shots=0,
)
