"""Draw and noise of a round as keyed streams: secret, reproducible for an exact resume, gone when the round ends.

HKDF-SHA256 (RFC 5869) derives a ChaCha20 key (RFC 8439) from the round key and the hashes of everything that defines
a step; the keystream becomes uniforms and Gaussians. The round key is as secret as the data.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from privacy.canonical import canonical
from privacy.errors import RandomnessError

KEY_BYTES = 32
# A uniform takes the top 53 bits of a word: every value in [0, 1) of a double's full grid is equally likely.
_SHIFT = np.uint64(11)
_UNIT = 2.0**-53
# Each normal is the scaled sum of this many: an attacker who searches floating-point gaps of one Box-Muller sample
# (Mironov 2012) must then solve for all summands at once (Holohan, Braghin 2021).
SUMMANDS = 4


@dataclass(frozen=True)
class RoundKey:
    """32 bytes from the operating system, in a file of mode 0600 until the round ends."""

    secret: bytes

    def __repr__(self) -> str:
        return "RoundKey(secret)"

    @classmethod
    def create(cls, path: Path) -> RoundKey:
        """Make a key and fsync it before it is used.

        Raises:
            RandomnessError: there is one already: a second key would be a second release.
        """
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise RandomnessError(f"{path}: a round key exists; resume that round or start a new attempt") from None
        key = cls(os.urandom(KEY_BYTES))
        with os.fdopen(handle, "wb") as out:
            out.write(key.secret)
            out.flush()
            os.fsync(out.fileno())
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return key

    @classmethod
    def load(cls, path: Path) -> RoundKey:
        """Read a key for a resume.

        Raises:
            RandomnessError: it is gone, torn, or readable by others.
        """
        try:
            mode, secret = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
        except FileNotFoundError:
            raise RandomnessError(f"{path}: the round key is gone; only a new attempt is possible") from None
        if mode & 0o077:
            raise RandomnessError(f"{path}: mode {mode:04o} lets others read it; must be 0600; start a new attempt")
        if len(secret) != KEY_BYTES:
            raise RandomnessError(f"{path}: {len(secret)} bytes, must be {KEY_BYTES}; start a new attempt")
        return cls(secret)

    @staticmethod
    def destroy(path: Path) -> None:
        """Overwrite and remove the key. On copy-on-write file systems old blocks may survive: encrypt the disk."""
        if not path.exists():
            return
        with path.open("r+b") as out:
            out.write(bytes(KEY_BYTES))
            out.flush()
            os.fsync(out.fileno())
        path.unlink()


@dataclass(frozen=True)
class TestKey:
    """A key from a seed, for `noise_source: test`: reproducible, hence worth no privacy (epsilon is infinity)."""

    __test__ = False  # pytest: this is no test class
    seed: int

    @property
    def secret(self) -> bytes:
        """32 bytes that follow from the seed alone."""
        return _derive(self.seed.to_bytes(16, "big"), b"tidegate test noise")


class KeyedStream:
    """The randomness of one step.

    Args:
        key: the round's key.
        context: hashes of plan, data, base and code; any change gives an unrelated stream.
        step: 0-based.
    """

    def __init__(self, key: RoundKey | TestKey, context: Mapping[str, str], step: int) -> None:
        self._secret = key.secret
        self._info = canonical({"context": dict(context), "step": step})

    def _words(self, count: int, purpose: str) -> NDArray[np.uint64]:
        derived = _derive(self._secret, self._info + b"|" + purpose.encode("utf-8"))
        # The key is used for this one stream, so a constant nonce repeats nothing.
        keystream = Cipher(ChaCha20(derived, bytes(16)), mode=None).encryptor().update(bytes(8 * count))
        return np.frombuffer(keystream, dtype="<u8")

    def uniforms(self, n: int, purpose: str = "draw") -> NDArray[np.float64]:
        """`(n,)` uniforms in [0, 1); the same n, purpose, step and key give the same values, bit for bit."""
        return (self._words(n, purpose) >> _SHIFT).astype(np.float64) * _UNIT

    def gaussians(self, n: int, purpose: str = "noise") -> NDArray[np.float64]:
        """`(n,)` independent standard normals (Box-Muller, each the scaled sum of four)."""
        pairs = (n + 1) // 2
        uniforms = self.uniforms(2 * pairs * SUMMANDS, purpose).reshape(SUMMANDS, 2, pairs)
        total = np.zeros(2 * pairs)
        for first, second in uniforms:
            radius = np.sqrt(-2.0 * np.log1p(-first))  # 1 - u is in (0, 1], so the logarithm is finite
            angle = 2.0 * np.pi * second
            total[:pairs] += radius * np.cos(angle)
            total[pairs:] += radius * np.sin(angle)
        normals: NDArray[np.float64] = total[:n] / np.sqrt(SUMMANDS)
        return normals


def _derive(secret: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)
