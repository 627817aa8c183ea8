"""Standard errors and paired tests of any measurement. Each test has a version: a number means nothing without it.

A share of records is tested exactly (McNemar 1947); everything else by exchanging, record by record, what the two
models did (Noreen 1989): where neither is better every such exchange is as likely as what was seen, so the rate of
false alarms is kept at any number of records and for any statistic. A bootstrap's p-value would keep it only in the
limit, so the bootstrap gives standard errors and no p-value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from evaluation.measurement import Measurement, Weights, mean

# How often a bootstrap draws: the standard error is then known to one part in forty-five.
RESAMPLES = 1000
# How often records are exchanged. The least p-value is 1 / (EXCHANGES + 1), small enough for Holm over twenty slices
# at 0.01; the rate of false alarms is kept at any number of exchanges.
EXCHANGES = 1999
# Exchanges whose statistic is computed at once; and the most records whose draws are kept for the next test: 16 MB.
_CHUNK = 256
_KEPT_RECORDS_MAX = 1000
# Both are drawn anew from this seed for each number of records: the same candidate always gets the same verdict.
_SEED = 20261127
# Numbers that differ by less are the same result in another order of adding.
_TIE = 1e-12

MCNEMAR = "mcnemar-exact/1"
EXCHANGE = f"paired-exchange/1 {EXCHANGES}"

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


@dataclass(frozen=True)
class Comparison:
    """Two models on the same records; a gain is positive where the first is better.

    Attributes:
        gain: of the statistic.
        p_different: two-sided; how likely so large a difference if neither were better.
        p_worse: one-sided; how likely so large a loss if the first were no worse.
        test: version of the test.
    """

    gain: Score
    p_different: float
    p_worse: float
    test: str


def score(measured: Measurement, chosen: Flags | None = None) -> Score:
    """Value and standard error of a measurement, on all records or the chosen ones (N,).

    The error of a mean is the sample's; of any other statistic the bootstrap's over records.
    """
    rows = measured.rows if chosen is None else measured.rows[chosen]
    value, n = measured.value(chosen), len(rows)
    if measured.certain:
        return Score(value, 0.0, n)
    if measured.statistic is mean:
        column = rows[:, 0]
        return Score(value, float(column.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0, n)
    return Score(value, _spread(measured.statistic(_resamples(n), rows)), n)


def compare(first: Measurement, second: Measurement, better: str, chosen: Flags | None = None) -> Comparison:
    """The first model against the second on the same records.

    Args:
        first: of the candidate.
        second: of what it is compared with, on the very same records in the same order.
        better: "higher" or "lower".
        chosen: (N,) a slice; None: all.
    """
    sign = 1.0 if better == "higher" else -1.0
    a, b = (one.rows if chosen is None else one.rows[chosen] for one in (first, second))
    if first.binary and second.binary:
        right, other = (a[:, 0] == max(sign, 0), b[:, 0] == max(sign, 0))
        pair = paired(right, other)
        return Comparison(pair.gain, p_different(pair), p_worse(pair), MCNEMAR)
    gain = sign * (first.value(chosen) - second.value(chosen))
    if first.certain or second.certain:
        return Comparison(Score(gain, 0.0, len(a)), float(gain == 0), float(gain >= 0), "none")
    if first.statistic is mean:
        exchanged, se = _exchanged_means(sign * (a[:, 0] - b[:, 0]))
    else:
        exchanged, se = _exchanged(first, a, b, sign)
    tie = _TIE * max(1.0, abs(gain))
    different = int((np.abs(exchanged) >= abs(gain) - tie).sum())
    worse = int((exchanged <= gain + tie).sum())
    of = EXCHANGES + 1
    return Comparison(Score(gain, se, len(a)), (1 + different) / of, (1 + worse) / of, EXCHANGE)


def _exchanged_means(differences: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Gains under every exchange, and the gain's standard error: the sample's."""
    n = len(differences)
    flipped = _signs(n) @ differences / n
    return flipped, float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0


def _exchanged(
    measured: Measurement, a: NDArray[np.float64], b: NDArray[np.float64], sign: float
) -> tuple[NDArray[np.float64], float]:
    """The same for any statistic, of both models' rows together with weights; the error is the paired bootstrap's."""
    n, both, gains = len(a), np.concatenate([a, b]), []
    for first in range(0, EXCHANGES, _CHUNK):
        kept = (1.0 + _signs(n)[first : first + _CHUNK]) / 2
        ours = measured.statistic(np.concatenate([kept, 1 - kept], axis=1), both)
        theirs = measured.statistic(np.concatenate([1 - kept, kept], axis=1), both)
        gains.append(sign * (ours - theirs))
    weights = _resamples(n)
    se = _spread(measured.statistic(weights, a) - measured.statistic(weights, b))
    return np.concatenate(gains), se


def _resamples(n: int) -> Weights:
    """(RESAMPLES, n): how often each record is drawn."""
    return _kept_resamples(n) if n <= _KEPT_RECORDS_MAX else _draw_resamples(n)


@lru_cache(maxsize=8)
def _kept_resamples(n: int) -> Weights:
    return _draw_resamples(n)


def _draw_resamples(n: int) -> Weights:
    rng = np.random.default_rng([_SEED, n])
    return rng.multinomial(n, np.full(n, 1.0 / n), size=RESAMPLES).astype(np.float64)


def _signs(n: int) -> Weights:
    """(EXCHANGES, n): -1 where a record's pair is exchanged, else 1.

    The same ones may serve every test of n records: a test is exact for any exchanges that were drawn without looking
    (Hemerik and Goeman 2018).
    """
    return _kept_signs(n) if n <= _KEPT_RECORDS_MAX else _draw_signs(n)


def _draw_signs(n: int) -> Weights:
    rng = np.random.default_rng([_SEED, n, 2])
    return np.where(rng.integers(0, 2, size=(EXCHANGES, n), dtype=np.int8), -1.0, 1.0)


@lru_cache(maxsize=8)
def _kept_signs(n: int) -> Weights:
    return _draw_signs(n)


def _spread(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1))


def paired(first: Flags, second: Flags) -> Paired:
    """Count on which records two models differ; (N,) both."""
    return Paired(int((first & ~second).sum()), int((second & ~first).sum()), len(first))


def p_different(pair: Paired) -> float:
    """Exact McNemar test, two-sided: how likely so uneven a split if neither model were better (McNemar 1947)."""
    return min(1.0, 2 * _at_most(min(pair.wins, pair.losses), pair.wins + pair.losses))


def p_worse(pair: Paired) -> float:
    """Exact McNemar test, one-sided: how likely so many losses if the first were no worse."""
    return _at_most(pair.wins, pair.wins + pair.losses)


@lru_cache(maxsize=1024)
def _at_most(count: int, of: int) -> float:
    """Chance of at most so many heads among `of` fair coins."""
    from scipy.stats import binom

    return float(binom.cdf(count, of, 0.5))


def p_reached(right: int, n: int, bound: float) -> tuple[float, float]:
    """Exact binomial test of a share: how likely so many, and so few, if the true share were just the bound."""
    from scipy.stats import binom

    return float(binom.sf(right - 1, n, bound)), float(binom.cdf(right, n, bound))


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


def smallest_visible_gain(n: int, p_max: float) -> float:
    """The least gain of accuracy that `n` records can show at a two-sided `p_max`, all wins and no loss."""
    return min(1.0, math.ceil(math.log2(2 / p_max)) / n)
