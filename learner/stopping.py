"""Early stopping on a public signal: end a round once further steps stop helping, and keep the weights that did best.

Weights after any step of a round are private already, and the signal is a function of them and of public records:
looking at it as often as one likes is post-processing. It saves time, never budget, which was charged in advance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from learner.head import LOGIT_ROWS, plain_logits
from learner.prefix import PrefixCache, SplitModel
from learner.step import Example, completions

if TYPE_CHECKING:
    from torch import Tensor

    from learner.lora import LoraModel
    from learner.plan import StoppingSettings

Render = Callable[[str, str], Example]
"""Prompt and completion to token ids, as the round renders its own records."""

Score = Callable[["LoraModel"], float]
"""What a model's present weights are worth on public records; higher is better. Never on private ones."""


@dataclass(frozen=True)
class Signal:
    """A public set, by its hash, and how weights are scored on it."""

    sha256: str
    prepare: Callable[[Render], Score]


class Stopper:
    """What was seen of the signal so far, and so whether to go on.

    Args:
        settings: how often to look, how patient to be, what to keep; None: a round never stops early.
        score: of the model's present weights.
        kept: `state` and `best` of an interrupted round.
    """

    def __init__(
        self, settings: StoppingSettings | None, score: Score | None, kept: tuple[str, Tensor | None] = ("", None)
    ) -> None:
        seen = json.loads(kept[0]) if kept[0] else {}
        self._settings = settings
        self._score = score
        self._highest = float(seen.get("highest", -math.inf))
        self._waited = int(seen.get("waited", 0))
        self.best = kept[1]

    @property
    def state(self) -> str:
        """All of it but the best weights, as JSON."""
        return json.dumps({"highest": self._highest, "waited": self._waited}) if self._settings else ""

    @property
    def ended(self) -> bool:
        """Whether `patience` scores in a row brought nothing."""
        return self._settings is not None and self._waited >= self._settings.patience

    def after(self, done: int, steps: int, lora: LoraModel) -> None:
        """Score the weights after `done` of `steps` steps, where it is time to: every so many steps, and at the end.

        A score that is no number counts as no gain.
        """
        if self._settings is None or self._score is None or (done % self._settings.every_steps and done != steps):
            return
        score = self._score(lora)
        if score > self._highest:
            self._highest, self._waited = score, 0
            self.best = lora.theta.clone() if self._settings.keep == "best" else None
        else:
            self._waited += 1

    def settle(self, lora: LoraModel) -> None:
        """Give the model the weights that are to be kept."""
        if self.best is not None:
            lora.theta.copy_(self.best)


def of_outcome(score: Score, outcome: Callable[[Tensor], Tensor]) -> Score:
    """Score what a round would end with, given its present weights (P,), and leave those as they are."""

    def scored(lora: LoraModel) -> float:
        trained = lora.theta.clone()
        lora.theta.copy_(outcome(trained))
        try:
            return score(lora)
        finally:
            lora.theta.copy_(trained)

    return scored


def likelihood(examples: Sequence[Example], *, tokens_max: int = 2048, prefix_bytes_max: int = 1 << 28) -> Score:
    """Scores weights by the mean log-likelihood of public completions, per token, each record counting the same.

    The prefixes below the lowest adapted layer are computed once.
    """
    kept: list[tuple[SplitModel, PrefixCache]] = []
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].ids), i))

    def score(lora: LoraModel) -> float:
        if not kept:
            halves = SplitModel(lora.model, lora.lowest)
            cache = PrefixCache(halves, [example.ids for example in examples], prefix_bytes_max)
            cache.fill(order, tokens_max)
            kept.append((halves, cache))
        lora.gradients.open(0)  # no dropout
        total = 0.0
        with torch.no_grad():
            for part in _parts(order, examples, tokens_max):
                total -= _loss(lora, *kept[0], part, [examples[i] for i in part])
        return total / len(examples)

    return score


def _parts(order: Sequence[int], examples: Sequence[Example], tokens_max: int) -> list[list[int]]:
    parts: list[list[int]] = []
    for index in order:
        if not parts or (len(parts[-1]) + 1) * len(examples[index].ids) > tokens_max:
            parts.append([])
        parts[-1].append(index)
    return parts


def _loss(
    lora: LoraModel, halves: SplitModel, cache: PrefixCache, indices: Sequence[int], examples: Sequence[Example]
) -> float:
    """Sum over the examples of their mean cross-entropy, nats a token."""
    row, column, position, target, weight = completions(examples)
    positions = torch.zeros(len(examples), int(column.max()) + 1, dtype=torch.long)
    positions[row, column] = position
    hidden = halves.norm(halves.upper(cache.hidden(indices), positions)[row, column].float())  # (N, H)
    total = 0.0
    for first in range(0, len(hidden), LOGIT_ROWS):
        rows = slice(first, first + LOGIT_ROWS)
        logits = plain_logits(hidden[rows], halves.head)  # (n, V)
        if lora.head:
            lora.head.add(logits, hidden[rows])
        losses = torch.nn.functional.cross_entropy(logits, target[rows], reduction="none")
        total += float((losses.double() * weight[rows]).sum())
    return total
