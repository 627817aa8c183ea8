"""What an engine is to the rest of serving: adapters by name, token ids in, pieces of text out.

Ids and not messages go in, so that one renderer decides what a prompt is, whatever computes the answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: most tokens of the answer.
        temperature: 0 is greedy.
        top_p: nucleus sampling (Holtzman et al. 2020): the smallest set of tokens of at least this mass.
        seed: same seed, same prompt, same batch company: same answer. None draws from the operating system.
        stop: texts that end an answer; they are not part of it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next piece of an answer: whole characters only."""

    text: str


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
