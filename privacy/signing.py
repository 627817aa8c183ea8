"""Ed25519 signatures (RFC 8032) over canonical JSON: receipts, verdicts, approvals."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privacy.canonical import canonical
from privacy.errors import SignatureError

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
        """Read the key, or make one; safe when two processes do so at once.

        Raises:
            SignatureError: the file can be read by others, or holds no Ed25519 private key.
        """
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return cls._load(path)
        except OSError as error:
            raise SignatureError(f"{path}: cannot make a key: {error.strerror}") from None
        fresh = Ed25519PrivateKey.generate()
        pem = fresh.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with os.fdopen(handle, "wb") as out:
            out.write(pem)
            out.flush()
            os.fsync(out.fileno())
        key = cls(fresh)
        key.write_public(path.with_suffix(".pub"))
        return key

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
        signing = cls(key)
        if not path.with_suffix(".pub").exists():
            signing.write_public(path.with_suffix(".pub"))
        return signing

    def write_public(self, path: Path) -> None:
        """Write the public half as PEM."""
        public = self._key.public_key()
        pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        path.write_bytes(pem)

    def sign(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """The payload with `key_id` and `signature` (base64url) over everything but the signature."""
        body = {**payload, "key_id": self.key_id}
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
            signature = base64.urlsafe_b64decode(str(signed["signature"]))
            Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, canonical(body))
        except (InvalidSignature, binascii.Error, ValueError):
            raise SignatureError(
                f"key_id={signed['key_id']}: signature does not match; the value was changed"
            ) from None
        return {name: value for name, value in body.items() if name != "key_id"}
