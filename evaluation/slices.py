"""From label choices to the figures of the page: all records, and every domain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from evaluation.gateset import GateSet
from evaluation.labels import groups_of, macro_f1_of, truth_of
from evaluation.measurement import Measurement
from evaluation.metrics import Flags, Indices, Paired, holm, p_worse, paired, score
from evaluation.scorer import Predictions, Role
from evaluation.verdict import ModelScores, Slice

ALL = ""
"""The domain of the slice that holds every record."""


def cut(
    gate_set: GateSet, said: Mapping[Role, Predictions | None], samples_min: Mapping[str, int]
) -> tuple[Slice, ...]:
    """Figures for all records and for each domain; the drop against live is tested wherever a slice is large enough.

    Args:
        gate_set: the records.
        said: what each model chose; None, or nothing, where it was not asked.
        samples_min: the least records of each slice for the test against live.
    """
    truth = truth_of(gate_set)
    domains = np.array([record.domain for record in gate_set.records])
    chosen = {role: one.predicted for role, one in said.items() if one is not None and one.predicted is not None}
    f1 = {role: macro_f1_of(truth, choices, groups_of(gate_set)) for role, choices in chosen.items()}
    parts, pairs = [], []
    for domain in (ALL, *sorted(set(domains.tolist()))):
        rows = domains == domain if domain != ALL else np.ones(len(truth), dtype=bool)
        parts.append(_one(domain, rows, truth, chosen, f1))
        pairs.append(_paired(rows, truth, chosen, "live"))
    return _with_holm(parts, pairs, samples_min)


def _paired(rows: Flags, truth: Indices, chosen: Mapping[Role, Indices], other: Role) -> Paired | None:
    """The candidate against another model on one slice."""
    if "candidate" not in chosen or other not in chosen:
        return None
    right = truth[rows]
    return paired(chosen["candidate"][rows] == right, chosen[other][rows] == right)


def _one(
    domain: str, rows: Flags, truth: Indices, chosen: Mapping[Role, Indices], f1: Mapping[Role, Measurement]
) -> Slice:
    def scores(role: Role) -> ModelScores | None:
        if role not in chosen:
            return None
        return ModelScores(score(Measurement.of(chosen[role] == truth), rows), score(f1[role], rows))

    over_base, over_live = (_paired(rows, truth, chosen, role) for role in ("base", "live"))
    return Slice(
        domain=domain,
        n=int(rows.sum()),
        majority=float(np.bincount(truth[rows]).max() / rows.sum()),
        candidate=scores("candidate"),
        live=scores("live"),
        base=scores("base"),
        gain_over_base=over_base.gain if over_base else None,
        gain_over_live=over_live.gain if over_live else None,
    )


def _with_holm(parts: list[Slice], pairs: list[Paired | None], samples_min: Mapping[str, int]) -> tuple[Slice, ...]:
    tested = [
        (index, pair)
        for index, (part, pair) in enumerate(zip(parts, pairs, strict=True))
        if pair and part.n >= samples_min[part.domain]
    ]
    adjusted = holm([p_worse(pair) for _, pair in tested])
    p_of = {index: p for (index, _), p in zip(tested, adjusted, strict=True)}
    return tuple(replace(part, p_worse_than_live=p_of.get(index)) for index, part in enumerate(parts))
