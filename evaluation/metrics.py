"""Metrics with standard errors, and exact paired tests. Each has a version: a number means nothing without it.

Predictions are the labels of highest summed log-likelihood, end token included. Because every label's completion ends
with the end token, that sum is the log-probability of exactly this answer, so labels of different length compare as
they are. Dividing by length would instead favour long labels whose tail follows from their head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Part of every version below: how a prediction is made from scores.
_BY = "summed-loglik"
ACCURACY_VERSION = f"accuracy/1 {_BY}"
MACRO_F1_VERSION = f"macro-f1/1 {_BY} slice-labels jackknife"
MCNEMAR_VERSION = f"mcnemar-exact/1 {_BY} two-sided"
FORGETTING_VERSION = f"mcnemar-exact/1 {_BY} one-sided holm"
FORMAT_VERSION = "exact-match/1 greedy stripped"

Flags = NDArray[np.bool_]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Score:
    """An estimate, its standard error, and how many records it rests on."""

    value: float
    se: float
    n: int


@dataclass(frozen=True)
class Paired:
    """What two models did on the same records.

    Attributes:
        wins: records only the first got right.
        losses: records only the second got right.
        n: records in all.
    """

    wins: int
    losses: int
    n: int

    @property
    def gain(self) -> Score:
        """Difference of accuracies, first minus second; its standard error is that of paired proportions."""
        wins, losses, n = self.wins, self.losses, self.n
        variance = (wins + losses - (wins - losses) ** 2 / n) / n
        return Score((wins - losses) / n, math.sqrt(variance / n), n)


def accuracy(correct: Flags) -> Score:
    """Share of correct records; (N,). The standard error is the sample's, so 0 when all or none are correct."""
    n = len(correct)
    value = float(correct.mean())
    return Score(value, math.sqrt(value * (1 - value) / max(n - 1, 1)), n)


def macro_f1(truth: Indices, predicted: Indices) -> Score:
    """Unweighted mean of F1 over the labels that occur in `truth`; (N,) both. Standard error by the jackknife.

    A prediction outside these labels costs the recall of the true one. Labels that a slice does not hold are not
    part of its mean: a domain is not blamed for labels of another.
    """
    from sklearn.metrics import f1_score

    labels = np.unique(truth)
    value = float(f1_score(truth, predicted, labels=labels, average="macro", zero_division=0))
    return Score(value, _jackknife(truth, predicted, labels), len(truth))


def _jackknife(truth: Indices, predicted: Indices, labels: Indices) -> float:
    """Standard error from leaving out each record; records of the same (truth, prediction) need it once only."""
    n = len(truth)
    size = int(max(truth.max(), predicted.max())) + 1
    hits = np.bincount(truth[truth == predicted], minlength=size).astype(float)
    true = np.bincount(truth, minlength=size).astype(float)
    said = np.bincount(predicted, minlength=size).astype(float)

    def mean_f1(hits: NDArray[np.float64], true: NDArray[np.float64], said: NDArray[np.float64]) -> float:
        # 2 tp / (2 tp + fp + fn); a label that is left without any record scores 0, as in scikit-learn.
        total = true[labels] + said[labels]
        return float(np.mean(np.divide(2 * hits[labels], total, out=np.zeros(len(labels)), where=total > 0)))

    pairs, counts = np.unique(np.stack([truth, predicted]), axis=1, return_counts=True)
    left_out = np.empty(len(counts))
    for row, (t, p) in enumerate(pairs.T):
        one = np.zeros(size)
        one[t] = 1
        other = np.zeros(size)
        other[p] = 1
        left_out[row] = mean_f1(hits - one * (t == p), true - one, said - other)
    mean = np.average(left_out, weights=counts)
    return math.sqrt((n - 1) / n * float(np.sum(counts * (left_out - mean) ** 2)))


def paired(first: Flags, second: Flags) -> Paired:
    """Count on which records two models differ; (N,) both."""
    return Paired(int((first & ~second).sum()), int((second & ~first).sum()), len(first))


def p_different(pair: Paired) -> float:
    """Exact McNemar test, two-sided: how likely so uneven a split if neither model were better (McNemar 1947)."""
    return _binomial(pair.wins, pair.wins + pair.losses, "two-sided")


def p_worse(pair: Paired) -> float:
    """Exact McNemar test, one-sided: how likely so many losses if the first were no worse."""
    return _binomial(pair.losses, pair.wins + pair.losses, "greater")


def _binomial(count: int, of: int, alternative: str) -> float:
    from scipy.stats import binomtest

    return float(binomtest(count, of, 0.5, alternative=alternative).pvalue) if of else 1.0


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjustment: rejecting where the result is <= alpha errs anywhere at most alpha often.

    (Holm 1979; holds for dependent tests too.)
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)


def smallest_visible_drop(n: int, tests: int, p_max: float) -> float:
    """The least drop of accuracy that `n` records can show at `p_max` when `tests` share it, all losses and no win."""
    return min(1.0, math.ceil(math.log2(tests / p_max)) / n)
