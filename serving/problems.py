"""What went wrong, as a response in OpenAI's form."""

from __future__ import annotations

import math

import structlog
from fastapi.responses import JSONResponse

from serving import wire
from serving.errors import (
    AnswerTimeout,
    EngineDown,
    KeysUnreadable,
    NotReady,
    PromptTooLong,
    QueueFull,
    RequestRefused,
    ServingError,
    TooFast,
    Unauthorised,
    VersionElsewhere,
)
from serving.replicas import ELSEWHERE_HEADER

INVALID = "invalid_request_error"

log = structlog.get_logger()


def error_response(error: Exception, *, browser: bool = False) -> JSONResponse:
    """OpenAI's error object for anything serving raises on purpose.

    Args:
        error: what was raised.
        browser: a person looks at it in a browser, which then asks for the key.
    """
    text = str(error)
    if isinstance(error, RequestRefused):
        headers = _challenge(browser=browser) if isinstance(error, Unauthorised) else {}
        body = wire.error_body(text, kind=INVALID, param=error.param, code=error.code)
        return JSONResponse(body, error.status, headers)
    if isinstance(error, TooFast):
        body = wire.error_body(text, kind=error.kind, code="rate_limit_exceeded")
        return JSONResponse(body, 429, {**error.headers, **_when(error.retry_after_s)})
    status, kind, code, headers = next((known for made, known in _KNOWN.items() if isinstance(error, made)), _UNKNOWN)
    if isinstance(error, QueueFull):
        headers = {**headers, "retry-after": str(error.retry_after_s)}
    elif isinstance(error, KeysUnreadable):
        log.error("API keys cannot be read", reason=text)
        text = "API keys cannot be read; the server's log says why"
    elif code is None:
        log.error("answer failed", reason=text)
    return JSONResponse(wire.error_body(text, kind=kind, code=code), status, headers)


# Status, OpenAI's type and code, and headers of what needs no more than its own message.
_Form = tuple[int, str, str | None, dict[str, str]]
_KNOWN: dict[type[ServingError], _Form] = {
    PromptTooLong: (400, INVALID, "context_length_exceeded", {}),
    QueueFull: (429, "rate_limit_error", "rate_limit_exceeded", {ELSEWHERE_HEADER: "full"}),
    VersionElsewhere: (409, "server_error", "version_elsewhere", {ELSEWHERE_HEADER: "version"}),
    NotReady: (503, "server_error", "not_ready", {"retry-after": "1", ELSEWHERE_HEADER: "not-ready"}),
    EngineDown: (503, "server_error", "engine_down", {"retry-after": "1", ELSEWHERE_HEADER: "engine"}),
    KeysUnreadable: (503, "server_error", "keys_unreadable", {"retry-after": "5"}),
    AnswerTimeout: (504, "server_error", "timeout", {}),
}
_UNKNOWN: _Form = (500, "server_error", None, {})


def _challenge(*, browser: bool) -> dict[str, str]:
    scheme = 'Basic realm="tidegate: any name, the API key as password", charset="UTF-8"'
    return {"www-authenticate": scheme if browser else 'Bearer realm="tidegate"'}


def _when(retry_after_s: float | None) -> dict[str, str]:
    """When to try again, to the second and to the millisecond; OpenAI's clients read both, and that it is no use."""
    if retry_after_s is None:
        return {"x-should-retry": "false"}
    milliseconds = math.ceil(retry_after_s * 1000)
    return {"retry-after": str(max(1, math.ceil(retry_after_s))), "retry-after-ms": str(milliseconds)}
