"""What a line of versions has kept: average accuracy, backward transfer and forgetting.

R[t, d] is the accuracy of the version after round t on domain d of one fixed set. (Average accuracy and backward
transfer: Lopez-Paz, Ranzato 2017, 'Gradient Episodic Memory'. Forgetting: Chaudhry et al. 2018, 'Riemannian Walk'.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

VERSION = "continual/1 summed-loglik"


@dataclass(frozen=True)
class Memory:
    """Figures of the newest version of a line, all shares of records.

    Attributes:
        average_accuracy: mean of R[T, d] over the domains learnt so far; None when there are none.
        backward_transfer: mean over the domains learnt before the last round of R[T, d] - R[learnt(d), d]: below zero,
            later rounds have cost the earlier ones. None when there are none.
        forgetting: for the same domains, the best any earlier version did less what the newest does, max over t < T of
            R[t, d] - R[T, d]: below zero, the newest is the best.
    """

    average_accuracy: float | None
    backward_transfer: float | None
    forgetting: Mapping[str, float]

    @property
    def forgetting_mean(self) -> float | None:
        """Mean of forgetting over its domains; None when there are none."""
        return fmean(self.forgetting.values()) if self.forgetting else None


def memory(rounds: Sequence[Mapping[str, float]], learnt: Mapping[str, int] | None = None) -> Memory:
    """Figures of the last of some rounds.

    Args:
        rounds: for each round, oldest first, accuracy by domain; a domain that was not measured is left out.
        learnt: for each domain, the index of the round that first trained on it. Which domains a private block holds is
            private, so without it a domain counts as learnt in the first round that was measured on it.

    Raises:
        ValueError: there are no rounds, or a domain was not measured in the round that learnt it or in the last one.
    """
    if not rounds:
        raise ValueError("rounds=0: must be >= 1; there is nothing to measure")
    last = len(rounds) - 1
    first = learnt if learnt is not None else _first_measured(rounds)
    known = sorted(domain for domain, number in first.items() if number <= last)
    for domain in known:
        for number in (first[domain], last):
            if domain not in rounds[number]:
                raise ValueError(f"domain={domain}: was not measured after round {number}; measure it")
    now = rounds[last]
    before = [domain for domain in known if first[domain] < last]
    return Memory(
        average_accuracy=fmean(now[domain] for domain in known) if known else None,
        backward_transfer=fmean(now[d] - rounds[first[d]][d] for d in before) if before else None,
        forgetting={d: max(r[d] for r in rounds[:last] if d in r) - now[d] for d in before},
    )


def _first_measured(rounds: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """For every domain of the last round, the first round that was measured on it."""
    return {d: next(number for number, r in enumerate(rounds) if d in r) for d in rounds[-1]}
