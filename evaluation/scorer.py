"""What evaluation asks of an engine, and one model that is asked: each thing once, however many metrics want it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from evaluation.errors import NotMeasured
from evaluation.gateset import GateRecord, GateSet
from evaluation.metrics import Indices
from evaluation.suite import Asked, Names, Shared

# A broken engine's message may be a page: one line of it is enough to find the log.
_MESSAGE_CHARS_MAX = 200
# A token is at least one byte, so a bound in bytes always holds an answer and its end; a model that never stops still
# costs little.
_ANSWER_TOKENS_MAX = 48

Role = Literal["candidate", "live", "base"]


class Scorer(Protocol):
    """An engine that holds adapters of one base under names; None is the base alone."""

    def score_labels(self, adapter: str | None, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float64]:
        """Summed log-likelihood of each label's completion tokens, end token included: (N, L)."""
        ...

    def generate(self, adapter: str | None, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Greedy answers, (N,)."""
        ...


@runtime_checkable
class TellsTokens(Protocol):
    """An engine that also says how it splits a text."""

    def text_ids(self, text: str) -> list[int]:
        """Token ids of bare text, without an end token."""
        ...


@runtime_checkable
class Chooses(Protocol):
    """An engine that finds the likeliest label without scoring all of them to their ends."""

    def choose(self, adapter: str | None, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float64]:
        """As `score_labels`; a label that is surely less likely than the likeliest may have an upper bound."""
        ...


@runtime_checkable
class ScoresTokens(TellsTokens, Protocol):
    """An engine that also scores any continuation, given as ids, under several adapters in one pass."""

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer, for texts that are not rendered as a conversation."""
        ...

    @property
    def context_max(self) -> int:
        """Most tokens the model looks at."""
        ...

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, ending where the assistant begins to speak."""
        ...

    def generate(self, adapter: str | None, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Greedy answers, (N,)."""
        ...

    def score_tokens(
        self, adapters: Names, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """(A, N) log-likelihoods of continuations behind contexts, and whether greedy decoding would say them."""
        ...


def by_tokens(scorer: Scorer) -> ScoresTokens:
    """The engine itself, also where it is asked through a scorer that keeps answers (`evaluation.together`).

    What is asked of it directly is kept nowhere, as befits planted secrets.

    Raises:
        NotMeasured: it does not score token ids.
    """
    engine = getattr(scorer, "engine", scorer)
    if not isinstance(engine, ScoresTokens):
        raise NotMeasured("this engine does not score token ids")
    return engine


@dataclass(frozen=True)
class Timed:
    """One answer and what it took.

    Attributes:
        seconds: from asking to its last token.
        tokens: how many were generated.
    """

    text: str
    seconds: float
    tokens: int


Timer = Callable[[str | None, Sequence[str], int], Sequence[Timed]]
"""Asks the engine that will serve for answers to prompts, one after the other, of at most so many tokens."""


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


@dataclass
class Subject:
    """One model that is judged or compared with. It remembers what it was asked.

    Attributes:
        role: what it is in this evaluation.
        adapter: the engine's name of it; None is the base alone.
        scorer: the engine.
        gate_set: the stream's public gate set.
        adapter_dir: where its files are; None for the base.
        root: the workspace, from which relative paths in options are read.
        timer: asks the engine that will serve and takes the time; None where none can be asked.
        beside: adapters a suite is asked of in the same pass, because it will be asked for them too.
        suites: what was asked of all models of an evaluation at once; shared between them.
    """

    role: Role
    adapter: str | None
    scorer: Scorer
    gate_set: GateSet
    adapter_dir: Path | None = None
    root: Path = field(default_factory=Path)
    timer: Timer | None = None
    beside: Names = ()
    suites: dict[Hashable, Shared] = field(default_factory=dict, repr=False)
    _predictions: Predictions | None = field(default=None, init=False, repr=False)
    _likelihoods: NDArray[np.float64] | None = field(default=None, init=False, repr=False)
    _answers: dict[tuple[str, int], str] = field(default_factory=dict, init=False, repr=False)
    _mute: str = field(default="", init=False, repr=False)
    _expected: tuple[NDArray[np.float64], NDArray[np.float64]] | None = field(default=None, init=False, repr=False)
    _timed: dict[tuple[tuple[str, ...], int], Sequence[Timed]] = field(default_factory=dict, init=False, repr=False)

    @property
    def predictions(self) -> Predictions:
        """The likeliest label of every record of the gate set."""
        if self._predictions is None:
            self._predictions = predict(self.scorer, self.adapter, self.gate_set)
        return self._predictions

    @property
    def asked_for_labels(self) -> Predictions | None:
        """The predictions, if anybody asked for them."""
        return self._predictions

    def likelihoods(self) -> NDArray[np.float64]:
        """(N, L) log-likelihood of every label on every record, each to its end: dearer than the likeliest alone.

        Raises:
            NotMeasured: the engine threw, or a score is no number.
        """
        if self._likelihoods is None:
            scores, problem = _scores(self.scorer.score_labels, self.adapter, self.gate_set)
            broken = 0 if scores is None else int((~np.isfinite(scores)).sum())
            if scores is None or broken:
                raise NotMeasured(f"{self.named} could not be scored ({problem or f'{broken} scores are no numbers'})")
            self._likelihoods = scores
        return self._likelihoods

    def answers(self, records: Sequence[GateRecord], max_tokens: int = 0) -> list[str]:
        """Greedy answers to some records' prompts, as the engine gave them.

        Args:
            records: of the gate set.
            max_tokens: of an answer; 0: as many as the longest expected answer could have, at most 48.

        Raises:
            NotMeasured: the engine threw.
        """
        return self.says([record.prompt for record in records], max_tokens or self.answer_tokens)

    @property
    def answer_tokens(self) -> int:
        """Enough tokens for the gate set's longest answer and its end, within reason."""
        return answer_tokens(self.gate_set)

    def says(self, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Greedy answers to any prompts; those asked before are not asked again.

        Raises:
            NotMeasured: the engine threw, now or before.
        """
        if self._mute:
            raise NotMeasured(self._mute)
        new = [text for text in dict.fromkeys(prompts) if (text, max_tokens) not in self._answers]
        if new:
            try:
                said = list(self.scorer.generate(self.adapter, new, max_tokens))
            except Exception as error:
                self._mute = f"no answers of {self.named}: {one_line(error)}"
                raise NotMeasured(self._mute) from error
            if len(said) != len(new):
                self._mute = f"no answers of {self.named}: the engine gave {len(said)} to {len(new)} prompts"
                raise NotMeasured(self._mute)
            self._answers |= {(prompt, max_tokens): text for prompt, text in zip(new, said, strict=True)}
        return [self._answers[prompt, max_tokens] for prompt in prompts]

    @property
    def problem(self) -> str:
        """Why the engine gives no answers; empty while it does."""
        return self._mute

    def expected(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Log-likelihood of each record's expected completion, and how many tokens it has, the end token included.

        Raises:
            NotMeasured: the engine threw, or does not tell tokens.
        """
        if self._expected is None:
            self._expected = self._score_expected()
        return self._expected

    def _score_expected(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if not isinstance(self.scorer, TellsTokens):
            raise NotMeasured("this engine does not tell how many tokens a completion has")
        records = self.gate_set.records
        loglik = np.empty(len(records))
        try:
            if self._likelihoods is not None:
                column = {label: index for index, label in enumerate(self.gate_set.labels)}
                loglik[:] = [row[column[r.truth]] for row, r in zip(self._likelihoods, records, strict=True)]
            else:  # each completion behind its own records only
                for said in dict.fromkeys(record.completion for record in records):
                    rows = [row for row, record in enumerate(records) if record.completion == said]
                    prompts = [records[row].prompt for row in rows]
                    loglik[rows] = np.asarray(self.scorer.score_labels(self.adapter, prompts, [said]))[:, 0]
            tokens = [len(self.scorer.text_ids(record.completion)) + 1 for record in records]
        except Exception as error:
            raise NotMeasured(f"{self.named} could not be scored ({one_line(error)})") from error
        return loglik, np.array(tokens, dtype=np.float64)

    def timed(self, records: Sequence[GateRecord], max_tokens: int = 0) -> Sequence[Timed]:
        """Answers to some records' prompts, one after the other, and what each took.

        Raises:
            NotMeasured: nobody takes the time, or the engine threw.
        """
        if self.timer is None:
            raise NotMeasured("no engine that serves was given, so no time can be taken")
        asked, tokens = [record.prompt for record in records], max_tokens or self.answer_tokens
        key = (tuple(asked), tokens)
        if key not in self._timed:
            try:
                found = list(self.timer(self.adapter, asked, tokens))
            except Exception as error:
                raise NotMeasured(f"no time of {self.named}: {one_line(error)}") from error
            if len(found) != len(asked):
                raise NotMeasured(f"no time of {self.named}: {len(found)} answers to {len(asked)} prompts")
            self._timed[key] = found
        return self._timed[key]

    def together(self, key: Hashable, ask: Callable[[Names, int | None], Asked], beside: Names | None = None) -> Asked:
        """What came of asking a suite of this model, and in the same pass of those beside it.

        Args:
            key: the suite, with everything that decides what is asked.
            ask: asks these models; with a number: exactly so many of the items, whatever the time.
            beside: other models; None: this one's `beside`.
        """
        shared = self.suites.setdefault(key, Shared(ask))
        return shared.of(self.adapter, self.beside if beside is None else beside)

    @property
    def named(self) -> str:
        """What it is called in a sentence."""
        return {"candidate": "the candidate", "live": "live", "base": "the base"}[self.role]


def answer_tokens(gate_set: GateSet) -> int:
    """Enough tokens for a gate set's longest answer and its end, within reason."""
    longest = max((len(answer.encode()) for answer in gate_set.answers.values()), default=0)
    return min(_ANSWER_TOKENS_MAX, 1 + longest)


def predict(scorer: Scorer, adapter: str | None, gate_set: GateSet) -> Predictions:
    """The likeliest label of every prompt. An engine that throws or answers nonsense is reported, not passed on."""
    choose = scorer.choose if isinstance(scorer, Chooses) else scorer.score_labels
    scores, problem = _scores(choose, adapter, gate_set)
    if scores is None:
        return Predictions(None, problem=problem)
    broken = int((~np.isfinite(scores)).sum())
    if broken:
        return Predictions(None, broken, f"{broken} of {scores.size} scores are NaN or infinite")
    return Predictions(scores.argmax(axis=1).astype(np.int64))


def _scores(
    ask: Callable[[str | None, Sequence[str], Sequence[str]], NDArray[np.float64]],
    adapter: str | None,
    gate_set: GateSet,
) -> tuple[NDArray[np.float64] | None, str]:
    """(N, L) scores, or why there are none."""
    prompts = [record.prompt for record in gate_set.records]
    expected = (len(prompts), len(gate_set.answers))
    try:
        scores = np.asarray(ask(adapter, prompts, list(gate_set.answers.values())), dtype=float)
    except Exception as error:  # noqa: BLE001 - whatever an engine throws must end in `undecided`, never in `passed`
        return None, one_line(error)
    if scores.shape != expected:
        return None, f"scores have shape {scores.shape}, must be {expected}"
    return scores, ""


def one_line(error: Exception) -> str:
    """An exception's kind and the first line of its message."""
    message = str(error).strip().partition("\n")[0][:_MESSAGE_CHARS_MAX]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
