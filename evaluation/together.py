"""One engine that is asked by several subjects: what one of them asks is asked for all that will want it, in one pass.

Metrics ask one model at a time. Candidate, live and base are asked the same questions, though, and an engine that holds
them on one base answers for all of them in little more than the time of one. So the first question is asked for
everybody, what the others said is remembered, and public questions are kept on disk (`evaluation.cache`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from evaluation.cache import Cache, Entry
from evaluation.errors import EvaluationError
from evaluation.gates import check
from evaluation.gateset import GateSet
from evaluation.policy import GatePolicy
from evaluation.scorer import Role, answer_tokens, one_line
from privacy.canonical import sha256_of

# How near the likeliest label another must be to be followed to its end when only the likeliest is wanted: far more
# than rounding can move a score, so that what is chosen is what whole scores would choose.
WITHIN = 0.01
# Changes whenever what is asked, or how, changes in a way that the key does not show.
VERSION = "asked/1"

log = structlog.get_logger()


class Said(Protocol):
    """What one adapter says about some prompts."""

    @property
    def scores(self) -> NDArray[np.float64]:
        """(N, L) of labels."""

    @property
    def answers(self) -> Sequence[str | None]:
        """N greedy answers; None where logits were not finite."""


class Engine(Protocol):
    """An engine that answers for several adapters of one base in one pass."""

    def ask(
        self,
        adapters: Sequence[str | None],
        prompts: Sequence[str],
        labels: Sequence[str] = (),
        *,
        max_tokens: int | Sequence[int] = 0,
        within: float = math.inf,
    ) -> Sequence[Said]:
        """Scores and greedy answers, an entry an adapter."""

    def text_ids(self, text: str) -> list[int]:
        """Token ids of bare text, without an end token."""


@dataclass
class Together:
    """A scorer (`evaluation.scorer.Scorer`) for the models of one evaluation.

    Attributes:
        engine: holds them all.
        sha256: of each adapter by its name, None is the base: what answers are kept under.
        scored: adapters whose scores will be wanted, as far as the policy tells.
        writers: adapters whose answers will be wanted.
        answer_tokens: of an answer to each prompt that is scored; 0: few of those are wanted, so none is asked for
            before somebody asks.
        about: everything else that what is said depends on, such as system prompt and code.
        cache: where answers are kept; None: nowhere. Only for public questions.
    """

    engine: Engine
    sha256: Mapping[str | None, str]
    scored: Sequence[str | None] = ()
    writers: Sequence[str | None] = ()
    answer_tokens: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)
    cache: Cache | None = None
    _scores: dict[tuple[str | None, str, float], NDArray[np.float64]] = field(default_factory=dict, init=False)
    _answers: dict[tuple[str | None, int], dict[str, str]] = field(default_factory=dict, init=False)
    _labels: tuple[str, ...] = field(default=(), init=False)

    def score_labels(self, adapter: str | None, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float64]:
        """Summed log-likelihood of every label: (N, L)."""
        return self._score(adapter, tuple(prompts), tuple(labels), math.inf)

    def choose(self, adapter: str | None, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float64]:
        """The same for the likeliest label and what comes near it; what is surely less likely has a bound: (N, L)."""
        return self._score(adapter, tuple(prompts), tuple(labels), WITHIN)

    def generate(self, adapter: str | None, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Greedy answers, (N,).

        Raises:
            EvaluationError: some logits are not finite.
        """
        new = self._unanswered(adapter, tuple(dict.fromkeys(prompts)), max_tokens)
        if new:
            others = [other for other in self.writers if other != adapter and self._unanswered(other, new, max_tokens)]
            self._ask([adapter, *others], new, self._labels, -1.0, [max_tokens] * (1 + len(others)))
        known = self._answers[adapter, max_tokens]
        if missing := sum(prompt not in known for prompt in prompts):
            raise EvaluationError(f"{missing} of {len(prompts)} answers have logits that are NaN or infinite")
        return [known[prompt] for prompt in prompts]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of bare text, without an end token."""
        return self.engine.text_ids(text)

    # How

    def _score(
        self, adapter: str | None, prompts: tuple[str, ...], labels: tuple[str, ...], within: float
    ) -> NDArray[np.float64]:
        if (found := self._scored(adapter, prompts, labels, within)) is not None:
            return found
        others = [
            other for other in self.scored if other != adapter and self._scored(other, prompts, labels, within) is None
        ]
        most = [
            self.answer_tokens
            if self.answer_tokens and who in self.writers and self._unanswered(who, prompts, self.answer_tokens)
            else 0
            for who in (adapter, *others)
        ]
        self._labels = labels
        self._ask([adapter, *others], prompts, labels, within, most)
        return self._scores[adapter, _named(prompts, labels), within]

    def _scored(
        self, adapter: str | None, prompts: tuple[str, ...], labels: tuple[str, ...], within: float
    ) -> NDArray[np.float64] | None:
        """Scores that are known, here or on disk; whole ones will do for any margin."""
        question = _named(prompts, labels)
        for margin in (math.inf, within):
            if (adapter, question, margin) in self._scores:
                return self._scores[adapter, question, margin]
            entry = self.cache.get(self._key(adapter, scores=question, within=margin)) if self.cache else None
            if entry and entry.scores is not None and entry.scores.shape == (len(prompts), len(labels)):
                self._scores[adapter, question, margin] = entry.scores
                return entry.scores
        return None

    def _unanswered(self, adapter: str | None, prompts: tuple[str, ...], max_tokens: int) -> tuple[str, ...]:
        """Those prompts whose answers are not known, neither here nor on disk."""
        known = self._answers.get((adapter, max_tokens))
        if known is None:
            entry = self.cache.get(self._key(adapter, max_tokens=max_tokens)) if self.cache else None
            known = self._answers[adapter, max_tokens] = dict(entry.answers or {}) if entry else {}
        return tuple(prompt for prompt in prompts if prompt not in known)

    def _ask(
        self,
        adapters: list[str | None],
        prompts: tuple[str, ...],
        labels: tuple[str, ...],
        within: float,
        most: list[int],
    ) -> None:
        """Ask the engine for all these adapters; for the first alone when it cannot answer for all."""
        try:
            said = self.engine.ask(adapters, prompts, labels, max_tokens=most, within=within)
        except Exception as error:
            if len(adapters) == 1:
                raise
            log.warning("models are asked one by one", problem=one_line(error))
            adapters = adapters[:1]
            said = self.engine.ask(adapters, prompts, labels, max_tokens=most[:1], within=within)
        for adapter, one, tokens in zip(adapters, said, most, strict=False):
            if within >= 0:
                self._scores[adapter, _named(prompts, labels), within] = one.scores
                if np.isfinite(one.scores).all():
                    key = self._key(adapter, scores=_named(prompts, labels), within=within)
                    self._keep(key, Entry(scores=one.scores))
            if tokens:
                known = self._answers.setdefault((adapter, tokens), {})
                known.update(
                    (prompt, said) for prompt, said in zip(prompts, one.answers, strict=True) if said is not None
                )
                if known:
                    self._keep(self._key(adapter, max_tokens=tokens), Entry(answers=known))

    def _keep(self, key: Mapping[str, Any], entry: Entry) -> None:
        if self.cache:
            self.cache.put(key, entry)

    def _key(self, adapter: str | None, *, within: float = 0.0, **asked: Any) -> dict[str, Any]:
        margin = "all" if math.isinf(within) else within
        return {
            "adapter": self.sha256[adapter],
            "version": VERSION,
            "about": dict(self.about),
            "within": margin,
            **asked,
        }


def for_policy(
    policy: GatePolicy,
    gate_set: GateSet,
    engine: Engine,
    names: Mapping[Role, str | None],
    sha256: Mapping[str | None, str],
    *,
    about: Mapping[str, Any],
    cache: Cache | None,
) -> Together:
    """A scorer that asks for everybody whom the policy's gates will ask, and for nobody else.

    Args:
        policy: whose gates say which models are scored, and which must write.
        gate_set: what they are asked on.
        engine: holds them.
        names: the engine's names of the models there are.
        sha256: of each by its name.
        about: what else answers depend on: base, system prompt, code.
        cache: where answers are kept.

    Raises:
        PolicyError: a metric does not exist.
    """
    scored: dict[str | None, None] = {}
    writers: dict[str | None, None] = {}
    whole = False
    for rule, metric in check(policy):
        roles: tuple[Role, ...] = ("candidate",) if rule.against == "absolute" else ("candidate", rule.against)
        asked = dict.fromkeys(names[role] for role in roles if role in names)
        if metric.cost == "scores":
            scored |= asked
        elif metric.cost in {"answers", "suite"}:
            writers |= asked
            options = metric.settle(rule.options)
            whole |= options.get("samples") == 0 and options.get("max_tokens") == 0
    tokens = answer_tokens(gate_set) if whole else 0
    return Together(engine, sha256, tuple(scored), tuple(writers), tokens, about, cache)


def _named(*asked: tuple[str, ...]) -> str:
    """What was asked, as a hash: prompts, or prompts and labels, in their order."""
    return sha256_of([list(part) for part in asked])
