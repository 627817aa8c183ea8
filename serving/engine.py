"""What an engine is to the rest of serving: adapters by name, token ids in, pieces of text out.

Ids and not messages go in, so that one renderer decides what a prompt is, whatever computes the answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]

# As OpenAI's `top_logprobs`.
LOGPROBS_MAX = 20


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: most tokens of the answer.
        temperature: 0 is greedy.
        top_p: nucleus sampling (Holtzman et al. 2020): the smallest set of tokens of at least this mass.
        seed: same seed, same prompt, same batch company: same answer. None draws from the operating system.
        stop: texts that end an answer; they are not part of it.
        logprobs: with each token its log-probability and so many of the likeliest instead of it, at most LOGPROBS_MAX;
            0 asks for the chosen one alone, None for none. They are the model's: before temperature and nucleus.
        timeout_s: the answer fails with `AnswerTimeout` when it is not whole so long after it was asked for.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    timeout_s: float | None = None


@dataclass(frozen=True)
class Likelihood:
    """A token and how likely it was.

    Attributes:
        text: the token alone; U+FFFD stands for bytes that are no character by themselves.
        raw: its bytes; those of an answer's tokens one behind another are its text, in UTF-8.
        logprob: natural logarithm of its probability.
    """

    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True)
class Token(Likelihood):
    """A token of an answer.

    Attributes:
        top: the likeliest in its place, likeliest first, as many as were asked for, with the chosen one or without.
    """

    top: tuple[Likelihood, ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next piece of an answer: whole characters only.

    Attributes:
        text: empty only when there are tokens that show nothing.
        tokens: those that begin in the text up to its end and were not handed out before, if they were asked for. The
            token that ends an answer is none of them; of a stop text only what began before it.
    """

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Finish:
    """The end of an answer, and what it took."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


class Answer(Protocol):
    """One answer on its way."""

    def __aiter__(self) -> AsyncIterator[Piece | Finish]:
        """Pieces, then one Finish.

        Raises:
            EngineError: the answer could not be finished.
        """

    def cancel(self) -> None:
        """Nobody waits for it any more; does nothing when it is finished."""


class Engine(Protocol):
    """Several adapters of one base, resident at once."""

    def load(self, name: str, adapter_dir: Path) -> None:
        """Make an adapter resident; requests that run are not touched.

        Raises:
            EngineError: it is damaged or belongs to another base.
        """

    def unload(self, name: str) -> None:
        """Forget an adapter; answers that use it still finish on it."""

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the adapters it can answer with."""

    def probe(self, name: str | None) -> None:
        """Run a tiny prompt.

        Raises:
            EngineError: a logit is not finite.
        """

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, ending where the assistant begins to speak."""

    def text_ids(self, text: str) -> list[int]:
        """Token ids of bare text; control tokens in it stay text."""

    async def submit(self, adapter: str | None, prompt_ids: Sequence[int], sampling: Sampling) -> Answer:
        """Queue one answer.

        Raises:
            QueueFull: too many are waiting.
            UnknownAdapter: `adapter` is not resident.
            PromptTooLong: prompt and `max_tokens` exceed the context.
        """

    @property
    def waiting(self) -> int:
        """Answers queued and not begun."""

    def close(self) -> None:
        """Stop; answers on their way fail."""

    @property
    def healthy(self) -> bool:
        """Whether answers can still come out of it."""
