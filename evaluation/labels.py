"""Metrics of what a model would choose among the stream's labels, or how likely it finds the expected completion.

A choice is the label of highest summed log-likelihood, end token included. Because every label's completion ends with
the end token, that sum is the log-probability of exactly this answer, so labels of different length compare as they
are. Dividing by length would instead favour long labels whose tail follows from their head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.catalogue import metric
from evaluation.errors import NotMeasured
from evaluation.gateset import GateSet
from evaluation.measurement import Measurement, Rows, Statistic, Weights
from evaluation.metrics import Indices
from evaluation.scorer import Subject

# Part of every version below: how a choice is made from scores.
_BY = "summed-loglik"
ACCURACY_VERSION = f"accuracy/1 {_BY}"
MACRO_F1_VERSION = f"macro-f1/2 {_BY} slice-labels bootstrap"


def truth_of(gate_set: GateSet) -> Indices:
    """(N,) column of each record's label."""
    column = {label: index for index, label in enumerate(gate_set.labels)}
    return np.array([column[record.truth] for record in gate_set.records], dtype=np.int64)


def groups_of(gate_set: GateSet) -> dict[str, tuple[str, ...]]:
    """What label metrics can be sliced by."""
    return {
        "domain": tuple(record.domain for record in gate_set.records),
        "label": tuple(record.truth for record in gate_set.records),
    }


def _chosen(subject: Subject) -> Indices:
    """(N,) columns of the likeliest labels."""
    said = subject.predictions
    if said.predicted is None:
        raise NotMeasured(f"{subject.named} could not be scored ({said.problem})")
    return said.predicted


@metric(version=ACCURACY_VERSION, cost="scores", what="share of records whose likeliest label is the true one")
def accuracy(subject: Subject, _options: Mapping[str, Any]) -> Measurement:
    """Share of right choices."""
    right = _chosen(subject) == truth_of(subject.gate_set)
    return Measurement(right.astype(np.float64)[:, None], groups=groups_of(subject.gate_set))


def _of_choices(subject: Subject, statistic: Statistic, point: Callable[[Rows], float]) -> Measurement:
    """A measurement whose rows are (true label, chosen label)."""
    pairs = np.stack([truth_of(subject.gate_set), _chosen(subject)], axis=1).astype(np.float64)
    return Measurement(pairs, statistic, groups_of(subject.gate_set), point)


def _counts(weights: Weights, rows: Rows) -> tuple[NDArray[np.float64], ...]:
    """Weighted numbers of right, true and chosen for each label that is true somewhere: (B, L) each."""
    true, said = rows[:, 0], rows[:, 1]
    labels = np.unique(true)
    is_true = (true[:, None] == labels).astype(np.float64)
    is_said = (said[:, None] == labels).astype(np.float64)
    return weights @ (is_true * is_said), weights @ is_true, weights @ is_said


def _f1(weights: Weights, rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """F1 of each label, and how often it is true: (B, L). A label without any record has none of the weight."""
    hits, true, said = _counts(weights, rows)
    total = true + said
    return np.divide(2 * hits, total, out=np.zeros_like(total), where=total > 0), true


def _macro_f1(weights: Weights, rows: Rows) -> NDArray[np.float64]:
    f1, true = _f1(weights, rows)
    present = true > 0
    shown: NDArray[np.float64] = (f1 * present).sum(axis=1) / present.sum(axis=1)
    return shown


def _weighted_f1(weights: Weights, rows: Rows) -> NDArray[np.float64]:
    f1, true = _f1(weights, rows)
    shown: NDArray[np.float64] = (f1 * true).sum(axis=1) / true.sum(axis=1)
    return shown


def _macro_recall(weights: Weights, rows: Rows) -> NDArray[np.float64]:
    hits, true, _ = _counts(weights, rows)
    present = true > 0
    each = np.divide(hits, true, out=np.zeros_like(true), where=present)
    shown: NDArray[np.float64] = each.sum(axis=1) / present.sum(axis=1)
    return shown


def _by_scikit(name: str, average: str) -> Callable[[Rows], float]:
    """scikit-learn's value over the labels that are true somewhere.

    Labels that a slice does not hold are not part of its mean: a domain is not blamed for labels of another. A choice
    outside of them costs the recall of the true label.
    """

    def point(rows: Rows) -> float:
        from sklearn import metrics

        truth, said = rows.astype(np.int64).T
        score = getattr(metrics, name)
        return float(score(truth, said, labels=np.unique(truth), average=average, zero_division=0))

    return point


def macro_f1_of(truth: Indices, chosen: Indices, groups: Mapping[str, tuple[str, ...]]) -> Measurement:
    """Macro F1 of some choices; (N,) columns of labels."""
    pairs = np.stack([truth, chosen], axis=1).astype(np.float64)
    return Measurement(pairs, _macro_f1, groups, _by_scikit("f1_score", "macro"))


@metric(version=MACRO_F1_VERSION, cost="scores", what="unweighted mean of the labels' F1")
def macro_f1(subject: Subject, _options: Mapping[str, Any]) -> Measurement:
    """F1, every label counting the same."""
    return macro_f1_of(truth_of(subject.gate_set), _chosen(subject), groups_of(subject.gate_set))


@metric(
    version=f"weighted-f1/1 {_BY} slice-labels bootstrap",
    cost="scores",
    what="mean of the labels' F1, each weighted by its records",
)
def weighted_f1(subject: Subject, _options: Mapping[str, Any]) -> Measurement:
    """F1, every record counting the same."""
    return _of_choices(subject, _weighted_f1, _by_scikit("f1_score", "weighted"))


@metric(
    version=f"recall/1 {_BY} slice-labels bootstrap",
    cost="scores",
    what="unweighted mean of the labels' recall; by label, the recall of each",
)
def recall(subject: Subject, _options: Mapping[str, Any]) -> Measurement:
    """Recall, every label counting the same; sliced by label it is that label's."""
    return _of_choices(subject, _macro_recall, _by_scikit("recall_score", "macro"))


@metric(
    version=f"ece/1 {_BY} softmax-over-labels equal-width",
    cost="scores",
    better="lower",
    what="expected calibration error of the likeliest label's probability among the labels",
    bins=15,
)
def calibration(subject: Subject, options: Mapping[str, Any]) -> Measurement:
    """How far stated probability and share of right choices lie apart, over bins of probability (Guo et al. 2017).

    It is never below nought and, at few records, above it even for a calibrated model.
    """
    scores = subject.likelihoods()
    chosen = scores.argmax(axis=1)
    bins = int(options["bins"])
    likely = np.exp(scores - scores.max(axis=1, keepdims=True))
    sure = likely.max(axis=1) / likely.sum(axis=1)
    right = (chosen == truth_of(subject.gate_set)).astype(np.float64)

    def statistic(weights: Weights, rows: Rows) -> NDArray[np.float64]:
        which = np.minimum((rows[:, 0] * bins).astype(np.int64), bins - 1)
        inside = np.eye(bins)[which]
        gaps = np.abs(weights @ (inside * (rows[:, 1] - rows[:, 0])[:, None]))
        shown: NDArray[np.float64] = gaps.sum(axis=1) / weights.sum(axis=1)
        return shown

    version = f"ece/1 {_BY} softmax-over-labels {bins} equal-width bins"
    return Measurement(np.stack([sure, right], axis=1), statistic, groups_of(subject.gate_set), version=version)


def _perplexity(weights: Weights, rows: Rows) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):  # what is too large for a float is infinite, and fails
        shown: NDArray[np.float64] = np.exp((weights @ rows[:, 0]) / (weights @ rows[:, 1]))
    return shown


@metric(
    version="perplexity/1 expected-completion per-token end-included",
    cost="scores",
    better="lower",
    unit="perplexity",
    what="perplexity of the expected completion",
)
def perplexity(subject: Subject, _options: Mapping[str, Any]) -> Measurement:
    """How surprised a model is by each token of the expected completion, the end token included."""
    loglik, tokens = subject.expected()
    return Measurement(np.stack([-loglik, tokens], axis=1), _perplexity, groups_of(subject.gate_set))
