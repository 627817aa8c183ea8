"""Answer ids that say which version answered, with nothing logged and nothing forged.

An id is `chatcmpl-` or `cmpl-` and base64url of: version (4 bytes), random (9 bytes), the stream's name, and the first
12 bytes of HMAC-SHA256 (RFC 2104) over all of it. With 96 bits of MAC and 72 random ones nobody makes one up, and no
two are equal.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import struct

from serving.errors import AnswerIdError

PREFIXES = ("chatcmpl-", "cmpl-")
_VERSION = struct.Struct(">I")
_RANDOM_BYTES = 9
_MAC_BYTES = 12
_HEAD_BYTES = _VERSION.size + _RANDOM_BYTES
_CONTEXT = b"tidegate answer id 1"


def make_answer_id(stream: str, version: int, key: bytes, prefix: str = "chatcmpl-") -> str:
    """A new id for an answer of one version; 0 is the bare base."""
    body = _VERSION.pack(version) + os.urandom(_RANDOM_BYTES) + stream.encode()
    return prefix + base64.urlsafe_b64encode(body + _mac(body, key)).decode().rstrip("=")


def resolve(answer_id: str, key: bytes) -> tuple[str, int]:
    """The stream and version an answer came from.

    Raises:
        AnswerIdError: it is not an id this service made.
    """
    coded = next((answer_id[len(p) :] for p in PREFIXES if answer_id.startswith(p)), "")
    try:
        raw = base64.b64decode(coded + "=" * (-len(coded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    body, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
    if len(body) <= _HEAD_BYTES or not hmac.compare_digest(mac, _mac(body, key)):
        raise AnswerIdError(
            f"answer id={answer_id[:80]!r}: was not made by this service; copy the whole `id` of the answer"
        )
    return body[_HEAD_BYTES:].decode(), _VERSION.unpack(body[: _VERSION.size])[0]


def _mac(body: bytes, key: bytes) -> bytes:
    return hmac.new(key, _CONTEXT + body, hashlib.sha256).digest()[:_MAC_BYTES]
