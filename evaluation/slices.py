"""From predictions to figures per slice: all records, and every domain."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from evaluation.gateset import GateSet
from evaluation.metrics import (
    Flags,
    Indices,
    Paired,
    Score,
    accuracy,
    holm,
    macro_f1,
    p_worse,
    paired,
)
from evaluation.scorer import Predictions
from evaluation.verdict import ModelScores, Slice

ALL = ""
"""The domain of the slice that holds every record."""


@dataclass(frozen=True)
class Cut:
    """One slice with what each model did on its records."""

    shown: Slice
    against_base: Paired | None
    against_live: Paired | None


def cut(
    gate_set: GateSet,
    candidate: Predictions,
    live: Predictions | None,
    base: Predictions,
    samples_min: Mapping[str, int],
) -> tuple[Cut, ...]:
    """Figures for all records and for each domain; the drop against live is tested wherever a slice is large enough.

    Args:
        gate_set: the records.
        candidate: of the adapter that is judged.
        live: None when nothing is live.
        base: of the bare base.
        samples_min: the least records of each slice for the test against live.
    """
    truth = _truth(gate_set)
    domains = np.array([record.domain for record in gate_set.records])
    cuts = []
    for domain in (ALL, *sorted(set(domains.tolist()))):
        rows = domains == domain if domain != ALL else np.ones(len(truth), dtype=bool)
        cuts.append(_one(domain, rows, truth, candidate, live, base))
    return _with_holm(tuple(cuts), samples_min)


def _truth(gate_set: GateSet) -> Indices:
    column = {label: index for index, label in enumerate(gate_set.labels)}
    return np.array([column[record.truth] for record in gate_set.records], dtype=np.int64)


def _one(
    domain: str, rows: Flags, truth: Indices, candidate: Predictions, live: Predictions | None, base: Predictions
) -> Cut:
    def scores(model: Predictions | None) -> ModelScores | None:
        if model is None or model.predicted is None:
            return None
        said = model.predicted[rows]
        return ModelScores(accuracy(said == truth[rows]), macro_f1(truth[rows], said))

    def against(other: Predictions | None) -> Paired | None:
        if candidate.predicted is None or other is None or other.predicted is None:
            return None
        right = truth[rows]
        return paired(candidate.predicted[rows] == right, other.predicted[rows] == right)

    def gain(pair: Paired | None) -> Score | None:
        return pair.gain if pair else None

    over_base, over_live = against(base), against(live)
    shown = Slice(
        domain=domain,
        n=int(rows.sum()),
        majority=float(np.bincount(truth[rows]).max() / rows.sum()),
        candidate=scores(candidate),
        live=scores(live),
        base=scores(base),
        gain_over_base=gain(over_base),
        gain_over_live=gain(over_live),
    )
    return Cut(shown, over_base, over_live)


def _with_holm(cuts: tuple[Cut, ...], samples_min: Mapping[str, int]) -> tuple[Cut, ...]:
    tested = [
        (index, one.against_live)
        for index, one in enumerate(cuts)
        if one.against_live and one.shown.n >= samples_min[one.shown.domain]
    ]
    adjusted = holm([p_worse(pair) for _, pair in tested])
    p_of = {index: p for (index, _), p in zip(tested, adjusted, strict=True)}
    return tuple(
        replace(one, shown=replace(one.shown, p_worse_than_live=p_of.get(index))) for index, one in enumerate(cuts)
    )
