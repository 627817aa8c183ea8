"""One signed request to one receiver, in the form of Standard Webhooks (https://www.standardwebhooks.com).

    webhook-id          the event's id: the same at every try, so that a receiver can leave out what it has seen
    webhook-timestamp   POSIX seconds of this try
    webhook-signature   `v1,` and base64 of HMAC-SHA256(secret, "ID.TIMESTAMP.BODY"); one for each secret, by a space

A receiver recomputes the signature over the bytes it got, and refuses a timestamp that is minutes old.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import os
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

# In the keys folder; or the variable TIDEGATE_HOOK_SECRET.
SECRET = "hook_secret"  # noqa: S105 - its file's name
PREFIX = "whsec_"
# What Standard Webhooks asks for at least, and what is made here.
SECRET_BYTES_MIN = 24
SECRET_BYTES = 32
# A receiver that needs longer should queue what it got: others wait behind it.
CONNECT_SECONDS, ANSWER_SECONDS = 3.0, 10.0
# Of an answer, for the log.
SAID_CHARS_MAX = 200


@dataclass(frozen=True)
class Answer:
    """What a receiver said: its HTTP status, or None and why there was none."""

    status: int | None
    said: str

    @property
    def taken(self) -> bool:
        """Whether the receiver has the event now. A redirect is none: it could lead anywhere."""
        return self.status is not None and 200 <= self.status < 300  # noqa: PLR2004 - HTTP success


def check_url(url: str, *, insecure: bool) -> str:
    """The address, if a webhook may be sent there.

    Raises:
        ValueError: not http(s), a password in it, or plain http to another machine.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{url}: must be an address like https://hooks.example.org/tidegate")
    if parts.username or parts.password:
        raise ValueError(f"https://…@{parts.hostname}: must hold no user and password; the signature says who sends")
    if parts.scheme == "http" and not insecure and not is_loopback(parts.hostname):
        raise ValueError(
            f"{url}: must be https, since everybody on the way could read and change it; "
            f"hooks.insecure: true allows plain http"
        )
    return url


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by name or number alone: no name server is asked."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def shown(url: str) -> str:
    """An address without its query, which may hold a token."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}" + ("?…" if parts.query else "")


def keys_of(text: str) -> tuple[bytes, ...]:
    """The secrets in a text, separated by blanks: `whsec_` and base64, or any other word as it is.

    Two of them while receivers change from the old to the new one: every request is then signed with both.

    Raises:
        ConfigError: none, one that is too short, or one that is not base64. The message shows nothing of it.
    """
    keys = []
    for word in text.split():
        try:
            plain = not word.startswith(PREFIX)
            key = word.encode() if plain else base64.b64decode(word.removeprefix(PREFIX), validate=True)
        except binascii.Error:
            raise ConfigError(f"{SECRET}: what follows {PREFIX} must be base64; remove it to have one made") from None
        if len(key) < SECRET_BYTES_MIN:
            raise ConfigError(f"{SECRET}: {len(key)} bytes, must be >= {SECRET_BYTES_MIN}; remove it to have one made")
        keys.append(key)
    if not keys:
        raise ConfigError(f"{SECRET}: is empty; remove it to have one made")
    return tuple(keys)


def make_secret(keys: Path) -> Path:
    """Make the file of the secret, mode 0600, whole or not at all; the one that is there stays."""
    file = keys / SECRET
    keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = keys / f".{SECRET}.{os.getpid()}.{secrets.token_hex(4)}"
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as out:
        out.write(PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode() + "\n")
        out.flush()
        os.fsync(out.fileno())
    try:
        os.link(partial, file)
    except FileExistsError:
        pass
    finally:
        partial.unlink()
    return file


def sign(keys: Sequence[bytes], message_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`."""
    content = f"{message_id}.{timestamp}.".encode() + body
    return " ".join(f"v1,{base64.b64encode(hmac.digest(key, content, 'sha256')).decode()}" for key in keys)


def headers(keys: Sequence[bytes], message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """All headers of one try.

    Args:
        keys: secrets that sign.
        message_id: the event's id.
        timestamp: POSIX seconds.
        body: exactly what is sent.
    """
    return {
        "content-type": "application/json",
        "user-agent": "tidegate",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(keys, message_id, timestamp, body),
    }


def send(url: str, given: Mapping[str, str], body: bytes) -> Answer:
    """Send one request and hear what comes back. Never raises for what is wrong outside."""
    import requests

    with requests.Session() as session:
        # A proxy that the environment names is for the outside.
        session.trust_env = not is_loopback(urlsplit(url).hostname or "")
        try:
            with session.post(
                url,
                data=body,
                headers=dict(given),
                timeout=(CONNECT_SECONDS, ANSWER_SECONDS),
                allow_redirects=False,
                stream=True,  # of a long answer only the beginning is read
            ) as reply:
                said = reply.raw.read(SAID_CHARS_MAX, decode_content=True).decode("utf-8", "replace")
                return Answer(reply.status_code, _line(said or str(reply.reason or "")))
        except requests.Timeout:
            return Answer(None, f"no answer within {ANSWER_SECONDS:.0f} s")
        except Exception as error:  # noqa: BLE001 - whatever a receiver or the way there does is data, not our end
            return Answer(None, _line(f"{type(error).__name__}: no connection, or it broke off"))


def _line(text: str) -> str:
    """One line of printable characters: a receiver's words go to a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:SAID_CHARS_MAX]
