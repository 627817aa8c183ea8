"""Train or holdout, decided once for a person and for ever: a user is never on both sides."""

from __future__ import annotations

import hashlib
import hmac
from typing import Final, Literal

from ingest.errors import SettingError

Split = Literal["train", "holdout"]
KEY_BYTES_MIN: Final = 16
_LABEL: Final = b"tidegate/holdout/1\x00"


def check_split(key: bytes, holdout_share: float) -> None:
    """Refuse a key or share that cannot work.

    Raises:
        SettingError: a key under 16 bytes, or a share outside [0, 1).
    """
    if len(key) < KEY_BYTES_MIN:
        raise SettingError(f"split key: {len(key)} bytes; must be at least {KEY_BYTES_MIN}; `tidegate init` makes one")
    if not 0 <= holdout_share < 1:
        raise SettingError(f"holdout_share={holdout_share}: must be in [0, 1); see params.yaml")


def split_of(user_id: str, key: bytes, holdout_share: float) -> Split:
    """HMAC-SHA256 (RFC 2104) of the user under the stream's key, read as a uniform number in [0, 1)."""
    digest = hmac.digest(key, _LABEL + user_id.encode(), hashlib.sha256)
    return "holdout" if int.from_bytes(digest[:8], "big") < holdout_share * 2**64 else "train"
