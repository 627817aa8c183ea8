"""The OpenAPI description: every status a route may answer, with its form. A fuzzer holds the server to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_OR_NULL = {"type": "null"}


def described(
    schema: Schema, parts: Mapping[str, Schema], scopes: Mapping[tuple[str, str], Sequence[str]], *, with_keys: bool
) -> Schema:
    """FastAPI's description, completed.

    Args:
        schema: FastAPI's; is changed.
        parts: schemas the requests refer to.
        scopes: by method and path: of which a key needs one; none for open routes.
        with_keys: whether keys are asked for.
    """
    components = schema.setdefault("components", {})
    components["schemas"] = {**_SCHEMAS, **parts}
    if with_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in schema.get("paths", {}).items():
        for method, operation in operations.items():
            needed = scopes.get((method.upper(), path), ())
            operation["responses"] = _responses(method, path, operation.get("responses", {}), keyed=bool(needed))
            if needed:
                operation["description"] = f"A key needs the scope {' or '.join(needed)}, where keys are asked for."
                if with_keys:
                    operation["security"] = [{"key": []}]
    return schema


def _responses(method: str, path: str, found: Mapping[str, Any], *, keyed: bool) -> Schema:
    """Every status of a route: what it answers, and what the gate and the desk may answer in its stead."""
    kind, right = _RIGHT.get(path, (None, None))
    content = {kind: {"schema": right}} if kind else found.get("200", {}).get("content", {})
    if path in _STREAMED:
        content = {**content, "text/event-stream": {"schema": _EVENT}}
    answers = {"200": {"description": "What was asked for.", "content": content}}
    if path in _ALSO_503:
        answers["503"] = {"description": "Not now.", "content": content}
    errors = {"403": _ERRORS["403"], **({s: _ERRORS[s] for s in ("401", "429", "500", "503")} if keyed else {})}
    if method == "post":
        errors |= {status: _ERRORS[status] for status in ("400", "404", "408", "409", "413", "504")}
    if "{" in path:
        errors["404"] = _ERRORS["404"]
    for status, description in errors.items():
        form = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        answers.setdefault(status, {"description": description, "content": form})
    for status, answer in answers.items():
        answer["headers"] = {**_HEADERS, **(_VERSION if path in _STREAMED and status == "200" else {})}
    return dict(sorted(answers.items()))


def _object(required: Mapping[str, Schema], **optional: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, _OR_NULL]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _answer(kind: str, choice: Schema) -> Schema:
    return _object(
        {
            "id": _TEXT,
            "object": {"const": kind},
            "created": _COUNT,
            "model": _TEXT,
            "system_fingerprint": _TEXT,
            "choices": _list(choice),
            "usage": _ref("Usage"),
            "tidegate": _object({"stream": _TEXT, "version": _TEXT, "answer_id": _TEXT}),
        }
    )


_ERRORS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "No key, or not one that counts.",
    "403": "The key is not for this, or the request came by a page of another place.",
    "404": "There is no such model.",
    "408": "The body did not come in time.",
    "409": "The candidate may not answer anybody, or another server has the version that was asked for.",
    "413": "The body is too large.",
    "429": "Too fast, or too many wait; `retry-after` says when to come back.",
    "500": "The server failed.",
    "503": "The server cannot answer yet.",
    "504": "The answer took too long.",
}
_HEADERS: Schema = {
    "x-request-id": {"required": True, "schema": _TEXT, "description": "The request's own, or one made for it."},
    "x-ratelimit-remaining-requests": {"schema": _TEXT, "description": "For a key with limits; also for tokens."},
}
_VERSION: Schema = {"x-tidegate-version": {"required": True, "schema": _TEXT, "description": "Which version answered."}}
# Of an event of a stream: a chunk as JSON, an error as JSON, or [DONE].
_EVENT = _object({"data": _TEXT})
_FINISH: Schema = {"enum": ["stop", "length"]}
_LOGPROB = _object({"token": _TEXT, "logprob": {"type": "number"}, "bytes": _maybe(_list(_COUNT))})
_SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        {"error": _object({"message": _TEXT, "type": _TEXT, "param": _maybe(_TEXT), "code": _maybe(_TEXT)})}
    ),
    "Usage": _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT}),
    "ChatCompletion": _answer(
        "chat.completion",
        _object(
            {
                "index": _COUNT,
                "message": _object({"role": {"const": "assistant"}, "content": _TEXT, "refusal": _OR_NULL}),
                "finish_reason": _FINISH,
                "logprobs": _maybe(
                    _object(
                        {"content": _list({**_LOGPROB, "properties": {**_LOGPROB["properties"], "top_logprobs": {}}})}
                    )
                ),
            }
        ),
    ),
    "TextCompletion": _answer(
        "text_completion",
        _object(
            {
                "index": _COUNT,
                "text": _TEXT,
                "finish_reason": _FINISH,
                "logprobs": _maybe(_object({"tokens": _list(_TEXT), "token_logprobs": _list({"type": "number"})})),
            }
        ),
    ),
    "Model": _object(
        {
            "id": _TEXT,
            "object": {"const": "model"},
            "created": _COUNT,
            "owned_by": _TEXT,
            "tidegate": _object({"stream": _TEXT, "version": _maybe(_TEXT)}),
        }
    ),
    "Models": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}),
    "Side": _object({"version": _TEXT, "number": _COUNT, "error": _maybe(_TEXT)}, text=_TEXT, usage=_ref("Usage")),
    "Comparison": _object(
        {
            "object": {"const": "tidegate.comparison"},
            "stream": _TEXT,
            "live": _ref("Side"),
            "candidate": _ref("Side"),
            "same": {"type": "boolean"},
        }
    ),
    "Health": _object({"status": _TEXT}),
    "Readiness": _object(
        {"ready": {"type": "boolean"}, "streams": {"type": "object", "additionalProperties": _maybe(_TEXT)}}
    ),
    "State": _object({"pid": _COUNT, "started_at": _TEXT, "streams": {"type": "object"}}),
}
_JSON = "application/json"
_RIGHT: dict[str, tuple[str, Schema]] = {
    "/v1/chat/completions": (_JSON, _ref("ChatCompletion")),
    "/v1/completions": (_JSON, _ref("TextCompletion")),
    "/v1/models": (_JSON, _ref("Models")),
    "/v1/models/{stream}": (_JSON, _ref("Model")),
    "/tidegate/compare": (_JSON, _ref("Comparison")),
    "/tidegate/state": (_JSON, _ref("State")),
    "/healthz": (_JSON, _ref("Health")),
    "/readyz": (_JSON, _ref("Readiness")),
    "/metrics": ("text/plain", _TEXT),
}
_STREAMED = frozenset({"/v1/chat/completions", "/v1/completions"})
_ALSO_503 = frozenset({"/healthz", "/readyz"})
