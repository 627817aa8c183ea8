"""The record contract, version 1: what one message on a topic must hold to be trained on.

Bad input is data: :func:`parse` answers with a :class:`Record` or with reasons, it does not raise.
A reason never holds content of the message, only the contract's own names, codes and bounds.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ingest.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

SCHEMA_VERSION: Final = 1
ID_BYTES_MAX: Final = 128
# Attributes are for slicing, not for payload: together they must stay smaller than a prompt.
ATTRIBUTES_MAX: Final = 32
ATTRIBUTE_BYTES_MAX: Final = 512
# One message can break many rules; headers of a dead letter stay bounded.
REASONS_MAX: Final = 8

_RFC3339 = re.compile(r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(\.\d{1,9})?([Zz]|[+-]\d{2}:[0-5]\d)\Z")


# UTF-8 needs at most so many bytes for a character.
_CHARACTER_BYTES_MAX: Final = 4


def _short(text: str, bytes_max: int) -> str:
    # Encoded whatever its length: pydantic lets lone surrogates through where a text has no bound of its own.
    if len(text.encode()) > bytes_max:
        raise ValueError("too_long")
    return text


def _id_sized(text: str) -> str:
    # As `_short`, without its call: this runs four times a record.
    if len(text) * _CHARACTER_BYTES_MAX > ID_BYTES_MAX and len(text.encode()) > ID_BYTES_MAX:
        raise ValueError("too_long")
    return text


def _utc(text: str) -> str:
    """RFC 3339 in any zone to RFC 3339 in UTC with Z."""
    if not _RFC3339.match(text):
        raise ValueError("bad_time")
    try:
        # Python keeps microseconds; RFC 3339 allows any number of digits.
        moment = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text).upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("bad_time") from None
    return moment.isoformat().replace("+00:00", "Z")


def _bounded(attributes: dict[str, str]) -> dict[str, str]:
    if len(attributes) > ATTRIBUTES_MAX:
        raise ValueError("too_many")
    for key, value in attributes.items():
        _short(key, ID_BYTES_MAX)
        _short(value, ATTRIBUTE_BYTES_MAX)
    return attributes


_Id = Annotated[str, StringConstraints(min_length=1), AfterValidator(_id_sized)]
_Text = Annotated[str, StringConstraints(min_length=1)]


class Record(BaseModel):
    """One labelled event. Lengths of texts are the stream's, see :class:`RecordLimits`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # Not a Literal: to that true and 1.0 are 1 too.
    schema_version: Annotated[int, Field(ge=SCHEMA_VERSION, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    event_id: _Id
    user_id: _Id
    domain: _Id
    prompt: _Text
    completion: _Text
    label: _Id | None = None
    occurred_at: Annotated[str, AfterValidator(_utc)] | None = None
    attributes: Annotated[dict[str, str], AfterValidator(_bounded)] | None = None


@dataclass(frozen=True)
class Reason:
    """Why a message was not accepted: a code to count, the contract's field, a sentence without content."""

    code: str
    field: str
    message: str

    def __str__(self) -> str:
        """One line, `field: message`."""
        return f"{self.field or 'message'}: {self.message}"


@dataclass(frozen=True)
class RecordLimits:
    """What a stream declares about its records; kept as frozen sets. `labels=None`: any label.

    Raises:
        SettingError: a limit that no record could meet.
    """

    domains: Collection[str]
    labels: Collection[str] | None
    prompt_chars_max: int
    completion_chars_max: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", frozenset(self.domains))
        if self.labels is not None:
            object.__setattr__(self, "labels", frozenset(self.labels))
        if not self.domains:
            raise SettingError("domains=(): must name at least one; set streams.<name>.ingest.domains")
        for name in ("prompt_chars_max", "completion_chars_max"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)}: must be at least 1; see params.yaml")


class _DuplicateKeyError(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _DuplicateKeyError
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(name)


# Confluent's serialisers write a zero and the schema's id, 4 bytes, before the payload; an Avro file begins with Obj1.
_REGISTRY_MAGIC: Final = b"\x00"
_REGISTRY_BYTES: Final = 5
_AVRO_MAGIC: Final = b"Obj\x01"
_UTF16_STARTS: Final = (b"\x00{\x00", b"\x00[\x00", b"\x00 \x00", b"\x00\n\x00")


def _foreign(value: bytes) -> Reason | None:
    """What a message that is no JSON looks like, if it is one of the encodings Tidegate refuses."""
    if value.startswith(_AVRO_MAGIC):
        what = "looks like an Avro object container"
    elif value.startswith(_REGISTRY_MAGIC) and len(value) > _REGISTRY_BYTES and not value.startswith(_UTF16_STARTS):
        what = "looks like Avro or Protobuf in schema-registry framing"
    else:
        return None
    return Reason("encoding", "", f"{what}, which Tidegate does not read; let the producer or a connector write JSON")


# Made once: `json.loads` with hooks makes one for each message.
_DECODER: Final = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)


def _decode(value: bytes | None) -> Any | Reason:
    """The message as JSON, or why it is none."""
    if value is None:
        return Reason("tombstone", "", "null value; a record cannot be deleted by a message")
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        return _foreign(value) or Reason("not_utf8", "", f"not UTF-8 at byte {error.start}; must be UTF-8 JSON")
    try:
        return _DECODER.decode(text)
    except _DuplicateKeyError:
        return Reason("duplicate_key", "", "a key stands twice in one object; must stand once")
    except json.JSONDecodeError as error:
        return _foreign(value) or Reason("not_json", "", f"not JSON at character {error.pos}; must be one JSON object")
    except (ValueError, RecursionError):
        # NaN, Infinity, numbers of thousands of digits, thousands of nested brackets.
        return Reason("not_json", "", "no interoperable JSON (RFC 8259); must be one flat JSON object")


_BAD_TEXT: Final = ("bad_text", "not valid Unicode (lone surrogate); must be text")
_BAD_VERSION: Final = ("schema_version", f"unknown version; must be {SCHEMA_VERSION}")
# pydantic's error type: (our code, what the contract asks)
_RULES: Final[Mapping[str, tuple[str, str]]] = {
    "missing": ("missing", "missing; the contract requires it"),
    "string_type": ("wrong_type", "wrong type; must be a string"),
    "dict_type": ("wrong_type", "wrong type; must be an object of strings"),
    "string_unicode": _BAD_TEXT,
    "string_too_short": ("empty", "empty; must hold at least one character"),
    "int_type": _BAD_VERSION,
    "greater_than_equal": _BAD_VERSION,
    "less_than_equal": _BAD_VERSION,
    "too_long": ("too_long", ""),
    "too_many": ("too_many", f"too many entries; must be at most {ATTRIBUTES_MAX}"),
    "bad_time": ("bad_time", "not an RFC 3339 time with a zone, such as 2026-01-31T12:00:00Z"),
}


def _too_long(field: str) -> str:
    if field == "attributes":
        return f"a key over {ID_BYTES_MAX} or a value over {ATTRIBUTE_BYTES_MAX} bytes"
    return f"too long; must be at most {ID_BYTES_MAX} bytes"


def _explain(error: ValidationError) -> tuple[Reason, ...]:
    reasons: dict[tuple[str, str], Reason] = {}
    for item in error.errors(include_url=False, include_input=False):
        kind = item["type"]
        # A key that is no valid Unicode has no place of its own.
        field = str(item["loc"][0]) if item["loc"] else ""
        if kind == "extra_forbidden":
            # The key itself may be somebody's data: it is not named.
            reason = Reason("unknown_key", "", "a key the contract does not have")
        elif kind == "value_error":
            cause = str(item["ctx"]["error"])
            code, message = _RULES.get(cause, ("bad_text", "not valid Unicode (lone surrogate); must be text"))
            reason = Reason(code, field, message or _too_long(field))
        else:
            code, message = _RULES.get(kind, ("wrong_type", "wrong type"))
            reason = Reason(code, field, message)
        reasons.setdefault((reason.code, reason.field), reason)
    return tuple(reasons.values())[:REASONS_MAX]


def _over_limits(record: Record, limits: RecordLimits) -> tuple[Reason, ...]:
    reasons = []
    if record.domain not in limits.domains:
        reasons.append(Reason("undeclared_domain", "domain", f"not one of {len(limits.domains)} declared"))
    if record.label is not None and limits.labels is not None and record.label not in limits.labels:
        reasons.append(Reason("undeclared_label", "label", f"not one of {len(limits.labels)} declared"))
    for field, bound in (("prompt", limits.prompt_chars_max), ("completion", limits.completion_chars_max)):
        if len(getattr(record, field)) > bound:
            reasons.append(Reason("too_long", field, f"too long; must be at most {bound} characters"))
    return tuple(reasons)


def _plain(value: bytes) -> Record | None:
    """The record of a message in plain form, in half the time; None sends it through the thorough way.

    pydantic's own JSON reader keeps the last of two equal keys, which the contract forbids. Without escapes every quote
    in the text is one of a key's or a text's: so their number tells whether a key stood twice.
    """
    if b"\\" in value:
        return None
    try:
        record = Record.model_validate_json(value)
    except ValidationError:
        return None
    given = record.model_fields_set
    # What has other than one text for a value, a null or an object, is left to the thorough way.
    nulls = (record.label is None and "label" in given) or (record.occurred_at is None and "occurred_at" in given)
    if nulls or "attributes" in given:
        return None
    quotes = 4 * len(given) - 2 * ("schema_version" in given)
    return record if value.count(b'"') == quotes else None


def parse(value: bytes | None, limits: RecordLimits) -> Record | tuple[Reason, ...]:
    """One message to a record, or to the reasons why it is none (at least one, at most `REASONS_MAX`).

    Depends on this message alone, so that one person's message never decides about another's.
    An optional field that is null counts as absent; `schema_version` may be left out and is then 1.
    """
    if value is not None and (plain := _plain(value)) is not None:
        return _over_limits(plain, limits) or plain
    decoded = _decode(value)
    if isinstance(decoded, Reason):
        return (decoded,)
    if not isinstance(decoded, dict):
        return (Reason("not_object", "", "JSON, but not an object; must be one JSON object"),)
    try:
        record = Record.model_validate(decoded)
    except ValidationError as error:
        return _explain(error)
    return _over_limits(record, limits) or record
