"""Canonical JSON (RFC 8785), so that equal values have equal hashes and signatures everywhere."""

from __future__ import annotations

import hashlib
from typing import Any

import rfc8785

from privacy.errors import PrivacyError


def canonical(value: Any) -> bytes:
    """The one encoding of a JSON value: sorted keys, shortest numbers, UTF-8 (RFC 8785).

    Raises:
        PrivacyError: the value is not JSON (NaN, infinity, integers beyond 2^53, other types).
    """
    try:
        return rfc8785.dumps(value)
    except rfc8785.CanonicalizationError as error:
        raise PrivacyError(f"value cannot be encoded as canonical JSON: {error}") from None


def sha256_of(value: Any) -> str:
    """SHA-256 of the canonical encoding, lower-case hex."""
    return hashlib.sha256(canonical(value)).hexdigest()
