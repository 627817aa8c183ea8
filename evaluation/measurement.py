"""What one model did on some records, in a form from which value, error, slices and paired tests all follow.

A metric answers with one row of numbers a record, and a statistic: a function of those rows and of how often each
counts. Weights of one give the value; weights of nought and one a domain's; multinomial weights the bootstrap (Efron
1979); and the rows of two models with weights that exchange a record's pair the randomisation test (Noreen 1989).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]
Weights = NDArray[np.float64]
Statistic = Callable[[Weights, Rows], NDArray[np.float64]]
"""(B, N) weights and (N, K) rows give (B,) values; every row of weights has a sum above nought."""


def mean(weights: Weights, rows: Rows) -> NDArray[np.float64]:
    """The weighted mean of the first column, (B,)."""
    values: NDArray[np.float64] = (weights @ rows[:, 0]) / weights.sum(axis=1)
    return values


@dataclass(frozen=True)
class Measurement:
    """What one model did, record by record.

    Attributes:
        rows: (N, K) numbers, K as the statistic wants it. Anything that is not finite makes the measurement broken.
        statistic: from weights and rows to values.
        groups: what a gate may slice by: `domain`, and `label` where there is one; (N,) each.
        point: the value from all rows of a slice, where a library computes it; the statistic must agree.
        version: overrides the metric's where it depends on what was found, such as a model's hash.
        certain: a figure without sampling error, such as a size in bytes: no least number of samples is asked for.
        missing: what was left out and why, for a person; empty when nothing was.
    """

    rows: Rows
    statistic: Statistic = mean
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    point: Callable[[Rows], float] | None = None
    version: str = ""
    certain: bool = False
    missing: str = ""

    @classmethod
    def of(
        cls, values: Sequence[float] | NDArray[np.float64], domains: Sequence[str] = (), **rest: object
    ) -> Measurement:
        """The mean of one value a record; values of 0 and 1 are tested exactly (McNemar).

        Args:
            values: (N,).
            domains: (N,), where `slice: domain` shall be possible.
            rest: other attributes.
        """
        groups = {"domain": tuple(domains)} if len(domains) else {}
        rows = np.asarray(values, dtype=np.float64).reshape(-1, 1)
        return cls(rows, groups=groups, **rest)  # type: ignore[arg-type]

    @classmethod
    def exactly(cls, value: float) -> Measurement:
        """A figure that is known and not estimated, such as a size."""
        return cls(np.array([[value]], dtype=np.float64), certain=True)

    def value(self, chosen: NDArray[np.bool_] | None = None) -> float:
        """The statistic of all rows, or of the chosen ones (N,); at least one must be."""
        rows = self.rows if chosen is None else self.rows[chosen]
        if self.point is not None:
            return float(self.point(rows))
        if self.statistic is mean:
            return float(rows[:, 0].mean())
        return float(self.statistic(np.ones((1, len(rows))), rows)[0])

    @property
    def n(self) -> int:
        """How many records."""
        return len(self.rows)

    @property
    def broken(self) -> int:
        """How many of the numbers are NaN or infinite."""
        return int((~np.isfinite(self.rows)).sum())

    @property
    def binary(self) -> bool:
        """Whether it is a share of records."""
        return self.statistic is mean and bool(np.isin(self.rows[:, 0], (0.0, 1.0)).all())
