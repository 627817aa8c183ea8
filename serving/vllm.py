"""The engine of bigger machines: vLLM in a process of its own, asked over HTTP.

Adapters are loaded while vLLM runs (`/v1/load_lora_adapter`), each load under a name that was never used before: under
a used one vLLM may answer out of what it kept of the earlier adapter. They are unloaded when the last answer on them is
whole. vLLM takes token ids and gives token ids, so that prompts are rendered, answers cut and likelihoods told as the
in-process engine does. When it was away, everything is loaded again before it counts as healthy.

The bare base, too, is asked through an adapter, one that adds nothing: vLLM 0.32 on a CPU gives rows without an adapter
the one in its last place, as soon as another row of their batch has one (`lora_ops.py` indexes with -1).

vLLM reads adapters from disk: it must see the server's cache under the same path.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import structlog

from learner.adapter import Adapter, read_adapter, write_adapter
from learner.base import Base, load_tokenizer
from learner.errors import LearnerError
from learner.layout import base_shapes, module_name, weight_name
from learner.prompt import Renderer
from serving.engine import Finish, FinishReason, Likelihood, Piece, Sampling, Token
from serving.errors import (
    AdapterLost,
    AnswerTimeout,
    EngineDown,
    EngineError,
    PromptTooLong,
    QueueFull,
    UnknownAdapter,
    places,
)
from serving.text import TextStream, token_bytes

T = TypeVar("T")
Event = Piece | Finish | EngineError

# Between two looks at whether vLLM is well; so long after a restart nobody is answered.
WATCH_S = 0.5
LOOK_TIMEOUT_S = 5.0
# A first adapter makes vLLM compile its kernels: a quarter of a minute on a slow CPU.
LOAD_TIMEOUT_S = 180.0
# A server may start beside its vLLM, which needs a minute.
START_S = 180.0
PROBE_TOKENS = 3
# vLLM refuses 0, by which a client means the likeliest token alone.
TOP_P_MIN = 1e-6
# Norm of what an adapter adds to one layer, at most: tens of times that of the largest model's own weights. Beyond it
# numbers overflow, and vLLM 0.32 keeps those in its cache: the next answers, of other adapters, come out of them.
NORM_MAX = 1e4
# After a probe that overflowed, so many good ones in a row on the base: each writes over what the bad one has left.
CLEAN_PROBES = 3
CLEAN_PROBES_MAX = 50
RETRY_AFTER_S_MAX = 60

_NOT_FINITE = "Out of range float values"

log = structlog.get_logger()


def model_name(base: Base) -> str:
    """What vLLM must be told to call a base (`--served-model-name`): the engine believes no other."""
    return f"{base.name}@{base.sha256[:12]}"


class _Resident:
    """An adapter under its name in vLLM."""

    def __init__(self, lora: str, path: Path) -> None:
        self.lora = lora
        self.path = path
        self.answering = 0
        self.leaving = False
        self.lost = False  # vLLM has forgotten it, and cannot load it again


class VllmAnswer:
    """One answer on its way from the engine's thread to an event loop."""

    def __init__(self, events: asyncio.Queue[Event], engine: VllmEngine) -> None:
        self._events = events
        self._engine = engine
        self.task: asyncio.Task[None] | None = None
        self.cancelled = False

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
        """Nobody waits for it any more: the connection is closed, and vLLM stops."""
        self._engine.cancel(self)


class VllmEngine:
    """Answers with one base model and any number of adapters, by a vLLM that `tidegate vllm` or somebody else started.

    Args:
        base: the base vLLM was started on, under the name `model_name(base)`.
        url: of vLLM.
        folder: for the adapter that adds nothing; vLLM must see it under the same path.
        owner: whose adapters these are; what an earlier process of that owner left in vLLM is unloaded.
        system: the stream's system prompt, None leaves it to the template.
        key: vLLM's API key, if it wants one.
        batch_max: answers vLLM writes at once, as far as this server is asked for more.
        queue_max: most answers waiting.
        context_max: most tokens of prompt and answer together; never more than vLLM's own.

    Raises:
        LearnerError: the base's tokenizer cannot be loaded, or the folder cannot be written.
    """

    def __init__(
        self,
        base: Base,
        url: str,
        folder: Path,
        *,
        owner: str = "",
        system: str | None = None,
        key: str = "",
        batch_max: int = 64,
        queue_max: int = 256,
        context_max: int = 4096,
    ) -> None:
        self.base = base
        self.url = url.rstrip("/")
        self.context_max = context_max
        self._owner = sha256(f"{owner}\n{base.sha256}\n{system}".encode()).hexdigest()[:8]
        self._renderer = Renderer(load_tokenizer(base), system)
        self._rendering = threading.Lock()  # fast tokenizers change state while they encode
        self._decoding_tokenizer = load_tokenizer(base).backend_tokenizer
        self._ends = {self._renderer.end_id, self._renderer.tokenizer.eos_token_id} - {None}
        self._batch_max, self._queue_max = batch_max, queue_max
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._bare = _Resident(self._unused("base"), _nothing_added(base, folder).resolve())
        self._residents: dict[str, _Resident] = {}
        self._asked = 0  # answers on their way
        self._lock = threading.Lock()  # guards the two above
        self._answer_s = 1.0  # smoothed time of one answer, for Retry-After
        self._well, self._why = False, "not asked yet"
        self._cleaned = False
        self._closed = False
        self._session: aiohttp.ClientSession | None = None
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._is_well = asyncio.Event()
        self._worker = threading.Thread(target=self._work, name=f"vllm {base.name}", daemon=True)
        self._worker.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop asking; answers still on their way fail. vLLM runs on. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ended.set)
        self._worker.join()

    # Adapters

    def load(self, name: str, adapter_dir: Path) -> None:
        """Make an adapter resident under a name; one of that name is replaced, answers on it finish on the old one.

        Raises:
            EngineError: it is damaged, belongs to another base, has what vLLM cannot serve, or vLLM refuses it.
            EngineDown: vLLM does not answer.
        """
        try:
            adapter = read_adapter(adapter_dir, self.base.sha256, base=self.base)
        except LearnerError as error:
            raise EngineError(str(error)) from error
        if adapter.bottleneck:
            raise EngineError(
                f"adapter {adapter.sha256[:12]}: has bottleneck adapters, which vLLM cannot serve; "
                "set serving.engine to inprocess, or learner.lora.bottleneck to 0"
            )
        _check_norms(adapter)
        resident = _Resident(self._unused(name), adapter_dir.resolve())
        self._run(self._load_when_well(resident))
        with self._lock:
            old = self._residents.get(name)
            self._residents = {**self._residents, name: resident}
        if old:
            self._leave(old)
        log.info("adapter loaded", adapter=name, sha256=adapter.sha256)

    def unload(self, name: str) -> None:
        """Forget an adapter's name; answers on it finish, then vLLM forgets it too."""
        with self._lock:
            old = self._residents.get(name)
            self._residents = {key: value for key, value in self._residents.items() if key != name}
        if old:
            self._leave(old)
            log.info("adapter unloaded", adapter=name)

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of resident adapters, but for those that vLLM has lost."""
        return tuple(name for name, resident in self._residents.items() if not resident.lost)

    def probe(self, name: str | None) -> None:
        """Run a tiny prompt.

        Raises:
            EngineError: a log-probability is not finite, or there is no answer.
        """
        ids = self.render([{"role": "user", "content": "hi"}])
        if self._run(self._probe(self._resident(name), ids)):
            return
        in_a_row = 0
        for _ in range(CLEAN_PROBES_MAX):
            in_a_row = in_a_row + 1 if self._run(self._probe(self._bare, ids)) else 0
            if in_a_row == CLEAN_PROBES:
                break
        raise EngineError("logits are not finite; the adapter is damaged, or its base is")

    # Requests

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, ending where the assistant begins to speak.

        Raises:
            EngineError: the chat template does not take these roles.
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

    async def submit(self, adapter: str | None, prompt_ids: Sequence[int], sampling: Sampling) -> VllmAnswer:
        """Queue one answer.

        Raises:
            QueueFull, UnknownAdapter, PromptTooLong: as in `serving.engine`.
            EngineDown: vLLM does not answer.
        """
        return self._submit(adapter, prompt_ids, sampling, asyncio.get_running_loop())

    def cancel(self, answer: VllmAnswer) -> None:
        """Stop an answer; does nothing when it is finished."""

        def stop() -> None:
            answer.cancelled = True
            if answer.task:
                answer.task.cancel()

        with suppress(RuntimeError):  # the engine is closed
            self._loop.call_soon_threadsafe(stop)

    @property
    def waiting(self) -> int:
        """Answers asked for beyond those vLLM writes at once."""
        return max(0, self._asked - self._batch_max)

    @property
    def writing(self) -> int:
        """Answers being written."""
        return min(self._asked, self._batch_max)

    @property
    def healthy(self) -> bool:
        """Whether vLLM is well and has every resident adapter."""
        return self._well and not self._closed

    # Between threads

    def _unused(self, name: str) -> str:
        return f"{name}#{self._owner}-{secrets.token_hex(4)}"

    def _resident(self, name: str | None) -> _Resident:
        if name is None:
            return self._bare
        try:
            return self._residents[name]
        except KeyError:
            known = ", ".join(self._residents) or "none"
            raise UnknownAdapter(f"adapter={name}: not resident; load it first (resident: {known})") from None

    def _submit(
        self, adapter: str | None, prompt_ids: Sequence[int], sampling: Sampling, loop: asyncio.AbstractEventLoop
    ) -> VllmAnswer:
        if not prompt_ids:
            raise PromptTooLong("prompt tokens=0: must be >= 1; send some text")
        if len(prompt_ids) + sampling.max_tokens > self.context_max:
            raise PromptTooLong(
                f"prompt tokens={len(prompt_ids)} + max_tokens={sampling.max_tokens}: must be <= {self.context_max}; "
                "shorten the prompt or ask for fewer tokens"
            )
        if not self.healthy:
            raise self._down()
        with self._lock:
            resident = self._resident(adapter)
            if resident.lost:
                raise AdapterLost(f"adapter={adapter}: vLLM has lost it and cannot load it again; see its log")
            if self._asked >= self._batch_max + self._queue_max:
                waits_s = math.ceil(self._queue_max / self._batch_max * self._answer_s)
                raise QueueFull(
                    f"waiting={self.waiting}: must be < {self._queue_max}; come back later",
                    max(1, min(RETRY_AFTER_S_MAX, waits_s)),
                )
            self._asked += 1
            resident.answering += 1
        events: asyncio.Queue[Event] = asyncio.Queue()

        def sink(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        answer = VllmAnswer(events, self)
        writing = _Writing(self, resident, list(prompt_ids), sampling, sink)

        def begin() -> None:
            answer.task = self._loop.create_task(writing.write())
            answer.task.add_done_callback(lambda _task: self._finished(resident, writing))
            if answer.cancelled:
                answer.task.cancel()

        self._loop.call_soon_threadsafe(begin)
        return answer

    def _finished(self, resident: _Resident, writing: _Writing) -> None:
        """An answer is whole, failed or nobody's any more."""
        with self._lock:
            self._asked -= 1
            resident.answering -= 1
            over = resident.leaving and not resident.answering
        if writing.whole:
            self._answer_s += 0.1 * (time.monotonic() - writing.began_s - self._answer_s)
        if over and not self._closed:
            self._loop.create_task(self._unload(resident))

    def _leave(self, resident: _Resident) -> None:
        with self._lock:
            resident.leaving = True
            idle = not resident.answering
        if idle:
            with suppress(EngineError):  # vLLM is away: it has forgotten everything anyway
                self._run(self._unload(resident))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something on the engine's thread and wait for it."""
        if self._closed:
            work.close()
            raise EngineError("engine: is closed; start the server again")
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result()

    def _down(self) -> EngineDown:
        return EngineDown(f"vllm={self.url}: {self._why}; see its log, or start it: `tidegate vllm`")

    # On the engine's thread

    def _work(self) -> None:
        try:
            self._loop.run_until_complete(self._live())
        finally:
            self._loop.close()

    async def _live(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=LOOK_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers) as session:
            self._session = session
            watch = asyncio.create_task(self._watch())
            await self._ended.wait()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            watch.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            well, why = False, ""
            try:
                await self._look()
                well = True
            except EngineError as error:
                why = str(error)
            except Exception as error:
                log.exception("vllm cannot be watched")
                why = type(error).__name__
            if well != self._well:
                log.info("vllm is well", url=self.url) if well else log.warning(
                    "vllm is away", url=self.url, reason=why
                )
            self._well, self._why = well, why
            self._is_well.set() if well else self._is_well.clear()
            await asyncio.sleep(WATCH_S)

    async def _look(self) -> None:
        """Check that vLLM is well, serves our base, and has what is resident; load what it has lost.

        Raises:
            EngineError: it is not.
        """
        await self._call("GET", "/health", timeout_s=LOOK_TIMEOUT_S)
        models = json.loads(await self._call("GET", "/v1/models", timeout_s=LOOK_TIMEOUT_S))["data"]
        names = {str(model["id"]) for model in models}
        if model_name(self.base) not in names:
            raise EngineError(f"serves {', '.join(sorted(names))[:200]}, must serve {model_name(self.base)}")
        lengths = [model["max_model_len"] for model in models if model["id"] == model_name(self.base)]
        self.context_max = min(self.context_max, *(length for length in lengths if length))
        if not self._cleaned:
            ours = {resident.lora for resident in (self._bare, *self._residents.values())}
            for name in sorted(names - ours):
                if f"#{self._owner}-" in name:
                    await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
            self._cleaned = True
        for resident in (self._bare, *self._residents.values()):
            if resident.lora not in names:
                await self._load_again(resident)

    async def _load_again(self, resident: _Resident) -> None:
        """What is lost is lost for those who ask for it alone; everything needs the adapter that adds nothing."""
        try:
            await self._load(resident)
        except EngineDown:
            raise
        except EngineError as error:
            if resident is self._bare:
                raise
            if not resident.lost:
                log.error("adapter lost", adapter=resident.lora, reason=str(error))  # noqa: TRY400 - no defect of ours
            resident.lost = True
        else:
            resident.lost = False

    async def _load_when_well(self, resident: _Resident) -> None:
        try:
            async with asyncio.timeout(START_S):
                await self._is_well.wait()
        except TimeoutError:
            raise self._down() from None
        await self._load(resident)

    async def _load(self, resident: _Resident) -> None:
        asked = {"lora_name": resident.lora, "lora_path": str(resident.path)}
        await self._call("POST", "/v1/load_lora_adapter", asked, timeout_s=LOAD_TIMEOUT_S)

    async def _unload(self, resident: _Resident) -> None:
        with suppress(EngineError):  # it may have forgotten it by itself
            await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": resident.lora})

    async def _probe(self, resident: _Resident, ids: list[int]) -> bool:
        """Whether an answer's log-probabilities are finite; vLLM cannot even tell others."""
        asked = {"model": resident.lora, "prompt": ids, "max_tokens": PROBE_TOKENS, "temperature": 0, "logprobs": 0}
        try:
            body = await self._call("POST", "/v1/completions", asked, timeout_s=LOAD_TIMEOUT_S)
        except EngineError as error:
            if _NOT_FINITE in str(error):
                return False
            raise
        (choice,) = json.loads(body)["choices"]
        return all(value is not None and math.isfinite(value) for value in choice["logprobs"]["token_logprobs"])

    async def _call(self, method: str, path: str, asked: Any = None, *, timeout_s: float = 30.0) -> bytes:
        """One request that is answered at once.

        Raises:
            EngineDown: no answer.
            EngineError: vLLM refuses.
        """
        assert self._session  # noqa: S101 - alive
        try:
            async with asyncio.timeout(timeout_s):
                async with self._session.request(method, f"{self.url}{path}", json=asked) as reply:
                    body = await reply.read()
        except TimeoutError:
            raise EngineDown(f"vllm={self.url}: says nothing to {path} for {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise EngineDown(f"vllm={self.url}: {error or type(error).__name__}") from error
        if reply.status != 200:  # noqa: PLR2004 - HTTP OK
            raise EngineError(f"vllm={self.url}: {path} has status {reply.status}: {_message(body)}")
        return body


class _Writing:
    """One answer, on the engine's thread."""

    def __init__(
        self,
        engine: VllmEngine,
        resident: _Resident,
        prompt_ids: list[int],
        sampling: Sampling,
        sink: Any,
    ) -> None:
        self._engine = engine
        self._model = resident.lora
        self._prompt_ids, self._sampling, self._sink = prompt_ids, sampling, sink
        self._tokenizer = engine._decoding_tokenizer  # noqa: SLF001 - one class in two, by thread
        self._ends = engine._ends  # noqa: SLF001
        self._text = TextStream(self._tokenizer, sampling.stop)
        self._tokens: deque[tuple[int, Token]] = deque()  # not handed out yet, with the character they begin at
        self._produced = 0
        self.whole = False
        self.began_s = time.monotonic()

    async def write(self) -> None:
        """Ask vLLM, and tell what it says."""
        try:
            async with asyncio.timeout(self._sampling.timeout_s):
                await self._write()
        except aiohttp.ServerTimeoutError as error:  # of the connection, not of the answer
            self._sink(EngineDown(f"vllm={self._engine.url}: {error or type(error).__name__}; ask again"))
        except TimeoutError:
            self._sink(
                AnswerTimeout(
                    f"answer: {self._produced} tokens of at most {self._sampling.max_tokens} after "
                    f"{self._sampling.timeout_s} s, must be whole by then; ask for fewer tokens, or come back later"
                )
            )
        except EngineError as error:
            self._sink(error)
        except (aiohttp.ClientError, OSError) as error:
            self._sink(EngineDown(f"vllm={self._engine.url}: {error or type(error).__name__}; ask again"))
        except asyncio.CancelledError:
            self._sink(EngineError("engine: is closed; ask again"))
            raise
        except Exception as error:  # noqa: BLE001 - what vLLM says is not ours to guarantee
            log.error("answer failed", error=type(error).__name__, at=places(error))  # noqa: TRY400
            self._sink(EngineError(f"vllm={self._engine.url}: is not understood ({type(error).__name__})"))

    async def _write(self) -> None:
        session = self._engine._session  # noqa: SLF001
        assert session  # noqa: S101 - alive
        async with session.post(f"{self._engine.url}/v1/completions", json=self._question()) as reply:
            if reply.status != 200:  # noqa: PLR2004 - HTTP OK
                raise EngineError(f"vllm={self._engine.url}: status {reply.status}: {_message(await reply.read())}")
            async for line in reply.content:
                if not line.startswith(b"data: "):
                    continue
                data = line[6:].strip()
                if data == b"[DONE]":
                    break
                if self._take(json.loads(data)):
                    return
        raise EngineDown(f"vllm={self._engine.url}: broke off; ask again")

    def _question(self) -> dict[str, Any]:
        sampling = self._sampling
        asked: dict[str, Any] = {
            "model": self._model,
            "prompt": self._prompt_ids,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": max(sampling.top_p, TOP_P_MIN),
            "stop_token_ids": sorted(self._ends),
            "stream": True,
            "return_token_ids": True,
            # A base's generation_config.json may say otherwise, which the in-process engine does not follow.
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        if sampling.seed is not None:
            asked["seed"] = sampling.seed % 2**63  # vLLM takes what a signed integer of 64 bits holds
        if sampling.logprobs is not None:
            asked |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
        return asked

    def _take(self, event: dict[str, Any]) -> bool:
        """Hand out what one event brings; True when the answer is whole.

        Raises:
            EngineError: it tells of a failure.
        """
        if "error" in event:
            raise EngineError(f"vllm={self._engine.url}: {_message(json.dumps(event).encode())}")
        for choice in event["choices"]:
            ids = choice.get("token_ids") or []
            told = choice.get("logprobs")
            for place, token in enumerate(ids):
                last = choice["finish_reason"] is not None and place == len(ids) - 1
                if self._push(token, told, place, choice["finish_reason"] if last else None):
                    return True
            if choice["finish_reason"] is not None and not ids:
                return self._end("", _reason(choice["finish_reason"]))
        return False

    def _push(self, token: int, told: Any, place: int, finish: str | None) -> bool:
        self._produced += 1
        ended = token in self._ends
        if told is not None and not ended:
            self._tokens.append((self._text.begun, self._token(token, told, place)))
        piece = "" if ended else self._text.push(token)
        if ended or self._text.stopped:
            return self._end(piece, "stop")
        if finish is not None:
            return self._end(piece, _reason(finish))
        self._tell(piece, self._text.released)
        return False

    def _end(self, piece: str, reason: FinishReason) -> bool:
        piece += self._text.finish()
        self._tell(piece, self._text.released if self._text.stopped else math.inf)
        self.whole = True
        self._sink(Finish("stop" if self._text.stopped else reason, len(self._prompt_ids), self._produced))
        return True

    def _tell(self, piece: str, end: float) -> None:
        told = []
        while self._tokens and self._tokens[0][0] < end:
            told.append(self._tokens.popleft()[1])
        if piece or told:
            self._sink(Piece(piece, tuple(told)))

    def _token(self, token: int, told: Any, place: int) -> Token:
        count = self._sampling.logprobs or 0
        top = (told.get("top_logprobs") or [None])[place] if count else None
        likeliest = sorted((top or {}).items(), key=lambda one: -one[1])[:count]
        raw = token_bytes(self._tokenizer, token)
        return Token(
            raw.decode(errors="replace"),
            raw,
            float(told["token_logprobs"][place]),
            tuple(self._likelihood(int(name.removeprefix("token_id:")), value) for name, value in likeliest),
        )

    def _likelihood(self, token: int, logprob: float) -> Likelihood:
        raw = token_bytes(self._tokenizer, token)
        return Likelihood(raw.decode(errors="replace"), raw, logprob)


def _nothing_added(base: Base, folder: Path) -> Path:
    """An adapter of zeros for one layer of a base.

    Raises:
        LearnerError: it cannot be written.
    """
    import torch

    from learner.plan import LoraSettings

    shapes = base_shapes(json.loads((base.path / "config.json").read_text()))
    out, inside = shapes.linear["q_proj"]
    weights = {
        weight_name(shapes.depth - 1, "q_proj", "A"): torch.zeros(1, inside),
        weight_name(shapes.depth - 1, "q_proj", "B"): torch.zeros(out, 1),
    }
    path = folder / f"nothing-{base.sha256[:12]}"
    write_adapter(path, LoraSettings(r=1, alpha=1.0, layers=1, targets=("q_proj",)), weights, base)
    return path


def _check_norms(adapter: Adapter) -> None:
    """Refuse an adapter whose numbers would overflow.

    Raises:
        EngineError: it adds more to a layer than NORM_MAX, by the product of its two matrices' norms.
    """
    for layer, target in adapter.places():
        down, up = (adapter.weights[weight_name(layer, target, matrix)].double().norm().item() for matrix in "AB")
        norm = down * up * adapter.scale_of(module_name(layer, target))
        if not norm <= NORM_MAX:
            raise EngineError(
                f"adapter {adapter.sha256[:12]}: adds up to {norm:.3g} to {module_name(layer, target)}, must be <= "
                f"{NORM_MAX:g} where vLLM serves; its training ran away: train it anew"
            )


def _reason(said: str) -> FinishReason:
    if said == "abort":
        raise EngineError("vllm: stopped the answer; ask again")
    return "length" if said == "length" else "stop"


def _message(body: bytes) -> str:
    """What vLLM says is wrong, in one line; its messages quote no prompt given as ids."""
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        text = body.decode(errors="replace")
    return " ".join(str(text).split())[:300]
