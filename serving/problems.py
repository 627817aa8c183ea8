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
    kind, param, code, status = "server_error", None, None, 500
    headers: dict[str, str] = {}
    if isinstance(error, RequestRefused):
        kind, param, code, status = INVALID, error.param, error.code, error.status
        if isinstance(error, Unauthorised):
            scheme = 'Basic realm="tidegate: any name, the API key as password", charset="UTF-8"'
            headers = {"www-authenticate": scheme if browser else 'Bearer realm="tidegate"'}
    elif isinstance(error, PromptTooLong):
        kind, code, status = INVALID, "context_length_exceeded", 400
    elif isinstance(error, QueueFull):
        kind, code, status = "rate_limit_error", "rate_limit_exceeded", 429
        headers = {"retry-after": str(error.retry_after_s), ELSEWHERE_HEADER: "full"}
    elif isinstance(error, TooFast):
        kind, code, status = error.kind, "rate_limit_exceeded", 429
        headers = {**error.headers, **_when(error.retry_after_s)}
    elif isinstance(error, AnswerTimeout):
        code, status = "timeout", 504
    elif isinstance(error, NotReady):
        code, status, headers = "not_ready", 503, {"retry-after": "1", ELSEWHERE_HEADER: "not-ready"}
    elif isinstance(error, VersionElsewhere):
        code, status, headers = "version_elsewhere", 409, {ELSEWHERE_HEADER: "version"}
    elif isinstance(error, EngineDown):
        code, status, headers = "engine_down", 503, {"retry-after": "1", ELSEWHERE_HEADER: "engine"}
    elif isinstance(error, KeysUnreadable):
        log.error("API keys cannot be read", reason=text)
        text, status = "API keys cannot be read; the server's log says why", 503
    else:
        log.error("answer failed", reason=text)
    return JSONResponse(wire.error_body(text, kind=kind, param=param, code=code), status, headers)


def _when(retry_after_s: float | None) -> dict[str, str]:
    """When to try again, to the second and to the millisecond; OpenAI's clients read both, and that it is no use."""
    if retry_after_s is None:
        return {"x-should-retry": "false"}
    milliseconds = math.ceil(retry_after_s * 1000)
    return {"retry-after": str(max(1, math.ceil(retry_after_s))), "retry-after-ms": str(milliseconds)}
