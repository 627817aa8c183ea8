"""OpenAI's wire form: what a request may hold, and what answers, chunks and errors look like.

Fields that would change an answer and are not supported are refused by name; those that would not are ignored.
Messages about a wrong request name the field and the bound, and never repeat a prompt.
(https://platform.openai.com/docs/api-reference, chat and completions.)
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serving.engine import LOGPROBS_MAX, Finish, Likelihood, Sampling, Token
from serving.errors import RequestRefused

MESSAGES_MAX = 1000
CHOICES_MAX = 16
STOPS_MAX = 4
# OpenAI's bound for completions; chat has LOGPROBS_MAX.
TEXT_LOGPROBS_MAX = 5
# JSON has no infinity; OpenAI writes this for what has no probability.
_LOGPROB_MIN = -9999.0
_R = TypeVar("_R", bound=BaseModel)

Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Ignoring(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class TextPart(_Ignoring):
    """One part of a message; only text is served."""

    type: Literal["text"]
    text: str


class Message(_Ignoring):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """Role and text as a chat template wants them; `developer` is OpenAI's newer word for `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Ignoring):
    """What a stream carries beside text."""

    include_usage: bool = False


class TextFormat(_Ignoring):
    """The only response format: text."""

    type: Literal["text"]


class Request(_Strict):
    """What chat and completions have in common."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS_MAX)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Refused unless they change nothing.
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # Ignored: they change nothing in the answer.
    user: str | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Request:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: is only allowed when stream is true")
        return self

    def sampling(self, max_tokens: int, choice: int = 0, timeout_s: float | None = None) -> Sampling:
        """How to choose tokens; what is left out is as OpenAI documents it: temperature 1, top_p 1.

        Args:
            max_tokens: most tokens of the answer.
            choice: which of `n`; each has a seed of its own.
            timeout_s: how long an answer may take.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
            stop=stop,
            logprobs=self.logprobs_asked,
            timeout_s=timeout_s,
        )

    @property
    def logprobs_asked(self) -> int | None:
        """How many likely tokens to tell beside each of an answer; None: no probabilities at all."""
        return None

    @property
    def tokens_asked(self) -> int | None:
        """Most tokens of an answer, if the client says so."""
        return self.max_tokens

    @property
    def person(self) -> str | None:
        """Whom the client asks for, by a name of its own."""
        return self.user

    @property
    def usage_in_stream(self) -> bool:
        """Whether a last chunk shall carry the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MAX)] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: is only allowed when logprobs is true")
        return self

    @property
    def person(self) -> str | None:
        """The newer name wins."""
        return self.safety_identifier or self.user

    @property
    def tokens_asked(self) -> int | None:
        """The newer name wins."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprobs_asked(self) -> int | None:
        """Asked for by one field, counted by another."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Request):
    """POST /v1/completions. Prompts are text: token ids could spell control tokens."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=CHOICES_MAX)]
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    logprobs: Annotated[int, Field(ge=0, le=TEXT_LOGPROBS_MAX)] | None = None
    best_of: Literal[1] | None = None

    @property
    def logprobs_asked(self) -> int | None:
        """Asked for and counted by one field."""
        return self.logprobs

    @property
    def prompts(self) -> list[str]:
        """All prompts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


def parse(kind: type[_R], body: bytes) -> _R:
    """Read a request.

    Raises:
        RequestRefused: names the first field that is wrong.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
    # Of a text or a list, the list's complaint says more.
    first = next((e for e in errors if e["type"] != "string_type"), errors[0])
    path = [str(part) for part in first["loc"]]
    param = path[0] if path else None
    if first["type"] == "json_invalid":
        raise RequestRefused("body: is not valid JSON; send one JSON object")
    if first["type"] == "extra_forbidden":
        raise RequestRefused(f"Unrecognized request argument supplied: {path[0][:80]}", param=path[0][:80])
    value = first["input"]
    shown = f"={value!r}" if isinstance(value, bool | int | float) or value is None else ""
    # The path also holds the types that were tried; only fields' own names are shown.
    names = {name for model in (kind, Message, TextPart, StreamOptions, TextFormat) for name in model.model_fields}
    name = ".".join(part for part in path if part.isdigit() or part in names)[:200] or "body"
    raise RequestRefused(f"{name}{shown[:80]}: {first['msg']}", param=param, code="invalid_value")


def usage(finishes: Mapping[int, Finish], choices: int) -> dict[str, int]:
    """What answers took; a prompt counts once, however many choices it has.

    Args:
        finishes: by choice, grouped by prompt.
        choices: how many a prompt has.
    """
    prompt_tokens = sum({index // choices: finish.prompt_tokens for index, finish in finishes.items()}.values())
    completion_tokens = sum(finish.completion_tokens for finish in finishes.values())
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def chat_choice(index: int, text: str, reason: str, logprobs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One choice of a whole chat answer."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def chat_delta(
    index: int, delta: Mapping[str, Any], reason: str | None = None, logprobs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One choice of a chat chunk."""
    return {"index": index, "delta": dict(delta), "logprobs": logprobs, "finish_reason": reason}


def text_choice(
    index: int, text: str, reason: str | None = None, logprobs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One choice of a completion, whole or chunk."""
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """Probabilities of a chat answer's tokens."""
    content = [{**_likelihood(token), "top_logprobs": [_likelihood(top) for top in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[Token], offset: int, asked: int) -> dict[str, Any]:
    """Probabilities of a completion's tokens.

    Args:
        tokens: of the answer, or of one piece of a stream.
        offset: characters of the answer before them; `text_offset` counts from the answer's beginning.
        asked: how many likely tokens were asked for; the chosen one is told beside them.
    """
    offsets = []
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    for token in tokens:
        offsets.append(offset)
        offset += len(decoder.decode(token.raw))
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [{top.text: _finite(top.logprob) for top in (*token.top, token)} for token in tokens]
        if asked
        else None,
        "text_offset": offsets,
    }


def _likelihood(token: Likelihood) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.raw)}


def _finite(logprob: float) -> float:
    return max(logprob, _LOGPROB_MIN)
