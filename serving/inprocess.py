"""The engine of the embedded defaults: one model in this process, on the CPU, many adapters, one thread that computes.

Everything that touches the model runs on that thread, in turn: a step of the answers being written, the prompts that
wait to join them, one pass of a scoring. Loading an adapter happens on the caller's thread and takes effect at once;
answers hold the adapter they began with, so removing its name does not touch them.
"""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from learner.base import Base, load_tokenizer
from learner.errors import LearnerError
from learner.prompt import Renderer
from serving.continuations import TokenRow, score
from serving.decoding import Slots, choose, likelihoods
from serving.engine import Finish, FinishReason, Likelihood, Piece, Sampling, Token
from serving.errors import AnswerTimeout, EngineError, PromptTooLong, QueueFull, UnknownAdapter, places
from serving.forward import Decoder, Resident, resident_from
from serving.scoring import Scored, Scorer
from serving.text import TextStream, token_bytes

T = TypeVar("T")
Event = Piece | Finish | EngineError

# An idle engine waits this long for company before it runs a first prompt: less than a step of the smallest real model.
WINDOW_S = 0.002
# Padded tokens of prompts run together; answers being written wait for at most one such pass.
JOIN_TOKENS = 1024
# It also runs the opening of all conversations under a new adapter, so that no question has to wait for that.
PROBE = ({"role": "user", "content": "ping"},)
# Shorter openings are not worth keeping.
OPENING_TOKENS_MIN = 8
PROBE_STEPS = 3
# A thread that computes lets go of the interpreter at every operation, and waits so long to have it back from one that
# does not, as when a swap reads an adapter or the API a request. Python's 5 ms would make a step of 600 operations last
# for seconds.
SWITCH_S = 0.0005
RETRY_AFTER_S_MAX = 60

log = structlog.get_logger()


@cache
def code_sha256() -> str:
    """Of every source file that what a model says depends on: kept answers of other code are not believed."""
    root = Path(__file__).resolve().parent.parent
    names = ("serving/inprocess.py", "serving/scoring.py", "serving/decoding.py", "serving/forward.py")
    sources = (*names, "learner/prompt.py", "learner/adapter.py", "learner/base.py")
    return sha256(b"".join(sha256((root / name).read_bytes()).digest() for name in sources)).hexdigest()


@dataclass(frozen=True)
class Said:
    """What one adapter says about N prompts.

    Attributes:
        scores: (N, L) summed log-likelihoods of labels; NaN where logits were not finite, or no scores were wanted.
        answers: N greedy answers; None where logits were not finite, or no answers were wanted.
    """

    scores: NDArray[np.float64]
    answers: list[str | None]


class _NotFinite(EngineError):
    """Logits are NaN or infinite."""


class _Writing:
    """One answer, waiting or being written."""

    def __init__(
        self,
        adapter: Resident | None,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        sink: Callable[[Event], None],
    ) -> None:
        self.adapter = adapter
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.sink = sink
        self.cancelled = False
        self.alone = False  # its prompt is not run together with others': should it fail, it fails alone
        self.produced = 0
        self.last = -1
        self.began_s = 0.0
        self.ends_s = math.inf if sampling.timeout_s is None else time.monotonic() + sampling.timeout_s
        self.text: TextStream | None = None
        self.tokens: deque[tuple[int, Token]] = deque()  # not handed out yet, with the character they begin at
        self.generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self.generator = torch.Generator()
            self.generator.manual_seed(sampling.seed) if sampling.seed is not None else self.generator.seed()


class InProcessAnswer:
    """One answer on its way from the computing thread to an event loop."""

    def __init__(self, writing: _Writing, events: asyncio.Queue[Event], cancel: Callable[[_Writing], None]) -> None:
        self._writing = writing
        self._events = events
        self._cancel = cancel

    async def __aiter__(self) -> AsyncIterator[Piece | Finish]:
        """Pieces, then one Finish; EngineError when the answer could not be finished."""
        while True:
            event = await self._events.get()
            if isinstance(event, EngineError):
                raise event
            yield event
            if isinstance(event, Finish):
                return

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._cancel(self._writing)


class InProcessEngine:
    """Serves and scores one base model with any number of adapters.

    Args:
        base: the base model.
        system: the stream's system prompt, None leaves it to the template.
        threads: CPU threads of one matrix product.
        batch_max: most answers written at once.
        queue_max: most answers waiting.
        context_max: most tokens of prompt and answer together; never more than the model's own.

    Raises:
        LearnerError: the base cannot be loaded.
    """

    def __init__(
        self,
        base: Base,
        *,
        system: str | None = None,
        threads: int = 1,
        batch_max: int = 16,
        queue_max: int = 256,
        context_max: int = 4096,
    ) -> None:
        self.base = base
        self._decoder = Decoder(base)
        self._renderer = Renderer(load_tokenizer(base), system)
        self._rendering = threading.Lock()  # fast tokenizers change state while they encode
        self._decoding_tokenizer = load_tokenizer(base).backend_tokenizer
        self._ends = {self._renderer.end_id, self._renderer.tokenizer.eos_token_id} - {None}
        self._threads = threads
        self._batch_max = batch_max
        self._queue_max = queue_max
        self.context_max = min(context_max, self._decoder.context)
        self._residents: dict[str, Resident] = {}
        self._scorer = Scorer(self._decoder, frozenset(self._ends))
        self._slots = Slots(self._decoder, batch_max, self._opening())
        self._active: list[_Writing] = []
        self._waiting: deque[_Writing] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))
        self._answer_s = 1.0  # smoothed time of one answer, for Retry-After
        self._worker = threading.Thread(target=self._work, name=f"engine {base.name}", daemon=True)
        self._worker.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop computing; answers still on their way fail. Idempotent."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._worker.join()

    # Adapters

    def load(self, name: str, adapter_dir: Path) -> None:
        """Make an adapter resident under a name; one of that name is replaced, answers on it finish on the old one.

        Raises:
            EngineError: it is missing, damaged, not finite, or belongs to another base.
        """
        resident = resident_from(adapter_dir, name, self.base, self._decoder.depth)
        with self._wake:
            self._residents = {**self._residents, name: resident}
        log.info("adapter loaded", adapter=name, sha256=resident.sha256)

    def unload(self, name: str) -> None:
        """Forget an adapter's name; answers on it finish."""
        with self._wake:
            self._residents = {key: value for key, value in self._residents.items() if key != name}
        log.info("adapter unloaded", adapter=name)

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of resident adapters."""
        return tuple(self._residents)

    def probe(self, name: str | None) -> None:
        """Run a tiny prompt, and then some steps in the company of the answers that are being written.

        Raises:
            EngineError: a logit is not finite.
            UnknownAdapter: no such adapter is resident.
        """
        events: SimpleQueue[Event] = SimpleQueue()
        writing = _Writing(self._adapter(name), self.render(PROBE), Sampling(PROBE_STEPS), events.put)
        writing.alone = True
        with self._wake:
            self._enqueue(writing, first=True)
        try:
            for _ in _texts(events):
                pass
        except _NotFinite as error:
            raise EngineError(f"adapter {name}: its logits are not finite on a probe; train it anew") from error

    # Prompts and answers

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, ending where the assistant begins to speak.

        Raises:
            EngineError: the model's chat template refuses these roles.
        """
        try:
            with self._rendering:
                return self._renderer.conversation_ids(messages)
        except LearnerError as error:
            raise EngineError(str(error)) from error

    def text_ids(self, text: str) -> list[int]:
        """Token ids of bare text; control tokens in it stay text."""
        with self._rendering:
            return self._renderer.completion_ids(text)[:-1]

    async def submit(self, adapter: str | None, prompt_ids: Sequence[int], sampling: Sampling) -> InProcessAnswer:
        """Queue one answer.

        Raises:
            QueueFull, UnknownAdapter, PromptTooLong: as in `serving.engine`.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def sink(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        writing = self._checked(adapter, prompt_ids, sampling, sink)
        with self._wake:
            if len(self._waiting) >= self._queue_max:
                raise QueueFull(
                    f"waiting={len(self._waiting)}: must be < {self._queue_max}; come back later",
                    self._retry_after_s(),
                )
            self._enqueue(writing)
        return InProcessAnswer(writing, events, self._cancel)

    @property
    def waiting(self) -> int:
        """Answers queued and not begun."""
        return len(self._waiting)

    @property
    def writing(self) -> int:
        """Answers being written."""
        return len(self._active)

    @property
    def healthy(self) -> bool:
        """Whether the computing thread lives."""
        return self._worker.is_alive() and not self._closed

    # Evaluation

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer, for texts that are not rendered as a conversation."""
        return self._renderer.tokenizer

    def generate(self, adapter: str | None, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Greedy answers to user prompts, in their order. Not bounded by `queue_max`.

        Raises:
            EngineError: an answer could not be finished.
        """
        sinks = []
        for prompt in prompts:
            events: SimpleQueue[Event] = SimpleQueue()
            ids = self.render([{"role": "user", "content": prompt}])
            writing = self._checked(adapter, ids, Sampling(max_tokens), events.put)
            with self._wake:
                self._enqueue(writing)
            sinks.append(events)
        return ["".join(_texts(events)) for events in sinks]

    def score_labels(
        self,
        adapter: str | None,
        prompts: Sequence[str],
        labels: Sequence[str],
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.float64]:
        """Summed log-likelihood of each label's completion tokens, end token included, behind each prompt.

        Args:
            adapter: a resident adapter, None for the bare base.
            prompts: N user prompts.
            labels: L completions.
            progress: told (prompts done, prompts in all).

        Returns:
            (N, L) float64.
        """
        return self.ask([adapter], prompts, labels, progress=progress)[0].scores

    def ask(
        self,
        adapters: Sequence[str | None],
        prompts: Sequence[str],
        labels: Sequence[str] = (),
        *,
        max_tokens: int | Sequence[int] = 0,
        within: float = math.inf,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Said]:
        """Scores of labels and greedy answers of several adapters in one pass: what they have in common is run once.

        Args:
            adapters: A resident adapters; None is the bare base.
            prompts: N user prompts.
            labels: L completions.
            max_tokens: of an answer, its end included, for all or for each adapter; 0: no answers.
            within: labels surely this many nats below the likeliest are given a bound instead of their likelihood:
                that of their beginning. Below nought: no scores; labels then only guess at the answers.
            progress: told (prompts done, prompts in all).

        Raises:
            UnknownAdapter: one is not resident.
            PromptTooLong: prompt and answer, or label, exceed the context.
        """
        residents = [self._adapter(name) for name in adapters]
        said = [Said(np.full((len(prompts), len(labels)), np.nan), [None] * len(prompts)) for _ in adapters]
        if not prompts or not adapters:
            return said
        ids = [self.render([{"role": "user", "content": prompt}]) for prompt in prompts]
        with self._rendering:
            completions = [self._renderer.completion_ids(label) for label in labels]
        most = [max_tokens] * len(adapters) if isinstance(max_tokens, int) else list(max_tokens)
        self._check_length(max(map(len, ids)), max(*most, *map(len, completions), 0))
        found = self._scorer.ask(residents, ids, completions, within=within, max_tokens=most)
        done = 0
        while (some := self._call(lambda: next(found, None))) is not None:
            for one in some:
                if isinstance(one, Scored):
                    said[one.adapter].scores[list(one.rows)] = one.values
                    done += len(one.rows)
                elif not one.broken:
                    with self._rendering:
                        text = self._renderer.tokenizer.decode(one.tokens, skip_special_tokens=True)
                    said[one.adapter].answers[one.row] = text
            if progress and labels and within >= 0:
                progress(done // len(adapters), len(prompts))
        return said

    def score_tokens(
        self,
        adapters: Sequence[str | None],
        rows: Sequence[TokenRow],
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Summed log-likelihood of continuations behind contexts, given as ids, under several adapters at once.

        Args:
            adapters: A resident adapters, None for the bare base.
            rows: N pairs (context ids, continuation ids), neither empty. What all of them begin with is run once.
            progress: told (rows done, rows in all), counted over all adapters.

        Returns:
            (A, N) log-likelihoods in float64, and (A, N) whether greedy decoding would say the continuation.

        Raises:
            PromptTooLong: a row is empty or does not fit into the context.
        """
        residents = [self._adapter(name) for name in adapters]
        shape = (len(adapters), len(rows))
        likelihoods, greedy = np.empty(shape, dtype=np.float64), np.empty(shape, dtype=np.bool_)
        for context, continuation in rows:
            if not context or not continuation or len(context) + len(continuation) > self.context_max + 1:
                raise PromptTooLong(
                    f"context tokens={len(context)}, continuation tokens={len(continuation)}: must be >= 1 each and "
                    f"<= {self.context_max + 1} together; shorten the text"
                )
        if not likelihoods.size:
            return likelihoods, greedy
        passes = score(self._decoder, residents, rows)
        done = 0
        while (found := self._call(lambda: next(passes, None))) is not None:
            likelihoods[found.adapter, list(found.rows)] = found.likelihoods
            greedy[found.adapter, list(found.rows)] = found.greedy
            done += len(found.rows)
            if progress:
                progress(done, likelihoods.size)
        return likelihoods, greedy

    def _opening(self) -> list[int]:
        """The token ids that a conversation begins with whatever the user says; none when there are hardly any."""
        one, other = (self.render([{"role": "user", "content": text}]) for text in ("a", "7"))
        length = next(at for at, (mine, theirs) in enumerate(zip(one, other, strict=False)) if mine != theirs)
        return one[:length] if length >= OPENING_TOKENS_MIN else []

    # Between threads

    def _adapter(self, name: str | None) -> Resident | None:
        if name is None:
            return None
        try:
            return self._residents[name]
        except KeyError:
            known = ", ".join(self._residents) or "none"
            raise UnknownAdapter(f"adapter={name}: not resident; load it first (resident: {known})") from None

    def _checked(
        self, adapter: str | None, prompt_ids: Sequence[int], sampling: Sampling, sink: Callable[[Event], None]
    ) -> _Writing:
        if not prompt_ids:
            raise PromptTooLong("prompt tokens=0: must be >= 1; send some text")
        self._check_length(len(prompt_ids), sampling.max_tokens)
        return _Writing(self._adapter(adapter), prompt_ids, sampling, sink)

    def _check_length(self, prompt: int, answer: int) -> None:
        if prompt + answer > self.context_max:
            raise PromptTooLong(
                f"prompt tokens={prompt} + max_tokens={answer}: must be <= {self.context_max}; "
                "shorten the prompt or ask for fewer tokens"
            )

    def _enqueue(self, writing: _Writing, *, first: bool = False) -> None:
        if self._closed:
            raise EngineError("engine: is closed; start the server again")
        if first:
            self._waiting.appendleft(writing)
        else:
            self._waiting.append(writing)
        self._wake.notify()

    def _cancel(self, writing: _Writing) -> None:
        with self._wake:
            writing.cancelled = True
            if writing in self._waiting:
                self._waiting.remove(writing)

    def _call(self, job: Callable[[], T]) -> T:
        """Run something on the computing thread and wait for it."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 - it belongs to the caller, who waits for it
                future.set_exception(error)

        with self._wake:
            if self._closed:
                raise EngineError("engine: is closed; start the server again")
            self._jobs.append(run)
            self._wake.notify()
        return future.result()

    def _retry_after_s(self) -> int:
        rounds = len(self._waiting) / self._batch_max
        return max(1, min(RETRY_AFTER_S_MAX, math.ceil(rounds * self._answer_s)))

    # The computing thread

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while self._wait():
                if self._jobs:
                    self._jobs.popleft()()
                try:
                    self._join()
                    self._step()
                except Exception as error:  # noqa: BLE001 - whatever it is, the server must go on
                    log.error("step failed", answers=len(self._active), error=type(error).__name__, at=places(error))  # noqa: TRY400
                    self._fail_all(EngineError(f"engine: a step failed ({type(error).__name__}); ask again"))
        self._fail_all(EngineError("engine: is closed; ask again"))

    def _wait(self) -> bool:
        """Until there is something to do; False when closed and no job is left to be answered."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._jobs or self._waiting or self._active)
            if self._waiting and not self._active and not self._jobs:
                self._wake.wait_for(lambda: self._closed or len(self._waiting) >= self._batch_max, WINDOW_S)
            return bool(self._jobs) or not self._closed

    def _join(self) -> None:
        """Run the prompts of some waiting answers, so that they take part in the next step."""
        joining: list[_Writing] = []
        self._drop_overdue()
        with self._wake:
            longest = 0
            while self._waiting and len(self._active) + len(joining) < self._batch_max:
                if joining and not self._alike(joining[0], self._waiting[0]):
                    break
                longest = max(longest, len(self._waiting[0].prompt_ids))
                if joining and longest * (len(joining) + 1) > JOIN_TOKENS:
                    break
                joining.append(self._waiting.popleft())
        if not joining:
            return
        for writing in joining:
            writing.text = TextStream(self._decoding_tokenizer, writing.sampling.stop)
            writing.began_s = time.monotonic()
        first = len(self._active)
        try:
            logits = self._slots.add([w.prompt_ids for w in joining], [w.adapter for w in joining])
        except Exception as error:  # noqa: BLE001 - whatever it is, those who are being answered must not suffer from it
            log.error("prompts failed", answers=len(joining), error=type(error).__name__, at=places(error))  # noqa: TRY400
            for writing in joining:
                writing.sink(EngineError(f"engine: a prompt failed ({type(error).__name__}); ask again"))
            return
        self._active += joining
        self._take(first, logits)

    def _alike(self, one: _Writing, other: _Writing) -> bool:
        """Whether two prompts are run in one pass."""
        if one.alone or other.alone:
            return False
        return self._slots.opens(one.prompt_ids) == self._slots.opens(other.prompt_ids)

    def _drop_overdue(self) -> None:
        """Tell those whose time is over before they were begun."""
        now_s = time.monotonic()
        with self._wake:
            overdue = [writing for writing in self._waiting if writing.ends_s < now_s]
            for writing in overdue:
                self._waiting.remove(writing)
        for writing in overdue:
            writing.sink(_overdue(writing))

    def _step(self) -> None:
        """One more token for every answer."""
        now_s = time.monotonic()
        for row in reversed(range(len(self._active))):
            writing = self._active[row]
            if writing.ends_s < now_s and not writing.cancelled:
                writing.sink(_overdue(writing))
            if writing.cancelled or writing.ends_s < now_s:
                self._leave(row)
        if self._active:
            self._take(0, self._slots.step([writing.last for writing in self._active]))

    def _take(self, first: int, logits: torch.Tensor) -> None:
        """Choose a token for the answers from row `first` on, and hand out what they say."""
        some = self._active[first:]
        tokens = choose(logits, [w.sampling for w in some], [w.generator for w in some])
        for row in reversed(range(len(some))):
            if self._hand_out(some[row], tokens[row], logits[row]):
                self._leave(first + row)

    def _hand_out(self, writing: _Writing, token: int | None, logits: torch.Tensor) -> bool:
        """Give one token's text to whoever waits for it; True when the answer is finished.

        Args:
            writing: the answer.
            token: its next one; None where logits are not finite.
            logits: (V,) it was chosen from.
        """
        if token is None:
            writing.sink(_NotFinite("engine: logits are not finite; ask again, or roll back the adapter"))
            return True
        text = writing.text
        assert text is not None  # noqa: S101 - set when the answer joined
        writing.last = token
        writing.produced += 1
        ended = token in self._ends
        if writing.sampling.logprobs is not None and not ended:
            writing.tokens.append((text.begun, self._token(token, logits, writing.sampling.logprobs)))
        piece = "" if ended else text.push(token)
        reason: FinishReason | None = None
        if ended or text.stopped:
            reason = "stop"
        elif writing.produced >= writing.sampling.max_tokens:
            reason = "length"
        if reason:
            piece += text.finish()
            reason = "stop" if text.stopped else reason
        told = _told(writing.tokens, math.inf if reason and not text.stopped else text.released)
        if piece or told:
            writing.sink(Piece(piece, told))
        if not reason:
            return False
        writing.sink(Finish(reason, len(writing.prompt_ids), writing.produced))
        self._answer_s += 0.1 * (time.monotonic() - writing.began_s - self._answer_s)
        return True

    def _token(self, token: int, logits: torch.Tensor, count: int) -> Token:
        logprob, top = likelihoods(logits, token, count)
        raw = token_bytes(self._decoding_tokenizer, token)
        return Token(raw.decode(errors="replace"), raw, logprob, tuple(self._likelihood(*one) for one in top))

    def _likelihood(self, token: int, logprob: float) -> Likelihood:
        raw = token_bytes(self._decoding_tokenizer, token)
        return Likelihood(raw.decode(errors="replace"), raw, logprob)

    def _leave(self, row: int) -> None:
        self._slots.remove(row)
        last = self._active.pop()
        if row < len(self._active):
            self._active[row] = last

    def _fail_all(self, error: EngineError) -> None:
        with self._wake:
            lost = [*self._active, *(self._waiting if self._closed else ())]
            if self._closed:
                self._waiting.clear()
        self._active.clear()
        self._slots.clear()
        for writing in lost:
            writing.sink(error)


def _overdue(writing: _Writing) -> AnswerTimeout:
    return AnswerTimeout(
        f"answer: {writing.produced} tokens of at most {writing.sampling.max_tokens} after "
        f"{writing.sampling.timeout_s} s, must be whole by then; ask for fewer tokens, or come back later"
    )


def _told(tokens: deque[tuple[int, Token]], end: float) -> tuple[Token, ...]:
    """Take out the tokens that begin before a character."""
    told = []
    while tokens and tokens[0][0] < end:
        told.append(tokens.popleft()[1])
    return tuple(told)


def _texts(events: SimpleQueue[Event]) -> Iterator[str]:
    while True:
        event = events.get()
        if isinstance(event, EngineError):
            raise event
        if isinstance(event, Finish):
            return
        yield event.text
