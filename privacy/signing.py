"""Ed25519 signatures (RFC 8032) over canonical JSON: receipts, verdicts, approvals.

PURPOSE.pem               the private key in use, mode 0600
PURPOSE.pub               its public half; PURPOSE-KEYID.pub are those of retired keys
PURPOSE.rotations.jsonl   a signed statement a line: by it the old key introduces the new one

How a key is changed is in `privacy/rotation.py`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privacy.canonical import canonical
from privacy.errors import PrivacyError, SignatureError

# 64 bits of a SHA-256 name a key among the handful a service ever has.
KEY_ID_HEX = 16
ROTATIONS = ".rotations.jsonl"
# Fields in which a signed value says when it was made (UTC, RFC 3339): an approval's and a verdict's.
_TIMES = ("when", "made_at")


@dataclass(frozen=True)
class PublicKey:
    """A public key and its id: the first 16 hex digits of the SHA-256 of its 32 raw bytes."""

    raw: bytes

    @property
    def key_id(self) -> str:
        """Name of the key in signed values."""
        return hashlib.sha256(self.raw).hexdigest()[:KEY_ID_HEX]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the 32 raw bytes, lower-case hex: what is compared by telephone."""
        return hashlib.sha256(self.raw).hexdigest()

    @property
    def pem(self) -> str:
        """SubjectPublicKeyInfo as PEM (RFC 8410)."""
        key = Ed25519PublicKey.from_public_bytes(self.raw)
        return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode(
            "ascii"
        )

    @classmethod
    def from_hex(cls, text: Any) -> PublicKey:
        """A key from the hex of its 32 raw bytes.

        Raises:
            SignatureError: it is none.
        """
        try:
            key = cls(bytes.fromhex(text))
            Ed25519PublicKey.from_public_bytes(key.raw)
        except (TypeError, ValueError):
            raise SignatureError(f"public key={str(text)[:16]}: must be the hex of 32 bytes") from None
        if key.raw.hex() != text:
            raise SignatureError(f"public key={text[:16]}: must be lower-case hex without spaces")
        return key

    @classmethod
    def load(cls, path: Path) -> PublicKey:
        """Read a PEM file.

        Raises:
            SignatureError: the file is missing or holds no Ed25519 public key.
        """
        try:
            key = serialization.load_pem_public_key(path.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise SignatureError(f"{path}: no readable public key ({type(error).__name__})") from None
        if not isinstance(key, Ed25519PublicKey):
            raise SignatureError(f"{path}: must be an Ed25519 public key")
        return cls(key.public_bytes_raw())


class SigningKey:
    """A private Ed25519 key in a file of mode 0600, its public half beside it as `.pub`."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes_raw())

    @property
    def key_id(self) -> str:
        """Name of the key in signed values."""
        return self.public.key_id

    @classmethod
    def load_or_create(cls, path: Path) -> SigningKey:
        """Read the key, or make one; safe when two processes do so at once: both get the same key.

        Raises:
            SignatureError: the file can be read by others, holds no Ed25519 private key, or its `.pub` is another's; or
                the public half alone is here, because the key is kept elsewhere.
        """
        try:
            # Asked in this order: whoever makes a key writes the private half first.
            public_is_here = path.with_suffix(".pub").exists()
            if not path.exists():
                if public_is_here:
                    raise SignatureError(
                        f"{path}: is not here, only its public half; sign where it is kept, or restore it from a backup"
                    )
                cls._create(path)
            key = cls._load(path)
            key._keep_public(path.with_suffix(".pub"))  # noqa: SLF001 - a method of the same class
        except OSError as error:
            raise SignatureError(f"{path}: cannot read or make the key: {error.strerror}") from None
        return key

    @classmethod
    def create(cls, path: Path) -> SigningKey:
        """Make a key in a new file of mode 0600, without a public half beside it.

        Raises:
            SignatureError: the file cannot be read back.
        """
        cls._create(path)
        return cls._load(path)

    @classmethod
    def load_existing(cls, path: Path) -> SigningKey:
        """Read a key and make nothing.

        Raises:
            SignatureError: the file is missing, can be read by others, or holds no Ed25519 private key.
        """
        try:
            return cls._load(path)
        except OSError as error:
            raise SignatureError(f"{path}: cannot read the key: {error.strerror}") from None

    @staticmethod
    def _create(path: Path) -> None:
        pem = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        partial = _write_beside(path, pem, mode=0o600)
        try:
            # A link appears whole or not at all, and never replaces the key another process has just made.
            os.link(partial, path)
        except FileExistsError:
            pass
        finally:
            partial.unlink()
        _sync_folder(path.parent)

    @classmethod
    def _load(cls, path: Path) -> SigningKey:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise SignatureError(f"{path}: mode {mode:04o} lets others read it; must be 0600: chmod 600 {path}")
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise SignatureError(f"{path}: holds no readable private key; restore it from a backup") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise SignatureError(f"{path}: must be an Ed25519 private key")
        return cls(key)

    def _keep_public(self, path: Path) -> None:
        if path.exists():
            found = PublicKey.load(path)
            if found == self.public:
                return
            # A rotation that was stopped between its last two steps: the statement says whose key this is.
            if (found.key_id, self.key_id) not in _introductions(path.with_suffix(ROTATIONS)):
                raise SignatureError(
                    f"{path}: key_id={found.key_id}, must be {self.key_id}, the private key beside it; "
                    f"keep a retired public key under another name"
                )
        self.write_public(path)

    def write_public(self, path: Path) -> None:
        """Write the public half as PEM, whole or not at all."""
        write_whole(path, self.public.pem.encode(), mode=0o644)

    def sign(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """The payload with `key_id` and `signature` (base64url) over everything but the signature.

        A payload that carries a signature is signed anew: the old one is no part of it.

        Raises:
            PrivacyError: the payload is not JSON.
        """
        body = {name: value for name, value in payload.items() if name != "signature"} | {"key_id": self.key_id}
        signature = self._key.sign(canonical(body))
        return {**body, "signature": base64.urlsafe_b64encode(signature).decode("ascii")}


class KeyFile:
    """Signs with whatever key its file holds at that moment: for a process that outlives a rotation."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def sign(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """As `SigningKey.sign`.

        Raises:
            SignatureError: the file can no longer be read.
            PrivacyError: the payload is not JSON.
        """
        return SigningKey.load_or_create(self._path).sign(payload)


@dataclass(frozen=True)
class Rotation:
    """One change of a purpose's key, as the old key signed it.

    Attributes:
        seq: 1 for the first rotation of the purpose.
        at: when, UTC, RFC 3339.
        ledger_head, approvals_head: where both chains stood. What the old key signed later does not count, and
            unlike a time this cannot be dated back.
        signed: the whole statement.
    """

    purpose: str
    seq: int
    old_key_id: str
    new_public: PublicKey
    at: str
    ledger_head: str
    approvals_head: str
    signed: Mapping[str, Any]


def read_rotations(statements: Sequence[Any], keys: Mapping[str, PublicKey], first: int = 1) -> list[Rotation]:
    """Statements of one purpose, oldest first; each is signed by the key that the one before introduced.

    Args:
        statements: signed values, in their order.
        keys: trusted keys by id; must hold the one that signed the first statement.
        first: number of the first statement.

    Raises:
        SignatureError: names the first statement that does not hold.
    """
    known, found = dict(keys), list[Rotation]()
    for seq, signed in enumerate(statements, start=first):
        try:
            found.append(_next_rotation(signed, known, found, seq))
        except (KeyError, TypeError):
            raise SignatureError(f"rotation {seq}: is no statement of a rotation: its fields differ") from None
        except SignatureError as error:
            raise SignatureError(f"rotation {seq}: {error}") from None
        known[found[-1].new_public.key_id] = found[-1].new_public
    return found


def _next_rotation(signed: Any, known: Mapping[str, PublicKey], before: Sequence[Rotation], seq: int) -> Rotation:
    body = checked(signed, known)
    new = PublicKey.from_hex(body.pop("new_public"))
    whole = (body.pop("kind"), body.pop("new_key_id"), body["seq"]) == ("rotation", new.key_id, seq)
    if before:
        whole = whole and (signed["key_id"], body["purpose"]) == (before[-1].new_public.key_id, before[-1].purpose)
    if not whole:
        raise SignatureError("it does not follow the one before it")
    return Rotation(**body, old_key_id=signed["key_id"], new_public=new, signed=dict(signed))


def load_statements(path: Path) -> list[Any]:
    """Signed statements of a file, a line each; none where there is no file.

    Raises:
        SignatureError: a line is not JSON.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise SignatureError(f"{path}: cannot be read ({type(error).__name__}); restore it from a backup") from None


class TrustedKeys:
    """The public keys whose signatures count, those of retired keys for what was signed before.

    Args:
        keys: public keys.
        retired: when a key was retired (UTC, RFC 3339), by key id. A value that says it was made later is refused; a
            value that says no time is not: the chains decide there (`privacy/verify.py`).
    """

    def __init__(self, keys: Iterable[PublicKey], retired: Mapping[str, str] | None = None) -> None:
        self._keys = {key.key_id: key for key in keys}
        self._retired = dict(retired or {})
        self._folder: Path | None = None
        self._purpose, self._stamp = "", 0

    @classmethod
    def from_dir(cls, folder: Path, purpose: str = "") -> TrustedKeys:
        """Every `PURPOSE*.pub` of a folder, and what its rotations introduced; without a purpose, every key.

        The folder is read again when it has changed, so that a server that runs on knows of a rotation.

        Raises:
            SignatureError: one of them is not an Ed25519 public key, or a statement of a rotation does not hold.
        """
        found = cls(())
        found._folder, found._purpose = folder, purpose
        found._read(folder)
        return found

    def _read(self, folder: Path) -> None:
        stamp = _changed_ns(folder)
        keys = {key.key_id: key for key in map(PublicKey.load, sorted(folder.glob(f"{self._purpose}*.pub")))}
        retired = dict[str, str]()
        for path in sorted(folder.glob(f"{self._purpose}*{ROTATIONS}")):
            try:
                found = read_rotations(load_statements(path), keys)
            except SignatureError as error:
                raise SignatureError(f"{path}: {error}") from None
            keys |= {rotation.new_public.key_id: rotation.new_public for rotation in found}
            retired |= {rotation.old_key_id: rotation.at for rotation in found}
        self._keys, self._retired, self._stamp = keys, retired, stamp

    def _refresh(self, key_id: str) -> None:
        # A folder that is not there now (an unmounted volume) takes no trust away. An unknown key asks again, as two
        # changes may fall into one tick of the file system's clock.
        stamp = _changed_ns(self._folder) if self._folder else 0
        if self._folder and stamp and (stamp != self._stamp or key_id not in self._keys):
            self._read(self._folder)

    def verify(self, signed: Any) -> dict[str, Any]:
        """The payload without `key_id` and `signature`, if the signature holds.

        Raises:
            SignatureError: not a signed value, an unknown key, a signature that does not match, or one that was made
                after its key was retired.
        """
        if isinstance(signed, Mapping):
            self._refresh(str(signed.get("key_id")))
        body = checked(signed, self._keys)
        until = self._retired.get(str(signed["key_id"]))
        for made in (body.get(name) for name in _TIMES):
            if until is not None and isinstance(made, str) and made > until:
                raise SignatureError(f"key_id={signed['key_id']}: was retired at {until}, the value was made at {made}")
        return body


def checked(signed: Any, keys: Mapping[str, PublicKey]) -> dict[str, Any]:
    """The payload without `key_id` and `signature`, if one of these keys signed it.

    Raises:
        SignatureError: not a signed value, an unknown key, or a signature that does not match.
    """
    if not isinstance(signed, Mapping) or "signature" not in signed or "key_id" not in signed:
        raise SignatureError("value carries no signature: must have key_id and signature")
    key = keys.get(str(signed["key_id"]))
    if key is None:
        known = ", ".join(sorted(keys)) or "none"
        raise SignatureError(f"key_id={signed['key_id']}: not trusted here; trusted keys: {known}")
    body = {name: value for name, value in signed.items() if name != "signature"}
    try:
        signature = _decoded(str(signed["signature"]))
        Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, canonical(body))
    except (InvalidSignature, ValueError, PrivacyError):
        raise SignatureError(f"key_id={signed['key_id']}: signature does not match; the value was changed") from None
    return {name: value for name, value in body.items() if name != "key_id"}


def _changed_ns(folder: Path) -> int:
    """When names in a folder changed last; 0 where there is none."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def _introductions(path: Path) -> set[tuple[str, str]]:
    """Which key introduced which, as the file beside the keys says."""
    return {(str(s.get("key_id")), str(s.get("new_key_id"))) for s in load_statements(path) if isinstance(s, dict)}


def _decoded(text: str) -> bytes:
    """Bytes of a base64url text. Python skips unknown characters and spare bits: one signature has one spelling."""
    found = base64.urlsafe_b64decode(text)
    if base64.urlsafe_b64encode(found).decode("ascii") != text:
        raise ValueError("not the canonical base64url")
    return found


def write_whole(path: Path, content: bytes, *, mode: int) -> None:
    """Write a file durably, whole or not at all."""
    _write_beside(path, content, mode=mode).replace(path)
    _sync_folder(path.parent)


def _write_beside(path: Path, content: bytes, *, mode: int) -> Path:
    """A synced file of a name of its own in the folder of `path`, ready to take its place."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as out:
        os.fchmod(out.fileno(), mode)
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    return Path(name)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
