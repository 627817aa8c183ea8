"""API keys: who may ask what of the server, kept hashed in one file that the server looks at before every request.

A key is `tg-`, 8 hex digits that name it, and 32 random bytes in base64url. The file holds the SHA-256 of the whole; a
slow hash would add nothing to 256 random bits. What a key is not valid for is told only to those who hold a valid one.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, get_args

from privacy.signing import write_whole
from serving.errors import AccessRefused, KeysUnreadable, ServingError, Unauthorised
from serving.limits import Limits

Scope = Literal["answer", "read", "candidate"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
KEYS_FILE = "api_keys.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,79}\Z")
# Compared against where no key of that id exists, so that an unknown id takes as long as a wrong secret.
_NOBODY = hashlib.sha256(b"nobody").hexdigest()
_HASH = re.compile(r"[0-9a-f]{64}\Z")
# An Authorization header longer than this holds no key of ours.
_HEADER_MAX = 1024


@dataclass(frozen=True)
class ApiKey:
    """One key, without its secret.

    Attributes:
        key_id: 8 hex digits; part of the key, so that it can be named without being shown.
        name: whose it is.
        sha256: of the whole key, in hex.
        scopes: what it is for.
        streams: which streams `answer` and `candidate` reach; empty: all.
        requests_per_minute: 0 is no limit.
        tokens_per_minute: of prompts and answers; 0 is no limit.
        made_at: RFC 3339.
        revoked_at: RFC 3339; empty while it counts.
    """

    key_id: str
    name: str
    sha256: str
    scopes: tuple[Scope, ...]
    streams: tuple[str, ...] = ()
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    made_at: str = ""
    revoked_at: str = ""


@dataclass(frozen=True)
class Caller:
    """Who asks: the holder of a key, this machine's operator, or anybody where no keys are asked for."""

    name: str
    scopes: frozenset[Scope]
    streams: frozenset[str] = frozenset()
    limits: Limits = field(default_factory=Limits)
    open: bool = False

    def may(self, *any_of: Scope, stream: str | None = None) -> bool:
        """Whether one of the scopes is there, for that stream if one is named."""
        held = self.scopes.intersection(any_of)
        if stream is not None and self.streams and stream not in self.streams:
            held -= {"answer", "candidate"}
        return bool(held)

    def require(self, *any_of: Scope, stream: str | None = None) -> None:
        """Refuse who may not.

        Raises:
            AccessRefused: 403, naming the scope that is missing.
        """
        if not self.may(*any_of, stream=stream):
            where = f" on stream {stream}" if stream is not None else ""
            raise AccessRefused(
                f"You have insufficient permissions for this operation: the key {self.name!r} must have the scope "
                f"{' or '.join(any_of)}{where}; an operator makes such a key with `tidegate apikeys add`"
            )


ANYBODY = Caller("anybody", frozenset(SCOPES), open=True)


def local_key(secret: bytes) -> str:
    """The key by which commands of the same workspace reach their server: whoever can read its secret may add keys."""
    return "tg-local-" + hmac.new(secret, b"tidegate local api key 1", hashlib.sha256).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether only this machine is reached under a name or address."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


class Access:
    """Decides who a request is from.

    Args:
        file: the keys; None asks nobody for one.
        local: the key of the workspace's own commands, see `local_key`; None: there is none.
    """

    def __init__(self, file: Path | None = None, local: str | None = None) -> None:
        self._file = file
        self._local = local
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] | None = None
        self._keys: dict[str, ApiKey] = {}
        self._limits: dict[str, Limits] = {}

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return self._file is not None

    def check_some(self, host: str) -> None:
        """Refuse to ask for keys where nobody could have one.

        Raises:
            ServingError: no key counts.
            KeysUnreadable: the file is damaged, or others may read it.
        """
        if self._file is not None and all(key.revoked_at for key in read_keys(self._file)):
            raise ServingError(
                f"api.host={host}: keys are required there and there is none; make one first: "
                "`tidegate apikeys add NAME --scope answer`, or listen on 127.0.0.1 alone"
            )

    def caller(self, authorization: str | None) -> Caller:
        """Who holds the key of an Authorization header: `Bearer KEY`, or `Basic` with the key as the password.

        Raises:
            Unauthorised: 401; none, not one of ours, or revoked.
            KeysUnreadable: 503; then nobody is let in.
        """
        if self._file is None:
            return ANYBODY
        text = _presented(authorization)
        if text is None:
            raise Unauthorised(
                "You didn't provide an API key. Send it as `Authorization: Bearer YOUR_KEY`; "
                "an operator makes one with `tidegate apikeys add`"
            )
        given = hashlib.sha256(text.encode()).hexdigest()
        if self._local is not None and hmac.compare_digest(given, hashlib.sha256(self._local.encode()).hexdigest()):
            return Caller("local", frozenset(SCOPES))
        parts = text.split("-", 2)
        with self._lock:
            self._follow()
            key = self._keys.get(parts[1]) if len(parts) > 1 else None
            right = hmac.compare_digest(given, key.sha256 if key else _NOBODY)
            if key is None or not right or key.revoked_at:
                raise Unauthorised(
                    "Incorrect API key provided: it is unknown or revoked; `tidegate apikeys list` shows what counts"
                )
            return Caller(key.name, frozenset(key.scopes), frozenset(key.streams), self._limits[key.key_id])

    def _follow(self) -> None:
        """Read the file again when it is another one: a revoked key stops at the next request."""
        assert self._file is not None  # noqa: S101 - asked only where keys are
        try:
            stat = self._file.stat()
            seen: tuple[int, ...] = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_size)
        except FileNotFoundError:
            seen = ()
        except OSError as error:
            raise KeysUnreadable(
                f"{self._file.name}: {error.strerror}; nobody is let in until it can be read"
            ) from None
        if seen == self._seen:
            return
        self._keys = {key.key_id: key for key in read_keys(self._file)}
        # What a key has used stays used while its limits stay the same.
        fresh = {}
        for key_id, key in self._keys.items():
            asked = (key.requests_per_minute, key.tokens_per_minute)
            known = self._limits.get(key_id)
            fresh[key_id] = known if known and known.asked == asked else Limits(*asked)
        self._limits = fresh
        self._seen = seen


def read_keys(file: Path) -> list[ApiKey]:
    """All keys of a file, revoked ones too; none where there is no file.

    Raises:
        KeysUnreadable: it cannot be read, or is damaged.
    """
    try:
        if file.stat().st_mode & 0o077:
            raise KeysUnreadable(f"{file}: others may read or write it, must be 0600: chmod 600 {file}")
        return [_key_of(entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise KeysUnreadable(f"{file}: {error.strerror}; make it readable, until then none counts") from None
    except (ValueError, TypeError, KeyError) as error:
        raise KeysUnreadable(
            f"{file}: is damaged ({type(error).__name__}); restore it from a backup, or remove it and add keys anew"
        ) from None


def add_key(
    file: Path,
    name: str,
    *,
    scopes: Sequence[Scope],
    streams: Sequence[str] = (),
    requests_per_minute: int = 0,
    tokens_per_minute: int = 0,
) -> tuple[str, ApiKey]:
    """Make a key. Returns its text, which is kept nowhere, and what the file holds of it.

    Raises:
        ServingError: the name is taken or no name, or a bound is wrong.
        KeysUnreadable: the file is damaged.
    """
    if not NAME.match(name):
        raise ServingError(f"name={name[:80]!r}: must be 1 to 80 letters, digits, spaces or ._@-; say whose it is")
    if not scopes or set(scopes) - set(SCOPES):
        raise ServingError(f"scopes={','.join(scopes)}: must be some of {', '.join(SCOPES)}")
    if min(requests_per_minute, tokens_per_minute) < 0:
        raise ServingError("limits per minute: must be >= 0; 0 is no limit")
    with _changing(file) as keys:
        if any(key.name == name and not key.revoked_at for key in keys):
            raise ServingError(f"name={name}: has a key already; revoke it first, or choose another name")
        key_id = secrets.token_hex(4)
        while any(key.key_id == key_id for key in keys):
            key_id = secrets.token_hex(4)
        text = f"tg-{key_id}-{secrets.token_urlsafe(32)}"
        made = ApiKey(
            key_id=key_id,
            name=name,
            sha256=hashlib.sha256(text.encode()).hexdigest(),
            scopes=tuple(scope for scope in SCOPES if scope in scopes),
            streams=tuple(sorted(set(streams))),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            made_at=_now(),
        )
        keys.append(made)
    return text, made


def revoke_key(file: Path, which: str) -> ApiKey:
    """Revoke a key by its id or its name; a server stops taking it at once.

    Raises:
        ServingError: there is no such key.
    """
    with _changing(file) as keys:
        for place, key in enumerate(keys):
            if which in {key.key_id, key.name} and not key.revoked_at:
                keys[place] = ApiKey(**{**asdict(key), "revoked_at": _now()})
                return keys[place]
        raise ServingError(f"key={which[:80]}: no such key counts; `tidegate apikeys list` shows them")


@contextmanager
def _changing(file: Path) -> Iterator[list[ApiKey]]:
    """The keys, written back whole when the block ends well; two writers take turns."""
    handle = os.open(file.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        keys = read_keys(file)
        yield keys
        text = json.dumps([asdict(key) for key in keys], indent=1) + "\n"
        write_whole(file, text.encode(), mode=0o600)
    finally:
        os.close(handle)


def _key_of(entry: Mapping[str, object]) -> ApiKey:
    key = ApiKey(**entry)  # type: ignore[arg-type]  # checked below
    texts = (key.key_id, key.name, key.made_at, key.revoked_at)
    numbers = (key.requests_per_minute, key.tokens_per_minute)
    lists = (key.scopes, key.streams)
    right = (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(number, int) and number >= 0 for number in numbers)
        and all(isinstance(names, list | tuple) and all(isinstance(n, str) for n in names) for names in lists)
        and not set(key.scopes) - set(SCOPES)
        and isinstance(key.sha256, str)
        and _HASH.match(key.sha256)
    )
    if not right:
        raise ValueError("not a key")
    return ApiKey(**{**asdict(key), "scopes": tuple(key.scopes), "streams": tuple(key.streams)})


def _presented(authorization: str | None) -> str | None:
    """The key in an Authorization header; None when there is none."""
    if not authorization or len(authorization) > _HEADER_MAX:
        return None
    kind, _, value = authorization.strip().partition(" ")
    value = value.strip()
    if kind.lower() == "bearer":
        return value or None
    if kind.lower() == "basic":  # what a browser asks a person for
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2] or None
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
