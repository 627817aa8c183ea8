"""What can go wrong in serving.

ServingError
├── EngineError             the engine cannot do what was asked
│   ├── QueueFull           too many answers are waiting; carries `retry_after_s`
│   ├── UnknownAdapter      no adapter of that name is resident
│   ├── PromptTooLong       prompt and answer do not fit the context
│   ├── AnswerTimeout       an answer took longer than it was given
│   └── EngineDown          what computes is another process, and it does not answer
│       └── AdapterLost     it answers, but lacks this adapter
├── SwapError               a wanted version cannot become live; the live one goes on
│   ├── ApprovalRefused     its approval is missing, forged, for something else, or older than one already followed
│   └── Ambiguous           the registry wants more than one version
├── NotReady                nothing is known yet about what to serve
├── VersionElsewhere        a router asks for a version that is not, or no longer, kept here
├── AnswerIdError           an answer id is not one of ours
├── KeysUnreadable          the file of API keys cannot be read: nobody is let in
├── TooFast                 a key has used up its limits; carries `retry_after_s` and headers
└── RequestRefused          a client's request is wrong; carries OpenAI's `param` and `code`, and the HTTP status
    ├── Unauthorised        no key, or not one of ours
    └── AccessRefused       a key that is not for this

Every message is one line: name, value, bound, way out. It never holds a prompt or an answer.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping

_FRAMES_SHOWN = 6


class ServingError(Exception):
    """Root of everything serving raises on purpose."""


class EngineError(ServingError):
    """The engine cannot do what was asked."""


class QueueFull(EngineError):
    """Too many answers are waiting already.

    Attributes:
        retry_after_s: when to come back, in whole seconds.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnknownAdapter(EngineError):
    """No adapter of that name is resident."""


class PromptTooLong(EngineError):
    """Prompt and answer do not fit the context."""


class AnswerTimeout(EngineError):
    """An answer was not whole when its time was over."""


class EngineDown(EngineError):
    """The process that computes does not answer; another replica may."""


class AdapterLost(EngineDown):
    """The process that computes has forgotten one adapter, and cannot load it again; the others it has."""


class SwapError(ServingError):
    """A wanted version cannot become live; the live one goes on."""


class ApprovalRefused(SwapError):
    """The approval is missing, forged, for something else, or older than one already followed."""


class Ambiguous(SwapError):
    """The registry wants more than one version at once. Raised by the caller's `wanted`."""


class NotReady(ServingError):
    """Nothing is known yet about what to serve."""


class VersionElsewhere(ServingError):
    """A router asks for a version that does not answer here, or no longer; another replica may have it."""


class AnswerIdError(ServingError):
    """An answer id is not one of ours."""


class RequestRefused(ServingError):
    """A client's request is wrong.

    Attributes:
        status: HTTP status.
        param: the offending field, or None.
        code: OpenAI's machine-readable code, or None.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class Unauthorised(RequestRefused):
    """No key, or not one of ours."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=401, code="invalid_api_key")


class AccessRefused(RequestRefused):
    """A key that is not for this."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=403, code="insufficient_permissions")


class KeysUnreadable(ServingError):
    """The file of API keys cannot be read: nobody is let in."""


class TooFast(ServingError):
    """A key has used up its limits.

    Attributes:
        kind: `requests` or `tokens`.
        retry_after_s: when to come back; None: never with so much at once.
        headers: what is left, as OpenAI's headers.
    """

    def __init__(
        self, message: str, kind: str, retry_after_s: float | None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})


def places(error: BaseException) -> list[str]:
    """The innermost places a defect went through: what a log may say of it, since its message could repeat a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES_SHOWN:]
    return [f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno} {frame.name}" for frame in frames]
