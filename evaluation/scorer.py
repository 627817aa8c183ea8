"""What evaluation asks of an engine, and what it makes of the answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evaluation.gateset import GateSet
from evaluation.metrics import Indices

# A broken engine's message may be a page: one line of it is enough to find the log.
_MESSAGE_CHARS_MAX = 200


class Scorer(Protocol):
    """An engine that holds adapters of one base under names; None is the base alone."""

    def score_labels(self, adapter: str | None, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float64]:
        """Summed log-likelihood of each label's completion tokens, end token included: (N, L)."""
        ...

    def generate(self, adapter: str | None, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Greedy answers, (N,)."""
        ...


@dataclass(frozen=True)
class Predictions:
    """What one model says on a gate set.

    Attributes:
        predicted: (N,) column of the likeliest label; None when there is no usable answer.
        broken: how many scores are NaN or infinite.
        problem: why there is no answer at all.
    """

    predicted: Indices | None
    broken: int = 0
    problem: str = ""


def predict(scorer: Scorer, adapter: str | None, gate_set: GateSet) -> Predictions:
    """Score every label on every prompt. An engine that throws or answers nonsense is reported, not passed on."""
    prompts = [record.prompt for record in gate_set.records]
    expected = (len(prompts), len(gate_set.answers))
    try:
        scores = np.asarray(scorer.score_labels(adapter, prompts, list(gate_set.answers.values())), dtype=float)
    except Exception as error:  # noqa: BLE001 - whatever an engine throws must end in `undecided`, never in `passed`
        return Predictions(None, problem=one_line(error))
    if scores.shape != expected:
        return Predictions(None, problem=f"scores have shape {scores.shape}, must be {expected}")
    broken = int((~np.isfinite(scores)).sum())
    if broken:
        return Predictions(None, broken, f"{broken} of {scores.size} scores are NaN or infinite")
    return Predictions(scores.argmax(axis=1).astype(np.int64))


def one_line(error: Exception) -> str:
    """An exception's kind and the first line of its message."""
    message = str(error).strip().partition("\n")[0][:_MESSAGE_CHARS_MAX]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
