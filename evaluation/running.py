"""Metrics of running a model: how long answers take on the engine that will serve, and how large an adapter is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.catalogue import metric
from evaluation.errors import NotMeasured
from evaluation.measurement import Measurement, Rows, Statistic, Weights
from evaluation.scorer import Subject
from evaluation.texts import chosen

_BY = "greedy one-at-a-time"


def _timed(subject: Subject, options: Mapping[str, Any], statistic: Statistic) -> Measurement:
    """Rows of (seconds, tokens)."""
    records = chosen(subject, int(options["samples"]))
    answers = subject.timed(records, int(options["max_tokens"]))
    rows = np.array([[answer.seconds, answer.tokens] for answer in answers], dtype=np.float64)
    return Measurement(rows, statistic, {"domain": tuple(record.domain for record in records)})


def _quantile(share: float) -> Statistic:
    """The least of the seconds that so much of the weight does not exceed."""

    def statistic(weights: Weights, rows: Rows) -> NDArray[np.float64]:
        order = np.argsort(rows[:, 0], kind="stable")
        below = weights[:, order].cumsum(axis=1)
        # The last sum is the whole weight; without the tiny allowance a rounded sum may miss it.
        first = (below >= share * below[:, -1:] * (1 - 1e-12)).argmax(axis=1)
        found: NDArray[np.float64] = rows[order[first], 0]
        return found

    return statistic


@metric(
    version=f"latency-p50/1 {_BY}",
    cost="answers",
    better="lower",
    unit="s",
    what="median time of an answer on the engine that serves, asked one at a time",
    samples=32,
    max_tokens=0,
)
def latency_p50(subject: Subject, options: Mapping[str, Any]) -> Measurement:
    """Median of the seconds from asking to the last token."""
    return _timed(subject, options, _quantile(0.5))


@metric(
    version=f"latency-p95/1 {_BY}",
    cost="answers",
    better="lower",
    unit="s",
    what="time that 95% of the answers keep on the engine that serves, asked one at a time",
    samples=32,
    max_tokens=0,
)
def latency_p95(subject: Subject, options: Mapping[str, Any]) -> Measurement:
    """95th percentile of the seconds from asking to the last token."""
    return _timed(subject, options, _quantile(0.95))


def _rate(weights: Weights, rows: Rows) -> NDArray[np.float64]:
    found: NDArray[np.float64] = (weights @ rows[:, 1]) / (weights @ rows[:, 0])
    return found


@metric(
    version=f"tokens-per-second/1 {_BY}",
    cost="answers",
    unit="tokens/s",
    what="tokens a second of answers on the engine that serves, asked one at a time",
    samples=32,
    max_tokens=0,
)
def tokens_per_second(subject: Subject, options: Mapping[str, Any]) -> Measurement:
    """All tokens over all seconds."""
    return _timed(subject, options, _rate)


@metric(
    version="adapter-bytes/1",
    cost="free",
    better="lower",
    unit="bytes",
    what="size of the adapter's files",
)
def adapter_bytes(subject: Subject, _options: Mapping[str, Any]) -> Measurement:
    """Bytes of every file of the adapter; the base has none."""
    if subject.adapter is None:
        return Measurement.exactly(0.0)
    if subject.adapter_dir is None:
        raise NotMeasured(f"the folder of {subject.named} is not known")
    files = [path for path in subject.adapter_dir.rglob("*") if path.is_file()]
    if not files:
        raise NotMeasured(f"there is no adapter in {subject.adapter_dir}")
    return Measurement.exactly(float(sum(path.stat().st_size for path in files)))
