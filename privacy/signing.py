"""Ed25519 signatures (RFC 8032) over canonical JSON: receipts, verdicts, approvals."""

from __future__ import annotations

import base64
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping
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


@dataclass(frozen=True)
class PublicKey:
    """A public key and its id: the first 16 hex digits of the SHA-256 of its 32 raw bytes."""

    raw: bytes

    @property
    def key_id(self) -> str:
        """Name of the key in signed values."""
        return hashlib.sha256(self.raw).hexdigest()[:KEY_ID_HEX]

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
            SignatureError: the file can be read by others, holds no Ed25519 private key, or its `.pub` is another's.
        """
        try:
            if not path.exists():
                cls._create(path)
            key = cls._load(path)
            key._keep_public(path.with_suffix(".pub"))  # noqa: SLF001 - a method of the same class
        except OSError as error:
            raise SignatureError(f"{path}: cannot read or make the key: {error.strerror}") from None
        return key

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
            if PublicKey.load(path) != self.public:
                raise SignatureError(
                    f"{path}: key_id={PublicKey.load(path).key_id}, must be {self.key_id}, the private key beside it; "
                    f"keep a retired public key under another name"
                )
            return
        self.write_public(path)

    def write_public(self, path: Path) -> None:
        """Write the public half as PEM, whole or not at all."""
        public = self._key.public_key()
        pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        _write_beside(path, pem, mode=0o644).replace(path)
        _sync_folder(path.parent)

    def sign(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """The payload with `key_id` and `signature` (base64url) over everything but the signature.

        A payload that carries a signature is signed anew: the old one is no part of it.

        Raises:
            PrivacyError: the payload is not JSON.
        """
        body = {name: value for name, value in payload.items() if name != "signature"} | {"key_id": self.key_id}
        signature = self._key.sign(canonical(body))
        return {**body, "signature": base64.urlsafe_b64encode(signature).decode("ascii")}


class TrustedKeys:
    """The public keys whose signatures count."""

    def __init__(self, keys: Iterable[PublicKey]) -> None:
        self._keys = {key.key_id: key for key in keys}

    @classmethod
    def from_dir(cls, folder: Path, purpose: str = "") -> TrustedKeys:
        """Every `PURPOSE*.pub` of a folder: `verdicts.pub`, `verdicts-2027.pub`; without a purpose, every key.

        Raises:
            SignatureError: one of them is not an Ed25519 public key.
        """
        return cls(PublicKey.load(path) for path in sorted(folder.glob(f"{purpose}*.pub")))

    def verify(self, signed: Any) -> dict[str, Any]:
        """The payload without `key_id` and `signature`, if the signature holds.

        Raises:
            SignatureError: not a signed value, an unknown key, or a signature that does not match.
        """
        if not isinstance(signed, Mapping) or "signature" not in signed or "key_id" not in signed:
            raise SignatureError("value carries no signature: must have key_id and signature")
        key = self._keys.get(str(signed["key_id"]))
        if key is None:
            known = ", ".join(sorted(self._keys)) or "none"
            raise SignatureError(f"key_id={signed['key_id']}: not trusted here; trusted keys: {known}")
        body = {name: value for name, value in signed.items() if name != "signature"}
        try:
            signature = _decoded(str(signed["signature"]))
            Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, canonical(body))
        except (InvalidSignature, ValueError, PrivacyError):
            raise SignatureError(
                f"key_id={signed['key_id']}: signature does not match; the value was changed"
            ) from None
        return {name: value for name, value in body.items() if name != "key_id"}


def _decoded(text: str) -> bytes:
    """Bytes of a base64url text. Python skips unknown characters and spare bits: one signature has one spelling."""
    found = base64.urlsafe_b64decode(text)
    if base64.urlsafe_b64encode(found).decode("ascii") != text:
        raise ValueError("not the canonical base64url")
    return found


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
